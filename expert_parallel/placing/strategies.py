"""Strategies: from expert loads to a placement. Numpy only.

Dimensions: L MoE layers, E experts, D devices, k chosen per token.
"""

from __future__ import annotations

import numpy as np

from ..placement import Placement, check_loads, contiguous
from .affinity import coactivation as count_pairs
from .affinity import gather_by_affinity
from .copies import device_loads
from .search import divides_into_nodes, spread, spread_in_nodes

STRATEGIES = ("contiguous", "round-robin", "balanced", "replicated", "affinity")


def place_experts(
    loads,
    num_devices: int,
    strategy: str = "contiguous",
    redundant: int = 0,
    num_nodes: int = 1,
    num_groups: int = 1,
    coactivation=None,
    *,
    balance_bound: float = 0.05,
) -> Placement:
    """A placement of E experts on D devices, for every one of L layers.

    loads         [L, E]; tokens sent to each expert. Only its shape counts for `contiguous` and `round-robin`
    num_devices   D, 1 to E
    strategy      contiguous    experts 0..n on device 0, the next on device 1, ...
                  round-robin   expert e on device e mod D
                  balanced      the fullest device as little loaded as a search can make it
                  replicated    the same with `redundant` further copies per layer for hot experts
                  affinity      experts chosen together put together: tokens go to fewer devices; the fullest
                                device at most `balance_bound` above that of `balanced`, for these loads
    num_nodes, num_groups  balanced and replicated keep each group of experts (E / num_groups neighbours)
                  inside one node where all divides, and are global otherwise (DeepSeek, EPLB)
    coactivation  for `affinity`: [L, E, E] tokens that chose both experts, or a trace's experts [T, L, k]

    Slot counts of devices differ by at most one; no device holds two copies of one expert.
    Raises ValueError with the numbers.
    """
    loads = np.asarray(loads)
    redundant, num_devices = _check(loads, num_devices, strategy, redundant, num_nodes, num_groups)
    num_layers, num_experts = loads.shape
    if strategy == "contiguous":
        return contiguous(num_layers, num_experts, num_devices)
    if strategy == "round-robin":
        held = np.arange(num_experts) % num_devices == np.arange(num_devices)[:, None]
        return Placement(np.repeat(held[None], num_layers, axis=0), strategy)
    loads = check_loads(loads)
    nothing = np.flatnonzero(loads.sum(axis=1) == 0)
    if len(nothing):
        raise ValueError(f"layer {nothing[0]} has no load at all: {strategy} needs a trace that covers every layer")
    about = {}
    in_nodes = divides_into_nodes(num_experts, num_devices, redundant, num_nodes, num_groups)
    if num_nodes > 1 and strategy != "affinity" and in_nodes:
        held = spread_in_nodes(loads, num_devices, redundant, num_nodes, num_groups)
        # Rebalancing keeps experts in their nodes.
        about = {"num_nodes": num_nodes, "scope": f"hierarchical over {num_nodes} nodes"}
    else:
        held = spread(loads, num_devices, redundant)
        about = {"scope": "global"} if num_nodes > 1 else {}
    if strategy == "affinity":
        limit = device_loads(loads, held).max(axis=1) * (1 + balance_bound)
        held = gather_by_affinity(loads, _pairs(coactivation, *loads.shape), held, limit)
        about["balance_bound"] = balance_bound
    return Placement(held, strategy, about)


def _check(loads, num_devices, strategy, redundant, num_nodes, num_groups):
    """(redundant, num_devices) as ints; ValueError with the numbers for what cannot be placed."""
    if loads.ndim != 2 or 0 in loads.shape:
        raise ValueError(f"loads are [layers, experts], got {list(loads.shape)}")
    num_experts = loads.shape[1]
    if num_devices != int(num_devices) or not 1 <= num_devices <= num_experts:
        raise ValueError(f"{num_devices} devices: needs 1 to {num_experts}, the number of experts in a layer")
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown placement strategy {strategy!r}: choose {', '.join(STRATEGIES)}")
    if redundant and strategy != "replicated":
        raise ValueError(f"{redundant} redundant experts: only the strategy replicated makes copies, not {strategy}")
    most = num_experts * (int(num_devices) - 1)
    if redundant != int(redundant) or not 0 <= redundant <= most:
        raise ValueError(f"{redundant} redundant experts: needs 0 to {most} for {num_experts} on {num_devices} devices")
    if min(num_nodes, num_groups) < 1:
        raise ValueError(f"{num_nodes} nodes and {num_groups} groups: both are counts from 1 up")
    return int(redundant), int(num_devices)


def _pairs(coactivation, num_layers, num_experts):
    """float32 [L, E, E], symmetric, from pairs or from a trace's choices."""
    if coactivation is None:
        raise ValueError("affinity needs to know which experts are chosen together: pass coactivation, or a trace")
    pairs = np.asarray(coactivation)
    if pairs.ndim == 3 and pairs.dtype.kind in "ui" and pairs.shape[1] == num_layers and pairs.shape[2] != num_experts:
        return count_pairs(pairs, num_experts)
    pairs, expected = pairs.astype(np.float32), (num_layers, num_experts, num_experts)
    if pairs.shape != expected:
        raise ValueError(f"coactivation is {list(pairs.shape)}, the loads want {list(expected)}")
    if not np.isfinite(pairs).all() or (pairs < 0).any():
        raise ValueError("coactivation must be finite and not negative")
    return (pairs + pairs.transpose(0, 2, 1)) / 2
