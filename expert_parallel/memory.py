"""Memory: bytes of a model, of each expert, and of what each device holds.

Dimensions: L MoE layers, E experts, D devices. All figures are bytes of arrays, as `nbytes` says:
nothing is evaluated, so a lazily built model of any size can be asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .moe import ExpertShard, SimulatedDevices, moe_layers, num_experts, switch_linears
from .placement import Placement


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
        """Bytes of experts that each device holds, int64 [D]; every copy counts."""
        expected = (len(self.expert_bytes), self.num_experts)
        if (placement.num_layers, placement.num_experts) != expected:
            raise ValueError(
                f"the placement is for {placement.num_layers} layers of {placement.num_experts} experts,"
                f" the model has {expected[0]} of {expected[1]}"
            )
        return np.einsum("lde,l->d", placement.held.astype(np.int64), self.expert_bytes)

    def per_device_with_rest(self, placement: Placement) -> np.ndarray:
        """As `per_device`, with everything else replicated on every device, int64 [D]."""
        return self.per_device(placement) + self.rest


def fullest_device_bytes(weighed: ModelBytes, num_devices: int, rest: int | None = None, redundant: int = 0) -> int:
    """Bytes of the device that holds most: experts and copies cut as evenly as they go, and the rest.

    rest       bytes of everything else on one device; None: replicated whole
    redundant  copies in each layer beyond one of each expert
    """
    slots = -(-(weighed.num_experts + redundant) // num_devices)
    if slots > weighed.num_experts or not 1 <= num_devices <= weighed.num_experts:
        raise ValueError(
            f"{weighed.num_experts} experts and {redundant} copies do not go on {num_devices} devices:"
            f" 1 to {weighed.num_experts} devices, and no device takes two copies of one expert"
        )
    return slots * int(weighed.expert_bytes.sum()) + (weighed.rest if rest is None else rest)


def fewest_devices(weighed: ModelBytes, device_bytes: float, besides: int = 0) -> int | None:
    """The smallest number of devices of a size that holds the model, the rest replicated; None if none does.

    besides  bytes that each device needs on top, e.g. for caches
    """
    for num_devices in range(1, weighed.num_experts + 1):
        if fullest_device_bytes(weighed, num_devices) + besides <= device_bytes:
            return num_devices
    return None


def model_bytes(model: nn.Module) -> ModelBytes:
    """Weigh a model that is lazily built, loaded, or already sharded (then `rest` is what is here).

    Raises ValueError for a dense model and for layers with different numbers of experts.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError("this model has no Mixture-of-Experts layers: it has no experts to weigh")
    counts = {num_experts(layer.experts) for layer in layers}
    if len(counts) > 1:
        raise ValueError(f"layers with different numbers of experts are not supported: {sorted(counts)}")
    held = [_expert_modules(layer.experts) for layer in layers]
    one = [_stacked_bytes(modules[0]) // num_experts(modules[0]) for modules in held]
    rest = array_bytes(model) - sum(_stacked_bytes(module) for modules in held for module in modules)
    return ModelBytes(np.array(one, dtype=np.int64), counts.pop(), rest)


def live_expert_bytes(model: nn.Module) -> np.ndarray:
    """Bytes of expert arrays that each device holds at this moment, int64 [D], from the arrays themselves.

    Simulated devices: all of them. A rank of several: its own, zero for the others (a sum over
    ranks completes the picture). A model that is not sharded: one device with everything.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError("this model has no Mixture-of-Experts layers: no device holds an expert")
    total = None
    for layer in layers:
        experts = layer.experts
        if isinstance(experts, SimulatedDevices):
            row = np.array([_stacked_bytes(shard.experts) for shard in experts.shards], dtype=np.int64)
        elif isinstance(experts, ExpertShard):
            row = np.zeros(len(experts._assignment.held), dtype=np.int64)
            row[experts.device] = _stacked_bytes(experts.experts)
        else:
            row = np.array([_stacked_bytes(experts)], dtype=np.int64)
        total = row if total is None else total + row
    return total


def cache_bytes(prompt_cache) -> int:
    """Bytes that mlx-lm's prompt cache (a list, one entry a layer) has allocated.

    Key-value caches grow in steps of 256 tokens, so this is at least what the tokens need.
    """
    return sum(entry.nbytes for entry in prompt_cache)


def _expert_modules(experts) -> list[nn.Module]:
    """mlx-lm's own modules behind one MoE layer: one where nothing is sharded, else one a shard."""
    if isinstance(experts, SimulatedDevices):
        return [shard.experts for shard in experts.shards]
    return [experts.experts if isinstance(experts, ExpertShard) else experts]


def _stacked_bytes(experts) -> int:
    return sum(array_bytes(linear) for _, linear in switch_linears(experts))
