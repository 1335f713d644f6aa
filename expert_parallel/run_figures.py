"""Figures of one run: parity with stock mlx-lm, routing, balance, memory, communication, ranks."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import numpy as np

from . import balance
from .communication import bytes_per_token, ring_traffic
from .live_rebalancing import LiveRebalancing
from .measuring import Collectives, Seconds, resident_bytes
from .memory import ModelBytes, array_bytes, cache_bytes, live_expert_bytes
from .moe import ExpertShard, moe_layers
from .placement import Placement
from .ranks import gather_objects
from .routing import RoutingTrace


def rank_figures(model, seconds: Seconds) -> dict:
    """Measured on this rank: bytes of its arrays, memory of the process, slots computed, seconds."""
    experts = live_expert_bytes(model)
    served = [layer.experts.slots_served for layer in moe_layers(model) if isinstance(layer.experts, ExpertShard)]
    return {
        "expert_bytes_per_device": experts.tolist(),
        "expert_bytes": int(experts.sum()),
        "rest_bytes": array_bytes(model) - int(experts.sum()),
        "resident": resident_bytes(),
        "slots_computed_per_layer": served,
        "seconds": vars(seconds),
    }


def parity_figures(model, ids: list[int], tokens: list[int], args, group, stock_run) -> dict | None:
    """Whether stock mlx-lm says the same: tokens of the run, logits over prompt and answer.

    Every rank takes part in the sharded pass; rank 0 alone runs stock. None on the other ranks.
    """
    sequence = mx.array([ids + tokens])
    logits = model(sequence)
    mx.eval(logits)
    result = None
    if group.rank() == 0:
        expected, speed, stock = stock_run()
        difference = mx.abs(stock(sequence).astype(mx.float32) - logits.astype(mx.float32)).max().item()
        result = {
            "source": "measured",
            "tokens_equal": tokens == expected,
            "tokens_compared": len(expected),
            "max_abs_logit_difference": difference,
            "logits_compared": logits.size,
            "stock_tokens_per_second": speed,
        }
    gather_objects(group, 0)  # nobody leaves while rank 0 still compares
    return result


def rebalancing_figures(live: LiveRebalancing, trace: RoutingTrace) -> dict:
    """Looks, moves, pauses; and for each move what became of the tokens since, with and without it (measured)."""
    figures = live.figures()
    ends = [tokens for tokens, _ in live.changes[2:]] + [len(trace)]
    moved = [look for look in figures["looks"] if look["moved"]]
    for look, (_, before), (first, after), end in zip(moved, live.changes, live.changes[1:], ends, strict=False):
        loads = trace[first:end].loads()
        look["since"] = {
            "tokens": end - first,
            "balancedness": balance.balancedness(after.device_loads(loads)),
            "balancedness_unmoved": balance.balancedness(before.device_loads(loads)),
        }
    return {"source": "measured; names with modelled in them are not", **figures}


def memory_figures(whole: ModelBytes, placement: Placement, cache, per_rank: list[dict], ranks: int) -> dict:
    """Bytes per device, from live arrays; and against the whole model on one device."""
    if ranks > 1:
        experts = np.array([figures["expert_bytes"] for figures in per_rank])
        rest = np.array([figures["rest_bytes"] for figures in per_rank])
    else:
        experts = np.array(per_rank[0]["expert_bytes_per_device"])
        rest = np.full(len(experts), whole.rest)
    key_values = cache_bytes(cache)
    per_device = experts + rest
    predicted = whole.per_device(placement)
    return {
        "source": "measured" if ranks > 1 else "experts measured; the rest, here once, modelled on each",
        "per_device_bytes": per_device.tolist(),
        "experts_per_device_bytes": experts.tolist(),
        "experts_per_device_bytes_modelled": predicted.tolist(),
        "rest_per_device_bytes": rest.tolist(),
        "kv_cache_bytes": key_values,
        "full_model_bytes": whole.total,
        "full_model_expert_bytes": whole.experts,
        "reduction": round(whole.total / int(per_device.max()), 3),
        "reduction_of_experts": round(whole.experts / max(1, int(experts.max())), 3),
    }


def communication_figures(model, trace, combine: str, value_bytes: int, counted: Collectives, ranks: int) -> dict:
    """Bytes per token of both combines by formula; with ranks also what was counted at the calls.

    value_bytes  of one value that the experts gave in this run
    """
    layers = moe_layers(model)
    shard = layers[0].experts
    shard = shard if isinstance(shard, ExpertShard) else shard.shards[0]
    down = shard.experts["down_proj"] if "down_proj" in shard.experts else shard.experts["fc2"]
    hidden = down.weight.shape[1]
    top_k = trace.experts.shape[2]
    by_combine = {how: bytes_per_token(hidden, top_k, len(layers), value_bytes, how) for how in ("reduce", "gather")}
    devices = len(shard._assignment.held)
    used = "gather" if shard._gather_group is not None or combine == "gather" else "reduce"
    result = {
        "source": "modelled",
        "combine": used,
        "value_bytes": value_bytes,
        "bytes_per_token": by_combine[used],
        "bytes_per_token_by_combine": by_combine,
        "ring_bytes_sent_per_token_and_rank": round(ring_traffic(by_combine[used], devices)),
    }
    if ranks > 1:
        result["counted"] = {
            "source": "measured at the calls, head and attention included where sharded",
            "tokens": len(trace),
            "calls": counted.calls,
            "payload_bytes": counted.bytes,
            "by_kind": counted.by_kind,
            "payload_bytes_per_token": round(counted.bytes / max(1, len(trace)), 1),
        }
    return result


def routing_figures(trace: RoutingTrace) -> dict:
    """Measured from a trace: per layer hottest expert, entropy, unused experts; by phase."""

    def figures(part: RoutingTrace) -> dict:
        loads = part.loads()
        mean = loads.mean(axis=1)
        return {
            "tokens": len(part),
            "hottest_expert_per_layer": loads.argmax(axis=1).tolist(),
            "hottest_over_mean_per_layer": np.round(loads.max(axis=1) / np.maximum(mean, 1e-12), 3).tolist(),
            "entropy_per_layer": np.round(balance.routing_entropy(loads), 4).tolist(),
            "unused_experts_per_layer": (loads == 0).sum(axis=1).tolist(),
        }

    prefill, decode = trace.phase("prefill"), trace.phase("decode")
    return {
        "source": "measured",
        "num_experts": trace.num_experts,
        "top_k": trace.experts.shape[2],
        "all": figures(trace),
        "prefill": figures(prefill) if len(prefill) else None,
        "decode": figures(decode) if len(decode) else None,
        "dropped_tokens": trace.metadata.get("dropped_tokens", 0),
    }


def balance_figures(trace: RoutingTrace, placement: Placement, later=()) -> dict:
    """Measured load of each device over a trace, under a placement; copies share their expert's load.

    later  [(tokens before, Placement)] that took over while the trace was recorded
    """
    starts = [0, *(tokens for tokens, _ in later), len(trace)]
    parts = [trace[first:end] for first, end in pairwise(starts)]
    placements = [placement, *(each for _, each in later)]

    def device_loads(parts):
        return sum(each.device_loads(part.loads()) for each, part in zip(placements, parts, strict=True))

    loads = device_loads(parts)
    touched = sum(
        balance.fan_out(part.experts, each.held) * (len(part) / len(trace))
        for each, part in zip(placements, parts, strict=True)
        if len(part)
    )
    counts = placement.held.sum(axis=2).mean(axis=0).round().astype(int)
    result = {
        "source": "measured",
        "device_loads": np.round(loads, 3).tolist(),
        "balancedness_per_layer": np.round(balance.balancedness_per_layer(loads), 4).tolist(),
        "imbalance_ratio_per_layer": np.round(balance.imbalance_ratio(loads), 4).tolist(),
        "coefficient_of_variation_per_layer": np.round(balance.coefficient_of_variation(loads), 4).tolist(),
        "min_max_ratio_per_layer": np.round(balance.min_max_ratio(loads), 4).tolist(),
        "fan_out_per_layer": np.round(touched, 3).tolist(),
        "balancedness_layers": round(balance.balancedness(loads), 4),
        "balancedness_aggregate": round(balance.balancedness(loads, "aggregate"), 4),
        "fan_out": round(float(touched.mean()), 3),
        "phases": {},
    }
    if int(placement.copies.max()) == 1:
        expected = balance.expected_fan_out(counts, placement.num_experts, trace.experts.shape[2])
        result["fan_out_if_uniform_modelled"] = round(expected, 3)
    for name in ("prefill", "decode"):
        of_phase = [part.phase(name) for part in parts]
        if any(map(len, of_phase)):
            part_loads = device_loads(of_phase)
            result["phases"][name] = {
                "tokens": sum(map(len, of_phase)),
                "balancedness_layers": round(balance.balancedness(part_loads), 4),
                "balancedness_aggregate": round(balance.balancedness(part_loads, "aggregate"), 4),
            }
    return result
