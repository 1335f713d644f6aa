"""Placements in files: of this project and of other engines, recognised by what is in them; and written as they are.

Dimensions: L MoE layers, E experts, D devices, S slots over all devices (physical experts).

                                    read                                              written as
    this project's own              JSON, see own.py                                  (default)
    physical to logical [L, S]      vLLM's initial_expert_map_path (JSON)             vllm
                                    SGLang's --init-expert-location (JSON, .pt)       sglang
                                    TensorRT-LLM's initial_global_assignments (YAML)  tensorrt-llm
                                    EPLB's phy2log (.npy)
    expert to device [L, E]         vLLM's expert_to_ep_rank                          vllm-ranks
                                    tables of 0 and 1 for CPU and GPU
    devices' experts                vllm-ascend's expert_map_path (JSON)              vllm-ascend
    expert to local row [L, D, E]   vllm-ascend's expert map (.pth), -1: not here

Slots are dealt out to devices in equal parts, in order; a list [S] is for all layers. Two copies of an expert on one
device, as EPLB's global variant writes them, are one here; metadata "notes" says how many there were.
"""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import numpy as np
import yaml

from ..files import written_whole
from ..placement import Placement
from . import own
from .content import content_of


def read_placement(path, num_layers=None, num_experts=None, num_devices=None, layer_numbers=None) -> Placement:
    """See `Placement.load`."""
    if num_devices is not None and num_devices < 1:
        raise ValueError(f"{num_devices} devices: needs 1 at least")
    try:
        content = content_of(path)
    except Exception as error:  # zipfile, numpy, json, yaml, os, ... each have their own
        raise ValueError(f"cannot read placement file {path}: {' '.join(str(error).split())}") from None
    try:
        if isinstance(content, dict) and ("every_layer" in content or "layers" in content):
            held = own.held_of(content, num_layers, num_experts)
            return Placement(held, str(content.get("strategy", "custom")), own.metadata_of(content, held))
        held, twice = _held(content, num_layers, num_experts, num_devices, layer_numbers)
        note = f"{Path(path).name}: {twice} copies lie on a device that has their expert already, and count for nothing"
        return Placement(held, Path(path).name, {"notes": [note]} if twice else {})
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"placement file {path}: {error}") from None


def _held(content, num_layers, num_experts, num_devices, layer_numbers) -> tuple[np.ndarray, int]:
    """(bool [L, D, E], slots whose expert their device has in another one)."""
    # 1. Who has what, said device by device.
    if isinstance(content, dict) and "layer_list" in content:
        layers = [[device["device_expert"] for device in layer["device_list"]] for layer in content["layer_list"]]
        if len(widths := {len(layer) for layer in layers}) != 1:
            raise ValueError(f"layers name different numbers of devices: {sorted(widths)}")
        where = [np.repeat(np.arange(len(layer)), list(map(len, layer))) for layer in layers]
        what = [np.array(list(chain(*layer))) for layer in layers]
        if any(experts.dtype.kind != "i" for experts in what):
            raise ValueError('a "device_expert" is a list of experts, numbered from 0')
        return _marked(where, what, widths.pop(), num_layers, num_experts)
    if isinstance(content, np.ndarray) and content.ndim == 3:
        for name, wanted, found in (("layers", num_layers, len(content)), ("experts", num_experts, content.shape[2])):
            if wanted not in (None, found):
                raise ValueError(f"it is of {found} {name}, the model of {wanted}")
        least, most = content.min(), content.max()
        if content.dtype.kind not in "biu" or least < -1 or least >= 0 and most > 1:
            raise ValueError("a table [layers, devices, experts] is of 0 and 1, or of local rows and -1: not here")
        return content == 1 if least >= 0 else content >= 0, 0
    # 2. A table, or one list for all layers: the expert of each slot, or the device of each expert.
    table, of_devices, said = content, None, {}
    if isinstance(content, dict):
        content = content.get("moe_config", content)
        content = content.get("load_balancer", content)
        said = own.counts_in(content, "ep_size", "num_slots")
        num_devices = num_devices or said.get("ep_size")
        of_devices = "expert_to_ep_rank" in content
        for key in ("physical_to_logical_map", "initial_global_assignments", "expert_to_ep_rank"):
            table = content.get(key, table)
    if isinstance(table, dict) and table and all(str(layer).isdecimal() for layer in table):  # {layer: its slots}
        table = _rows(table, layer_numbers)
    elif layer_numbers is not None and isinstance(table, list | np.ndarray) and len(table) == max(layer_numbers) + 1:
        table = [table[number] for number in layer_numbers]  # it has a row for the dense layers too
    table = np.asarray(table)
    if table.dtype.kind not in "iu" or table.ndim not in (1, 2) or not table.size:
        raise ValueError('expected an object with either "every_layer" or "layers", or slots [layers, slots]')
    if said.get("num_slots", table.shape[-1]) != table.shape[-1]:
        raise ValueError(f'"num_slots" says {said["num_slots"]}, the lists have {table.shape[-1]}')
    if table.ndim == 1:
        if num_layers is None:
            raise ValueError("it has one list for all layers and does not say how many there are")
        table = np.broadcast_to(table, (num_layers, len(table)))
    if table.max() > own.MOST:
        raise ValueError(f"it names expert {table.max()}: more than any model has")
    if num_experts is None:
        num_experts = table.shape[1] if of_devices else int(table.max()) + 1
    if of_devices is None:  # nothing but numbers: who has every expert in each row lists slots
        slots = all(set(range(num_experts)) <= set(row.tolist()) for row in table)
        of_devices = not slots and table.shape[1] == num_experts
    if of_devices:
        return _marked(table, [np.arange(table.shape[1])] * len(table), table.max() + 1, num_layers, num_experts)
    if num_devices is None or table.shape[1] % num_devices:
        known = "say --devices" if num_devices is None else f"{num_devices} devices do not divide them"
        raise ValueError(f"it lists {table.shape[1]} slots a layer and not how many devices have them: {known}")
    device = np.repeat(np.arange(num_devices), table.shape[1] // num_devices)
    return _marked([device] * len(table), table, num_devices, num_layers, num_experts)


def _rows(table: dict, layer_numbers) -> list:
    """Of {number of a layer among all: its slots} those of the model's MoE layers, in order."""
    rows = {int(number): row for number, row in table.items()}
    if len(rows) < len(table):
        raise ValueError("it names a layer twice")
    numbers = sorted(rows) if layer_numbers is None else layer_numbers
    if missing := [number for number in numbers if number not in rows]:
        raise ValueError(f"it has nothing for layer {missing[0]}, an MoE layer of the model; it names {sorted(rows)}")
    return [rows[number] for number in numbers]


def _marked(devices, experts, num_devices, num_layers, num_experts) -> tuple[np.ndarray, int]:
    """(held with a mark for each pair, layer by layer; pairs that came again).

    ValueError for numbers that are none of the model's.
    """
    num_experts = max(map(np.max, experts)) + 1 if num_experts is None else num_experts
    if num_layers not in (None, len(experts)):
        raise ValueError(f"it has {len(experts)} layers, the model has {num_layers} MoE layers")
    held = np.zeros((len(experts), num_devices, num_experts), bool)
    for layer, (where, what) in enumerate(zip(devices, experts, strict=True)):
        lowest, highest = min(np.min(where), np.min(what)), np.max(what)
        if lowest < 0 or highest >= num_experts:
            raise ValueError(f"layer {layer}: expert {highest if lowest >= 0 else lowest} is none of {num_experts}")
        held[layer, where, what] = True
    return held, sum(map(len, experts)) - int(held.sum())


# --- writing --------------------------------------------------------------------------------------------------


def write_placement(placement: Placement, path, format: str | None = None, layer_numbers=None) -> None:
    """See `Placement.save`."""
    text = text_of(placement, format, layer_numbers)
    with written_whole(path) as file:
        file.write(text)


def text_of(placement: Placement, format: str | None = None, layer_numbers=None) -> str:
    """What the file says; ValueError where its format cannot say it."""
    if format not in (None, *WRITERS):
        raise ValueError(f"unknown placement format {format!r}: choose {', '.join(WRITERS)}")
    numbers = list(range(placement.num_layers) if layer_numbers is None else layer_numbers)
    if sorted({*numbers}) != numbers or len(numbers) != placement.num_layers or numbers[0] < 0:
        raise ValueError(f"layer_numbers are {placement.num_layers} growing numbers from 0 up, got {numbers}")
    document = WRITERS[format](placement, numbers) if format else own.document_of(placement)
    if format == "tensorrt-llm":
        return yaml.safe_dump(document, sort_keys=False, default_flow_style=None)
    return json.dumps(document, indent=None if format else 1) + "\n"


def slots_of(placement: Placement) -> np.ndarray:
    """Expert of each slot, int [L, S], device after device; ValueError where devices differ in slots."""
    counts = placement.held.sum(axis=2)
    if (counts != counts[0, 0]).any():
        layer, device = np.argwhere(counts != counts[0, 0])[0]
        raise ValueError(
            f"layer {layer}: device {device} holds {counts[layer, device]} experts, device 0 of layer 0 holds"
            f" {counts[0, 0]}; this format needs as many everywhere: --redundant-experts can fill up"
        )
    return np.stack([np.nonzero(of_layer)[1] for of_layer in placement.held])


def _sglang(placement, numbers) -> dict:
    """A row for each of the model's layers; those of dense ones are not looked at."""
    slots = slots_of(placement)
    table = np.tile(np.arange(slots.shape[1]) % placement.num_experts, (max(numbers) + 1, 1))
    table[list(numbers)] = slots
    return {"physical_to_logical_map": table.tolist()}


def _tensorrt_llm(placement, numbers) -> dict:
    slots = slots_of(placement)
    assignments = dict(zip(numbers, slots.tolist(), strict=True))
    return {"num_slots": slots.shape[1], "initial_global_assignments": assignments, "layer_updates_per_iter": 0}


def _vllm_ascend(placement, _) -> dict:
    slots_of(placement)  # it reads a table of devices alike
    layers = [
        [{"device_id": d, "device_expert": placement.experts_on(l, d)} for d in range(placement.num_devices)]
        for l in range(placement.num_layers)
    ]
    layers = [{"layer_id": l, "device_count": len(each), "device_list": each} for l, each in enumerate(layers)]
    return {"moe_layer_count": placement.num_layers, "layer_list": layers}


def _vllm_ranks(placement, _) -> dict:
    if (most := placement.copies.max()) > 1:
        layer, expert = np.argwhere(placement.copies == most)[0]
        raise ValueError(f"layer {layer}: expert {expert} is on {most} devices; this format can say one of each")
    return {"expert_to_ep_rank": placement.held.argmax(axis=1).tolist()}


WRITERS = {
    "vllm": lambda placement, _: slots_of(placement).tolist(),
    "vllm-ranks": _vllm_ranks,
    "vllm-ascend": _vllm_ascend,
    "sglang": _sglang,
    "tensorrt-llm": _tensorrt_llm,
}
