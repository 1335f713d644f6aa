"""Live rebalancing: between two tokens of a run, look at the loads and move experts where that pays.

Dimensions: L MoE layers, E experts, D devices. One process moves for its simulated devices; of N ranks
each reads its own. Every rank decides by itself: all see rank 0's loads and the slowest rank's costs.
"""

from __future__ import annotations

import statistics
import time

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .moe import moe_layers
from .moving import move_experts, rebuilt, shards_here, watch_loads
from .ranks import follow_rank_0, gather_objects
from .rebalancing import Costs, Rebalancer


def measured_costs(model: nn.Module, read, group=None) -> Costs:
    """What a slot, a read and a layer's change take here, measured on the first layer; the same on every rank.

    read  as for `moving.move_experts`; experts that this process does not hold are read, as a move would
    """
    shard = max(shards_here(moe_layers(model)[0].experts), key=lambda shard: len(shard.expert_ids))
    mine = shard.expert_ids
    wanted = iter([e for e in range(shard.num_experts) if e not in mine] * 8 or mine * 8)
    row = read(0, mine[0])
    down = shard.experts["down_proj"] if "down_proj" in shard.experts else shard.experts["fc2"]
    x = mx.ones((1, down.weight.shape[1]))
    chosen = mx.arange(min(8, len(mine)))[None]
    seconds = {
        "read": _median_seconds(lambda: mx.eval(read(0, next(wanted)))),
        "slots": _median_seconds(lambda: mx.eval(shard.experts(x, chosen))),
        "change": _median_seconds(lambda: mx.eval(rebuilt(shard, np.array(mine), {}).parameters())),
    }
    several = group is not None and group.size() > 1
    everyone = gather_objects(group, seconds) if several else [seconds]
    slowest = {name: max(rank[name] for rank in everyone) for name in seconds}
    size = sum(array.nbytes for part in row.values() for array in part.values())
    return Costs(
        expert_bytes=size,
        bytes_per_second=size / slowest["read"],
        seconds_per_slot=slowest["slots"] / chosen.size,
        seconds_per_layer=slowest["change"],
        side_by_side=several,
    )


def _median_seconds(step, times=5) -> float:
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


class LiveRebalancing:
    """Stands beside a running model; `after_token()` between two forward passes may move experts.

        with LiveRebalancing(model, rebalancer, read, group) as live:
            for response in stream_generate(model, ...):
                live.after_token()
        live.changes    # [(tokens seen before, Placement)], the first is (0, where it began)
        live.figures()  # looks, moves, bytes, pauses, gains

    Loads are read every CHECK tokens, or as often as is to be looked; what is looked for says the Rebalancer.
    """

    CHECK = 16

    def __init__(self, model: nn.Module, rebalancer: Rebalancer, read, group=None):
        self.model, self.rebalancer, self.read, self.group = model, rebalancer, read, group
        self.changes = [(0, rebalancer.placement)]
        self._moves, self._tokens, self._calls = [], 0, 0

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
        if self.group is not None and self.group.size() > 1:  # one rank's rounding must not part the ranks
            loads = np.array(follow_rank_0(self.group, mx.array(loads.astype(np.int32))))
        self._tokens += tokens
        looks = len(self.rebalancer.looks)
        plan = self.rebalancer.observe(loads, tokens)
        for look in self.rebalancer.looks[looks:]:
            self._moves.append({"after_tokens": self._tokens, "plan": look, "report": None})
        if plan:
            self._moves[-1]["report"] = move_experts(self.model, plan.placement, self.read)
            self.changes.append((self._tokens, plan.placement))

    def figures(self) -> dict:
        """Every look by rank or process: what was moved, and what the plan had said of it."""
        looks = []
        for look in self._moves:
            plan, report = look["plan"], look["report"]
            looks.append(
                {
                    "after_tokens": look["after_tokens"],
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
            )
        costs = self.rebalancer.costs
        return {"looks": looks, "costs": vars(costs), "tokens_until_look": self.rebalancer.every_tokens}
