"""The report of a run: every figure recomputed by a plain loop, and what is printed held against the JSON."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import SHIPPED, random_model
from mlx.utils import tree_flatten
from mlx_lm.models.qwen3_moe import Qwen3MoeSparseMoeBlock
from printed import columns_of, facts_of, lines_of

from expert_parallel import Placement, RoutingTrace, place_experts, shard_model
from expert_parallel.command.prompts import Prompt
from expert_parallel.models.memory import ModelBytes
from expert_parallel.report import cost, run
from expert_parallel.report.measuring import Seconds
from expert_parallel.report.table import sections
from expert_parallel.serving import Serving

T, L, E, K, D = 60, 3, 16, 4, 4
NUMBERS = [1, 4, 5]  # of the decoder layers that are MoE


def a_trace(seed=0, tokens=T, layers=L):
    """Skewed choices; the first third is the prompt."""
    wish = np.random.default_rng(seed).random((tokens, layers, E)) * np.linspace(1, 3, E)
    return RoutingTrace(np.argsort(-wish, axis=2)[..., :K], E, np.arange(tokens) < tokens // 3)


def slots_by_device(trace, placement, tokens):
    """[L][D] by counting one slot after the other; of replicas the one that is asked for, prompt first, then each."""
    loads = [[0.0] * placement.num_devices for _ in range(placement.num_layers)]
    prompt = int(trace.prefill.sum())
    for l in range(placement.num_layers):
        serving = Serving(placement.held[l])
        for start, end in [(0, prompt), *((t, t + 1) for t in range(prompt, len(trace)))]:
            ids = trace.experts[start:end, l].astype(int)
            for t, devices in zip(range(start, end), serving.devices(ids).tolist(), strict=True):
                for device in devices if t in tokens else []:
                    loads[l][device] += 1
    return loads


def evenness(loads):
    """SGLang's and vLLM's balancedness of [L][D]."""
    each = [(sum(row) / len(row) + 1e-5) / (max(row) + 1e-5) for row in loads]
    return sum(each) / len(each), sum(sum(row) / len(row) for row in loads) / sum(map(max, loads))


def beside_chance(figures):
    even = figures["balancedness_if_uniform_simulated"]
    return f"{figures['balancedness_layers']:.3f} (uniform: {even:.3f}, simulated)"


# --- balance ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy, redundant", [("contiguous", 0), ("round-robin", 0), ("replicated", 5)])
def test_balance_counted_slot_by_slot(strategy, redundant):
    trace = a_trace()
    placement = place_experts(trace.loads(), D, strategy, redundant)
    tables = run.balance(trace, [(0, placement.held)], NUMBERS, placement)
    figures, text = sections(tables)["balance"], "\n".join(map(str, tables))
    loads = slots_by_device(trace, placement, range(T))
    np.testing.assert_allclose(figures["device_loads"], loads)
    fullest = np.argmax(figures["device_loads"], axis=1)  # replicas can make two equally full
    assert np.array(loads)[range(L), fullest] == pytest.approx(np.max(loads, axis=1))
    for name, tokens in (("prefill", range(T // 3)), ("decode", range(T // 3, T))):
        expected = evenness(slots_by_device(trace, placement, tokens))
        found = figures["phases"][name]
        assert (found["balancedness_layers"], found["balancedness_aggregate"]) == pytest.approx(expected)
        assert found["tokens"] == len(tokens)
        line = f"balancedness in {name} ({len(tokens)} tokens)"
        assert facts_of(text, "Balance over all layers")[line] == beside_chance(found)
    assert (figures["balancedness_layers"], figures["balancedness_aggregate"]) == pytest.approx(evenness(loads))
    assert figures["imbalance_ratio_per_layer"] == pytest.approx([max(row) * D / sum(row) - 1 for row in loads])
    assert figures["coefficient_of_variation_per_layer"] == pytest.approx([np.std(row) / np.mean(row) for row in loads])
    assert figures["min_max_ratio_per_layer"] == pytest.approx([min(row) / max(row) for row in loads])
    each = [slots_by_device(trace, placement, [t]) for t in range(T)]
    touched = [np.mean([sum(load > 0 for load in loads[l]) for loads in each]) for l in range(L)]
    assert figures["fan_out_per_layer"] == pytest.approx(touched)
    assert ("uniform" in facts_of(text, "Balance over all layers")["devices touched per token (fan-out)"]) == (
        not redundant
    )


def test_what_is_printed_of_balance_is_what_json_says():
    trace = a_trace()
    placement = place_experts(trace.loads(), D)
    tables = run.balance(trace, [(0, placement.held)], NUMBERS, placement)
    figures, text = sections(tables)["balance"], "\n".join(map(str, tables))
    columns = columns_of(text, "Balance over devices (measured)", L)
    assert list(columns) == ["layer", "balancedness", "max/mean-1", "std/mean", "min/max", "fan-out"]
    assert columns["layer"] == ("1", "4", "5")
    for label, key, show in (
        ("balancedness", "balancedness_per_layer", "{:.3f}"),
        ("max/mean-1", "imbalance_ratio_per_layer", "{:.3f}"),
        ("std/mean", "coefficient_of_variation_per_layer", "{:.3f}"),
        ("min/max", "min_max_ratio_per_layer", "{:.3f}"),
        ("fan-out", "fan_out_per_layer", "{:.2f}"),
    ):
        assert columns[label] == tuple(map(show.format, figures[key]))
    assert facts_of(text, "Balance over all layers") == {
        "balancedness, mean over layers (SGLang)": beside_chance(figures),
        "balancedness, aggregate (vLLM)": f"{figures['balancedness_aggregate']:.3f}",
        "devices touched per token (fan-out)": f"{figures['fan_out']:.2f} (uniform: "
        f"{figures['fan_out_if_uniform_modelled']:.2f}, modelled)",
        "balancedness in prefill (20 tokens)": beside_chance(figures["phases"]["prefill"]),
        "balancedness in decode (40 tokens)": beside_chance(figures["phases"]["decode"]),
    }
    assert "1/4 all on one device" in text
    # k of E drawn without replacement miss a device of E/D with C(E - E/D, k) / C(E, k).
    expected = D * (1 - math.comb(E - E // D, K) / math.comb(E, K))
    assert figures["fan_out_if_uniform_modelled"] == pytest.approx(expected)


def test_each_token_counts_under_the_placement_that_answered_it():
    trace = a_trace()
    placements = [place_experts(trace.loads(), D, way) for way in ("contiguous", "round-robin", "balanced")]
    changes = list(zip((0, 25, 40), (each.held for each in placements), strict=True))
    figures = sections(run.balance(trace, changes, NUMBERS, placements[0]))["balance"]
    parts = [range(25), range(25, 40), range(40, T)]
    loads = sum(np.array(slots_by_device(trace, p, part)) for p, part in zip(placements, parts, strict=True))
    np.testing.assert_allclose(figures["device_loads"], loads)


def test_rebalancing_compares_with_and_without_the_move():
    trace = a_trace()
    before, after = (place_experts(trace.loads(), D, way) for way in ("contiguous", "balanced"))
    about = {"pause_seconds": 0.5, "pause_seconds_modelled": 0.25, "gain_seconds_modelled": 2.0}
    looks = [
        {"after_tokens": 16, "moved": False, "moves_of_all": 3, "bytes_of_all": 9, **about},
        {"after_tokens": 32, "moved": True, "moves_of_all": 7, "bytes_of_all": 21_000_000, **about},
    ]
    live = {"looks": looks, "costs": {"side_by_side": False}, "tokens_until_look": 16}
    table = run.rebalancing(live, [(0, before), (32, after)], trace)
    unmoved, kept = (evenness(slots_by_device(trace, p, range(32, T)))[0] for p in (before, after))
    since = table.to_json()["looks"][1]["since"]
    assert since == {
        "tokens": 28, "balancedness": pytest.approx(kept), "balancedness_unmoved": pytest.approx(unmoved)
    }  # fmt: skip
    head, stay, move, *note = lines_of(str(table), "Rebalancing")
    assert head.split("  ")[-1] == "as moved" and stay.split() == ["16", "stay", *"------"]
    cells = ["32", "7", "21.00", "MB", "0.50", "s", "0.25", "s", "2.00", "s", f"{unmoved:.3f}", f"{kept:.3f}"]
    assert move.split() == cells
    assert "pause are measured, predicted pause and gain modelled, as if devices ran" in " ".join(note)
    assert table.to_json()["tokens_until_look"] == 16 and "measured" in table.to_json()["source"]


# --- routing ----------------------------------------------------------------------------------------------------


def test_entropy_is_one_where_all_experts_are_used_alike_and_nought_for_one():
    even = np.arange(E).reshape(E, 1, 1)  # k = 1
    experts = np.concatenate([even, np.full((E, 1, 1), 5)])
    trace = RoutingTrace(experts, E, np.arange(2 * E) < E)  # the prompt is even, decoding is not
    figures = sections(run.routing(trace, [0]))["routing"]
    assert figures["prefill"]["entropy_per_layer"] == [pytest.approx(1)]
    assert figures["decode"]["entropy_per_layer"] == [pytest.approx(0)]
    assert figures["decode"]["hottest_expert_per_layer"] == [5]
    assert (figures["prefill"]["unused_experts_per_layer"], figures["decode"]["unused_experts_per_layer"]) == (
        [0],
        [15],
    )
    assert figures["decode"]["hottest_over_mean_per_layer"] == [pytest.approx(E)]


def test_routing_counted_slot_by_slot_and_as_printed():
    trace = a_trace()
    tables = run.routing(trace, NUMBERS)
    figures, text = sections(tables)["routing"], "\n".join(map(str, tables))
    counts = [[int((trace.experts[:, l] == e).sum()) for e in range(E)] for l in range(L)]
    columns = columns_of(text, f"Routing (measured, {T} tokens, top-{K} of {E})", L)
    for l, row in enumerate(counts):
        shares = [count / sum(row) for count in row if count]
        assert figures["all"]["hottest_expert_per_layer"][l] == max(range(E), key=row.__getitem__)
        assert figures["all"]["entropy_per_layer"][l] == pytest.approx(-sum(s * math.log(s, E) for s in shares))
        assert figures["all"]["unused_experts_per_layer"][l] == row.count(0)
        assert columns["hottest expert"][l] == f"#{figures['all']['hottest_expert_per_layer'][l]}"
        assert columns["load / mean"][l] == f"{max(row) * E / sum(row):.2f}x"
        assert columns["entropy (1 = even)"][l] == f"{figures['all']['entropy_per_layer'][l]:.3f}"
    phases = columns_of(text, "Routing by phase (measured, means over layers; if uniform: simulated)", 4)
    assert phases["phase"] == ("prefill", "if uniform", "decode", "if uniform")
    phases = {name: column[::2] for name, column in phases.items()}
    for n, name in enumerate(("prefill", "decode")):
        assert figures[name]["tokens"] == int(phases["tokens"][n])
        assert phases["entropy"][n] == f"{np.mean(figures[name]['entropy_per_layer']):.3f}"
        assert phases["hottest / mean"][n] == f"{np.mean(figures[name]['hottest_over_mean_per_layer']):.2f}x"
        assert phases["never used"][n] == f"{np.mean(figures[name]['unused_experts_per_layer']):.1f}"
    assert {key: figures[key] for key in ("source", "num_experts", "top_k", "dropped_tokens")} == {
        "source": "measured", "num_experts": E, "top_k": K, "dropped_tokens": 0,
    }  # fmt: skip


def test_a_run_without_decoding_has_no_such_phase():
    trace = RoutingTrace(a_trace().experts, E, np.ones(T, dtype=bool))
    tables = run.routing(trace, NUMBERS)
    assert sections(tables)["routing"]["decode"] is None
    assert columns_of(str(tables[1]), "Routing by phase", 2)["phase"] == ("prefill", "if uniform")
    placement = place_experts(trace.loads(), D)
    assert "decode" not in sections(run.balance(trace, [(0, placement.held)], NUMBERS, placement))["balance"]["phases"]


def test_of_48_layers_the_16_worst_are_printed():
    trace = a_trace(layers=48)
    numbers = list(range(48))
    placement = place_experts(trace.loads(), D)
    for table, key, label in (
        (run.routing(trace, numbers)[0], "entropy_per_layer", "entropy (1 = even)"),
        (run.balance(trace, [(0, placement.held)], numbers, placement)[0], "balancedness_per_layer", "balancedness"),
    ):
        values = table.to_json()[key]
        columns = columns_of(str(table), table.title, 16)
        assert sorted(columns[label]) == [f"{value:.3f}" for value in sorted(values)[:16]]
        assert len(values) == 48 and "16 of 48 rows, the " in str(table)


# --- parity -----------------------------------------------------------------------------------------------------


def test_parity_says_when_the_answers_differ():
    logits = mx.array([[1.0, 2.0], [3.0, 4.0]])
    same = run.parity(logits, [7, 8], logits.astype(mx.float16), [7, 8])
    assert facts_of(str(same), "Parity with stock mlx-lm (measured)") == {
        "tokens": "the same (2 compared)", "largest logit difference": "0 (4 compared)",
    }  # fmt: skip
    other = run.parity(logits, [7, 8], logits + mx.array([[0, 0], [0, -0.25]]), [7, 9])
    assert facts_of(str(other), "Parity")["tokens"] == "NOT the same (the first 1 of 2 are)"
    assert facts_of(str(other), "Parity")["largest logit difference"] == "0.25 (4 compared)"
    figures = {"tokens_equal": False, "max_abs_logit_difference": 0.25, "tokens_compared": 2, "logits_compared": 4}
    figures["tokens_equal_at_first"] = 1
    assert other.to_json() == {"source": "measured", **figures}
    broken = run.parity(logits, [7], logits * mx.array(float("nan")), [7])
    assert facts_of(str(broken), "Parity")["largest logit difference"] == "not a number"
    assert broken.to_json()["max_abs_logit_difference"] is None


# --- what it takes ----------------------------------------------------------------------------------------------

HELD = np.zeros((2, 3, 8), dtype=bool)
HELD[:, 0, :4] = HELD[:, 1, 4:] = HELD[0, 2, :1] = HELD[1, 2, 5:7] = True
PLACEMENT = Placement(HELD, "[/x] by hand")
WHOLE = ModelBytes(np.array([100, 1000]), 8, rest=50)


def of_rank(experts, rest, peak, milliseconds=8):
    seconds = {"tokens": 4, "experts": milliseconds / 1e3, "collectives": 0.002, "waiting": 0.001}
    return {"expert_bytes": experts, "expert_bytes_per_device": [4400, 4400, 2100], "rest_bytes": rest,
            "resident": {"now": 7_000_000, "peak": peak}, "slots_computed_per_layer": [3, 4],
            "seconds": seconds}  # fmt: skip


def test_memory_of_simulated_devices_is_measured_but_for_the_rest():
    tables = cost.memory(WHOLE, PLACEMENT, 1_050_000, [of_rank(0, 0, 9_000_000)])
    figures, text = sections(tables)["memory"], "\n".join(map(str, tables))
    assert figures["source"] == "experts measured; the rest, here once, modelled on each"
    assert f"Memory per device ({figures['source']})" in text
    assert figures["experts_per_device_bytes_modelled"] == [4 * 100 + 4 * 1000] * 2 + [100 + 2 * 1000]
    assert figures["experts_per_device_bytes"] == figures["experts_per_device_bytes_modelled"]
    assert figures["per_device_bytes"] == [4450, 4450, 2150]
    assert (figures["full_model_bytes"], figures["full_model_expert_bytes"]) == (8850, 8800)
    assert figures["reduction"] == pytest.approx(8850 / 4450)
    assert figures["reduction_of_experts"] == pytest.approx(2)
    assert (figures["kv_cache_bytes"], figures["peak_process_bytes"]) == (1_050_000, 9_000_000)
    columns = columns_of(text, "Memory per device", 3)
    assert columns == {
        "device": ("0", "1", "2"), "experts": ("4.40 kB", "4.40 kB", "2.10 kB"),
        "the rest": ("50 B",) * 3, "together": ("4.45 kB", "4.45 kB", "2.15 kB"),
    }  # fmt: skip
    assert facts_of(text, "Memory over all") == {
        "whole model": "8.85 kB in memory, 8.80 kB of it experts",
        "fullest device": "4.45 kB: 1.99x less than the whole",
        "experts alone": "2.00x less",
        "key-value cache": "1.05 MB on each device besides",
        "process at its peak": "9.00 MB, with Python and MLX",
    }


def test_a_device_that_lost_its_experts_has_no_rest_either():
    alone = {**of_rank(0, 0, 9), "expert_bytes_per_device": [4400, 4400, 0]}
    table = cost.memory(WHOLE, PLACEMENT, 0, [alone])[0]
    assert table.to_json()["per_device_bytes"] == [4450, 4450, 0]
    assert "device 2 is lost, with all it held" in str(table)


def test_memory_of_ranks_is_measured_on_each():
    ranks = [of_rank(4400, 30, 5), of_rank(4400, 50, 9), of_rank(2100, 3000, 7)]
    figures = sections(cost.memory(WHOLE, PLACEMENT, 0, ranks))["memory"]
    assert figures["source"] == "measured" and figures["peak_process_bytes"] == 9
    assert figures["per_device_bytes"] == [4430, 4450, 5100]  # the fullest has the fewest experts
    assert figures["reduction"] == pytest.approx(8850 / 5100)


def test_what_a_rank_holds_and_computed_is_counted_on_its_own_arrays():
    """Here of one process that plays all devices: all of them together."""
    model = shard_model(random_model(), place_experts(np.zeros((L, E)), D))
    held = tree_flatten(model.parameters())
    figures = cost.rank_figures(model, Seconds(1))
    of_experts = sum(array.nbytes for name, array in held if ".experts." in name or ".switch_mlp." in name)
    assert figures["expert_bytes"] == sum(figures["expert_bytes_per_device"]) == of_experts > 0
    assert figures["rest_bytes"] == sum(array.nbytes for _, array in held) - of_experts > 0
    assert figures["slots_computed_per_layer"] == [0] * L


def test_of_many_devices_the_fullest_are_printed():
    experts = list(range(1000, 1064))
    ranks = [of_rank(each, 0, 1) | {"expert_bytes_per_device": experts} for each in experts]
    held = np.eye(64, dtype=bool)[None]
    table = cost.memory(ModelBytes(np.array([1000]), 64, 0), Placement(held), 0, ranks)[0]
    assert columns_of(str(table), "Memory", 16)["device"] == tuple(map(str, range(48, 64)))
    assert "16 of 64 rows, the fullest; --json has all." in str(table)


def test_what_each_rank_did():
    ranks = [of_rank(4_400_000, 30, 5), of_rank(2_100_000, 50, 9, milliseconds=16)]
    table = cost.ranks_table(ranks)
    assert sections([table], ranks=None) == {"ranks": ranks}
    assert columns_of(str(table), "Ranks (measured; milliseconds per token, on 4 tokens with stops)", 2) == {
        "rank": ("0", "1"), "experts": ("4.40 MB", "2.10 MB"), "process": ("7.00 MB",) * 2, "slots": ("7", "7"),
        "experts ms": ("2.00", "4.00"), "collectives ms": ("0.50",) * 2, "waiting ms": ("0.25",) * 2,
    }  # fmt: skip


def test_communication_by_formula_and_as_counted():
    model, trace = shard_model(random_model(), place_experts(np.zeros((L, E)), D)), a_trace()
    reduce, gather = 64 * 2 * L, 64 * 2 * L * K  # hidden, bytes of a value, layers
    alone = cost.communication(model, trace, 2, {}, ranks=1)
    assert alone.title == "Communication (modelled, 2-byte values; in one process nothing is sent)"
    figures = alone.to_json()
    assert figures["bytes_per_token_by_combine"] == {"reduce": reduce, "gather": gather}
    assert (figures["source"], figures["combine"], figures["bytes_per_token"]) == ("modelled", "reduce", reduce)
    assert figures["ring_bytes_sent_per_token_and_rank"] == round(2 * (D - 1) / D * reduce)
    assert "counted" not in figures and figures["value_bytes"] == 2
    assert list(facts_of(str(alone), "Communication").values()) == [
        "384 B per token",
        "1.54 kB per token",
        "576 B per token",
    ]
    counted = {"all_sum": [180, 23_040], "all_gather": [20, 960]}
    model = shard_model(random_model(), place_experts(np.zeros((L, E)), D), combine="gather")
    asked = cost.communication(model, trace, 2, counted, ranks=2)
    assert asked.title == "Communication (modelled, 2-byte values)"
    figures = asked.to_json()
    assert (figures["combine"], figures["bytes_per_token"]) == ("gather", gather)
    assert figures["counted"]["source"].startswith("measured") and figures["counted"]["by_kind"] == counted
    assert (figures["counted"]["calls"], figures["counted"]["payload_bytes"]) == (200, 24_000)
    assert (
        facts_of(str(asked), "Communication")["counted at the calls (measured)"] == "400 B per token at most, 200 calls"
    )


class WithSharedExpert(Qwen3MoeSparseMoeBlock):
    def __call__(self, x):
        return super().__call__(x) + 0.5 * x


def test_one_process_says_what_ranks_would_send():
    """Of qwen2_moe, whose blocks add a shared expert, it said reduce: k times too few bytes."""
    placement = place_experts(np.zeros((L, E)), D)
    for adding, used in (([], "reduce"), ([1], "reduce and gather"), ([0, 1, 2], "gather")):
        model = random_model()
        for layer in adding:
            model.model.layers[layer].mlp.__class__ = WithSharedExpert
        figures = cost.communication(shard_model(model, placement), a_trace(), 2, {}, ranks=1).to_json()
        assert figures["combine"] == used
        assert figures["bytes_per_token"] == 64 * 2 * (len(adding) * K + L - len(adding))
    model = random_model()
    model.model.layers[1].mlp.__class__ = WithSharedExpert
    with pytest.raises(ValueError, match=r'"reduce" is not possible for model\.layers\.1.*use "gather"'):
        shard_model(model, placement, combine="reduce")


def answered(prompt_tps, generation_tps, tokens=3):
    return SimpleNamespace(prompt_tps=prompt_tps, generation_tps=generation_tps, generation_tokens=tokens)


SECONDS = Seconds(4, 4, total=0.5, experts=0.2)


def test_speed_and_where_the_time_goes():
    tables = cost.speed("text", [1, 2, 3], 17, [answered(282.04, 109.36)], [answered(1.0, 157.7)], SECONDS)
    assert facts_of(str(tables[0]), "Speed (measured, one run)") == {
        "time to first token": "0.060 s", "prompt": "282.0 tokens/s (17 tokens)",
        "generation": "109.4 tokens/s (3 tokens)", "generation by stock mlx-lm": "157.7 tokens/s",
        "share of time in experts": "40% (measured on 4 tokens with stops)",
    }  # fmt: skip
    document = sections(tables)
    runs = {"prompt_tokens_per_second": [282.04], "tokens_per_second": [109.36], "stock_tokens_per_second": [157.7]}
    assert document["generation"] == {
        "source": "measured", **{name: value for name, (value,) in runs.items()}, "runs": runs, "prompt_tokens": 17,
        "seconds_to_first_token": 17 / 282.04, "generation_tokens": 3, "text": "text", "tokens": [1, 2, 3],
    }  # fmt: skip
    assert document["time"] == {"source": "measured with a stop after each part", **vars(SECONDS)}
    assert str(tables[1]).split("\n", 1) == [tables[1].heading(), ""]  # the figures are for programs alone
    assert "stock" not in str(cost.speed("", [], 1, [answered(1.0, 1.0)], [], SECONDS)[0])
    ended = cost.speed("", [1, 2], 17, [answered(282.04, 109.36)], [], SECONDS)[0]
    assert facts_of(str(ended), "Speed")["generation"] == "109.4 tokens/s (3 tokens, the end token among them)"
    once = answered(282.04, 109.36, tokens=1)  # no time between two
    alone = cost.speed("", [1], 17, [once, once], [once], SECONDS)[0]
    assert "generation" not in facts_of(str(alone), "Speed") and alone.to_json()["tokens_per_second"] is None
    assert alone.to_json()["runs"]["stock_tokens_per_second"] == alone.to_json()["runs"]["tokens_per_second"] == []


def test_speed_of_several_runs_is_their_median_without_the_first():
    ours = [answered(1.0, 2.0), answered(300.0, 100.0), answered(200.0, 140.0), answered(250.0, 110.0)]
    stock = [answered(1.0, 900.0), answered(1.0, 210.0), answered(1.0, 190.0)]
    table = cost.speed("text", [1, 2, 3], 17, ours, stock, SECONDS)[0]
    assert facts_of(str(table), "Speed (measured, medians of 3 runs after a warm-up, lowest and highest behind)") == {
        "time to first token": "0.068 s", "prompt": "250.0 tokens/s (17 tokens; 200.0 to 300.0)",
        "generation": "110.0 tokens/s (3 tokens; 100.0 to 140.0)",
        "generation by stock mlx-lm": "200.0 tokens/s (190.0 to 210.0)",
        "share of time in experts": "40% (measured on 4 tokens with stops)",
    }  # fmt: skip
    assert table.to_json()["runs"]["stock_tokens_per_second"] == [210.0, 190.0]
    assert table.to_json()["runs"]["prompt_tokens_per_second"] == [300.0, 200.0, 250.0]


def test_what_runs_where_shows_a_strategy_as_it_is():
    versions = {
        "device": "CPU",
        "device_name": "x",
        "cores": 2,
        "system": "s",
        "mlx": "1",
        "mlx_lm": "2",
        "python": "3",
    }
    reading = SimpleNamespace(bytes_read_experts=15_000_000, bytes_read_rest=920_000, seconds=0.14)
    prompt = Prompt([1, 2, 3], "a\n[b]" + "c" * 115, 9)  # 120 characters, the most that are shown
    model = shard_model(random_model(num_hidden_layers=2, num_experts=8), PLACEMENT, streams="off")
    table = run.what_runs_where("[red]model", model, prompt, PLACEMENT, 1, reading, versions)
    longer = replace(prompt, text=prompt.text + "d")
    longer = str(run.what_runs_where("m", model, longer, PLACEMENT, 1, reading, versions))
    assert facts_of(longer, "What runs where")["prompt"].replace(" ", "") == r"3tokens:a\n[b]" + "c" * 112 + "..."
    assert facts_of(str(table), "What runs where") == {
        "model": "[red]model",
        "MoE layers": "2 x 8 experts",
        "dtype": "float32",
        "prompt": f"3 tokens: a\\n[b]{'c' * 62} {'c' * 53}",
        "devices": "3 simulated in one process",
        "placement": "[/x] by hand, 1 to 4 of 8 experts on each device, 1 copies a layer",
        "running on": "CPU, x, 2 cores, s",
        "read": "15.92 MB of files in 0.1 s",
        "versions": "mlx 1, mlx-lm 2, Python 3",
    }
    assert sections([table])["placement"] == {
        "source": "as asked for", "strategy": "[/x] by hand", "devices": 3, "ranks": 1,
        "experts_per_device": [[4, 4, 1], [4, 4, 2]], "notes": [],
    }  # fmt: skip


def test_chance_is_that_of_the_first_layers_devices():
    """Layer 0 is even, layer 1 has all experts but one on device 0: what uniform routing would give differs."""
    held = np.zeros((2, 2, 16), dtype=bool)
    held[0, 0, :8] = held[0, 1, 8:] = held[1, 0, :15] = held[1, 1, 15:] = True
    trace = RoutingTrace(np.tile(np.arange(4), (50, 2, 1)), 16)
    figures = sections(run.balance(trace, [(0, held)], [0, 1], Placement(held)))["balance"]
    assert figures["balancedness_if_uniform_simulated"] > 0.8  # of layer 1: 0.53


def test_uniform_fan_out_of_layers_that_are_spread_differently():
    """12 and 4 of 16 experts in one layer, 8 and 8 in the next: not what 10 and 6 would give, nor either alone."""
    held = np.zeros((2, 2, E), dtype=bool)
    held[0, 0, :12] = held[0, 1, 12:] = held[1, 0, :8] = held[1, 1, 8:] = True
    tables = run.balance(a_trace(layers=2), [(0, held)], [0, 1], Placement(held))
    missed = [(math.comb(n, K) + math.comb(E - n, K)) / math.comb(E, K) for n in (12, 8)]  # all K on the other device
    assert sections(tables)["balance"]["fan_out_if_uniform_modelled"] == pytest.approx(2 - sum(missed) / 2)


def test_a_device_that_answered_nothing_is_there_with_nought():
    held = np.zeros((1, 3, 16), dtype=bool)
    held[0, 0, :4] = held[0, 1, 4:12] = held[0, 2, 12:] = True
    trace = RoutingTrace(np.tile(np.arange(4), (50, 1, 1)), 16)
    figures = sections(run.balance(trace, [(0, held)], [0], Placement(held)))["balance"]
    assert figures["device_loads"] == [[200, 0, 0]]
    assert figures["balancedness_aggregate"] == pytest.approx(1 / 3)
    assert (figures["imbalance_ratio_per_layer"], figures["min_max_ratio_per_layer"]) == ([2], [0])


# --- all of it --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(run_here, tmp_path_factory):
    """(what the main script printed, its JSON)."""
    path = tmp_path_factory.mktemp("run") / "o.json"
    result = run_here(
        "qwen3_expert_parallel.py", "--model", SHIPPED, "--prompt", "import os\n", "--max-tokens", 24, "--devices", 3,
        "--rebalance-every", 8, "--rebalance-horizon", 10**6, "--json", path, "--full", "--trials", 0,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads(path.read_text(), parse_constant=pytest.fail)


def test_the_whole_report_is_whole_in_print_and_json(whole):
    text, figures = whole
    assert all(line == line.rstrip() and len(line) <= 80 for line in text.partition("─\n\nParity")[2].splitlines())
    promised = {"model": ["name", "config", "environment"], "placement": ["strategy", "devices", "ranks"],
                "generation": ["text", "tokens", "prompt_tokens_per_second", "tokens_per_second"],
                "parity": ["tokens_equal", "max_abs_logit_difference"], "routing": ["all", "prefill", "decode"],
                "balance": ["device_loads", "balancedness_layers", "phases"], "rebalancing": ["looks", "costs"],
                "memory": ["per_device_bytes", "full_model_bytes", "reduction", "peak_process_bytes"],
                "communication": ["bytes_per_token"], "time": ["total", "experts"],
                "options": ["model", "max_tokens", "devices"], "environment": ["mlx", "cores"]}  # fmt: skip
    for section, keys in promised.items():
        assert set(keys) <= set(figures[section]), section
        if section not in ("model", "options", "environment"):
            assert any(word in figures[section]["source"] for word in ("measured", "modelled", "as asked for"))
    assert figures["ranks"] is None
    assert (figures["options"]["max_tokens"], figures["options"]["devices"]) == (24, 3)
    assert figures["environment"] == figures["model"]["environment"]


def test_the_whole_report_prints_what_json_says(whole):
    text, figures = whole
    memory = columns_of(text, "Memory per device", 3)
    assert memory["together"] == tuple(f"{n / 1e6:.2f} MB" for n in figures["memory"]["per_device_bytes"])
    balance = columns_of(text, "Balance over devices", 4)
    assert balance["balancedness"] == tuple(f"{b:.3f}" for b in figures["balance"]["balancedness_per_layer"])
    assert facts_of(text, "Parity")["tokens"] == f"the same ({figures['parity']['tokens_compared']} compared)"
    speed, generation = facts_of(text, "Speed (measured, one run)"), figures["generation"]
    tokens = f"({len(generation['tokens'])} tokens)"
    assert speed["generation"] == f"{generation['tokens_per_second']:.1f} tokens/s {tokens}"
    looks = lines_of(text, "Rebalancing")[1 : 1 + len(figures["rebalancing"]["looks"])]
    assert [line.split()[0] for line in looks] == [
        str(look["after_tokens"]) for look in figures["rebalancing"]["looks"]
    ]
    slots = (generation["prompt_tokens"] + len(generation["tokens"])) * 4 * 8
    assert sum(map(sum, figures["balance"]["device_loads"])) == pytest.approx(slots)


def test_balance_of_one_device_is_for_programs_alone_and_that_of_lost_ones_says_so():
    trace, one = a_trace(layers=2), np.ones((2, 1, E), bool)
    tables = run.balance(trace, [(0, one)], [0, 1], Placement(one))
    assert not any(table.title for table in tables) and sections(tables)["balance"]["fan_out"] == 1
    held = np.zeros((2, 2, E), bool)
    held[:, 0, ::2] = held[:, 1, 1::2] = True
    left = held & np.array([True, False])[:, None]
    lossy = run.balance(trace, [(0, held), (1, left)], [0, 1], Placement(held))
    assert all(
        table.notes().count("Lost on the way, and counted with the load from before: device 1.") == 1 for table in lossy
    )
    assert not any("Lost" in table.notes() for table in run.balance(trace, [(0, held)], [0, 1], Placement(held)))
