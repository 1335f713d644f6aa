"""Slots: which device serves which slot when an expert has several copies.

Dimensions: T tokens, k experts chosen per token, S = T k slots, E experts, D devices.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np


class SlotAssignment:
    """Which device serves which slot of one layer: the same answer on every rank, unasked.

    held  bool [D, E]
    An expert with one holder leaves no choice. A copy is chosen for the least loaded device of
    this step (compact), or by turns (masked, where the host does not see the indices).
    """

    def __init__(self, held: np.ndarray):
        self.held = held
        self.copies = held.sum(axis=0)
        self.home = held.argmax(axis=0)  # [E], the only holder where there is one
        self.shared = self.copies > 1
        self.any_shared = bool(self.shared.any())
        # [E, most copies]: the holders of an expert again and again, for turns
        holders = [np.flatnonzero(held[:, e]) for e in range(held.shape[1])]
        self.turns = np.stack([np.resize(h, self.copies.max()) for h in holders])

    def devices(self, indices: np.ndarray) -> np.ndarray:
        """Serving device of each slot, for expert ids of any shape."""
        device = self.home[indices]
        if not self.any_shared:
            return device
        flat, expert_of = device.reshape(-1), indices.reshape(-1)
        open_slots = self.shared[expert_of]
        if not open_slots.any():
            return device
        load = np.bincount(flat[~open_slots], minlength=len(self.held))
        experts, counts = np.unique(expert_of[open_slots], return_counts=True)
        for expert in experts[np.argsort(-counts, kind="stable")]:
            slots = np.flatnonzero(expert_of == expert)
            holders = np.flatnonzero(self.held[:, expert])
            share = _level(load[holders], len(slots))
            flat[slots] = np.repeat(holders, share)
            load[holders] += share
        return flat.reshape(indices.shape)

    def devices_by_turns(self, indices: mx.array) -> mx.array:
        """As `devices`, without the host: copies take turns over the slots."""
        turn = mx.arange(indices.size).reshape(indices.shape) % self.turns.shape[1]
        return mx.array(self.turns)[indices, turn]


def _level(load: np.ndarray, amount: int) -> np.ndarray:
    """Shares of `amount` that bring the loads as near to each other as possible.

    >>> _level(np.array([5, 1, 2]), 4)
    array([0, 3, 1]) or another split with the same highest load
    """
    share = np.zeros_like(load)
    order = np.argsort(load, kind="stable")
    for n in range(len(load), 0, -1):
        lowest = order[:n]
        level, spare = divmod(int(load[lowest].sum()) + amount, n)
        if level >= load[lowest].max():
            share[lowest] = level - load[lowest]
            share[lowest[:spare]] += 1
            return share
    raise AssertionError("one device can always take it all")
