"""A device's experts of one layer, of which only some are in memory.

Dimensions: T tokens, n slots, E experts, H hidden.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import RLock

import ml_dtypes
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..layers import expert_tensors, with_tensors
from ..stores import InMemory
from .policies import NOWHERE, Cache


@dataclass
class Reads:
    """What a store read, and how long computing waited for it; `bytes_ahead` and `experts_ahead` before it was asked.

    useful  experts read ahead that the next step wanted
    """

    experts: int = 0
    bytes: int = 0
    seconds_waited: float = 0.0
    experts_ahead: int = 0
    bytes_ahead: int = 0
    useful: int = 0


class OnDisk(InMemory):
    """Room for some of a device's experts; the others are read when a token asks for them (policies.py).

    like    mlx-lm's module of this layer, for its activation and quantisation
    ids     the experts that this device answers for
    source  of their weights: `empty(room)`, `into(ids, rows, pool)`, see checkpoint/rows.py
    cache   which of them are in memory

    The weights lie in arrays of `room` rows that are made once, so memory is bounded by construction. A row is written
    over only when all that was to be computed with it has been: each call computes before it returns.
    """

    all_here = False

    def __init__(self, like: nn.Module, ids, source, cache: Cache):
        nn.Module.__init__(self)
        self._source, self.cache, self.reads = source, cache, Reads()
        self._row = np.full(len(cache.place), NOWHERE, np.int32)  # of what is read whole, whatever the cache plans
        self._mine = np.zeros(len(cache.place), bool)
        self._mine[np.asarray(ids)] = True
        self._one_at_a_time = RLock()  # of the threads that ask
        self._ahead = None  # (experts that are being read ahead, what will say what that took)
        self.experts = with_tensors(like, source.empty(len(cache.held)))
        self._pool = Pool(self.experts)

    @property
    def from_device(self) -> int | None:
        """Bytes that the process had from disks since it was loaded, None where the system does not say."""
        return self._source.from_device

    @property
    def ids(self) -> np.ndarray:
        """Experts that it answers for, ascending."""
        return np.flatnonzero(self._mine)

    def __call__(self, x: mx.array, tokens: np.ndarray, experts: np.ndarray) -> mx.array:
        with self._one_at_a_time:
            return self._answer(x, tokens, experts)

    def _answer(self, x, tokens, experts):
        wanted = np.unique(experts)
        if not self._mine[wanted].all():
            raise IndexError(f"expert {wanted[~self._mine[wanted]][0]} is not here: {self.ids.tolist()} are")
        began = time.perf_counter()
        self._settle(wanted)
        come, row, wave, _ = self.cache.step(wanted)
        self.reads.seconds_waited += time.perf_counter() - began
        parts, places = [], []
        for first in dict.fromkeys(wave.tolist()):
            now = wave == first
            began = time.perf_counter()
            count, size = self._read(come[now], row[now])
            self.reads.experts += count
            self.reads.bytes += size
            self.reads.seconds_waited += time.perf_counter() - began
            at = np.flatnonzero(np.isin(experts, come[now]))
            parts.append(super().__call__(x, tokens[at], experts[at]))
            mx.eval(parts[-1])  # before another expert's weights take the place of these
            places.append(at)
        return in_order(parts, places)

    def read_ahead(self, experts: np.ndarray) -> None:
        """Begin to read experts that the next step may want, in the background; no more than there is room for.

        On a GPU it does nothing: mlx has to put the rows in, which no thread but the main one may ask it for.
        """
        with self._one_at_a_time:
            self._settle(())
            if not self._pool.in_place:
                return
            foretold = np.unique(experts[self._mine[experts]])[: len(self.cache.held)]
            come, row, _, hits = self.cache.bring(foretold)
            if len(lacking := come[hits:]):
                self._ahead = lacking, _ONE_THREAD.submit(self._read, lacking, row[hits:])

    def _settle(self, wanted):
        """Wait for what is being read ahead."""
        if self._ahead is not None:
            foretold, reading = self._ahead
            wait([reading])  # Control-C leaves it, to be waited for again
            self._ahead = None
            count, size = reading.result()
            self.reads.experts_ahead += count
            self.reads.bytes_ahead += size
            self.reads.useful += int(np.isin(foretold, wanted).sum())

    def _read(self, experts, rows) -> tuple[int, int]:
        """Have these experts in these rows; (experts, bytes) that had to be read. A row counts once it is whole."""
        lacking = self._row[experts] != rows
        experts, rows = experts[lacking], rows[lacking]
        if not len(experts):
            return 0, 0
        self._row[np.isin(self._row, rows)] = NOWHERE
        size = self._pool.fill(lambda pool, at: self._source.into(experts, at, pool), rows)
        self._row[experts] = rows
        return len(experts), size

    def hold(self, ids, rows=None) -> None:
        """Other experts from now on; nothing is read for it."""
        self._mine[:] = False
        self._mine[np.asarray(ids)] = True


def in_order(parts: list[mx.array], places: list[np.ndarray]) -> mx.array:
    """[n, H]: rows that were answered in parts, each in its place."""
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)[mx.array(np.argsort(np.concatenate(places)))]


_ONE_THREAD = ThreadPoolExecutor(1)


class Pool:
    """The arrays of a module of experts, to write rows into.

    On the CPU through numpy's view of the same memory, as mlx documents it ("Conversion to NumPy"); whether it is the
    same is tried for each array. On a GPU, where a kernel may read while the host writes, mlx puts the rows in.
    """

    def __init__(self, experts: nn.Module):
        self._experts, self._arrays, self._views = experts, {}, {}
        mx.eval(experts.parameters())

    @property
    def in_place(self) -> bool:
        """Whether rows are written where they are computed with, without mlx."""
        arrays = expert_tensors(self._experts)
        if any(array is not self._arrays.get(name) for name, array in arrays.items()):  # made anew, as by set_dtype
            mx.eval(arrays)
            self._arrays, self._views = arrays, {name: writable(array) for name, array in arrays.items()}
        return not any(view is None for view in self._views.values())

    def fill(self, read, rows: np.ndarray) -> int:
        """Call `read(pool, at)`, which fills rows `at` of {"down_proj.weight": array [room, ...]}; gives its answer."""
        if self.in_place:
            return read(self._views, rows)
        beside = {name: np.zeros((len(rows), *a.shape[1:]), numpy_type(a)) for name, a in self._arrays.items()}
        answer = read(beside, np.arange(len(rows)))
        modules, at = dict(self._experts.named_modules()), mx.array(rows)
        for name, array in beside.items():
            path, _, key = name.rpartition(".")
            modules[path][key][at] = mx.array(array)
        mx.eval(self._experts.parameters())
        return answer


def numpy_type(array: mx.array) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if array.dtype == mx.bfloat16 else str(array.dtype).rpartition(".")[2])


def writable(array: mx.array) -> np.ndarray | None:
    """numpy's view of an array's own memory; None on a GPU, and where mlx gives a copy."""
    if mx.default_device().type != mx.cpu:
        return None
    view = np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)
    view = view.view(numpy_type(array))
    at = (0,) * view.ndim
    was = view[at]
    view[at] = 0 if was else 1
    same = bool(array.reshape(-1)[0].item()) != bool(was)
    view[at] = was
    return view if same else None
