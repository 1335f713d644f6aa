"""The report of `model_analysis.py`, continued: how fast a model would be on N devices. Every figure is modelled.

Dimensions: T tokens, L MoE layers, E experts, k chosen per token, D devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..models.architecture import Architecture, fullest_device_bytes
from ..placing.strategies import place_experts
from ..projection import step
from ..projection.links import Link
from ..study.chance import uniform_experts
from ..trace import RoutingTrace
from .table import Table, facts, of_records, size

DEVICES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Setting:
    """What a model is projected onto, and with what routing.

    devices    numbers of them; speed-ups are over one device whether it is among them or not
    trace      real routing (L and k as the model's) instead of uniform
    redundant  copies of its hottest experts per layer
    """

    machine: step.Machine
    link: Link
    link_name: str
    link_source: str
    context: int = 0
    devices: tuple[int, ...] = DEVICES
    trace: RoutingTrace | None = None
    redundant: int = 0

    def load(self, demand: step.Demand, num_devices: int, tokens: int) -> step.Fullest:
        """What the fullest device does in a step of `tokens`, by the trace, or by uniform routing of one like it."""
        copies = self.redundant if num_devices > 1 else 0
        strategy = "replicated" if copies else "contiguous"
        if self.trace is None:
            experts = uniform_experts(max(2 * tokens, 512), 1, demand.num_experts, demand.chosen)
            placement = place_experts(np.ones((1, demand.num_experts)), num_devices, strategy, redundant=copies)
            found = step.fullest_device(experts, placement.held, tokens)
            return step.Fullest(*(np.repeat(each, demand.num_moe_layers) for each in (found.experts, found.slots)))
        placement = place_experts(self.trace.loads(), num_devices, strategy, redundant=copies)
        length = min(tokens, len(self.trace))
        found = step.fullest_device(self.trace.experts, placement.held, length)
        return step.Fullest(found.experts, found.slots * tokens / length)


def speed(tokens_per_second: float) -> str:
    """1754, 65.8 or 0.0123: as many digits as say something."""
    digits = 0 if tokens_per_second >= 1000 else 1 if tokens_per_second >= 10 else 3
    return f"{tokens_per_second:.{digits}f}"


def projection(described: Architecture, setting: Setting, hybrid=None, section: str = "projection") -> list[Table]:
    """Speed for each number of devices, where it is lost, and which number is the best of those that hold the model.

    hybrid  {devices: bytes of the fullest one, all but the experts sharded too}, where that can be
    """
    demand, machine, context = described.demand, setting.machine, setting.context
    room, cache = machine.memory_bytes * machine.usable, described.cache_bytes_at(context)
    alone = step.decode_step(demand, machine, load=setting.load(demand, 1, 1), context=context)
    rows = []
    for count in setting.devices:
        over, load = (count, setting.link), setting.load(demand, count, 1)
        decoded = step.decode_step(demand, machine, *over, load, context)
        even = step.decode_step(demand, machine, *over, context=context)
        chunk = setting.load(demand, count, step.PREFILL_CHUNK)
        copies = setting.redundant if count > 1 else 0
        row = {
            "devices": count,
            "fits": fullest_device_bytes(described.bytes, count, redundant=copies) + cache <= room,
            "tokens_per_second": decoded.tokens_per_second,
            "speed_up": alone.seconds / decoded.seconds,
            "tokens_per_second_if_even": even.tokens_per_second,
            "prompt_tokens_per_second": step.prefill(
                demand, machine, step.PREFILL_CHUNK, *over, chunk
            ).tokens_per_second,
            "bottleneck": decoded.bottleneck,
            "milliseconds": {part: 1e3 * getattr(decoded, part) for part in step.NAMES},
        }
        if count > 1 and (bytes_there := (hybrid or {}).get(count)):
            share = (bytes_there - fullest_device_bytes(described.bytes, count, rest=0)) / described.bytes.rest
            sharded = step.decode_step(demand, machine, *over, load, context, rest_share=share)
            row["hybrid_tokens_per_second"] = sharded.tokens_per_second
        rows.append(row)
    best, why = best_number(rows)
    routing = "uniform" if setting.trace is None else setting.trace.model or "trace"
    about = {"hardware": machine.name, "hardware_source": machine.source, "memory_bytes": room, "context": context}
    about |= {"best_devices": best, "routing": routing, "link": setting.link_name, "link_source": setting.link_source}
    table = of_records(
        f"Projection (modelled): {machine.name}, {setting.link_name}, {routing} routing",
        "devices",
        rows,
        (lambda row: f"{row['devices']}{'' if row['fits'] else ' *'}", "devices"),
        ("tokens_per_second", "tokens/s", speed),
        ("speed_up", "speed-up", "{:.2f}x"),
        ("tokens_per_second_if_even", "if even", speed),
        ("hybrid_tokens_per_second", "hybrid", speed),
        ("prompt_tokens_per_second", "prompt/s", speed),
        ("bottleneck", "most time goes to"),
        section=section,
        source="modelled",
        also=about,
    )
    items = {
        "best number": why,
        "context": f"{context:,} tokens before the one that is decoded (--context)",
        "device": machine.source,
        "link": setting.link_source,
        "*": None if all(row["fits"] for row in rows) else f"does not fit into {size(room)} ({machine.usable:.0%} of"
        f" {size(machine.memory_bytes)}; the rest is the system's) with all but the experts on each device",
    }  # fmt: skip
    return [table, facts("What it rests on", items)]


def best_number(rows: list[dict]) -> tuple[int | None, str]:
    """(number of devices that decodes fastest of those that hold the model, or None; what is to be said of it)."""
    fitting = [row for row in rows if row["fits"]]
    if not fitting:
        return None, f"none: {rows[-1]['devices']} devices do not hold the model, nor do fewer"
    best = max(fitting, key=lambda row: row["tokens_per_second"])  # the first of equals
    count, more = best["devices"], [row for row in fitting if row["devices"] > best["devices"]]
    at = f"{count} at {speed(best['tokens_per_second'])} tokens/s, {best['speed_up']:.2f}x one device"
    if more:
        slower = ", ".join(f"{row['devices']} at {speed(row['tokens_per_second'])}" for row in more[:2])
        return count, f"{at}; more decode no faster ({slower})"
    if len(fitting) > 1:
        return count, f"{at}; the most considered, and speed still rises there"
    return count, f"{at}; the only number considered that holds the model"
