"""Expert shards: mlx-lm's MoE blocks with their experts spread over devices.

Dimensions: T tokens, k experts chosen per token, S = T k slots, E experts, D devices,
H hidden.

    mlx-lm's block:   route -> switch_mlp(x [..., H], indices [..., k]) -> [..., k, H] -> weigh, sum
    replaced:                  ^^^^^^^^^^
    ExpertShard       the outputs of the slots that this device serves, zeros elsewhere
    SimulatedDevices  D shards in one process: the sum of their outputs, slot by slot
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, SwitchMLP

from .placement import Placement
from .slots import SlotAssignment

# --- finding the MoE layers of any mlx-lm model --------------------------------------------


@dataclass
class MoELayer:
    """Where a model keeps the experts of one MoE layer."""

    path: str  # of the experts, e.g. model.layers.3.mlp.switch_mlp
    block: nn.Module  # the block that routes and calls them
    name: str  # attribute of the block, e.g. switch_mlp

    @property
    def experts(self) -> nn.Module:
        return getattr(self.block, self.name)

    @experts.setter
    def experts(self, module):
        setattr(self.block, self.name, module)

    @property
    def number(self) -> int:
        """Number of the decoder layer, from its path."""
        return int(re.search(r"\.(\d+)\.", self.path).group(1))


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model in the order of its forward pass; [] for a dense model."""
    kinds = (SwitchGLU, SwitchMLP, ExpertShard, SimulatedDevices)
    modules = dict(model.named_modules())
    paths = [path for path, module in modules.items() if isinstance(module, kinds)]
    outer = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
    outer.sort(key=lambda path: [int(n) for n in re.findall(r"\d+", path)])
    return [MoELayer(path, modules[path.rpartition(".")[0]], path.rpartition(".")[2]) for path in outer]


def num_experts(experts: nn.Module) -> int:
    """Number of experts behind a SwitchGLU, SwitchMLP, ExpertShard or SimulatedDevices."""
    if isinstance(experts, (ExpertShard, SimulatedDevices)):
        return experts.num_experts
    return next(m for _, m in switch_linears(experts)).weight.shape[0]


def switch_linears(experts: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the stacked projections: gate_proj, up_proj, down_proj or fc1, fc2."""
    kinds = (SwitchLinear, QuantizedSwitchLinear)
    return [(name, m) for name, m in experts.named_modules() if isinstance(m, kinds)]


# --- what differs by device ----------------------------------------------------------------


def slot_selection(num_slots: int, device: mx.Device | None = None) -> str:
    """How a shard skips the slots of others: the one place where this is decided.

    compact  the slot list is read on the host and only local slots are computed
    masked   every slot is computed with some local expert, foreign ones are zeroed: static
             shapes and no stop of the GPU's pipeline, worth it for a few slots
    """
    device = device or mx.default_device()
    return "compact" if device.type == mx.cpu or num_slots >= 512 else "masked"


# --- a device's experts ---------------------------------------------------------------------


def take_experts(experts: nn.Module, rows: list[int]) -> nn.Module:
    """A module like `experts` that holds only these rows of every stacked tensor, in memory of its own.

    A slice of the leading axis would be a view that keeps the whole tensor alive.
    """
    shard = _same_kind(experts)
    for name, linear in switch_linears(experts):
        target = dict(shard.named_modules())[name]
        target.update({k: mx.take(v, mx.array(rows), axis=0) for k, v in linear.parameters().items()})
    mx.eval(shard.parameters())
    return shard


def _same_kind(experts):
    """The module again, its children too, sharing every array: ready for other weights."""
    copy = type(experts).__new__(type(experts))
    copy.__dict__.update(experts.__dict__)
    dict.update(copy, {k: _same_kind(v) if isinstance(v, nn.Module) else v for k, v in experts.items()})
    return copy


class ExpertShard(nn.Module):
    """The experts of one MoE layer that one device holds.

    experts  mlx-lm's own module (SwitchGLU, SwitchMLP) with the weights of `held[device]` alone
    held     bool [D, E], who holds what in this layer
    device   which row of `held` this is

    (x [..., H], indices [..., k]) -> [..., k, H]: outputs of the slots this device serves,
    zeros elsewhere. The sum over all devices is what the whole layer would have answered.
    """

    def __init__(self, experts: nn.Module, held: np.ndarray, device: int):
        super().__init__()
        self.experts = experts
        self._device = device
        self._gather_group = None  # set where slot outputs, not weighted sums, are summed over ranks
        self.slots_served = 0
        self._assignment = SlotAssignment(held)
        self._local = np.full(held.shape[1], -1, dtype=np.int32)
        ids = np.flatnonzero(held[device])
        self._local[ids] = np.arange(len(ids))
        rows = num_experts(experts)
        if rows != len(ids):
            raise ValueError(f"device {device} is to hold {len(ids)} experts, its weights have {rows}")

    @classmethod
    def cut(cls, experts: nn.Module, held: np.ndarray, device: int) -> ExpertShard:
        """The shard of a whole layer's experts, copied out of it."""
        return cls(take_experts(experts, np.flatnonzero(held[device]).tolist()), held, device)

    @property
    def num_experts(self) -> int:
        """E, over all devices."""
        return len(self._local)

    @property
    def device(self) -> int:
        return self._device

    @property
    def expert_ids(self) -> list[int]:
        return np.flatnonzero(self._local >= 0).tolist()

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        compute = self.masked if slot_selection(indices.size) == "masked" else self.compact
        y = compute(x, indices)
        return y if self._gather_group is None else mx.distributed.all_sum(y, group=self._gather_group)

    def compact(self, x: mx.array, indices: mx.array) -> mx.array:
        """As __call__ without a group: reads the indices on the host and computes its own slots alone."""
        ids = np.array(indices)
        slots = np.flatnonzero(self._assignment.devices(ids).reshape(-1) == self._device)
        y = self.rows(x, ids, slots)
        if len(slots) == ids.size:
            return y.reshape(*indices.shape, -1)
        # A row of zeros behind the computed ones stands for every foreign slot.
        at = np.full(ids.size, len(slots), dtype=np.int32)
        at[slots] = np.arange(len(slots))
        y = mx.concatenate([y, mx.zeros((1, y.shape[-1]), y.dtype)])
        return y[mx.array(at)].reshape(*indices.shape, -1)

    def rows(self, x: mx.array, ids: np.ndarray, slots: np.ndarray) -> mx.array:
        """Outputs [n, H] of n slots, given as positions in `ids` [..., k] read flat; each must be held here."""
        x = x.reshape(-1, x.shape[-1])
        if len(slots) == 0:
            return mx.zeros((0, x.shape[-1]), x.dtype)
        self.slots_served += len(slots)
        local = self._local[ids.reshape(-1)[slots]]
        if local.min() < 0:
            raise IndexError(f"device {self._device} was sent a slot of an expert that it does not hold")
        if len(x) == 1:
            return self.experts(x, mx.array(local[None]))[0]
        tokens = (slots // ids.shape[-1]).astype(np.int32)
        return self.experts(x[mx.array(tokens)], mx.array(local[:, None]))[:, 0]

    def masked(self, x: mx.array, indices: mx.array) -> mx.array:
        """As `compact`, with static shapes and without reading the indices on the host."""
        mine = self._assignment.devices_by_turns(indices) == self._device
        local = mx.where(mine, mx.array(self._local)[indices], 0)
        y = self.experts(x, local)
        return mx.where(mine[..., None], y, mx.zeros((), y.dtype))


class SimulatedDevices(nn.Module):
    """All D devices of one MoE layer in one process; each holds its experts and nothing else.

    streams  one mx.Stream per device: devices then really run side by side
    """

    def __init__(self, shards: list[ExpertShard], streams: list | None = None):
        super().__init__()
        self.shards = shards
        self._streams = streams

    @property
    def num_experts(self) -> int:
        return self.shards[0].num_experts

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        if len(self.shards) == 1:  # it holds all experts under their own numbers
            return self.shards[0].experts(x, indices)
        if slot_selection(indices.size) == "masked":
            return sum(self._on(d, lambda shard: shard.masked(x, indices)) for d in range(len(self.shards)))
        # Exactly one shard answers a slot, so the sum over shards is their rows put in place.
        ids = np.array(indices)
        device_of = self.shards[0]._assignment.devices(ids).reshape(-1)
        order = np.argsort(device_of, kind="stable")
        slots = np.split(order, np.cumsum(np.bincount(device_of, minlength=len(self.shards)))[:-1])
        busy = [d for d in range(len(self.shards)) if len(slots[d])]
        parts = [self._on(d, lambda shard, d=d: shard.rows(x, ids, slots[d])) for d in busy]
        at = np.empty(len(order), dtype=np.int32)
        at[order] = np.arange(len(order))
        y = mx.concatenate(parts) if len(parts) > 1 else parts[0]
        return y[mx.array(at)].reshape(*indices.shape, -1)

    def _on(self, device, compute):
        if self._streams is None:
            return compute(self.shards[device])
        with mx.stream(self._streams[device]):
            return compute(self.shards[device])


def check_placement(model: nn.Module, placement: Placement) -> list[MoELayer]:
    """The model's MoE layers; ValueError with the numbers if the placement is not for them."""
    layers = moe_layers(model)
    if not layers:
        raise ValueError("this model has no Mixture-of-Experts layers: there is nothing to spread")
    counts = {num_experts(layer.experts) for layer in layers}
    if len(counts) > 1:
        raise ValueError(f"layers with different numbers of experts are not supported: {sorted(counts)}")
    expected = (len(layers), counts.pop())
    if (placement.num_layers, placement.num_experts) != expected:
        raise ValueError(
            f"the placement is for {placement.num_layers} layers of {placement.num_experts} experts,"
            f" the model has {expected[0]} of {expected[1]}"
        )
    return layers


def check_computable(layers: list[MoELayer], dtype: mx.Dtype | None = None) -> None:
    """ValueError where mlx could not compute these experts: better said now than at the first token.

    dtype  the weights' type is going to be; None: as it is. mx.gather_mm on the CPU takes float32 alone.
    """
    if mx.default_device().type != mx.cpu:
        return
    for layer in layers:
        for _, linear in switch_linears(layer.experts):
            actual = dtype or linear.weight.dtype
            if isinstance(linear, SwitchLinear) and actual != mx.float32:
                raise ValueError(
                    f"experts that are not quantised run on the CPU in float32 only, not in {actual}:"
                    " call model.set_dtype(mx.float32) first, or load with dtype float32"
                )


def check_ways(combine: str, attention: str) -> None:
    """ValueError unless both name a way that `ranks.install_shard` and `ranks.shard_over_ranks` know."""
    if combine not in ("auto", "reduce", "gather"):
        raise ValueError(f"combine is auto, reduce or gather, got {combine!r}")
    if attention not in ("replicated", "sharded"):
        raise ValueError(f"attention is replicated or sharded, got {attention!r}")


def shard_model(
    model: nn.Module,
    placement: Placement,
    group=None,
    combine: str = "auto",
    attention: str = "replicated",
    streams: bool = False,
) -> nn.Module:
    """Spread the experts of every MoE layer over devices, in place; returns the model.

    One process (`group` None or of size 1): D simulated devices; logits stay bit-identical.
    streams    give every simulated device a stream of its own
    N ranks: each keeps the experts of device number rank, see `ranks.shard_over_ranks` for
    combine    how outputs come together: reduce, gather, or auto
    attention  replicated, or sharded by mlx-lm's own tensor parallelism
    ValueError for what does not fit, bfloat16 experts that are not quantised on the CPU among it.
    """
    if any(isinstance(layer.experts, (ExpertShard, SimulatedDevices)) for layer in moe_layers(model)):
        raise ValueError("this model's experts are spread already: load the model again to place them anew")
    check_ways(combine, attention)
    layers = check_placement(model, placement)
    check_computable(layers)
    if group is not None and group.size() > 1:
        from .ranks import shard_over_ranks

        return shard_over_ranks(model, placement, group, combine, attention)
    lanes = [mx.new_stream(mx.default_device()) for _ in range(placement.num_devices)] if streams else None
    for held, layer in zip(placement.held, layers, strict=True):
        if placement.num_devices == 1:
            shards = [ExpertShard(layer.experts, held, 0)]
        else:
            shards = [ExpertShard.cut(layer.experts, held, d) for d in range(placement.num_devices)]
        layer.experts = SimulatedDevices(shards, lanes)
    return model
