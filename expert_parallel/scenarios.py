"""Scenarios: synthetic routing with a known kind of imbalance. Numpy only, apart from the trace's class.

Dimensions: T tokens, L MoE layers, E experts, k chosen per token.
"""

from __future__ import annotations

import numpy as np

from .routing import RoutingTrace

SCENARIOS = {
    "balanced": "every expert equally likely",
    "skewed": "popularity by Zipf's law, exponent 1",
    "hot": "one expert is among the chosen of nearly every token",
    "drifting": "popular experts move along the expert numbers over time",
    "correlated": "eight topics, each with favourite experts; topics come in runs",
}


def synthesise(
    scenario: str, num_tokens: int, num_experts: int, top_k: int, num_layers: int = 1, seed: int = 0
) -> RoutingTrace:
    """A trace of a scenario: top-k of log popularity plus Gumbel noise, i.e. drawn without replacement.

    Raises ValueError for an unknown scenario or top_k over num_experts.
    """
    if scenario not in SCENARIOS:
        raise ValueError(f"unknown scenario {scenario!r}: choose one of {', '.join(SCENARIOS)}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top-{top_k} needs 1 to {num_experts}, the number of experts")
    rng = np.random.default_rng(seed)
    layers = []
    for _ in range(num_layers):
        logits = _popularity(scenario, num_tokens, num_experts, rng)
        noise = rng.gumbel(size=(num_tokens, num_experts))
        layers.append(np.argpartition(-(logits + noise), top_k - 1, axis=1)[:, :top_k])
    experts = np.stack(layers, axis=1).astype(np.uint16)
    return RoutingTrace(experts, num_experts, np.ones(num_tokens, dtype=bool), f"synthetic {scenario}")


def _popularity(scenario, num_tokens, num_experts, rng):
    """Log popularity [T, E] (or [E]) of one layer; which experts are popular is drawn."""
    order = rng.permutation(num_experts)
    zipf = -np.log1p(np.arange(num_experts))
    if scenario == "balanced":
        return np.zeros(num_experts)
    if scenario == "skewed":
        return zipf[order]
    if scenario == "hot":
        return np.where(np.arange(num_experts) == order[0], 8.0, 0.0)
    if scenario == "drifting":
        shift = np.arange(num_tokens)[:, None] * num_experts // max(1, num_tokens)
        return zipf[(np.arange(num_experts)[None, :] - shift) % num_experts]
    topics = np.stack([zipf[rng.permutation(num_experts)] * 1.5 for _ in range(8)])
    return topics[np.repeat(rng.integers(8, size=num_tokens // 32 + 1), 32)[:num_tokens]]
