"""Scenarios: what a router's preferences can look like, without a model. Numpy only.

Dimensions: T tokens, E experts.
"""

from __future__ import annotations

import numpy as np

SCENARIOS = {
    "balanced": "no expert is preferred",
    "skewed": "popularity falls as 1 / rank (Zipf)",
    "hot": "one expert is wanted by most tokens",
    "drifting": "Zipf, and who is popular changes from the first token to the last",
    "correlated": "each text keeps to a topic, each topic to a family of experts",
}


def preferences(scenario: str, num_tokens: int, num_experts: int, seed: int = 0) -> np.ndarray:
    """float32 [T, E]: what is added to the logits of a router without preferences of its own."""
    if scenario not in SCENARIOS:
        raise ValueError(f"unknown scenario {scenario!r}: choose {', '.join(SCENARIOS)}")
    random = np.random.default_rng(seed)
    zipf = -np.log(np.arange(1, num_experts + 1))
    if scenario == "balanced":
        one_for_all = np.zeros(num_experts)
    elif scenario == "skewed":
        one_for_all = random.permutation(zipf)
    elif scenario == "hot":
        one_for_all = np.zeros(num_experts)
        one_for_all[random.integers(num_experts)] = 3
    elif scenario == "drifting":
        early, late = random.permutation(zipf), random.permutation(zipf)
        return np.linspace(early, late, num_tokens, dtype=np.float32)
    else:
        return _topics(num_tokens, num_experts, random)
    return np.broadcast_to(one_for_all, (num_tokens, num_experts)).astype(np.float32)


def _topics(num_tokens, num_experts, random, tokens_of_a_text=64):
    count = min(8, num_experts)
    topic_of_expert = random.permutation(np.arange(num_experts) % count)  # families are scattered over numbers
    texts = random.integers(0, count, -(-num_tokens // tokens_of_a_text))
    topic_of_token = np.repeat(texts, tokens_of_a_text)[:num_tokens]
    return np.where(topic_of_expert == topic_of_token[:, None], 2.5, 0).astype(np.float32)


def hot_experts(loads, factor: float = 4.0, sigmas: float = 3.0) -> np.ndarray:
    """bool [L, E]: experts with more than `factor` times the mean load, for expert loads [L, E] in slots.

    A count of n slots is uncertain by sqrt(n): n - sigmas sqrt(n) must exceed factor x mean, so that a few
    tokens make no hot expert. An expert above the mean load of a device, sum / D, is a straggler under every
    placement without copies.
    """
    loads = np.asarray(loads, np.float64)
    return loads - sigmas * np.sqrt(loads) > factor * loads.mean(axis=1, keepdims=True)


def tokens_until_hot(experts, expert: int, num_experts: int, factor: float = 4.0, sigmas: float = 3.0) -> int | None:
    """Tokens of one layer, experts [T, k], after which the rule of `hot_experts` first holds; None: never."""
    experts = np.asarray(experts)
    count = (experts == expert).any(axis=1).cumsum()
    mean = np.arange(1, len(experts) + 1) * experts.shape[1] / num_experts
    hot = count - sigmas * np.sqrt(count) > factor * mean
    return int(hot.argmax()) + 1 if hot.any() else None
