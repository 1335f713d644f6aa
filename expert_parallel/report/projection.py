"""The report of `model_analysis.py`, continued: how fast a model would be on N devices. Every figure is modelled."""

from __future__ import annotations

import numpy as np

from ..models.architecture import Architecture, fullest_device_bytes
from ..placing.strategies import place_experts
from ..projection.hardware import LINKS, MACHINES
from ..projection.links import Link
from ..projection.step import (
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
from ..trace import RoutingTrace
from .model import DEVICES
from .table import Figure, Table, columns

PARTS = ("fixed", "rest", "experts", "latency", "transfer")


def speed(tokens_per_second: float) -> str:
    """1754, 65.8 or 0.0123: as many digits as say something."""
    if tokens_per_second >= 1000:
        return f"{tokens_per_second:.0f}"
    return f"{tokens_per_second:.{1 if tokens_per_second >= 10 else 3}f}"


def projection(
    described: Architecture,
    machine: Machine,
    link: Link,
    about: dict,
    context: int = 0,
    trace: RoutingTrace | None = None,
    redundant: int = 0,
    memory_rows=(),
    devices=DEVICES,
    section: str = "projection",
) -> list[Table]:
    """Speed for each number of devices, where it is lost, and from which number on more do not pay.

    about             {"link": its name, "link_source": ...}
    trace, redundant  real routing instead of uniform, and copies of its hottest experts per layer
    memory_rows       of `memory`, for the hybrid's share of the rest
    devices           numbers of them; speed-ups are over one device whether it is among them or not
    """
    demand, weighed, rows, estimates = described.demand, described.bytes, [], {}
    alone = decode_step(demand, Cluster(machine), load_of(demand, 1, 1, trace), context=context)
    hybrid_bytes = {row["devices"]: row["hybrid_bytes"] for row in memory_rows}
    for count in (count for count in devices if count <= demand.num_experts):
        cluster = Cluster(machine, count, link if count > 1 else None)
        load = load_of(demand, count, 1, trace, redundant)
        estimates[count] = decoded = decode_step(demand, cluster, load, context=context)
        read = prefill(demand, cluster, PREFILL_CHUNK, load_of(demand, count, PREFILL_CHUNK, trace, redundant))
        needed = fullest_device_bytes(weighed, count, redundant=redundant if count > 1 else 0)
        row = {
            "devices": count,
            "fits": needed + described.cache_bytes_at(context) <= machine.memory_bytes,
            "tokens_per_second": decoded.tokens_per_second,
            "speed_up": alone.seconds / decoded.seconds,
            "tokens_per_second_if_even": decode_step(demand, cluster, context=context).tokens_per_second,
            "prompt_tokens_per_second": read.tokens_per_second,
            "bottleneck": decoded.bottleneck,
            "milliseconds": {part: 1e3 * getattr(decoded, part) for part in PARTS},
        }
        if count > 1 and hybrid_bytes.get(count):
            share = (hybrid_bytes[count] - fullest_device_bytes(weighed, count, rest=0)) / weighed.rest
            hybrid = decode_step(demand, cluster, load, context=context, rest_share=share)
            row["hybrid_tokens_per_second"] = hybrid.tokens_per_second
        rows.append(row)
    best, most = best_number(estimates), max(estimates)
    more = (
        "; of those considered, and speed still rises there" if best == most > 1 else "; more do not speed decoding up"
    )
    data = {"hardware": machine.name, "hardware_source": machine.source, "context": context, "devices": rows,
            "best_devices": best, **about}  # fmt: skip
    data["routing"] = "uniform" if trace is None else trace.model or "trace"
    shown = columns([{**row, "number": f"{row['devices']}{'' if row['fits'] else ' *'}"} for row in rows],
        ("devices", "number", "{}"), ("tokens/s", "tokens_per_second", speed), ("speed-up", "speed_up", "{:.2f}x"),
        ("if even", "tokens_per_second_if_even", speed), ("hybrid", "hybrid_tokens_per_second", speed),
        ("prompt/s", "prompt_tokens_per_second", speed), ("most time goes to", "bottleneck", "{}"))  # fmt: skip
    title = f"Projection: {machine.name}, {about['link']}, {data['routing']} routing"
    facts = {
        "context": f"{context:,} tokens before the one that is decoded (--context)",
        "best number": f"{best}{more}",
        "device": machine.source,
        "link": about["link_source"],
        "*": None if all(row["fits"] for row in rows) else "does not fit into memory",
    }
    return [
        Table(title, shown + [Figure(key, None, value) for key, value in data.items()], section, "modelled"),
        Table("What it rests on", [Figure(None, label, text) for label, text in facts.items()], facts=True),
    ]


def original_claims(described: Architecture) -> list[Table]:
    """The two projections of the original write-up, on H100s: its claims beside what this model says.

    [] where one such GPU cannot hold the model: a speed-up over it is none.
    """
    demand, machine = described.demand, MACHINES["h100"]
    if fullest_device_bytes(described.bytes, 1) > machine.memory_bytes or demand.num_experts < 64:
        return []
    nvlink, infiniband = LINKS["nvlink-h100"][0], LINKS["infiniband-ndr"][0]
    one, node = Cluster(machine), Cluster(machine, 8, nvlink)
    nodes, cases = Cluster(machine, 64, nvlink, num_nodes=8, node_link=infiniband), []
    for name, claim, before, after in (
        ("8 GPUs in one machine", "2-4x over one GPU", one, node),
        ("8 nodes of 8 GPUs", "10-20x over one node", node, nodes),
    ):
        speed_up = {}
        for batch in (1, 64):
            steps = [
                decode_step(demand, c, load_of(demand, c.num_devices, batch), batch=batch) for c in (before, after)
            ]
            speed_up[f"decoding, batch {batch}"] = steps[0].seconds / steps[1].seconds
        steps = [prefill(demand, c, 8192, load_of(demand, c.num_devices, PREFILL_CHUNK)) for c in (before, after)]
        speed_up["prompt of 8192 tokens"] = steps[0].seconds / steps[1].seconds
        cases.append({"case": name, "claim": claim, "speed_up": speed_up})
    figures = columns(cases, ("", "case", "{}"), ("claim", "claim", "{}"))
    figures += columns([case["speed_up"] for case in cases], *((key, key, "{:.2f}x") for key in cases[0]["speed_up"]))
    figures += [Figure("cases", None, cases), Figure("hardware", None, machine.name)]
    return [Table(f"The original write-up's projections, on {machine.name}", figures, "original_claims", "modelled")]


def load_of(demand: Demand, num_devices: int, batch: int, trace=None, redundant: int = 0) -> Fullest:
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
