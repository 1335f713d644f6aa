"""The claims of the write-up that this project grew from, beside what this project says of them.

    python benchmarks/original_claims.py

Modelled: from Qwen3-Coder-30B's configuration (no weights), and on H100s (hardware.py has the sources). Measured: on
the shipped model, in one process.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from expert_parallel.models.architecture import describe, fullest_device_bytes
from expert_parallel.models.configurations import load_configuration
from expert_parallel.projection import step
from expert_parallel.projection.hardware import LINKS, MACHINES
from expert_parallel.projection.links import Link, bytes_per_token
from expert_parallel.report.model import billions
from expert_parallel.report.projection import Setting
from expert_parallel.report.table import of_rows, size

PROMPT = 8192  # tokens
DEVICES = 8


@dataclass(frozen=True)
class Nodes:
    """All-sums inside every node, then of each device's share between nodes."""

    inside: Link
    between: Link
    per_node: int

    def all_sum_parts(self, payload, num_devices):
        near = self.inside.all_sum_parts(payload, self.per_node)
        far = self.between.all_sum_parts(payload / self.per_node, num_devices // self.per_node)
        return near[0] + far[0], near[1] + far[1]


def speed_ups(demand):
    """{case: {what: speed-up}} of the write-up's two machines, each over the one before it."""
    machine, nvlink = MACHINES["h100"], LINKS["nvlink-h100"][0]
    routing = Setting(machine, nvlink, "", "")
    steps = ((1, None), (8, nvlink), (64, Nodes(nvlink, LINKS["infiniband-ndr"][0], 8)))
    seconds = {}
    for count, link in steps:
        decoding = {
            f"batch {batch}": step.decode_step(
                demand, machine, count, link, routing.load(demand, count, batch), batch=batch
            )
            for batch in (1, 64)
        }
        chunk = routing.load(demand, count, step.PREFILL_CHUNK)
        decoding[f"prompt of {PROMPT}"] = step.prefill(demand, machine, PROMPT, count, link, chunk)
        seconds[count] = {what: estimate.seconds for what, estimate in decoding.items()}
    return {
        name: {what: seconds[before][what] / seconds[after][what] for what in seconds[before]}
        for name, before, after in (("8 GPUs over one", 1, 8), ("8 nodes of 8 over one node", 8, 64))
    }


def main():
    whole = {bits: describe(load_configuration("qwen3-coder-30b"), bits=bits) for bits in (4, 16)}
    coder, demand = whole[4], whole[4].demand
    fullest = fullest_device_bytes(coder.bytes, DEVICES)
    experts = fullest_device_bytes(coder.bytes, DEVICES, rest=0)
    here = coder.experts.parameters // DEVICES
    sent = {how: bytes_per_token(coder.hidden, coder.chosen, 1, 2, how) for how in ("gather", "reduce")}
    both = {bits: fullest_device_bytes(each.bytes, DEVICES) for bits, each in whole.items()}
    ups = speed_ups(demand)
    words = {name: ", ".join(f"{what} {up:.2f}x" for what, up in times.items()) for name, times in ups.items()}
    read = coder.whole.parameters / coder.active.parameters
    rows = [
        ("16 experts, about 3.75 B parameters a device", f"{billions(here)} of experts, the rest besides", "modelled"),
        ("8x less memory per device",
         f"experts alone {coder.bytes.experts / experts:.2f}x, all {coder.bytes.total / fullest:.2f}x", "modelled"),
        ("about 4 GB a GPU, 32 GB for the whole model",
         f"4-bit {size(both[4])} of {size(whole[4].bytes.total)}; bfloat16 {size(both[16])} of"
         f" {size(whole[16].bytes.total)}", "modelled"),
        ("about 16 KB sent per token", f"in each of {coder.num_moe_layers} layers: gather {sent['gather']:,} B,"
         f" reduce {sent['reduce']:,} B", "modelled"),
        ("about 16x compute efficiency over a dense model",
         f"{read:.1f}x fewer active parameters than parameters; no such speed", "modelled"),
        ("2-4x over a single GPU with 8", words["8 GPUs over one"], "modelled"),
        ("10-20x over a single node with 8 nodes", words["8 nodes of 8 over one node"], "modelled"),
        ("linear scaling with devices", "no: see the two lines above", "modelled"),
    ]  # fmt: skip
    print(
        of_rows(
            "Claims of the original write-up, Qwen3-Coder-30B at 4 bits", "claim", "what holds", "source", rows=rows
        )
    )


if __name__ == "__main__":
    main()
