"""Rebalancing plans: when a new placement repays its pause, and which experts move for it. Numpy only.

Dimensions: L MoE layers, E experts, D devices, k chosen per token.

    watch     a moving average of the expert loads (LoadAverage)
    trigger   every so many tokens, or balancedness under a threshold
    propose   layer by layer: no change, a few swaps, many, or a placement searched anew
    decide    the time it would have saved on the newest tokens, which it was not fitted on, against the
              pause to read the experts that move
What is moved is moved by live.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..balance import balancedness
from ..placement import Placement, check_loads
from ..placing.copies import count_copies, device_loads, replicate
from ..placing.search import join_nodes, node_problems, spread, swap_search


@dataclass(frozen=True)
class Move:
    """One expert of one layer read by `destination`, which does not hold it; `source` did all along."""

    layer: int
    expert: int
    source: int
    destination: int


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

    def __post_init__(self):
        if not self.bytes_per_second > 0 or min(self.expert_bytes, self.seconds_per_slot, self.seconds_per_layer) < 0:
            raise ValueError(f"costs are not negative and bytes per second positive, got {self}")

    def pause(self, old_held, new_held) -> np.ndarray:
        """Seconds [L] for the change from old to new, bool [L, D, E]; 0 for a layer that stays."""
        arrivals = (new_held & ~old_held).sum(axis=2)  # [L, D]
        seconds = arrivals * self.expert_bytes / self.bytes_per_second
        seconds += (new_held != old_held).any(axis=2) * self.seconds_per_layer
        return seconds.max(axis=1) if self.side_by_side else seconds.sum(axis=1)


@dataclass(frozen=True)
class Plan:
    """A new placement, what it costs and what it is expected to save (modelled)."""

    placement: Placement
    moves: list[Move]
    bytes: int
    pause_seconds: float
    gain_seconds: float  # over the tokens until the next look
    balancedness_before: float
    balancedness_after: float

    @property
    def worthwhile(self) -> bool:
        return bool(self.moves) and self.gain_seconds > self.pause_seconds


class LoadAverage:
    """Expert loads [L, E] of a mean token; older tokens count half after each `half_life` tokens."""

    def __init__(self, half_life: float):
        if not half_life > 0:
            raise ValueError(f"a half-life is a positive number of tokens, got {half_life}")
        self.half_life = half_life
        self._sum, self._weight = 0.0, 0.0

    def add(self, loads, tokens: int) -> None:
        """Slots [L, E] that the last `tokens` tokens sent to each expert."""
        loads = check_loads(loads)
        if isinstance(self._sum, np.ndarray) and self._sum.shape != loads.shape:
            raise ValueError(f"loads were {list(self._sum.shape)} [layers, experts], now {list(loads.shape)}")
        if tokens < 1:
            return
        keep = 0.5 ** (tokens / self.half_life)
        # As if the tokens came evenly: the newest count whole, the first of them `keep`.
        fresh = (1 - keep) / (tokens * np.log(2) / self.half_life)
        self._sum = keep * self._sum + fresh * loads
        self._weight = keep * self._weight + fresh * tokens

    @property
    def loads(self) -> np.ndarray | None:
        """Slots [L, E] of a mean token; None before the first."""
        return self._sum / self._weight if self._weight else None


def moves_between(old: Placement, new: Placement) -> list[Move]:
    """Experts that devices need and lack; layer by layer, each from the first device that held it."""
    if old.held.shape != new.held.shape:
        raise ValueError(f"placements of {list(old.held.shape)} and {list(new.held.shape)} [layers, devices, experts]")
    home = old.held.argmax(axis=1)
    arrivals = np.argwhere(new.held & ~old.held)  # sorted by layer
    return [Move(int(l), int(e), int(home[l, e]), int(d)) for l, d, e in arrivals]


def renumber(old_held, new_held) -> np.ndarray:
    """`new_held` with its devices renumbered so that they keep much of what they hold; devices are alike."""
    overlap = np.matmul(new_held.astype(np.int64), old_held.transpose(0, 2, 1).astype(np.int64))  # [L, new, old]
    result = np.empty_like(new_held)
    rows = np.arange(len(new_held))
    num_devices = new_held.shape[1]
    for _ in range(num_devices):  # the pair with the largest overlap, then the next
        new, old = np.divmod(overlap.reshape(len(overlap), -1).argmax(axis=1), num_devices)
        result[rows, old] = new_held[rows, new]
        overlap[rows, new] = overlap[rows, :, old] = -1
    return result


def propose(
    current: Placement,
    loads,
    costs: Costs,
    horizon_tokens: int,
    fresh=None,
    fresh_tokens: int | None = None,
) -> Plan:
    """The best change for each layer alone, by seconds saved over `horizon_tokens` minus the pause.

    loads   [L, E], slots of a mean token (LoadAverage.loads): what candidates are fitted on
    fresh   [L, E], the same of `fresh_tokens` other tokens: what gains are judged on, for a search fits
            noise and passing topics too. Of D devices with m slots per token each, the fullest of n tokens
            seems sqrt(2 ln D) sqrt(m / n) fuller than it is: that much of a gain is not counted.
            A gain must show in both and counts as the smaller. None: `loads` are taken as exact
    A layer's time is that of its slowest device; copies share a load equally. Considered are: to stay;
    1, 2, 4, 8 and any number of swaps; copies of other experts, with and without swaps; all searched anew.
    Slots per device and layer stay, and experts stay in their node where `current` keeps groups in nodes.
    """
    loads = check_loads(loads)
    if loads.shape != (current.num_layers, current.num_experts):
        raise ValueError(f"loads are {list(loads.shape)}, it places {[current.num_layers, current.num_experts]}")
    if horizon_tokens < 1:
        raise ValueError(f"the horizon is a number of tokens from 1 up, got {horizon_tokens}")
    held = current.held
    nodes = current.metadata.get("num_nodes", 1)
    if nodes > 1:
        ids, local_loads, local = node_problems(loads, held, nodes)
        candidates = [join_nodes(ids, part, held.shape) for part in _candidates(local_loads, local)]
    else:
        candidates = _candidates(loads, held)
    judges, noise = [loads], [0.0]
    if fresh is not None:
        judges.append(check_loads(fresh))
        mean = loads.sum(axis=1) / current.num_devices
        noise.append(np.sqrt(2 * np.log(current.num_devices) * mean / fresh_tokens))
    before = [device_loads(of, held).max(axis=1) - less for of, less in zip(judges, noise, strict=True)]
    best, best_gain, best_net = held.copy(), np.zeros(len(held)), np.zeros(len(held))
    for candidate in candidates:
        after = [device_loads(of, candidate).max(axis=1) for of in judges]
        gain = np.subtract(before, after).min(axis=0) * horizon_tokens * costs.seconds_per_slot
        net = gain - costs.pause(held, candidate)
        better = net > best_net
        best[better], best_gain[better], best_net[better] = candidate[better], gain[better], net[better]
    placement = Placement(best, current.strategy, {**current.metadata, "rebalanced": True})
    moves = moves_between(current, placement)
    return Plan(
        placement,
        moves,
        bytes=len(moves) * costs.expert_bytes,
        pause_seconds=float(costs.pause(held, best).sum()),
        gain_seconds=float(best_gain.sum()),
        balancedness_before=balancedness(current.device_loads(judges[-1])),
        balancedness_after=balancedness(placement.device_loads(judges[-1])),
    )


def _candidates(loads, held) -> list:
    """Other placements bool [L, D, E] that might pay; layer by layer each for itself."""
    num_devices, num_experts = held.shape[1:]
    candidates = [swap_search(loads, held, most) for most in (1, 2, 4, 8, None)]
    if (held.sum(axis=1) > 1).any():
        other_copies = _recopy(loads, held)
        candidates += [other_copies, *(swap_search(loads, other_copies, most) for most in (2, 4, None))]
    counts = held.sum(axis=2)
    slots = set(counts.sum(axis=1).tolist())
    if (counts.max(axis=1) - counts.min(axis=1) <= 1).all() and len(slots) == 1:
        candidates.append(renumber(held, spread(loads, num_devices, slots.pop() - num_experts)))
    return candidates


def _recopy(loads, held):
    """Copies of the experts that are hot now in place of copies of those that were; devices keep their counts."""
    held = held.copy()
    num_devices = held.shape[1]
    for of_layer, load in zip(held, loads, strict=True):
        have = of_layer.sum(axis=0)
        want = count_copies(replicate(load[None], int(have.sum()) - len(load), num_devices), len(load))[0]
        for expert in np.argsort(-load, kind="stable"):
            while have[expert] < want[expert]:
                spare = of_layer & (have > want) & ~of_layer[:, [expert]]  # [D, E]
                if not spare.any():
                    break
                full = np.where(spare.any(axis=1), of_layer @ (load / have), np.inf)
                device = full.argmin()
                gone = np.where(spare[device], load, np.inf).argmin()
                of_layer[device, [gone, expert]] = False, True
                have[[gone, expert]] += -1, 1
    return held


@dataclass
class Rebalancer:
    """Watches loads and says when to move what. A plan is fitted on the average up to the look before and
    judged on the tokens since; so the first look only learns.

    every_tokens    looks that often
    threshold       looks too when the balancedness since the last look is under it (after MIN_TOKENS)
    half_life       of the moving average, in tokens
    horizon_tokens  over which a gain must repay the pause; None: until the next look
    """

    placement: Placement
    costs: Costs
    every_tokens: int = 512
    threshold: float | None = None
    half_life: float = 512
    horizon_tokens: int | None = None
    looks: list[Plan] = field(default_factory=list)  # those that were carried out, and those that were not

    MIN_TOKENS = 64

    def __post_init__(self):
        if self.every_tokens < 1:
            raise ValueError(f"rebalancing every {self.every_tokens} tokens: needs at least 1")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"a balancedness threshold lies between 0 and 1, got {self.threshold}")
        self._average = LoadAverage(self.half_life)
        self._fresh, self._since = 0, 0

    def learn(self, loads, tokens: int) -> None:
        """Slots [L, E] of tokens that came before, as from a trace."""
        self._average.add(loads, tokens)

    def observe(self, loads, tokens: int) -> Plan | None:
        """Slots [L, E] of the last tokens; a plan if it is time and a change would pay, else None."""
        self._fresh = self._fresh + check_loads(loads)
        self._since += tokens
        if not self._due():
            return None
        known, fresh, tokens = self._average.loads, self._fresh, self._since
        self._average.add(fresh, tokens)
        self._fresh, self._since = 0, 0
        if known is None:
            return None
        horizon = self.horizon_tokens or self.every_tokens
        plan = propose(self.placement, known, self.costs, horizon, fresh / tokens, tokens)
        self.looks.append(plan)
        if not plan.worthwhile:
            return None
        self.placement = plan.placement
        return plan

    def _due(self):
        if self._since >= self.every_tokens:
            return True
        if self.threshold is None or self._since < self.MIN_TOKENS:
            return False
        return balancedness(self.placement.device_loads(self._fresh)) < self.threshold
