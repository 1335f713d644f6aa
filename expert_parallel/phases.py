"""Phases: one MoE layer with random weights, run over simulated devices and timed part by part.

Dimensions: T tokens, E experts, k chosen per token, D devices, H hidden.

    route     gates [T, E], the k best                     dispatch  rows of x, copied per device
    compute   each device its slots                        combine   weigh and sum per token
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU

from .moe import ExpertShard
from .placement import Placement


@dataclass
class Phases:
    """Measured seconds of one pass; per device its slots and its compute with nothing beside it."""

    route: float
    dispatch: float
    compute: float  # all devices at once, on their streams
    combine: float
    device_seconds: list[float]
    device_slots: list[int]


class SmallLayer:
    """A router and E experts with random weights, float32."""

    def __init__(self, hidden: int, expert_width: int, num_experts: int, top_k: int, seed: int = 0):
        mx.random.seed(seed)
        self.hidden, self.num_experts, self.top_k = hidden, num_experts, top_k
        self.gate = mx.random.normal((hidden, num_experts)) * hidden**-0.5
        self.experts = SwitchGLU(hidden, expert_width, num_experts)
        mx.eval(self.gate, self.experts.parameters())

    @property
    def expert_bytes(self) -> int:
        """Of one expert."""
        linears = (self.experts.gate_proj, self.experts.up_proj, self.experts.down_proj)
        return sum(linear.weight.nbytes for linear in linears) // self.num_experts

    def route(self, x: mx.array, preference: mx.array):
        """(gates [T, E], experts [T, k], weights [T, k]) for x [T, H] and preferences added to the logits."""
        gates = mx.softmax(x @ self.gate + preference, axis=-1)
        experts = mx.argpartition(gates, kth=-self.top_k, axis=-1)[:, -self.top_k :]
        weights = mx.take_along_axis(gates, experts, axis=-1)
        return gates, experts, weights / weights.sum(axis=-1, keepdims=True)

    def whole(self, x, experts, weights) -> mx.array:
        """[T, H]: mlx-lm's own SwitchGLU over all experts in one place."""
        return (self.experts(x, experts) * weights[..., None]).sum(axis=-2)

    def dense(self, x, experts, weights) -> mx.array:
        """[T, H]: every expert for every token by plain products, unwanted ones weighed with 0."""
        all_weights = mx.put_along_axis(mx.zeros((len(x), self.num_experts)), experts, weights, axis=-1)
        gate, up, down = (getattr(self.experts, f"{name}_proj").weight for name in ("gate", "up", "down"))
        result = mx.zeros_like(x)
        for e in range(self.num_experts):
            inner = x @ gate[e].T
            result = result + all_weights[:, e : e + 1] * ((inner * mx.sigmoid(inner) * (x @ up[e].T)) @ down[e].T)
        return result


def run_phases(layer: SmallLayer, x, preference, placement: Placement, experts=None):
    """(y [T, H], Phases) of one pass over the devices of `placement` (one layer).

    experts  [T, k]; choices to use in place of the router's own, as from a trace
    """
    shards = [ExpertShard.cut(layer.experts, placement.held[0], d) for d in range(placement.num_devices)]
    streams = [mx.new_stream(mx.default_device()) for _ in shards]
    mx.eval(x, preference)
    _compute(shards, streams, x, np.arange(layer.num_experts)[None], _slots(shards, np.arange(layer.num_experts)[None]))
    clock = [time.perf_counter()]
    gates, chosen, weights = layer.route(x, preference)
    if experts is not None:
        chosen, weights = given(experts)[1:]
    mx.eval(chosen, weights)
    clock.append(time.perf_counter())
    ids = np.array(chosen)
    slots = _slots(shards, ids)
    rows = [x[mx.array((s // layer.top_k).astype(np.int32))] for s in slots]
    mx.eval(rows)
    clock.append(time.perf_counter())
    parts = _compute(shards, streams, rows, ids, slots)
    clock.append(time.perf_counter())
    at = np.empty(ids.size, dtype=np.int32)
    at[np.concatenate(slots)] = np.arange(ids.size)
    y = mx.concatenate(parts)[mx.array(at)].reshape(*ids.shape, -1)
    y = (y * weights[..., None]).sum(axis=-2)
    mx.eval(y)
    clock.append(time.perf_counter())
    alone = [device_seconds(shard, x, ids, s) for shard, s in zip(shards, slots, strict=True)]
    return y, Phases(*np.diff(clock).tolist(), device_seconds=alone, device_slots=[len(s) for s in slots])


def given(experts):
    """(None, experts [T, k], weights [T, k]), as `route` has them, for choices made elsewhere: weights all alike."""
    chosen = mx.array(np.asarray(experts, dtype=np.uint32))
    return None, chosen, mx.full(chosen.shape, 1 / chosen.shape[1])


def device_seconds(shard: ExpertShard, x, ids, slots, repeats: int = 3) -> float:
    """Measured seconds that one device needs for its slots, with nothing beside it; the best of some."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        mx.eval(shard.rows(x, ids, slots))
        best = min(best, time.perf_counter() - begin)
    return best


def slowest_device_seconds(layer: SmallLayer, x, held, experts, kept=None) -> float:
    """Measured seconds of the device with the most slots, for choices [T, k] and holders bool [D, E]."""
    ids = np.asarray(experts)
    probe = ExpertShard.cut(layer.experts, held, 0)
    device_of = probe._assignment.devices(ids).reshape(-1)
    if kept is not None:
        device_of = np.where(np.asarray(kept).reshape(-1), device_of, -1)
    fullest = int(np.bincount(device_of[device_of >= 0], minlength=len(held)).argmax())
    shard = ExpertShard.cut(layer.experts, held, fullest)
    return device_seconds(shard, x, ids, np.flatnonzero(device_of == fullest))


def _slots(shards, ids):
    """Flat slots of each device."""
    device_of = shards[0]._assignment.devices(ids).reshape(-1)
    return [np.flatnonzero(device_of == d) for d in range(len(shards))]


def _compute(shards, streams, rows, ids, slots):
    """Outputs [n, H] of every device's slots, all devices at once."""
    parts = []
    for d, (shard, stream, mine) in enumerate(zip(shards, streams, slots, strict=True)):
        with mx.stream(stream):
            local = mx.array(shard._local[ids.reshape(-1)[mine]][:, None])
            given = rows[d] if isinstance(rows, list) else rows[: len(mine)]
            parts.append(shard.experts(given, local)[:, 0])
    mx.eval(parts)
    return parts
