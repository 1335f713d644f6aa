"""Router control: load-aware choice and capacity limits in mlx-lm's own blocks.

Dimensions: T tokens of a batch, L MoE layers, E experts, k chosen per token, D devices.

    scores [T, E] -> choose k with the bias -> limit slots per expert -> mlx-lm weighs by the unbiased scores

Both change what the model says. Measure perplexity beside balance: benchmarks/quality_against_balance.py.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import mlx.core as mx
import numpy as np

from ..layers import moe_layers, moe_shape
from ..placement import Placement, contiguous
from ..trace import replaced
from .capacity import Capacity, limit_slots
from .choice import by_logits, choosing_block, choosing_by


@contextmanager
def control_router(
    model,
    bias=None,
    update_rate: float = 0.0,
    update_every: int = 64,
    placement: Placement | None = None,
    capacity: Capacity | None = None,
):
    """Steer the routers of a model while the block runs; yields a RouterControl with what happened.

    bias          [L, E], added to the logits for the choice of experts; their weights stay unbiased
                  (DeepSeek-V3, arXiv 2412.19437, section 2.1.2, which adds it to sigmoid scores)
    update_rate   online: bias += rate x sign(mean load - load), in logits, after `update_every` tokens or more
    placement     online: level the loads of its devices, not those of experts
    capacity      limit of slots per expert in each forward pass. It reads indices on the host
    With none of them the model's output is the same, bit for bit.
    Raises ValueError for shapes that do not fit, and for blocks whose choice cannot be seen (choice.py).
    """
    layers, modules, shape = moe_layers(model), dict(model.named_modules()), moe_shape(model)
    steered = bias is not None or update_rate > 0
    bias = np.zeros(shape) if bias is None else np.asarray(bias)
    held = (placement or contiguous(*shape, shape[1])).held  # without one every expert is a device of its own
    if bias.shape != shape or held.shape[::2] != shape:
        raise ValueError(f"the model is {shape} [layers, experts], bias {bias.shape}, placement {held.shape[::2]}")
    routers = []
    with ExitStack() as stack:
        for layer, own_bias, own_held in zip(layers, bias, held, strict=True):
            block, name = choosing_block(modules, layer)
            logits = by_logits(block, name)
            routers.append(
                _Router(logits, own_bias if steered else None, own_held, update_rate, update_every, capacity)
            )
            stack.enter_context(replaced(block, {"__class__": choosing_by(type(block), name, routers[-1])}))
        yield RouterControl(routers)


class RouterControl:
    """What the controlled routers did: measured."""

    def __init__(self, routers: list[_Router]):
        self._routers = routers

    @property
    def bias(self) -> np.ndarray:
        """float [L, E], as it is now."""
        return np.stack([np.array(router.bias) for router in self._routers])

    @property
    def loads(self) -> np.ndarray:
        """Slots [L, E] that experts served, dropped ones not counted."""
        return np.stack([np.array(router.loads) for router in self._routers]).astype(np.int64)

    def shares(self) -> dict:
        """Of all slots: `dropped`, `rerouted` to another expert, and `changed` by the bias."""
        slots = sum(router.slots for router in self._routers)
        names = ("dropped", "rerouted", "changed")
        counts = {name: sum(int(getattr(router, name)) for router in self._routers) for name in names}
        return {name: count / slots if slots else 0.0 for name, count in counts.items()}


class _Router:
    """Choice and bookkeeping of one layer, a chooser; bias [E] or None, held [D, E]."""

    def __init__(self, logits, bias, held, rate, every, capacity):
        self.num_experts, self.logits, self.steered = held.shape[1], logits, bias is not None
        self.bias = mx.array(bias, mx.float32) if self.steered else mx.zeros(self.num_experts)
        self.share = mx.array(held / held.sum(axis=0), mx.float32)  # an expert's load is shared by its replicas
        self.rate, self.every, self.capacity = rate, every, capacity
        self.asked, self.tokens = mx.zeros(self.num_experts), 0  # since the last update of the bias
        self.loads, self.slots = mx.zeros(self.num_experts, mx.int32), 0
        self.changed, self.dropped, self.rerouted = mx.array(0), 0, 0
        self.kept = None  # bool [..., k] of the call under way; None: every slot

    def ranked(self, scores):
        if not self.steered:
            return scores
        return (
            scores + self.bias.astype(scores.dtype) if self.logits else scores * mx.exp(self.bias).astype(scores.dtype)
        )

    def settled(self, scores, indices):
        self.slots, self.kept = self.slots + indices.size, None
        k = indices.shape[-1]
        tokens = indices.size // k
        if self.steered:
            least = mx.topk(scores, k).min(axis=-1, keepdims=True)
            self.changed = self.changed + (mx.take_along_axis(scores, indices, axis=-1) < least).sum()
        if self.rate:
            self.learn(indices, tokens)
        if self.capacity and tokens > 1:
            indices = self.limited(mx.softmax(scores, axis=-1) if self.logits else scores, indices, tokens)
        served = mx.array(1) if self.kept is None else self.kept.reshape(-1)
        self.loads = self.loads.at[indices.reshape(-1)].add(served.astype(mx.int32))
        return indices

    def learn(self, indices, tokens):
        self.asked, self.tokens = self.asked.at[indices.reshape(-1)].add(1.0), self.tokens + tokens
        if self.tokens >= self.every:
            load = self.share @ self.asked
            step = self.rate * mx.sign(load.mean() - load)
            self.bias = self.bias + step @ self.share  # an expert moves as the devices that hold it
            self.asked, self.tokens = mx.zeros(self.num_experts), 0

    def limited(self, gates, indices, tokens):
        flat, gates = np.array(indices).reshape(tokens, -1), np.array(gates.astype(mx.float32)).reshape(tokens, -1)
        limit = self.capacity.slots(np.bincount(flat.ravel(), minlength=self.num_experts), *flat.shape)
        experts, kept = limit_slots(flat, gates, limit, self.capacity.drop, self.capacity.reroute)
        self.dropped += int((~kept).sum())
        self.rerouted += int((kept & (experts != flat)).sum())
        self.kept = None if kept.all() else mx.array(kept.reshape(indices.shape))
        return mx.array(experts.reshape(indices.shape).astype(np.uint32))

    def answer(self, experts, x, indices):
        y = experts(x, indices)  # a dropped slot's weight is lost, not shared out (Megatron)
        return y if self.kept is None else mx.where(self.kept.reshape(indices.shape)[..., None], y, 0)
