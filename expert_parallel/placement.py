"""Placement: which device holds which expert. Numpy only.

Dimensions: L MoE layers, E experts, D devices.

    layer 0, E=8, D=3, contiguous      device 0: 0 1 2 | device 1: 3 4 5 | device 2: 6 7
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from .files import written_whole

FORMAT = "expert-placement/1"


def check_loads(loads) -> np.ndarray:
    """Expert loads as float [L, E]; ValueError naming layer and expert if one is negative or not finite."""
    loads = np.asarray(loads, dtype=np.float64)
    if loads.ndim != 2 or 0 in loads.shape:
        raise ValueError(f"loads are [layers, experts], got {list(loads.shape)}")
    bad = np.argwhere(~np.isfinite(loads) | (loads < 0))
    if len(bad):
        layer, expert = bad[0]
        raise ValueError(f"layer {layer}: expert {expert} has load {loads[layer, expert]}; loads are counts from 0 up")
    return loads


@dataclass(frozen=True, eq=False)
class Placement:
    """Which device holds which expert, layer by layer.

    held      bool [L, D, E]; every expert has at least one holder
    strategy  where it came from, for reports
    """

    held: np.ndarray
    strategy: str = "custom"
    metadata: dict = field(default_factory=dict)

    def __post_init__(self):
        held = np.array(self.held, dtype=bool)  # a copy: it becomes read-only
        if held.ndim != 3 or 0 in held.shape:
            raise ValueError(f"a placement is [layers, devices, experts], all at least 1, got {held.shape}")
        missing, idle = np.argwhere(~held.any(axis=1)), np.argwhere(~held.any(axis=2))
        if len(missing):
            layer, expert = missing[0]
            raise ValueError(f"layer {layer}: expert {expert} is on no device ({len(missing)} such cases in all)")
        if len(idle):
            raise ValueError(f"layer {idle[0][0]}: device {idle[0][1]} holds no expert")
        held.setflags(write=False)
        object.__setattr__(self, "held", held)

    @property
    def num_layers(self) -> int:
        return self.held.shape[0]

    @property
    def num_devices(self) -> int:
        return self.held.shape[1]

    @property
    def num_experts(self) -> int:
        return self.held.shape[2]

    @property
    def copies(self) -> np.ndarray:
        """Copies of each expert, int [L, E]."""
        return self.held.sum(axis=1)

    def __eq__(self, other):
        return isinstance(other, Placement) and np.array_equal(self.held, other.held)

    def __repr__(self):
        extra = int(self.copies.sum(axis=1).max()) - self.num_experts
        shape = f"{self.num_layers} layers x {self.num_experts} experts on {self.num_devices} devices"
        return f"Placement({self.strategy}: {shape}{f', {extra} redundant' if extra else ''})"

    def experts_on(self, layer: int, device: int) -> list[int]:
        """Experts that a device holds in a layer, ascending."""
        return np.flatnonzero(self.held[layer, device]).tolist()

    def devices_of(self, layer: int, expert: int) -> list[int]:
        """Devices that hold an expert of a layer, ascending; more than one if it is replicated."""
        return np.flatnonzero(self.held[layer, :, expert]).tolist()

    def device_loads(self, loads) -> np.ndarray:
        """Load of each device, float [L, D], for expert loads [L, E]; copies share a load equally."""
        loads = check_loads(loads)
        if loads.shape != (self.num_layers, self.num_experts):
            wanted = [self.num_layers, self.num_experts]
            raise ValueError(f"loads are {list(loads.shape)}, this placement is for {wanted}")
        return np.einsum("lde,le->ld", self.held, loads / self.copies)

    def save(self, path) -> None:
        """Write JSON that `load` and people can read; experts as ranges ("0-15") where they run on."""
        layers = [[_ranges(self.experts_on(l, d)) for d in range(self.num_devices)] for l in range(self.num_layers)]
        sizes = dict(zip(("num_layers", "num_devices", "num_experts"), self.held.shape, strict=True))
        document = {"format": FORMAT, "strategy": self.strategy, **sizes}
        document |= {"metadata": self.metadata} if self.metadata else {}
        same = all(layer == layers[0] for layer in layers)
        document |= {"every_layer": layers[0]} if same else {"layers": layers}
        with written_whole(path) as file:
            file.write(json.dumps(document, indent=1) + "\n")

    @staticmethod
    def load(path, num_layers: int | None = None, num_experts: int | None = None) -> Placement:
        """Read a placement file. By hand it can be as short as

            {"every_layer": ["0-63", "64-127"]}         one entry a device, the same in each layer
            {"layers": [[[0, 3], [1, 2]], ...]}         one entry a layer

        num_layers is needed where the file says `every_layer` and not how many.
        Raises ValueError, naming the file, for anything that is not a whole placement.
        """
        try:
            document = json.loads(Path(path).read_text())
            held = _held(document, num_layers, num_experts)
            return Placement(held, str(document.get("strategy", "custom")), document.get("metadata", {}))
        except OSError as error:
            raise ValueError(f"cannot read placement file {path}: {error}") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"placement file {path}: {error}") from None


def contiguous(num_layers: int, num_experts: int, num_devices: int) -> Placement:
    """Neighbours together: experts 0..n on device 0, the next on device 1, ... ValueError for other than 1 to E."""
    if not 1 <= num_devices <= num_experts:
        raise ValueError(f"{num_devices} devices: needs 1 to {num_experts}, the number of experts in a layer")
    # Balanced cuts: np.array_split gives the first E mod D devices one expert more.
    parts = np.array_split(np.arange(num_experts), num_devices)
    home = np.repeat(np.arange(num_devices), [len(part) for part in parts])
    held = home == np.arange(num_devices)[:, None]
    return Placement(np.repeat(held[None], num_layers, axis=0), "contiguous")


# --- files ------------------------------------------------------------------------------------------------


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
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise ValueError(f'expected experts such as [0, 1] or "0-15", numbered from 0, got {part!r}')
        experts += range(first, last + 1)
    return experts


def _held(document, num_layers: int | None, num_experts: int | None) -> np.ndarray:
    """bool [L, D, E] that a file's JSON describes; ValueError says what is wrong with it."""
    # 1. Layers of devices of experts.
    if not isinstance(document, dict) or ("every_layer" in document) == ("layers" in document):
        raise ValueError('expected an object with either "every_layer" or "layers"')
    if document.get("format", FORMAT) != FORMAT:
        raise ValueError(f"its format is {document['format']!r}, not {FORMAT!r}")
    layers = document.get("layers")
    if layers is None:
        count = document.get("num_layers", num_layers)
        if type(count) is not int or count < 1:
            raise ValueError('"every_layer" needs "num_layers", a count from 1 up, beside it')
        layers = [document["every_layer"]] * count
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, list) and layer for layer in layers):
        raise ValueError('a layer is a list with one entry a device, such as ["0-63", "64-127"]')
    if len(widths := {len(layer) for layer in layers}) != 1:
        raise ValueError(f"layers name different numbers of devices: {sorted(widths)}")
    layers = [[_experts(entry) for entry in layer] for layer in layers]
    # 2. As one table.
    named = {expert for layer in layers for experts in layer for expert in experts}
    count = num_experts or document.get("num_experts") or max(named, default=-1) + 1
    if named and max(named) >= count:
        raise ValueError(f"expert {max(named)} does not exist: there are {count}")
    held = np.zeros((len(layers), widths.pop(), count), dtype=bool)
    for (l, d), experts in zip(np.ndindex(held.shape[:2]), chain(*layers), strict=True):
        held[l, d, experts] = True
        if held[l, d].sum() < len(experts):
            raise ValueError(f"layer {l}: device {d} names expert {max(experts, key=experts.count)} twice")
    # 3. What it says of itself, and the model it is for.
    if num_layers and num_layers != len(layers):
        raise ValueError(f"it has {len(layers)} layers, the model has {num_layers} MoE layers")
    for name, size in zip(("num_layers", "num_devices", "num_experts"), held.shape, strict=True):
        if document.get(name, size) != size:
            raise ValueError(f'"{name}" says {document[name]}, the lists say {size}')
    return held
