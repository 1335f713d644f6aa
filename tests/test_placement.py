"""Placements: every expert placed, counts even, files that people write, clear errors."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_parallel import Placement, place_experts


def ones(num_layers, num_experts):
    return np.ones((num_layers, num_experts))


# --- contiguous and round-robin ----------------------------------------------------------------


@st.composite
def geometries(draw):
    num_experts = draw(st.integers(1, 200))
    return draw(st.integers(1, 4)), num_experts, draw(st.integers(1, num_experts))


@given(geometries(), st.sampled_from(["contiguous", "round-robin"]))
@settings(max_examples=150)
def test_every_expert_placed_once_and_counts_even(geometry, strategy):
    num_layers, num_experts, num_devices = geometry
    placement = place_experts(ones(num_layers, num_experts), num_devices, strategy)
    for layer in range(num_layers):
        parts = [placement.experts_on(layer, device) for device in range(num_devices)]
        assert sorted(sum(parts, [])) == list(range(num_experts))
        counts = [len(part) for part in parts]
        assert max(counts) - min(counts) <= 1 and min(counts) >= 1
    for expert in range(num_experts):
        (device,) = placement.devices_of(0, expert)
        assert expert in placement.experts_on(0, device)


@given(geometries())
@settings(max_examples=60)
def test_contiguous_runs_and_round_robin_turns(geometry):
    num_layers, num_experts, num_devices = geometry
    contiguous = place_experts(ones(num_layers, num_experts), num_devices)
    homes = [contiguous.devices_of(0, expert)[0] for expert in range(num_experts)]
    assert homes == sorted(homes)
    turns = place_experts(ones(num_layers, num_experts), num_devices, "round-robin")
    assert [turns.devices_of(0, expert)[0] for expert in range(num_experts)] == [
        expert % num_devices for expert in range(num_experts)
    ]


def test_experts_that_do_not_divide():
    """The original formula, expert // (128 // 6), named a seventh of six devices for experts 126 and 127."""
    placement = place_experts(ones(1, 128), 6)
    assert [len(placement.experts_on(0, device)) for device in range(6)] == [22, 22, 21, 21, 21, 21]
    assert placement.devices_of(0, 127) == [5]
    assert place_experts(ones(1, 8), 3).held[0].argmax(axis=0).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert place_experts(ones(1, 8), 3, "round-robin").experts_on(0, 1) == [1, 4, 7]


@pytest.mark.parametrize(
    ("loads", "devices", "options", "message"),
    [
        (ones(2, 8), 0, {}, "0 devices: needs 1 to 8"),
        (ones(2, 8), -1, {}, "-1 devices"),
        (ones(2, 8), 9, {}, "9 devices: needs 1 to 8"),
        (ones(2, 8), 2.5, {}, "2.5"),
        (np.ones(8), 2, {}, r"\[layers, experts\]"),
        (np.ones((0, 8)), 2, {}, r"\[layers, experts\]"),
        ([[1, 1, -1]], 2, {}, "layer 0: expert 2 has load -1"),
        ([[1, np.nan]], 2, {}, "layer 0: expert 1 has load nan"),
        ([[1, 2, 3], [0, 0, 0]], 2, {"strategy": "balanced"}, "layer 1 has no load at all"),
        ([[1, 2, 3], [0, 0, 0]], 2, {"strategy": "affinity"}, "layer 1 has no load at all"),
        (ones(2, 8), 2, {"strategy": "best"}, "unknown placement strategy 'best'"),
        (ones(2, 8), 2, {"redundant": 2}, "only the strategy replicated"),
        (ones(2, 8), 2, {"strategy": "replicated", "redundant": 9}, "needs 0 to 8 .8 experts, 2 devices"),
        (ones(2, 8), 2, {"strategy": "replicated", "redundant": -1}, "-1 redundant"),
        (ones(2, 8), 2, {"strategy": "replicated", "redundant": 1.5}, "1.5 redundant"),
        (ones(2, 8), 2, {"strategy": "replicated", "num_nodes": 0}, "0 nodes"),
        (ones(2, 8), 2, {"strategy": "replicated", "num_groups": 0}, "0 groups"),
        (ones(2, 8), 2, {"strategy": "affinity"}, "needs coactivation.*got None"),
        (ones(2, 8), 2, {"strategy": "affinity", "coactivation": np.ones((2, 7, 8))}, r"\[2, 8, 8\].*\[2, 7, 8\]"),
        (ones(2, 8), 2, {"strategy": "affinity", "coactivation": -np.ones((2, 8, 8))}, "from 0 up"),
    ],
)
def test_requests_that_cannot_be_met(loads, devices, options, message):
    with pytest.raises(ValueError, match=message):
        place_experts(loads, devices, **options)


# --- Placement ------------------------------------------------------------------------------------


def held(*layers):
    """Placement.held from lists of experts per device."""
    count = 1 + max(e for layer in layers for experts in layer for e in experts)
    array = np.zeros((len(layers), len(layers[0]), count), dtype=bool)
    for l, layer in enumerate(layers):
        for d, experts in enumerate(layer):
            array[l, d, experts] = True
    return array


def test_device_loads_by_hand():
    # Expert 0 is on both devices: 10 + 12/2 and 4 + 2 + 12/2.
    placement = Placement(held([[0, 1], [0, 2, 3]]))
    assert placement.device_loads([[12, 10, 4, 2]]).tolist() == [[16.0, 12.0]]
    assert placement.copies.tolist() == [[2, 1, 1, 1]]
    assert placement.devices_of(0, 0) == [0, 1]
    assert repr(placement) == "Placement(custom: 1 layers x 4 experts on 2 devices, 1 redundant)"
    more = Placement(held([[0, 1], [2]], [[0, 1], [1, 2]]), "by hand")
    assert repr(more) == "Placement(by hand: 2 layers x 3 experts on 2 devices, 1 redundant)"
    assert repr(place_experts(ones(2, 4), 2)) == "Placement(contiguous: 2 layers x 4 experts on 2 devices)"


@pytest.mark.parametrize(
    ("loads", "message"),
    [
        ([[1, 2, 3]], r"\[1, 3\].*\[1, 4\]"),
        ([[1, 2, -3, 4]], "layer 0: expert 2 has load -3"),
        ([[1, np.nan, 3, 4]], "layer 0: expert 1 has load nan"),
        ([[1, 1, 3, np.inf]], "expert 3 has load inf"),
    ],
)
def test_loads_that_are_none(loads, message):
    with pytest.raises(ValueError, match=message):
        place_experts(ones(1, 4), 2).device_loads(loads)


def test_placements_are_alike_by_what_they_hold():
    one = Placement(held([[0, 1], [2]]), "by hand", {"a": 1})
    assert one == Placement(held([[0, 1], [2]])) and one != Placement(held([[0], [1, 2]]))
    assert one != Placement(held([[0, 1], [2]], [[0, 1], [2]])) and one != one.held.tolist() and one != "by hand"


def test_a_placement_must_be_whole():
    with pytest.raises(ValueError, match="layer 1: expert 2 is on no device"):
        Placement(np.array([held([[0, 1], [2]])[0], held([[0, 1], [0]], [[2], [2]])[0]]))
    with pytest.raises(ValueError, match="layer 0: device 1 holds no expert"):
        Placement(held([[0, 1, 2], []]))
    with pytest.raises(ValueError, match="all at least 1"):
        Placement(np.ones((0, 2, 2)))


def test_a_placement_is_its_own():
    """It once froze the caller's own array."""
    mine = held([[0, 1], [2]])
    placement = Placement(mine)
    mine[:] = True
    assert placement.experts_on(0, 1) == [2]
    with pytest.raises(ValueError, match="read-only"):
        placement.held[0, 0, 0] = False


# --- files ------------------------------------------------------------------------------------------


@given(geometries(), st.sampled_from(["contiguous", "round-robin"]), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_files_give_back_what_was_saved(tmp_path_factory, geometry, strategy, random):
    num_layers, num_experts, num_devices = geometry
    array = place_experts(ones(num_layers, num_experts), num_devices, strategy).held.copy()
    for _ in range(3):  # a few copies here and there
        array[random.randrange(num_layers), random.randrange(num_devices), random.randrange(num_experts)] = True
    placement = Placement(array, strategy, {"model": "m", "fitted_on": "code"})
    path = tmp_path_factory.mktemp("files") / "placement.json"
    placement.save(path)
    again = Placement.load(path)
    assert again == placement
    assert (again.strategy, again.metadata) == (strategy, placement.metadata)
    assert [file.name for file in path.parent.iterdir()] == ["placement.json"]


@pytest.mark.parametrize(
    ("text", "layers", "homes"),
    [
        ('{"every_layer": ["0-3", "4-7"]}', 2, [0, 0, 0, 0, 1, 1, 1, 1]),
        ('{"every_layer": ["0, 2,4 ,6", [1, "3-5", 7]], "num_layers": 2}', None, None),
        ('{"layers": [[[0, 3], [1, 2]], [[2, 3], [0, 1]]]}', None, [0, 1, 1, 0]),
        ('{"layers": [[0, 1], [1, 0]]}', 2, [0, 1]),
    ],
)
def test_files_by_hand(tmp_path, text, layers, homes):
    path = tmp_path / "by_hand.json"
    path.write_text(text)
    placement = Placement.load(path, num_layers=layers)
    assert placement.num_layers == 2
    assert placement.strategy == "custom"
    if homes:
        assert placement.held[0].argmax(axis=0).tolist() == homes
    else:
        assert placement.devices_of(0, 4) == [0, 1]
        assert placement.experts_on(1, 1) == [1, 3, 4, 5, 7]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "placement file .*Expecting"),
        ("\xff\xfe", "placement file .*decode"),
        ("[]", 'either "every_layer" or "layers"'),
        ('{"every_layer": ["0-1"], "layers": [["0-1"]]}', 'either "every_layer" or "layers"'),
        ('{"every_layer": ["0-1", "2-3"]}', '"num_layers"'),
        ('{"every_layer": "01", "num_layers": 1}', "one entry a device"),
        ('{"layers": "01"}', "one entry a device"),
        ('{"layers": []}', "one entry a device"),
        ('{"layers": [{"0": 1}]}', "one entry a device"),
        ('{"layers": [[[0], [1]], {"0": 1}]}', "one entry a device"),
        ('{"layers": [[[], []]]}', "all at least 1, got .1, 2, 0"),
        ('{"layers": [[[0, 0], [1]]]}', "layer 0: device 0 names expert 0 twice"),
        ('{"layers": [[[0], [2]]]}', "layer 0: expert 1 is on no device"),
        ('{"layers": [[[0, 1], []]]}', "layer 0: device 1 holds no expert"),
        ('{"layers": [[["3-1"], [0]]]}', "got '3-1'"),
        ('{"layers": [[["0-99999999999"], [0]]]}', "got '0-9"),
        ('{"layers": [[[99999999999], [0]]]}', "got '9+'"),
        ('{"layers": [[[-1, 1], [0]]]}', "numbered from 0, got '-1'"),
        ('{"layers": [[["a"], [0]]]}', "numbered from 0, got 'a'"),
        ('{"layers": [[[1.5], [0]]]}', "got '1.5'"),
        ('{"layers": [[[true], [0]]]}', "got 'True'"),
        ('{"layers": [[[0], [1]], [[0, 1]]]}', "different numbers of devices"),
        ('{"layers": [[[0], [1]]], "num_experts": 1}', "expert 1 does not exist: there are 1"),
        ('{"layers": [[[0], [1]]], "num_experts": 3}', "expert 2 is on no device"),
        ('{"layers": [[[0], [1]]], "num_devices": 3}', '"num_devices" says 3, the lists say 2'),
        ('{"layers": [[[0], [1]]], "num_layers": "1"}', "\"num_layers\" is '1', not a count from 1 up"),
        ('{"layers": [[[0], [1]]], "num_experts": "a"}', "\"num_experts\" is 'a'"),
        ('{"layers": [[[0], [1]]], "num_devices": 2.5}', '"num_devices" is 2.5'),
        ('{"layers": [[[0], [1]]], "num_layers": 3}', '"num_layers" says 3, the lists say 1'),
        ('{"layers": [[[0], [1]]], "metadata": null}', '"metadata" is an object, got None'),
        ('{"layers": [[[0], [1]]], "metadata": [1]}', r'"metadata" is an object, got \[1\]'),
        ('{"layers": [[[0], [1]]], "metadata": "x"}', '"metadata" is an object'),
        ('{"layers": [[[0], [1]]], "metadata": {"num_nodes": "a"}}', "\"num_nodes\" is a count, got 'a'"),
        ('{"layers": [[[0], [1]]], "metadata": {"num_nodes": true}}', '"num_nodes" is a count, got True'),
        ('{"layers": [[[0], [1]]], "metadata": {"num_nodes": 0}}', "num_nodes 0 has as many experts"),
        ('{"layers": [[[0], [1]]], "metadata": {"num_nodes": 3}}', "num_nodes 3 has as many experts"),
        ('{"layers": [[[0], [0, 1]]], "metadata": {"num_nodes": 2}}', "none in two"),
        ('{"layers": [[[0], [1]]], "metadata": {"notes": "x"}}', '"notes" are lines of text'),
        ('{"layers": [[[0], [1]]], "metadata": {"notes": [1]}}', '"notes" are lines of text'),
        ('{"every_layer": [[0], [1]], "num_layers": -1}', "a count from 1 up"),
        ('{"layers": [[[0], [1]]], "format": "expert-placement/9"}', "its format is 'expert-placement/9'"),
    ],
)
def test_files_that_are_no_placement(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message) as error:
        Placement.load(path)
    assert "bad.json" in str(error.value) and "\n" not in str(error.value)


def test_files_of_another_model(tmp_path):
    path = tmp_path / "placement.json"
    place_experts(ones(3, 8), 2).save(path)
    assert json.loads(path.read_text())["every_layer"] == ["0-3", "4-7"]
    assert ' "every_layer": [\n  "0-3",\n  "4-7"\n ]\n' in path.read_text()  # to be read and changed by hand
    with pytest.raises(ValueError, match="it has 3 layers, the model has 4"):
        Placement.load(path, num_layers=4)
    with pytest.raises(ValueError, match="expert 7 does not exist: there are 4"):
        Placement.load(path, num_experts=4)
    with pytest.raises(ValueError, match="cannot read placement file .*absent.json"):
        Placement.load(tmp_path / "absent.json")


def test_nothing_left_behind_when_saving_fails(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        place_experts(ones(1, 4), 2).save(tmp_path / "folder")
    with pytest.raises(OSError):
        place_experts(ones(1, 4), 2).save(tmp_path / "absent" / "placement.json")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_layers_that_are_alike_are_written_once(tmp_path):
    alike = place_experts(np.ones((3, 8)), 2)
    alike.save(tmp_path / "alike.json")
    document = json.loads((tmp_path / "alike.json").read_text())
    assert document["every_layer"] == ["0-3", "4-7"] and "layers" not in document
    held = alike.held.copy()
    held[2] = held[2, ::-1]
    Placement(held).save(tmp_path / "other.json")
    document = json.loads((tmp_path / "other.json").read_text())
    assert document["layers"] == [["0-3", "4-7"], ["0-3", "4-7"], ["4-7", "0-3"]] and "every_layer" not in document
