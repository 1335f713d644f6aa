"""The report of model_analysis.py: what is printed held against the JSON, and both against the model's own numbers."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import CONFIG, SHIPPED
from mlx.utils import tree_flatten
from printed import columns_of, facts_of, lines_of

from expert_parallel.models.architecture import describe, hybrid_rest_bytes
from expert_parallel.models.configurations import Configuration, load_configuration
from expert_parallel.models.forward import next_layer_recall
from expert_parallel.models.parts import Part
from expert_parallel.projection.hardware import LINKS, MACHINES
from expert_parallel.report import checks, model, projection
from expert_parallel.report.table import sections, size

DEVICES = [1, 2, 7, 8]
LINK, LINK_SOURCE = LINKS["thunderbolt-jaccl"]


@pytest.fixture(scope="module")
def described():
    """Qwen3-Coder-30B at 4 bits, whose bytes are known from the published checkpoint."""
    return describe(load_configuration("qwen3-coder-30b"), bits=4)


def printed(tables):
    return "\n".join(map(str, tables))


def test_what_is_in_a_model(described):
    tables = model.architecture(described, load_configuration("qwen3-coder-30b"), 2048)
    figures, text = sections(tables)["architecture"], printed(tables)
    facts = facts_of(text, "qwen3-coder-30b (modelled: no weights were read)")
    assert (figures["parameters"], figures["bytes"]) == (30_532_122_624, 17_180_913_664)
    assert facts["parameters"] == f"{figures['parameters']:,} (published: 30.50 B)"
    assert facts["experts, all"] == f"{figures['expert_bytes']:,} B" == "16,307,453,952 B"
    assert facts["one expert"] == "2,654,208 B, 4,718,592 parameters"
    assert facts["experts"] == "128 a layer, 8 chosen per token (6.25%)"
    assert facts["layers"] == "48, all of them MoE"
    cache = 48 * 2 * 4 * 128 * 2  # layers, keys and values, heads, head size, bytes
    assert facts["keys and values"] == f"{cache:,} B a token, {size(2048 * cache)} at 2,048 tokens"
    assert figures["expert_bytes"] + figures["rest_bytes"] == figures["bytes"]
    assert figures["source"].startswith("modelled") and figures["published"]["total"] == 30.5e9
    parts = columns_of(text, "Parts over all layers", len(figures["parts"]))
    assert list(parts["part"]) == list(figures["parts"])
    assert parts["bytes"] == tuple(size(part["bytes"]) for part in figures["parts"].values())
    assert sum(part["bytes"] for part in figures["parts"].values()) == figures["bytes"]
    assert parts["share"][0] == f"{figures['parts']['experts']['bytes'] / figures['bytes']:.2%}" == "94.92%"
    shapes = columns_of(text, "Expert weights of a layer", len(figures["expert_weights"]))
    assert dict(zip(shapes["tensor"], shapes["shape"], strict=True)) == {
        name: weight["shape"] for name, weight in figures["expert_weights"].items()
    }


def test_one_expert_is_of_the_first_layer_that_has_some(described):
    """As where later layers are quantised otherwise: weighed and counted is the first MoE layer's expert."""
    growing = replace(described.bytes, expert_bytes=np.arange(100, 148))
    dense = replace(described.layers[0], moe=False)
    halves = [replace(layer, parts=layer.parts | {"experts": Part(128 * (100 + n), 1)})
              for n, layer in enumerate(described.layers[1:])]  # fmt: skip
    mixed = replace(described, bytes=growing, layers=[dense, *halves])
    figures = model.architecture(mixed, load_configuration("qwen3-coder-30b"), 1)[0].to_json()
    assert (figures["bytes_of_one_expert"], figures["parameters_of_one_expert"]) == (100, 100)


def test_layers_alike_stand_in_one_line():
    described = describe(load_configuration("deepseek-v2-lite"))
    tables = model.architecture(described, load_configuration("deepseek-v2-lite"), 2048)
    layers, text = sections(tables)["architecture"]["layers"], printed(tables)
    assert [layer["numbers"] for layer in layers] == [[0], list(range(1, 27))]
    assert lines_of(text, "Layers, one line")[1].split()[:2] == ["0", "dense"]  # and no bytes of experts
    assert lines_of(text, "Layers, one line")[2].split()[:2] == ["1-26", "MoE"]
    each = [len(layer["numbers"]) * layer["bytes_each"] for layer in layers]
    assert sum(each) < described.bytes.total
    assert "26 of them MoE" in text


def test_memory_of_the_fullest_device(described):
    tables = model.memory(described, DEVICES, redundant=32)
    figures, text = sections(tables)["memory"], printed(tables)
    assert figures["source"] == "modelled" and "Memory of the fullest device (modelled)" in text
    columns = columns_of(text, "Memory of the fullest device", len(DEVICES))
    assert all(f"{word}:" in text for word in ("per layer", "less", "hybrid"))
    for n, row in enumerate(figures["devices"]):
        experts = -(-128 // DEVICES[n])
        whole = experts * 48 * 2_654_208 + 873_459_712
        assert (row["devices"], row["experts_per_layer"], row["replicated_rest_bytes"]) == (DEVICES[n], experts, whole)
        assert columns["+ rest on each"][n] == size(whole)
        assert row["expert_bytes"] == experts * 48 * 2_654_208
        assert columns["less"][n] == f"{17_180_913_664 / whole:.2f}x"
        copied = -(-160 // DEVICES[n]) * 48 * 2_654_208 + 873_459_712
        assert row.get("with_copies_bytes") == (copied if n else None)
        assert columns["+32 copies"][n] == (size(copied) if n else "-")
    assert [row["hybrid_bytes"] is None for row in figures["devices"]] == [False, False, True, True]
    assert facts_of(text, "No hybrid")["on 7, 8"] == figures["hybrid_not_possible"]


def test_hybrid_where_some_numbers_divide_and_where_none_can():
    """Qwen3-Coder has 4 heads of keys and values: 2 and 4 ranks can share them, 3 cannot; gpt-oss has no shard()."""
    coder = describe(load_configuration("qwen3-coder-30b"), bits=4)
    tables = model.memory(coder, [1, 2, 3, 4])
    for row in tables[0].to_json()["devices"][1::2]:
        split = hybrid_rest_bytes(coder.model, row["devices"])
        assert row["hybrid_bytes"] == row["expert_bytes"] + split < row["replicated_rest_bytes"]
    assert [row["hybrid_bytes"] is None for row in tables[0].to_json()["devices"]] == [False, False, True, False]
    assert list(facts_of(printed(tables), "No hybrid")) == ["on 3"]
    tables = model.memory(describe(load_configuration("mixtral-8x7b")), [1, 2])
    rows = tables[0].to_json()["devices"]
    assert rows[0]["hybrid_bytes"] == rows[0]["replicated_rest_bytes"]  # one device has all of it, either way


def test_devices_of_a_size(described):
    cache = described.cache_bytes_at(2048)
    table = model.fit(described, DEVICES, 8e9, 2048)
    figures, facts = (
        table.to_json(),
        facts_of(str(table), "Devices of 8.00 GB, with the cache of 2,048 tokens (modelled)"),
    )
    needed = next(n for n in range(1, 129) if -(-128 // n) * 48 * 2_654_208 + 873_459_712 + cache <= 8e9)
    assert figures["fewest_devices"] == needed and facts["fewest devices"] == f"{needed} hold the model"
    assert [row["devices"] for row in figures["lacking"]] == [n for n in DEVICES if n < needed]
    assert facts["1 devices"] == f"{size(17_180_913_664 + cache - 8e9)} short"
    exact = model.fit(described, DEVICES, 17_180_913_664 + cache, 2048).to_json()
    assert (exact["fewest_devices"], exact["lacking"]) == (1, [])  # not a byte more is needed
    assert model.fit(described, DEVICES, 17_180_913_664 + cache - 1, 2048).to_json()["fewest_devices"] == 2
    none = model.fit(described, DEVICES, 1e6, 2048)
    least = 48 * 2_654_208 + 873_459_712 + cache
    assert none.to_json()["fewest_devices"] is None and none.to_json()["smallest_device_bytes"] == least
    assert facts_of(str(none), "Devices")["fewest devices"] == f"none: {size(least)} is the least"


# --- files, text --------------------------------------------------------------------------------------------------


def test_a_checkpoint_with_many_problems():
    problems = [f"[b]{n} is [1], should be [2]" for n in range(30)]
    figures = {"source": "measured on the files' headers", "ok": False, "problems": problems, "num_files": 1,
               "num_tensors": 40, "bytes_on_disk": 1234, "bytes_loaded": None, "bytes_predicted": None}  # fmt: skip
    tables = checks.checkpoint(figures)
    assert sections(tables)["checkpoint"] == figures
    facts = facts_of(printed(tables), "Checkpoint (measured on the files' headers)")
    assert facts == {
        "verdict": "30 problems",
        "files": "1, 40 tensors, 1,234 B",
        "as mlx-lm loads them": "not known",
        "from the configuration": "not known",
    }
    assert "[b]15" in printed(tables) and "[b]16" not in printed(tables)
    assert "16 of 30 rows" in printed(tables)
    one = checks.checkpoint({**figures, "problems": problems[:1]})
    assert facts_of(printed(one), "Checkpoint")["verdict"] == "1 problem"
    two = checks.checkpoint({**figures, "problems": problems[:2]})
    assert facts_of(printed(two), "Checkpoint")["verdict"] == "2 problems"
    whole = {**figures, "ok": True, "problems": [], "bytes_loaded": 2345, "bytes_predicted": 3456}
    tables = checks.checkpoint(whole)
    facts = facts_of(printed(tables), "Checkpoint")
    assert (len(tables), facts["verdict"]) == (1, "whole, as mlx-lm's strict load wants it")
    assert facts["as mlx-lm loads them"] == "2,345 B"
    assert facts["from the configuration"] == "3,456 B (modelled)"


def test_forward_tables_show_chance_beside_what_was_found():
    experts = np.random.default_rng(0).random((40, 3, 16)).argsort(axis=2)[..., :4]
    recall, by_use = next_layer_recall(experts, 16)
    rows = [
        {"layer": l, "entropy": 0.9, "margin_median": 0.25, "margin_lowest_tenth": float("inf"),
         "overlap_with_token_before": float("nan"), "strongest_pair": lift and (1, 2), "strongest_pair_lift": lift,
         "foretold_by_layer_before": [None, *recall][l], "foretold_by_popularity": [None, *by_use][l]}
        for l, lift in enumerate((2.0, None, 3.0))
    ]  # fmt: skip
    texts = {
        name: {"source": "measured", "tokens": 40, "tokens_cut": cut, "overlap_by_chance": 0.25, "layers": rows}
        for name, cut in (("code", 0), ("x", 7))
    }
    similarity = {"code": {"code": 1.0, "x": 0.25}, "x": {"code": 0.25, "x": 1.0}}
    tables = checks.forward_tables(texts, similarity, {"prompt": [0.002, 0.004], "token": [0.001, 0.0005]})
    document, text = sections(tables)["forward"], printed(tables)
    json.dumps(document, allow_nan=False)
    columns = columns_of(text, "Routing of code (measured, 40 tokens; by chance 0.25 as before)", 3)
    assert columns["foretold (by use)"] == ("-", *(f"{a:.2f} ({b:.2f})" for a, b in zip(recall, by_use, strict=True)))
    assert columns["strongest pair"] == ("#1 #2", "-", "#1 #2")
    quantities = ["entropy", "margin", "lowest 10%", "as before", "foretold (by use)", "strongest pair"]
    assert list(columns) == ["layer", *quantities]
    assert text.count("cut to the model's context, 7 tokens fewer than asked for") == text.count("cut to") == 1
    assert columns["as before"] == columns["lowest 10%"] == ("-",) * 3
    assert document["texts"]["code"]["layers"][2]["foretold_by_layer_before"] == pytest.approx(recall[1])
    assert document["domains"] == {"source": "measured", "similarity": similarity}
    assert lines_of(text, "How alike texts use the experts (cosine of loads, measured)")[2].split() == [
        "x",
        "0.25",
        "1.00",
    ]
    alone = checks.forward_tables({"code": texts["code"]}, {"code": {"code": 1.0}}, {"prompt": [0.002]})
    assert "How alike" not in printed(alone)  # to itself alone
    seconds = columns_of(text, "Time of decoder layers (measured", 2)
    assert (seconds["prompt ms"], seconds["token ms"]) == (("2.00", "4.00"), ("1.00", "0.50"))
    assert document["seconds"]["token"] == [0.001, 0.0005]


def test_words_of_tables():
    assert [model.billions(n) for n in (30_532_122_624, 4_718_592, 1500, 3)] == ["30.53 B", "4.72 M", "1.50 k", "3"]
    numbers = ([0, 1, 2], [4], [0, 2, 4, 6], [1, 3])
    assert [model.numbers_text(n) for n in numbers] == ["0-2", "4", "4: 0, 2, 4, ...", "2: 1, 3"]
    assert [projection.speed(n) for n in (1753.9, 65.84, 0.01234)] == ["1754", "65.8", "0.012"]


def test_every_source_stands_in_its_heading(described):
    configuration = load_configuration("qwen3-coder-30b")
    setting = projection.Setting(MACHINES["h100"], LINK, "x", "y", 0, DEVICES)
    tables = [
        *model.architecture(described, configuration, 1), *model.memory(described, DEVICES),
        model.fit(described, DEVICES, 1e9, 1), *projection.projection(described, setting),
    ]  # fmt: skip
    for table in tables:
        assert table.source in table.heading()
    assert all("source" in section for section in sections(tables).values())


@pytest.mark.parametrize("cache_speed", [0.0, 3e9])
def test_this_machine_in_print_and_json(cache_speed, monkeypatch):
    """Fitted on first layers alone; a speed that was not measured has no line, a link that is missing its reason."""
    seen = []

    def measured(small, demand, head_bytes):
        seen.append((len(small.layers), demand.num_layers, head_bytes))
        return replace(MACHINES["m4-max"], cache_bytes_per_second=cache_speed)

    def linked(backend):
        if backend == "mpi":
            raise ValueError("no mpirun here")
        return replace(LINK, latency_seconds=20e-6, bytes_per_second=2e9), [{"payload_bytes": 4096}]

    monkeypatch.setattr(checks, "measure_machine", measured)
    monkeypatch.setattr(checks, "measure_link", linked)
    configuration = load_configuration(str(SHIPPED))
    tiny = describe(configuration)
    two = 2 * tiny.layers[0].whole.bytes + 1
    machine, links, table = checks.machine(configuration, tiny, {}, most_bytes=two)
    figures, facts = sections([table])["this_machine"], facts_of(str(table), "This machine")
    assert seen == [(2, 2, tiny.outside["head"].bytes)] and figures["layers"] == 2
    assert figures["source"] == "measured on 2 layers with random weights"
    assert list(links) == ["ring"] and machine.memory_bytes > 1e8
    assert facts.get("keys and values moved") == ("3.00 GB/s" if cache_speed else None)
    assert facts["weights moved"] == "473.10 GB/s, of experts 473.10 GB/s"
    assert facts["fixed cost of a layer"] == "99 us" and facts["arithmetic"] == "11040.00 GFLOP/s"
    assert facts["link ring, 2 processes"] == "20 us a step, 2.00 GB/s" and facts["link mpi"] == "no mpirun here"
    assert figures["links"]["ring"] == {
        "latency_seconds": 20e-6, "bytes_per_second": 2e9, "measured": [{"payload_bytes": 4096}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("dense", "budget", "layers"),
    [([], 0, 1), ([], 2.5, 2), ([], 100, 4), ([0, 1], 0, 3), ([0, 1], 100, 6)],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_machine_is_measured_on_its_first_moe_layers(dense, budget, layers, tied, monkeypatch):
    """One to four of them, as many as fit into the budget; the head is the embeddings where both are one."""
    seen = []

    def measured(model, demand, head_bytes):
        seen.append((len(model.layers), demand.num_moe_layers, head_bytes))
        floats = {array.dtype for _, array in tree_flatten(model.parameters()) if array.dtype != mx.uint32}
        assert floats == {mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16}  # as it would run here
        return MACHINES["m4-max"]

    monkeypatch.setattr(checks, "measure_machine", measured)
    monkeypatch.setattr(checks, "measure_link", lambda backend: (LINK, []))
    monkeypatch.setattr(checks.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1_000_000}.get)
    config = {**CONFIG, "num_hidden_layers": 8, "mlp_only_layers": dense, "tie_word_embeddings": tied}
    configuration = Configuration("eight", config | {"vocab_size": 96})
    described = describe(configuration, bits=4)
    budget *= described.layers[-1].whole.bytes
    machine, _, table = checks.machine(configuration, described, {"bits": 4}, most_bytes=budget)
    head = 96 * 64 * (4 + 0.5) / 8  # 4 bits, and half a bit of scale and bias
    assert seen == [(layers, layers - len(dense), head)]
    assert table.to_json()["layers"] == layers and machine.memory_bytes == 4096 * 1_000_000
