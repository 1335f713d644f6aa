"""Which experts stay in memory: the cache of a layer, by numbers alone.

Dimensions: T tokens, L layers, D devices, E experts, k chosen per token, S steps.

A step wants a set of experts at once: one token's k in decoding, all that a prompt chose in prefill. Those that are
here are hits, each of the others is a miss and takes the place of the one with the least claim to it:

    lru     that was used longest ago                 lfu     that was used in fewest steps, ever
    aging   lfu whose counts halve every HALVED steps  pinned  lru, but the hottest of a trace never go
    belady  whose next use is furthest ahead: no policy can miss less, and none can know it (Belady, A Study of
            Replacement Algorithms for a Virtual-Storage Computer, IBM Systems Journal 1966). The bound.

Equal claims: the one used longest ago goes, then the one of the lowest number. A step that wants more than there is
room for is served in waves. A running cache and the replay (replay.py) are the same functions; only there they are
compiled, which costs memory and seconds that a run has better use for.
"""

from __future__ import annotations

import math

import numpy as np

from . import POLICIES, PREFETCH
from .budget import rooms

HALVED = 64  # steps
KEPT = {"lru": 1.0, "lfu": 1.0, "aging": 0.5 ** (1 / HALVED), "pinned": 1.0}  # of a count, from step to step
GAIN = {"lru": 0.0, "lfu": 1.0, "aging": 1.0, "pinned": 0.0}  # of an expert's claim by a use
NOWHERE = NOBODY = -1


def take_in(wanted, place, held, claim, used, come, row, wave):
    """Serve `wanted` [n]: into `come` the experts in their order, into `row` the place of each, into `wave` its wave.

    place [E], the place of each expert or NOWHERE, and held [room], the expert of each place or NOBODY, are changed;
    claim [E] and used [E], the step of the last use, say who goes. Returns the hits, which come first.
    """
    # 1. First those that are here, then the others, the strongest claim last, so that it is here in the end.
    hits = 0
    for expert in wanted:
        if place[expert] >= 0:
            come[hits] = expert
            hits += 1
    n = hits
    for expert in wanted:
        if place[expert] < 0:
            at = n
            while at > hits and claim[come[at - 1]] > claim[expert]:
                come[at] = come[at - 1]
                at -= 1
            come[at] = expert
            n += 1
    # 2. Each that is not here takes a free place, or that of the least claim outside its wave.
    first = 0  # of the wave
    for at in range(n):
        if at - first == len(held):
            first = at
        wave[at] = first
        expert = come[at]
        if place[expert] < 0:
            worst = -1
            for here in range(len(held)):
                other = held[here]
                if other == NOBODY:
                    worst = here
                    break
                if worst >= 0 and claim[other] > claim[held[worst]]:
                    continue
                if worst >= 0 and claim[other] == claim[held[worst]]:
                    rival = held[worst]
                    if used[other] > used[rival] or (used[other] == used[rival] and other > rival):
                        continue
                needed = False
                for mate in range(first, at):
                    needed |= row[mate] == here
                if not needed:
                    worst = here
            if held[worst] != NOBODY:
                place[held[worst]] = NOWHERE
            held[worst] = expert
            place[expert] = worst
        row[at] = place[expert]
    return hits


def use(wanted, claim, used, step, kept, gain):
    """Note that these experts are used in this step."""
    if kept < 1:
        for expert in range(len(claim)):
            claim[expert] *= kept
    for expert in wanted:
        claim[expert] += gain
        used[expert] = step


class Cache:
    """The experts of a layer that are in memory, of E, in so many places; starts empty.

    room    places, 1 to E
    policy  one of POLICIES
    pinned  experts that never go once they are here, fewer than there is room for
    """

    def __init__(self, num_experts: int, room: int, policy: str = "aging", pinned=()):
        self.policy, self.steps = policy, 0
        self.place, self.held = [NOWHERE] * num_experts, [NOBODY] * int(room)
        self.claim, self.used = [0.0] * num_experts, [-1] * num_experts
        for expert in pinned:
            self.claim[expert] = math.inf
        self.hits = self.misses = 0

    def step(self, wanted) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """(experts, hits first; the place of each; its wave; number of hits) for ascending `wanted` of a step."""
        use(wanted, self.claim, self.used, self.steps, KEPT[self.policy], GAIN[self.policy])
        come, row, wave, hits = self.bring(wanted)
        self.steps, self.hits, self.misses = self.steps + 1, self.hits + hits, self.misses + len(wanted) - hits
        return come, row, wave, hits

    def bring(self, wanted) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """As `step`, ahead of a use: neither a use nor hits and misses are counted."""
        wanted = list(map(int, wanted))
        come, row, wave = [0] * len(wanted), [0] * len(wanted), [0] * len(wanted)
        hits = take_in(wanted, self.place, self.held, self.claim, self.used, come, row, wave)
        return np.array(come, np.int64), np.array(row, np.int64), np.array(wave, np.int64), hits


def make_caches(held: np.ndarray, devices, expert_bytes, budget, policy="aging", trace=None, prefetch="none"):
    """list [L] of {device: Cache} for the devices that are here; None where all experts of all fit.

    held    bool [L, D, E];  expert_bytes, budget  see budget.py
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
    if trace is not None and not len(trace):
        raise ValueError("the trace has no tokens: it says nothing of what is hot, or of what follows what")
    counts = held.sum(axis=2)
    places = np.stack([rooms(budget, expert_bytes, count) for count in counts.T], axis=1)  # [L, D]
    if (places == counts).all():  # of all devices, also those of other ranks, which must decide alike
        return None
    caches = [{} for _ in held]
    for device in devices:
        pinned = [()] * len(held)
        if policy == "pinned":
            pinned = hottest(np.where(held[:, device], trace.loads(), -1), places[:, device], trace.experts.shape[2])
        for l, layer in enumerate(caches):
            layer[device] = Cache(held.shape[2], places[l, device], policy, pinned[l])
    return caches


def hottest(loads: np.ndarray, places, top_k: int) -> list[np.ndarray]:
    """By layer the experts to pin: those of most load [L, E], but k places stay for what a token wants besides."""
    order = np.argsort(-loads, axis=1, kind="stable")
    return [order[l, : max(0, room - top_k)] for l, room in enumerate(np.broadcast_to(places, len(loads)))]
