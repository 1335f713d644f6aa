"""Placement: which device holds which expert. Numpy only.

Dimensions: L MoE layers, E experts, D devices.

    layer 0, E=8, D=3, contiguous      device 0: 0 1 2 | device 1: 3 4 5 | device 2: 6 7
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


def check_loads(loads) -> np.ndarray:
    """Expert loads as float [L, E]; ValueError naming layer and expert if one is negative or not finite."""
    loads = np.asarray(loads, np.float64)
    if loads.ndim != 2 or 0 in loads.shape:
        raise ValueError(f"loads are [layers, experts], got {list(loads.shape)}")
    bad = np.argwhere(~np.isfinite(loads) | (loads < 0))
    if len(bad):
        layer, expert = bad[0]
        raise ValueError(f"layer {layer}: expert {expert} has load {loads[layer, expert]}; loads are counts from 0 up")
    return loads


@dataclass(frozen=True)
class Placement:
    """Which device holds which expert, layer by layer.

    held      bool [L, D, E]; every expert has at least one holder
    strategy  where it came from, for reports
    """

    held: np.ndarray
    strategy: str = "custom"
    metadata: dict = field(default_factory=dict)

    def __post_init__(self):
        held = np.array(self.held, bool)  # a copy: it becomes read-only
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

    def save(self, path, format: str | None = None, layer_numbers=None) -> None:
        """Write a file that `load` reads.

        format         None: JSON of this project; vllm, vllm-ranks, vllm-ascend, sglang, tensorrt-llm: that engine's
        layer_numbers  [L] of the MoE layers among all of the model's, where dense ones stand between them
        Raises ValueError where a format cannot say what this placement is, with the numbers.
        """
        from .formats.placements import write_placement  # the one room that the core asks: what files look like

        write_placement(self, path, format, layer_numbers)

    @staticmethod
    def load(path, num_layers=None, num_experts=None, num_devices=None, layer_numbers=None) -> Placement:
        """Read a placement file, of this project or of an engine named above, by what is in it.

        num_layers, num_experts  of the model it is for: checked, and needed where the file does not say them
        num_devices              D, for files that list slots only
        Raises ValueError, naming the file, for anything that is not a whole placement.
        """
        from .formats.placements import read_placement

        return read_placement(path, num_layers, num_experts, num_devices, layer_numbers)


def contiguous(num_layers: int, num_experts: int, num_devices: int) -> Placement:
    """Neighbours together: experts 0..n on device 0, the next on device 1, ... ValueError for other than 1 to E."""
    if not 1 <= num_devices <= num_experts:
        raise ValueError(f"{num_devices} devices: needs 1 to {num_experts}, the number of experts in a layer")
    # Balanced cuts: np.array_split gives the first E mod D devices one expert more.
    parts = np.array_split(np.arange(num_experts), num_devices)
    home = np.repeat(np.arange(num_devices), [len(part) for part in parts])
    held = home == np.arange(num_devices)[:, None]
    return Placement(np.repeat(held[None], num_layers, axis=0), "contiguous")
