"""Affinity: experts that tokens choose together, put together. Numpy only.

Dimensions: T tokens, L layers, E experts, k chosen, D devices. A token whose experts are on few devices
has few to send to (fan-out). Pairs stand for whole choices here: what is maximised is the number of pairs
chosen together that share a device, by swaps of two experts that keep every device's load within its limit.
"""

from __future__ import annotations

import numpy as np

SWEEPS = 24  # over all experts, each offered its best swap


def coactivation(experts, num_experts: int, max_tokens: int = 100_000) -> np.ndarray:
    """float32 [L, E, E]: tokens that chose both experts of a pair, 0 on the diagonal.

    experts     [T, L, k] ids, of one token all different
    max_tokens  from longer traces every so many-th token is taken
    """
    experts = np.asarray(experts)[:: -(-len(experts) // max_tokens) or 1].astype(np.int64)
    if experts.size and not 0 <= experts.min() <= experts.max() < num_experts:
        raise ValueError(f"experts run from {experts.min()} to {experts.max()}, there are {num_experts}")
    one, other = np.triu_indices(experts.shape[2], 1)
    pairs = np.zeros((experts.shape[1], num_experts, num_experts), np.float32)
    for l, of_layer in enumerate(pairs):
        codes = experts[:, l, one] * num_experts + experts[:, l, other]
        of_layer += np.bincount(codes.ravel(), minlength=num_experts**2).reshape(num_experts, num_experts)
    return pairs + pairs.transpose(0, 2, 1)


def gather_by_affinity(loads, pairs, held, limit) -> np.ndarray:
    """bool [L, D, E]: `held` after swaps that bring experts chosen together onto one device.

    loads  [L, E];  pairs  [L, E, E], symmetric, 0 on the diagonal
    held   bool [L, D, E]; one holder per expert. Slot counts stay as they are
    limit  [L]; no device's load goes above it
    """
    num_layers, num_devices, num_experts = held.shape
    rows = np.arange(num_layers)
    pairs = pairs / np.maximum(pairs.mean(axis=(1, 2), keepdims=True), 1e-30)
    home = held.argmax(axis=1)  # [L, E]
    load = np.matmul(held, loads[..., None])[..., 0]  # [L, D]
    near = np.matmul(held.astype(pairs.dtype), pairs)  # [L, D, E]: pairs of e with the experts of d
    random = np.random.default_rng(0)
    for sweep in range(SWEEPS):
        # Annealing: gains are judged with noise that falls to none for the last third of the sweeps.
        heat = max(0.0, 1 - 1.5 * sweep / SWEEPS) * float(near.std()) * 0.5
        for e in random.permutation(num_experts):
            # 1. What a swap of e with each f would gain in pairs [L, E], and add to the load of e's device.
            here = home[:, e]  # [L]
            at_home = np.take_along_axis(near, home[:, None], axis=1)[:, 0]  # [L, E]
            there = np.take_along_axis(near[:, :, e], home, axis=1)
            gain = there - at_home[:, e, None] + near[rows, here] - at_home - 2 * pairs[:, e]
            gain += random.normal(0, heat, gain.shape)
            change = loads - loads[:, e, None]
            fits = load[rows, here][:, None] + change <= limit[:, None]
            fits &= np.take_along_axis(load, home, axis=1) - change <= limit[:, None]
            gain[~fits | (home == here[:, None])] = -np.inf
            # 2. The best one, in layers where it gains.
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
    return home[:, None, :] == np.arange(num_devices)[:, None]
