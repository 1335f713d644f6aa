"""Moving: experts change devices while a model runs, a layer at a time, in one process or on N ranks.

Dimensions: L MoE layers, E experts, D devices, H hidden, k chosen per token. Which experts move, and
whether that pays: rebalancing.py.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .moe import ExpertShard, SimulatedDevices, _same_kind, check_placement, moe_layers, num_experts, switch_linears
from .placement import Placement
from .routing import recorders


@dataclass
class MoveReport:
    """Measured: experts moved, their bytes, and how long generation stood still."""

    experts: int = 0
    bytes: int = 0
    seconds: float = 0.0
    longest_layer_seconds: float = 0.0


def shards_here(experts) -> list[ExpertShard]:
    """What this process holds of one layer: every simulated device's shard, or a rank's own."""
    return experts.shards if isinstance(experts, SimulatedDevices) else [experts]


def held_now(model: nn.Module) -> np.ndarray:
    """bool [L, D, E]: what the devices of a sharded model hold."""
    layers = [layer.experts for layer in moe_layers(model)]
    if not layers or not all(isinstance(experts, (SimulatedDevices, ExpertShard)) for experts in layers):
        raise ValueError("this model is not spread over devices: call shard_model first")
    return np.stack([shards_here(experts)[0]._assignment.held for experts in layers])


def move_experts(model: nn.Module, placement: Placement, read=None) -> MoveReport:
    """Change the devices of `model` to hold what `placement` says; tokens stay the same.

    read  (layer, expert) -> {name of a stacked projection: {name of a tensor: one row [1, ...]}}, as
          `loading.expert_reader` gives it; where None, simulated devices copy a row from one that holds it
    Only rows that a device lacks are fetched. A layer is changed whole before the next is touched, so that
    no more than one layer's experts are in memory twice. Call it between two forward passes, with the same
    placement on every rank; no rank waits for another in it.
    """
    layers = check_placement(model, placement)
    old = held_now(model)
    if old.shape != placement.held.shape:
        raise ValueError(f"the model is spread over {old.shape[1]} devices, the placement over {placement.num_devices}")
    if read is None and not isinstance(layers[0].experts, SimulatedDevices):
        raise ValueError("a rank holds no other rank's experts: give `read`, see loading.expert_reader")
    report = MoveReport()
    began = time.perf_counter()
    for l, (layer, now, then) in enumerate(zip(layers, old, placement.held, strict=True)):
        if (now == then).all():
            continue
        start = time.perf_counter()
        devices = layer.experts
        shards = []
        for shard in shards_here(devices):
            d = shard.device
            experts = shard.experts
            if (now[d] != then[d]).any():
                arrivals = np.flatnonzero(then[d] & ~now[d])
                rows = {int(e): read(l, int(e)) if read else _row(devices, now, int(e)) for e in arrivals}
                experts = rebuilt(shard, np.flatnonzero(then[d]), rows)
                report.bytes += sum(a.nbytes for row in rows.values() for part in row.values() for a in part.values())
                report.experts += len(arrivals)
            changed = ExpertShard(experts, then, d)
            changed._gather_group, changed.slots_served = shard._gather_group, shard.slots_served
            shards.append(changed)
        mx.eval([shard.parameters() for shard in shards])
        simulated = isinstance(devices, SimulatedDevices)
        layer.experts = SimulatedDevices(shards, devices._streams) if simulated else shards[0]
        report.longest_layer_seconds = max(report.longest_layer_seconds, time.perf_counter() - start)
    report.seconds = time.perf_counter() - began
    return report


def _row(devices, held, expert):
    """The tensors of one expert, from the first device that holds it."""
    shard = devices.shards[int(held[:, expert].argmax())]
    local = int(shard._local[expert])
    return {
        name: {key: array[local : local + 1] for key, array in linear.parameters().items()}
        for name, linear in switch_linears(shard.experts)
    }


def rebuilt(shard, experts, rows):
    """The shard's module with the weights of `experts`: its own rows where it has them, else those in `rows`."""
    module = _same_kind(shard.experts)
    targets = dict(module.named_modules())
    for name, linear in switch_linears(shard.experts):
        for key, array in linear.parameters().items():
            parts = [array[i : i + 1] if (i := int(shard._local[e])) >= 0 else rows[int(e)][name][key] for e in experts]
            targets[name][key] = mx.concatenate(parts)
    return module


class LiveLoads:
    """Counts of what routers asked for since the last look; see `watch_loads`."""

    def __init__(self, num_layers: int, num_experts: int):
        self._waiting = [[] for _ in range(num_layers)]
        self._num_experts = num_experts

    def take(self) -> tuple[np.ndarray, int]:
        """(slots [L, E], tokens) since the last call; evaluates the indices that came meanwhile."""
        loads = np.zeros((len(self._waiting), self._num_experts), dtype=np.int64)
        tokens = 0
        passes = min(map(len, self._waiting))
        for l, waiting in enumerate(self._waiting):
            indices, waiting[:passes] = waiting[:passes], []
            for ids in map(np.array, indices):
                loads[l] += np.bincount(ids.ravel(), minlength=self._num_experts)
                tokens += ids.size // ids.shape[-1] if l == 0 else 0
        return loads, tokens


@contextmanager
def watch_loads(model: nn.Module):
    """Count the loads of `model` while the block runs: a LiveLoads, to be asked between forward passes."""
    layers = moe_layers(model)
    if not layers:
        raise ValueError("this model has no Mixture-of-Experts layers: there are no loads to watch")
    live = LiveLoads(len(layers), num_experts(layers[0].experts))
    with recorders(layers, [waiting.append for waiting in live._waiting]):
        yield live
