"""Copies (redundant experts): how many of which expert, and what no choice of them can beat. Numpy only.

Dimensions: L layers, E experts, D devices, R redundant copies, S = E + R slots of a layer.
"""

from __future__ import annotations

import numpy as np

from ..placement import check_loads


def replicate(loads, redundant: int, num_devices: int, target=0) -> np.ndarray:
    """Expert of each slot, int [L, S]: one each, then R times one more for the largest load per copy (EPLB).

    No expert gets more than D copies.

    target  [L]; once no copy has more load than this, copies go to cold experts with few, where they do no
            harm: few copies near a device's mean load can be packed better than many of half that
    """
    loads = np.asarray(loads, np.float64)
    num_layers, num_experts = loads.shape
    rows, copies = np.arange(num_layers), np.ones(loads.shape, np.int64)
    slots = np.tile(np.arange(num_experts + redundant), (num_layers, 1))
    for slot in range(num_experts, num_experts + redundant):
        share = np.where(copies < num_devices, loads / copies, -np.inf)
        coldest = np.where(copies < num_devices, loads * copies, np.inf).argmin(axis=1)
        slots[:, slot] = np.where(share.max(axis=1) > target, share.argmax(axis=1), coldest)
        copies[rows, slots[:, slot]] += 1
    return slots


def count_copies(slots, num_experts: int) -> np.ndarray:
    """Copies of each expert, int [L, E], for the experts of slots [L, S]."""
    return np.stack([np.bincount(of_layer, minlength=num_experts) for of_layer in slots])


def device_loads(loads, held) -> np.ndarray:
    """[L, D] for expert loads [L, E] and held bool [L, D, E]; copies share an expert's load equally."""
    return np.matmul(held, (loads / held.sum(axis=1))[..., None])[..., 0]


def lower_bound(loads, num_devices: int, redundant: int = 0) -> np.ndarray:
    """[L]; load that the fullest device of no placement can go below, for expert loads [L, E].

    max(mean device load, largest load per copy), where `redundant` copies were given, one after the
    other, to the expert with the most load per copy: nothing makes the largest share smaller.
    An expert has at most one copy per device. The bound itself is not always attainable.
    """
    loads = check_loads(loads)
    copies = count_copies(replicate(loads, redundant, num_devices), loads.shape[1])
    return np.maximum(loads.sum(axis=1) / num_devices, (loads / copies).max(axis=1))
