"""Serving: which device answers which slot. The same answer on every rank, unasked. Numpy only.

Dimensions: T tokens, k experts chosen per token, S = T k slots, E experts, D devices.

    an expert with one holder   leaves no choice
    replicas                    level the devices of this step as far as can be (`devices`), or take turns (`turns`)
    no holder that is alive     nobody, D: the slot's output is zero
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np


class Serving:
    """held bool [D, E]: the devices that may answer for an expert.

    home   [E]; the only holder where there is one, the first where there are several, D where there is none
    turns  [most replicas, E]; the holders of an expert again and again, for those who do not see the other slots
    """

    def __init__(self, held: np.ndarray):
        self.held = held
        replicas = held.sum(axis=0)
        self.nobody, self.living = len(held), max(1, int(held.any(axis=1).sum()))
        self.home = np.where(replicas > 0, held.argmax(axis=0), self.nobody)
        self.shared = replicas > 1
        self.any_shared = bool(self.shared.any())
        holders = np.argsort(~held, axis=0, kind="stable")  # first of each column
        turn = np.arange(max(replicas.max(), 1))[:, None] % np.maximum(replicas, 1)
        self.turns = np.where(replicas > 0, np.take_along_axis(holders, turn, axis=0), self.nobody)

    def devices(self, experts: np.ndarray, greedy: bool = False) -> np.ndarray:
        """The device of each slot, for expert ids of any shape; the fullest has as few slots as any choice can give it.

        greedy  leave it at the first choice, by which it is a few percent fuller (BENCHMARKS.md)
        """
        if not self.any_shared:
            return self.home[experts]
        flat = experts.reshape(-1)
        given = self._least_loaded(np.bincount(flat, minlength=self.held.shape[1]))
        if not greedy:
            self._improve(given)
        device = np.empty(flat.shape, np.int64)
        every = np.tile(np.arange(self.nobody + 1), len(self.home))
        device[np.argsort(flat, kind="stable")] = np.repeat(every, given.T.reshape(-1))
        return device.reshape(experts.shape)

    def turn_of(self, shape) -> np.ndarray:
        """The row of `turns` that counts for each slot: replicas take turns over the slots."""
        return np.arange(np.prod(shape)).reshape(shape) % len(self.turns)

    def taking_turns(self, experts: np.ndarray) -> np.ndarray:
        """The device of each slot where replicas take turns, as one does who does not see the other slots."""
        return self.turns[self.turn_of(experts.shape), experts]

    def _least_loaded(self, wanted) -> np.ndarray:
        """int [D + 1, E]: slots of each expert [E] by device; the most wanted replicated one first, to its emptiest.

        Whole, as long as that stays within an equal share of all slots, for every device that gets some of an expert's
        slots has all of its weights to read; what is above goes to the next one (McNaughton, Scheduling with Deadlines
        and Loss Functions, 1959).
        """
        given = np.zeros((self.nobody + 1, len(self.home)), np.int64)
        alone = np.flatnonzero(~self.shared & (wanted > 0))
        given[self.home[alone], alone] = wanted[alone]
        load, open_to_choice = given.sum(axis=1), np.flatnonzero(self.shared & (wanted > 0))
        share = max(math.ceil(wanted[self.home < self.nobody].sum() / self.living), int(load[:-1].max()))
        turn = int(wanted @ np.arange(len(wanted)))  # another one at each step, the same on every rank
        for expert in open_to_choice[np.argsort(-wanted[open_to_choice], kind="stable")]:
            holders = np.roll(np.flatnonzero(self.held[:, expert]), turn)  # equals take turns over steps
            holders = holders[np.argsort(load[holders], kind="stable")]
            room = np.maximum(share - load[holders], 0)
            whole = np.diff(np.minimum(room.cumsum(), wanted[expert]), prepend=0)
            given[holders, expert] = whole + level(load[holders] + whole, wanted[expert] - whole.sum())
            load[holders] += given[holders, expert]
        return given

    def _improve(self, given) -> None:
        """Slots by device and expert changed until the fullest device has as few as can be.

        Slots of the fullest device go to another holder, as many of that holder's to a third, and so on to a device
        with two fewer at least: half of the difference at most. Where no such chain is left the maximum is the least
        possible (cost-reducing paths: Harvey et al., Semi-Matchings for Bipartite Graphs and Load Balancing, 2003).
        """
        given, load = given[:-1], given[:-1].sum(axis=1)
        while chain := self._chain(given, load):
            hops = [(a, b, int((given[a] * self.held[b]).argmax())) for a, b in pairwise(chain)]
            count = min((load[chain[0]] - load[chain[-1]]) // 2, *(given[a, expert] for a, _, expert in hops))
            for giver, taker, expert in hops:
                given[giver, expert] -= count
                given[taker, expert] += count
            load[chain[0]] -= count
            load[chain[-1]] += count

    def _chain(self, given, load) -> list[int]:
        """Devices from the fullest to one with two slots fewer, each with a slot for the next; [] if there is none."""
        fullest = int(load.argmax())
        chains, reached = [[fullest]], {fullest}
        for chain in chains:  # nearest first
            takes = self.held[:, given[chain[-1]] > 0].any(axis=1)  # [D]
            for taker in np.flatnonzero(takes).tolist():
                if taker not in reached:
                    reached.add(taker)
                    chains.append([*chain, taker])
                    if load[taker] <= load[fullest] - 2:
                        return chains[-1]
        return []


def devices_of_trace(experts, held, steps=None, masked_up_to: int = 0) -> np.ndarray:
    """Who answers each slot of a trace, step by step as a run does, uint16 [T, L, k].

    experts       [T, L, k];  held  bool [L, D, E]
    steps         [T], growing: tokens of one forward pass are dealt out together; None: all of them
    masked_up_to  slots of a step up to which replicas take turns, as on a GPU
    """
    experts, starts = np.asarray(experts), [] if steps is None else np.flatnonzero(np.diff(steps)) + 1
    device = np.empty(experts.shape, np.uint16)
    for layer, serving in enumerate(map(Serving, held)):
        chosen = experts[:, layer].astype(np.int64)
        if not serving.any_shared:
            device[:, layer] = serving.home[chosen]
            continue
        for ids, of_step in zip(np.split(chosen, starts), np.split(device[:, layer], starts), strict=True):
            of_step[:] = serving.taking_turns(ids) if ids.size <= masked_up_to else serving.devices(ids)
    return device


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
