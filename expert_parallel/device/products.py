"""Products of linear layers and of experts in less time, each sum still added in the same order.

MLX's CPU kernels for packed weights go through the tokens one by one and add up each output's products one after the
other. Two ways around that leave the order of every sum, and so every bit, as it is:

    split     parts of a weight's rows on streams, which have a thread each; no copy of a weight
    together  dense rows times tokens as columns: the sums of many tokens grow side by side in vector registers.
              Unpacking the rows costs as much as ten tokens or so

Dimensions: T tokens, K inputs, O outputs (rows of a weight), S slots in the order of their experts.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.layers.distributed import (
    AllToShardedLinear,
    QuantizedAllToShardedLinear,
    QuantizedShardedToAllLinear,
    ShardedToAllLinear,
)
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from ..layers import twin
from .lanes import Lanes

DENSE = 2**19  # numbers of a weight that are dense at a time: a core's cache has them while they are used


@dataclass(frozen=True)
class Plan:
    """From how many tokens on a product goes which way; inf: never. `dtype` of the activations it was tried with."""

    split_from: float
    together_from: float
    dtype: mx.Dtype


def dense(module: nn.Module, at) -> mx.array:
    """Weights [..., K] at this place of axis 0, unpacked where they are packed."""
    weight, biases = module["weight"][at], module.get("biases")
    if "scales" not in module:
        return weight
    biases = None if biases is None else biases[at]
    packing = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    return mx.dequantize(weight, module["scales"][at], biases, **packing)


def together(
    module: nn.Module, at: slice, columns: mx.array, *expert: int, lanes: Lanes | None = None
) -> list[mx.array]:
    """Outputs [O, T] of these rows, of an expert's where there are several, for tokens as columns [K, T], in pieces.

    lanes  by turns, piece by piece: mlx has few tasks under way and starts them in the order of a result's parts
    """
    outputs = []
    for n, piece in enumerate(pieces(module, at, lanes.count if lanes else 1)):
        with lanes(n) if lanes else nullcontext():
            y = dense(module, (*expert, piece)) @ columns
            outputs.append(y + module["bias"][(*expert, piece)][:, None] if "bias" in module else y)
    return outputs


def pieces(module: nn.Module, at: slice, least: int = 1) -> list[slice]:
    """Ranges of these rows that are dense at a time, as equal as can be: a few might be added up another way."""
    count, most = at.stop - at.start, max(1, DENSE // inputs(module))
    parts = equal_parts(count, max(least, -(-count // most)))
    return [slice(at.start + part.start, at.start + part.stop) for part in parts]


def inputs(module: nn.Module) -> int:
    """K."""
    K = module["weight"].shape[-1]
    return K * 32 // module.bits if "scales" in module else K


def rows(module: nn.Module, at: slice):
    """These rows of a linear layer, or of an embedding that is the head, as a product; they share its memory."""
    part = twin(module)
    part.__class__ = next(plain for kind, plain in PLAIN.items() if isinstance(module, kind))
    part.update({name: array[at] for name, array in module.items() if isinstance(array, mx.array)})
    return part.as_linear if hasattr(part, "as_linear") else part


def equal_parts(count: int, parts: int) -> list[slice]:
    """Ranges of `count` rows, none of them empty: mlx divides by the rows of a product."""
    parts = min(parts, count)
    return [slice(count * n // parts, count * (n + 1) // parts) for n in range(parts)]


def split(parts: list, lanes: Lanes, x: mx.array) -> mx.array:
    """[..., O]: outputs of parts of a layer's rows, each in a lane of its own."""
    outputs = []
    for n, part in enumerate(parts):
        with lanes(n):
            outputs.append(part(x))
    return mx.concatenate(outputs, axis=-1)


class Product:
    """How a linear layer computes by a plan, in parts of its rows, one for each lane."""

    def __init__(self, plan: Plan, lanes: Lanes):
        self.plan, self.lanes, self.arrays = plan, lanes, []

    def __deepcopy__(self, memo):  # of a model: the copy's layer has arrays of its own
        return Product(self.plan, self.lanes)

    def __call__(self, module: nn.Module, x: mx.array, stock) -> mx.array:
        """stock  (module, x) -> what it would be without a plan"""
        tokens = x.size // x.shape[-1]
        at_once = tokens >= self.plan.together_from and x.dtype == self.plan.dtype
        side_by_side = tokens >= self.plan.split_from
        if not at_once and not side_by_side:
            return stock(module, x)
        if not at_once:
            self._follow(module)
            return split(self.parts, self.lanes, x)
        columns, every = mx.contiguous(x.reshape(-1, x.shape[-1]).T), slice(0, len(module["weight"]))
        outputs = together(module, every, columns, lanes=self.lanes if side_by_side else None)
        return mx.contiguous(mx.concatenate(outputs).T).reshape(*x.shape[:-1], -1)

    def _follow(self, module):
        """Cut the rows anew where the layer has other arrays than it had."""
        arrays = [array for array in module.values() if isinstance(array, mx.array)]
        if len(arrays) != len(self.arrays) or any(a is not b for a, b in zip(arrays, self.arrays, strict=True)):
            places = equal_parts(len(module["weight"]), self.lanes.count)
            self.arrays, self.parts = arrays, [rows(module, at) for at in places]


class ProductOfExperts:
    """How the stacked weights of many experts compute by a plan: an expert with enough slots takes them together."""

    def __init__(self, plan: Plan):
        self.plan = plan

    def __deepcopy__(self, memo):
        return self

    def __call__(self, module: nn.Module, x: mx.array, indices: mx.array, stock) -> mx.array:
        """x [S, 1, K] in the order of indices [S], as mlx-lm sorts them from 64 slots on -> [S, 1, O].

        stock  (module, x, indices, sorted_indices) -> what it would be without a plan
        """
        if len(x) < self.plan.together_from or x.dtype != self.plan.dtype:
            return stock(module, x, indices, True)
        experts = np.array(indices)
        cuts = [0, *(np.flatnonzero(np.diff(experts)) + 1).tolist(), len(experts)]
        parts, done, every = [], 0, slice(0, module["weight"].shape[1])
        for begin, end in zip(cuts, cuts[1:], strict=False):
            if end - begin >= self.plan.together_from:
                if done < begin:
                    parts.append(stock(module, x[done:begin], indices[done:begin], True)[:, 0])
                columns = mx.contiguous(x[begin:end, 0].T)
                parts.append(mx.concatenate(together(module, every, columns, int(experts[begin]))).T)
                done = end
        if done < len(experts):
            parts.append(stock(module, x[done:], indices[done:], True)[:, 0])
        return mx.contiguous(mx.concatenate(parts))[:, None]


# mlx's layers that compute by a product: their class is changed, so that every name and parameter stays.


def _quick(kind, way, method: str = "__call__"):
    """A class of layers as `kind`, of which `method` is way(what `kind` does)."""
    return type(kind.__name__, (kind,), {method: way(getattr(kind, method))})


def _of_a_row(stock):
    return lambda layer, x: layer._product(layer, x, stock)


def _of_a_share(stock):
    """Of a layer that mlx has sharded by its inputs, and sums over ranks itself."""

    def answer(layer, x):
        y = layer._product(layer, x, lambda layer, x: None) if "bias" not in layer else None
        return stock(layer, x) if y is None else mx.distributed.all_sum(y, group=layer.group)

    return answer


def _of_a_stack(stock):
    def answer(layer, x, indices, sorted_indices=False):
        return layer._product(layer, x, indices, stock) if sorted_indices else stock(layer, x, indices)

    return answer


SUMMED = (ShardedToAllLinear, QuantizedShardedToAllLinear)
LINEAR = {kind: _quick(kind, _of_a_row) for kind in (nn.Linear, nn.QuantizedLinear)}
LINEAR |= {kind: _quick(kind, _of_a_row) for kind in (AllToShardedLinear, QuantizedAllToShardedLinear)}
LINEAR |= {kind: _quick(kind, _of_a_share) for kind in SUMMED}
HEAD = {kind: _quick(kind, _of_a_row, "as_linear") for kind in (nn.Embedding, nn.QuantizedEmbedding)}  # if it is one
EXPERTS = {kind: _quick(kind, _of_a_stack) for kind in (SwitchLinear, QuantizedSwitchLinear)}
PLAIN = {kind: kind for kind in (nn.Linear, nn.QuantizedLinear, *HEAD)}  # what computes rows of it, without a sum
PLAIN |= dict.fromkeys((AllToShardedLinear, ShardedToAllLinear), nn.Linear)
PLAIN |= dict.fromkeys((QuantizedAllToShardedLinear, QuantizedShardedToAllLinear), nn.QuantizedLinear)
