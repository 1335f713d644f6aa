"""Affinity: experts that tokens choose together, put together. Numpy only.

Dimensions: T tokens, L layers, E experts, k chosen, D devices. A token whose experts are on few devices
has few to send to (fan-out). Pairs stand for whole choices here: what is maximised is the number of pairs
chosen together that share a device, by swaps of two experts that keep every device within its limit.
"""

from __future__ import annotations

import numpy as np

SWEEPS = 24  # over all experts, each offered its best swap


def coactivation(experts, num_experts: int, max_tokens: int = 100_000) -> np.ndarray:
    """float32 [L, E, E]: tokens that chose both experts of a pair, 0 on the diagonal.

    experts     [T, L, k] ids, of one token all different
    max_tokens  from longer traces every so many-th token is taken
    """
    experts = np.asarray(experts)
    if experts.ndim != 3:
        raise ValueError(f"chosen experts are [tokens, layers, k], got {list(experts.shape)}")
    if experts.size and not 0 <= experts.min() <= experts.max() < num_experts:
        raise ValueError(f"experts run from {experts.min()} to {experts.max()}, there are {num_experts}")
    experts = experts[:: -(-len(experts) // max_tokens) or 1]
    num_layers, top_k = experts.shape[1:]
    one, other = np.triu_indices(top_k, 1)
    pairs = np.zeros((num_layers, num_experts, num_experts), dtype=np.float32)
    for l, of_layer in enumerate(pairs):
        chosen = experts[:, l].astype(np.int64)
        codes = chosen[:, one] * num_experts + chosen[:, other]
        counts = np.bincount(codes.ravel(), minlength=num_experts**2).reshape(num_experts, num_experts)
        of_layer += counts + counts.T
        np.fill_diagonal(of_layer, 0)
    return pairs


def gather_by_affinity(loads, pairs, held, limit, seed: int = 0) -> np.ndarray:
    """bool [L, D, E]: `held` after swaps that bring experts chosen together onto one device.

    loads  [L, E];  pairs  [L, E, E], symmetric
    held   bool [L, D, E]; one holder per expert. Slot counts stay as they are
    limit  [L]; no device's load goes above it, unless it starts there
    """
    num_layers, num_devices, num_experts = held.shape
    rows = np.arange(num_layers)
    pairs = pairs * (1 - np.eye(num_experts, dtype=pairs.dtype))
    pairs = pairs / np.maximum(pairs.sum(axis=(1, 2), keepdims=True) / num_experts**2, 1e-30)  # mean 1
    home = held.argmax(axis=1)  # [L, E]
    load = np.matmul(held, loads[..., None])[..., 0]
    most = np.broadcast_to(limit[:, None], load.shape)
    near = np.matmul(held.astype(pairs.dtype), pairs)  # [L, D, E]: pairs of e with the experts of d
    random = np.random.default_rng(seed)
    best, best_value = home.copy(), _together(near, home)
    for sweep in range(SWEEPS):
        # Annealing: gains are judged with noise that falls to none for the last third of the sweeps.
        heat = max(0.0, 1 - 1.5 * sweep / SWEEPS) * float(near.std()) * 0.5
        swapped = 0
        for e in random.permutation(num_experts):
            here = home[:, e]  # [L]
            own = near[rows, here]  # [L, E]
            at_home = np.take_along_axis(near, home[:, None], axis=1)[:, 0]
            there = np.take_along_axis(near[:, :, e], home, axis=1)
            gain = there - own[:, e, None] + own - at_home - 2 * pairs[:, e]
            if heat:
                gain = gain + random.normal(0, heat, gain.shape)
            change = loads - loads[:, e, None]  # what this device gains by taking f for e
            fits = (load[rows, here][:, None] + change <= most[rows, here][:, None]) & (
                np.take_along_axis(load - most, home, axis=1) <= change
            )
            gain = np.where(fits & (home != here[:, None]), gain, -np.inf)
            f = gain.argmax(axis=1)
            layers = np.flatnonzero(gain[rows, f] > 1e-6)
            f, p = f[layers], here[layers]
            q = home[layers, f]
            shift = pairs[layers, f] - pairs[layers, e]
            near[layers, p] += shift
            near[layers, q] -= shift
            load[layers, p] += change[layers, f]
            load[layers, q] -= change[layers, f]
            home[layers, e], home[layers, f] = q, p
            swapped += len(layers)
        value = _together(near, home)
        better = value > best_value
        best[better], best_value[better] = home[better], value[better]
        if not heat and not swapped:
            break
    return best[:, None, :] == np.arange(num_devices)[:, None]


def _together(near, home):
    return np.take_along_axis(near, home[:, None], axis=1).sum(axis=(1, 2))
