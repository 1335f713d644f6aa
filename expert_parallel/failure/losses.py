"""Losses: devices that vanish from a sharded model between two forward passes, and what answers without them.

Dimensions: L MoE layers, E experts, k chosen per token, D devices, H hidden.

What is done about them: planned.py. What changes the answer is measured by benchmarks/lost_devices.py.
"""

from __future__ import annotations

import time
from functools import partial

import mlx.core as mx
import numpy as np

from ..layers import moe_layers, num_experts
from ..router.choice import by_logits, choosing_block, choosing_by
from ..trace import replaced
from ..trials import answer_to, far_from_a_sum
from .planned import DEFAULT, ON_FAILURE, parse_losses
from .survival import gone, repair, without

UNIT = 256.0  # what a slot answers when its weight is asked for: large, so that little is lost beside shared experts


def start_losses(args, model, checkpoint, dtype, prompt_tokens: int) -> Losses:
    """What --fail-device and --on-failure ask for.

    ValueError where the checkpoint's layout holds no single experts, or a block cannot be had to do without some.
    """
    on_failure, rows = args.on_failure or DEFAULT, partial(checkpoint.rows, dtype=dtype)
    if on_failure == "recover" and not checkpoint.reads_rows:
        raise ValueError(
            f"--on-failure recover: {checkpoint.folder} stores its experts in a layout that single ones cannot be read"
            " from; failover, reroute, drop, renormalise read none"
        )
    return Losses(model, parse_losses(args.fail_device), on_failure, rows, prompt_tokens)


def lose_devices(model, devices, on_failure: str = DEFAULT, rows=None) -> Losses:
    """Take devices from a sharded model, now and for good; see `Losses`."""
    return Losses(model, {0: list(devices)}, on_failure, rows)


class Losses:
    """Stands beside a running model, whose devices vanish as planned.

    losses = Losses(model, {0: [3], 16: [1, 2]}, "reroute")    # device 3 is gone already
    ... sampler=lambda logprobs: losses.between_passes(sample(logprobs))
    losses.changes   # [(tokens that went through the model before, held bool [L, D, E])], the first from 0 on
    losses.events    # what each loss was, and took

    planned        {tokens of the answer before it: devices}
    on_failure     see planned.py
    rows           (layer) -> source of its experts, see stores.py: for recover, as `Checkpoint.rows`
    prompt_tokens  that go through the model before the first one of the answer
    Raises ValueError where a block of this model cannot be had to do so, before anything is lost.
    """

    def __init__(self, model, planned, on_failure: str = DEFAULT, rows=None, prompt_tokens: int = 0):
        if on_failure not in ON_FAILURE or (on_failure == "recover" and rows is None):
            needs = "" if on_failure in ON_FAILURE else f" {', '.join(ON_FAILURE)};"
            raise ValueError(f"on_failure {on_failure!r}: needs{needs} to recover, rows of a checkpoint's experts")
        self.layers, self.planned, self.on_failure, self.rows = moe_layers(model), dict(planned), on_failure, rows
        self.events, self.sampled, self.prompt_tokens = [], 0, prompt_tokens
        self.changes, self._living = [(0, self._held())], []
        modules = dict(model.named_modules())
        for layer in self.layers:
            block, name = choosing_block(modules, layer)
            self._living.append(living := _Living(num_experts(layer.experts)))
            if on_failure == "reroute":
                by_logits(block, name)  # a trial: whether its choice can be answered
                block.__class__ = choosing_by(type(block), name, living)
            elif on_failure == "renormalise":
                check_sum(block, name)
                block.__class__ = making_up(type(block), name, living)
        self._as_planned()

    def _held(self) -> np.ndarray:
        return np.stack([layer.experts.held for layer in self.layers])

    def between_passes(self, token: mx.array) -> mx.array:
        """The token that was sampled; what is planned between its pass and the next happens."""
        self.sampled += 1
        self._as_planned()
        return token

    def _as_planned(self) -> None:
        if devices := self.planned.pop(self.sampled, None):
            self.lose(devices)

    def lose(self, devices) -> None:
        """These devices are gone now. ValueError where failover finds no copy."""
        before = self._held()
        after, missing = without(before, devices), gone(before, devices)
        if self.on_failure == "failover" and missing.any():
            raise ValueError(f"without {list(devices)} nobody holds {missing.sum()} experts: no copy takes over")
        # 1. Gone, with all that they held.
        for layer, living, of_layer in zip(self.layers, self._living, missing, strict=True):
            layer.experts.lose(devices)
            living.mask = mx.array(~of_layer)
        # 2. What that leaves without a holder may be read anew.
        repaired, pause = repair(before, devices), None
        if self.on_failure == "recover":
            began = time.perf_counter()
            for l, (layer, held) in enumerate(zip(self.layers, repaired, strict=True)):
                layer.experts.change(held, self.rows(l))
            pause = time.perf_counter() - began
        # 3. For the report.
        tokens = self.prompt_tokens + self.sampled - 1 if self.sampled else 0
        self.changes.append((tokens, repaired if self.on_failure == "recover" else after))
        about = {"devices": list(devices), "after_tokens": self.sampled, "before": before, "gone": missing}
        self.events.append({**about, "arrivals": repaired & ~after, "pause_seconds": pause})

    @property
    def rerouted(self) -> int:
        """Slots so far that went to another expert than the router's first choice."""
        return sum(int(living.changed) for living in self._living)


class _Living:
    """A chooser (router/choice.py) that takes living experts alone; mask bool [E]."""

    def __init__(self, count: int):
        self.num_experts, self.mask, self.changed = count, mx.ones(count, mx.bool_), mx.array(0)

    def ranked(self, scores):
        span = scores.max(axis=-1, keepdims=True) - scores.min(axis=-1, keepdims=True)
        return mx.where(self.mask, scores, scores - span - 1)  # lost ones in their order, where too few live

    def settled(self, scores, indices):
        least = mx.topk(scores, indices.shape[-1]).min(axis=-1, keepdims=True)
        self.changed = self.changed + (mx.take_along_axis(scores, indices, axis=-1) < least).sum()
        return indices

    def answer(self, experts, x, indices):
        return experts(x, indices)


# --- weights that make up for what is lost --------------------------------------------------------------------


def check_sum(block, name: str) -> None:
    """ValueError unless a block does no more than weigh its experts' answers and sum them, found by a trial."""
    nothing = answer_to(block, block, name)
    if nothing is None or far_from_a_sum(block, block, name, nothing):
        raise ValueError(f"{type(block).__name__} does more than weigh and sum: its weights cannot make up for a loss")


def making_up(block_class, name: str, living: _Living):
    """The block's class again, whose answer counts the living experts of a token with the weight of all of them."""

    def call(self, x, *more):
        y = block_class.__call__(self, x, *more)
        nothing, weights, chosen = weights_of(block_class, self, name, x, *more)
        alive = living.mask[chosen]
        kept = (weights * alive).sum(axis=-1, keepdims=True)
        scale = mx.where(alive.any(axis=-1, keepdims=True), weights.sum(axis=-1, keepdims=True) / kept, 1)
        return nothing + (y - nothing) * scale.astype(y.dtype)

    return type(block_class.__name__, (block_class,), {"__call__": call})


def weights_of(block_class, block, name: str, x, *more) -> tuple[mx.array, mx.array, mx.array]:
    """(answer without any expert [..., H], weight of each slot [..., k], the experts [..., k] chosen) for x [..., H].

    By asking the block itself, with experts of which the first answers (1, 0, 0, ...), the second (0, 1, 0, ...).
    """
    asked = []

    def units(x, indices):
        asked.append(indices)
        unit = UNIT * mx.eye(indices.shape[-1], x.shape[-1], dtype=x.dtype)
        return mx.broadcast_to(unit, (*indices.shape, x.shape[-1]))

    with replaced(block, {name: lambda x, indices: mx.zeros((*indices.shape, x.shape[-1]), x.dtype)}):
        nothing = block_class.__call__(block, x, *more)
    with replaced(block, {name: units}):
        marked = block_class.__call__(block, x, *more)
    k = asked[0].shape[-1]
    return nothing, ((marked - nothing)[..., :k] / UNIT).astype(mx.float32), asked[0]
