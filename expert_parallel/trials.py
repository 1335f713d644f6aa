"""Trials: what no rule over names can tell, found by asking the modules themselves with random tokens.

Dimensions: k experts chosen per token, E experts, H hidden.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .layers import MoELayer, StandIn, activation_type, expert_tensors, hidden_size
from .trace import replaced

FAR_FROM_A_SUM = 0.02  # of an answer: far beyond rounding


def prove(path: str, whole: nn.Module, sharded) -> None:
    """ValueError unless the stores that are here answer as the whole layer, for random tokens over all experts."""
    count = sharded.num_experts
    k = min(count, 8)
    ids = np.resize(np.random.default_rng(0).permutation(count), (-(-count // k), k))
    x = mx.random.normal((len(ids), hidden_size(whole)), key=mx.random.key(0))
    x = x.astype(activation_type(expert_tensors(whole)))
    try:
        expected, got = whole(x, mx.array(ids)), sharded(x, mx.array(ids))
        mx.eval(expected, got)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path}: experts of {x.dtype} cannot be computed here ({error}): call model.set_dtype(mx.float32) first"
        ) from None
    sharded.slots_served[:] = 0
    mine = mx.array(np.isin(sharded.serving.devices(ids), sharded.devices))[..., None]
    # Away from the CPU a kernel is chosen by the number of experts, and may round otherwise.
    off = 0 if mx.default_device().type == mx.cpu else 1e-2
    if not mx.allclose(got, mx.where(mine, expected, 0), rtol=off, atol=off / 10, equal_nan=True).item():
        raise ValueError(f"{path}: its experts answer otherwise when they are spread; this kind is not supported")


class Dummy(StandIn):
    """In place of experts: random numbers as their outputs, those of several seeds summed; without any, zeros."""

    def __init__(self, experts: nn.Module, *seeds: int):
        super().__init__(experts)
        self._keys = [mx.random.key(seed) for seed in seeds]

    def __call__(self, x, indices):
        y = mx.zeros((*indices.shape, x.shape[-1]), x.dtype)
        return sum((100 * mx.random.normal(y.shape, y.dtype, key=key) for key in self._keys), y)


def answer_to(block, owner, name: str, *seeds: int) -> np.ndarray | None:
    """What a block makes of two tokens when its experts, `name` of `owner`, answer as a `Dummy` of these seeds.

    None where it cannot be asked.
    """
    experts = getattr(owner, name)
    x = mx.random.normal((1, 2, hidden_size(experts)), key=mx.random.key(0))
    try:
        with replaced(owner, {name: Dummy(experts, *seeds)}):
            return np.array(block(x).astype(mx.float32))
    except Exception:  # blocks that want more than their tokens
        return None


def far_from_a_sum(block, owner, name: str, nothing: np.ndarray) -> bool:
    """Whether a block's answer to the sum of two outputs is another than the sum of its answers; nothing: to none."""
    one, other, both = (answer_to(block, owner, name, *seeds) for seeds in ((1,), (2,), (1, 2)))
    off = np.abs(one + other - nothing - both).max() / np.abs(both - nothing).max()
    return not off < FAR_FROM_A_SUM


def why_not_reduce(layer: MoELayer) -> str | None:
    """What keeps ranks from summing a block's answers instead of its slots, None where nothing does: by trial.

    When its experts answer zero so must the block (what else it adds, shared experts for example, would be summed once
    per rank), and the sum of two outputs must give the sum of two answers.
    """
    where = layer.block, layer.owner, layer.name
    nothing = answer_to(*where)
    if nothing is None:
        return "it cannot be asked without the rest of its model"
    if nothing.any():
        return "it adds something that every rank has whole"
    return "it does more than weigh and sum" if far_from_a_sum(*where, nothing) else None


def sum_answers(block: nn.Module, group) -> None:
    """From now on a block's answers are summed over ranks: by mlx-lm's hook `sharding_group`, or as by one."""
    if not hasattr(block, "sharding_group"):
        kind = type(block)
        summed = lambda self, x: mx.distributed.all_sum(kind.__call__(self, x), group=self.sharding_group)  # noqa: E731
        block.__class__ = type(kind.__name__, (kind,), {"__call__": summed})
    block.sharding_group = group
