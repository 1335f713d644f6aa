"""A group of ranks: start it, agree on what must be the same, stop together.

group = start_group(timeout, watchdog)
with all_or_none(group) as same:
    placement = make_placement(...)          # a mistake of any rank stops all, each with a line
    same["placement"] = placement.held.tobytes()
# here every rank has the same facts, or none is here
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
from collections import deque
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from .launch import check_hostfile, launched

# --- starting ---------------------------------------------------------------------------------------------


def start_group(timeout: float, watchdog) -> mx.distributed.Group:
    """This process's group: N ranks under mpirun or mlx.launch, else a group of one.

    ValueError where several processes were started and do not find each other: each would run the whole model.
    """
    check_hostfile()
    _, started, by = launched()
    watchdog.limit(timeout, f"the other ranks did not start within {timeout:g} s (--timeout)")
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        # init holds the GIL: a rank whose watch process is killed in it can be ended by no thread of Python's.
        faulthandler.dump_traceback_later(timeout + 5, exit=True, file=nowhere)
        try:
            group = mx.distributed.init()
        finally:
            faulthandler.cancel_dump_traceback_later()
    if group.size() < started:
        raise ValueError(
            f"started as one of {started} processes ({by}), but MLX joined {group.size()}: use mlx.launch, or mpirun of"
            f" Open MPI with its development files (MLX_MPI_LIBNAME names another); unset {by} to run alone"
        )
    if group.size() > 1:
        addresses = gather_objects(group, watchdog.address())
        if group.rank() > 0:
            watchdog.join(addresses[0])
    watchdog.limit(None)
    return group


# --- agreeing ---------------------------------------------------------------------------------------------


class RanksDisagree(ValueError):
    """Some rank stopped or differs; every rank raises this at the same point."""


@contextmanager
def all_or_none(group):
    """The block is carried out by every rank, or the run ends on all of them. A collective at its end, none inside.

    Gives a dictionary for facts that must be the same on every rank, see `agree`. A ValueError or OSError of one rank
    is RanksDisagree on all; in a group of one it goes its way.
    """
    facts, error = {}, None
    try:
        yield facts
    except (ValueError, OSError) as problem:
        if group.size() == 1:
            raise
        error = str(problem)
    agree(group, facts, error)


def agree(group, facts: dict, error: str | None = None) -> None:
    """RanksDisagree on every rank unless all have the same facts and none an error. A collective.

    facts  {"placement": ..., "--temp": 0.5}: compared as text, long ones by hash
    """
    marks = {name: _short(str(fact)) for name, fact in facts.items()}
    everyone = gather_objects(group, {"marks": marks, "error": error})
    if error:
        raise RanksDisagree(error)
    for rank, other in enumerate(everyone):
        if other["error"]:
            raise RanksDisagree(f"rank {rank} stopped: {other['error']}")
    expected = everyone[0]["marks"]
    for rank, other in enumerate(everyone):
        found = other["marks"]
        differing = [name for name in expected | found if found.get(name) != expected.get(name)]
        if differing:
            what = ", ".join(f"{name} ({found.get(name)}, not {expected.get(name)})" for name in differing)
            raise RanksDisagree(f"rank {rank} has other {what} than rank 0; all ranks stop")


def _short(text: str) -> str:
    return text if len(text) <= 20 else hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def gather_objects(group, value) -> list:
    """The value of every rank, by rank; values are anything that goes into JSON. A collective."""
    if group.size() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8).astype(np.int32)
    lengths = np.array(mx.distributed.all_gather(mx.array([len(data)], mx.int32), group=group))
    padded = np.zeros((1, int(lengths.max())), np.int32)
    padded[0, : len(data)] = data
    rows = np.array(mx.distributed.all_gather(mx.array(padded), group=group))
    try:
        return [json.loads(row[:n].astype(np.uint8).tobytes()) for row, n in zip(rows, lengths, strict=True)]
    except ValueError:  # MLX's ring gives back whatever was in memory where a peer went in the middle of it
        raise RuntimeError("the connection to a peer was lost") from None


def follow_rank_0(group, tokens: mx.array) -> mx.array:
    """Rank 0's sampled tokens, on every rank: no rounding can part the ranks."""
    mine = tokens if group.rank() == 0 else mx.zeros_like(tokens)
    return mx.distributed.all_sum(mine.astype(mx.int32), group=group).astype(tokens.dtype)


class Agreed:
    """Rank 0's sampled tokens on every rank, step by step, each with the proof that all ranks took part in it.

    MLX's ring lets a sum pass for done when a peer is gone, with whatever it had; what follows from it must neither be
    shown nor kept.
    """

    def __init__(self, group):
        self._group, self._asked, self._voices = group, 0, deque()

    def __call__(self, token: mx.array) -> mx.array:
        """For the sampled tokens [B] of a step; a collective, which need not be evaluated for itself."""
        self._asked += 1
        voice = self._asked % 10**6  # another each time, for memory may still hold the last sum
        mine = token.astype(mx.int32) if self._group.rank() == 0 else mx.zeros(token.shape, mx.int32)
        both = mx.distributed.all_sum(mx.concatenate([mine, mx.array([voice], mx.int32)]), group=self._group)
        self._voices.append((both[-1:], voice * self._group.size()))
        return mx.depends(both[:-1].astype(token.dtype), both[-1:])

    @property
    def unchecked(self) -> int:
        """Steps that were not checked yet."""
        return len(self._voices)

    def check(self, steps: int = 1) -> None:
        """Of the oldest steps, when their tokens are known: RuntimeError where not all ranks had a part in them."""
        for _ in range(steps):
            found, expected = self._voices.popleft()
            if found.item() != expected:
                raise RuntimeError("the connection to a peer was lost")


def checkpoint_mark(folder, files: str = "model*.safetensors") -> str:
    """Sizes, headers and samples of the weight files of a checkpoint: differs if the weights do."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.glob(files)):
        length = file.stat().st_size
        digest.update(f"{file.name} {length}".encode())
        with file.open("rb") as data:
            header = int.from_bytes(data.read(8), "little")
            digest.update(data.read(min(header, length)))
            for at in np.linspace(8 + header, max(length - 4096, 0), 64):
                data.seek(int(at))
                digest.update(data.read(4096))
    return digest.hexdigest()
