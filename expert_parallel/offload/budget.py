"""How many experts of each layer find room in so much memory.

Dimensions: L MoE layers, D devices, E experts.
"""

from __future__ import annotations

import re

import numpy as np

from .policies import POLICIES, Cache, hottest
from .prefetch import PREFETCH

UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_budget(text) -> tuple[float, bool]:
    """(number of bytes or share, whether it is a share) of "4GB", "500 MB", "25%" or a number of bytes. ValueError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%|[A-Za-z]*)\s*", str(text))
    unit = found and found[2].upper()
    if not found or not (unit == "%" or unit in UNITS) or not float(found[1]):
        raise ValueError(
            f"expert memory is a size such as 4GB or 500MB, or a share of the experts such as 25%: {text!r}"
        )
    return (float(found[1]) / 100, True) if unit == "%" else (float(found[1]) * UNITS[unit], False)


def rooms(budget, expert_bytes: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Places for experts in each layer [L], as equal a share of the budget as whole experts allow.

    budget        as `parse_budget` reads it, for one device
    expert_bytes  [L] of one expert in memory
    held          [L] experts that the device answers for; no layer gets more places
    Raises ValueError for less than one expert a layer, with the least that works.
    """
    amount, is_share = parse_budget(budget)
    whole, least = int(expert_bytes @ held), int(expert_bytes @ (held > 0))
    amount = amount * whole if is_share else amount
    if amount < least:
        raise ValueError(
            f"expert memory {budget} is {amount / 1e6:.1f} MB and too small: one expert in each of {len(held)} layers"
            f" takes {least / 1e6:.1f} MB, {100 * least / max(1, whole):.1f}% of the device's experts"
        )
    places = np.minimum(held, 1)
    while len(fits := np.flatnonzero((places < held) & (expert_bytes <= amount - places @ expert_bytes))):
        places[fits[(places * expert_bytes)[fits].argmin()]] += 1  # the first of those with least
    return places


def make_caches(held: np.ndarray, devices, expert_bytes, budget, policy="lru", trace=None, prefetch="none"):
    """list [L] of {device: Cache} for the devices that are here; None where all experts of each fit into the budget.

    held    bool [L, D, E];  expert_bytes, budget  see `rooms`
    policy, prefetch  one of POLICIES, one of PREFETCH; "pinned" and "learned" need a `trace` of the same shape
    Raises ValueError for what cannot be followed.
    """
    for what, asked, known in (("cache policy", policy, POLICIES), ("prefetch", prefetch, PREFETCH)):
        if asked not in known:
            raise ValueError(f"{what} is {', '.join(known)}, got {asked!r}")
        if asked in ("pinned", "learned") and trace is None:
            raise ValueError(f"{what} {asked} needs a routing trace")
    if trace is not None and (trace.experts.shape[1], trace.num_experts) != held.shape[::2]:
        shape = f"{trace.experts.shape[1]} layers of {trace.num_experts} experts"
        raise ValueError(f"the trace is of {shape}, the model has {held.shape[0]} of {held.shape[2]}")
    counts = held.sum(axis=2)
    places = np.stack([rooms(budget, expert_bytes, counts[:, device]) for device in devices], axis=1)
    if (places == counts[:, devices]).all():
        return None
    caches = [{} for _ in held]
    for n, device in enumerate(devices):
        pinned = [()] * len(held)
        if policy == "pinned":
            pinned = hottest(np.where(held[:, device], trace.loads(), -1), places[:, n], trace.experts.shape[2])
        for l, layer in enumerate(caches):
            layer[device] = Cache(held.shape[2], places[l, n], policy, pinned[l])
    return caches
