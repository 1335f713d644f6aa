"""Cold experts at fewer bits: less memory for another answer, whose quality is to be measured.

Dimensions: L MoE layers, E experts, n slots, H hidden.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..layers import expert_tensors, moe_layers, projections, twin
from ..stores import InMemory, rows_of
from .store import in_order

GROUP = 64  # values that share a scale, where experts were not quantised before


class TwoKinds(nn.Module):
    """A device's experts of one layer, of which the cold ones have fewer bits: two stores that answer as one."""

    all_here = False  # under one module

    def __init__(self, hot: InMemory, cold: InMemory):
        super().__init__()
        self.hot, self.cold = hot, cold

    @property
    def experts(self) -> nn.Module:
        return self.hot.experts

    @property
    def ids(self) -> np.ndarray:
        return np.union1d(self.hot.ids, self.cold.ids)

    def modules_held(self) -> list[nn.Module]:
        return [*self.hot.modules_held(), *self.cold.modules_held()]

    def __call__(self, x: mx.array, tokens: np.ndarray, experts: np.ndarray) -> mx.array:
        is_cold = np.isin(experts, self.cold.ids)
        parts, places = [], []
        for store, at in ((self.hot, np.flatnonzero(~is_cold)), (self.cold, np.flatnonzero(is_cold))):
            if len(at):
                parts.append(store(x, tokens[at], experts[at]))
                places.append(at)
        return in_order(parts, places)


def compress_cold(model: nn.Module, loads: np.ndarray, share: float, bits: int) -> None:
    """Re-quantise the least used experts of every layer of a sharded model in memory, in place. Changes the answer.

    loads  [L, E], as `RoutingTrace.loads()`
    share  of each layer's experts, the least used, 0 to 1
    bits   2, 3, 4, ... in groups as they are, or of 64 where they were not quantised
    Raises ValueError where bits are not fewer than before, for loads of another shape and for experts on disk.
    """
    layers = moe_layers(model)
    if loads.shape != (len(layers), layers[0].experts.num_experts):
        raise ValueError(f"loads are of {list(loads.shape)} [layers, experts], not of this model's")
    for layer, load in zip(layers, loads, strict=True):
        coldest = np.argsort(load, kind="stable")[: round(share * len(load))]
        stores = layer.experts.stores
        for n, store in enumerate(stores):
            if type(store) is not InMemory:
                raise ValueError(f"{layer.path}: its experts are on disk or compressed already")
            cold, source = np.intersect1d(store.ids, coldest), _rows(store)
            hot = np.setdiff1d(store.ids, cold)
            if len(cold):
                few = at_bits(InMemory(store.experts, len(load), cold, source).experts, bits)
                few = InMemory(few, len(load), cold, lambda _, few=few: expert_tensors(few))  # its rows are the cold
                stores[n] = TwoKinds(InMemory(store.experts, len(load), hot, source), few) if len(hot) else few
                mx.eval(stores[n].parameters())
        layer.experts.change(layer.experts.held)  # what was noted of the stores before
    mx.clear_cache()


def _rows(store: InMemory):
    take = rows_of(store.experts)
    return lambda ids: take([store.row_of(expert) for expert in ids])


def at_bits(experts: nn.Module, bits: int) -> nn.Module:
    """mlx-lm's module of experts with all its projections at so many bits."""
    module = twin(experts)
    modules = dict(module.named_modules())
    for path, projection in projections(module):
        was = getattr(projection, "bits", None)
        if was is not None and (getattr(projection, "mode", "affine") != "affine" or was <= bits):
            kind = f"{was}-bit {getattr(projection, 'mode', 'affine')}"
            raise ValueError(f"{path} is {kind}: {bits} bits would save nothing, or cannot be had; take fewer")
        if was is None:
            few = projection.to_quantized(group_size=GROUP, bits=bits)
        else:
            few, how = twin(projection), {"group_size": projection.group_size}
            whole = mx.dequantize(projection.weight, projection.scales, projection.biases, bits=was, **how)
            few.weight, few.scales, few.biases = mx.quantize(whole, bits=bits, **how)
            few.bits = bits
        above, _, name = path.rpartition(".")
        setattr(modules[above], name, few)
    return module
