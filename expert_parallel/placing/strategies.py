"""Strategies: a placement by its name. Numpy only.

Dimensions: L MoE layers, E experts, D devices, T tokens, k chosen.
"""

from __future__ import annotations

import numpy as np

from ..placement import Placement, check_loads, contiguous
from . import affinity
from .copies import device_loads
from .search import spread, spread_in_nodes

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
    loads = check_loads(loads)
    num_layers, num_experts = loads.shape
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown placement strategy {strategy!r}: choose {', '.join(STRATEGIES)}")
    if redundant and strategy != "replicated":
        raise ValueError(f"{redundant} redundant experts: only the strategy replicated makes copies, not {strategy}")
    counts = {
        "devices": (num_devices, 1, num_experts),
        "redundant experts": (redundant, 0, num_experts * (num_devices - 1)),
        "nodes": (num_nodes, 1, num_experts),
        "groups": (num_groups, 1, num_experts),
    }
    for name, (count, least, most) in counts.items():
        if count != int(count) or not least <= count <= most:
            raise ValueError(f"{count} {name}: needs {least} to {most} ({num_experts} experts, {num_devices} devices)")
    num_devices, redundant = int(num_devices), int(redundant)
    if strategy == "contiguous":
        return contiguous(num_layers, num_experts, num_devices)
    if strategy == "round-robin":
        held = np.arange(num_experts) % num_devices == np.arange(num_devices)[:, None]
        return Placement(np.repeat(held[None], num_layers, axis=0), strategy)
    if not loads.any(axis=1).all():
        nothing = loads.any(axis=1).argmin()
        raise ValueError(f"layer {nothing} has no load at all: {strategy} needs a trace that covers every layer")
    if strategy == "affinity":
        held = spread(loads, num_devices)
        limit = device_loads(loads, held).max(axis=1) * (1 + balance_bound)
        pairs = chosen_together(coactivation, num_layers, num_experts)
        held = affinity.gather_by_affinity(loads, pairs, held, limit)
        return Placement(held, strategy, {"balance_bound": balance_bound})
    ratios = (num_groups, num_nodes), (num_experts, num_groups), (num_devices, num_nodes), (redundant, num_nodes)
    # More copies than a node's devices can hold of its experts have room only elsewhere.
    room = num_experts // num_nodes * (num_devices // num_nodes - 1)
    if num_nodes == 1 or any(whole % part for whole, part in ratios) or redundant // num_nodes > room:
        return Placement(spread(loads, num_devices, redundant), strategy, {"scope": "global"} if num_nodes > 1 else {})
    held = spread_in_nodes(loads, num_devices, redundant, num_nodes, num_groups)
    # Rebalancing keeps experts in their nodes.
    return Placement(held, strategy, {"scope": f"hierarchical over {num_nodes} nodes", "num_nodes": num_nodes})


def chosen_together(given, num_layers: int, num_experts: int) -> np.ndarray:
    """Symmetric [L, E, E] with 0 on the diagonal, from such counts or from a trace's experts [T, L, k]."""
    pairs = np.asarray(given)
    if pairs.ndim == 3 and pairs.dtype.kind in "ui" and pairs.shape[1] == num_layers and pairs.shape[2] != num_experts:
        return affinity.coactivation(pairs, num_experts)
    wanted = (num_layers, num_experts, num_experts)
    if pairs.shape != wanted or not (np.isfinite(pairs) & (pairs >= 0)).all():
        either = f"{list(wanted)} finite counts from 0 up, or a trace's experts [T, {num_layers}, k]"
        raise ValueError(f"affinity needs coactivation: {either}; got {list(pairs.shape) or given}")
    return np.where(np.eye(num_experts), 0, pairs + pairs.transpose(0, 2, 1))  # in any unit
