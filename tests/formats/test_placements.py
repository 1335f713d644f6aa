"""Placements of other engines: the same placement in every format, and refusals with the numbers."""

import json

import numpy as np
import pytest
import yaml
from conftest import ROOT, SHIPPED

from expert_parallel import Placement, place_experts
from expert_parallel.formats.placements import WRITERS, read_placement

CASES = ROOT.parent / "shared" / "cases" / "16-placement-imports"
RANDOM = np.random.default_rng(3)
SLOTS = np.stack([RANDOM.permutation(16) for _ in range(3)])  # [L, S]: slots 0-3 are device 0's, ...
DEVICES = [[row[4 * d : 4 * d + 4].tolist() for d in range(4)] for row in SLOTS]
OF_EXPERT = np.argsort(SLOTS, axis=1) // 4  # [L, E]
LOCAL = np.where(OF_EXPERT[:, None] == np.arange(4)[:, None], np.argsort(SLOTS, axis=1)[:, None] % 4, -1)  # [L, D, E]


def held(devices):
    result = np.zeros((3, len(devices[0]), 16), dtype=bool)
    for l, layer in enumerate(devices):
        for d, experts in enumerate(layer):
            result[l, d, experts] = True
    return Placement(result)


ASCEND = {
    "moe_layer_count": 3,
    "layer_list": [
        {"layer_id": l, "device_list": [{"device_id": d, "device_expert": e} for d, e in enumerate(layer)]}
        for l, layer in enumerate(DEVICES)
    ],
}
FILES = {
    "own.json": json.dumps({"layers": DEVICES}),
    "vllm.json": json.dumps(SLOTS.tolist()),
    "sglang.json": json.dumps({"physical_to_logical_map": SLOTS.tolist()}),
    "ranks.json": json.dumps({"expert_to_ep_rank": OF_EXPERT.tolist()}),
    "ascend.json": json.dumps(ASCEND),
    "trt.yaml": "num_slots: 16\nlayer_updates_per_iter: 0\ninitial_global_assignments:\n"
    + "".join(f"  {l}: {row.tolist()}\n" for l, row in enumerate(SLOTS)),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_says_the_same(name, tmp_path):
    (tmp_path / name).write_text(FILES[name])
    assert read_placement(tmp_path / name, 3, 16, 4) == held(DEVICES)


def test_arrays_and_tensors(tmp_path):
    np.save(tmp_path / "phy2log.npy", SLOTS)
    np.save(tmp_path / "map.npy", LOCAL)
    assert read_placement(tmp_path / "phy2log.npy", 3, 16, 4) == held(DEVICES)
    assert read_placement(tmp_path / "map.npy", 3, 16) == held(DEVICES)
    torch = pytest.importorskip("torch")
    torch.save({"physical_to_logical_map": torch.tensor(SLOTS)}, tmp_path / "map.pt")
    torch.save(torch.tensor(LOCAL, dtype=torch.int32), tmp_path / "map.pth")
    assert read_placement(tmp_path / "map.pt", 3, 16, 4) == held(DEVICES)
    assert read_placement(tmp_path / "map.pth", 3, 16, 4) == held(DEVICES)


def test_one_list_is_for_all_layers_and_copies_are_slots(tmp_path):
    (tmp_path / "flat.json").write_text(json.dumps([*range(16), 0, 1, 2, 3]))
    placement = read_placement(tmp_path / "flat.json", 3, 16, 4)
    assert [placement.experts_on(2, d) for d in range(4)] == [
        [0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [0, 1, 2, 3, 15],
    ]  # fmt: skip


def test_a_table_of_two_kinds_of_device(tmp_path):
    (tmp_path / "cpu_gpu.json").write_text(json.dumps([[0, 1] * 8] * 3))
    placement = read_placement(tmp_path / "cpu_gpu.json", 3, 16)
    assert placement.experts_on(0, 1) == list(range(1, 16, 2))


@pytest.mark.parametrize("copies", [0, 8])
@pytest.mark.parametrize("format", [None, *WRITERS])
def test_what_is_written_is_read_again(format, copies, tmp_path):
    """Layers that differ, copies; of the main script's own search."""
    loads = np.random.default_rng(1).zipf(1.5, (3, 16))
    placement = place_experts(loads, 4, "replicated" if copies else "balanced", copies)
    path = tmp_path / "placement"
    if copies and format == "vllm-ranks":
        with pytest.raises(ValueError, match=r"layer \d: expert \d+ is on \d devices; this format can say one of each"):
            placement.save(path, format)
        assert not path.exists()
        return
    placement.save(path, format)
    assert Placement.load(path, num_devices=4) == placement
    assert Placement.load(path, 3, 16, 4) == placement
    with pytest.raises(ValueError, match="3 layers, the model has 4"):
        Placement.load(path, 4, 16, 4)


def test_what_other_engines_read_in_them(tmp_path):
    """The fields that they look for, and who answers which slot, spelt out for two layers of four experts."""
    placement = Placement(np.array([[[1, 0, 0, 1], [0, 1, 1, 0]], [[1, 1, 0, 0], [0, 0, 1, 1]]], dtype=bool))
    slots = [[0, 3, 1, 2], [0, 1, 2, 3]]
    read = {}
    for format in WRITERS:
        placement.save(tmp_path / format, format, layer_numbers=[1, 3])
        text = (tmp_path / format).read_text()
        read[format] = yaml.safe_load(text) if format == "tensorrt-llm" else json.loads(text)
    assert read["vllm"] == slots
    assert read["vllm-ranks"] == {"expert_to_ep_rank": [[0, 1, 1, 0], [0, 0, 1, 1]]}
    assert read["sglang"]["physical_to_logical_map"][1::2] == slots  # layers 0 and 2 are dense
    assert len(read["sglang"]["physical_to_logical_map"]) == 4
    assignments = {1: slots[0], 3: slots[1]}
    wanted = {"num_slots": 4, "initial_global_assignments": assignments, "layer_updates_per_iter": 0}
    assert read["tensorrt-llm"] == wanted
    lines = (tmp_path / "tensorrt-llm").read_text().splitlines()
    assert (len(lines), lines[0]) == (5, "num_slots: 4")  # one for each layer
    assert {len((tmp_path / name).read_text().splitlines()) for name in {*WRITERS} - {"tensorrt-llm"}} == {1}
    placement.save(tmp_path / "own")
    assert (tmp_path / "own").read_text().splitlines()[:2] == ["{", ' "format": "expert-placement/1",']  # for people
    ascend = read["vllm-ascend"]
    assert ascend["moe_layer_count"] == 2
    assert [layer["layer_id"] for layer in ascend["layer_list"]] == [0, 1]  # MoE layers, counted from 0
    assert {layer["device_count"] for layer in ascend["layer_list"]} == {2}
    assert ascend["layer_list"][0]["device_list"][1] == {"device_id": 1, "device_expert": [1, 2]}
    for format in WRITERS:
        assert Placement.load(tmp_path / format, 2, 4, 2, layer_numbers=[1, 3]) == placement


def test_uneven_slots(tmp_path):
    """10 experts on 4 devices: 3, 3, 2, 2. Lists of slots cannot say so; what says device by device can."""
    placement = place_experts(np.ones((2, 10)), 4)
    for format in WRITERS:
        if format == "vllm-ranks":
            placement.save(tmp_path / format, format)
            assert Placement.load(tmp_path / format, 2, 10) == placement
            continue
        with pytest.raises(ValueError, match="layer 0: device 2 holds 2 experts, device 0 of layer 0 holds 3"):
            placement.save(tmp_path / format, format)
        assert not (tmp_path / format).exists()
    filled = place_experts(np.ones((2, 10)), 4, "replicated", 2)
    filled.save(tmp_path / "vllm", "vllm")
    assert Placement.load(tmp_path / "vllm", 2, 10, 4) == filled
    ragged = {"layer_list": [{"device_list": [{"device_expert": [0, 1]}, {"device_expert": [2]}]}]}
    (tmp_path / "ragged").write_text(json.dumps(ragged))
    assert Placement.load(tmp_path / "ragged").held.tolist() == [[[True, True, False], [False, False, True]]]


@pytest.mark.parametrize("format", [None, *WRITERS])
def test_one_layer_on_one_device(format, tmp_path):
    placement = place_experts(np.ones((1, 3)), 1)
    placement.save(tmp_path / "one", format)
    assert Placement.load(tmp_path / "one", 1, 3, 1) == placement


def test_what_a_format_cannot_say_is_named(tmp_path):
    """In the second layer expert 2 is on two devices, and the second device holds more than all others."""
    placement = Placement(np.array([[[1, 0, 1], [0, 1, 0]], [[1, 0, 1], [0, 1, 1]]], dtype=bool)[[0, 0, 1]])
    with pytest.raises(ValueError, match="layer 0: device 1 holds 1 experts, device 0 of layer 0 holds 2;"):
        placement.save(tmp_path / "p", "sglang")
    with pytest.raises(ValueError, match="layer 2: expert 2 is on 2 devices;"):
        placement.save(tmp_path / "p", "vllm-ranks")
    even = Placement(np.array([[[1, 0], [0, 1]], [[1, 0], [1, 1]]], dtype=bool))
    with pytest.raises(ValueError, match="layer 1: device 1 holds 2 experts, device 0 of layer 0 holds 1;"):
        even.save(tmp_path / "p", "vllm")


def test_keys_of_layers_as_text_and_a_whole_configuration(tmp_path):
    """YAML of TensorRT-LLM, its layers as strings in any order, inside the engine's own options."""
    layers = "".join(f'      "{l}": {row.tolist()}\n' for l, row in reversed(list(enumerate(SLOTS))))
    text = (
        "moe_config:\n  backend: WIDEEP\n  load_balancer:\n    num_slots: 16\n    initial_global_assignments:\n"
        + layers
    )
    (tmp_path / "llm.yaml").write_text(text)
    assert Placement.load(tmp_path / "llm.yaml", 3, 16, 4) == held(DEVICES)
    (tmp_path / "ep.yaml").write_text(text + "    ep_size: 4\n")
    assert Placement.load(tmp_path / "ep.yaml") == held(DEVICES)


def test_layers_are_found_by_their_numbers(tmp_path):
    """A dense layer 0, MoE layers 1 to 3 and one more behind them, which the model does not have."""
    rows = {1 + l: row.tolist() for l, row in enumerate(SLOTS)} | {4: list(range(16))}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"initial_global_assignments": rows}))
    assert Placement.load(tmp_path / "p.yaml", 3, 16, 4, layer_numbers=[1, 2, 3]) == held(DEVICES)
    with pytest.raises(ValueError, match=r"nothing for layer 5, an MoE layer of the model; it names \[1, 2, 3, 4\]"):
        Placement.load(tmp_path / "p.yaml", 3, 16, 4, layer_numbers=[3, 4, 5])
    (tmp_path / "twice.yaml").write_text("initial_global_assignments: {0: [0, 1], '0': [1, 0]}")
    with pytest.raises(ValueError, match="it names a layer twice"):
        Placement.load(tmp_path / "twice.yaml", 1, 2, 2)
    (tmp_path / "longer.json").write_text(json.dumps([*SLOTS.tolist(), *SLOTS.tolist()]))
    with pytest.raises(ValueError, match="it has 6 layers, the model has 3"):
        Placement.load(tmp_path / "longer.json", 3, 16, 4, layer_numbers=[0, 1, 2])
    for wrong in ([1, 1, 2], [0, 1], [-1, 0, 1]):
        with pytest.raises(ValueError, match="layer_numbers are 3 growing numbers from 0 up"):
            held(DEVICES).save(tmp_path / "p", "tensorrt-llm", wrong)


@pytest.mark.parametrize(
    ("text", "devices", "message"),
    [
        ("[[0, 1000000000000000]]", 2, "expert 1000000000000000: more than any model has"),
        ('{"expert_to_ep_rank": [[0, 1000000000000000]]}', None, "expert 1000000000000000"),
        ('{"every_layer": ["0", "1"], "num_layers": 1000000000000000}', None, "not a count from 1 up to 65536"),
        ("[[0, 1]]", 0, "0 devices: needs 1 at least"),
    ],
)
def test_numbers_that_no_memory_holds(text, devices, message, tmp_path):
    (tmp_path / "huge.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Placement.load(tmp_path / "huge.json", num_devices=devices)


def test_unknown_formats_are_named(tmp_path):
    with pytest.raises(ValueError, match="unknown placement format 'trt': choose vllm, vllm-ranks, .*tensorrt-llm"):
        held(DEVICES).save(tmp_path / "p", "trt")


def test_a_table_of_what_each_device_holds(tmp_path):
    """0 and 1 were once local rows: every device held everything."""
    whole = held(DEVICES).held
    for name, table in {"bool": whole, "int": whole.astype(np.int64), "byte": whole.astype(np.uint8)}.items():
        np.save(tmp_path / f"{name}.npy", table)
        assert read_placement(tmp_path / f"{name}.npy", 3, 16) == held(DEVICES)
    for name, table in {"rows": LOCAL - LOCAL.min(), "least": LOCAL - 1, "parts": whole * 1.0}.items():
        np.save(tmp_path / f"{name}.npy", table)
        with pytest.raises(ValueError, match=f"{name}.npy: a table .* is of 0 and 1, or of local rows and -1"):
            read_placement(tmp_path / f"{name}.npy", 3, 16)


def test_copies_beside_each_other_count_once_and_that_is_said(tmp_path, run_here):
    """EPLB's global variant puts two copies of a hot expert on one device."""
    slots = [[0, 0, *range(128), 1, 1]] * 4  # 33 slots a device: the first has expert 0 three times, the last 1 twice
    (tmp_path / "eplb.json").write_text(json.dumps(slots))
    line = ("--model", SHIPPED, "--max-tokens", 1, "--no-verify", "--devices", 4, "--placement", tmp_path / "eplb.json")
    done = run_here("qwen3_expert_parallel.py", *line, "--json", tmp_path / "o.json")
    said = "eplb.json: 12 copies lie on a device that has their expert already, and count for nothing"
    assert " ".join(done.stdout.split()).count(said) == 1, done.stderr
    document = json.loads((tmp_path / "o.json").read_text())["placement"]
    assert document["notes"] == [said] and document["experts_per_device"] == [[31, 33, 33, 32]] * 4
    ascend = {"layer_list": [{"device_list": [{"device_expert": [0, 0, 1]}, {"device_expert": [1, 2]}]}]}
    (tmp_path / "ascend.json").write_text(json.dumps(ascend))
    assert "ascend.json: 1 copies" in read_placement(tmp_path / "ascend.json").metadata["notes"][0]
    (tmp_path / "once.json").write_text(json.dumps(SLOTS.tolist()))
    assert not read_placement(tmp_path / "once.json", 3, 16, 4).metadata


def ascend_of(*layers):
    return json.dumps({"layer_list": [{"device_list": [{"device_expert": e} for e in layer]} for layer in layers]})


TRT = {"initial_global_assignments": {0: [*range(16)], 1: [*range(16)], 2: [*range(16)]}}
BAD = {
    "lists of other slots": (json.dumps({**TRT, "num_slots": 20}), 4, '"num_slots" says 20, the lists have 16'),
    "no count of slots": (json.dumps({**TRT, "num_slots": "16"}), 4, "\"num_slots\" is '16', not a count"),
    "no device": (json.dumps({**TRT, "ep_size": 0}), None, '"ep_size" is 0, not a count from 1 up'),
    "an idle device": (ascend_of(*[[[*range(16)], []]] * 3), None, "layer 0: device 1 holds no expert"),
    "nothing but idle devices": (ascend_of(*[[[], []]] * 3), None, 'a "device_expert" is a list of experts'),
    "parts of experts": (ascend_of(*[[[0.5], [1]]] * 3), None, 'a "device_expert" is a list of experts'),
    "devices come and go": (ascend_of([[0], [1]], [[0, 1]], [[0], [1]]), None, r"numbers of devices: \[1, 2\]"),
    "more slots than devices take": (json.dumps(SLOTS.tolist()), 3, "16 slots a layer .* 3 devices do not divide"),
    "no number of devices": (json.dumps(SLOTS.tolist()), None, "not how many devices have them: say --devices"),
    "another model's layers": (json.dumps(SLOTS[:2].tolist()), 4, "it has 2 layers, the model has 3"),
    "a row that lists no slots": (json.dumps([[*range(16)], [0] * 16, [1] * 16]), 4, "layer 1: device 1 holds no"),
    "an expert that is none": (json.dumps([[*range(15), 16, 15, 15]] * 3), 3, "expert 16 is none of 16"),
    "an expert below 0": (json.dumps([[*range(16), -1, -2]] * 3), 2, "expert -2 is none of 16"),
    "a device below 0": (json.dumps({"expert_to_ep_rank": [[-1] * 8 + [0] * 8] * 3}), 2, "-1 is none of 16"),
    "an expert that is nowhere": (json.dumps([[0] * 20] * 3), 4, "expert 1 is on no device"),
    "rows of different lengths": (json.dumps([[0, 1], [0]]), 4, "placement file"),
    "words": (json.dumps({"strategy": "x"}), 4, r"or slots \[layers, slots\]"),
    "nothing": ("", 4, "placement file"),
    "no text": (b"\xff\xfe\x00", 4, "cannot read placement file"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case, tmp_path):
    content, devices, message = BAD[case]
    path = tmp_path / "p.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_placement(path, 3, 16, devices)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_main_script_takes_them(run_here, tmp_path):
    table = [np.random.default_rng(l).permutation(128).tolist() for l in range(4)]
    (tmp_path / "vllm.json").write_text(json.dumps(table))
    line = ("--model", SHIPPED, "--max-tokens", 2, "--quiet", "--placement", tmp_path / "vllm.json", "--json", "-")
    done = run_here("qwen3_expert_parallel.py", *line, "--devices", 4)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["parity"]["tokens_equal"] and document["placement"]["strategy"] == "vllm.json"
    assert document["placement"]["experts_per_device"] == [[32] * 4] * 4
    done = run_here("qwen3_expert_parallel.py", *line)
    assert done.returncode == 2 and "say --devices" in done.stderr


def test_the_main_script_writes_them(run_here, tmp_path):
    asked = ("--model", SHIPPED, "--max-tokens", 2, "--quiet", "--no-verify", "--save-placement", tmp_path / "out")
    done = run_here("qwen3_expert_parallel.py", *asked, "--placement-format", "tensorrt-llm", "--devices", 4)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "out").read_text())["initial_global_assignments"][3] == list(range(128))
    again = ("--model", SHIPPED, "--max-tokens", 2, "--quiet", "--no-verify", "--placement", tmp_path / "out")
    assert run_here("qwen3_expert_parallel.py", *again, "--devices", 4).returncode == 0
    done = run_here("qwen3_expert_parallel.py", *asked, "--placement-format", "vllm", "--devices", 3)
    assert done.returncode == 2 and "needs as many everywhere" in done.stderr and len(done.stderr.splitlines()) == 1
    done = run_here("qwen3_expert_parallel.py", "--placement-format", "vllm")
    assert done.returncode == 2 and "--placement-format needs --save-placement" in done.stderr


@pytest.mark.skipif(not CASES.exists(), reason="the cases do not lie beside the project")
def test_the_cases():
    names = ("ascend.json", "expert_map.pth", "phy2log.npy", "sgl_p2l.json", "sgl_p2l.pt", "trt.yaml")
    same = [read_placement(CASES / name, 3, 16, 4) for name in names]
    assert all(placement == same[0] for placement in same)
    copied = read_placement(CASES / "vllm_layers.json", 3, 16, 4)
    assert copied.copies.sum(axis=1).tolist() == [20] * 3 or copied.held.sum() <= 60
    assert read_placement(CASES / "cpu_gpu.json", 3, 16).num_devices == 2
    assert read_placement(CASES / "vllm_flat.json", 3, 16, 4).experts_on(0, 0) == [0, 1, 2, 3, 4]
