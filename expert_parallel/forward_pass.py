"""Forward pass: what goes through a loaded model on real text. Everything here is measured.

Dimensions: T tokens, L MoE layers, E experts, k chosen per token, H hidden.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from . import routing_statistics as statistics
from .balance import routing_entropy
from .moe import moe_layers, num_experts, switch_linears
from .routing import RoutingTrace

SAMPLED_ROWS = 16  # of every expert's projection, for the similarity of experts


@dataclass
class Pass:
    """One text through the model.

    trace    choices of the router [T, L, k]
    scores   [L] of router scores [T, E] before the top-k, None where the router keeps them to itself
    inputs, outputs   [L] of (root mean square, largest magnitude) of what the experts are given and answer
    """

    trace: RoutingTrace
    scores: list[np.ndarray | None]
    inputs: list[tuple[float, float]]
    outputs: list[tuple[float, float]]


class _Watched(nn.Module):
    """Stands before the experts and keeps what comes in and goes out."""

    def __init__(self, experts: nn.Module, note: dict):
        super().__init__()
        self.experts = experts
        self._note = note

    def __call__(self, x, indices):
        y = self.experts(x, indices)
        self._note |= {"x": x, "indices": indices, "y": y}
        return y


class _WatchedRouter(nn.Module):
    def __init__(self, router: nn.Module, note: dict):
        super().__init__()
        self.router = router
        self._note = note

    def __call__(self, x, *args, **kwargs):
        y = self.router(x, *args, **kwargs)
        self._note["scores"] = y if isinstance(y, mx.array) else None
        return y


def run_text(model: nn.Module, tokens: list[int], name: str = "") -> Pass:
    """Run tokens through the model once and look at every MoE layer; the model stays as it was."""
    layers = moe_layers(model)
    notes = [{} for _ in layers]
    count = num_experts(layers[0].experts)
    with _watching(layers, notes):
        mx.eval(model(mx.array([tokens])), [[v for v in note.values() if v is not None] for note in notes])
    experts = np.stack([_rows(note["indices"]) for note in notes], axis=1)
    marks = np.ones(len(experts), dtype=bool)
    scores = [note.get("scores") for note in notes]
    usable = [s is not None and s.shape[-1] == count for s in scores]
    return Pass(
        RoutingTrace(experts, count, marks, model=name),
        [_rows(s.astype(mx.float32)) if ok else None for s, ok in zip(scores, usable, strict=True)],
        [_size_of(note["x"]) for note in notes],
        [_size_of(note["y"]) for note in notes],
    )


@contextmanager
def _watching(layers, notes):
    originals = [(layer, layer.experts) for layer in layers]
    routers = []
    try:
        for layer, note in zip(layers, notes, strict=True):
            layer.experts = _Watched(layer.experts, note)
            for name in ("gate", "router"):
                router = layer.block.get(name)
                if isinstance(router, nn.Linear | nn.QuantizedLinear):
                    routers.append((layer.block, name, router))
                    setattr(layer.block, name, _WatchedRouter(router, note))
        yield
    finally:
        for block, name, router in routers:
            setattr(block, name, router)
        for layer, experts in originals:
            layer.experts = experts


def _rows(array) -> np.ndarray:
    return np.array(array).reshape(-1, array.shape[-1])


def _size_of(array) -> tuple[float, float]:
    values = array.astype(mx.float32)
    return mx.sqrt(values.square().mean()).item(), mx.abs(values).max().item()


# --- figures ------------------------------------------------------------------------------------------


def pass_figures(one: Pass, layer_numbers: list[int]) -> dict:
    """Per MoE layer: activations, entropy, margin, overlap, co-activation, foretold by the layer before or not."""
    experts, count = one.trace.experts, one.trace.num_experts
    recall, baseline = statistics.next_layer_recall(experts, count)
    overlap = statistics.consecutive_overlap(experts, count)
    lift = statistics.coactivation_lift(experts, count)
    entropy = routing_entropy(one.trace.loads())
    rows = []
    for l, number in enumerate(layer_numbers):
        gap = None if one.scores[l] is None else statistics.margins(one.scores[l], experts.shape[2])
        rows.append(
            {
                "layer": number,
                "input_rms": one.inputs[l][0],
                "input_max": one.inputs[l][1],
                "output_rms": one.outputs[l][0],
                "output_max": one.outputs[l][1],
                "entropy": float(entropy[l]),
                "margin_median": None if gap is None else float(np.median(gap)),
                "margin_lowest_tenth": None if gap is None else float(np.quantile(gap, 0.1)),
                "overlap_with_token_before": _number(overlap[l]),
                "strongest_pair": lift[l][:2],
                "strongest_pair_lift": _number(lift[l][2]),
                "foretold_by_layer_before": None if l == 0 else _number(recall[l - 1]),
                "foretold_by_popularity": None if l == 0 else _number(baseline[l - 1]),
            }
        )
    return {
        "source": "measured",
        "tokens": len(one.trace),
        "overlap_by_chance": experts.shape[2] / count,
        "layers": rows,
    }


def _number(value) -> float | None:
    """For JSON, which has no NaN."""
    return None if np.isnan(value) else float(value)


def domain_figures(passes: dict[str, Pass]) -> dict:
    """How alike texts of different domains use the experts: cosine of loads, mean over layers."""
    loads = {name: one.trace.loads() for name, one in passes.items()}
    return {
        "source": "measured",
        "similarity": {
            a: {b: float(statistics.load_similarity(loads[a], loads[b]).mean()) for b in loads} for a in loads
        },
    }


def expert_similarity(model: nn.Module) -> list[dict]:
    """Per MoE layer, cosine of the experts' weights: mean over pairs, and the most alike pair.

    On 16 evenly spaced rows of the last projection of each expert, dequantised.
    """
    result = []
    for layer in moe_layers(model):
        linear = dict(switch_linears(layer.experts))
        linear = linear.get("down_proj") or linear["fc2"]
        rows = mx.array(np.linspace(0, linear.weight.shape[1] - 1, SAMPLED_ROWS).astype(np.int32))
        weight = mx.take(linear.weight, rows, axis=1)
        if "scales" in linear:
            biases = None if linear.get("biases") is None else mx.take(linear.biases, rows, axis=1)
            scales = mx.take(linear.scales, rows, axis=1)
            weight = mx.dequantize(weight, scales, biases, linear.group_size, linear.bits, linear.mode)
        flat = np.array(weight.astype(mx.float32)).reshape(weight.shape[0], -1)
        flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)
        cosine = flat @ flat.T
        np.fill_diagonal(cosine, -1)
        a, b = np.unravel_index(cosine.argmax(), cosine.shape)
        pairs = cosine[~np.eye(len(cosine), dtype=bool)]
        result.append(
            {
                "layer": layer.number,
                "mean_cosine": float(pairs.mean()) if len(pairs) else None,
                "most_alike": [int(a), int(b)],
                "most_alike_cosine": float(cosine[a, b]),
            }
        )
    return result


@dataclass
class LayerSeconds:
    """Seconds of each decoder layer, [number of layers], with a stop before and after each."""

    prompt: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)


def time_layers(model: nn.Module, tokens: list[int], repeats: int = 3) -> LayerSeconds:
    """Time every decoder layer on a prompt and on single tokens after it; the median of `repeats` each."""
    prompts, singles = [], []
    for _ in range(repeats):
        cache = make_prompt_cache(model)
        prompts.append(_timed_pass(model, tokens, cache))
        singles.append(_timed_pass(model, tokens[-1:], cache))
    return LayerSeconds(np.median(prompts, axis=0).tolist(), np.median(singles, axis=0).tolist())


def _timed_pass(model, tokens, cache) -> list[float]:
    number = {id(layer): n for n, layer in enumerate(model.layers)}
    seconds = [0.0] * len(number)
    classes = {type(layer) for layer in model.layers}
    originals = {kind: kind.__call__ for kind in classes}

    def timed(original):
        def call(self, x, *args, **kwargs):
            mx.eval(x)
            begin = time.perf_counter()
            y = original(self, x, *args, **kwargs)
            mx.eval(y)
            seconds[number[id(self)]] += time.perf_counter() - begin
            return y

        return call

    try:
        for kind, original in originals.items():
            kind.__call__ = timed(original)
        mx.eval(model(mx.array([tokens]), cache=cache))
    finally:
        for kind, original in originals.items():
            kind.__call__ = original
    return seconds
