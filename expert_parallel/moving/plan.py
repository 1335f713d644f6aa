"""Rebalancing plans: when a new placement repays its pause, and which experts move for it. Numpy only.

Dimensions: L MoE layers, E experts, D devices, k chosen per token.

    watch     a moving average of the expert loads
    trigger   every so many tokens, or balancedness under a threshold
    propose   layer by layer: no change, a few swaps, many, and the same with other copies
    decide    the time it would have saved on the newest tokens, which it was not fitted on, against the
              pause to read the experts that move
What is moved is moved by live.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from ..balance import balancedness
from ..placement import Placement, check_loads
from ..placing.copies import count_copies, device_loads, replicate
from ..placing.search import swap_search, within_nodes

MIN_TOKENS = 64  # since the last look, before balancedness under the threshold says anything
SWAPS = (0, 1, 2, 4, 8, np.inf)  # at most so many in a layer


@dataclass(frozen=True)
class Costs:
    """What a move costs and a slot takes: measure these on the machine at hand.

    expert_bytes      of one expert of one layer
    bytes_per_second  at which experts are read or sent
    seconds_per_slot  that a device computes for one token and one chosen expert
    seconds_per_layer that the change of one device's layer takes besides reading: its arrays are made anew
    side_by_side      devices read at the same time (ranks); False: one process reads for all
    """

    expert_bytes: int
    bytes_per_second: float
    seconds_per_slot: float
    seconds_per_layer: float = 0.0
    side_by_side: bool = False

    def pause(self, old_held, new_held) -> np.ndarray:
        """Seconds [L] for the change from old to new, bool [L, D, E]; 0 for a layer that stays."""
        arrivals = (new_held & ~old_held).sum(axis=2)  # [L, D]
        seconds = arrivals * self.expert_bytes / self.bytes_per_second
        seconds += (new_held != old_held).any(axis=2) * self.seconds_per_layer
        return seconds.max(axis=1) if self.side_by_side else seconds.sum(axis=1)


@dataclass(frozen=True)
class Plan:
    """A new placement, what it costs and what it is expected to save (modelled); the old one, if no move pays."""

    placement: Placement
    moves: np.ndarray  # int [n, 3]: (layer, device, expert) that the device has to read, sorted
    bytes: int
    pause_seconds: float
    gain_seconds: float  # over the horizon
    balancedness_before: float
    balancedness_after: float


def propose(current: Placement, loads, fresh, fresh_tokens: float, costs: Costs, horizon_tokens: int) -> Plan:
    """The best change for each layer alone, by seconds saved over `horizon_tokens` minus the pause.

    loads   [L, E], slots of a mean token: what candidates are fitted on
    fresh   [L, E], the same of `fresh_tokens` other tokens: what gains are judged on, for a search fits noise and
            passing topics too. A gain must show in both and counts as the smaller. Of D devices with m slots per
            token each, the fullest of n tokens seems sqrt(2 ln D) sqrt(m / n) fuller than it is: not counted
    A layer's time is that of its slowest device; copies share a load equally. Slots of a layer stay as many, and
    experts stay in their node where `current` keeps groups in nodes. Where each expert has a copy each keeps one.
    """
    # 1. Other placements: swaps, before and after other copies. A search that does not start from where the experts
    #    are moves more of them: under drifting load it did not pay beside these.
    held, nodes = current.held, current.metadata.get("num_nodes", 1)
    starts = [held]
    has_copy = held.sum(axis=1) > 1
    if has_copy.any() and not has_copy.all():  # all: any one device can be lost, and that stays so
        starts.append(within_nodes(loads, held, nodes, copies_of_the_hot))
    searches = [partial(swap_search, most_swaps=most) for most in SWAPS]
    candidates = [within_nodes(loads, start, nodes, search) for start in starts for search in searches]
    # 2. The best for each layer.
    noise = np.sqrt(2 * np.log(current.num_devices) * loads.sum(axis=1) / current.num_devices / fresh_tokens)
    before = device_loads(loads, held).max(axis=1), device_loads(fresh, held).max(axis=1) - noise
    best, best_gain, best_net = held.copy(), np.zeros(len(held)), np.zeros(len(held))
    for candidate in candidates:
        after = [device_loads(judge, candidate).max(axis=1) for judge in (loads, fresh)]
        gain = np.subtract(before, after).min(axis=0) * horizon_tokens * costs.seconds_per_slot
        net = gain - costs.pause(held, candidate)
        better = net > best_net
        best[better], best_gain[better], best_net[better] = candidate[better], gain[better], net[better]
    # 3. What it comes to.
    moves, placement = np.argwhere(best & ~held), current
    if len(moves):
        lasting = {key: current.metadata[key] for key in current.metadata if not key.startswith(("fitted", "balance"))}
        placement = Placement(best, current.strategy, {**lasting, "rebalanced": True})
    pause, gain = float(costs.pause(held, best).sum()), float(best_gain.sum())
    evenness = [balancedness(each.device_loads(fresh)) for each in (current, placement)]
    return Plan(placement, moves, len(moves) * costs.expert_bytes, pause, gain, *evenness)


def in_steps(old, new, costs: Costs, longest: float) -> list[np.ndarray]:
    """[S] of bool [L, D, E], which lead from old to new; each takes at most `longest` seconds (modelled), or moves one.

    Before an expert leaves a device of a layer all that come there have come: every expert is on one all the time.
    """
    steps, spent, now, then = [], 0.0, old.copy(), old.copy()  # spent: seconds of layers that `then` has changed whole
    for l in np.flatnonzero((old != new).any(axis=(1, 2))):
        come = [(device, [expert]) for device, expert in np.argwhere(new[l] & ~old[l])]
        leave = [(device, np.flatnonzero(gone)) for device, gone in enumerate(old[l] & ~new[l]) if gone.any()]
        for device, experts in come + leave:
            kept = then[l].copy()
            then[l, device, experts] = new[l, device, experts]
            if spent + costs.pause(now[[l]], then[[l]]).sum() > longest and (spent or (kept != now[l]).any()):
                changed, then[l] = then[l].copy(), kept
                steps.append(then.copy())
                spent, now, then[l] = 0.0, then.copy(), changed
        spent += costs.pause(now[[l]], then[[l]]).sum()
    return [*steps, then]


def copies_of_the_hot(loads, held) -> np.ndarray:
    """`held` bool [L, D, E] with copies of the experts that are hot now in place of copies of those that were.

    Where loads drift and a move takes as long as 50 slots, an eighth of the time lost is saved by it (test_plan.py).
    """
    held = held.copy()
    num_devices, num_experts = held.shape[1:]
    for load, of_layer in zip(loads, held, strict=True):
        copies = of_layer.sum(axis=0)
        wanted = count_copies(replicate(load[None], copies.sum() - num_experts, num_devices), num_experts)[0]
        missing = np.repeat(np.arange(num_experts), np.maximum(wanted - copies, 0))
        for expert in missing[np.argsort(-load[missing], kind="stable")]:
            devices, spare = np.nonzero(of_layer & (copies > wanted) & ~of_layer[:, [expert]])
            if len(devices):
                share = load / copies
                emptiest = ((of_layer @ share)[devices] - share[spare]).argmin()
                of_layer[devices[emptiest], [spare[emptiest], expert]] = False, True
                copies[[spare[emptiest], expert]] += -1, 1
    return held


@dataclass
class Rebalancer:
    """Watches loads and says when to move what. A plan is fitted on the average up to the look before and
    judged on the tokens since; so the first look only learns.

    every_tokens    looks that often
    threshold       looks too when the balancedness since the last look is under it (after MIN_TOKENS)
    half_life       of the moving average, in tokens: after so many a token counts half
    horizon_tokens  over which a gain must repay the pause; None: until the next look

    `looks` has the plans that were carried out and those that were not; `average`, the slots [L, E] of a mean token.
    """

    placement: Placement
    costs: Costs
    every_tokens: int = 512
    threshold: float | None = None
    half_life: float = 512
    horizon_tokens: int | None = None

    def __post_init__(self):
        self.looks = []
        self.average, self._weight = 0.0, 0.0
        self._fresh, self._fresh_tokens = 0, 0  # slots [L, E] since the last look

    def learn(self, loads, tokens: int) -> None:
        """Slots [L, E] of `tokens` tokens that came before, as from a trace; it counts as if they came evenly."""
        keep = 0.5 ** (tokens / self.half_life)
        old, new = keep * self._weight, 1 - keep
        self.average = (old * self.average + new * check_loads(loads) / tokens) / (old + new)
        self._weight = old + new

    def observe(self, loads, tokens: int) -> Plan | None:
        """Slots [L, E] of the last tokens; a plan if it is time and a change would pay, else None."""
        self._fresh, self._fresh_tokens = self._fresh + check_loads(loads), self._fresh_tokens + tokens
        fresh, tokens = self._fresh, self._fresh_tokens
        uneven = tokens >= MIN_TOKENS and balancedness(self.placement.device_loads(fresh)) < (self.threshold or 0)
        if tokens < self.every_tokens and not uneven:
            return None
        plan, horizon = None, self.horizon_tokens or self.every_tokens
        if self._weight:
            plan = propose(self.placement, self.average, fresh / tokens, tokens, self.costs, horizon)
            self.looks.append(plan)
            self.placement = plan.placement
        self.learn(fresh, tokens)
        self._fresh, self._fresh_tokens = 0, 0
        return plan if plan and len(plan.moves) else None
