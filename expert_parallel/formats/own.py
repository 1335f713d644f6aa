"""Placement files of this project: JSON that people can read, and write by hand.

Dimensions: L MoE layers, E experts, D devices.

    {"every_layer": ["0-63", "64-127"]}         one entry a device, the same in each layer
    {"layers": [[[0, 3], [1, 2]], ...]}         one entry a layer
"""

from __future__ import annotations

import re
from itertools import chain

import numpy as np

from ..placement import Placement

FORMAT = "expert-placement/1"
MOST = 1 << 16  # layers, devices, experts: more than any model has, and still a table that memory holds


def document_of(placement: Placement) -> dict:
    """Experts as ranges ("0-15") where they run on; once for all layers where these are alike."""
    devices = range(placement.num_devices)
    layers = [[_ranges(placement.experts_on(l, d)) for d in devices] for l in range(placement.num_layers)]
    sizes = dict(zip(("num_layers", "num_devices", "num_experts"), placement.held.shape, strict=True))
    document = {"format": FORMAT, "strategy": placement.strategy, **sizes}
    document |= {"metadata": placement.metadata} if placement.metadata else {}
    same = all(layer == layers[0] for layer in layers)
    return document | ({"every_layer": layers[0]} if same else {"layers": layers})


def _ranges(experts) -> str:
    """Ascending ids as text: [0, 1, 2, 7] is "0-2,7"."""
    runs = np.split(experts, np.flatnonzero(np.diff(experts) != 1) + 1)
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _experts(entry) -> list[int]:
    """Expert ids of one device: both "0-2,7" and [0, "1-2", 7] are [0, 1, 2, 7]."""
    if isinstance(entry, list):
        return [expert for part in entry for expert in _experts(part)]
    experts = []
    for part in str(entry).split(","):
        found = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part, re.ASCII)
        run = range(int(found[1]), int(found[2] or found[1]) + 1) if found else ()
        if not run:
            raise ValueError(f'expected experts such as [0, 1] or "0-15", numbered from 0, got {part!r}')
        experts += run
    return experts


def counts_in(document: dict, *names: str) -> dict[str, int]:
    """Those of the named counts that a file says; ValueError for one that is none."""
    said = {name: document[name] for name in names if name in document}
    for name, count in said.items():
        if type(count) is not int or not 1 <= count <= MOST:
            raise ValueError(f'"{name}" is {count!r}, not a count from 1 up to {MOST}')
    return said


def held_of(document, num_layers: int | None, num_experts: int | None) -> np.ndarray:
    """bool [L, D, E] that a file's JSON describes; ValueError says what is wrong with it."""
    # 1. Layers of devices of experts.
    if not isinstance(document, dict) or ("every_layer" in document) == ("layers" in document):
        raise ValueError('expected an object with either "every_layer" or "layers"')
    if document.get("format", FORMAT) != FORMAT:
        raise ValueError(f"its format is {document['format']!r}, not {FORMAT!r}")
    said = counts_in(document, "num_layers", "num_devices", "num_experts")
    layers = document.get("layers")
    if layers is None:
        if not (count := said.get("num_layers", num_layers)):
            raise ValueError('"every_layer" needs "num_layers", a count from 1 up, beside it')
        layers = [document["every_layer"]] * count
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, list) and layer for layer in layers):
        raise ValueError('a layer is a list with one entry a device, such as ["0-63", "64-127"]')
    if len(widths := {len(layer) for layer in layers}) != 1:
        raise ValueError(f"layers name different numbers of devices: {sorted(widths)}")
    layers = [[_experts(entry) for entry in layer] for layer in layers]
    # 2. As one table.
    named = {expert for layer in layers for experts in layer for expert in experts}
    count = num_experts or said.get("num_experts") or max(named, default=-1) + 1
    if named and max(named) >= count:
        raise ValueError(f"expert {max(named)} does not exist: there are {count}")
    held = np.zeros((len(layers), widths.pop(), count), bool)
    for (l, d), experts in zip(np.ndindex(held.shape[:2]), chain(*layers), strict=True):
        held[l, d, experts] = True
        if held[l, d].sum() < len(experts):
            raise ValueError(f"layer {l}: device {d} names expert {max(experts, key=experts.count)} twice")
    # 3. What it says of itself, and the model it is for.
    if num_layers and num_layers != len(layers):
        raise ValueError(f"it has {len(layers)} layers, the model has {num_layers} MoE layers")
    for name, size in zip(("num_layers", "num_devices", "num_experts"), held.shape, strict=True):
        if said.get(name, size) != size:
            raise ValueError(f'"{name}" says {said[name]}, the lists say {size}')
    return held


def metadata_of(document, held) -> dict:
    """What a file says besides; ValueError where the program that uses it would stumble over it."""
    metadata = document.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(f'"metadata" is an object, got {metadata!r}')
    if "num_nodes" in metadata:
        if type(nodes := metadata["num_nodes"]) is not int:
            raise ValueError(f'"num_nodes" is a count, got {nodes!r}')
        experts_of_nodes(held, nodes)
    notes = metadata.get("notes", [])
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise ValueError(f'"notes" are lines of text, got {notes!r}')
    return metadata


def experts_of_nodes(held, num_nodes: int) -> np.ndarray:
    """bool [L, nodes, E]: what each node has, equal runs of the devices in held [L, D, E].

    ValueError where they share experts or have not as many each.
    """
    num_layers, num_devices, num_experts = held.shape
    uneven = num_nodes < 1 or num_devices % num_nodes
    of_node = None if uneven else held.reshape(num_layers, num_nodes, -1, num_experts).any(axis=2)
    if uneven or (of_node.sum(axis=1) > 1).any() or (of_node.sum(axis=2) != num_experts / num_nodes).any():
        raise ValueError(f"a placement with num_nodes {num_nodes} has as many experts in each, and none in two")
    return of_node
