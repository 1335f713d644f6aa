"""Experts over devices: what stands in place of `switch_mlp` in mlx-lm's MoE blocks.

Dimensions: T tokens, k experts chosen per token, S = T k slots, E experts, D devices, H hidden.

    mlx-lm's block:   route -> switch_mlp(x [..., H], indices [..., k]) -> [..., k, H] -> weigh, sum
    replaced:                  ^^^^^^^^^^
    each slot is answered by one device (serving.py) from its store (stores.py); slots of devices that are not
    here are zeros, so that a sum over ranks completes them
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .layers import MoELayer, StandIn, expert_tensors, moe_layers, num_experts
from .placement import Placement
from .serving import Serving
from .stores import InMemory, picked, rows_of
from .trials import prove, sum_answers, why_not_reduce


class ShardedExperts(StandIn):
    """The experts of one MoE layer over D devices.

    stores   {device: store} of the `devices` that are here: all D in one process, one on a rank
    held     bool [D, E]
    group    ranks over which slot outputs are summed ("gather"); None where the block sums, or nothing is to sum
    combine  reduce or gather: what ranks do at this layer, and in one process would do

    (x [..., H], indices [..., k]) -> [..., k, H]. Slots of others are skipped in one of two ways:
    compact  the slot list is read on the host and only slots that are served here are computed
    masked   every slot is computed, those of others by a spare expert of zeros: no wait for the host,
             which pays on a GPU for few slots, see device/masked.py
    """

    holds_experts = True

    def __init__(self, stores: dict[int, nn.Module], held: np.ndarray, group=None):
        nn.Module.__init__(self)
        self["stores"] = list(stores.values())  # first of all: other attributes are looked for behind them
        self.devices, self.num_experts = np.array(list(stores)), held.shape[1]
        self.group, self.combine = group, "reduce"
        self.lanes, self.side_by_side_from = None, math.inf  # slots of a step; see device/trials.py
        self.slots_served = np.zeros(len(stores), np.int64)
        self.masked_up_to = 0  # slots
        self._serve(held)

    def _serve(self, held):
        self.held, self.serving, self._tables = held, Serving(held), None
        self._alone = len(self.devices) == len(held) == 1 and self.stores[0].all_here

    def replaced_module(self) -> nn.Module:
        return self.stores[0].experts

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        y = (self.masked if indices.size <= self.masked_up_to else self.compact)(x, indices)
        return y if self.group is None else mx.distributed.all_sum(y, group=self.group)

    def compact(self, x: mx.array, indices: mx.array) -> mx.array:
        """As __call__ without a sum over ranks; reads the indices on the host."""
        if self._alone:  # one device has all experts under their own numbers
            self.slots_served[0] += indices.size
            return self.stores[0].experts(x, indices)
        # 1. Slots by the device that serves them; plain lists, for most steps have few slots.
        ids = np.array(indices)
        slots = [[] for _ in range(len(self.held) + 1)]
        for slot, device in enumerate(self.serving.devices(ids).reshape(-1).tolist()):
            slots[device].append(slot)
        # 2. Each store answers its own.
        flat, experts, k = x.reshape(-1, x.shape[-1]), ids.reshape(-1), ids.shape[-1]
        parts, places = [], []
        for n, here in enumerate(self.devices):
            if mine := slots[here]:
                with self._lane(n, ids.size):
                    at = np.array(mine)
                    parts.append(self.stores[n](flat, at // k, experts[at]))
                places += mine
                self.slots_served[n] += len(mine)
        # 3. Rows in their places; a row of zeros behind them stands for every slot of others.
        if len(places) < ids.size:  # on a rank with no slot, too, what x needs of others is to be asked for
            parts.append(mx.depends(mx.zeros((1, x.shape[-1]), x.dtype), x))
        at = [len(places)] * ids.size
        for row, slot in enumerate(places):
            at[slot] = row
        return mx.concatenate(parts)[mx.array(at)].reshape(*indices.shape, -1)

    def masked(self, x: mx.array, indices: mx.array) -> mx.array:
        """As `compact` with static shapes and without the host: replicas take turns over the slots."""
        if self._tables is None:
            self._tables = [self._table(n) for n in range(len(self.stores))]
        if self.serving.any_shared:
            turn = self.serving.turn_of(indices.shape)
            indices = indices + mx.array((turn * self.num_experts).astype(np.uint32))
        parts = []
        for n, (store, table) in enumerate(zip(self.stores, self._tables, strict=True)):
            self.slots_served[n] += indices.size
            with self._lane(n, indices.size):
                parts.append(store.experts(x, table[indices]))
        return sum(parts[1:], parts[0])

    def _table(self, n):
        """[turns E]: the store's row for each expert at each turn, the spare one where another device serves it."""
        rows = self.stores[n].rows_with_spare()
        spare = len(self.stores[n].ids)
        return mx.array(np.where(self.serving.turns == self.devices[n], rows, spare).reshape(-1).astype(np.uint32))

    def _lane(self, n, slots):
        return self.lanes(n) if slots >= self.side_by_side_from else nullcontext()

    def rows(self, ids) -> dict[str, mx.array]:
        """Source of the experts that devices here hold, see stores.py."""
        tensors = [expert_tensors(store.experts) for store in self.stores]
        here = [next((n, s.row_of(e)) for n, s in enumerate(self.stores) if s.row_of(e) >= 0) for e in ids]
        return {name: mx.concatenate([tensors[n][name][row : row + 1] for n, row in here]) for name in tensors[0]}

    def change(self, held: np.ndarray, rows=None) -> None:
        """Hold what `held` [D, E] says from now on; the answers stay the same.

        rows  source of what a device here lacks; None: another device here
        """
        new = np.flatnonzero((held & ~self.held)[self.devices].any(axis=0))
        if rows is None and len(new) and self.stores[0].all_here:
            come = self.rows(new)  # all of it before any device lets go of an expert
            mx.eval(come)
            rows = lambda ids: picked(come, np.searchsorted(new, ids))  # noqa: E731
        for device, store in zip(self.devices, self.stores, strict=True):
            if (held[device] != self.held[device]).any():
                store.hold(np.flatnonzero(held[device]), rows)
        self._serve(held)

    def lose(self, devices) -> None:
        """These devices are gone with all that they hold; an expert without another holder is nobody's from now on.

        The devices that are here and stay must be one at least.
        """
        held, stay = self.held.copy(), np.flatnonzero(~np.isin(self.devices, devices))
        held[list(devices)] = False
        self["stores"] = [self.stores[n] for n in stay]
        self.devices, self.slots_served = self.devices[stay], self.slots_served[stay]
        self._serve(held)


# --- installing -------------------------------------------------------------------------------------------


def shard_model(
    model: nn.Module,
    placement: Placement,
    group=None,
    combine: str = "auto",
    attention: str = "replicated",
    streams: str = "auto",
) -> nn.Module:
    """Spread the experts of every MoE layer over devices, in place; returns the model.

    One process (`group` None or of size 1): D simulated devices; logits stay bit-identical on the CPU.
    streams    auto, on or off: what the CPU's cores share, see device/trials.py
    N ranks: each keeps the experts of device number `group.rank()`.
    combine    reduce  the block weighs its own slots, then its sum runs over all ranks: H values a token
               gather  all ranks sum slot outputs, then the block weighs them: k H values, right for any block
               auto    reduce where the block can; one process sums nothing, and asks the same
    attention  replicated, or sharded by mlx-lm's own tensor parallelism (ranks/hybrid.py)
    Before old experts are let go, the new ones must give the same answers for random tokens over all of them.
    Raises ValueError for what does not fit, and where the answers differ.
    """
    from .device.masked import measure_masked
    from .device.trials import quicken

    layers, devices = check_request(model, placement, group, combine, attention)
    whole = [layer.experts for layer in layers]
    if attention == "sharded" and is_rank(group):
        from .ranks.hybrid import shard_rest

        shard_rest(model, layers, group)
    for layer, held in zip(layers, placement.held, strict=True):
        experts = whole.pop(0)
        stores = {d: InMemory(experts, held.shape[1], np.flatnonzero(held[d]), rows_of(experts)) for d in devices}
        sharded = ShardedExperts(stores, held)
        prove(layer.path, experts, sharded)
        install(layer, sharded, group, combine)
        del experts, stores, sharded
    measure_masked(layers, group)
    quicken(model, streams, group)
    return model


def is_rank(group) -> bool:
    """Whether this process is one of several."""
    return group is not None and group.size() > 1


def check_request(model, placement, group, combine, attention) -> tuple[list[MoELayer], list[int]]:
    """(MoE layers, numbers of the devices that are here); ValueError with the numbers for what cannot be."""
    if combine not in ("auto", "reduce", "gather"):
        raise ValueError(f"combine is auto, reduce or gather, got {combine!r}")
    if attention not in ("replicated", "sharded"):
        raise ValueError(f"attention is replicated or sharded, got {attention!r}")
    layers = moe_layers(model)
    if any(isinstance(layer.experts, ShardedExperts) for layer in layers):
        raise ValueError("this model's experts are spread already: load the model again to place them anew")
    L, E = len(layers), num_experts(layers[0].experts)
    if (placement.num_layers, placement.num_experts) != (L, E):
        for_shape = f"{placement.num_layers} layers of {placement.num_experts} experts"
        raise ValueError(f"the placement is for {for_shape}, the model has {L} of {E}")
    if is_rank(group) and placement.num_devices != group.size():
        raise ValueError(f"the placement is for {placement.num_devices} devices, there are {group.size()} ranks")
    return layers, [group.rank()] if is_rank(group) else list(range(placement.num_devices))


def install(layer: MoELayer, sharded: ShardedExperts, group, combine: str) -> None:
    """Put sharded experts into their block, and settle where ranks sum.

    mlx-lm's hook for it is the block's `sharding_group`. Where mlx-lm's own `shard()` has set it, whatever else the
    block computes is split over ranks too, and only the block's sum completes it; else a trial says what is possible.
    ValueError where the sum that was asked for would count something once per rank, or lose it.
    """
    split = getattr(layer.block, "sharding_group", None) is not None
    why = None if split else why_not_reduce(layer)
    if why and combine == "reduce":
        raise ValueError(f'combine "reduce" is not possible for {layer.path}: its block was tried, {why}; use "gather"')
    if split and combine == "gather":
        raise ValueError(f'{layer.path} is in a block that mlx-lm has sharded, whose sum needs combine "reduce"')
    layer.experts, sharded.combine = sharded, "gather" if why or combine == "gather" else "reduce"
    if is_rank(group) and sharded.combine == "gather":
        sharded.group = group
    elif is_rank(group):
        sum_answers(layer.block, group)
