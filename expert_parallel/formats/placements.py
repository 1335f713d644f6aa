"""Placements of other engines, by what is in the file.

Dimensions: L MoE layers, E experts, D devices, S slots over all devices (physical experts).

    this project's own             `Placement.load`
    physical to logical [L, S]     vLLM's initial_expert_map_path, SGLang's --init-expert-location (JSON, .pt), EPLB's
                                   phy2log (.npy), TensorRT-LLM's initial_global_assignments (YAML); one list for all
    expert to device [L, E]        vLLM's expert_to_ep_rank, tables of 0 and 1 for CPU and GPU
    devices' experts               vllm-ascend's expert_map_path (JSON)
    expert to local row [L, D, E]  vllm-ascend's expert map (.pth), -1 where a device has it not
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..placement import Placement
from .content import content_of


def read_placement(path, num_layers: int, num_experts: int, num_devices: int | None = None) -> Placement:
    """A placement for a model of (L, E), of any of the formats above.

    num_devices  D; files that only list slots do not say it
    Raises ValueError naming the file, with the numbers that do not fit.
    """
    try:
        content = content_of(path)
    except Exception as error:  # zipfile, numpy, json, yaml, os, ... each have their own
        raise ValueError(f"cannot read placement file {path}: {' '.join(str(error).split())}") from None
    if isinstance(content, dict) and ("every_layer" in content or "layers" in content):
        return Placement.load(path, num_layers, num_experts)
    try:
        return Placement(_held(content, num_layers, num_experts, num_devices), Path(path).name)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"placement file {path}: {error}") from None


def _held(content, num_layers, num_experts, num_devices) -> np.ndarray:
    """bool [L, D, E]."""
    # 1. Who has what, said device by device.
    if isinstance(content, dict) and "layer_list" in content:
        layers = [[device["device_expert"] for device in layer["device_list"]] for layer in content["layer_list"]]
        where = [np.repeat(np.arange(len(layer)), list(map(len, layer))) for layer in layers]
        return _marked(where, list(map(np.concatenate, layers)), len(layers[0]), num_layers, num_experts)
    if isinstance(content, np.ndarray) and content.ndim == 3:
        if content.shape[::2] != (num_layers, num_experts):
            raise ValueError(f"it is of {content.shape[::2]} [layers, experts], the model {(num_layers, num_experts)}")
        return content >= 0
    # 2. A table, or one list for all layers: the expert of each slot, or the device of each expert.
    table = content
    for key in ("physical_to_logical_map", "initial_global_assignments", "expert_to_ep_rank"):
        if isinstance(content, dict) and key in content:
            table = content[key]
    if isinstance(table, dict) and table and all(str(layer).isdecimal() for layer in table):  # {layer: its slots}
        table = [table[layer] for layer in sorted(table, key=int)]
    table = np.asarray(table)
    if table.dtype.kind not in "iu" or table.ndim not in (1, 2):
        raise ValueError('expected slots [layers, slots], or {"every_layer": ...} (see expert_parallel/formats)')
    table = np.broadcast_to(table, (num_layers, len(table))) if table.ndim == 1 else table
    slots = all(set(range(num_experts)) <= set(row.tolist()) for row in table)
    if not slots and table.shape[1] == num_experts:  # the device of each expert
        return _marked(table, [np.arange(num_experts)] * len(table), table.max() + 1, num_layers, num_experts)
    if num_devices is None or table.shape[1] % num_devices:
        known = "say --devices" if num_devices is None else f"{num_devices} devices do not divide them"
        raise ValueError(f"it lists {table.shape[1]} slots a layer and not how many devices have them: {known}")
    device = np.repeat(np.arange(num_devices), table.shape[1] // num_devices)
    return _marked([device] * len(table), table, num_devices, num_layers, num_experts)


def _marked(devices, experts, num_devices, num_layers, num_experts) -> np.ndarray:
    """held with a mark for each pair, layer by layer; ValueError for numbers that are none of the model's."""
    if len(experts) != num_layers:
        raise ValueError(f"it has {len(experts)} layers, the model has {num_layers} MoE layers")
    held = np.zeros((num_layers, num_devices, num_experts), dtype=bool)
    for layer, (where, what) in enumerate(zip(devices, experts, strict=True)):
        lowest, highest = min(np.min(where), np.min(what)), np.max(what)
        if lowest < 0 or highest >= num_experts:
            raise ValueError(f"layer {layer}: expert {highest if lowest >= 0 else lowest} is none of {num_experts}")
        held[layer, where, what] = True
    return held
