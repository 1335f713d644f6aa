"""Measuring: what a rank computed, sent and waited for.

Stopping after every step to look at the clock slows a run down. So seconds are taken on a few extra tokens after
the real ones, and speeds on the real ones, without stops.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..experts import ShardedExperts, is_rank
from ..trace import replaced

COLLECTIVES = ("all_sum", "all_gather")


@dataclass
class Seconds:
    """Where a rank's time went over so many tokens, each part with a stop before and after it.

    value_bytes  of one value that experts gave: 4 for float32, 2 for bfloat16
    waiting      for the other ranks, in an empty collective just before each real one: the slowest does not wait
    """

    tokens: int
    value_bytes: int = 4
    total: float = 0.0
    experts: float = 0.0
    waiting: float = 0.0
    collectives: float = 0.0


@contextmanager
def count_collectives():
    """Count the collectives that are called while the block runs, mlx-lm's own among them.

    Gives {kind: [calls, bytes that this rank handed in]}.
    """
    counted = defaultdict(lambda: [0, 0])

    def counting(kind, original):
        def call(x, *args, **kwargs):
            counted[kind][0] += 1
            counted[kind][1] += x.nbytes
            return original(x, *args, **kwargs)

        return call

    with replaced(mx.distributed, {kind: counting(kind, getattr(mx.distributed, kind)) for kind in COLLECTIVES}):
        yield counted


@contextmanager
def time_parts(tokens: int, group=None):
    """Take the seconds of experts, of waiting and of collectives while the block runs `tokens`; gives `Seconds`."""
    seconds, all_sum = Seconds(tokens), mx.distributed.all_sum

    def timed_experts(original):
        def call(self, x, indices):
            mx.eval(x, indices)
            begin, served = time.perf_counter(), self.slots_served.copy()
            y = original(self, x, indices)
            mx.eval(y)
            seconds.experts += time.perf_counter() - begin
            self.slots_served[:] = served  # those of the real tokens alone are counted
            seconds.value_bytes = y.dtype.size
            return y

        return call

    def timed_collective(original):
        def call(x, *args, **kwargs):
            mx.eval(x)
            begin = time.perf_counter()
            if is_rank(group):
                mx.eval(all_sum(mx.array(0.0), group=group))
            ready = time.perf_counter()
            y = original(x, *args, **kwargs)
            mx.eval(y)
            seconds.waiting += ready - begin
            seconds.collectives += time.perf_counter() - ready
            return y

        return call

    ways = {way: timed_experts(getattr(ShardedExperts, way)) for way in ("compact", "masked")}
    timed = {kind: timed_collective(getattr(mx.distributed, kind)) for kind in COLLECTIVES}
    with replaced(ShardedExperts, ways), replaced(mx.distributed, timed):
        begin = time.perf_counter()
        yield seconds
        seconds.total = time.perf_counter() - begin


def resident_bytes() -> dict:
    """Physical memory of this process by the operating system, {"now", "peak"}; `now` is 0 where it does not say.

    Linux's ru_maxrss is no peak of this program: a process starts with that of the one that started it, so under a
    launcher of 800 MB every small program has 814. VmHWM begins anew with each program.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return {key: int(lines[name].split()[0]) * 1024 for key, name in (("now", "VmRSS"), ("peak", "VmHWM"))}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"now": 0, "peak": peak}
