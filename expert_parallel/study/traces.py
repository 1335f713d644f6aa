"""Recorded traces: routing decisions of this project and of other programs, and what has to be cut from them.

Dimensions: T tokens, L MoE layers, k chosen per token. vLLM returns arrays [tokens, layers, k], one per request
(enable_return_routed_experts, vLLM pull request 28284).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ..trace import RoutingTrace

WARM_UP_RUN = 16  # identical rows that no text explains
BY_CHANCE = 1e-3  # such runs expected in a trace: one that frequent choices explain is no warm-up


def read_trace(path, num_experts: int | None = None) -> RoutingTrace:
    """A trace by what the file is: .npz of `RoutingTrace.save`, .npy or .npz of arrays [tokens, layers, k].

    num_experts  E, where the file does not say; None: the highest expert that occurs, plus one, and the metadata's
                 "num_experts_guessed" says so
    Raises ValueError naming the file.
    """
    path = Path(path)
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            arrays = [content]
        else:
            with content:
                arrays = None if "about" in content else [content[name] for name in content.files]
        trace = RoutingTrace.load(path) if arrays is None else from_arrays(arrays, num_experts, model=path.stem)
    except Exception as error:  # zipfile, numpy and os each have their own
        text = "it is no numpy file of arrays" if "pickle" in str(error) else str(error)
        raise ValueError(text if text.startswith("cannot") else f"cannot read routing trace {path}: {text}") from None
    if num_experts not in (None, trace.num_experts):
        raise ValueError(f"routing trace {path} is of {trace.num_experts} experts, not {num_experts}")
    return trace


def from_arrays(arrays, num_experts: int | None = None, prompt_tokens=None, model: str = "") -> RoutingTrace:
    """One trace of arrays [tokens, layers, k], one per request, as vLLM returns them.

    prompt_tokens  tokens of each request's prompt: they are marked as prefill
    Layers in which every choice is expert 0, or -1, are dense ones that the recorder left blank: they are dropped,
    metadata "blank_layers" lists them; so are tokens with a -1 in another layer, "blank_rows" counts them.
    """
    arrays = [np.asarray(array) for array in arrays]
    odd = [f"{a.dtype} {list(a.shape)}" for a in arrays if a.ndim != 3 or a.dtype.kind not in "ui"]
    if odd or not arrays:
        raise ValueError(f"expected integers [tokens, layers, k], got {odd[0] if odd else 'no arrays'}")
    if len({array.shape[1:] for array in arrays}) > 1:
        raise ValueError(f"arrays of different models: {sorted({array.shape[1:] for array in arrays})}")
    experts, metadata = np.concatenate(arrays).astype(np.int64), {}
    marks = [np.arange(len(a)) < n for a, n in zip(arrays, prompt_tokens or [0] * len(arrays), strict=True)]
    prefill = np.concatenate(marks)
    blank = (experts <= 0).all(axis=(0, 2)) & (experts.shape[2] > 1) & bool(len(experts))
    if blank.all():
        raise ValueError("every choice in every layer is blank: nothing was recorded")
    if blank.any():
        experts, metadata["blank_layers"] = experts[:, ~blank], np.flatnonzero(blank).tolist()
    whole = (experts >= 0).all(axis=(1, 2))
    if not whole.all():
        experts, prefill, metadata["blank_rows"] = experts[whole], prefill[whole], int((~whole).sum())
    if num_experts is None:
        num_experts, metadata["num_experts_guessed"] = int(experts.max(initial=0)) + 1, True
    return RoutingTrace(experts, num_experts, prefill, model, metadata)


def warm_up_rows(trace: RoutingTrace) -> np.ndarray:
    """bool [T]: rows of warm-up: runs of at least 16 tokens with the very same choices in all layers.

    Engines run blank tokens before the first request and between requests; their one choice counts as a hot
    expert in every figure. A run that its choice is frequent enough to explain, elsewhere in the trace, is none.
    """
    tokens, layers, k = trace.experts.shape
    if k >= trace.num_experts:
        return np.zeros(tokens, dtype=bool)  # every token chooses all experts: rows say nothing
    codes = np.random.default_rng(0).integers(1 << 63, size=(layers, trace.num_experts), dtype=np.uint64)
    row = np.zeros(tokens, dtype=np.uint64)  # one number for the experts of a token, in any order of the k
    for l in range(layers):
        row += codes[l][trace.experts[:, l]].sum(axis=1, dtype=np.uint64)
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


def fit_and_test(trace: RoutingTrace, fit_share: float = 0.5) -> tuple[RoutingTrace, RoutingTrace]:
    """(first part, rest): placements are fitted on the one and judged on the other, as time runs."""
    cut = round(len(trace) * fit_share)
    if not 0 < cut < len(trace):
        raise ValueError(f"a trace of {len(trace)} tokens cannot be parted at {fit_share:g}: both parts need tokens")
    return trace[:cut], trace[cut:]
