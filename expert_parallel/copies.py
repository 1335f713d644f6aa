"""Copies: how many of which expert, and how good a choice of them can be. Numpy only.

Dimensions: L layers, E experts, D devices, R redundant copies, S = E + R slots of a layer, C slots of a device.
"""

from __future__ import annotations

import numpy as np


def replicate(loads, redundant: int, num_devices: int, target=0) -> np.ndarray:
    """Expert of each slot, int [L, S]: one each, then R times one more for the largest load per copy.

    No expert gets more than D copies.

    target  [L]; once no copy has more load than this, copies go to cold experts, where they do no harm:
            few copies near a device's mean load can be packed better than many of half that
    """
    loads = np.asarray(loads, dtype=np.float64)
    copies = np.ones(loads.shape, dtype=np.int64)
    rows = np.arange(len(loads))
    target = np.broadcast_to(target, len(loads))
    share = loads.copy()
    slots = np.empty((len(loads), loads.shape[1] + redundant), dtype=np.int64)
    slots[:, : loads.shape[1]] = np.arange(loads.shape[1])
    for slot in range(loads.shape[1], slots.shape[1]):
        free = np.where(copies < num_devices, share, -1)
        chosen = free.argmax(axis=1)
        done = free[rows, chosen] <= target
        if done.any():
            cold = np.where(copies < num_devices, share, np.inf).argmin(axis=1)
            chosen = np.where(done, cold, chosen)
        copies[rows, chosen] += 1
        share[rows, chosen] = loads[rows, chosen] / copies[rows, chosen]
        slots[:, slot] = chosen
    return slots


def count_copies(slots, num_experts: int) -> np.ndarray:
    """Copies of each expert, int [L, E], for the experts of slots [L, S]."""
    offset = np.arange(len(slots))[:, None] * num_experts
    return np.bincount((slots + offset).ravel(), minlength=len(slots) * num_experts).reshape(len(slots), -1)


def device_times(loads, held, speed=1.0) -> np.ndarray:
    """[L, D]: load over speed, an expert's load shared equally by its copies."""
    shares = loads / held.sum(axis=1)
    return np.matmul(held, shares[..., None])[..., 0] / speed


def crowding(loads, slots, num_devices: int) -> np.ndarray:
    """[L]; how full the fullest of D equal devices becomes with the experts of slots [L, S], judged quickly.

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
    return np.max([loads.sum(axis=1) / num_devices, load.max(axis=1), *bounds], axis=0)


def move_copies(loads, held, speed) -> np.ndarray:
    """`held` bool [L, D, E] after exchanges of a copy for a copy of another expert, until none helps.

    The best exchange each time that makes the slowest device quicker: one of its own copies for any expert,
    or any device's copy for an expert of the slowest, which is then shared by more. Slots per device stay.
    """
    held = held.copy()
    num_devices, num_experts = held.shape[1:]
    active = np.arange(len(held))
    while len(active):
        now, load = held[active], loads[active]
        rows = np.arange(len(active))
        copies = now.sum(axis=1)
        times = device_times(load, now, speed)
        full = times.argmax(axis=1)
        # One more copy of an expert relieves its devices by `less` each, one fewer burdens them by `more`.
        less = load / copies - load / (copies + 1)
        more = load / np.maximum(copies - 1, 1) - load / copies
        layer, device, gone, come = np.nonzero(
            (now & (copies > 1)[:, None])[:, :, :, None]
            & ~now[:, :, None, :]
            & (now[rows, full][:, None, None, :] | (np.arange(num_devices) == full[:, None])[:, :, None, None])
        )
        if not len(layer):
            break
        after = times[layer] * speed
        after -= now[layer, :, come] * less[layer, come][:, None]
        after += now[layer, :, gone] * more[layer, gone][:, None]
        each = np.arange(len(layer))
        after[each, device] += load[layer, come] / (copies[layer, come] + 1)
        after[each, device] -= load[layer, gone] / (copies[layer, gone] - 1)
        after = _roughness(after / speed, times[layer])
        order = np.lexsort((after, layer))
        layers, first = np.unique(layer[order], return_index=True)
        best = order[first]
        best = best[after[best] < _roughness(times, times)[layers] * (1 - 1e-9)]
        active = active[layer[best]]
        held[active, device[best], gone[best]] = False
        held[active, device[best], come[best]] = True
    return held


def _roughness(times, reference):
    return ((times / reference.mean(axis=1, keepdims=True)) ** 16).sum(axis=1)
