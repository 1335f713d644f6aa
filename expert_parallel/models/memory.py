"""Memory: bytes of a model, of each expert, and of what each device holds.

Dimensions: L MoE layers, E experts, D devices. All figures are bytes of arrays, as `nbytes` says: nothing is
evaluated, so a lazily built model of any size can be asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..experts import ShardedExperts
from ..layers import expert_tensors, moe_layers, num_experts
from ..placement import Placement


def array_bytes(tree) -> int:
    """Bytes of all arrays in a module's parameters or any tree of arrays."""
    tree = tree.parameters() if isinstance(tree, nn.Module) else tree
    return sum(leaf.nbytes for _, leaf in tree_flatten(tree) if isinstance(leaf, mx.array))


@dataclass(frozen=True, eq=False)
class ModelBytes:
    """What a model weighs with every expert counted once, however it is spread now.

    expert_bytes  int64 [L]; bytes of one expert in each MoE layer
    num_experts   E
    rest          bytes of everything else: attention, routers, shared experts, embeddings, head
    """

    expert_bytes: np.ndarray
    num_experts: int
    rest: int

    @property
    def experts(self) -> int:
        """All experts of all layers."""
        return int(self.expert_bytes.sum()) * self.num_experts

    @property
    def total(self) -> int:
        return self.experts + self.rest

    def per_device(self, placement: Placement) -> np.ndarray:
        """Bytes of experts that each device holds, int64 [D]; every replica counts."""
        return np.einsum("lde,l->d", placement.held.astype(np.int64), self.expert_bytes)


def model_bytes(model: nn.Module) -> ModelBytes:
    """Weigh a model that is lazily built, loaded, or already sharded (then `rest` is what is here)."""
    layers = moe_layers(model)
    held = [[expert_tensors(module) for module in _modules_of(layer.experts)] for layer in layers]
    one = [sum(array.nbytes // len(array) for array in each[0].values()) for each in held]
    experts = sum(array.nbytes for each in held for tensors in each for array in tensors.values())
    return ModelBytes(np.array(one, dtype=np.int64), num_experts(layers[0].experts), array_bytes(model) - experts)


def live_expert_bytes(model: nn.Module) -> np.ndarray:
    """Bytes of expert arrays that each device holds at this moment, int64 [D], from the arrays themselves.

    Simulated devices: all of them. A rank of several: its own, zero for the others (a sum over ranks completes the
    picture). A model that is not sharded: one device with everything.
    """
    total = 0
    for layer in moe_layers(model):
        experts = layer.experts
        sharded = isinstance(experts, ShardedExperts)
        row = np.zeros(len(experts.held) if sharded else 1, dtype=np.int64)
        here = list(experts.devices) if sharded else [0]
        row[here] = [sum(a.nbytes for a in expert_tensors(module).values()) for module in _modules_of(experts)]
        total = total + row
    return total


def _modules_of(experts) -> list[nn.Module]:
    """mlx-lm's own modules behind one MoE layer: one where nothing is sharded, else one a store."""
    return [store.experts for store in experts.stores] if isinstance(experts, ShardedExperts) else [experts]
