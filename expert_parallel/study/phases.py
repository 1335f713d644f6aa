"""Phases: one MoE layer with random weights, run over simulated devices and timed part by part.

Dimensions: T tokens, E experts, k chosen per token, D devices, H hidden.

    route     gates [T, E], the k best                     dispatch  rows of x, copied per device
    compute   each device its slots                        combine   weigh and sum per token
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU

from ..placement import Placement
from ..projection.constants import seconds_of
from ..serving import Serving
from ..stores import InMemory, rows_of
from .remedies import Choices
from .scenarios import preferences

MEASURED = 512  # tokens of the passes that are timed
PASSES = 5  # of which the median counts


@dataclass
class Phases:
    """Measured seconds of one pass, medians; per device its slots and its compute with nothing beside it.

    spread  {part: seconds of the quickest and of the slowest pass}
    """

    route: float
    dispatch: float
    compute: float  # all devices at once, on their streams
    combine: float
    device_seconds: list[float]
    device_slots: list[int]
    spread: dict = field(default_factory=dict)


def interleaved(works, rounds: int = PASSES) -> np.ndarray:
    """Seconds [n, rounds] of each of n works, in turn, so that what else the machine does falls on all of them alike.

    What is built at the first call is not counted.
    """
    seconds = np.zeros((len(works), rounds + 1))
    for turn in range(rounds + 1):
        for n, work in enumerate(works):
            seconds[n, turn] = seconds_of(work)
    return seconds[:, 1:]


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
        gates = mx.softmax(x @ self.gate + preference, axis=1)
        experts = mx.argpartition(gates, kth=-self.top_k, axis=1)[:, -self.top_k :]
        weights = mx.take_along_axis(gates, experts, axis=1)
        return gates, experts, weights / weights.sum(axis=1, keepdims=True)

    def whole(self, x, experts, weights) -> mx.array:
        """[T, H]: mlx-lm's own SwitchGLU over all experts in one place."""
        return (self.experts(x, experts) * weights[..., None]).sum(axis=-2)

    def dense(self, x, experts, weights) -> mx.array:
        """[T, H]: every expert for every token by plain products, unwanted ones weighed with 0."""
        all_weights = mx.put_along_axis(mx.zeros((len(x), self.num_experts)), experts, weights, axis=1)
        gate, up, down = (getattr(self.experts, f"{name}_proj").weight for name in ("gate", "up", "down"))
        result = mx.zeros_like(x)
        for e in range(self.num_experts):
            inner = x @ gate[e].T
            result = result + all_weights[:, e : e + 1] * ((inner * mx.sigmoid(inner) * (x @ up[e].T)) @ down[e].T)
        return result


def scenario_tokens(layer: SmallLayer, name: str, num_tokens: int, seed: int = 0):
    """(fit, test, x, preference of x): a scenario's tokens through the layer's own router, and 512 of them to time."""
    wish = preferences(name, num_tokens, layer.num_experts, seed)
    x = mx.random.normal((num_tokens, layer.hidden), key=mx.random.key(seed + 1))
    gates, experts, _ = layer.route(x, mx.array(wish))
    choices = Choices(np.array(experts)[:, None], layer.num_experts, np.array(gates)[:, None])
    half = num_tokens // 2
    rows = half + np.linspace(0, num_tokens - half - 1, MEASURED).astype(int)  # evenly from those that judge
    return choices.part(slice(0, half)), choices.part(slice(half, None)), x[mx.array(rows)], wish[rows]


def run_phases(layer: SmallLayer, x, preference, placement: Placement, experts=None):
    """(y [T, H], Phases) of passes over the devices of `placement` (one layer), all alike.

    experts  [T, k]; choices to use in place of the router's own, as from a trace
    """
    stores = [_store(layer, placement.held[0], d) for d in range(placement.num_devices)]
    streams = [mx.new_stream(mx.default_device()) for _ in stores]
    serving, seconds = Serving(placement.held[0]), []
    mx.eval(x, preference)
    for _ in range(PASSES + 1):
        y, ids, slots, of_pass = _one_pass(layer, stores, streams, serving, x, preference, experts)
        seconds.append(of_pass)
    seconds = np.array(seconds[-PASSES:])  # without what is built at the first
    works = [device_work(store, x, ids, mine) for store, mine in zip(stores, slots, strict=True)]
    names, alone = ("route", "dispatch", "compute", "combine"), np.median(interleaved(works), axis=1)
    spread = {name: (column.min(), column.max()) for name, column in zip(names, seconds.T, strict=True)}
    counts = [len(mine) for mine in slots]
    return y, Phases(*np.median(seconds, axis=0).tolist(), (alone * (np.array(counts) > 0)).tolist(), counts, spread)


def _one_pass(layer, stores, streams, serving, x, preference, experts):
    """(y, ids [T, k], slots of each device, seconds of the four phases)."""
    # 1. Route.
    clock = [time.perf_counter()]
    _, chosen, weights = layer.route(x, preference) if experts is None else given(experts)
    mx.eval(chosen, weights)
    # 2. Dispatch: each device's rows of x.
    clock.append(time.perf_counter())
    ids = np.array(chosen)
    device, flat = serving.devices(ids).reshape(-1), ids.reshape(-1)
    slots = [np.flatnonzero(device == d) for d in range(len(stores))]
    rows = [x[mx.array((mine // layer.top_k).astype(np.int32))] for mine in slots]
    mx.eval(rows)
    # 3. Compute, each device on its stream.
    clock.append(time.perf_counter())
    parts = []
    for store, stream, mine, mine_x in zip(stores, streams, slots, rows, strict=True):
        with mx.stream(stream):
            parts.append(store(mine_x, np.arange(len(mine)), flat[mine]) if len(mine) else mine_x)
    mx.eval(parts)
    # 4. Combine: rows in their places, weighed and summed.
    clock.append(time.perf_counter())
    at = np.empty(ids.size, np.int32)
    at[np.concatenate(slots)] = np.arange(ids.size)
    y = mx.concatenate(parts)[mx.array(at)].reshape(*ids.shape, -1)
    y = (y * weights[..., None]).sum(axis=-2)
    mx.eval(y)
    clock.append(time.perf_counter())
    return y, ids, slots, np.diff(clock)


def given(experts):
    """(None, experts [T, k], weights [T, k]), as `route` has them, for choices made elsewhere: weights all alike."""
    chosen = mx.array(np.asarray(experts, np.uint32))
    return None, chosen, mx.full(chosen.shape, 1 / chosen.shape[1])


def device_work(store: InMemory, x, ids, slots):
    """What one device computes for its slots, as a function to time."""
    if not len(slots):
        return lambda: x[:0]
    return lambda: store(x, slots // ids.shape[1], ids.reshape(-1)[slots])


def slowest_device_work(layer: SmallLayer, x, held, experts, kept=None):
    """What the device with the most slots computes, for choices [T, k] and holders bool [D, E]."""
    ids = np.asarray(experts)
    device = Serving(held).devices(ids).reshape(-1)
    if kept is not None:
        device = np.where(np.asarray(kept).reshape(-1), device, len(held))
    fullest = int(np.bincount(device, minlength=len(held) + 1)[:-1].argmax())
    return device_work(_store(layer, held, fullest), x, ids, np.flatnonzero(device == fullest))


def _store(layer, held, device):
    return InMemory(layer.experts, layer.num_experts, np.flatnonzero(held[device]), rows_of(layer.experts))
