"""Balance: how evenly load falls on devices. Numpy only.

Dimensions: T tokens, L MoE layers, E experts, k chosen, D devices. `device_loads` is
[L, D] throughout, from `Placement.device_loads(trace.loads())`.
"""

from __future__ import annotations

import math

import numpy as np

from .placement import check_loads


def balancedness(device_loads, average: str = "layers") -> float:
    """Mean load over the fullest device's load, 1 when even and 1/D when one device does it all; NaN without load.

    average  layers     (mean + 1e-5) / (max + 1e-5) in each layer, then the mean over layers
                        (SGLang, expert_distribution.py)
             aggregate  sum over layers of the mean / sum over layers of the maximum: the share of
                        time that devices are busy if layers wait for each other (vLLM, eplb_state.py)
    """
    loads = check_loads(device_loads)
    if not loads.any():
        return math.nan
    if average == "layers":
        return float(balancedness_per_layer(loads).mean())
    if average == "aggregate":
        return float(loads.mean(axis=1).sum() / loads.max(axis=1).sum())
    raise ValueError(f'average is "layers" or "aggregate", got {average!r}')


def balancedness_per_layer(device_loads) -> np.ndarray:
    """[L]; see `balancedness`."""
    loads = check_loads(device_loads)
    return (loads.mean(axis=1) + 1e-5) / (loads.max(axis=1) + 1e-5)


def imbalance_ratio(device_loads) -> np.ndarray:
    """[L]; max / mean - 1: the extra time the fullest device takes (TensorRT-LLM)."""
    loads = check_loads(device_loads)
    return _over(loads.max(axis=1), loads.mean(axis=1), 1) - 1


def coefficient_of_variation(device_loads) -> np.ndarray:
    """[L]; standard deviation over mean, 0 for a layer without load."""
    loads = check_loads(device_loads)
    return _over(loads.std(axis=1), loads.mean(axis=1), 0)


def min_max_ratio(device_loads) -> np.ndarray:
    """[L]; load of the emptiest device over that of the fullest, 1 for a layer without load."""
    loads = check_loads(device_loads)
    return _over(loads.min(axis=1), loads.max(axis=1), 1)


def _over(a, b, without: float) -> np.ndarray:
    """a / b, and what to say where b is 0."""
    return np.divide(a, b, out=np.full_like(b, without), where=b > 0)


def routing_entropy(loads) -> np.ndarray:
    """[L]; entropy of the expert loads [L, E] over log E: 1 for uniform use, 0 for a single expert."""
    loads = check_loads(loads)
    if loads.shape[1] == 1:
        return np.ones(len(loads))
    total = loads.sum(axis=1, keepdims=True)
    share = _over(loads, np.broadcast_to(total, loads.shape), 0)
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    return -(share * logs).sum(axis=1) / math.log(loads.shape[1]) + 0.0


def fan_out(devices) -> np.ndarray:
    """[L]; mean number of devices that answer for one token, for the device of each slot [T, L, k]."""
    if not len(devices):
        return np.zeros(np.shape(devices)[1])
    layers = (np.sort(of_layer) for of_layer in np.moveaxis(devices, 1, 0))
    return np.array([(1 + (of_layer[:, 1:] > of_layer[:, :-1]).sum(axis=1)).mean() for of_layer in layers])
