"""Lanes: CPU streams, which have a thread each, for what is to run side by side."""

from __future__ import annotations

import os
import threading
from contextlib import nullcontext

import mlx.core as mx


class Lanes(threading.local):
    """`count` streams, the first of them whatever stream is in use; `lanes(n)` is the context of number n.

    A stream belongs to the thread that made it, so every thread that computes gets its own.
    """

    def __init__(self, count: int):
        self.count = count
        self._others = [mx.new_stream(mx.default_device()) for _ in range(count - 1)]

    def __deepcopy__(self, memo):  # streams are the process's
        return self

    def __call__(self, n: int):
        n %= self.count
        return mx.stream(self._others[n - 1]) if n else nullcontext()


def useful_lanes(devices: int) -> int:
    """How many streams can run at once here: no more than devices, nor than cores; 1 on a GPU, which needs none."""
    if mx.default_device().type != mx.cpu:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(devices, cores)
