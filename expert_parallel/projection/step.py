"""Projection: time per token on hardware that is not here. Numpy only; every figure is modelled.

Dimensions: T tokens, L MoE layers, E experts, k chosen, D devices, B sequences in one step.

    a step =   fixed cost of every layer
             + all but the experts: bytes over memory bandwidth, or operations if those take longer
             + the experts of the fullest device, layer by layer, for all devices wait for it
             + an all-sum per MoE layer: latency + bytes over the link's bandwidth
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..serving import Serving

PREFILL_CHUNK = 2048  # tokens of a prompt that mlx-lm reads at a time


@dataclass(frozen=True, eq=False)
class Demand:
    """What one token asks of a model.

    expert_bytes, expert_parameters  [L], of one expert in each MoE layer
    rest_bytes, rest_parameters      all else that a token reads and multiplies with; no embedding table
    head_parameters                  of these, the output head: a prompt needs it for its last token only
    cache_per_token                  bytes of keys and values that each token of a short context adds
    windows                          (bytes, limit) of the layers among these that keep so many tokens at most
    attention                        (width, limit) of each layer that attends: query heads times head
                                     size, and the most tokens it looks back on (None: all)
    """

    num_layers: int
    hidden: int
    chosen: int
    num_experts: int
    expert_bytes: np.ndarray
    expert_parameters: np.ndarray
    rest_bytes: int
    rest_parameters: int
    head_parameters: int = 0
    cache_per_token: int = 0
    windows: tuple[tuple[int, int], ...] = ()
    attention: tuple[tuple[int, int | None], ...] = ()

    @property
    def num_moe_layers(self) -> int:
        return len(self.expert_bytes)

    def cache_bytes(self, context: int) -> int:
        """Keys and values that a token looks back on after so many others."""
        beyond = sum(per_token * max(0, context - limit) for per_token, limit in self.windows)
        return self.cache_per_token * context - beyond

    def attention_operations(self, first: int, last: int) -> float:
        """Operations of scores and weighted sums for the tokens at positions first..last-1 of a sequence."""
        total = 0.0
        for width, limit in self.attention:
            seen = np.minimum(np.arange(first + 1, last + 1), limit or last)
            total += 4.0 * width * seen.sum()
        return total


@dataclass(frozen=True)
class Machine:
    """Constants of one device; `source` says where they come from.

    bytes_per_second         of weights, one token at a time, for all but the experts
    expert_bytes_per_second  the same for experts (they are gathered, which may be slower)
    operations_per_second    of large matrix products, two per multiplication and addition
    layer_seconds            what a layer costs whatever its size: launches, synchronisation
    cache_bytes_per_second   of keys and values; 0: as weights (on a CPU they need no unpacking)
    memory_bytes             that are built in
    usable                   share of them that weights and caches may take; the rest is the system's
    value_bytes              of one value that is summed over devices: 2 for bfloat16, 4 for float32 (a CPU)
    """

    name: str
    bytes_per_second: float
    expert_bytes_per_second: float
    operations_per_second: float
    layer_seconds: float
    memory_bytes: float = float("inf")
    source: str = ""
    cache_bytes_per_second: float = 0.0
    usable: float = 1.0
    value_bytes: int = 2


@dataclass(frozen=True, eq=False)
class Fullest:
    """What the fullest device has to do in each layer of one step, means over steps.

    experts  [L]; different experts, whose weights it reads
    slots    [L]; token-expert pairs, which it computes
    """

    experts: np.ndarray
    slots: np.ndarray


def fullest_device(experts, held, batch: int = 1) -> Fullest:
    """Measure it on a trace, `batch` tokens to a step: the mean over steps of the maximum over devices.

    experts  [T, L, k] expert ids, T at least `batch`;  held  bool [L, D, E]
    """
    experts, steps = np.asarray(experts, dtype=np.int64), len(experts) // batch
    num_layers, num_devices, num_experts = held.shape
    read, computed = np.zeros(num_layers), np.zeros(num_layers)
    step = np.arange(steps)[:, None]
    for layer in range(num_layers):
        serving, chosen = Serving(held[layer]), experts[: steps * batch, layer].reshape(steps, -1)
        device = np.stack([serving.devices(ids) for ids in chosen]) if serving.any_shared else serving.home[chosen]
        slots, pairs = np.zeros((steps, num_devices)), np.zeros((steps, num_devices, num_experts), dtype=bool)
        np.add.at(slots, (step, device), 1)
        pairs[step, device, chosen] = True
        computed[layer], read[layer] = slots.max(axis=1).mean(), pairs.sum(axis=2).max(axis=1).mean()
    return Fullest(read, computed)


def even_load(demand: Demand, num_devices: int, tokens: int = 1) -> Fullest:
    """Perfect balance: every device has a D-th of the slots (the mean that no device stays above)."""
    slots = np.full(demand.num_moe_layers, tokens * demand.chosen / num_devices)
    return Fullest(np.minimum(slots, demand.num_experts / num_devices), slots)


@dataclass(frozen=True)
class Estimate:
    """Seconds of one step, by cause, and the tokens that it brings."""

    fixed: float
    rest: float
    experts: float
    latency: float
    transfer: float
    tokens: int = 1

    @property
    def seconds(self) -> float:
        return self.fixed + self.rest + self.experts + self.latency + self.transfer

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def bottleneck(self) -> str:
        """The largest part."""
        return NAMES[max(NAMES, key=lambda part: getattr(self, part))]


NAMES = {
    "fixed": "fixed cost per layer",
    "rest": "all but the experts",
    "experts": "experts",
    "latency": "latency of collectives",
    "transfer": "bandwidth of collectives",
}


def decode_step(
    demand: Demand,
    machine: Machine,
    num_devices: int = 1,
    link=None,
    load: Fullest | None = None,
    context: int = 0,
    batch: int = 1,
    rest_share: float = 1.0,
) -> Estimate:
    """One token for each of B sequences, over D equal devices.

    link        anything with `all_sum_parts(payload, num_devices)`, see links.py
    load        None: perfect balance
    context     tokens in each sequence's cache
    rest_share  part of all but the experts that one device does: 1 where replicated, about 1 / D where
                mlx-lm shards it too (hybrid), which costs one more all-sum a layer
    """
    return _step(demand, machine, num_devices, link, load, [(context, context + 1)], batch, rest_share, head=batch)


def prefill(
    demand: Demand, machine: Machine, num_tokens: int, num_devices: int = 1, link=None, load: Fullest | None = None
) -> Estimate:
    """A prompt of T tokens, read in chunks of 2048. `load` is of one such chunk."""
    starts = range(0, num_tokens, PREFILL_CHUNK)
    chunks = [(start, min(start + PREFILL_CHUNK, num_tokens)) for start in starts]
    return _step(demand, machine, num_devices, link, load, chunks, 1, 1.0, head=1)


def _step(demand, machine, num_devices, link, load, chunks, batch, rest_share, head):
    parts = np.zeros(5)
    for first, last in chunks:
        tokens = (last - first) * batch
        there = load or even_load(demand, num_devices, tokens)
        # 1. All but the experts: what is read, or computed if that takes longer.
        read = demand.rest_bytes / machine.bytes_per_second
        read += demand.cache_bytes(first) * batch / (machine.cache_bytes_per_second or machine.bytes_per_second)
        products = (demand.rest_parameters - demand.head_parameters) * tokens + demand.head_parameters * head
        operations = 2.0 * products + demand.attention_operations(first, last) * batch
        rest = max(read, operations / machine.operations_per_second) * rest_share
        # 2. The experts of the fullest device, the same way, layer by layer.
        experts = np.maximum(
            demand.expert_bytes * there.experts / machine.expert_bytes_per_second,
            2.0 * demand.expert_parameters * there.slots / machine.operations_per_second,
        ).sum()
        # 3. All-sums of the weighted sums.
        collectives = np.zeros(2)
        if num_devices > 1:
            once = np.array(link.all_sum_parts(tokens * demand.hidden * machine.value_bytes, num_devices))
            collectives = once * (demand.num_moe_layers + (demand.num_layers if rest_share < 1 else 0))
        parts += [machine.layer_seconds * demand.num_layers, rest, experts, *collectives]
    return Estimate(*parts.tolist(), tokens=sum(last - first for first, last in chunks) * batch)


def fit_arithmetic(machine: Machine, demand: Demand, tokens: int, speed: float, load: Fullest | None = None) -> Machine:
    """The machine with operations_per_second that a prompt's speed asks for, by bisection: more never take longer.

    load  what one device did for this prompt, where it is known
    ValueError where at this speed no time is left for arithmetic.
    """

    def seconds(operations):
        return prefill(demand, replace(machine, operations_per_second=operations), tokens, load=load).seconds

    low, high = 1e6, 1e18
    if seconds(high) >= tokens / speed:
        raise ValueError(f"machine {machine.name}: at {speed:g} prompt tokens/s no time is left for arithmetic")
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if seconds(middle) > tokens / speed else (low, middle)
    return replace(machine, operations_per_second=high)
