"""Layers: where a model of mlx-lm keeps its experts, and rows of their stacked weights.

Dimensions: L MoE layers, E experts, H hidden.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP


@dataclass
class MoELayer:
    """Where one MoE layer keeps its experts: attribute `name` of `owner`, at `path`.

    block  that routes to them: the owner, or one level above it what has mlx-lm's hook for a sum over ranks
    """

    path: str
    owner: nn.Module
    name: str
    block: nn.Module

    @property
    def experts(self) -> nn.Module:
        return getattr(self.owner, self.name)

    @experts.setter
    def experts(self, module):
        setattr(self.owner, self.name, module)

    @property
    def number(self) -> int:
        """Of the decoder layer, from its path."""
        return int(re.search(r"\.(\d+)\.", self.path).group(1))


class StandIn(nn.Module):
    """What stands in place of mlx-lm's experts; it answers for the attributes of the module that it replaces.

    holds_experts  True where it is what `moe_layers` is to find, not what it stands before
    """

    holds_experts = False

    def __init__(self, experts: nn.Module):
        super().__init__()
        self["experts"] = experts  # first of all: other attributes are looked for behind it

    def replaced_module(self) -> nn.Module:
        return self.experts

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return getattr(self.replaced_module(), name)


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model in the order of its forward pass.

    Raises ValueError for a dense model, for experts in a list, and where layers have different numbers of experts.
    """
    modules = dict(model.named_modules())
    paths = [
        path
        for path, m in modules.items()
        if isinstance(m, SwitchGLU | SwitchMLP) or getattr(m, "holds_experts", False)
    ]
    outer = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
    outer.sort(key=lambda path: [int(n) for n in re.findall(r"\d+", path)])
    layers = []
    for path in outer:
        at, _, name = path.rpartition(".")
        owner, above = modules[at], modules[at.rpartition(".")[0]]
        one_up = hasattr(above, "sharding_group") and not hasattr(owner, "sharding_group")
        layers.append(MoELayer(path, owner, name, above if one_up else owner))
    counts = sorted({num_experts(layer.experts) for layer in layers})
    if not layers:
        if listed := [path for path in modules if path.endswith(".experts.0")]:
            raise ValueError(f"this model has its experts in a list ({min(listed)}, ...), which is not supported")
        raise ValueError("this model has no Mixture-of-Experts layers: there is nothing to spread")
    if len(counts) > 1:
        raise ValueError(f"layers with different numbers of experts are not supported: {counts}")
    return layers


def moe_shape(model: nn.Module) -> tuple[int, int]:
    """(L, E)."""
    layers = moe_layers(model)
    return len(layers), num_experts(layers[0].experts)


def num_experts(experts: nn.Module) -> int:
    """E behind mlx-lm's module or what stands in its place."""
    if getattr(experts, "holds_experts", False):
        return experts.num_experts
    return next(m.num_experts for _, m in projections(experts))


def hidden_size(experts: nn.Module) -> int:
    """H: what the last projection puts out."""
    while isinstance(experts, StandIn):  # a recorder stands before what stands for mlx-lm's
        experts = experts.replaced_module()
    last = experts["down_proj"] if "down_proj" in experts else experts["fc2"]
    return (last if hasattr(last, "output_dims") else last.linear).output_dims  # an adapter keeps it one level down


def expert_tensors(experts: nn.Module) -> dict[str, mx.array]:
    """{"down_proj.weight": [E, ...]}: every tensor with a row for each expert, those of adapters among them."""
    return {
        f"{path}.{name}": array
        for path, projection in projections(experts)
        for name, array in tree_flatten(projection.parameters())
        if array.ndim and array.shape[0] == projection.num_experts
    }


def projections(experts: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of the outermost modules inside that have a row for each expert."""
    found = [(p, m) for p, m in experts.named_modules() if p and isinstance(getattr(m, "num_experts", None), int)]
    paths = tuple(f"{path}." for path, _ in found)
    return [(path, m) for path, m in found if not path.startswith(paths)]


def activation_type(tensors: dict[str, mx.array]) -> mx.Dtype:
    """dtype of these experts' activations: that of whatever is not packed."""
    return next((array.dtype for array in tensors.values() if mx.issubdtype(array.dtype, mx.floating)), mx.float32)


def cast(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    """As `dtype` where it is a floating-point array; None leaves all."""
    return array.astype(dtype) if dtype is not None and mx.issubdtype(array.dtype, mx.floating) else array


def with_tensors(experts: nn.Module, rows: dict[str, mx.array]) -> nn.Module:
    """mlx-lm's module again with other rows; all else is shared with the original."""
    module = twin(experts)
    module.update(tree_unflatten(list(rows.items())))
    for _, projection in projections(module):
        if "num_experts" in vars(projection):  # an adapter's own note of how many rows it has
            projection.num_experts = len(next(iter(rows.values())))
    return module


def twin(module):
    """A module tree again, sharing its arrays: what is put into it does not reach the original."""
    if isinstance(module, nn.Module):
        copy = type(module).__new__(type(module))
        copy.__dict__.update(module.__dict__)
        dict.update(copy, {name: twin(child) for name, child in module.items()})
        return copy
    if isinstance(module, list | tuple):
        return type(module)(map(twin, module))
    return {name: twin(child) for name, child in module.items()} if isinstance(module, dict) else module
