"""The report of `model_analysis.py`, continued: how fast a model would be on N devices. Every figure is modelled.

Dimensions: T tokens, L MoE layers, E experts, k chosen per token, D devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..models.architecture import Architecture, fullest_device_bytes
from ..placing.strategies import place_experts
from ..projection import step
from ..projection.hardware import LINKS, MACHINES
from ..projection.links import Link
from ..trace import RoutingTrace
from .table import Table, facts, of_records

DEVICES = (1, 2, 4, 8, 16, 32, 64)
PARTS = ("fixed", "rest", "experts", "latency", "transfer")
DECODING, PROMPT = (1, 64), 8192  # sequences in a step, and tokens, of the original write-up's cases


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
            experts = step.uniform_experts(max(2 * tokens, 512), 1, demand.num_experts, demand.chosen)
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
    """Speed for each number of devices, where it is lost, and from which number on more do not pay.

    hybrid  {devices: bytes of the fullest one, all but the experts sharded too}, where that can be
    """
    demand, machine, context = described.demand, setting.machine, setting.context
    alone = step.decode_step(demand, step.Cluster(machine), setting.load(demand, 1, 1), context=context)
    estimates, rows = {}, []
    for count in setting.devices:
        cluster = step.Cluster(machine, count, setting.link if count > 1 else None)
        load = setting.load(demand, count, 1)
        estimates[count] = decoded = step.decode_step(demand, cluster, load, context=context)
        chunk = step.PREFILL_CHUNK
        read = step.prefill(demand, cluster, chunk, setting.load(demand, count, chunk))
        copies = setting.redundant if count > 1 else 0
        needed = fullest_device_bytes(described.bytes, count, redundant=copies) + described.cache_bytes_at(context)
        row = {
            "devices": count,
            "fits": needed <= machine.memory_bytes,
            "tokens_per_second": decoded.tokens_per_second,
            "speed_up": alone.seconds / decoded.seconds,
            "tokens_per_second_if_even": step.decode_step(demand, cluster, context=context).tokens_per_second,
            "prompt_tokens_per_second": read.tokens_per_second,
            "bottleneck": decoded.bottleneck,
            "milliseconds": {part: 1e3 * getattr(decoded, part) for part in PARTS},
        }
        if count > 1 and (bytes_there := (hybrid or {}).get(count)):
            share = (bytes_there - fullest_device_bytes(described.bytes, count, rest=0)) / described.bytes.rest
            sharded = step.decode_step(demand, cluster, load, context=context, rest_share=share)
            row["hybrid_tokens_per_second"] = sharded.tokens_per_second
        rows.append(row)
    return _tables(setting, rows, step.best_number(estimates), section)


def _tables(setting, rows, best, section) -> list[Table]:
    routing = "uniform" if setting.trace is None else setting.trace.model or "trace"
    also = {"hardware": setting.machine.name, "hardware_source": setting.machine.source, "context": setting.context,
            "best_devices": best, "routing": routing, "link": setting.link_name,
            "link_source": setting.link_source}  # fmt: skip
    table = of_records(
        f"Projection (modelled): {setting.machine.name}, {setting.link_name}, {routing} routing",
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
        also=also,
    )
    rises = best == rows[-1]["devices"] > 1
    more = "of those considered, and speed still rises there" if rises else "more devices do not speed decoding up"
    items = {
        "context": f"{setting.context:,} tokens before the one that is decoded (--context)",
        "best number": f"{best}; {more}",
        "device": setting.machine.source,
        "link": setting.link_source,
        "*": None if all(row["fits"] for row in rows) else "does not fit into memory",
    }
    return [table, facts("What it rests on", items)]


def original_claims(described: Architecture) -> list[Table]:
    """The two projections of the original write-up, on H100s: its claims beside what this model says.

    [] where one such GPU cannot hold the model: a speed-up over it is none.
    """
    demand, machine = described.demand, MACHINES["h100"]
    if fullest_device_bytes(described.bytes, 1) > machine.memory_bytes or demand.num_experts < 64:
        return []
    nvlink, infiniband = LINKS["nvlink-h100"][0], LINKS["infiniband-ndr"][0]
    setting, one = Setting(machine, nvlink, "", ""), step.Cluster(machine)
    node = step.Cluster(machine, 8, nvlink)
    nodes = step.Cluster(machine, 64, nvlink, num_nodes=8, node_link=infiniband)
    cases = []
    for name, claim, *clusters in (
        ("8 GPUs in one machine", "2-4x over one GPU", one, node),
        ("8 nodes of 8 GPUs", "10-20x over one node", node, nodes),
    ):
        seconds = {
            f"decoding, batch {batch}": [
                step.decode_step(demand, c, setting.load(demand, c.num_devices, batch), batch=batch).seconds
                for c in clusters
            ]
            for batch in DECODING
        }
        chunk = step.PREFILL_CHUNK
        seconds[f"prompt of {PROMPT} tokens"] = [
            step.prefill(demand, c, PROMPT, setting.load(demand, c.num_devices, chunk)).seconds for c in clusters
        ]
        speed_up = {what: before / after for what, (before, after) in seconds.items()}
        cases.append({"case": name, "claim": claim, "speed_up": speed_up})
    table = of_records(
        f"The original write-up's projections, on {machine.name} (modelled)",
        "cases",
        cases,
        ("case", ""),
        ("claim", "claim"),
        *((lambda case, what=what: case["speed_up"][what], what, "{:.2f}x") for what in cases[0]["speed_up"]),
        section="original_claims",
        source="modelled",
        also={"hardware": machine.name},
    )
    return [table]
