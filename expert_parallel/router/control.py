"""Router control: load-aware choice and capacity limits in mlx-lm's own qwen3_moe blocks.

Dimensions: T tokens of a batch, L MoE layers, E experts, k chosen per token, D devices.

    gates [T, E] -> choose k by gates x exp(bias) -> limit slots per expert -> weigh by the unbiased gates

Both change what the model says. Measure perplexity beside balance: benchmarks/quality_against_balance.py.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx_lm.models.qwen3_moe import Qwen3MoeSparseMoeBlock

from ..layers import moe_layers, num_experts
from ..placement import Placement
from .capacity import adaptive_capacity, expert_capacity, limit_slots


@dataclass(frozen=True)
class Capacity:
    """A limit of slots per expert and batch.

    factor     of `expert_capacity`; None: adaptive, the smallest limit that drops no more than `tolerance`
    rule       megatron, deepspeed or tutel
    drop       score or position: who keeps a place;  reroute  to the next best expert with room instead
    Decoding one token at a time never meets a limit: no expert is chosen twice for a token.
    """

    factor: float | None = 1.25
    rule: str = "megatron"
    drop: str = "score"
    reroute: bool = False
    tolerance: float = 0.0

    def __post_init__(self):
        if self.factor is not None:
            expert_capacity(1, 1, 1, self.factor, self.rule)
        adaptive_capacity(np.zeros(1), self.tolerance)
        limit_slots(np.zeros((0, 1)), np.zeros((0, 1)), 1, self.drop)

    def slots(self, counts, num_tokens: int, top_k: int) -> int:
        """The limit for a batch whose experts were asked for `counts` [E] times."""
        if self.factor is None:
            return adaptive_capacity(counts, self.tolerance)
        return expert_capacity(num_tokens, top_k, len(counts), self.factor, self.rule)


@contextmanager
def control_router(
    model,
    bias=None,
    update_rate: float = 0.0,
    update_every: int = 64,
    placement: Placement | None = None,
    capacity: Capacity | None = None,
):
    """Steer the routers of a qwen3_moe model while the block runs; yields a RouterControl with what happened.

    bias          [L, E], added to the logits for the choice of experts; their weights stay unbiased
                  (DeepSeek-V3, arXiv 2412.19437, section 2.1.2, which adds it to sigmoid scores)
    update_rate   online: bias += rate x sign(mean load - load), in logits, after `update_every` tokens or more
    placement     online: level the loads of its devices, not those of experts
    capacity      limit of slots per expert in each forward pass. It reads indices on the host
    With none of them the model's output is the same, bit for bit.
    Raises ValueError for other blocks than qwen3_moe's, whose routers are built otherwise.
    """
    layers = moe_layers(model)
    for layer in layers:
        if type(layer.block) is not Qwen3MoeSparseMoeBlock:
            raise ValueError(f"{layer.path}: {type(layer.block).__name__} is no qwen3_moe block, the only kind steered")
    shape = (len(layers), num_experts(layers[0].experts))
    if bias is not None and np.shape(bias) != shape:
        raise ValueError(f"the bias is {list(np.shape(bias))} [layers, experts], the model {list(shape)}")
    if placement is not None and placement.held.shape[::2] != shape:
        raise ValueError(f"the placement is for {list(placement.held.shape[::2])}, the model is {list(shape)}")
    if update_rate < 0 or update_every < 1:
        raise ValueError(f"update rate {update_rate} every {update_every} tokens: needs at least 0 and 1")
    steered = bias is not None or update_rate > 0
    bias = np.zeros(shape) if bias is None else np.asarray(bias)
    held = [None] * shape[0] if placement is None else placement.held
    routers = [_Router(b if steered else None, h, update_rate, update_every, capacity, shape[1])
               for b, h in zip(bias, held, strict=True)]  # fmt: skip
    try:
        for layer, router in zip(layers, routers, strict=True):
            layer.block.__class__ = SteeredBlock
            layer.block._router = router
        yield RouterControl(routers)
    finally:
        for layer in layers:
            layer.block.__class__ = Qwen3MoeSparseMoeBlock
            layer.block.__dict__.pop("_router", None)


class RouterControl:
    """What the controlled routers did: measured."""

    def __init__(self, routers: list[_Router]):
        self._routers = routers

    @property
    def bias(self) -> np.ndarray:
        """float [L, E], as it is now."""
        return np.stack([np.zeros(r.num_experts) if r.bias is None else np.array(r.bias) for r in self._routers])

    @property
    def loads(self) -> np.ndarray:
        """Slots [L, E] that experts served, dropped ones not counted."""
        return np.stack([np.array(router.served) for router in self._routers]).astype(np.int64)

    def shares(self) -> dict:
        """Of all slots: `dropped`, `rerouted` to another expert, and `changed` by the bias."""
        slots = max(sum(router.slots for router in self._routers), 1)
        names = ("dropped", "rerouted", "changed")
        return {name: sum(int(getattr(router, name)) for router in self._routers) / slots for name in names}


class SteeredBlock(Qwen3MoeSparseMoeBlock):
    """mlx-lm's block with a controlled choice of experts; its weights and attributes are those of the block."""

    def __call__(self, x):
        gates = mx.softmax(self.gate(x), axis=-1, precise=True)
        indices, kept = self._router.choose(gates, self.top_k)
        scores = mx.take_along_axis(gates, indices, axis=-1)
        if self.norm_topk_prob:
            scores /= mx.sum(scores, axis=-1, keepdims=True)
        if kept is not None:  # a dropped slot's weight is lost, not shared out (Megatron)
            scores = mx.where(kept, scores, 0)
        y = self.switch_mlp(x, indices)
        y = (y * scores[..., None]).sum(axis=-2).astype(y.dtype)
        if self.sharding_group is not None:
            y = mx.distributed.all_sum(y, group=self.sharding_group)
        return y


class _Router:
    """Choice and bookkeeping of one layer."""

    def __init__(self, bias, held, rate, every, capacity, num_experts):
        self.bias = None if bias is None else mx.array(bias, dtype=mx.float32)
        # [D, E], an expert's load shared by its copies; None: every expert is a device of its own
        self.share = None if held is None else mx.array(held / held.sum(axis=0), dtype=mx.float32)
        self.rate, self.every, self.capacity, self.num_experts = rate, every, capacity, num_experts
        self.asked, self.tokens = mx.zeros(num_experts), 0  # since the last update of the bias
        self.served = mx.zeros(num_experts, dtype=mx.int32)
        self.slots = self.dropped = self.rerouted = 0
        self.changed = mx.array(0)

    def choose(self, gates, k):
        """(indices [..., k], kept bool [..., k] or None) for gates [..., E]."""
        order = gates if self.bias is None else gates * mx.exp(self.bias).astype(gates.dtype)
        indices = mx.argpartition(order, kth=-k, axis=-1)[..., -k:]
        self.slots += indices.size
        if self.bias is not None:
            least = mx.topk(gates, k, axis=-1).min(axis=-1, keepdims=True)
            self.changed = self.changed + (mx.take_along_axis(gates, indices, axis=-1) < least).sum()
        if self.rate:
            self.learn(indices)
        tokens = indices.size // k
        if self.capacity is None or tokens == 1:
            self.served = self.served.at[indices.reshape(-1)].add(1)
            return indices, None
        flat, scores = np.array(indices).reshape(tokens, k), np.array(gates.astype(mx.float32)).reshape(tokens, -1)
        counts = np.bincount(flat.ravel(), minlength=self.num_experts)
        limit = self.capacity.slots(counts, tokens, k)
        experts, kept = limit_slots(flat, scores, limit, self.capacity.drop, self.capacity.reroute)
        self.dropped += int((~kept).sum())
        self.rerouted += int((kept & (experts != flat)).sum())
        self.served = self.served + mx.array(np.bincount(experts[kept], minlength=self.num_experts).astype(np.int32))
        experts = mx.array(experts.reshape(indices.shape).astype(np.uint32))
        return experts, None if kept.all() else mx.array(kept.reshape(indices.shape))

    def learn(self, indices):
        self.asked = self.asked.at[indices.reshape(-1)].add(1.0)
        self.tokens += indices.size // indices.shape[-1]
        if self.tokens < self.every:
            return
        load = self.asked if self.share is None else self.share @ self.asked
        step = self.rate * mx.sign(load.mean() - load)
        if self.share is not None:  # an expert moves as the devices that hold it
            step = (step[:, None] * self.share).sum(axis=0)
        self.bias = self.bias + step
        self.asked, self.tokens = mx.zeros(self.num_experts), 0
