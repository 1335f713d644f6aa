"""Copies: how many of which expert, and what that can come to. Numpy only.

Dimensions: L layers, E experts, D devices, R redundant copies, S = E + R slots of a layer.
"""

from __future__ import annotations

import numpy as np


def replicate(loads, redundant: int, num_devices: int, target=0) -> np.ndarray:
    """Expert of each slot, int [L, S]: one each, then R times one more for the largest load per copy (EPLB).

    No expert gets more than D copies.

    target  [L]; once no copy has more load than this, copies go to cold experts, where they do no harm:
            few copies near a device's mean load can be packed better than many of half that
    """
    loads = np.asarray(loads, dtype=np.float64)
    copies = np.ones(loads.shape, dtype=np.int64)
    rows, target = np.arange(len(loads)), np.broadcast_to(target, len(loads))
    share = loads.copy()
    slots = np.empty((len(loads), loads.shape[1] + redundant), dtype=np.int64)
    slots[:, : loads.shape[1]] = np.arange(loads.shape[1])
    for slot in range(loads.shape[1], slots.shape[1]):
        chosen = np.where(copies < num_devices, share, -1).argmax(axis=1)
        done = share[rows, chosen] <= target
        if done.any():
            cold = np.where(copies < num_devices, loads * copies, np.inf).argmin(axis=1)
            chosen = np.where(done, cold, chosen)
        copies[rows, chosen] += 1
        share[rows, chosen] = loads[rows, chosen] / copies[rows, chosen]
        slots[:, slot] = chosen
    return slots


def count_copies(slots, num_experts: int) -> np.ndarray:
    """Copies of each expert, int [L, E], for the experts of slots [L, S]."""
    offset = np.arange(len(slots))[:, None] * num_experts
    return np.bincount((slots + offset).ravel(), minlength=len(slots) * num_experts).reshape(len(slots), -1)


def device_loads(loads, held) -> np.ndarray:
    """[L, D]; an expert's load [L, E] shared equally by its holders, bool [L, D, E]."""
    return np.matmul(held, (loads / held.sum(axis=1))[..., None])[..., 0]


def lower_bound(loads, num_devices: int, redundant: int = 0) -> np.ndarray:
    """[L]; load that the fullest device of no placement can go below, for expert loads [L, E].

    max(mean device load, largest load per copy), where `redundant` copies were given, one after the other, to the
    expert with the most load per copy: nothing makes the largest share smaller. The bound is not always attainable.
    """
    loads = np.asarray(loads, dtype=np.float64)
    copies = count_copies(replicate(loads, redundant, num_devices), loads.shape[1])
    return np.maximum(loads.sum(axis=1) / num_devices, (loads / copies).max(axis=1))


def crowding(loads, slots, num_devices: int) -> np.ndarray:
    """[L]; how full the fullest of D devices becomes with the experts of slots [L, S], judged quickly.

    The larger of two figures: of the jD + 1 largest copies j + 1 share a device (a bound that holds), and
    the experts with the largest copies dealt out, each expert's to the emptiest devices, slots not counted.
    """
    copies = count_copies(slots, loads.shape[1])
    share = loads / copies
    largest = -np.sort(-np.take_along_axis(share, slots, axis=1), axis=1)
    bounds = [
        largest[:, j * num_devices - j : j * num_devices + 1].sum(axis=1) for j in range(slots.shape[1] // num_devices)
    ]
    order = np.argsort(-share, axis=1)[:, : 2 * num_devices]
    share, copies = np.take_along_axis(share, order, axis=1), np.take_along_axis(copies, order, axis=1)
    load = np.zeros((len(loads), num_devices))
    for expert in range(order.shape[1]):
        load.sort(axis=1)
        load += np.where(np.arange(num_devices) < copies[:, [expert]], share[:, [expert]], 0)
    return np.max([load.max(axis=1), *bounds], axis=0)


def exchange_copies(loads, held, most: int = 64) -> np.ndarray:
    """`held` bool [L, D, E] after exchanges of a copy for a copy of another expert, until none helps.

    The best exchange each time that relieves the fullest device: one of its own copies for any expert, or any
    device's copy for an expert of the fullest, which is then shared by more. Slots per device stay.
    """
    held = held.copy()
    for _ in range(most):
        copies, load = held.sum(axis=1), device_loads(loads, held)
        full = load.argmax(axis=1)
        of_full = held[np.arange(len(held)), full]
        changed = False
        for l in np.flatnonzero((copies > 1).any(axis=1)):
            better = _best_exchange(loads[l], held[l], copies[l], load[l], full[l], of_full[l])
            if better is not None:
                device, gone, come = better
                held[l, device, [gone, come]] = False, True
                changed = True
        if not changed:
            break
    return held


def _best_exchange(loads, held, copies, load, full, of_full):
    """(device, expert that goes, expert that comes) of one layer, or None; arrays as in `exchange_copies`."""
    gone_more = np.where(copies > 1, loads / np.maximum(copies - 1, 1) - loads / copies, np.inf)  # to its other holders
    come_less = loads / copies - loads / (copies + 1)  # from its holders
    device, gone, come = np.nonzero(
        (held & (copies > 1))[:, :, None]
        & ~held[:, None, :]
        & (of_full[None, None, :] | (np.arange(len(held)) == full)[:, None, None])
    )
    if not len(device):
        return None
    after = load - held[:, come].T * come_less[come][:, None] + held[:, gone].T * gone_more[gone][:, None]
    each = np.arange(len(device))
    after[each, device] = load[device] - loads[gone] / copies[gone] + loads[come] / (copies[come] + 1)
    # The fullest counts most, the next ones a little: plateaus are left behind.
    rough = ((after / load.mean()) ** 16).sum(axis=1)
    best = rough.argmin()
    if rough[best] >= ((load / load.mean()) ** 16).sum() * (1 - 1e-9):
        return None
    return device[best], gone[best], come[best]
