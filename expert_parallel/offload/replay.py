"""What a cache of experts would have hit on a trace: the cache's own functions (policies.py), compiled by numba.

Dimensions: T tokens, L layers, E experts, k chosen per token, S steps.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import numpy as np
from numba import njit
from numba.core.caching import FunctionCache

from .policies import GAIN, KEPT, NOBODY, NOWHERE, take_in, use


class _Mending(FunctionCache):
    """Numba's cache on disk, whose damaged files are as none and are written anew."""

    def load_overload(self, *signature):
        try:
            return super().load_overload(*signature)
        except Exception:  # whatever unpickling makes of them
            with suppress(OSError):
                self.flush()
            return None


def compiled(function):
    """By numba, once for all runs where there is a folder to keep it in."""
    done = njit(nogil=True)(function)
    with suppress(RuntimeError):  # neither beside this file nor in the user's own folder
        done._cache = _Mending(function)  # as its enable_caching() does
    return done


_take_in, _use = compiled(take_in), compiled(use)


@compiled
def _replay(experts, starts, num_experts, room, kept, gain, claim, foreseen):
    """Hits and distinct experts of each step [2, S], for `experts` [T k] of one layer; `starts` [S + 1] of steps.

    foreseen  whether the claim is the next use, as Belady's
    """
    place, held, used = np.full(num_experts, NOWHERE), np.full(room, NOBODY), np.full(num_experts, -1)
    wanted, come, row, wave = np.empty((4, num_experts), np.int64)
    marked, found = np.full(num_experts, -1), np.zeros((2, len(starts) - 1), np.int64)
    after = _next_uses(experts, starts, num_experts) if foreseen else np.zeros(0, np.int64)
    for step in range(len(starts) - 1):
        count = 0
        for at in range(starts[step], starts[step + 1]):
            expert = experts[at]
            if marked[expert] < step:
                marked[expert], place_in = step, count
                while place_in and wanted[place_in - 1] > expert:  # ascending, as a running cache is asked
                    wanted[place_in] = wanted[place_in - 1]
                    place_in -= 1
                wanted[place_in] = expert
                count += 1
            if foreseen:
                claim[expert] = -after[at]
        if not count:  # a device that no token of the step was sent to
            continue
        _use(wanted[:count], claim, used, step, kept, gain)
        found[0, step] = _take_in(wanted[:count], place, held, claim, used, come, row, wave)
        found[1, step] = count
    return found


@compiled
def _next_uses(experts, starts, num_experts):
    """The step that next wants the expert of each slot [T k]; one beyond all where none does."""
    after, coming = np.empty(len(experts), np.int64), np.full(num_experts, len(starts))
    for step in range(len(starts) - 2, -1, -1):
        for at in range(starts[step], starts[step + 1]):
            after[at] = coming[experts[at]]
        for at in range(starts[step], starts[step + 1]):
            coming[experts[at]] = step
    return after


def replay(trace, places, policy: str, pinned=None, served=None) -> np.ndarray:
    """What a cache for each layer would have hit on a trace, int64 [2, S, L]: hits and distinct experts, by step.

    trace   RoutingTrace; its forward passes are the steps
    places  of each layer's cache [L], or one number for all
    policy  one of POLICIES or "belady"
    pinned  by layer the experts that stay, see `hottest`
    served  bool [T, L, k]: the slots that this cache's device answers, where there are several
    """
    T, L, k = trace.experts.shape
    firsts = np.append(np.flatnonzero(np.diff(trace.steps, prepend=-1)), T)
    found = np.zeros((2, len(firsts) - 1, L), np.int64)
    how = (KEPT.get(policy, 1.0), GAIN.get(policy, 0.0))

    def replay_layer(l):
        claim = np.zeros(trace.num_experts)
        claim[[] if pinned is None else pinned[l]] = np.inf
        experts, starts = trace.experts[:, l], firsts * k
        if served is not None:
            starts = np.append(0, served[:, l].sum(axis=1).cumsum())[firsts]
            experts = experts[served[:, l]]
        experts, room = np.ascontiguousarray(experts).reshape(-1), np.broadcast_to(places, L)[l]
        found[:, :, l] = _replay(experts, starts, trace.num_experts, room, *how, claim, policy == "belady")

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(replay_layer, range(L)))
    return found


def in_one(trace):
    """The trace as one cache over all layers would see it: each layer of each pass a step of its own, L E experts."""
    T, L, k = trace.experts.shape
    if trace.prefill.any():
        raise ValueError("one cache over all layers is replayed for decode tokens alone")
    ids = trace.experts.astype(np.int64) + np.arange(L)[:, None] * trace.num_experts
    whole = {"experts": ids.reshape(T * L, 1, k), "num_experts": trace.num_experts * L}
    return replace(trace, **whole, prefill=np.zeros(T * L, bool), steps=np.arange(T * L))
