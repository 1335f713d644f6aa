"""Survival: which experts go with lost devices, how many losses a placement survives, and the way back. Numpy only.

Dimensions: L MoE layers, D devices, E experts, m devices lost at once. A placement is `held`, bool [L, D, E].

    an expert is gone         where all devices that hold it are lost
    a device without experts  counts as lost: so losses add up, one after the other
Nothing here draws random numbers or asks anyone, so that every rank comes to the same placement.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb, prod

import numpy as np

from ..placement import Placement, check_loads
from ..placing.search import within_nodes
from .dealing import deal

MOST_CELLS = 1 << 22  # of D ^ m: sets of holders that are counted one by one


def without(held, lost) -> np.ndarray:
    """`held` where the devices in `lost` hold nothing; ValueError naming a device that is not there."""
    for device in lost:
        if not 0 <= device < held.shape[1]:
            raise ValueError(f"device {device} cannot be lost: there are 0 to {held.shape[1] - 1}")
    left = np.array(held, bool)
    left[:, list(lost)] = False
    return left


def gone(held, lost=()) -> np.ndarray:
    """bool [L, E]: experts that no device holds any more."""
    return ~without(held, lost).any(axis=1)


def living(held) -> np.ndarray:
    """bool [D]: devices that hold an expert of any layer."""
    return held.any(axis=(0, 2))


# --- what can be lost -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Survival:
    """What is left after m devices are lost at once, over all sets of m living devices; computed, nothing is drawn.

    lost           m
    sets           how many sets there are, C(D, m)
    unhurt         share of the sets after which every expert of every layer has a holder
    if_at_random   that share, were the holders of each expert a random set of as many (modelled)
    layers_unhurt  as `unhurt`, of one layer; mean over layers
    gone_mean      experts of all layers that are gone, mean over the sets. Where they lie does not count for it:
                   an expert with c holders is gone in C(m, c) / C(D, c) of them
    gone_worst     the same of the worst set
    worst          the devices of that set, the first of such
    """

    lost: int
    sets: int
    unhurt: float
    if_at_random: float
    layers_unhurt: float
    gone_mean: float
    gone_worst: int
    worst: tuple[int, ...]


def survivors(held, losses: int = 2) -> list[Survival]:
    """What is left after 1, 2, ... `losses` devices are lost at once, as far as there are so many.

    Experts are counted by the set of their holders, so a set of lost devices costs as many look-ups as it has
    subsets: with 128 devices and 48 layers two losses take 0.03 s, three 0.5 s.
    Raises ValueError where D ^ losses is more than four million.
    """
    alive = np.flatnonzero(living(held))
    held, num_devices, found = held[:, alive], len(alive), []
    for m in range(1, min(losses, num_devices) + 1):
        if num_devices**m > MOST_CELLS:
            raise ValueError(f"{m} losses of {num_devices} devices are {comb(num_devices, m):,} sets: ask for fewer")
        sets = np.array(list(combinations(range(num_devices), m)))
        total, hurt = np.zeros(len(sets), np.int64), 0
        for of_layer in held:
            lost = np.zeros(len(sets), np.int64) + (~of_layer.any(axis=0)).sum()
            for size in range(1, m + 1):
                counts = _by_holders(of_layer, size)
                for columns in combinations(range(m), size):
                    lost += counts[tuple(sets[:, columns].T)]
            total, hurt = total + lost, hurt + (lost > 0).mean()
        worst, experts = int(total.argmax()), np.bincount(held.sum(axis=1).ravel())  # by how many hold them
        found.append(
            Survival(
                lost=m,
                sets=len(sets),
                unhurt=float((total == 0).mean()),
                if_at_random=prod((1 - comb(m, c) / comb(num_devices, c)) ** int(n) for c, n in enumerate(experts)),
                layers_unhurt=float(1 - hurt / len(held)),
                gone_mean=float(total.mean()),
                gone_worst=int(total[worst]),
                worst=tuple(alive[sets[worst]].tolist()),
            )
        )
    return found


def _by_holders(of_layer, size: int) -> np.ndarray:
    """int [D, ...] with `size` axes: experts whose holders are just these devices, in ascending order."""
    counts = np.zeros((len(of_layer),) * size, np.int64)
    holders = np.nonzero(of_layer.T[of_layer.sum(axis=0) == size])[1].reshape(-1, size)
    np.add.at(counts, tuple(holders.T), 1)
    return counts


# --- copies, and the way back -----------------------------------------------------------------------------------


def protected(placement: Placement, loads=None) -> Placement:
    """`placement` with the fewest copies with which any one device can be lost and every expert lives.

    loads  [L, E] that devices are levelled for, before a loss and after any one; None: every expert alike

    That is one more for each expert with one holder, and no more: such an expert is gone with its holder, and what
    one copy is of saves no other expert. Slot counts of devices are as even as what was there lets them be, and no
    device holds an expert twice. Copies stay in their node where a placement has nodes of several devices.
    Raises ValueError for one device.
    """
    if placement.num_devices == 1:
        raise ValueError("1 device: a copy that outlives it needs another one, take at least 2 devices")
    loads = _loads_of(placement.held, loads)
    metadata = dict(placement.metadata)
    if metadata.get("num_nodes") == placement.num_devices:  # a copy has to leave its node
        metadata = {key: value for key, value in metadata.items() if key not in ("num_nodes", "scope")}
    held = within_nodes(loads, placement.held, metadata.get("num_nodes", 1), _second_holders)
    return Placement(held, placement.strategy, metadata)


def _second_holders(loads, held) -> np.ndarray:
    return deal(held, held.sum(axis=1) == 1, loads, np.ones(held.shape[1], bool))


def repair(held, lost, loads=None) -> np.ndarray:
    """bool [L, D, E]: what is held without `lost`, and experts that are gone dealt out to the devices that live.

    loads  [L, E] that devices are levelled for; None: every expert alike

    What survivors hold stays where it is; slot counts are as even as that lets them be. An expert that has a holder
    gets no copy for one that is lost. Raises ValueError where no device is left.
    """
    left = without(held, lost)
    alive = living(left)
    if not alive.any():
        raise ValueError(f"all {held.shape[1]} devices are lost: none is left to take their experts")
    return deal(left, gone(left), _loads_of(held, loads), alive)


@dataclass(frozen=True)
class Arrivals:
    """What devices have to read for a new placement.

    experts       [D]; of all layers
    bytes         of all of them
    side_by_side  seconds, each device reading its own at the same time (modelled)
    in_turn       seconds, one after the other, as where one disk or one process reads for all (modelled)
    """

    experts: np.ndarray
    bytes: int
    side_by_side: float
    in_turn: float


def arrivals(before, after, expert_bytes: int, bytes_per_second: float) -> Arrivals:
    """From `before` to `after`, both bool [L, D, E], for experts of so many bytes, read at such a rate."""
    experts = (after & ~before).sum(axis=(0, 2))
    seconds = experts * expert_bytes / bytes_per_second
    return Arrivals(experts, int(experts.sum()) * expert_bytes, float(seconds.max()), float(seconds.sum()))


def _loads_of(held, loads) -> np.ndarray:
    shape = [held.shape[0], held.shape[2]]
    loads = np.ones(shape) if loads is None else check_loads(loads)
    if list(loads.shape) != shape:
        raise ValueError(f"loads are {list(loads.shape)}, the placement is for {shape} [layers, experts]")
    return loads
