"""Forward pass: how a loaded model routes real text, and where its time goes. Everything here is measured.

Dimensions: T tokens, L MoE layers, E experts, k chosen per token.
"""

from __future__ import annotations

import time
from contextlib import ExitStack

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..balance import routing_entropy
from ..layers import StandIn, moe_layers
from ..trace import RoutingTrace, record_routing, replaced


class _Noting(StandIn):
    """Stands before a router and keeps what it answers."""

    def __init__(self, router: nn.Module, note):
        super().__init__(router)
        self._note = note

    def __call__(self, x, *args, **kwargs):
        y = self.experts(x, *args, **kwargs)
        self._note(y)
        return y


def run_text(model: nn.Module, tokens: list[int], name: str = "") -> tuple[RoutingTrace, list[np.ndarray | None]]:
    """(choices of the routers, scores [T, E] before the top-k by layer) of one text; the model stays as it was.

    None in place of scores where a router keeps them to itself.
    """
    layers = moe_layers(model)
    answers = [[] for _ in layers]
    with ExitStack() as stack:
        for layer, noted in zip(layers, answers, strict=True):
            for router in [name for name, m in layer.block.items() if isinstance(m, nn.Linear | nn.QuantizedLinear)]:
                stack.callback(setattr, layer.block, router, layer.block[router])
                setattr(layer.block, router, _Noting(layer.block[router], noted.append))
        with record_routing(model, name=name) as trace:
            mx.eval(model(mx.array([tokens])), answers)
    # A router is the linear layer of the block that answers with a score for each expert.
    scores = [[y for y in noted if y.shape[-1] == trace.num_experts] for noted in answers]
    rows = [np.array(y[0].astype(mx.float32)).reshape(-1, trace.num_experts) if len(y) == 1 else None for y in scores]
    return trace, rows


def routing_figures(trace: RoutingTrace, scores: list[np.ndarray | None], layer_numbers: list[int]) -> dict:
    """Per MoE layer: entropy, margins, experts shared with the token before, the pair that goes together beyond chance
    (`strongest_pair`), and how well experts are foretold (`next_layer_recall`). None where there is nothing to say.
    """
    experts, count = trace.experts, trace.num_experts
    chosen = _chosen(experts, count)
    shared = (chosen[1:] & chosen[:-1]).sum(axis=2).mean(axis=0) / experts.shape[2] if len(chosen) > 1 else None
    recall, by_use = ([None, *values] for values in next_layer_recall(experts, count))
    entropy, rows = routing_entropy(trace.loads()), []
    for l, number in enumerate(layer_numbers):
        gap, pair = None if scores[l] is None else margins(scores[l], experts.shape[2]), strongest_pair(chosen[:, l])
        rows.append(
            {
                "layer": number,
                "entropy": float(entropy[l]),
                "margin_median": None if gap is None else float(np.median(gap)),
                "margin_lowest_tenth": None if gap is None else float(np.quantile(gap, 0.1)),
                "overlap_with_token_before": None if shared is None else shared[l],
                "strongest_pair": pair and pair[:2],
                "strongest_pair_lift": pair and pair[2],
                "foretold_by_layer_before": recall[l],
                "foretold_by_popularity": by_use[l],
            }
        )
    return {"source": "measured", "tokens": len(trace), "overlap_by_chance": experts.shape[2] / count, "layers": rows}


def margins(scores, top_k: int) -> np.ndarray:
    """[T]; score of the k-th expert less that of the next, for router scores [T, E]: 0 is a coin toss."""
    ordered = -np.sort(-np.asarray(scores, np.float64), axis=1)
    if ordered.shape[1] <= top_k:
        return np.full(len(ordered), np.inf)
    return ordered[:, top_k - 1] - ordered[:, top_k]


def strongest_pair(chosen, at_least: int = 3) -> tuple[int, int, float] | None:
    """(expert, expert, lift) of the two chosen together most often beyond chance, from bool [T, E]; None without any.

    lift  times chosen together over T P(a) P(b), what it would be if the two knew nothing of each other
    Pairs that met fewer than `at_least` times do not count.
    """
    together = chosen.T.astype(np.float64) @ chosen
    alone = together.diagonal().copy()
    np.fill_diagonal(together, 0)
    lift = np.where(together >= at_least, together * len(chosen) / np.maximum(np.outer(alone, alone), 1), 0)
    a, b = np.unravel_index(lift.argmax(), lift.shape)
    return (int(a), int(b), float(lift[a, b])) if lift[a, b] > 0 else None


def load_similarity(traces: dict[str, RoutingTrace]) -> dict[str, dict[str, float]]:
    """How alike texts use the experts: cosine of their loads, mean over layers, for every pair of texts."""
    units = {}
    for name, trace in traces.items():
        loads = trace.loads().astype(np.float64)
        units[name] = loads / np.maximum(np.linalg.norm(loads, axis=1, keepdims=True), 1e-12)
    return {a: {b: float((units[a] * units[b]).sum(axis=1).mean()) for b in units} for a in units}


def next_layer_recall(experts, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """([L - 1], [L - 1]): share of layer l + 1's experts that can be told from layer l's [T, L, k], and without.

    On the first half of the tokens it is counted how often an expert follows another; on the second
    half the k with the highest sums are guessed. The baseline guesses the k most used of layer l + 1.
    """
    experts = np.asarray(experts, np.int64)
    top_k, half = experts.shape[2], len(experts) // 2
    if half == 0:
        return (np.full(experts.shape[1] - 1, np.nan),) * 2
    chosen = _chosen(experts, num_experts).astype(np.float64)
    seen, asked = chosen[:half], chosen[half:]
    recall, baseline = [], []
    for layer in range(experts.shape[1] - 1):
        follows = seen[:, layer].T @ seen[:, layer + 1]  # [E, E]
        popular = seen[:, layer + 1].mean(axis=0)
        # One pseudo-observation of the usual mix keeps rarely seen experts from saying too much.
        rate = (follows + popular) / (seen[:, layer].sum(axis=0)[:, None] + 1)
        guesses = np.argsort(-(asked[:, layer] @ rate), axis=1, kind="stable")[:, :top_k]
        usual = np.argsort(-popular, kind="stable")[:top_k]
        recall.append(np.take_along_axis(asked[:, layer + 1], guesses, axis=1).mean())
        baseline.append(asked[:, layer + 1][:, usual].mean())
    return np.array(recall), np.array(baseline)


def _chosen(experts, num_experts: int) -> np.ndarray:
    """bool [T, L, E]."""
    chosen = np.zeros((*experts.shape[:2], num_experts), bool)
    np.put_along_axis(chosen, np.asarray(experts, np.int64), True, axis=2)
    return chosen


def time_layers(model: nn.Module, tokens: list[int], repeats: int = 3) -> dict[str, list[float]]:
    """Seconds of every decoder layer on a prompt and on a single token after it, with a stop before and after each.

    {"prompt": [layers], "token": [layers]}; the median of `repeats`.
    """
    prompts, singles = [], []
    for _ in range(repeats):
        cache = make_prompt_cache(model)
        prompts.append([seconds for seconds, _ in _pass(model, tokens, cache)])
        singles.append([seconds for seconds, _ in _pass(model, tokens[-1:], cache)])
    return {"prompt": np.median(prompts, axis=0).tolist(), "token": np.median(singles, axis=0).tolist()}


def first_not_a_number(model: nn.Module, rows: list[list[int]]) -> int | None:
    """The first decoder layer whose answer to any of these rows of tokens has a NaN; None where no layer's has."""
    passes = [_pass(model, tokens, make_prompt_cache(model)) for tokens in rows]
    numbers = range(len(model.layers))
    return next((n for n in numbers if any(mx.isnan(seen[n][1]).any().item() for seen in passes)), None)


def _pass(model, tokens, cache) -> list[tuple[float, mx.array]]:
    """(seconds, answer) of every decoder layer, with a stop before and after each."""
    number = {id(layer): n for n, layer in enumerate(model.layers)}
    seen = [(0.0, mx.zeros(1))] * len(number)

    def stopping(original):
        def call(self, x, *args, **kwargs):
            mx.eval(x)
            begin = time.perf_counter()
            y = original(self, x, *args, **kwargs)
            mx.eval(y)
            seen[number[id(self)]] = time.perf_counter() - begin, y[0] if isinstance(y, tuple) else y
            return y

        return call

    with ExitStack() as stack:
        for kind in {type(layer) for layer in model.layers}:
            stack.enter_context(replaced(kind, {"__call__": stopping(kind.__call__)}))
        mx.eval(model(mx.array([tokens]), cache=cache))
    return seen
