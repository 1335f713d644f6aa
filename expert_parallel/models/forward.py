"""Forward pass: how a loaded model routes real text, and where its time goes. Everything here is measured.

Dimensions: T tokens, L MoE layers, E experts, k chosen per token.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..balance import routing_entropy
from ..layers import StandIn, moe_layers
from ..trace import RoutingTrace, record_routing, replaced
from . import statistics


@dataclass
class Pass:
    """One text through the model: choices of the router [T, L, k], and by layer its scores [T, E] before the top-k.

    scores  [L]; None where the router keeps them to itself
    """

    trace: RoutingTrace
    scores: list[np.ndarray | None]


class _Noting(StandIn):
    """Stands before a router and keeps what it answers."""

    def __init__(self, router: nn.Module, note):
        super().__init__(router)
        self._note = note

    def __call__(self, x, *args, **kwargs):
        y = self.experts(x, *args, **kwargs)
        self._note(y)
        return y


def run_text(model: nn.Module, tokens: list[int], name: str = "") -> Pass:
    """Run tokens through the model once and look at every MoE layer; the model stays as it was."""
    layers = moe_layers(model)
    answers = [[] for _ in layers]
    with ExitStack() as stack:
        for layer, noted in zip(layers, answers, strict=True):
            for router in [name for name, m in layer.block.items() if isinstance(m, nn.Linear | nn.QuantizedLinear)]:
                stack.callback(setattr, layer.block, router, layer.block[router])
                setattr(layer.block, router, _Noting(layer.block[router], noted.append))
        with record_routing(model, name=name, prompt_tokens=len(tokens)) as trace:
            mx.eval(model(mx.array([tokens])), answers)
    # A router is the linear layer of the block that answers with a score for each expert.
    scores = [[y for y in noted if y.shape[-1] == trace.num_experts] for noted in answers]
    rows = [np.array(y[0].astype(mx.float32)).reshape(-1, trace.num_experts) if len(y) == 1 else None for y in scores]
    return Pass(trace, rows)


def pass_figures(one: Pass, layer_numbers: list[int]) -> dict:
    """Per MoE layer: entropy, margin, overlap, co-activation, foretold by the layer before or by use."""
    experts, count = one.trace.experts, one.trace.num_experts
    recall, baseline = ([None, *values] for values in statistics.next_layer_recall(experts, count))
    overlap, lift = (f(experts, count) for f in (statistics.consecutive_overlap, statistics.coactivation_lift))
    entropy, rows = routing_entropy(one.trace.loads()), []
    for l, number in enumerate(layer_numbers):
        gap = None if one.scores[l] is None else statistics.margins(one.scores[l], experts.shape[2])
        rows.append(
            {
                "layer": number,
                "entropy": float(entropy[l]),
                "margin_median": None if gap is None else float(np.median(gap)),
                "margin_lowest_tenth": None if gap is None else float(np.quantile(gap, 0.1)),
                "overlap_with_token_before": overlap[l],
                "strongest_pair": lift[l][:2],
                "strongest_pair_lift": lift[l][2],
                "foretold_by_layer_before": recall[l],
                "foretold_by_popularity": baseline[l],
            }
        )
    chance = experts.shape[2] / count
    return {"source": "measured", "tokens": len(one.trace), "overlap_by_chance": chance, "layers": rows}


def similarity_of_loads(passes: dict[str, Pass]) -> dict[str, dict[str, float]]:
    """How alike texts use the experts: cosine of loads, mean over layers, for every pair of texts."""
    loads = {name: one.trace.loads() for name, one in passes.items()}
    return {a: {b: float(statistics.load_similarity(loads[a], loads[b]).mean()) for b in loads} for a in loads}


def time_layers(model: nn.Module, tokens: list[int], repeats: int = 3) -> dict[str, list[float]]:
    """Seconds of every decoder layer on a prompt and on a single token after it, with a stop before and after each.

    {"prompt": [layers], "token": [layers]}; the median of `repeats`.
    """
    prompts, singles = [], []
    for _ in range(repeats):
        cache = make_prompt_cache(model)
        prompts.append(_timed_pass(model, tokens, cache))
        singles.append(_timed_pass(model, tokens[-1:], cache))
    return {"prompt": np.median(prompts, axis=0).tolist(), "token": np.median(singles, axis=0).tolist()}


def _timed_pass(model, tokens, cache) -> list[float]:
    number = {id(layer): n for n, layer in enumerate(model.layers)}
    seconds = [0.0] * len(number)

    def timed(original):
        def call(self, x, *args, **kwargs):
            mx.eval(x)
            begin = time.perf_counter()
            y = original(self, x, *args, **kwargs)
            mx.eval(y)
            seconds[number[id(self)]] += time.perf_counter() - begin
            return y

        return call

    with ExitStack() as stack:
        for kind in {type(layer) for layer in model.layers}:
            stack.enter_context(replaced(kind, {"__call__": timed(kind.__call__)}))
        mx.eval(model(mx.array([tokens]), cache=cache))
    return seconds
