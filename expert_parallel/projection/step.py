"""Projection: time per token on hardware that is not here. Numpy only; every figure is modelled.

Dimensions: T tokens, L MoE layers, E experts, k chosen, D devices, B sequences in one step.

    a step =   fixed cost of every layer
             + all but the experts: bytes over memory bandwidth, or operations if those take longer
             + the experts of the fullest device, layer by layer, for all devices wait for it
             + an all-sum per MoE layer: latency + bytes over the link's bandwidth; of H values a token (reduce), or of
               k H where a block cannot sum its answers over ranks (gather)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..serving import Serving
from .hardware import Machine
from .links import Link

PREFILL_CHUNK = 2048  # tokens of a prompt that mlx-lm reads in one step
PARTS = {
    "fixed": "fixed cost per layer",
    "rest": "all but the experts",
    "experts": "experts",
    "latency": "latency of collectives",
    "transfer": "bandwidth of collectives",
}


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
    gathers                          MoE layers whose slots are all-summed, not their weighted sum
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
    gathers: int = 0

    @property
    def num_moe_layers(self) -> int:
        return len(self.expert_bytes)

    def cache_bytes(self, context: int) -> int:
        """Keys and values that a token looks back on after so many others."""
        beyond = sum(per_token * max(0, context - limit) for per_token, limit in self.windows)
        return self.cache_per_token * context - beyond

    def attention_operations(self, first: int, last: int) -> float:
        """Operations of scores and weighted sums for the tokens at positions first..last-1 of a sequence."""
        seen = np.arange(first + 1, last + 1)
        return sum(4.0 * width * np.minimum(seen, limit or last).sum() for width, limit in self.attention)


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
    experts, (num_layers, devices, num_experts) = np.asarray(experts), held.shape
    steps = len(experts) // batch
    rows, read, slots = np.arange(steps)[:, None] * devices, np.zeros(num_layers), np.zeros(num_layers)

    def fullest(device):  # counted in all steps at once, for device d of step s under s D + d
        return np.bincount(device.ravel(), minlength=steps * devices).reshape(steps, devices).max(axis=1).mean()

    for layer in range(num_layers):
        serving, chosen = Serving(held[layer]), experts[: steps * batch, layer].reshape(steps, -1)
        if serving.any_shared:
            device = rows + np.stack([serving.devices(ids) for ids in chosen])  # [steps, batch k]
        else:
            device = rows + serving.devices(chosen)
        slots[layer], read[layer] = fullest(device), fullest(np.unique(device * num_experts + chosen) // num_experts)
    return Fullest(read, slots)


def uniform_experts(num_tokens: int, num_layers: int, num_experts: int, top_k: int, seed: int = 0) -> np.ndarray:
    """A trace [T, L, k] in which every expert is as likely as any other: what a perfect router would do."""
    rank = np.random.default_rng(seed).random((num_tokens, num_layers, num_experts), np.float32)
    return np.argpartition(rank, top_k - 1)[..., :top_k].astype(np.uint16)


def even_load(demand: Demand, num_devices: int, batch: int = 1) -> Fullest:
    """Perfect balance: every device has a D-th of the slots (the mean that no device stays above)."""
    slots = np.full(demand.num_moe_layers, batch * demand.chosen / num_devices)
    return Fullest(np.minimum(slots, demand.num_experts / num_devices), slots)


@dataclass(frozen=True)
class Estimate:
    """Seconds of one step, by cause (`PARTS`), and the tokens that it brings."""

    fixed: float
    rest: float
    experts: float
    latency: float
    transfer: float
    tokens: int = 1

    @property
    def seconds(self) -> float:
        return sum(getattr(self, part) for part in PARTS)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def bottleneck(self) -> str:
        """The largest part."""
        return PARTS[max(PARTS, key=lambda part: getattr(self, part))]


def estimate(
    demand: Demand,
    machine: Machine,
    devices: int = 1,
    link: Link | None = None,
    load: Fullest | None = None,
    *,
    context: int = 0,
    tokens: int = 1,
    batch: int = 1,
    rest_share: float = 1.0,
) -> Estimate:
    """One step of B sequences over D machines of a kind with a link between them: decoding, or a chunk of a prompt.

    load             None: perfect balance
    context, tokens  each sequence has so many tokens in its cache, and reads so many more; logits of the last
    rest_share       part of all but the experts that one device does: 1 where replicated, about 1 / D where
                     mlx-lm shards it too (hybrid), which costs one more all-sum a layer, and no layer gathers
    """
    together, arithmetic = tokens * batch, machine.operations_per_second
    load = load or even_load(demand, devices, together)
    cache_speed = machine.cache_bytes_per_second or machine.bytes_per_second
    read = demand.rest_bytes / machine.bytes_per_second + demand.cache_bytes(context) * batch / cache_speed
    products = (demand.rest_parameters - demand.head_parameters) * together + demand.head_parameters * batch
    operations = 2.0 * products + demand.attention_operations(context, context + tokens) * batch
    experts = np.maximum(
        demand.expert_bytes * load.experts / machine.expert_bytes_per_second,
        2.0 * demand.expert_parameters * load.slots / arithmetic,
    )
    all_sums = demand.num_moe_layers + (demand.num_layers if rest_share < 1 else 0)
    payload = together * demand.hidden * machine.value_bytes
    gathers = demand.gathers if rest_share == 1 else 0
    collectives = np.zeros(2)
    if devices > 1:
        for number, size in ((all_sums - gathers, payload), (gathers, payload * demand.chosen)):
            collectives += number * np.array(link.all_sum_parts(size, devices))
    return Estimate(
        fixed=machine.layer_seconds * demand.num_layers,
        rest=max(read, operations / arithmetic) * rest_share,
        experts=float(experts.sum()),
        latency=float(collectives[0]),
        transfer=float(collectives[1]),
        tokens=together,
    )


def seconds_in_halves(compute: float, collective: float, layers: int) -> float:
    """Of a prompt whose halves take turns, a half's sums under the other's computation (ranks/overlap.py).

    compute, collective  seconds of one half in one layer; all layers alike
    Whichever of the two takes longer never stops between the first computation and the last collective.
    """
    return compute + (2 * layers - 1) * max(compute, collective) + collective


def fit_arithmetic(machine: Machine, demand: Demand, tokens: int, speed: float, load: Fullest | None = None) -> Machine:
    """The machine with operations_per_second that a prompt's speed asks for, by bisection: more never take longer.

    tokens, speed  of a prompt of one chunk, and how many of them a second
    load           what one device did for this prompt, where it is known
    """

    def speed_with(operations):
        faster = replace(machine, operations_per_second=operations)
        return estimate(demand, faster, load=load, tokens=tokens).tokens_per_second

    low, high = 1e6, 1e18
    if speed_with(high) <= speed:
        raise ValueError(f"machine {machine.name}: at {speed:g} prompt tokens/s no time is left for arithmetic")
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if speed_with(middle) < speed else (low, middle)
    return replace(machine, operations_per_second=high)
