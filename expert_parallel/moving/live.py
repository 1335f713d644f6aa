"""Experts that change devices between two tokens of a run, in one process or on N ranks.

Dimensions: L MoE layers, E experts, D devices. Which experts move, and whether that pays: plan.py. Every rank decides
by itself and reads what it lacks: all see rank 0's loads and the slowest rank's costs.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import replace
from functools import partial
from operator import add

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..experts import is_rank
from ..layers import expert_tensors, hidden_size, moe_layers, num_experts, with_tensors
from ..placement import Placement
from ..ranks.group import follow_rank_0, gather_objects
from ..stores import picked
from ..trace import recorders
from .plan import Costs, Rebalancer, in_steps

CHECK = 16  # calls after which loads are read for the Rebalancer, or fewer where it looks more often
FIRST = 10.0  # times what is foretold, which a first move was seen to take on two cores with other work beside it
TIMES = 5  # that a cost is measured; the median counts


def start_rebalancing(args, model: nn.Module, placement: Placement, checkpoint, dtype, group) -> LiveRebalancing:
    """What --rebalance-every and its companions ask for, with the costs measured here.

    ValueError where the checkpoint's layout holds no single experts.
    """
    if not checkpoint.reads_rows:
        where = f"{checkpoint.folder} stores its experts in a layout that single ones cannot be read from"
        raise ValueError(f"--rebalance-every {args.rebalance_every}: {where}; leave it out, or take another checkpoint")
    rows, every = partial(checkpoint.rows, dtype=dtype), args.rebalance_every
    costs = measured_costs(model, rows, group)
    rebalancer = Rebalancer(placement, costs, every, args.rebalance_threshold, every, args.rebalance_horizon)
    longest = vars(args).get("rebalance_pause")  # of mlx-lm's tools alone
    if longest and longest < (least := costs.expert_bytes / costs.bytes_per_second + costs.seconds_per_layer):
        took = f"an expert takes {least:.2g} s to move here, as measured"
        raise ValueError(f"--rebalance-pause {longest:g}: {took}: give at least that, or leave it out")
    return LiveRebalancing(model, rebalancer, rows, group, longest)


def measured_costs(model: nn.Module, rows, group) -> Costs:
    """What a slot, a read and a layer's change take here, measured on the first layer; the same on every rank.

    rows  as for `move_experts`; experts that this process does not hold are read, as a move would
    """
    experts, source = moe_layers(model)[0].experts, rows(0)
    store = max(experts.stores, key=lambda store: len(store.ids))
    lacking = np.setdiff1d(np.arange(experts.num_experts), store.ids)
    wanted = iter(np.resize(lacking if len(lacking) else store.ids, TIMES).tolist())
    own, turned = expert_tensors(store.experts), np.arange(len(store.ids))[::-1]
    x, chosen = mx.ones((1, hidden_size(experts))), mx.arange(min(8, len(store.ids)))[None]
    steps = {
        "read": lambda: source([next(wanted)]),
        "slots": lambda: store.experts(x, chosen),
        "change": lambda: with_tensors(store.experts, picked(own, turned)).parameters(),
    }
    seconds = {name: [] for name in steps}
    for _ in range(TIMES):
        for name, step in steps.items():
            began = time.perf_counter()
            mx.eval(step())
            seconds[name].append(time.perf_counter() - began)
    everyone = gather_objects(group, {name: statistics.median(each) for name, each in seconds.items()})
    read, slots, change = (max(rank[name] for rank in everyone) for name in steps)
    size = sum(array.nbytes // len(array) for array in own.values())
    return Costs(size, size / read, slots / chosen.size, change, side_by_side=is_rank(group))


def move_experts(model: nn.Module, placement: Placement, rows=None) -> dict:
    """Change the devices of a sharded model to hold what `placement` says; tokens stay the same.

    rows  layer -> source of its experts (see stores.py), as `Checkpoint.rows`; None: another simulated device
    Only rows that a device lacks are fetched. A layer is changed whole before the next is touched, so that no more
    than one layer's experts are in memory twice. Call it between two forward passes, with the same placement on
    every rank; no rank waits for another in it. Returns what was read in this process, and how long it stood still.
    """
    count, size, seconds = 0, 0, []
    for l, (layer, held) in enumerate(zip(moe_layers(model), placement.held, strict=True)):
        experts, began = layer.experts, time.perf_counter()
        if (experts.held == held).all():
            continue
        arrivals = int((held & ~experts.held)[list(experts.devices)].sum())
        experts.change(held, rows(l) if rows else None)
        one = expert_tensors(experts.stores[0].experts).values()
        count, size = count + arrivals, size + arrivals * sum(array.nbytes // len(array) for array in one)
        seconds.append(time.perf_counter() - began)
    read = {"experts_read_here": count, "bytes_here": size}
    return {**read, "pause_seconds": sum(seconds, 0.0), "longest_layer_seconds": max(seconds, default=0.0)}


class Counting:
    """Counts what a running model's routers ask for, between its forward passes; a context manager.

    Nothing is read on the host before `take`.
    """

    def __init__(self, model: nn.Module, group=None):
        self.model, self.group = model, group
        self._waiting = [[] for _ in moe_layers(model)]  # [L]: indices of forward passes that are not counted yet

    def __enter__(self):
        self._recording = recorders(moe_layers(self.model), [waiting.append for waiting in self._waiting])
        self._recording.__enter__()
        return self

    def __exit__(self, *problem):
        return self._recording.__exit__(*problem)

    def take(self) -> tuple[np.ndarray, int]:
        """(slots [L, E], tokens) since the last time, of forward passes that every layer has begun; rank 0's."""
        layers = moe_layers(self.model)
        tokens = min(sum(ids.size // ids.shape[-1] for ids in waiting) for waiting in self._waiting)
        loads = np.zeros((len(layers), num_experts(layers[0].experts)), np.int64)
        for of_layer, waiting in zip(loads, self._waiting, strict=True):
            left = tokens
            while left > 0:  # a layer may have gone through a prompt in halves, ranks/overlap.py
                ids = waiting.pop(0)
                of_layer += np.bincount(np.array(ids).ravel(), minlength=len(of_layer))
                left -= ids.size // ids.shape[-1]
        if is_rank(self.group):  # one rank's rounding must not part the ranks
            loads = np.array(follow_rank_0(self.group, mx.array(loads.astype(np.int32))))
        return loads, tokens


class LiveRebalancing(Counting):
    """Stands beside a running model; `after_token()` between two forward passes may move experts.

    with LiveRebalancing(model, rebalancer, checkpoint.rows, group) as live:
        for response in stream_generate(model, ...):
            live.after_token()
    live.changes    # [(tokens seen before, Placement)], the first is (0, where it began)
    live.figures()  # looks, moves, bytes, pauses, gains

    longest  seconds that a move may hold the model up at once (modelled): a longer one is carried out in steps, one at
             each `look`, which is to come between any two passes while some are `ahead`
    """

    def __init__(self, model: nn.Module, rebalancer: Rebalancer, rows=None, group=None, longest: float | None = None):
        super().__init__(model, group)
        self.rebalancer, self.rows, self.longest = rebalancer, rows, longest
        self.changes, self.looks = [(0, rebalancer.placement)], []
        self.ahead, self.longest_pause = deque(), 0.0  # steps [L, D, E]; what a look took at most, in seconds
        self._slow = FIRST  # seconds of the last move over those that were foretold
        self._calls, self._tokens = 0, 0

    def after_token(self) -> None:
        self._calls += 1
        if not self._calls % min(CHECK, self.rebalancer.every_tokens):
            self.look(*self.take())

    def look(self, loads, tokens: int) -> None:
        """Move experts if the slots [L, E] of so many tokens more make it worth while, or the next step of a move."""
        began = time.perf_counter()
        self._tokens += tokens
        if self.ahead:  # nothing is decided before they are through
            self.rebalancer.learn(loads, tokens)
            self._step()
        else:
            self._decide(loads, tokens)
        self.longest_pause = max(self.longest_pause, time.perf_counter() - began)

    def _step(self) -> None:
        held, last, look = self.ahead.popleft(), self.rebalancer.placement, self.looks[-1]
        placement = replace(last, held=held) if self.ahead else last
        read = move_experts(self.model, placement, self.rows)
        self.changes.append((self._tokens, placement))
        look |= {name: (max if name.startswith("longest") else add)(look[name], read[name]) for name in read}
        if not self.ahead:  # the next ones are cut by what this one took, not by what was foretold
            self._slow = look["pause_seconds"] / look["pause_seconds_modelled"]

    def _decide(self, loads, tokens: int) -> None:
        # 1. The rebalancer's verdict, where it is time for one; the experts move.
        before = self.rebalancer.placement.held
        plan = self.rebalancer.observe(loads, tokens)
        if len(self.rebalancer.looks) == len(self.looks):
            return
        if plan and self.longest:
            slow = max(gather_objects(self.group, self._slow)) if is_rank(self.group) else self._slow
            self.ahead.extend(in_steps(before, plan.placement.held, self.rebalancer.costs, self.longest / slow))
        there = replace(self.rebalancer.placement, held=before) if self.ahead else self.rebalancer.placement
        read = move_experts(self.model, there, self.rows)
        if plan and not self.ahead:
            self.changes.append((self._tokens, plan.placement))
        # 2. What it came to, beside what the plan says.
        look = self.rebalancer.looks[-1]
        self.looks.append(
            {
                "after_tokens": self._tokens,
                "moved": plan is not None,
                **read,
                "moves_of_all": len(look.moves),
                "bytes_of_all": look.bytes,
                "pause_seconds_modelled": look.pause_seconds,
                "gain_seconds_modelled": look.gain_seconds,
                "balancedness_before": look.balancedness_before,
                "balancedness_after_modelled": look.balancedness_after,
            }
        )

    def figures(self) -> dict:
        """Every look by rank or process: what was moved, and what the plan had said of it."""
        about = {"costs": vars(self.rebalancer.costs), "tokens_until_look": self.rebalancer.every_tokens}
        return {"looks": self.looks, **about}
