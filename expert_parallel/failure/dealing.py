"""Dealing experts out to devices that live, so that slots come out even and loads level. Numpy only.

Dimensions: L MoE layers, D devices, E experts. Nothing is drawn, so that every rank comes to the same.
"""

from __future__ import annotations

import numpy as np


def deal(held, wanted, loads, alive) -> np.ndarray:
    """`held` with one holder more for each expert that is wanted, bool [L, E], and has one or none, among `alive` [D].

    The hottest first, each to the device that it leaves least full after the loss of whichever device is worst for it:
    with the lost one's share of experts that both hold. All layers side by side. The best of 33 such deals in other
    orders, with loads of Zipf 0.6 and 1.2, left survivors 0 to 3% more even on 4 and 8 devices, up to 8% on 16
    (simulated): not worth it.
    """
    held = held.copy()
    copies = held.sum(axis=1)
    share = loads / np.maximum(copies + wanted, 1)  # of one copy, in the end
    load = np.matmul(held, share[..., None])[..., 0]  # [L, D]
    inherited = share / np.maximum(copies - 1, 1)  # by each other holder, where there is one, of a lost one's share
    heirs = np.matmul(held * inherited[:, None], held.transpose(0, 2, 1)) * ~np.eye(held.shape[1], dtype=bool)
    # Room for slots. Experts that wait on a device can go to all others, so it has room for the rest at most.
    waiting, left = (held & wanted[:, None]).sum(axis=2), wanted.sum(axis=1)
    room = _evenly(held.sum(axis=2), left, np.where(alive, left[:, None] - waiting, 0))
    for of_turn in np.argsort(np.where(wanted, -loads, np.inf), axis=1, kind="stable").T[: left.max()]:
        rows = np.flatnonzero(left)
        expert = of_turn[rows]
        holds, more, heir = held[rows, :, expert], share[rows, expert][:, None], heirs[rows]  # [n, D], [n, 1]
        # 1. Where there is room; a device that needs all that is left elsewhere comes first, or it would stay short.
        free = (room[rows] > 0) & ~holds
        must = free & (room[rows] == left[rows, None] - waiting[rows])
        free = np.where(must.any(axis=1, keepdims=True), must, free)
        # 2. How full it would be: after the loss of the expert's holder, of which it is then the only heir, or another.
        after_holder = (np.matmul(holds[:, None], heir)[:, 0] + more) * holds.any(axis=1, keepdims=True)
        full = load[rows] + more + np.maximum(heir.max(axis=1), after_holder)
        device = np.where(free, full, np.inf).argmin(axis=1)
        # 3. There it goes.
        waiting[rows] -= holds
        left[rows] -= 1
        room[rows, device] -= 1
        load[rows, device] += more[:, 0]
        n, holder = np.nonzero(holds)
        heirs[rows[n], holder, device[n]] += more[n, 0]
        heirs[rows[n], device[n], holder] += more[n, 0]
        held[rows, device, expert] = True
    return held


def _evenly(counts, amount, most) -> np.ndarray:
    """int [L, D]: shares of `amount` [L], at most so many each, that bring counts [L, D] as near together as can be.

    Where devices are alike the next one's turn goes on from layer to layer, so that over all layers they are even too.
    """
    share, open_to = np.zeros_like(counts), most.any(axis=0)
    turn = (np.cumsum(open_to) - 1 - (np.cumsum(amount) - amount)[:, None]) % max(open_to.sum(), 1)
    for n in range(amount.max()):
        rows = np.flatnonzero(amount > n)
        full = counts + share + turn / len(open_to)  # counts are whole: turns only part equals
        share[rows, np.where(share < most, full, np.inf)[rows].argmin(axis=1)] += 1
    return share
