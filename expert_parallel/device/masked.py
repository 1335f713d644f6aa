"""Masked or compact: which of the two ways of skipping foreign slots (experts.py) is quicker on this device.

Dimensions: T tokens, k experts chosen per token, E experts, H hidden.
"""

from __future__ import annotations

import timeit

import mlx.core as mx
import numpy as np

from ..experts import is_rank
from ..layers import MoELayer, activation_type, expert_tensors, hidden_size

MASKED_GAIN = 1.1  # how much quicker masked must be: it holds a spare expert in each layer


def measure_masked(layers: list[MoELayer], group=None) -> int:
    """The most slots for which masked is quicker than compact on this device, measured on one layer; sets it in all.

    On the CPU it is 0 unmeasured: the host itself computes, so nothing waits for it, and skipped slots are time
    saved; so it is where experts are read as they are asked for, which takes the ids. Ranks take the smallest of
    theirs: with replicas both ways choose other holders.
    """
    if mx.default_device().type == mx.cpu or not all(store.all_here for store in layers[0].experts.stores):
        return 0
    most = _measured_on(layers[0].experts)
    if is_rank(group):
        most = int(mx.distributed.all_min(mx.array(most), group=group).item())
    for layer in layers:
        layer.experts.masked_up_to = most
    return most


def _measured_on(sharded) -> int:
    """Slots of the largest step that masked answered quicker, of growing ones; 0: none."""
    most = 0
    for x, ids in random_steps(sharded, (1, 4, 8, 16, 32, 64)):
        if _quickest(sharded.compact, x, ids) < MASKED_GAIN * _quickest(sharded.masked, x, ids):
            break
        most = ids.size
    sharded.slots_served[:] = 0
    return most


def random_steps(sharded, counts):
    """(x [1, T, H], indices [1, T, k]) for these T, every expert as likely as another."""
    k, dtype = min(8, sharded.num_experts), activation_type(expert_tensors(sharded.replaced_module()))
    for tokens in counts:
        x = mx.random.normal((1, tokens, hidden_size(sharded)), key=mx.random.key(tokens)).astype(dtype)
        ids = mx.array(np.random.default_rng(tokens).random((1, tokens, sharded.num_experts)).argsort(-1)[..., :k])
        mx.eval(x, ids)
        yield x, ids


def _quickest(way, x, ids) -> float:
    """Seconds; what is built at the first call is not counted."""
    return min(timeit.repeat(lambda: mx.eval(way(x, ids)), number=1, repeat=7)[1:])
