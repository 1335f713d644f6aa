"""Memory: bytes of a model, of each expert, and of what each device holds.

Dimensions: L MoE layers, E experts, D devices. All figures are bytes of arrays, as `nbytes` says: nothing is
evaluated, so a lazily built model of any size can be asked.
"""

from __future__ import annotations

from collections import Counter, defaultdict
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
    held = [[expert_tensors(module) for each in _modules_of(layer.experts) for module in each] for layer in layers]
    one = [sum(array.nbytes // len(array) for array in each[0].values()) for each in held]
    experts = sum(array.nbytes for each in held for tensors in each for array in tensors.values())
    return ModelBytes(np.array(one), num_experts(layers[0].experts), array_bytes(model) - experts)


def live_expert_bytes(model: nn.Module) -> np.ndarray:
    """Bytes of expert arrays that each device holds at this moment, int64 [D], from the arrays themselves.

    Simulated devices: all of them. A rank of several: its own, zero for the others (a sum over ranks completes the
    picture). A model that is not sharded: one device with everything.
    """
    total = 0
    for layer in moe_layers(model):
        experts = layer.experts
        sharded = isinstance(experts, ShardedExperts)
        row = np.zeros(len(experts.held) if sharded else 1, np.int64)
        here = list(experts.devices) if sharded else [0]
        row[here] = [sum(a.nbytes for m in each for a in expert_tensors(m).values()) for each in _modules_of(experts)]
        total = total + row
    return total


def stored_as(model: nn.Module) -> str:
    """In words, most bytes first: "experts 4-bit in groups of 64, the rest also 8-bit (gate), float32".

    By the modules themselves: a checkpoint's default says nothing of those that have bits of their own.
    """
    inside = tuple(f"{layer.path}." for layer in moe_layers(model))
    kinds, names = {True: Counter(), False: Counter()}, defaultdict(set)
    for path, kind, num_bytes in _stored(model):
        kinds[f"{path}.".startswith(inside)][kind] += num_bytes
        names[kind].add(path.rpartition(".")[2])
    experts, rest = ([kind for kind, _ in each.most_common()] for each in kinds.values())

    groups = f" in groups of {experts[0].rpartition(' ')[2]}"  # said once

    def in_words(kind):
        if kind == experts[0]:
            return kind
        few = sorted(names[kind]) if "-bit" in kind and len(names[kind]) <= 2 else []
        return kind.removesuffix(groups) + (f" ({' and '.join(few)})" if few else "")

    others = [kind for kind in rest if kind not in experts]
    said = ", ".join(map(in_words, experts))
    also = "" if len(others) == len(rest) else "also "
    return f"experts {said}, the rest {also}{', '.join(map(in_words, others))}" if others else said


def _stored(model):
    """(path, kind, bytes) of every packed module, and of every array in the others."""
    for path, module in model.named_modules():
        if "scales" in module:
            kind = f"{module.bits}-bit {getattr(module, 'mode', 'affine')} in groups of {module.group_size}"
            yield path, kind.replace(" affine", ""), array_bytes(module)
        else:
            arrays = {name: array for name, array in module.items() if isinstance(array, mx.array)}
            yield from ((path, dtype_name(a), a.nbytes) for name, a in arrays.items() if not name.startswith("_"))


def dtype_name(array: mx.array) -> str:
    return str(array.dtype).rpartition(".")[2]


def _modules_of(experts) -> list[list[nn.Module]]:
    """mlx-lm's own modules behind one MoE layer: one where nothing is sharded, else those of each store."""
    return [store.modules_held() for store in experts.stores] if isinstance(experts, ShardedExperts) else [[experts]]
