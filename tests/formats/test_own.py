"""This project's placement files, by hand: the text of ranges, counts that a file says, experts of nodes."""

import json

import numpy as np
import pytest

from expert_parallel import Placement
from expert_parallel.formats.own import MOST, counts_in, document_of, experts_of_nodes, held_of, metadata_of


def held(*layers):
    """bool [L, D, E] of the experts of each layer's devices."""
    count = 1 + max(expert for layer in layers for experts in layer for expert in experts)
    return np.array([[[e in experts for e in range(count)] for experts in layer] for layer in layers])


def test_the_document_by_hand():
    """Runs of experts as ranges; layers alike once, others one by one; what is known besides as it is."""
    sizes = {"format": "expert-placement/1", "num_layers": 2, "num_devices": 2, "num_experts": 8}
    alike = held([[0, 1, 2, 7], [3, 4, 5, 6]], [[0, 1, 2, 7], [3, 4, 5, 6]])
    document = {**sizes, "strategy": "by hand", "every_layer": ["0-2,7", "3-6"]}
    assert document_of(Placement(alike, "by hand")) == document
    differ = held([[0, 2, 4, 5, 6], [1, 3, 7]], [[0, 1, 2, 7], [3, 4, 5, 6]])
    found = document_of(Placement(differ, "custom", {"model": "m"}))
    layers = [["0,2,4-6", "1,3,7"], ["0-2,7", "3-6"]]
    assert found == {**sizes, "strategy": "custom", "metadata": {"model": "m"}, "layers": layers}
    assert (held_of(json.loads(json.dumps(found)), 2, 8) == differ).all()
    assert (held_of(document, None, None) == alike).all()


def test_experts_of_nodes_by_hand():
    """Two devices a node, with a copy inside of one; each node has half of the experts of each layer."""
    placed = held([[0, 1], [1], [2], [3]], [[0], [3], [1, 2], [1]])
    found = experts_of_nodes(placed, 2)
    assert found.tolist() == [[[1, 1, 0, 0], [0, 0, 1, 1]], [[1, 0, 0, 1], [0, 1, 1, 0]]]
    assert experts_of_nodes(placed, 1).all() and experts_of_nodes(placed, 1).shape == (2, 1, 4)
    assert metadata_of({"metadata": {"num_nodes": 2}}, placed) == {"num_nodes": 2}
    for wrong, nodes in (
        (placed, 0),
        (placed, -2),
        (placed, 3),  # four devices do not part into three
        (placed, 4),  # nor do the experts: a device has two of them
        (held([[0], [1], [1], [2, 3]]), 2),  # expert 1 is in both
        (held([[0], [1, 2], [3], [3]]), 2),  # three and one
        (held([[0, 1], [0, 1], [2, 3], [2, 3]], [[0], [1, 2], [3], [3]]), 2),  # in the second layer alone
    ):
        with pytest.raises(ValueError, match=f"num_nodes {nodes} has as many experts in each, and none in two"):
            experts_of_nodes(wrong, nodes)


def test_counts_are_whole_numbers_from_1_up_to_the_most():
    assert counts_in({"a": 1, "b": MOST, "c": "x"}, "a", "b", "absent") == {"a": 1, "b": MOST}
    assert MOST == 65536
    for wrong in (0, MOST + 1, -1, 1.0, True, "1", None):
        with pytest.raises(ValueError, match='"a" is .*, not a count from 1 up to 65536'):
            counts_in({"a": wrong}, "a")


@pytest.mark.parametrize(
    ("document", "shape", "message"),
    [
        ({"every_layer": ["0", "1"], "num_layers": 1, "layers": [[["0"], ["1"]]]}, (None, None), "either"),
        ({"num_layers": 1}, (None, None), "either"),
        ({"layers": [["0", "1"]], "format": "expert-placement/2"}, (None, None), "its format is 'expert-placement/2'"),
        ({"layers": [["0", "1"], []]}, (None, None), "a layer is a list with one entry a device"),
        ({"layers": [["0", "1"]]}, (2, 2), "it has 1 layers, the model has 2 MoE layers"),
        ({"layers": [["0", "2"]]}, (1, 2), "expert 2 does not exist: there are 2"),
        ({"layers": [["0,0,1", "1,1"]]}, (None, None), "layer 0: device 0 names expert 0 twice"),
        ({"layers": [["0", "1"], ["0", "1,0,1"]]}, (None, None), "layer 1: device 1 names expert 1 twice"),
        ({"layers": [["0", "1"]], "num_devices": 3}, (None, None), '"num_devices" says 3, the lists say 2'),
    ],
)
def test_what_a_file_may_not_say(document, shape, message):
    with pytest.raises(ValueError, match=message):
        held_of(document, *shape)


def test_the_model_says_what_a_file_leaves_open():
    assert held_of({"every_layer": ["0", "1"]}, 3, 4).shape == (3, 2, 4)
    assert held_of({"every_layer": ["0", "1"], "num_layers": 3, "num_experts": 4}, None, None).shape == (3, 2, 4)
    assert held_of({"every_layer": ["0", "1"], "num_layers": 3}, 3, None).shape == (3, 2, 2)


@pytest.mark.parametrize("notes", ["a", [1], {"a": "b"}, ["a", None]])
def test_notes_are_lines_of_text(notes):
    with pytest.raises(ValueError, match='"notes" are lines of text'):
        metadata_of({"metadata": {"notes": notes}}, None)
    assert metadata_of({"metadata": {"notes": ["a", "b"]}}, None) == {"notes": ["a", "b"]}
    assert metadata_of({}, None) == {}
