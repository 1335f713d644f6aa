"""Placement files: the JSON that people write by hand, read and checked. Numpy only.

{"every_layer": ["0-63", "64-127"]}         one entry a device, the same in each layer
{"layers": [[[0, 3], [1, 2]], ...]}         one entry a layer
"""

from __future__ import annotations

import numpy as np

FORMAT = "expert-placement/1"
MOST_EXPERTS = 65536  # what a routing trace can number


def ranges(experts):
    """Ascending ids as text: [0, 1, 2, 7] is "0-2,7"."""
    runs = []
    for expert in experts:
        if runs and expert == runs[-1][1] + 1:
            runs[-1][1] = expert
        else:
            runs.append([expert, expert])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)


def _experts(entry) -> list[int]:
    """Expert ids of one device: both "0-2,7" and [0, "1-2", 7] are [0, 1, 2, 7]."""
    if isinstance(entry, bool) or not isinstance(entry, (int, str, list)):
        raise ValueError(f'expected experts such as [0, 1] or "0-15", got {entry!r}')
    if isinstance(entry, int):
        if not 0 <= entry < MOST_EXPERTS:
            raise ValueError(f"expert {entry} does not exist: experts are numbered from 0")
        return [entry]
    if isinstance(entry, list):
        return [expert for part in entry for expert in _experts(part)]
    experts = []
    for part in filter(None, (p.strip() for p in entry.split(","))):
        first, _, last = part.partition("-")
        try:
            first, last = int(first), int(last or first)
        except ValueError:
            raise ValueError(f'expected experts such as "0-15", got {part!r}') from None
        if not 0 <= first <= last < MOST_EXPERTS:
            raise ValueError(f"the range {part!r} does not run upwards from 0 or more to less than {MOST_EXPERTS}")
        experts += range(first, last + 1)
    return experts


def _devices(entries) -> list[list[int]]:
    if not isinstance(entries, list) or not entries:
        raise ValueError(f'a layer is a list with one entry a device, such as ["0-63", "64-127"], got {entries!r}')
    return [_experts(entry) for entry in entries]


def held_from_document(document, num_layers: int | None, num_experts: int | None) -> np.ndarray:
    """bool [L, D, E] that a file's JSON describes; ValueError says what is wrong with it."""
    if not isinstance(document, dict) or ("every_layer" in document) == ("layers" in document):
        raise ValueError('expected an object with either "every_layer" or "layers"')
    if document.get("format", FORMAT) != FORMAT:
        raise ValueError(f"its format is {document['format']!r}, not {FORMAT!r}")
    for name in ("num_layers", "num_devices", "num_experts"):
        size = document.get(name, 1)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f'"{name}" must be a count from 1 up, got {size!r}')
    if "every_layer" in document:
        count = num_layers or document.get("num_layers")
        if not count:
            raise ValueError('"every_layer" needs "num_layers" beside it')
        layers = [_devices(document["every_layer"])] * count
    else:
        if not isinstance(document["layers"], list) or not document["layers"]:
            raise ValueError('"layers" must be a list with one entry a layer')
        layers = [_devices(layer) for layer in document["layers"]]
    widths = {len(layer) for layer in layers}
    if len(widths) != 1:
        raise ValueError(f"layers name different numbers of devices: {sorted(widths)}")
    for l, layer in enumerate(layers):
        for d, experts in enumerate(layer):
            if len(set(experts)) < len(experts):
                twice = next(e for e in experts if experts.count(e) > 1)
                raise ValueError(f"layer {l}: device {d} names expert {twice} twice")
    highest = max((e for layer in layers for experts in layer for e in experts), default=-1)
    count = num_experts or document.get("num_experts") or highest + 1
    if highest >= count:
        raise ValueError(f"expert {highest} does not exist: there are {count}")
    held = np.zeros((len(layers), widths.pop(), count), dtype=bool)
    for l, layer in enumerate(layers):
        for d, experts in enumerate(layer):
            held[l, d, experts] = True
    own_layers = document.get("num_layers", len(layers)) if "every_layer" in document else len(layers)
    if num_layers and num_layers != own_layers:
        raise ValueError(f"it has {own_layers} layers, the model has {num_layers} MoE layers")
    for name, size in zip(("num_layers", "num_devices", "num_experts"), held.shape, strict=True):
        if document.get(name, size) != size:
            raise ValueError(f'"{name}" says {document[name]}, the lists say {size}')
    return held
