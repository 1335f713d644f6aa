"""Measuring: what a rank computed, sent and waited for.

Stopping after every step to look at the clock slows a run down. So seconds are taken on a few
extra tokens after the real ones, and speeds on the real ones, without stops.
"""

from __future__ import annotations

import resource
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from ..experts import ShardedExperts
from ..trace import replaced


@dataclass
class Collectives:
    """Calls of collectives and their payload: `bytes` is what one rank hands in."""

    calls: int = 0
    bytes: int = 0
    by_kind: dict = field(default_factory=dict)

    def add(self, kind: str, num_bytes: int) -> None:
        self.calls += 1
        self.bytes += num_bytes
        calls, total = self.by_kind.get(kind, (0, 0))
        self.by_kind[kind] = (calls + 1, total + num_bytes)


@dataclass
class Seconds:
    """Where a rank's time went over so many tokens, each part with a stop before and after it.

    value_bytes  of one value that experts gave: 4 for float32, 2 for bfloat16
    """

    tokens: int = 0
    value_bytes: int = 0
    total: float = 0.0
    experts: float = 0.0
    waiting: float = 0.0
    collectives: float = 0.0


_COLLECTIVES = ("all_sum", "all_gather")


@contextmanager
def count_collectives():
    """Count the collectives that are called while the block runs, mlx-lm's own among them."""
    counted = Collectives()

    def counting(kind, original):
        def call(x, *args, **kwargs):
            counted.add(kind, x.nbytes)
            return original(x, *args, **kwargs)

        return call

    with replaced(mx.distributed, {kind: counting(kind, getattr(mx.distributed, kind)) for kind in _COLLECTIVES}):
        yield counted


@contextmanager
def time_parts(tokens: int, group=None):
    """Take the seconds of experts, of waiting for other ranks, and of collectives, with stops in between.

    tokens   how many the block is going to run
    waiting is the time in an empty collective just before the real one: the slowest rank does not wait.
    """
    seconds = Seconds(tokens)
    several = group is not None and group.size() > 1

    def timed_experts(original):
        def call(self, x, indices):
            mx.eval(x, indices)
            begin = time.perf_counter()
            y = original(self, x, indices)
            mx.eval(y)
            seconds.experts += time.perf_counter() - begin
            seconds.value_bytes = y.dtype.size
            return y

        return call

    def timed_collective(original):
        def call(x, *args, **kwargs):
            mx.eval(x)
            begin = time.perf_counter()
            if several:
                mx.eval(all_sum(mx.zeros(1), group=group))
            ready = time.perf_counter()
            y = original(x, *args, **kwargs)
            mx.eval(y)
            seconds.waiting += ready - begin
            seconds.collectives += time.perf_counter() - ready
            return y

        return call

    all_sum = mx.distributed.all_sum
    collectives = {kind: timed_collective(getattr(mx.distributed, kind)) for kind in _COLLECTIVES}
    with (
        replaced(ShardedExperts, {way: timed_experts(getattr(ShardedExperts, way)) for way in ("compact", "masked")}),
        replaced(mx.distributed, collectives),
    ):
        begin = time.perf_counter()
        yield seconds
        seconds.total = time.perf_counter() - begin


def resident_bytes() -> dict:
    """Physical memory of this process by the operating system, {"now", "peak"}; `now` is 0 where it does not say.

    Linux's ru_maxrss is no peak of this program: a process starts with that of the one that started it,
    so under a launcher of 800 MB every small program has 814. VmHWM begins anew with each program.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return {key: int(lines[name].split()[0]) * 1024 for key, name in (("now", "VmRSS"), ("peak", "VmHWM"))}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"now": 0, "peak": peak}
