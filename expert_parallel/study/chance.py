"""Chance: what uniform routing would give for so many tokens, beside which a skew is to be read. Numpy only.

A short run looks skewed whatever its router prefers: 17 tokens make 136 choices among 128 experts at top-8, and leave a
third of the experts out. Dimensions: T tokens, L MoE layers, E experts, k chosen per token, D devices.
"""

from __future__ import annotations

import math

import numpy as np

from ..balance import balancedness, routing_entropy
from ..projection.step import uniform_experts

SLOTS = 4_000_000  # random numbers per figure, at most; the more tokens, the less they scatter


def uniform_routing(num_tokens: int, top_k: int, held) -> dict[str, float]:
    """Means of a layer's figures under uniform routing of so many tokens, simulated with a fixed seed.

    held  bool [D, E]; replicas share an expert's load equally, as in `Placement.device_loads`; one that nobody holds
          loads nobody
    {"hottest_over_mean", "entropy", "never_used", "balancedness"}; never_used by formula: E (1 - k / E) ^ T
    """
    num_experts = held.shape[1]
    draws = int(np.clip(SLOTS // max(num_tokens * num_experts, 1), 1, 200))
    loads = np.zeros((draws, num_experts))
    for draw, counts in enumerate(loads):
        for start in range(0, num_tokens, 16384):  # in parts: of a long trace the numbers would take gigabytes
            part = uniform_experts(min(16384, num_tokens - start), 1, num_experts, top_k, seed=draw * 1000 + start)
            counts += np.bincount(part.ravel(), minlength=num_experts)
    return {
        "hottest_over_mean": float((loads.max(axis=1) / loads.mean(axis=1)).mean()),
        "entropy": float(routing_entropy(loads).mean()),
        "never_used": num_experts * (1 - top_k / num_experts) ** num_tokens,
        "balancedness": balancedness((loads / np.maximum(held.sum(axis=0), 1)) @ held.T),
    }


def expected_fan_out(experts_per_device, num_experts: int, top_k: int) -> float:
    """Devices touched per token under uniform routing without replacement.

    sum over devices of 1 - C(E - n_d, k) / C(E, k)
    """
    none = math.comb(num_experts, top_k)
    return sum(1 - math.comb(num_experts - n, top_k) / none for n in experts_per_device)
