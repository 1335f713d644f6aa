"""The report of `model_analysis.py`, continued: how fast a model would be on N devices. Every figure is modelled.

Dimensions: T tokens, L MoE layers, E experts, k chosen per token, D devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from ..models.architecture import Architecture, fullest_device_bytes
from ..placing.strategies import place_experts
from ..projection import step
from ..projection.ceiling import break_even, ceiling, expected_fullest
from ..projection.hardware import Machine
from ..projection.links import Link
from ..trace import RoutingTrace
from .model import HYBRID
from .table import Table, facts, of_records, size

DEVICES = (1, 2, 4, 8, 16, 32, 64)
uniform_experts = cache(step.uniform_experts)  # the same routing for each number of devices


@dataclass(frozen=True, eq=False)
class Setting:
    """What a model is projected onto, and with what routing.

    devices    growing numbers of them
    trace      real routing (L and k as the model's) instead of uniform; its slots are scaled to a longer prompt
    redundant  copies of its hottest experts per layer, from two devices on
    """

    machine: Machine
    link: Link
    link_name: str
    link_source: str
    context: int = 0
    devices: tuple[int, ...] = DEVICES
    trace: RoutingTrace | None = None
    redundant: int = 0

    @property
    def routing(self) -> str:
        """In words."""
        return "uniform" if self.trace is None else self.trace.model or "trace"

    def copies(self, num_devices: int) -> int:
        return self.redundant if num_devices > 1 else 0

    @cache  # noqa: B019 - a report has one or two settings, and asks for the same several times
    def load(self, demand: step.Demand, num_devices: int, tokens: int) -> step.Fullest:
        """What the fullest device does in a step of `tokens`, by the trace, or by uniform routing of one like it."""
        if self.trace is None:
            experts = uniform_experts(max(2 * tokens, 1024), 1, demand.num_experts, demand.chosen)
            loads = np.ones((1, demand.num_experts))
        else:
            experts, loads = self.trace.experts, self.trace.loads()
        copies, batch = self.copies(num_devices), min(tokens, len(experts))
        placement = place_experts(loads, num_devices, "replicated" if copies else "contiguous", redundant=copies)
        found = step.fullest_device(experts, placement.held, batch)
        every = demand.num_moe_layers  # of a uniform trace one layer was looked at
        return step.Fullest(*(np.broadcast_to(each, every) for each in (found.experts, found.slots * tokens / batch)))


def speed(tokens_per_second: float) -> str:
    """1754, 65.8 or 0.0123: as many digits as say something."""
    digits = next((n for n, least in enumerate((1000, 10, 1)) if tokens_per_second >= least), 3)
    return f"{tokens_per_second:.{digits}f}"


def projection(described: Architecture, setting: Setting, hybrid=None, section: str = "projection") -> list[Table]:
    """Speed for each number of devices, where it is lost, and from which number on more do not pay.

    hybrid  {devices: bytes of the fullest one, all but the experts sharded too}, where that can be
    Speed-ups are over one device, or over the fewest of those considered that hold the model.
    """
    (usable, whose), machine, hybrid = setting.machine.usable, setting.machine, hybrid or {}
    of = {n: _figures(described, setting, n, hybrid.get(n)) for n in sorted({1, *setting.devices})}
    base = next((row for row in of.values() if row["fits"]), None)
    for row in of.values():
        row["speed_up"] = row["tokens_per_second"] / base["tokens_per_second"] if row["fits"] else None
    rows = [of[n] for n in setting.devices]
    milliseconds, (best, words) = rows[0]["milliseconds"], best_number(rows, usable)
    bound = 1e3 / (milliseconds["fixed"] + milliseconds["rest"])
    also = {"hardware": machine.name, "hardware_source": machine.source, "context": setting.context,
            "usable_bytes": usable, "best_devices": best, "speed_up_over": base and base["devices"],
            "bound_tokens_per_second": bound, "routing": setting.routing, "link": setting.link_name,
            "link_source": setting.link_source, "layers_that_gather": described.demand.gathers}  # fmt: skip
    table = of_records(
        f"Projection (modelled): {machine.name}, {setting.link_name}, {setting.routing} routing",
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
        note=f"if even: tokens/s, did all devices have as many of a token's experts; {HYBRID}; prompt/s: tokens of a"
        " prompt read per second",
        source="modelled",
        also=also,
    )
    items = {
        "*": None if all(row["fits"] for row in rows) else "does not fit: what it would do with more memory",
        "best number": words,
        "bound": f"{speed(bound)} tokens/s, were experts and collectives free (hybrid aside)",
        "differences": "of 12% or less say little: so far off were predictions on a CPU (BENCHMARKS.md)",
        "speed-up": base and f"over {base['devices']}" + (", the fewest that hold it" if base["devices"] > 1 else ""),
        "context": f"{setting.context:,} tokens before the one that is decoded (--context)",
        "memory": f"{size(usable)} of {size(machine.memory_bytes)} for weights and cache ({whose})",
        "device": machine.source,
        "link": setting.link_source,
        "all-sums": all_sums_text(described.demand),
    }
    return [table, facts("What it rests on", items)]


def all_sums_text(demand: step.Demand) -> str | None:
    """Where layers gather, None where all of them reduce."""
    if not demand.gathers:
        return None
    return (
        f"{demand.gathers} of {demand.num_moe_layers} MoE layers send {demand.chosen} times the bytes: ranks cannot sum"
        " their blocks' answers (found by a trial; hybrid aside)"
    )


def needed_bytes(described: Architecture, setting: Setting, count: int) -> int:
    """Of the fullest of so many devices, with the cache of the context."""
    held = fullest_device_bytes(described.bytes, count, redundant=setting.copies(count))
    return held + described.cache_bytes_at(setting.context)


def _figures(described, setting, count, hybrid_bytes) -> dict:
    demand, machine, weighed = described.demand, setting.machine, described.bytes
    where, load = (demand, machine, count, setting.link), setting.load(demand, count, 1)
    decoded, chunk = step.estimate(*where, load, context=setting.context), step.PREFILL_CHUNK
    read = step.estimate(*where, setting.load(demand, count, chunk), tokens=chunk)
    needed = needed_bytes(described, setting, count)
    row = {
        "devices": count,
        "bytes": needed,
        "fits": needed <= machine.usable[0],
        "tokens_per_second": decoded.tokens_per_second,
        "tokens_per_second_if_even": step.estimate(*where, context=setting.context).tokens_per_second,
        "prompt_tokens_per_second": read.tokens_per_second,
        "bottleneck": decoded.bottleneck,
        "milliseconds": {part: 1e3 * getattr(decoded, part) for part in step.PARTS},
    }
    if count > 1 and hybrid_bytes:
        share = 1 - (fullest_device_bytes(weighed, count) - hybrid_bytes) / weighed.rest
        sharded = step.estimate(*where, load, context=setting.context, rest_share=share)
        row["hybrid_tokens_per_second"] = sharded.tokens_per_second
    return row


BATCHES = (1, 8, 32, 128)  # sequences at once


def one_sequence(described: Architecture, setting: Setting) -> list[Table]:
    """The most that devices can give one sequence, what a link takes of it, and what more sequences at once change."""
    demand, machine, link = described.demand, setting.machine, setting.link
    alone = {batch: _estimate(demand, setting, 1, batch) for batch in BATCHES}
    rows = [_at_most(demand, setting, count, alone) for count in setting.devices if count > 1]
    if not rows:
        return []
    bound = ceiling(demand, machine, demand.num_experts, None, setting.context)
    gathered = 2 * demand.gathers > demand.num_moe_layers  # what most layers do
    payload = demand.hidden * machine.value_bytes * (demand.chosen if gathered else 1)
    held = needed_bytes(described, setting, 1) <= machine.usable[0]
    all_sum = sum(link.all_sum_parts(payload, rows[0]["devices"]))
    table = of_records(
        f"One sequence at most (modelled): {machine.name}, {setting.routing} routing",
        "devices",
        rows,
        ("devices", "devices"),
        ("ceiling_if_even", "if even", "{:.2f}x"),
        ("fullest_experts", f"of {demand.chosen}", "{:.2f}"),
        ("ceiling", "at most", "{:.2f}x"),
        ("break_even_seconds", "break-even", lambda seconds: f"{1e6 * seconds:.0f} us"),
        *((f"speed_up_{batch}", f"{batch}", "{:.2f}x") for batch in BATCHES),
        section="one_sequence",
        source="modelled",
        note=f"Speed over one device. If even, at most: were all-sums free; of {demand.chosen}: experts of a token that"
        f" the fullest device has; break-even: an all-sum that takes so long eats the gain ({payload:,} bytes over"
        f" {rows[0]['devices']} devices: {1e6 * all_sum:.0f} us, {setting.link_name}); 1 to {BATCHES[-1]}: with this"
        f" link, for so many sequences at once. No number of devices gives one sequence more than {bound:.2f}x."
        + ("" if held else " One device does not hold this model: its speed is what more memory would give it."),
        also={"bound": bound, "link": setting.link_name, "link_all_sum_seconds": all_sum, "routing": setting.routing},
    )
    return [table]


def _estimate(demand, setting, count, batch) -> step.Estimate:
    load = setting.load(demand, count, batch)
    return step.estimate(demand, setting.machine, count, setting.link, load, context=setting.context, batch=batch)


def _at_most(demand, setting, count, alone) -> dict:
    machine, context, load = setting.machine, setting.context, setting.load(demand, count, 1)
    if setting.trace is None and not setting.copies(count):  # exactly, then
        parts = [len(part) for part in np.array_split(np.arange(demand.num_experts), count)]
        each = np.full(demand.num_moe_layers, expected_fullest(parts, demand.num_experts, demand.chosen))
        load = step.Fullest(each, each)
    return {
        "devices": count,
        "ceiling_if_even": ceiling(demand, machine, count, context=context),
        "fullest_experts": float(load.experts.mean()),
        "ceiling": ceiling(demand, machine, count, load, context),
        "break_even_seconds": break_even(demand, machine, count, load, context),
        **{f"speed_up_{n}": one.seconds / _estimate(demand, setting, count, n).seconds for n, one in alone.items()},
    }


def best_number(rows: list[dict], usable: float) -> tuple[int | None, str]:
    """(number of devices that decodes fastest of those that hold the model, what the figures say of it)."""
    fit, short = [row for row in rows if row["fits"]], [row for row in rows if not row["fits"]]
    needs = short and f"{size(short[-1]['bytes'])} on the fullest of {short[-1]['devices']}, {size(usable)} are there"
    if not fit:
        return None, f"none of those considered holds the model: {needs}"
    best = max(fit, key=lambda row: row["tokens_per_second"])  # the fewest of equals
    earlier, later = fit[: fit.index(best)], fit[fit.index(best) + 1 :]
    if later:
        then = max(later, key=lambda row: row["tokens_per_second"])
        words = f"more are no faster, {then['devices']} give {speed(then['tokens_per_second'])}"
    elif earlier:
        words = f"the most considered, and speed still rises: {earlier[-1]['devices']} give"
        words += f" {speed(earlier[-1]['tokens_per_second'])}"
    else:
        words = "no other that holds the model was considered"
    words = f"{best['devices']} with {speed(best['tokens_per_second'])} tokens/s; {words}"
    return best["devices"], words + (f"; fewer do not hold it: {needs}" if short else "")
