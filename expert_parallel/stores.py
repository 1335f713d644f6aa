"""Stores: a device's experts of one layer, and where their weights come from.

Dimensions: T tokens, n slots, k experts chosen per token, E experts, H hidden.

    a store   (x [T, H], tokens [n], experts [n]) -> [n, H]: outputs of its experts, and of nobody else's
    a source  (ids [n], ascending) -> {"down_proj.weight": [n, ...], ...}: rows from a module, a file, another device
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .layers import expert_tensors, with_tensors


def rows_of(experts: nn.Module):
    """A whole layer in memory as a source. `take` copies: a slice would keep the whole tensor alive."""
    return lambda ids: picked(expert_tensors(experts), ids)


def picked(rows: dict[str, mx.array], at) -> dict[str, mx.array]:
    """Rows at these positions, copied; the very same arrays where all are asked for in order."""
    count = len(next(iter(rows.values())))
    if len(at) == count and np.array_equal(at, np.arange(count)):
        return rows
    at = mx.array(np.asarray(at, np.int32))
    return {name: mx.take(array, at, axis=0) for name, array in rows.items()}


class InMemory(nn.Module):
    """All of a device's experts, loaded once.

    like         mlx-lm's module of this layer (SwitchGLU, SwitchMLP), for its activation and quantisation
    num_experts  E, over all devices
    ids, rows    the experts held here, and the source of their weights
    """

    all_here = True  # in memory, under one module

    def __init__(self, like: nn.Module, num_experts: int, ids, rows):
        super().__init__()
        self._take(like, num_experts, np.asarray(ids), rows(ids))

    def _take(self, like, num_experts, ids, rows):
        self._row = np.full(num_experts, -1, np.int32)
        self._row[ids] = np.arange(len(ids))
        self._has_spare = False
        self.experts = with_tensors(like, rows)
        mx.eval(self.parameters())

    @property
    def ids(self) -> np.ndarray:
        """Experts that are here, ascending."""
        return np.flatnonzero(self._row >= 0)

    def modules_held(self) -> list[nn.Module]:
        """mlx-lm's modules that its weights are in."""
        return [self.experts]

    def row_of(self, expert: int) -> int:
        """Where its weights are; -1 where it is not here."""
        return int(self._row[expert])

    def __call__(self, x: mx.array, tokens: np.ndarray, experts: np.ndarray) -> mx.array:
        row = self._row[experts]
        if row.min() < 0:  # another expert's number as a local one would be a wrong answer in silence
            raise IndexError(f"expert {experts[row < 0][0]} is not here: {self.ids.tolist()} are")
        if len(x) == 1:
            return self.experts(x, mx.array(row[None]))[0]
        return self.experts(x[mx.array(tokens.astype(np.int32))], mx.array(row[:, None]))[:, 0]

    def rows_with_spare(self) -> np.ndarray:
        """[E]: the row of each expert here; the others' is a spare one of zeros, whose output is zero.

        With it no slot has to be masked: `experts(x, table[indices])` answers for this device and for nobody else.
        """
        if not self._has_spare:
            rows = expert_tensors(self.experts)
            zeros = {name: mx.zeros((1, *array.shape[1:]), array.dtype) for name, array in rows.items()}
            self.experts = with_tensors(self.experts, {n: mx.concatenate([a, zeros[n]]) for n, a in rows.items()})
            self._has_spare = True
            mx.eval(self.parameters())
        return np.where(self._row >= 0, self._row, len(self.ids))

    def hold(self, ids, rows) -> None:
        """Other experts from now on: those that stay keep their rows, the others come from the source `rows`."""
        ids = np.asarray(ids)
        old = expert_tensors(self.experts)
        new = ids[self._row[ids] < 0]
        come = rows(new) if len(new) else {}
        at = self._row[ids].copy()
        at[at < 0] = len(next(iter(old.values()))) + np.arange(len(new))
        both = {name: mx.concatenate([a, come[name]]) if len(new) else a for name, a in old.items()}
        self._take(self.experts, len(self._row), ids, picked(both, at))
