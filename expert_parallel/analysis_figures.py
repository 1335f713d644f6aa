"""Figures of `model_analysis.py`: what is in a model, what it needs, what it would do. Dictionaries for --json."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np

from .architecture import Architecture, Part, describe, hybrid_rest_bytes
from .communication import Link
from .hardware import LINKS, MACHINES
from .lazy_model import Configuration, fill_randomly, shortened
from .link_probe import measure_link
from .loading import activation_dtype
from .machine_fit import measure_machine
from .memory import fewest_devices, fullest_device_bytes
from .placement import place_experts
from .projection import (
    PREFILL_CHUNK,
    Cluster,
    Demand,
    Fullest,
    Machine,
    best_number,
    decode_step,
    fullest_device,
    prefill,
    uniform_experts,
)
from .routing import RoutingTrace

DEVICES = (1, 2, 4, 8, 16, 32, 64)
PARTS = ("fixed", "rest", "experts", "latency", "transfer")


def architecture_figures(described: Architecture, configuration: Configuration, context: int) -> dict:
    """Layers (identical runs folded), parts, expert shapes, active parameters and bytes, caches."""
    weighed, whole = described.bytes, described.whole
    return {
        "source": "modelled from the configuration: mlx-lm's own classes, built without weights",
        "name": described.name,
        "model_type": described.model_type,
        "quantisation": described.quantisation,
        "num_layers": len(described.layers),
        "num_moe_layers": described.num_moe_layers,
        "hidden": described.hidden,
        "num_experts": described.num_experts,
        "top_k": described.chosen,
        "parameters": whole.parameters,
        "active_parameters": described.active.parameters,
        "published": configuration.published or None,
        "bytes": weighed.total,
        "expert_bytes": weighed.experts,
        "rest_bytes": weighed.rest,
        "bytes_of_one_expert": int(weighed.expert_bytes[0]),
        "parameters_of_one_expert": int(described.demand.expert_parameters[0]),
        "active_bytes": described.active.bytes,
        "bytes_read_per_token": described.read_per_token.bytes,
        "cache_bytes_per_token": described.cache_per_token,
        "context": context,
        "cache_bytes_at_context": described.cache_bytes_at(context),
        "layers": _folded(described.layers),
        "parts": _all_parts(described),
        "expert_weights": {name: {"shape": s, "dtype": d} for name, (s, d) in described.expert_shapes.items()},
    }


def _folded(layers) -> list[dict]:
    """Identical layers as one row with their numbers, in the order in which each kind comes first."""
    alike: dict[tuple, list] = {}
    for layer in layers:
        alike.setdefault((layer.moe, layer.attention, tuple(sorted(layer.parts.items(), key=str))), []).append(layer)
    return [
        {
            "numbers": [layer.number for layer in same],
            "kind": "MoE" if same[0].moe else "dense",
            "attention": same[0].attention,
            "parameters_each": same[0].whole.parameters,
            "bytes_each": same[0].whole.bytes,
            "expert_bytes_each": same[0].parts.get("experts", Part()).bytes,
        }
        for same in alike.values()
    ]


def _all_parts(described) -> dict:
    total: dict[str, Part] = {}
    for parts in (described.outside, *(layer.parts for layer in described.layers)):
        for name, part in parts.items():
            total[name] = total.get(name, Part()) + part
    order = sorted(total, key=lambda name: -total[name].bytes)
    return {name: {"parameters": total[name].parameters, "bytes": total[name].bytes} for name in order}


def memory_figures(described: Architecture, redundant: int = 0, devices=DEVICES) -> dict:
    """Bytes of the fullest device for each number of devices, the rest replicated and sharded."""
    weighed, rows, failed = described.bytes, [], {}
    for count in devices:
        if count > weighed.num_experts:
            continue
        row = {
            "devices": count,
            "experts_per_layer": -(-weighed.num_experts // count),
            "expert_bytes": fullest_device_bytes(weighed, count, rest=0),
            "replicated_rest_bytes": fullest_device_bytes(weighed, count),
        }
        row["reduction"] = round(weighed.total / row["replicated_rest_bytes"], 3)
        if redundant and count > 1:
            row["with_copies_bytes"] = fullest_device_bytes(weighed, count, redundant=redundant)
        rest, reason = _hybrid_rest(described, count, failed)
        row["hybrid_bytes"] = None if rest is None else fullest_device_bytes(weighed, count, rest=rest)
        failed |= {count: reason} if reason else {}
        rows.append(row)
    return {
        "source": "modelled",
        "redundant_experts": redundant,
        "devices": rows,
        "hybrid_not_possible": next((f"{count} devices: {reason}" for count, reason in failed.items()), None),
    }


def _hybrid_rest(described: Architecture, count: int, failed: dict) -> tuple[int | None, str | None]:
    """(bytes, None) or (None, why not); what does not divide over 8 does not over 16 either."""
    if count == 1:
        return described.bytes.rest, None
    if any(count % other == 0 for other in failed):
        return None, None
    try:
        return hybrid_rest_bytes(described.model, count), None
    except ValueError as error:
        return None, str(error)


def fit_figures(described: Architecture, device_bytes: float, context: int, devices=DEVICES) -> dict:
    """How many devices of a size hold weights and cache; what fewer of them lack."""
    weighed, cache = described.bytes, described.cache_bytes_at(context)
    needed = fewest_devices(weighed, device_bytes, besides=cache)
    lacking = []
    for count in devices:
        if count <= weighed.num_experts and (needed is None or count < needed):
            over = fullest_device_bytes(weighed, count) + cache - device_bytes
            lacking.append({"devices": count, "lacks_bytes": round(over)})
    return {
        "source": "modelled",
        "device_bytes": device_bytes,
        "cache_bytes": cache,
        "context": context,
        "fewest_devices": needed,
        "lacking": lacking,
        "smallest_device_bytes": fullest_device_bytes(weighed, weighed.num_experts) + cache,
    }


# --- projection ---------------------------------------------------------------------------------


def projection_figures(
    described: Architecture,
    machine: Machine,
    link: Link,
    context: int = 0,
    trace: RoutingTrace | None = None,
    redundant: int = 0,
    memory: dict | None = None,
    devices=DEVICES,
) -> dict:
    """Speed for each number of devices, where it is lost, and from which number on more do not pay.

    trace, redundant  real routing instead of uniform, and copies of its hottest experts per layer
    memory            of `memory_figures`, for the hybrid's share of the rest
    devices           numbers of them; speed-ups are over one device whether it is among them or not
    """
    demand, weighed, rows, estimates = described.demand, described.bytes, [], {}
    alone = decode_step(demand, Cluster(machine), _load(demand, 1, 1, trace, 0), context=context)
    hybrid_bytes = {row["devices"]: row["hybrid_bytes"] for row in memory["devices"]} if memory else {}
    for count in devices:
        if count > demand.num_experts:
            continue
        cluster = Cluster(machine, count, link if count > 1 else None)
        load = _load(demand, count, 1, trace, redundant)
        estimates[count] = decoded = decode_step(demand, cluster, load, context=context)
        read = prefill(demand, cluster, PREFILL_CHUNK, _load(demand, count, PREFILL_CHUNK, trace, redundant))
        needed = fullest_device_bytes(weighed, count, redundant=redundant if count > 1 else 0)
        row = {
            "devices": count,
            "fits": needed + described.cache_bytes_at(context) <= machine.memory_bytes,
            "tokens_per_second": round(decoded.tokens_per_second, 4),
            "speed_up": round(alone.seconds / decoded.seconds, 3),
            "tokens_per_second_if_even": round(decode_step(demand, cluster, context=context).tokens_per_second, 4),
            "prompt_tokens_per_second": round(read.tokens_per_second, 3),
            "bottleneck": decoded.bottleneck,
            "milliseconds": {part: float(f"{1e3 * getattr(decoded, part):.5g}") for part in PARTS},
        }
        if count > 1 and hybrid_bytes.get(count):
            share = (hybrid_bytes[count] - fullest_device_bytes(weighed, count, rest=0)) / weighed.rest
            hybrid = decode_step(demand, cluster, load, context=context, rest_share=share)
            row["hybrid_tokens_per_second"] = round(hybrid.tokens_per_second, 4)
        rows.append(row)
    return {
        "source": "modelled",
        "hardware": machine.name,
        "hardware_source": machine.source,
        "context": context,
        "routing": "uniform" if trace is None else trace.model or "trace",
        "devices": rows,
        "best_devices": best_number(estimates),
    }


def original_cases(demand: Demand) -> dict:
    """The two projections of the original write-up, on H100s: its claims beside what this model says."""
    machine, (nvlink, _), (infiniband, _) = MACHINES["h100"], LINKS["nvlink-h100"], LINKS["infiniband-ndr"]
    one, node = Cluster(machine), Cluster(machine, 8, nvlink)
    nodes = Cluster(machine, 64, nvlink, num_nodes=8, node_link=infiniband)
    cases = []
    for name, claim, before, after in (
        ("8 GPUs in one machine", "2-4x over one GPU", one, node),
        ("8 nodes of 8 GPUs", "10-20x over one node", node, nodes),
    ):
        if after.num_devices > demand.num_experts:
            continue
        speed_up = {}
        for batch in (1, 64):
            steps = [decode_step(demand, c, _load(demand, c.num_devices, batch), batch=batch) for c in (before, after)]
            speed_up[f"decoding, batch {batch}"] = round(steps[0].seconds / steps[1].seconds, 3)
        steps = [prefill(demand, c, 8192, _load(demand, c.num_devices, PREFILL_CHUNK)) for c in (before, after)]
        speed_up["prompt of 8192 tokens"] = round(steps[0].seconds / steps[1].seconds, 3)
        cases.append({"case": name, "claim": claim, "speed_up": speed_up})
    return {"source": "modelled", "hardware": machine.name, "cases": cases}


def _load(demand: Demand, num_devices: int, batch: int, trace=None, redundant: int = 0) -> Fullest:
    """What the fullest device does in a step of `batch` tokens, by a trace, or by uniform routing of one like it."""
    copies = redundant if num_devices > 1 else 0
    strategy = "replicated" if copies else "contiguous"
    if trace is None:
        experts = uniform_experts(max(2 * batch, 512), 1, demand.num_experts, demand.chosen)
        placement = place_experts(np.ones((1, demand.num_experts)), num_devices, strategy, redundant=copies)
        found = fullest_device(experts, placement.held, batch)
        return Fullest(*(np.repeat(values, demand.num_moe_layers) for values in (found.experts, found.slots)))
    placement = place_experts(trace.loads(), num_devices, strategy, redundant=copies)
    length = min(batch, len(trace))
    found = fullest_device(trace.experts, placement.held, length)
    return Fullest(found.experts, found.slots * batch / length)


# --- this machine -------------------------------------------------------------------------------


def measure_here(configuration: Configuration, described: Architecture, quantisation: dict, most_bytes=2e9) -> dict:
    """Constants of this machine, fitted on the first layers of the model with random weights, and local links.

    {"machine": Machine, "links": {backend: Link}, "figures": for --json}
    """
    dense = next(layer.number for layer in described.layers if layer.moe)
    each = described.layers[dense].whole.bytes
    layers = dense + max(1, min(4, int(most_bytes // each)))
    short = Configuration(configuration.name, shortened(configuration.config, layers))
    small = describe(short, **quantisation)
    model = fill_randomly(small.model)
    if (dtype := activation_dtype()) is not None:
        model.set_dtype(dtype)
    head = small.outside.get("head") or small.outside["embeddings"]
    machine = measure_machine(model, small.demand, head.bytes)
    machine = replace(machine, memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    links, rows = {}, {}
    for backend in ("ring", "mpi"):
        try:
            links[backend], rows[backend] = measure_link(backend)
        except ValueError as error:
            rows[backend] = str(error)
    constants = {name: value for name, value in vars(machine).items() if name != "memory_bytes"}
    figures = {
        "source": "measured",
        "layers": layers,
        "machine": constants,
        "links": {name: {"latency_seconds": l.latency_seconds, "bytes_per_second": l.bytes_per_second,
                         "measured": rows[name]} for name, l in links.items()},
        "links_not_measured": {name: row for name, row in rows.items() if isinstance(row, str)},
    }  # fmt: skip
    return {"machine": machine, "links": links, "figures": figures}
