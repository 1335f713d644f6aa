"""Serving: which device answers which slot. The same answer on every rank, unasked. Numpy only.

Dimensions: T tokens, k experts chosen per token, S = T k slots, E experts, D devices.

    an expert with one holder   leaves no choice
    replicas                    level the devices of this step (`devices`), or take turns (`turns`)
    no holder that is alive     nobody, D: the slot's output is zero
"""

from __future__ import annotations

import numpy as np


class Serving:
    """held bool [D, E]: the devices that may answer for an expert.

    home   [E]; the only holder where there is one, the first where there are several, D where there is none
    turns  [most replicas, E]; the holders of an expert again and again, for those who do not see the other slots
    """

    def __init__(self, held: np.ndarray):
        self.held = held
        replicas = held.sum(axis=0)
        self.nobody = len(held)
        self.home = np.where(replicas > 0, held.argmax(axis=0), self.nobody)
        self.shared = replicas > 1
        self.any_shared = bool(self.shared.any())
        holders = [np.flatnonzero(column) if column.any() else [self.nobody] for column in held.T]
        self.turns = np.stack([np.resize(each, max(replicas.max(), 1)) for each in holders], axis=1)

    def devices(self, experts: np.ndarray) -> np.ndarray:
        """The device of each slot, for expert ids of any shape.

        Slots of replicated experts, the most wanted expert first, go to its emptiest holders in this step.
        """
        device = self.home[experts]
        if not self.any_shared:
            return device
        flat, expert_of = device.reshape(-1), experts.reshape(-1)
        open_slots = self.shared[expert_of]
        load = np.bincount(flat[~open_slots], minlength=len(self.held) + 1)
        found, counts = np.unique(expert_of[open_slots], return_counts=True)
        for expert in found[np.argsort(-counts, kind="stable")]:
            slots, holders = np.flatnonzero(expert_of == expert), np.flatnonzero(self.held[:, expert])
            share = level(load[holders], len(slots))
            flat[slots] = np.repeat(holders, share)
            load[holders] += share
        return flat.reshape(experts.shape)


def level(load: np.ndarray, amount: int) -> np.ndarray:
    """Shares of `amount` that bring loads as near to each other as possible: [5, 1, 2] and 4 give [0, 3, 1]."""
    share, order = np.zeros_like(load), np.argsort(load, kind="stable")
    for n in range(len(load), 0, -1):
        lowest = order[:n]
        height, spare = divmod(int(load[lowest].sum()) + amount, n)
        if height >= load[lowest].max():
            share[lowest] = height - load[lowest]
            share[lowest[:spare]] += 1
            break
    return share
