"""Experts that change devices between two tokens of a run, in one process or on N ranks.

Dimensions: L MoE layers, E experts, D devices. Which experts move, and whether that pays: plan.py. Every rank decides
by itself and reads what it lacks: all see rank 0's loads and the slowest rank's costs.
"""

from __future__ import annotations

import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..experts import is_rank
from ..layers import expert_tensors, hidden_size, moe_layers, moe_shape, with_tensors
from ..placement import Placement
from ..ranks.group import follow_rank_0, gather_objects
from ..stores import picked
from ..trace import recorders
from .plan import Costs, Rebalancer

# --- moving ------------------------------------------------------------------------------------------------


@dataclass
class MoveReport:
    """Measured in this process: experts moved, their bytes, and how long generation stood still."""

    experts: int = 0
    bytes: int = 0
    seconds: float = 0.0
    longest_layer_seconds: float = 0.0


def move_experts(model: nn.Module, placement: Placement, rows=None) -> MoveReport:
    """Change the devices of a sharded model to hold what `placement` says; tokens stay the same.

    rows  layer -> source of its experts (see stores.py), as `Checkpoint.rows`; None: another simulated device
    Only rows that a device lacks are fetched. A layer is changed whole before the next is touched, so that no more
    than one layer's experts are in memory twice. Call it between two forward passes, with the same placement on
    every rank; no rank waits for another in it.
    """
    report, began = MoveReport(), time.perf_counter()
    for l, (layer, then) in enumerate(zip(moe_layers(model), placement.held, strict=True)):
        experts, start = layer.experts, time.perf_counter()
        arrivals = (then & ~experts.held)[list(experts.devices)]
        if (experts.held == then).all():
            continue
        experts.change(then, rows(l) if rows else None)
        one = expert_tensors(experts.stores[0].experts).values()
        report.experts += int(arrivals.sum())
        report.bytes += int(arrivals.sum()) * sum(array.nbytes // len(array) for array in one)
        report.longest_layer_seconds = max(report.longest_layer_seconds, time.perf_counter() - start)
    report.seconds = time.perf_counter() - began
    return report


class LiveLoads:
    """Counts of what routers asked for since the last look; see `watch_loads`."""

    def __init__(self, num_layers: int, num_experts: int):
        self.waiting = [[] for _ in range(num_layers)]
        self._num_experts = num_experts

    def take(self) -> tuple[np.ndarray, int]:
        """(slots [L, E], tokens) since the last call; evaluates the indices that came meanwhile."""
        loads, tokens = np.zeros((len(self.waiting), self._num_experts), dtype=np.int64), 0
        passes = min(map(len, self.waiting))
        for l, waiting in enumerate(self.waiting):
            indices, waiting[:passes] = waiting[:passes], []
            for ids in map(np.array, indices):
                loads[l] += np.bincount(ids.ravel(), minlength=self._num_experts)
                tokens += ids.size // ids.shape[-1] if l == 0 else 0
        return loads, tokens


@contextmanager
def watch_loads(model: nn.Module):
    """Count the loads of `model` while the block runs: a LiveLoads, to be asked between forward passes."""
    live = LiveLoads(*moe_shape(model))
    with recorders(moe_layers(model), [waiting.append for waiting in live.waiting]):
        yield live


# --- moving while it pays ----------------------------------------------------------------------------------


def measured_costs(model: nn.Module, rows, group=None) -> Costs:
    """What a slot, a read and a layer's change take here, measured on the first layer; the same on every rank.

    rows  as for `move_experts`; experts that this process does not hold are read, as a move would
    """
    experts, read = moe_layers(model)[0].experts, rows(0)
    store = max(experts.stores, key=lambda store: len(store.ids))
    mine = store.ids.tolist()
    wanted = iter([e for e in range(experts.num_experts) if e not in mine] * 8 or mine * 8)
    own = expert_tensors(store.experts)
    x, chosen = mx.ones((1, hidden_size(experts))), mx.arange(min(8, len(mine)))[None]
    again = np.arange(len(mine))[::-1]
    seconds = {
        "read": _median_seconds(lambda: read([next(wanted)])),
        "slots": _median_seconds(lambda: store.experts(x, chosen)),
        "change": _median_seconds(lambda: with_tensors(store.experts, picked(own, again)).parameters()),
    }
    everyone = gather_objects(group, seconds) if is_rank(group) else [seconds]
    slowest = {name: max(rank[name] for rank in everyone) for name in seconds}
    size = sum(array.nbytes // len(array) for array in own.values())
    return Costs(
        expert_bytes=size,
        bytes_per_second=size / slowest["read"],
        seconds_per_slot=slowest["slots"] / chosen.size,
        seconds_per_layer=slowest["change"],
        side_by_side=is_rank(group),
    )


def _median_seconds(step, times=5) -> float:
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        mx.eval(step())
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def start_rebalancing(args, model: nn.Module, placement: Placement, checkpoint, dtype, group=None) -> LiveRebalancing:
    """What --rebalance-every and its companions ask for, with the costs measured here.

    ValueError where the checkpoint's layout holds no single experts.
    """
    if not checkpoint.reads_rows:
        raise ValueError(f"{checkpoint.folder} stores its experts in a layout that single ones cannot be read from")

    def rows(layer):
        return checkpoint.rows(layer, dtype)

    costs, every = measured_costs(model, rows, group), args.rebalance_every
    threshold, horizon = args.rebalance_threshold, args.rebalance_horizon
    rebalancer = Rebalancer(placement, costs, every, threshold, half_life=every, horizon_tokens=horizon)
    return LiveRebalancing(model, rebalancer, rows, group)


class LiveRebalancing:
    """Stands beside a running model; `after_token()` between two forward passes may move experts.

        with LiveRebalancing(model, rebalancer, checkpoint.rows, group) as live:
            for response in stream_generate(model, ...):
                live.after_token()
        live.changes    # [(tokens seen before, Placement)], the first is (0, where it began)
        live.figures()  # looks, moves, bytes, pauses, gains

    Loads are read every CHECK tokens, or as often as is to be looked; what is looked for says the Rebalancer.
    """

    CHECK = 16

    def __init__(self, model: nn.Module, rebalancer: Rebalancer, rows, group=None):
        self.model, self.rebalancer, self.rows, self.group = model, rebalancer, rows, group
        self.changes = [(0, rebalancer.placement)]
        self._looks, self._tokens, self._calls = [], 0, 0  # looks: (tokens before, Plan, MoveReport or None)

    def __enter__(self):
        self._watch = watch_loads(self.model)
        self._live = self._watch.__enter__()
        return self

    def __exit__(self, *problem):
        return self._watch.__exit__(*problem)

    def after_token(self) -> None:
        self._calls += 1
        if self._calls % min(self.CHECK, self.rebalancer.every_tokens):
            return
        loads, tokens = self._live.take()
        if is_rank(self.group):  # one rank's rounding must not part the ranks
            loads = np.array(follow_rank_0(self.group, mx.array(loads.astype(np.int32))))
        self._tokens += tokens
        before = len(self.rebalancer.looks)
        plan, report = self.rebalancer.observe(loads, tokens), None
        if plan:
            report = move_experts(self.model, plan.placement, self.rows)
            self.changes.append((self._tokens, plan.placement))
        self._looks += [(self._tokens, look, report) for look in self.rebalancer.looks[before:]]

    def figures(self) -> dict:
        """Every look by rank or process: what was moved, and what the plan had said of it."""
        looks = [
            {
                "after_tokens": tokens,
                "moved": report is not None,
                "experts_read_here": report.experts if report else 0,
                "bytes_read_here": report.bytes if report else 0,
                "moves_of_all": len(plan.moves),
                "bytes_of_all": plan.bytes,
                "pause_seconds": report.seconds if report else 0.0,
                "longest_layer_seconds": report.longest_layer_seconds if report else 0.0,
                "pause_seconds_modelled": plan.pause_seconds,
                "gain_seconds_modelled": plan.gain_seconds,
                "balancedness_before": plan.balancedness_before,
                "balancedness_after_modelled": plan.balancedness_after,
            }
            for tokens, plan, report in self._looks
        ]
        costs = self.rebalancer.costs
        return {"looks": looks, "costs": vars(costs), "tokens_until_look": self.rebalancer.every_tokens}
