"""Hybrid: experts parallel, all the rest sharded by mlx-lm's own tensor parallelism.

Dimensions: N ranks, H hidden, V vocabulary.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from ..layers import MoELayer, expert_tensors
from ..stores import picked


def shard_rest(model: nn.Module, layers: list[MoELayer], group) -> None:
    """Shard attention, dense layers, shared experts and head, in place, with stand-ins where experts were.

    Raises ValueError where mlx-lm cannot.
    """
    n = group.size()
    if not hasattr(model, "shard"):
        raise ValueError("mlx-lm cannot shard the attention of this architecture; use --attention replicated")
    for path, module in model.named_modules():
        for name in ("n_heads", "num_heads", "n_kv_heads", "num_key_value_heads"):
            heads = getattr(module, name, n)
            if isinstance(heads, int) and heads % n:
                raise ValueError(
                    f"{path} has {heads} heads ({name}), which do not divide over {n} ranks; use --attention replicated"
                )
    for layer in layers:
        kind = SwitchMLP if isinstance(layer.experts, SwitchMLP) else SwitchGLU
        layer.experts = kind(n, n, 1, bias=any(name.endswith("bias") for name in expert_tensors(layer.experts)))
    try:
        model.shard(group)
    except Exception as error:  # each architecture stumbles over other sizes in its own way
        raise ValueError(f"mlx-lm cannot shard the attention over {n} ranks: {error}") from None
    split_head(model, group)


def split_head(model: nn.Module, group) -> bool:
    """Whether the output head is a plain product of its own, which is then split over ranks in place."""
    head = getattr(model, "lm_head", None)
    if plain := isinstance(head, nn.Linear | nn.QuantizedLinear) and "bias" not in head:
        model.lm_head = ShardedHead(head, group)
    return plain


class ShardedHead(nn.Module):
    """Rows of the output head, V / N on each rank, the last rank's filled up; logits are gathered whole.

    Each logit is computed as in the whole head, so this changes no bit.
    """

    def __init__(self, head: nn.Module, group):
        super().__init__()
        self._group, self._vocabulary = group, head.weight.shape[0]
        self._share = -(-self._vocabulary // group.size())
        self.part, first = head, group.rank() * self._share
        head.update(picked(head.parameters(), np.arange(first, min(first + self._share, self._vocabulary))))

    def __call__(self, x: mx.array) -> mx.array:
        y = self.part(x)
        if y.shape[-1] < self._share:
            y = mx.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, self._share - y.shape[-1])])
        parts = mx.distributed.all_gather(y[None], group=self._group)  # [N, ..., V / N]
        whole = mx.moveaxis(parts, 0, -2).reshape(*y.shape[:-1], -1)
        return whole[..., : self._vocabulary]
