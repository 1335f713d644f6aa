"""Balance: how evenly load falls on devices. Numpy only.

Dimensions: T tokens, L MoE layers, E experts, k chosen, D devices. `device_loads` is
[L, D] throughout, from `Placement.device_loads(trace.loads())`.
"""

from __future__ import annotations

import math

import numpy as np


def _check(device_loads) -> np.ndarray:
    loads = np.asarray(device_loads, dtype=np.float64)
    if loads.ndim != 2 or 0 in loads.shape:
        raise ValueError(f"loads are [layers, devices] or [layers, experts], got {list(loads.shape)}")
    bad = np.argwhere(~np.isfinite(loads) | (loads < 0))
    if len(bad):
        layer, column = bad[0]
        raise ValueError(f"loads must be finite and not negative: layer {layer} has {loads[layer, column]} at {column}")
    return loads


def balancedness(device_loads, average: str = "layers") -> float:
    """Mean load over the fullest device's load, 1 when even and 1/D when one device does it all.

    average  layers     (mean + 1e-5) / (max + 1e-5) in each layer, then the mean over layers
                        (SGLang, expert_distribution.py)
             aggregate  sum over layers of the mean / sum over layers of the maximum: the share of
                        time that devices are busy if layers wait for each other (vLLM, eplb_state.py)
    """
    loads = _check(device_loads)
    if average == "layers":
        return float(balancedness_per_layer(loads).mean())
    if average == "aggregate":
        highest = loads.max(axis=1).sum()
        return float(loads.mean(axis=1).sum() / highest) if highest > 0 else 1.0
    raise ValueError(f'average is "layers" or "aggregate", got {average!r}')


def balancedness_per_layer(device_loads) -> np.ndarray:
    """[L]; see `balancedness`."""
    loads = _check(device_loads)
    return (loads.mean(axis=1) + 1e-5) / (loads.max(axis=1) + 1e-5)


def imbalance_ratio(device_loads) -> np.ndarray:
    """[L]; max / mean - 1: the extra time the fullest device takes (TensorRT-LLM)."""
    loads = _check(device_loads)
    mean = loads.mean(axis=1)
    return np.divide(loads.max(axis=1), mean, out=np.ones_like(mean), where=mean > 0) - 1


def coefficient_of_variation(device_loads) -> np.ndarray:
    """[L]; standard deviation over mean, 0 for a layer without load."""
    loads = _check(device_loads)
    mean = loads.mean(axis=1)
    return np.divide(loads.std(axis=1), mean, out=np.zeros_like(mean), where=mean > 0)


def min_max_ratio(device_loads) -> np.ndarray:
    """[L]; load of the emptiest device over that of the fullest, 1 for a layer without load."""
    loads = _check(device_loads)
    highest = loads.max(axis=1)
    return np.divide(loads.min(axis=1), highest, out=np.ones_like(highest), where=highest > 0)


def lower_bound(loads, num_devices: int, redundant: int = 0) -> np.ndarray:
    """[L]; load that the fullest device of no placement can go below, for expert loads [L, E].

    max(mean device load, largest load per copy), where `redundant` copies were given, one after the
    other, to the expert with the most load per copy: nothing makes the largest share smaller.
    An expert has at most one copy per device. The bound itself is not always attainable.
    """
    loads = _check(loads)
    copies = np.ones_like(loads)
    rows = np.arange(len(loads))
    for _ in range(redundant):
        share = np.where(copies < num_devices, loads / copies, -1)
        copies[rows, share.argmax(axis=1)] += 1
    return np.maximum(loads.sum(axis=1) / num_devices, (loads / copies).max(axis=1))


def hot_experts(loads, factor: float = 4.0, sigmas: float = 3.0) -> np.ndarray:
    """bool [L, E]: experts with more than `factor` times the mean load, for expert loads [L, E] in slots.

    A count of n slots is uncertain by sqrt(n): n - sigmas sqrt(n) must exceed factor x mean, so that a few
    tokens make no hot expert. An expert above the mean load of a device, sum / D, is a straggler under every
    placement without copies.
    """
    loads = _check(loads)
    return loads - sigmas * np.sqrt(loads) > factor * loads.mean(axis=1, keepdims=True)


def tokens_until_hot(experts, expert: int, num_experts: int, factor: float = 4.0, sigmas: float = 3.0) -> int | None:
    """Tokens of one layer, experts [T, k], after which the rule of `hot_experts` first holds; None: never."""
    experts = np.asarray(experts)
    count = (experts == expert).any(axis=1).cumsum()
    mean = np.arange(1, len(experts) + 1) * experts.shape[1] / num_experts
    hot = count - sigmas * np.sqrt(count) > factor * mean
    return int(hot.argmax()) + 1 if hot.any() else None


def routing_entropy(loads) -> np.ndarray:
    """[L]; entropy of the expert loads [L, E] over log E: 1 for uniform use, 0 for a single expert."""
    loads = _check(loads)
    if loads.shape[1] == 1:
        return np.ones(len(loads))
    total = loads.sum(axis=1, keepdims=True)
    share = np.divide(loads, total, out=np.zeros_like(loads), where=total > 0)
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    return -(share * logs).sum(axis=1) / math.log(loads.shape[1]) + 0.0


def fan_out(experts, held) -> np.ndarray:
    """[L]; mean number of devices that one token's experts are on, measured on a trace.

    experts  [T, L, k] expert ids;  held  bool [L, D, E]
    A copy counts where its expert's first holder is: a lower bound would need the choice made at run time.
    """
    experts = np.asarray(experts)
    num_layers, num_devices, num_experts = held.shape
    if experts.ndim != 3 or experts.shape[1] != num_layers:
        raise ValueError(f"chosen experts are [tokens, {num_layers} layers, k], got {list(experts.shape)}")
    if experts.size and experts.max() >= num_experts:
        raise ValueError(f"expert {experts.max()} was chosen, the placement is for {num_experts}")
    result = np.zeros(num_layers)
    for layer in range(num_layers):
        device = held[layer].argmax(axis=0)[experts[:, layer]]  # [T, k]
        touched = np.zeros((len(device), num_devices), dtype=bool)
        np.put_along_axis(touched, device, True, axis=1)
        result[layer] = touched.sum(axis=1).mean() if len(device) else 0.0
    return result


def expected_fan_out(experts_per_device, num_experts: int, top_k: int) -> float:
    """Devices touched per token under uniform routing without replacement.

    sum over devices of 1 - C(E - n_d, k) / C(E, k)
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top-{top_k} of {num_experts} experts cannot be chosen")
    none = math.comb(num_experts, top_k)
    return sum(1 - math.comb(num_experts - n, top_k) / none for n in experts_per_device)


def expert_capacity(num_tokens: int, top_k: int, num_experts: int, factor: float = 1.0, rule: str = "megatron") -> int:
    """Most slots an expert takes of a batch.

    megatron   ceil(T k / E f)            (Megatron-LM, moe_utils.py)
    deepspeed  max(4, ceil(T k / E f))    (DeepSpeed, sharded_moe.py; min_capacity 4)
    tutel      k int(f ceil(T / E))       (Tutel, fast_dispatch.py)
    """
    if min(num_tokens, top_k, num_experts) < 1 or not factor > 0:
        raise ValueError(
            f"capacity needs positive numbers: {num_tokens} tokens, top-{top_k}, {num_experts} experts, factor {factor}"
        )
    if rule == "megatron":
        return math.ceil(num_tokens * top_k / num_experts * factor)
    if rule == "deepspeed":
        return max(4, math.ceil(num_tokens * top_k / num_experts * factor))
    if rule == "tutel":
        return top_k * int(factor * math.ceil(num_tokens / num_experts))
    raise ValueError(f"capacity rule is megatron, deepspeed or tutel, got {rule!r}")
