"""What holds of the claims of the write-up that this project grew from?

    python benchmarks/original_claims.py                a second; no weights, no network

They were made for Qwen3-Coder-30B at 4 bits, and are set beside that model alone: bytes from mlx-lm's own classes built
lazily, speed-ups on H100s from the projection (uniform routing). The table is Markdown, for BENCHMARKS.md.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from expert_parallel.models.architecture import describe, fullest_device_bytes
from expert_parallel.models.configurations import load_configuration
from expert_parallel.projection import step
from expert_parallel.projection.hardware import LINKS, MACHINES
from expert_parallel.projection.links import Link, bytes_per_token
from expert_parallel.report.projection import Setting
from expert_parallel.report.table import size

ANALYSIS, HERE = "`python model_analysis.py`", "`python benchmarks/original_claims.py`"
PROMPT = 8192  # tokens


@dataclass(frozen=True)
class Nodes:
    """Links of nodes with so many devices each: an all-sum inside every node, then of each device's share between."""

    inside: Link
    between: Link
    per_node: int = 8

    def all_sum_parts(self, payload, devices):
        inside = self.inside.all_sum_parts(payload, self.per_node)
        between = self.between.all_sum_parts(payload / self.per_node, devices // self.per_node)
        return inside[0] + between[0], inside[1] + between[1]


def speed_ups(demand, before, after):
    """Decoding with batch 1 and 64 and a long prompt: how many times as fast on `after` as on `before`, in words,
    and what takes most time of a step of one sequence there.

    before, after  (devices, link)
    """
    machine, seconds = MACHINES["h100"], []
    for devices, link in (before, after):
        loads = Setting(machine, link, "", "")
        decoded = [
            step.estimate(demand, machine, devices, link, loads.load(demand, devices, batch), batch=batch)
            for batch in (1, 64)
        ]
        chunk = step.PREFILL_CHUNK
        load = loads.load(demand, devices, chunk)
        prompt = [
            step.estimate(demand, machine, devices, link, load, context=first, tokens=chunk).seconds
            for first in range(0, PROMPT, chunk)
        ]
        seconds.append([*(each.seconds for each in decoded), sum(prompt)])
    times = [one / many for one, many in zip(*seconds, strict=True)]
    words = "decoding {:.2f}x with one sequence, {:.2f}x with 64; a prompt of 8,192 tokens {:.2f}x".format(*times)
    return words, decoded[0].bottleneck


def claims(configuration):
    """[(claim, what holds, source, command)]"""
    four, eight = (describe(configuration, bits=bits) for bits in (4, 8))
    demand, weighed = four.demand, four.bytes
    whole, each = weighed.total, fullest_device_bytes(weighed, 8)
    one = int(demand.expert_parameters.sum())  # of one expert in every layer
    experts, rest = one * four.num_experts // 8, four.whole.parameters - one * four.num_experts
    shape = four.hidden, four.chosen, four.num_moe_layers
    gather, reduce = (bytes_per_token(*shape[:2], 1, combine=how) for how in ("gather", "reduce"))
    nvlink, network = LINKS["nvlink-h100"][0], LINKS["infiniband-ndr"][0]
    machine, limit = speed_ups(demand, (1, None), (8, nvlink))
    nodes, limit_of_nodes = speed_ups(demand, (8, nvlink), (64, Nodes(nvlink, network)))
    modelled = "modelled, to the byte"
    on_h100 = "modelled, H100; compute assumed"
    return [
        ("8x less memory per device, on 8", f"{whole / each:.2f}x: {size(each)} of {size(whole)}; 8.00x is right of the"
         " experts alone, the rest is on every device", modelled, ANALYSIS),
        ("~3.75 B parameters per device", f"{(experts + rest) / 1e9:.2f} B: {experts / 1e9:.2f} B of 16 experts in 48"
         f" layers and {rest / 1e9:.2f} B of the rest; 3.75 B is all of it over 8", modelled, ANALYSIS),
        ("~4 GB per GPU, 32 GB in full", f"{size(each)} of {size(whole)} at 4 bits;"
         f" {size(fullest_device_bytes(eight.bytes, 8))} of {size(eight.bytes.total)} at 8", modelled,
         f"{ANALYSIS[:-1]} --bits 8`"),
        ("~16 KB of communication per token", f"{gather:,} B a token *and layer* if every slot is sent,"
         f" {reduce:,} B if weighted sums are; over 48 layers {size(gather * 48)} and {size(reduce * 48)}",
         "modelled, formula", HERE),
        ("~16x compute efficiency", f"128 / 8 = {four.num_experts / four.chosen:.0f} of the experts,"
         f" {four.whole.parameters / four.active.parameters:.1f}x of all parameters; of any MoE model, on one device"
         " too", modelled, ANALYSIS),
        ("linear scaling with devices", f"8 devices: {machine}; most time goes to {limit}", on_h100, HERE),
        ("2-4x on 8 GPUs over one", machine, on_h100, HERE),
        ("10-20x on 8 nodes over one", f"{nodes}; most time goes to {limit_of_nodes}", on_h100, HERE),
        ("64 devices, 512 experts potential", f"{four.num_experts} experts, whatever the number of devices: 2 on each"
         f" of 64, {size(fullest_device_bytes(weighed, 64))} with the rest", modelled, ANALYSIS),
    ]  # fmt: skip


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    header = ("claim", "what holds", "how known", "by")
    for row in (header, ["---"] * 4, *claims(load_configuration("qwen3-coder-30b"))):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
