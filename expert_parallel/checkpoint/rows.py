"""Single experts from a checkpoint's files: as arrays, or into memory that is there already.

Dimensions: n experts, E of them in a layer.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import chain
from pathlib import Path

import ml_dtypes
import mlx.core as mx
import numpy as np

from ..layers import cast
from ..stores import rows_of
from .tensors import fill, open_for_rows, places_of, read_rows

THREADS = 4  # that read into memory side by side, and from how many bytes on
WORTH_THREADS = 1 << 20  # bytes
IN_NUMPY = {mx.bfloat16: ml_dtypes.bfloat16, mx.float16: np.float16, mx.float32: np.float32}


def device_bytes() -> int | None:
    """What the system had to fetch from disks for this process so far; None but on Linux."""
    try:
        counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(counts["read_bytes"])
    except (OSError, KeyError, ValueError):
        return None


class OpenFiles:
    """Weight files that stay open while a model runs, so that one that is replaced or removed is read as it was."""

    def __init__(self):
        self._open = {}
        self.threads = ThreadPoolExecutor(THREADS)
        self._before = device_bytes()

    @property
    def from_device(self) -> int | None:
        """Bytes that this process had from a disk, not from the system's memory, since; None where nobody says."""
        return None if self._before is None else device_bytes() - self._before

    def open(self, path) -> None:
        if path in self._open:
            return
        number = open_for_rows(path)
        self._open[path] = number, self._mark(number)

    def __del__(self):
        for number, _ in self._open.values():
            os.close(number)

    @staticmethod
    def _mark(number):
        state = os.fstat(number)
        return state.st_size, state.st_mtime_ns

    def read(self, path, offset: int, into: np.ndarray) -> None:
        """Fill `into` from the file's bytes at `offset`. OSError for too few, or where the file was changed."""
        number, mark = self._open[path]
        fill(into, number, offset, path)
        if self._mark(number) != mark:  # after the read: what it got is of before the change, or refused
            raise OSError(f"{path} was changed while the model ran from it; start again")


class StoredRows:
    """The source (see stores.py) of one layer's experts in the files, with `dtype` for all that is not packed.

    stored  {"down_proj.weight": its tensors in the files}, one [E, ...] or E of them; None: `whole`, the layer's lazy
            module, is evaluated and cut
    like    {"down_proj.weight": (shape [E, ...], dtype)} as mlx-lm builds it
    """

    def __init__(self, stored, like: dict, whole=None, dtype: mx.Dtype | None = None):
        self._stored, self._like, self._whole, self._dtype = stored, like, whole, dtype

    def __call__(self, ids) -> dict[str, mx.array]:
        if not self._stored:
            found = rows_of(self._whole)(ids)
        else:
            found = {
                name: mx.array(read_rows(self._stored[name], ids)).view(kind).reshape(len(ids), *shape[1:])
                for name, (shape, kind) in self._like.items()
            }
        return {name: cast(array, self._dtype) for name, array in found.items()}

    def empty(self, room: int) -> dict[str, mx.array]:
        """Arrays for so many experts, of zeros."""
        return {name: cast(mx.zeros((room, *s[1:]), kind), self._dtype) for name, (s, kind) in self._like.items()}

    def opened(self, files: OpenFiles) -> StoredRows:
        """The same, ready to be read `into` arrays."""
        self._files = files
        for tensor in chain(*self._stored.values()):
            files.open(tensor.file)
        return self

    @property
    def from_device(self) -> int | None:
        """See OpenFiles; of all layers together."""
        return self._files.from_device

    def into(self, ids: np.ndarray, rows: np.ndarray, pool: dict[str, np.ndarray]) -> int:
        """Read experts `ids` [n] into `rows` [n] of writable arrays, several side by side; returns the bytes read.

        OSError where a read fails: those rows then hold anything.
        """
        jobs = []
        for name, tensors in self._stored.items():
            places, size = places_of(tensors, ids)
            stored, target = IN_NUMPY.get(self._like[name][1]), pool[name]
            loaded = IN_NUMPY.get(self._dtype, stored)  # what it was loaded as, whatever it was made since
            kinds = None if stored is None or stored == loaded == target.dtype else (stored, loaded)
            jobs += [(*place, size, target[row], kinds) for place, row in zip(places, rows, strict=True)]
        total = sum(size for _, _, size, *_ in jobs)
        if total < WORTH_THREADS:
            self._read_all(jobs)
        else:
            parts = [self._files.threads.submit(self._read_all, jobs[n::THREADS]) for n in range(THREADS)]
            try:
                for part in parts:
                    part.result()
            finally:  # after a failure or Control-C nobody may write on into rows that are given to others by then
                wait(parts)
        return total

    def _read_all(self, jobs):
        for path, offset, size, target, kinds in jobs:
            if kinds is None:
                self._files.read(path, offset, target)  # rows lie in one piece
            else:
                data = np.empty(size, np.uint8)
                self._files.read(path, offset, data)
                target[:] = data.view(kinds[0]).astype(kinds[1]).reshape(target.shape)
