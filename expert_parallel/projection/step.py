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
    memory_bytes             for weights and caches
    """

    name: str
    bytes_per_second: float
    expert_bytes_per_second: float
    operations_per_second: float
    layer_seconds: float
    memory_bytes: float = float("inf")
    source: str = ""
    cache_bytes_per_second: float = 0.0

    def __post_init__(self):
        for field in ("bytes_per_second", "expert_bytes_per_second", "operations_per_second"):
            if not getattr(self, field) > 0:
                raise ValueError(f"machine {self.name}: {field} must be above 0, got {getattr(self, field)}")
        if self.layer_seconds < 0:
            raise ValueError(f"machine {self.name}: layer_seconds must be at least 0, got {self.layer_seconds}")


@dataclass(frozen=True)
class Cluster:
    """D equal devices; over `num_nodes` machines if more than one.

    link, node_link  `communication.Link` inside a machine and between machines
    """

    machine: Machine
    num_devices: int = 1
    link: object = None
    num_nodes: int = 1
    node_link: object = None

    def __post_init__(self):
        if self.num_devices < 1 or self.num_nodes < 1 or self.num_devices % self.num_nodes:
            raise ValueError(f"{self.num_devices} devices do not spread evenly over {self.num_nodes} nodes")
        if self.num_devices > self.num_nodes and self.link is None:
            raise ValueError(f"{self.num_devices} devices need a link")
        if self.num_nodes > 1 and self.node_link is None:
            raise ValueError(f"{self.num_nodes} nodes need a node_link")

    def all_sum_parts(self, payload: float) -> tuple[float, float]:
        """(latency, transfer) seconds: inside every node, then of each device's share between nodes."""
        per_node = self.num_devices // self.num_nodes
        parts = [(0.0, 0.0)]
        if per_node > 1:
            parts.append(self.link.all_sum_parts(payload, per_node))
        if self.num_nodes > 1:
            parts.append(self.node_link.all_sum_parts(payload / per_node, self.num_nodes))
        return tuple(np.sum(parts, axis=0))


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

    experts  [T, L, k] expert ids;  held  bool [L, D, E]
    """
    experts, held = np.asarray(experts, dtype=np.int64), np.asarray(held, dtype=bool)
    steps = len(experts) // batch
    if steps == 0:
        raise ValueError(f"a trace of {len(experts)} tokens has no step of {batch}")
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


def uniform_experts(num_tokens: int, num_layers: int, num_experts: int, top_k: int, seed: int = 0) -> np.ndarray:
    """A trace [T, L, k] in which every expert is as likely as any other: what a perfect router would do."""
    rank = np.random.default_rng(seed).random((num_tokens, num_layers, num_experts), dtype=np.float32)
    return np.argpartition(rank, top_k - 1, axis=-1)[..., :top_k].astype(np.uint16)


def even_load(demand: Demand, num_devices: int, batch: int = 1) -> Fullest:
    """Perfect balance: every device has a D-th of the slots (the mean that no device stays above)."""
    slots = np.full(demand.num_moe_layers, batch * demand.chosen / num_devices)
    most = demand.num_experts / num_devices
    return Fullest(np.minimum(slots, most), slots)


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
        names = {
            "fixed": "fixed cost per layer",
            "rest": "all but the experts",
            "experts": "experts",
            "latency": "latency of collectives",
            "transfer": "bandwidth of collectives",
        }
        return names[max(names, key=lambda name: getattr(self, name))]


def decode_step(
    demand: Demand,
    cluster: Cluster,
    load: Fullest | None = None,
    context: int = 0,
    batch: int = 1,
    combine: str = "reduce",
    rest_share: float = 1.0,
    value_bytes: int = 2,
) -> Estimate:
    """One token for each of B sequences.

    load        None: perfect balance
    context     tokens in each sequence's cache
    rest_share  part of all but the experts that one device does: 1 where replicated, about 1 / D where
                mlx-lm shards it too (hybrid), which costs one more all-sum a layer
    """
    return _step(demand, cluster, load, [(context, context + 1)], batch, combine, rest_share, value_bytes, head=batch)


def prefill(
    demand: Demand,
    cluster: Cluster,
    num_tokens: int,
    load: Fullest | None = None,
    combine: str = "reduce",
    rest_share: float = 1.0,
    value_bytes: int = 2,
) -> Estimate:
    """A prompt of T tokens, read in chunks of 2048. `load` is of one such chunk (batch = its tokens)."""
    starts = range(0, num_tokens, PREFILL_CHUNK)
    chunks = [(start, min(start + PREFILL_CHUNK, num_tokens)) for start in starts]
    return _step(demand, cluster, load, chunks, 1, combine, rest_share, value_bytes, head=1)


def _step(demand, cluster, load, chunks, batch, combine, rest_share, value_bytes, head):
    if combine not in ("gather", "reduce"):
        raise ValueError(f'combine is "gather" or "reduce", got {combine!r}')
    machine, devices = cluster.machine, cluster.num_devices
    parts = np.zeros(5)
    for first, last in chunks:
        tokens = (last - first) * batch
        there = load or even_load(demand, devices, tokens)
        cached = demand.cache_bytes(first) * batch * rest_share
        read = demand.rest_bytes * rest_share / machine.bytes_per_second
        read += cached / (machine.cache_bytes_per_second or machine.bytes_per_second)
        products = (
            2.0 * (demand.rest_parameters - demand.head_parameters) * tokens + 2.0 * demand.head_parameters * head
        )
        operations = (products + demand.attention_operations(first, last) * batch) * rest_share
        rest = max(read, operations / machine.operations_per_second)
        experts = np.maximum(
            demand.expert_bytes * there.experts / machine.expert_bytes_per_second,
            2.0 * demand.expert_parameters * there.slots / machine.operations_per_second,
        ).sum()
        payload = tokens * demand.hidden * value_bytes
        latency, transfer = cluster.all_sum_parts(payload * (demand.chosen if combine == "gather" else 1))
        collectives = np.array([latency, transfer]) * demand.num_moe_layers
        if rest_share < 1:
            collectives += np.array(cluster.all_sum_parts(payload)) * demand.num_layers
        parts += [machine.layer_seconds * demand.num_layers, rest, experts, *collectives]
    return Estimate(*parts.tolist(), tokens=sum(last - first for first, last in chunks) * batch)


def best_number(estimates: dict[int, Estimate]) -> int:
    """The number of devices with most tokens a second; from there on more devices do not pay."""
    return max(sorted(estimates), key=lambda n: estimates[n].tokens_per_second)


def fit_arithmetic(machine: Machine, demand: Demand, tokens: int, speed: float, load: Fullest | None = None) -> Machine:
    """The machine with operations_per_second that a prompt's speed asks for, by bisection: more never take longer.

    load  what one device did for this prompt, where it is known
    """

    def seconds(operations):
        return prefill(demand, Cluster(replace(machine, operations_per_second=operations)), tokens, load).seconds

    low, high = 1e6, 1e18
    if seconds(high) >= tokens / speed:
        raise ValueError(f"machine {machine.name}: at {speed:g} prompt tokens/s no time is left for arithmetic")
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if seconds(middle) > tokens / speed else (low, middle)
    return replace(machine, operations_per_second=high)


def one_token_bytes(demand: Demand, context: int = 0) -> float:
    """Bytes that one device alone reads for one token."""
    experts = float(demand.expert_bytes.sum()) * demand.chosen
    return demand.rest_bytes + experts + demand.cache_bytes(context)
