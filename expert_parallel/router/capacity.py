"""Capacity: at most so many slots of a batch for one expert; the others dropped or sent elsewhere. Numpy only.

Dimensions: T tokens of a batch, E experts, k chosen per token.
"""

from __future__ import annotations

import math

import numpy as np


def expert_capacity(num_tokens: int, top_k: int, num_experts: int, factor: float = 1.0, rule: str = "megatron") -> int:
    """Most slots an expert takes of a batch.

    megatron   ceil(T k / E f)            (Megatron-LM, moe_utils.py)
    deepspeed  max(4, ceil(T k / E f))    (DeepSpeed, sharded_moe.py; min_capacity 4)
    tutel      k int(f ceil(T / E))       (Tutel, fast_dispatch.py)
    """
    if min(num_tokens, top_k, num_experts) < 1 or not factor > 0:
        raise ValueError(
            f"capacity needs positive numbers: {num_tokens} tokens, top-{top_k}, {num_experts} experts, factor {factor}"
        )
    if rule == "megatron":
        return math.ceil(num_tokens * top_k / num_experts * factor)
    if rule == "deepspeed":
        return max(4, math.ceil(num_tokens * top_k / num_experts * factor))
    if rule == "tutel":
        return top_k * int(factor * math.ceil(num_tokens / num_experts))
    raise ValueError(f"capacity rule is megatron, deepspeed or tutel, got {rule!r}")


def limit_slots(experts, gates, capacity: int, drop: str = "score", reroute: bool = False):
    """(experts [T, k], kept bool [T, k]): what is left of a batch's choices under a capacity.

    experts  [T, k];  gates  [T, E], the router's scores
    drop     score     an expert keeps the slots with the highest gate (Megatron "probs")
             position  it keeps the earliest tokens (GShard, section 3.2; Megatron "position")
    reroute  a slot that finds no room goes to the token's next best expert that has room and that it has
             not chosen yet; it is dropped only if there is none
    """
    if capacity < 0 or drop not in ("score", "position"):
        raise ValueError(f"capacity must not be negative and drop is score or position, got {capacity}, {drop!r}")
    experts, gates = np.array(experts, dtype=np.int64), np.asarray(gates)
    num_tokens, num_experts = gates.shape
    token = np.arange(num_tokens)

    def priority(tokens, chosen):
        return gates[tokens, chosen] if drop == "score" else -tokens

    room = np.full(num_experts, capacity)
    every = np.repeat(token, experts.shape[1])
    kept = _first_come(experts.ravel(), priority(every, experts.ravel()), room).reshape(experts.shape)
    room -= np.bincount(experts[kept], minlength=num_experts)
    if not reroute:
        return experts, kept
    tried = np.zeros((num_tokens, num_experts), dtype=bool)
    np.put_along_axis(tried, experts, True, axis=1)
    homeless = ~kept
    while room.any() and homeless.any():
        tokens = np.flatnonzero(homeless.any(axis=1))
        slot = homeless[tokens].argmax(axis=1)  # one slot of each token at a time
        options = np.where((room > 0) & ~tried[tokens], gates[tokens], -np.inf)
        best = options.argmax(axis=1)
        found = np.isfinite(options[np.arange(len(tokens)), best])
        homeless[tokens[~found]] = False  # nothing left for them: dropped
        tokens, slot, best = tokens[found], slot[found], best[found]
        taken = _first_come(best, priority(tokens, best), room)
        tokens, slot, best = tokens[taken], slot[taken], best[taken]
        experts[tokens, slot], kept[tokens, slot], homeless[tokens, slot] = best, True, False
        tried[tokens, best] = True
        room -= np.bincount(best, minlength=num_experts)
    return experts, kept


def adaptive_capacity(counts, tolerance: float = 0.0) -> int:
    """Smallest capacity that drops at most `tolerance` of a batch's slots; counts [E] ask for each expert.

    With tolerance 0 nothing is dropped and the capacity is what the fullest expert needs (as Tutel with
    capacity_factor 0).
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is a share from 0 to less than 1, got {tolerance}")
    counts = np.asarray(counts)
    low, high = 0, int(counts.max(initial=0))
    while low < high:
        middle = (low + high) // 2
        if np.maximum(counts - middle, 0).sum() <= tolerance * counts.sum():
            high = middle
        else:
            low = middle + 1
    return low


def _first_come(experts, priority, room):
    """bool [n]: which of n slots get into their expert's room [E], by priority, ties by position."""
    order = np.lexsort((-priority, experts))
    ordered = experts[order]
    place = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    taken = np.empty(len(order), dtype=bool)
    taken[order] = place < room[ordered]
    return taken
