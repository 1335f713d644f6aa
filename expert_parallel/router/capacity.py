"""Capacity: at most so many slots of a batch for one expert; the others dropped or sent elsewhere. Numpy only.

Dimensions: T tokens of a batch, E experts, k chosen per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Capacity:
    """A limit of slots per expert and batch. ValueError for options that do not exist.

    factor     of `expert_capacity`; None: adaptive, the smallest limit that drops no more than `tolerance`
    rule       megatron, deepspeed or tutel
    drop       score or position: who keeps a place;  reroute  to the next best expert with room instead
    Decoding one token at a time never meets a limit: no expert is chosen twice for a token.
    """

    factor: float | None = 1.25
    rule: str = "megatron"
    drop: str = "score"
    reroute: bool = False
    tolerance: float = 0.0

    def __post_init__(self):
        self.slots(np.ones(1), 1, 1)
        adaptive_capacity(np.ones(1), self.tolerance)
        limit_slots(np.zeros((0, 1)), np.zeros((0, 1)), 1, self.drop)

    def slots(self, counts, num_tokens: int, top_k: int) -> int:
        """The limit for a batch whose experts were asked for `counts` [E] times."""
        if self.factor is None:
            return adaptive_capacity(counts, self.tolerance)
        return expert_capacity(num_tokens, top_k, len(counts), self.factor, self.rule)


def expert_capacity(num_tokens: int, top_k: int, num_experts: int, factor: float = 1.0, rule: str = "megatron") -> int:
    """Most slots an expert takes of a batch. ValueError for another rule, or a factor that is not positive.

    megatron   ceil(T k / E f)            (Megatron-LM, moe_utils.py)
    deepspeed  max(4, ceil(T k / E f))    (DeepSpeed, sharded_moe.py; min_capacity 4)
    tutel      k int(f ceil(T / E))       (Tutel, fast_dispatch.py)
    """
    if rule not in ("megatron", "deepspeed", "tutel") or not factor > 0:
        raise ValueError(f"capacity is by rule megatron, deepspeed or tutel with a factor over 0, got {rule}, {factor}")
    if rule == "tutel":
        return top_k * int(factor * math.ceil(num_tokens / num_experts))
    return max(4 if rule == "deepspeed" else 0, math.ceil(num_tokens * top_k / num_experts * factor))


def adaptive_capacity(counts, tolerance: float = 0.0) -> int:
    """Smallest capacity that drops at most `tolerance` of a batch's slots; counts [E] ask for each expert.

    With tolerance 0 nothing is dropped and the capacity is what the fullest expert needs (as Tutel with
    capacity_factor 0). ValueError for a tolerance that is no share.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is a share from 0 to less than 1, got {tolerance}")
    counts = np.asarray(counts)
    limits = np.arange(counts.max() + 1)
    dropped = np.maximum(counts[:, None] - limits, 0).sum(axis=0)
    return int((dropped <= tolerance * counts.sum()).argmax())


def limit_slots(experts, gates, capacity: int, drop: str = "score", reroute: bool = False):
    """(experts [T, k], kept bool [T, k]): what is left of a batch's choices under a capacity.

    experts  [T, k];  gates  [T, E], the router's scores
    drop     score     an expert keeps the slots with the highest gate (Megatron "probs")
             position  it keeps the earliest tokens (GShard, section 3.2; Megatron "position")
    reroute  a slot that finds no room goes to the token's next best expert that has room and that it has
             not chosen yet; it is dropped only if there is none
    ValueError for another drop or a capacity below 0.
    """
    if capacity < 0 or drop not in ("score", "position"):
        raise ValueError(f"capacity must not be negative and drop is score or position, got {capacity}, {drop!r}")
    experts, gates = np.array(experts, np.int64), np.asarray(gates)
    num_tokens, num_experts = gates.shape

    def first_come(tokens, wanted):
        """bool [n]: which of n slots get into their expert's room, by priority, ties by position."""
        priority = gates[tokens, wanted] if drop == "score" else -tokens
        order = np.lexsort((-priority, wanted))
        place = np.arange(len(order)) - np.searchsorted(wanted[order], wanted[order])
        taken = np.empty(len(order), bool)
        taken[order] = place < room[wanted[order]]
        return taken

    room = np.full(num_experts, capacity)
    kept = first_come(np.repeat(np.arange(num_tokens), experts.shape[1]), experts.ravel()).reshape(experts.shape)
    room -= np.bincount(experts[kept], minlength=num_experts)
    tried = np.zeros((num_tokens, num_experts), bool)
    np.put_along_axis(tried, experts, True, axis=1)
    homeless = ~kept & reroute
    while room.any() and homeless.any():
        tokens = np.flatnonzero(homeless.any(axis=1))
        slot = homeless[tokens].argmax(axis=1)  # one slot of each token at a time
        options = np.where((room > 0) & ~tried[tokens], gates[tokens], -np.inf)
        best = options.argmax(axis=1)
        found = np.isfinite(options[np.arange(len(tokens)), best])
        homeless[tokens[~found]] = False  # nothing left for them: dropped
        tokens, slot, best = tokens[found], slot[found], best[found]
        taken = first_come(tokens, best)
        tokens, slot, best = tokens[taken], slot[taken], best[taken]
        experts[tokens, slot], kept[tokens, slot], homeless[tokens, slot] = best, True, False
        tried[tokens, best] = True
        room -= np.bincount(best, minlength=num_experts)
    return experts, kept
