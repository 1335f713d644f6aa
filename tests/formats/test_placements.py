"""Placements of other engines: the same placement in every format, and refusals with the numbers."""

import json

import numpy as np
import pytest
from conftest import ROOT, SHIPPED

from expert_parallel import Placement
from expert_parallel.formats.placements import read_placement

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


BAD = {
    "more slots than devices take": (json.dumps(SLOTS.tolist()), 3, "16 slots a layer .* 3 devices do not divide"),
    "no number of devices": (json.dumps(SLOTS.tolist()), None, "not how many devices have them: say --devices"),
    "another model's layers": (json.dumps(SLOTS[:2].tolist()), 4, "it has 2 layers, the model has 3"),
    "an expert that is none": (json.dumps([[*range(15), 16, 15, 15]] * 3), 3, "expert 16 is none of 16"),
    "an expert below 0": (json.dumps([[*range(16), -1, -2]] * 3), 2, "expert -2 is none of 16"),
    "an expert that is nowhere": (json.dumps([[0] * 20] * 3), 4, "expert 1 is on no device"),
    "rows of different lengths": (json.dumps([[0, 1], [0]]), 4, "placement file"),
    "words": (json.dumps({"strategy": "x"}), 4, r"expected slots \[layers, slots\]"),
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


@pytest.mark.skipif(not CASES.exists(), reason="the cases do not lie beside the project")
def test_the_cases():
    names = ("ascend.json", "expert_map.pth", "phy2log.npy", "sgl_p2l.json", "sgl_p2l.pt", "trt.yaml")
    same = [read_placement(CASES / name, 3, 16, 4) for name in names]
    assert all(placement == same[0] for placement in same)
    copied = read_placement(CASES / "vllm_layers.json", 3, 16, 4)
    assert copied.copies.sum(axis=1).tolist() == [20] * 3 or copied.held.sum() <= 60
    assert read_placement(CASES / "cpu_gpu.json", 3, 16).num_devices == 2
    assert read_placement(CASES / "vllm_flat.json", 3, 16, 4).experts_on(0, 0) == [0, 1, 2, 3, 4]
