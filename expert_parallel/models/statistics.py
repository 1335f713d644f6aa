"""Routing statistics: how sure, how repetitive and how predictable a router's choices are. Numpy only.

Dimensions: T tokens, L MoE layers, E experts, k chosen per token. `experts` is [T, L, k] throughout.
"""

from __future__ import annotations

import numpy as np


def margins(scores, top_k: int) -> np.ndarray:
    """[T]; score of the k-th expert less that of the next, for router scores [T, E]: 0 is a coin toss."""
    ordered = -np.sort(-np.asarray(scores, dtype=np.float64), axis=1)
    if ordered.shape[1] <= top_k:
        return np.full(len(ordered), np.inf)
    return ordered[:, top_k - 1] - ordered[:, top_k]


def _chosen(experts, num_experts: int) -> np.ndarray:
    """bool [T, L, E]."""
    experts = np.asarray(experts, dtype=np.int64)
    chosen = np.zeros((*experts.shape[:2], num_experts), dtype=bool)
    np.put_along_axis(chosen, experts, True, axis=2)
    return chosen


def consecutive_overlap(experts, num_experts: int) -> np.ndarray:
    """[L]; share of a token's experts that the token before it had too. Chance gives k / E."""
    chosen = _chosen(experts, num_experts)
    if len(chosen) < 2:
        return np.full(chosen.shape[1], np.nan)
    return (chosen[1:] & chosen[:-1]).sum(axis=2).mean(axis=0) / experts.shape[2]


def coactivation_lift(experts, num_experts: int, at_least: int = 3) -> list[tuple[int, int, float]]:
    """For each layer the pair chosen together most often beyond chance: (expert, expert, lift).

    lift  times chosen together over T P(a) P(b), what it would be if the two knew nothing of each other
    Pairs that met fewer than `at_least` times do not count; (-1, -1, nan) where none is left.
    """
    chosen = _chosen(experts, num_experts).astype(np.float64)
    result = []
    for layer in range(chosen.shape[1]):
        together = chosen[:, layer].T @ chosen[:, layer]
        alone = np.diag(together).copy()
        expected = np.outer(alone, alone) / max(len(chosen), 1)
        lift = np.divide(together, expected, out=np.zeros_like(together), where=(expected > 0) & (together >= at_least))
        np.fill_diagonal(lift, 0)
        a, b = np.unravel_index(lift.argmax(), lift.shape)
        result.append((int(a), int(b), float(lift[a, b])) if lift[a, b] > 0 else (-1, -1, float("nan")))
    return result


def next_layer_recall(experts, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """([L - 1], [L - 1]): how many of layer l + 1's experts can be told from layer l's, and without looking.

    On the first half of the tokens it is counted how often an expert follows another; on the second
    half the k with the highest sums are guessed. The baseline guesses the k most used of layer l + 1.
    """
    experts = np.asarray(experts, dtype=np.int64)
    top_k, half = experts.shape[2], len(experts) // 2
    if half == 0 or experts.shape[1] < 2:
        return (np.full(experts.shape[1] - 1, np.nan),) * 2
    chosen = _chosen(experts, num_experts).astype(np.float64)
    seen, asked = chosen[:half], chosen[half:]
    recall, baseline = [], []
    for layer in range(experts.shape[1] - 1):
        follows = seen[:, layer].T @ seen[:, layer + 1]  # [E, E]
        use = seen[:, layer].sum(axis=0)
        popular = seen[:, layer + 1].mean(axis=0)
        # One pseudo-observation of the usual mix keeps rarely seen experts from saying too much.
        rate = (follows + popular) / (use[:, None] + 1)
        guesses = np.argsort(-(asked[:, layer] @ rate), axis=1, kind="stable")[:, :top_k]
        usual = np.argsort(-popular, kind="stable")[:top_k]
        recall.append(np.take_along_axis(asked[:, layer + 1], guesses, axis=1).mean())
        baseline.append(asked[:, layer + 1][:, usual].mean())
    return np.array(recall), np.array(baseline)


def load_similarity(loads_a, loads_b) -> np.ndarray:
    """[L]; cosine of two expert loads [L, E]: 1 where two texts use the experts alike."""
    a, b = np.asarray(loads_a, dtype=np.float64), np.asarray(loads_b, dtype=np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.divide((a * b).sum(axis=1), lengths, out=np.zeros(len(a)), where=lengths > 0)
