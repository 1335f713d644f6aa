"""EPLB's own function, answered by this project's search: a drop-in where EPLB is called. Numpy only."""

from __future__ import annotations

import numpy as np

from ..formats.placements import slots_of
from .strategies import place_experts


def rebalance_experts(weight, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int):
    """Arguments and results of DeepSeek's EPLB (eplb.py, `rebalance_experts`), as numpy arrays.

    weight        [L, E]; load of each expert
    num_replicas  S, slots of a layer over all GPUs; a multiple of num_gpus

    Returns (physical to logical [L, S], logical to physical [L, E, most copies] with -1 where there are fewer,
    copies [L, E]). Unlike EPLB it never puts two copies of an expert on one GPU.
    Raises ValueError where the numbers do not fit, with them.
    """
    weight = np.asarray(weight, np.float64)
    _, num_experts = weight.shape
    if num_gpus < 1 or num_replicas % num_gpus:
        raise ValueError(f"{num_replicas} replicas do not divide over {num_gpus} GPUs")
    if num_replicas < num_experts:
        raise ValueError(f"{num_replicas} replicas are fewer than the {num_experts} experts")
    weight = np.where(weight.any(axis=1, keepdims=True), weight, 1)  # a layer without load: all alike
    placement = place_experts(weight, num_gpus, "replicated", num_replicas - num_experts, num_nodes, num_groups)
    slots, copies = slots_of(placement), placement.copies
    where = np.full((*copies.shape, copies.max()), -1)
    for layer, of_layer in enumerate(slots):
        order = np.argsort(of_layer, kind="stable")  # an expert's slots side by side, ascending
        nth = np.arange(len(order)) - np.searchsorted(of_layer[order], of_layer[order])
        where[layer, of_layer[order], nth] = order
    return slots, where, copies
