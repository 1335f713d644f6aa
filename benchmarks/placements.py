"""How good are placements by load, and how quickly found? Beside EPLB's own algorithm, on the same tables of loads.

    python benchmarks/placements.py
    python benchmarks/placements.py --trace recording.csv      a recorded trace, of any format that is known

The fullest device over the mean, mean over layers: simulated on the loads themselves. A trace is cut in two besides:
placements are fitted on its first half and judged on its second, also step by step, with slots dealt out among copies
in each of the ways there are.
"""

import argparse
import sys
import time
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "placing"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from eplb_oracle import rebalance_experts

from expert_parallel import balancedness, place_experts
from expert_parallel.balance import imbalance_ratio
from expert_parallel.formats.traces import read_trace
from expert_parallel.report.table import of_rows
from expert_parallel.serving import Serving
from expert_parallel.study.learning import among_copies
from expert_parallel.study.remedies import Choices

# layers, experts, exponent of Zipf's law (0: uniform random loads), devices, copies
TABLES = [(9, 128, 0, 8, 8), (9, 128, 1.4, 8, 8), (9, 64, 0, 16, 16), (9, 64, 1.4, 16, 16), (9, 256, 1.4, 32, 32),
          (58, 256, 1.2, 32, 32), (58, 256, 1.4, 32, 32), (58, 256, 2.0, 32, 32), (48, 128, 0.6, 8, 0),
          (48, 128, 1.2, 8, 32)]  # fmt: skip
OF_A_TRACE = [(8, 0), (8, 16), (8, 32)]


def table_of(layers, experts, zipf, seed=0):
    random = np.random.default_rng(seed)
    if not zipf:
        return random.integers(1, 1000, (layers, experts))
    loads = 1e6 * np.arange(1, experts + 1) ** -float(zipf)
    return np.stack([random.permutation(loads) for _ in range(layers)]).astype(int) + 1


def fullest_by_eplb(loads, devices, copies):
    """[L]; fullest device over the mean, by its global variant, which balances best."""
    slots, counts = rebalance_experts(loads, loads.shape[1] + copies, 1, 1, devices)
    rows = np.arange(len(loads))[:, None]
    each = (loads / counts)[rows, slots].reshape(len(loads), devices, -1).sum(axis=2)
    return each.max(axis=1) / each.mean(axis=1)


def row_of(name, loads, devices, copies):
    begin = time.perf_counter()
    placement = place_experts(loads, devices, "replicated" if copies else "balanced", copies)
    seconds = time.perf_counter() - begin
    ours, theirs = 1 + imbalance_ratio(placement.device_loads(loads)), fullest_by_eplb(loads, devices, copies)
    figures = (f"{ours.mean():.4f}", f"{theirs.mean():.4f}", f"{(ours / theirs).max():.4f}", f"{seconds:.2f} s")
    return (name, devices, copies, *figures)


def held_out(trace):
    """Rows of balancedness on the half that placements were fitted on, on the other, and of one fitted on the other."""
    half = len(trace) // 2
    fit, test = trace[:half].loads(), trace[half:].loads()
    for devices, copies in OF_A_TRACE:
        for strategy in ("contiguous", "replicated" if copies else "balanced")[bool(copies) :]:
            placement, oracle = (place_experts(loads, devices, strategy, copies) for loads in (fit, test))
            judged = ((placement, fit), (placement, test), (oracle, test))
            even = [f"{balancedness(placed.device_loads(loads)):.3f}" for placed, loads in judged]
            yield (strategy, devices, copies, *even)


def experts_read(layers: list[Serving], steps) -> str:
    """Experts whose weights the devices read in a step over those that it wants: dealt out by the optimum / shared.

    Shared: where each holder gets a slot of an expert as long as there is one.
    """
    read = shared = wanted = 0
    for layer, serving in enumerate(layers):
        for step in steps:
            ids = step.experts[:, layer].reshape(-1)
            read += len(set(zip(serving.devices(ids).tolist(), ids.tolist(), strict=True)))
            counts = np.bincount(ids, minlength=serving.held.shape[1])
            shared += np.minimum(counts, serving.held.sum(axis=0)).sum()
            wanted += (counts > 0).sum()
    return f"{read / wanted:.2f} / {shared / wanted:.2f}"


def dealt_among_copies(trace, devices=8):
    """Rows of the fullest device's slots over the optimum's, for the other half step by step; and what a layer took."""
    half = len(trace) // 2
    for copies in (8, 16, 32):
        held = place_experts(trace[:half].loads(), devices, "replicated", copies).held
        for tokens in (1, 8, 64):
            rest = trace[half:].experts.astype(int)
            steps = [Choices(rest[n : n + tokens], trace.num_experts) for n in range(0, half - tokens + 1, tokens)]
            over, serving = among_copies(held, steps), [Serving(of_layer) for of_layer in held]
            seconds = {False: [], True: []}
            for greedy, step, layer in product(seconds, steps, range(len(held))):
                begin = time.perf_counter()
                serving[layer].devices(step.experts[:, layer], greedy)
                seconds[greedy].append(time.perf_counter() - begin)
            took = [f"{1e6 * np.median(seconds[greedy]):.0f} us" for greedy in (False, True)]
            ways = (f"{over[name]:.3f}" for name in ("least loaded", "shared equally", "by turns"))
            yield (copies, tokens, *ways, experts_read(serving, steps), *took)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, metavar="FILE", help="a recorded trace besides")
    args = parser.parse_args()
    rows = [
        row_of(f"{layers} x {experts}, {f'Zipf {zipf}' if zipf else 'uniform'}", table_of(layers, experts, zipf), *over)
        for layers, experts, zipf, *over in TABLES
    ]
    trace = read_trace(args.trace).phase("decode") if args.trace else None
    if trace:
        layers, experts = trace.experts.shape[1], trace.num_experts
        half = trace[: len(trace) // 2].loads()
        rows += [row_of(f"{layers} x {experts}, the trace", half, *over) for over in OF_A_TRACE]
    heads = ("loads", "devices", "copies", "ours", "EPLB", "worst layer, to EPLB", "time")
    print(of_rows("Fullest device over the mean (simulated; time measured)", *heads, rows=rows))
    if trace:
        title = f"Balancedness of {len(trace)} decoded tokens (simulated)"
        heads = ("placement", "devices", "copies", "fitted half", "other half", "oracle")
        print(of_rows(title, *heads, rows=list(held_out(trace))))
        print("oracle: fitted on the other half itself\n")
        heads = ("copies", "tokens a step", "least loaded", "shared equally", "by turns", "experts read")
        heads += ("optimum", "least loaded")
        title = "Fullest device's slots over the optimum's (simulated); a layer and step took (measured, median)"
        print(of_rows(title, *heads, rows=list(dealt_among_copies(trace))))
        print("experts read by all devices, over those wanted (simulated): by the optimum / each holder gets a slot")


if __name__ == "__main__":
    main()
