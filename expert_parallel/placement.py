"""Placement: which device holds which expert. Numpy only.

Dimensions: L MoE layers, E experts, D devices.

    layer 0, E=8, D=3, contiguous      device 0: 0 1 2 | device 1: 3 4 5 | device 2: 6 7
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

FORMAT = "expert-placement/1"
MOST_EXPERTS = 65536  # what a routing trace can number


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
        missing = np.argwhere(~held.any(axis=1))
        if len(missing):
            layer, expert = missing[0]
            raise ValueError(f"layer {layer}: expert {expert} is on no device ({len(missing)} such cases in all)")
        idle = np.argwhere(~held.any(axis=2))
        if len(idle):
            layer, device = idle[0]
            raise ValueError(f"layer {layer}: device {device} holds no expert")
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
        copies = f", {extra} redundant" if extra else ""
        return (
            f"Placement({self.strategy}: {self.num_layers} layers x {self.num_experts} experts"
            f" on {self.num_devices} devices{copies})"
        )

    def experts_on(self, layer: int, device: int) -> list[int]:
        """Experts that a device holds in a layer, ascending."""
        return np.flatnonzero(self.held[layer, device]).tolist()

    def devices_of(self, layer: int, expert: int) -> list[int]:
        """Devices that hold an expert of a layer, ascending; more than one if it is replicated."""
        return np.flatnonzero(self.held[layer, :, expert]).tolist()

    def device_loads(self, loads) -> np.ndarray:
        """Load of each device, float [L, D], for expert loads [L, E]; copies share a load equally."""
        loads = np.asarray(loads, dtype=np.float64)
        if loads.shape != (self.num_layers, self.num_experts):
            raise ValueError(
                f"loads are {list(loads.shape)}, this placement is for [{self.num_layers}, {self.num_experts}]"
            )
        check_loads(loads)
        return np.einsum("lde,le->ld", self.held, loads / self.copies)

    def save(self, path) -> None:
        """Write JSON that `load` and people can read; experts as ranges ("0-15") where they run on."""
        layers = [[_ranges(self.experts_on(l, d)) for d in range(self.num_devices)] for l in range(self.num_layers)]
        same = all(layer == layers[0] for layer in layers)
        document = {
            "format": FORMAT,
            "strategy": self.strategy,
            "num_layers": self.num_layers,
            "num_experts": self.num_experts,
            "num_devices": self.num_devices,
            **({"metadata": self.metadata} if self.metadata else {}),
            **({"every_layer": layers[0]} if same else {"layers": layers}),
        }
        path = Path(path)
        beside = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            beside.write_text(json.dumps(document, indent=1) + "\n")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

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
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"cannot read placement file {path}: {error}") from None
        try:
            return _from_document(document, num_layers, num_experts)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"placement file {path}: {error}") from None


def _ranges(experts):
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


def _from_document(document, num_layers, num_experts):
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
    return Placement(held, document.get("strategy", "custom"), document.get("metadata", {}))


def place_experts(
    loads,
    num_devices: int,
    strategy: str = "contiguous",
    redundant: int = 0,
    num_nodes: int = 1,
    num_groups: int = 1,
    coactivation=None,
) -> Placement:
    """A placement of E experts on D devices, for every one of L layers.

    loads        [L, E]; tokens sent to each expert. Only its shape counts for `contiguous`
                 and `round-robin`.
    num_devices  D, 1 to E
    strategy     contiguous    experts 0..n on device 0, the next on device 1, ...
                 round-robin   expert e on device e mod D
    Slot counts of devices differ by at most one. Raises ValueError with the numbers.
    """
    loads = np.asarray(loads)
    if loads.ndim != 2 or 0 in loads.shape:
        raise ValueError(f"loads are [layers, experts], got {list(loads.shape)}")
    num_layers, num_experts = loads.shape
    if num_devices != int(num_devices) or not 1 <= num_devices <= num_experts:
        raise ValueError(f"{num_devices} devices: needs 1 to {num_experts}, the number of experts in a layer")
    if redundant:
        raise ValueError(f"{redundant} redundant experts: only the strategy replicated makes copies")
    if strategy == "contiguous":
        # Balanced cuts: np.array_split gives the first E mod D devices one expert more.
        home = np.concatenate([np.full(len(part), d) for d, part in enumerate(_cut(num_experts, num_devices))])
    elif strategy == "round-robin":
        home = np.arange(num_experts) % num_devices
    else:
        raise ValueError(f"unknown placement strategy {strategy!r}: choose contiguous or round-robin")
    held = home[None, :] == np.arange(num_devices)[:, None]
    return Placement(np.repeat(held[None], num_layers, axis=0), strategy)


def _cut(num_experts, num_devices):
    return np.array_split(np.arange(num_experts), num_devices)
