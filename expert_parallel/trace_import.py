"""Trace import: routing decisions that other programs recorded, and what has to be cut from them.

Dimensions: T tokens, L MoE layers, k chosen per token.

    Megatron  JSON lines {"layer": 3, "rank": 0, "topk": 8, "top_indices": [[...], ...]}, one per step, layer
              and rank (RouterTracer, Megatron-LM pull request 5220)
    vLLM      arrays [tokens, layers, k], one per request (enable_return_routed_experts, vLLM pull request 28284)
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from .routing import RoutingTrace

WARM_UP_RUN = 16  # identical rows at a start that no text explains


def read_trace(path, num_experts: int | None = None) -> RoutingTrace:
    """A trace by what the file is: .npz of `RoutingTrace.save`, .npy or .npz of arrays, .jsonl of Megatron.

    num_experts  E, where the file does not say; None: the highest expert that occurs, plus one
    Raises ValueError naming the file.
    """
    path = Path(path)
    if path.suffix in (".jsonl", ".json"):
        return read_megatron(path, num_experts)
    if path.suffix not in (".npz", ".npy"):
        raise ValueError(f"cannot read routing trace {path}: its name should end in .npz, .npy or .jsonl")
    try:
        content = np.load(path, allow_pickle=False)
        if path.suffix == ".npz" and "about" in content:
            content.close()
            return _of_so_many(RoutingTrace.load(path), num_experts, path)
        arrays = [content] if path.suffix == ".npy" else [content[name] for name in content.files]
    except Exception as error:  # zipfile, numpy and os each have their own
        text = "it is no numpy file" if "pickle" in str(error) else str(error)
        raise ValueError(text if text.startswith("cannot") else f"cannot read routing trace {path}: {text}") from None
    try:
        return from_arrays(arrays, num_experts, model=path.stem)
    except ValueError as error:
        raise ValueError(f"cannot read routing trace {path}: {error}") from None


def from_arrays(arrays, num_experts: int | None = None, prompt_tokens=None, model: str = "") -> RoutingTrace:
    """One trace of arrays [tokens, layers, k], one per request, as vLLM returns them.

    prompt_tokens  tokens of each request's prompt: they are marked as prefill
    Layers in which every choice is expert 0 are dense ones that the recorder left blank: they are dropped,
    metadata "blank_layers" lists them.
    """
    arrays = [np.asarray(array) for array in arrays]
    if not arrays:
        raise ValueError("there are no arrays")
    for array in arrays:
        if array.ndim != 3 or array.dtype.kind not in "ui":
            raise ValueError(f"expected integers [tokens, layers, k], got {array.dtype} {list(array.shape)}")
    if len({array.shape[1:] for array in arrays}) > 1:
        raise ValueError(f"arrays of different models: {sorted({array.shape[1:] for array in arrays})}")
    if prompt_tokens is not None and len(prompt_tokens) != len(arrays):
        raise ValueError(f"{len(prompt_tokens)} prompt lengths for {len(arrays)} requests")
    experts = np.concatenate(arrays)
    prefill = None
    if prompt_tokens is not None:
        prefill = np.concatenate([np.arange(len(a)) < n for a, n in zip(arrays, prompt_tokens, strict=True)])
    metadata = {"segment_starts": np.cumsum([0, *map(len, arrays[:-1])]).tolist()}
    if len(experts) and experts.shape[2] > 1:
        blank = ~experts.any(axis=(0, 2))
        if blank.all():
            raise ValueError("every choice in every layer is expert 0: nothing was recorded")
        if blank.any():
            experts, metadata["blank_layers"] = experts[:, ~blank], np.flatnonzero(blank).tolist()
    return RoutingTrace(experts, num_experts or _highest(experts) + 1, prefill, model, metadata)


def read_megatron(path, num_experts: int | None = None) -> RoutingTrace:
    """A trace of Megatron's router records; the ranks' tokens one rank after the other.

    Where a rank's last step lacks some layers (the recorder stopped), the rows without all layers are
    left out, metadata "incomplete_rows" counts them. Raises ValueError naming file and line.
    """
    records = {}  # (rank, layer) -> rows of each step
    try:
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rank, layer, rows = _record(line, number)
                    records.setdefault((rank, layer), []).append(rows)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read routing trace {path}: {error}") from None
    except ValueError as error:
        raise ValueError(f"cannot read routing trace {path}: {error}") from None
    if not records:
        raise ValueError(f"cannot read routing trace {path}: it has no records")
    layers = sorted({layer for _, layer in records})
    parts, lost = [], 0
    for rank in sorted({rank for rank, _ in records}):
        missing = [layer for layer in layers if (rank, layer) not in records]
        if missing:
            raise ValueError(f"cannot read routing trace {path}: rank {rank} has no record of layer {missing[0]}")
        steps = [records[rank, layer] for layer in layers]
        complete = min(map(len, steps))
        for step in range(complete):
            sizes = {of_layer[step].shape for of_layer in steps}
            if len(sizes) > 1:
                raise ValueError(
                    f"cannot read routing trace {path}: rank {rank}, step {step}: layers differ in tokens"
                    f" or k: {sorted(sizes)}"
                )
        lost += max(sum(map(len, of_layer[complete:])) for of_layer in steps)
        parts.append(np.stack([np.concatenate(of_layer[:complete]) for of_layer in steps], axis=1))
    try:
        trace = from_arrays(parts, num_experts, model=Path(path).stem)
    except ValueError as error:
        raise ValueError(f"cannot read routing trace {path}: {error}") from None
    trace.metadata |= {"layers": layers, **({"incomplete_rows": lost} if lost else {})}
    return trace


def warm_up_rows(trace: RoutingTrace) -> np.ndarray:
    """bool [T]: rows of warm-up: runs of at least 16 tokens with the very same choices in all layers.

    Only at the start of the trace, or of one of its parts (metadata "segment_starts"). Engines run
    blank tokens before the first request; their one choice counts as a hot expert in every figure.
    """
    marks = np.zeros(len(trace), dtype=bool)
    if trace.experts.shape[2] >= trace.num_experts:
        return marks  # every token chooses all experts: rows say nothing
    starts = [s for s in trace.metadata.get("segment_starts", [0]) if s < len(trace)]
    for start, end in zip(starts, [*starts[1:], len(trace)], strict=bool(starts)):
        part = np.sort(trace.experts[start : min(end, start + WARM_UP_RUN)], axis=2)
        if len(part) < WARM_UP_RUN or (part != part[0]).any():
            continue
        run = WARM_UP_RUN
        for block in range(start + run, end, 4096):  # bounded memory
            same = (np.sort(trace.experts[block : min(end, block + 4096)], axis=2) == part[0]).all(axis=(1, 2))
            run += len(same) if same.all() else int(same.argmin())
            if not same.all():
                break
        marks[start : start + run] = True
    return marks


def without_warm_up(trace: RoutingTrace) -> RoutingTrace:
    """The trace without its warm-up rows; metadata "warm_up_rows" counts them."""
    marks = warm_up_rows(trace)
    if not marks.any():
        return trace
    metadata = {name: value for name, value in trace.metadata.items() if name != "segment_starts"}
    return replace(trace[~marks], metadata={**metadata, "warm_up_rows": int(marks.sum())})


def fit_and_test(trace: RoutingTrace, fit_share: float = 0.5) -> tuple[RoutingTrace, RoutingTrace]:
    """(first part, rest): placements are fitted on the one and judged on the other, as time runs."""
    cut = round(len(trace) * fit_share)
    if not 0 < cut < len(trace):
        raise ValueError(f"a trace of {len(trace)} tokens cannot be parted at {fit_share:g}: both parts need tokens")
    return trace[:cut], trace[cut:]


def _record(line, number):
    try:
        record = json.loads(line)
        rows = np.array(record["top_indices"])
        if rows.ndim != 2 or rows.dtype.kind != "i":
            raise ValueError(f"top_indices should be [tokens, k] integers, got {rows.dtype} {list(rows.shape)}")
        if rows.shape[1] != record.get("topk", rows.shape[1]):
            raise ValueError(f"topk is {record['topk']}, top_indices have {rows.shape[1]}")
        if rows.size and not 0 <= rows.min() <= rows.max() < 65536:
            raise ValueError(f"experts run from {rows.min()} to {rows.max()}")
        return int(record.get("rank", 0)), int(record["layer"]), rows.astype(np.uint16)
    except json.JSONDecodeError:
        raise ValueError(f"line {number} is no JSON (was the file cut off?)") from None
    except KeyError as error:
        raise ValueError(f"line {number} has no {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"line {number}: {error}") from None


def _of_so_many(trace, num_experts, path):
    if num_experts not in (None, trace.num_experts):
        raise ValueError(f"routing trace {path} is of {trace.num_experts} experts, not {num_experts}")
    return trace


def _highest(experts):
    return int(experts.max()) if experts.size else 0
