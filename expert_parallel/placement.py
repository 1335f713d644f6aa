"""Placement: which device holds which expert. Numpy only.

Dimensions: L MoE layers, E experts, D devices.

    layer 0, E=8, D=3, contiguous      device 0: 0 1 2 | device 1: 3 4 5 | device 2: 6 7
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .affinity import coactivation as count_pairs
from .affinity import gather_by_affinity
from .copies import device_times
from .placement_files import FORMAT, held_from_document, ranges
from .placement_search import divides_into_nodes, spread, spread_in_nodes
from .whole_files import written_whole


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
        layers = [[ranges(self.experts_on(l, d)) for d in range(self.num_devices)] for l in range(self.num_layers)]
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
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"cannot read placement file {path}: {error}") from None
        try:
            held = held_from_document(document, num_layers, num_experts)
            return Placement(held, document.get("strategy", "custom"), document.get("metadata", {}))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"placement file {path}: {error}") from None


STRATEGIES = ("contiguous", "round-robin", "balanced", "replicated", "affinity")


def place_experts(
    loads,
    num_devices: int,
    strategy: str = "contiguous",
    redundant: int = 0,
    num_nodes: int = 1,
    num_groups: int = 1,
    coactivation=None,
    *,
    device_capacity=None,
    device_speed=None,
    balance_bound: float = 0.05,
) -> Placement:
    """A placement of E experts on D devices, for every one of L layers.

    loads         [L, E]; tokens sent to each expert. Only its shape counts for `contiguous` and `round-robin`
    num_devices   D, 1 to E
    strategy      contiguous    experts 0..n on device 0, the next on device 1, ...
                  round-robin   expert e on device e mod D
                  balanced      the fullest device as little loaded as a search can make it
                  replicated    the same with `redundant` further copies per layer for hot experts
                  affinity      experts chosen together put together: tokens go to fewer devices; the
                                fullest device at most `balance_bound` above that of `balanced` for these
                                loads; other tokens burden both otherwise, and not alike
    num_nodes, num_groups  balanced and replicated keep each group of experts (E / num_groups neighbours)
                  inside one node where all divides, and are global otherwise (DeepSeek, EPLB)
    coactivation  for `affinity`: [L, E, E] tokens that chose both experts, or a trace's experts [T, L, k]
    device_capacity  [D]; most experts of a layer on each device, for devices of unequal memory
    device_speed     [D]; relative speeds: load over speed is levelled out, not load

    Slot counts of devices differ by at most one unless `device_capacity` is given; no device holds two
    copies of one expert. Raises ValueError with the numbers.
    """
    loads = np.asarray(loads)
    if loads.ndim != 2 or 0 in loads.shape:
        raise ValueError(f"loads are [layers, experts], got {list(loads.shape)}")
    num_layers, num_experts = loads.shape
    if num_devices != int(num_devices) or not 1 <= num_devices <= num_experts:
        raise ValueError(f"{num_devices} devices: needs 1 to {num_experts}, the number of experts in a layer")
    num_devices = int(num_devices)
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown placement strategy {strategy!r}: choose {', '.join(STRATEGIES)}")
    if redundant and strategy != "replicated":
        raise ValueError(f"{redundant} redundant experts: only the strategy replicated makes copies, not {strategy}")
    if strategy in ("contiguous", "round-robin"):
        if device_capacity is not None or device_speed is not None:
            raise ValueError(f"the strategy {strategy} knows no device capacities or speeds: choose balanced")
        # Balanced cuts: np.array_split gives the first E mod D devices one expert more.
        parts = np.array_split(np.arange(num_experts), num_devices)
        home = np.repeat(np.arange(num_devices), [len(part) for part in parts])
        if strategy == "round-robin":
            home = np.arange(num_experts) % num_devices
        held = home[None, :] == np.arange(num_devices)[:, None]
        return Placement(np.repeat(held[None], num_layers, axis=0), strategy)

    loads = check_loads(loads)
    nothing = np.flatnonzero(loads.sum(axis=1) == 0)
    if len(nothing):
        raise ValueError(f"layer {nothing[0]} has no load at all: {strategy} needs a trace that covers every layer")
    if redundant != int(redundant) or not 0 <= redundant <= num_experts * (num_devices - 1):
        most = num_experts * (num_devices - 1)
        raise ValueError(f"{redundant} redundant experts: needs 0 to {most} for {num_experts} on {num_devices} devices")
    if min(num_nodes, num_groups) < 1:
        raise ValueError(f"{num_nodes} nodes and {num_groups} groups: both are counts from 1 up")
    redundant = int(redundant)
    uneven = {"device_capacity": device_capacity, "device_speed": device_speed}
    uneven = {name: _one_per_device(name, value, num_devices) for name, value in uneven.items() if value is not None}
    if device_capacity is not None:
        room = int(np.minimum(uneven["device_capacity"], num_experts).sum())
        if room < num_experts + redundant:
            raise ValueError(f"the devices have room for {room} experts of a layer, {num_experts + redundant} are due")
    hierarchical = (
        num_nodes > 1
        and strategy != "affinity"
        and not uneven
        and divides_into_nodes(num_experts, num_devices, redundant, num_nodes, num_groups)
    )
    about = {name: value.tolist() for name, value in uneven.items()}
    if hierarchical:
        held = spread_in_nodes(loads, num_devices, redundant, num_nodes, num_groups)
        about["num_nodes"] = num_nodes  # rebalancing keeps experts in their nodes
    else:
        held = spread(loads, num_devices, redundant, **uneven)
    if num_nodes > 1:
        about["scope"] = f"hierarchical over {num_nodes} nodes" if hierarchical else "global"
    if strategy == "affinity":
        pairs = _check_pairs(coactivation, num_layers, num_experts)
        speed = uneven.get("device_speed", np.ones(num_devices))
        limit = device_times(loads, held, speed).max(axis=1) * (1 + balance_bound)
        held = gather_by_affinity(loads, pairs, held, limit, speed)
        about["balance_bound"] = balance_bound
    return Placement(held, strategy, about)


def _one_per_device(name, value, num_devices):
    value = np.asarray(value)
    if value.shape != (num_devices,) or not np.isfinite(value).all() or (value <= 0).any():
        raise ValueError(f"{name} needs one positive number per device, {num_devices} in all, got {value.tolist()}")
    if name == "device_capacity" and (value != value.astype(int)).any():
        raise ValueError(f"device_capacity counts experts of a layer, got {value.tolist()}")
    return value


def _check_pairs(coactivation, num_layers, num_experts):
    if coactivation is None:
        raise ValueError("affinity needs to know which experts are chosen together: pass coactivation, or a trace")
    pairs = np.asarray(coactivation)
    if pairs.ndim == 3 and pairs.dtype.kind in "ui" and pairs.shape[1] == num_layers and pairs.shape[2] != num_experts:
        return count_pairs(pairs, num_experts)
    pairs = pairs.astype(np.float32)
    if pairs.shape != (num_layers, num_experts, num_experts):
        expected = [num_layers, num_experts, num_experts]
        raise ValueError(f"coactivation is {list(pairs.shape)}, the loads want {expected}")
    if not np.isfinite(pairs).all() or (pairs < 0).any():
        raise ValueError("coactivation must be finite and not negative")
    return (pairs + pairs.transpose(0, 2, 1)) / 2
