"""Warm-up: the rows of a recorded trace that no text explains.

Dimensions: T tokens, L MoE layers, k chosen per token.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..trace import RoutingTrace

WARM_UP_RUN = 16  # identical rows that no text explains
BY_CHANCE = 1e-3  # such runs expected in a trace: one that frequent choices explain is no warm-up


def warm_up_rows(trace: RoutingTrace) -> np.ndarray:
    """bool [T]: rows of warm-up: runs of at least 16 tokens with the very same choices in all layers.

    Engines run blank tokens before the first request and between requests; their one choice counts as a hot
    expert in every figure. A run that its choice is frequent enough to explain, elsewhere in the trace, is none.
    """
    tokens, layers, k = trace.experts.shape
    if k >= trace.num_experts:
        return np.zeros(tokens, bool)  # every token chooses all experts: rows say nothing
    codes = np.random.default_rng(0).integers(1 << 63, size=(layers, trace.num_experts), dtype=np.uint64)
    row = np.zeros(tokens, np.uint64)  # one number for the experts of a token, in any order of the k
    for l in range(layers):
        row += codes[l][trace.experts[:, l]].sum(axis=1)
    starts = np.flatnonzero(np.append(True, row[1:] != row[:-1])[:tokens])
    length = np.diff(starts, append=tokens)
    _, same = np.unique(row[starts], return_inverse=True)
    elsewhere = (np.bincount(same, length)[same] - length) / np.maximum(tokens - length, 1)
    return np.repeat((length >= WARM_UP_RUN) & (tokens * elsewhere**length < BY_CHANCE), length)


def without_warm_up(trace: RoutingTrace) -> RoutingTrace:
    """The trace without its warm-up rows; metadata "warm_up_rows" counts them."""
    marks = warm_up_rows(trace)
    if not marks.any():
        return trace
    return replace(trace[~marks], metadata={**trace.metadata, "warm_up_rows": int(marks.sum())})
