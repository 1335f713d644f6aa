"""Recordings: routing decisions of this project and of other programs, as a trace, or as loads where they are counts.

Dimensions: T tokens, L MoE layers, E experts, k chosen per token.

    .npz of `RoutingTrace.save`; .npy, .npz of arrays [T, L, k], one per request (vLLM pull request 28284)
    JSON with "routed_experts" in base64 (vLLM's HTTP answers, pull request 39568)
    JSON lines {"type": "route", req_id, token_idx, layer, topk_ids} (vLLM logs); {layer, batch_id, topk_experts}
    CSV `# route_trace v1` (BigMoeOnEdge)
    SGLang's expert distribution recordings: .pt of per-token records, or of `logical_count`, also as JSON; CSV
    layer_id, expert_id, count; llama.cpp's CSV layer, expert; a table [L, E]: counts
"""

from __future__ import annotations

import base64
import io
import re
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..placement import check_loads
from ..trace import RoutingTrace
from .content import content_of
from .warm_up import without_warm_up

LEFT_OUT = {"warm_up_rows": "warm-up rows, all alike", "incomplete_rows": "tokens that some layer lacks"}
LEFT_OUT |= {"blank_rows": "tokens with blank choices", "repeated_slots": "choices that are there twice"}
SLOT_COLUMNS = ("turn", "phase", "step", "layer", "slot", "expert")


def read_trace(path, num_experts: int | None = None) -> RoutingTrace:
    """The tokens of a recording, without its warm-up rows; metadata says what was left out (`notes_of`).

    num_experts  E, where the file does not say; None: the highest expert that occurs, plus one, and the metadata's
                 "num_experts_guessed" says so
    Raises ValueError naming the file, also where it has only counts.
    """
    with _naming(path):
        found = _read(path, num_experts)
        if isinstance(found, np.ndarray):
            raise ValueError("it has counts and no tokens: enough for --placement balanced and replicated alone")
        trace = _tokens(found if isinstance(found, RoutingTrace) else found.trace(num_experts, Path(path).stem))
        _check_experts(trace.num_experts, num_experts)
    return trace


def read_trace_for(path, num_layers: int, top_k: int, num_experts: int) -> RoutingTrace:
    """`read_trace` for a model of so many MoE layers and chosen experts; ValueError if it is of another."""
    trace = read_trace(path, num_experts)
    found, wanted = (*trace.experts.shape[1:], trace.num_experts), (num_layers, top_k, num_experts)
    if found != wanted:
        shapes = ("{} layers, top-{} of {}".format(*shape) for shape in (found, wanted))
        raise ValueError("{} is of {}; the model has {}".format(path, *shapes))
    return trace


def notes_of(trace: RoutingTrace, name: str) -> list[str]:
    """What was left out of a trace that was read, a line each; name of the file."""
    counts = {what: trace.metadata.get(key) for key, what in LEFT_OUT.items()}
    return [f"{name}: left out {count} {what}" for what, count in counts.items() if count]


def _tokens(trace: RoutingTrace) -> RoutingTrace:
    without = without_warm_up(trace)
    if not without.experts.size:
        raise ValueError(f"it has no tokens{f' but {len(trace)} warm-up rows, all alike' if len(trace) else ''}")
    return without


def read_loads(path, num_experts: int | None = None) -> np.ndarray:
    """How often each expert was chosen, [L, E]; of counts, averages, shares, and of tokens, those too that some layer
    lacks.
    """
    with _naming(path):
        found = _read(path, num_experts)
        if isinstance(found, RoutingTrace):
            found = _tokens(found).loads()
        loads = found.loads(num_experts) if isinstance(found, _Slots) else found
        _check_experts(loads.shape[1], num_experts)
        check_loads(loads)
    return loads


def _check_experts(count: int, wanted: int | None) -> None:
    if wanted not in (None, count):
        raise ValueError(f"it is of {count} experts, not {wanted}")


@contextmanager
def _naming(path):
    try:
        yield
    except Exception as error:  # zipfile, numpy, json, csv, os, ... each have their own
        text = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        text = " ".join(text.split()) or type(error).__name__
        raise ValueError(text if text.startswith("cannot") else f"cannot read routing trace {path}: {text}") from None


def _read(path, num_experts) -> RoutingTrace | np.ndarray | _Slots:
    """By looking into the file: a trace, counts [L, E], or slots."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            own = "about.npy" in archive.namelist()
        if own:
            return RoutingTrace.load(path)
    return _recording(content_of(path), num_experts, Path(path).stem)


def _recording(content, num_experts, name):
    if isinstance(content, np.ndarray):
        return from_arrays([content], num_experts, name) if content.ndim == 3 else _counts(content)
    if isinstance(content, dict):
        if "logical_count" in content:
            return _counts(content["logical_count"])
        if answers := [one for one in (content, *content.get("choices", ())) if "routed_experts" in one]:
            coded = [base64.b64decode(answer["routed_experts"]) for answer in answers]
            return from_arrays([np.load(io.BytesIO(one)) for one in coded], num_experts, name)
        if content and all(isinstance(value, np.ndarray) for value in content.values()):
            return from_arrays(list(content.values()), num_experts, name)
    elif isinstance(content, list) and content and isinstance(content[0], list | dict):
        first = content[0]
        if isinstance(first, list):
            return _counts(content)
        if "topk_ids_of_layer" in first:  # [L, T, k] of each forward pass
            arrays = [np.moveaxis(np.asarray(one["topk_ids_of_layer"]), 0, 1) for one in content]
            return from_arrays(arrays, num_experts, name)
        if "slot" in first:
            said = re.search(r"n_expert=(\d+)", first["#"])
            return _Slots(_by_slot(content), said and int(said[1]))
        if {"layer", "expert"} <= first.keys() or {"layer_id", "expert_id"} <= first.keys():
            return _of_pairs(content, num_experts)
        if "#" not in first:
            return _Slots(_by_record(content))
    raise ValueError("it is no routing trace that this project knows (see expert_parallel/formats/traces.py)")


def _counts(table) -> np.ndarray:
    """[L, E] of counts, averages or shares [..., L, E]: what stands before is steps or ranks, and is summed."""
    table = np.asarray(table)
    if table.ndim < 2 or table.dtype.kind not in "iuf":
        raise ValueError(f"expected [tokens, layers, k] or counts [layers, experts], got {list(table.shape)}")
    table = table.reshape(-1, *table.shape[-2:]).sum(axis=0)
    return table[table.any(axis=1)]  # dense layers have none


def _of_pairs(rows, num_experts) -> np.ndarray:
    """Counts of a CSV with a layer and an expert in each line, and how often, if not once."""
    layer, expert = ("layer", "expert") if "layer" in rows[0] else ("layer_id", "expert_id")
    often = [_number(row, "count", float) for row in rows] if "count" in rows[0] else [1] * len(rows)
    where = [(_number(row, layer), _number(row, expert)) for row in rows]
    return _table([(*one, count) for one, count in zip(where, often, strict=True)], num_experts)


def _number(row, column, kind=int):
    try:
        return kind(row[column])
    except ValueError:
        raise ValueError(
            f"line {row['#line']}: {column} is {row[column]!r}, no {'whole ' * (kind is int)}number"
        ) from None


def _table(triples, num_experts: int | None) -> np.ndarray:
    """[L, E] of (layer, expert, how often); an expert below 0 is a slot that was left blank."""
    kept = [triple for triple in triples if triple[1] >= 0]
    if not kept:
        raise ValueError("it has no routing decisions in it")
    layer, expert, often = np.array(kept, float).T
    layers, at = np.unique(layer, return_inverse=True)
    table = np.zeros((len(layers), max(num_experts or 0, int(expert.max()) + 1)))
    np.add.at(table, (at, expert.astype(int)), often)
    return table


def _by_slot(rows):
    """(token, layer, slot, expert) of each line; BigMoeOnEdge numbers a token by turn, phase (0: prompt) and step."""
    for row in rows:
        turn, phase, step, layer, slot, expert = (_number(row, column) for column in SLOT_COLUMNS)
        yield (turn, phase, step), layer, slot, expert


def _by_record(records):
    for record in records:
        if record.get("type", "route") == "route" and "topk_ids" in record:
            for slot, expert in enumerate(record["topk_ids"]):
                yield (record.get("req_id"), record["token_idx"]), record["layer"], slot, expert
        elif "topk_experts" in record:
            for token, chosen in enumerate(record["topk_experts"]):
                for slot, expert in enumerate(chosen):
                    yield (record["batch_id"], token), record["layer"], slot, expert


class _Slots:
    """Routing decisions (token, layer, slot, expert) in the order in which tokens first come; E where the file says it.

    The same decision twice, as two tensor-parallel ranks log it, counts once; ValueError for two different ones.
    """

    def __init__(self, slots, num_experts: int | None = None):
        self.tokens, self.num_experts, self.repeated = {}, num_experts, 0
        for token, layer, slot, expert in slots:
            of_layer = self.tokens.setdefault(token, {}).setdefault(layer, {})
            self.repeated += slot in of_layer
            if of_layer.setdefault(slot, expert) != expert:
                both = f"experts {of_layer[slot]} and {expert} in one place: two requests under one name?"
                raise ValueError(f"token {token} has in layer {layer} {both}")
        self.layers = sorted({layer for of_layers in self.tokens.values() for layer in of_layers})
        if not self.layers:
            raise ValueError("it has no routing decisions in it")

    def loads(self, num_experts) -> np.ndarray:
        triples = [
            (layer, expert, 1)
            for of_layers in self.tokens.values()
            for layer, experts in of_layers.items()
            for expert in experts.values()
        ]
        return _table(triples, self.num_experts or num_experts)

    def trace(self, num_experts, name) -> RoutingTrace:
        """Tokens that some layer lacks are dropped, and counted in metadata "incomplete_rows": llama.cpp computes the
        last layer for the last token of a prompt only. "repeated_slots" counts what was there twice.
        """
        sizes = [len(experts) for of_layers in self.tokens.values() for experts in of_layers.values()]
        k = max(set(sizes), key=sizes.count)
        whole = {
            token: [list(of_layers[layer].values()) for layer in self.layers]
            for token, of_layers in self.tokens.items()
            if len(of_layers) == len(self.layers) and all(len(experts) == k for experts in of_layers.values())
        }
        if not whole:
            raise ValueError(f"no token has decisions in all of its {len(self.layers)} layers")
        trace = from_arrays([np.array(list(whole.values()))], self.num_experts or num_experts, name)
        trace = replace(trace, prefill=[len(token) == 3 and token[1] == 0 for token in whole], steps=None)
        counts = {"incomplete_rows": len(self.tokens) - len(whole), "repeated_slots": self.repeated}
        trace.metadata |= {"layers": self.layers, **counts}
        return trace


def from_arrays(arrays, num_experts: int | None = None, model: str = "") -> RoutingTrace:
    """One trace of arrays [tokens, layers, k], one per request.

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
    blank = (experts <= 0).all(axis=(0, 2)) & (experts.shape[2] > 1) & bool(len(experts))
    if blank.all():
        raise ValueError("every choice in every layer is blank: nothing was recorded")
    if blank.any():
        experts, metadata["blank_layers"] = experts[:, ~blank], np.flatnonzero(blank).tolist()
    whole = (experts >= 0).all(axis=(1, 2))
    if not whole.all():
        experts, metadata["blank_rows"] = experts[whole], int((~whole).sum())
    if num_experts is None:
        num_experts, metadata["num_experts_guessed"] = int(experts.max(initial=0)) + 1, True
    return RoutingTrace(experts, num_experts, None, model, metadata)
