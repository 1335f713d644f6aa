"""What a placement learns from a trace: how many tokens it takes, how far that holds, and what copies are worth.

Dimensions: T tokens, L MoE layers, E experts, k chosen per token, D devices. Numpy only; every figure is simulated.
"""

from __future__ import annotations

import numpy as np

from ..balance import balancedness
from ..placing.strategies import place_experts
from ..serving import Serving
from .remedies import Choices, device_slots, served

FIRST = 16  # tokens of the shortest part that a placement is fitted on
CLOSE = 0.01  # of balancedness: what is nearer than that to the best is as good


def learning_curve(fit: Choices, test: Choices, num_devices: int, redundant: int) -> list[dict]:
    """Balancedness of placements fitted on the first 16, 64, 256, ... tokens: on these, and on all of `test`."""
    strategy, lengths, curve = "replicated" if redundant else "balanced", [len(fit.experts)], []
    while lengths[0] > 2 * FIRST:
        lengths.insert(0, max(lengths[0] // 4, FIRST))
    for length in lengths:
        part = fit.part(slice(length))
        placement = place_experts(part.loads(), num_devices, strategy, redundant)
        both = {}
        for name, tokens in (("fit", part), ("test", test)):
            slots = device_slots(served(placement, tokens), num_devices)
            both[f"balancedness_{name}"] = balancedness(slots, "aggregate")
        curve.append({"tokens": length, **both})
    return curve


def enough_tokens(curve: list[dict]) -> int:
    """The first length from which on no longer one is better by more than 0.01 on the tokens that judge."""
    worth = [row["balancedness_test"] for row in curve]
    return next(row["tokens"] for n, row in enumerate(curve) if max(worth[n:]) - worth[n] <= CLOSE)


def stability(fit: Choices, test: Choices, seed: int = 0) -> dict[str, float]:
    """Cosine of both parts' expert loads, mean over layers, beside that of parts as large dealt out at random."""
    both, cut = np.concatenate([fit.experts, test.experts]), len(fit.experts)
    shuffled = both[np.random.default_rng(seed).permutation(len(both))]

    def cosine(tokens):
        one, other = (Choices(part, fit.num_experts).loads() for part in (tokens[:cut], tokens[cut:]))
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        return float(((one * other).sum(axis=1) / lengths).mean())

    return {"cosine": cosine(both), "cosine_if_shuffled": cosine(shuffled)}


def among_copies(held: np.ndarray, batches: list[Choices]) -> dict[str, float]:
    """Slots of the fullest device over what the optimum leaves there, sums over layers and batches, by the choice.

    held  bool [L, D, E]
    """
    fullest = dict.fromkeys(("optimum", "least loaded", "shared equally", "by turns"), 0.0)
    for of_layer, layer in zip(map(Serving, held), range(len(held)), strict=True):
        for batch in batches:
            ids = batch.experts[:, layer].reshape(-1)
            dealt = {"optimum": of_layer.devices(ids), "least loaded": of_layer.devices(ids, greedy=True)}
            dealt["by turns"] = of_layer.taking_turns(ids)
            for name, device in dealt.items():
                fullest[name] += np.bincount(device).max()
            wanted = np.bincount(ids, minlength=held.shape[2])
            fullest["shared equally"] += (held[layer] @ (wanted / held[layer].sum(axis=0))).max()
    return {name: float(count / fullest["optimum"]) for name, count in fullest.items() if name != "optimum"}
