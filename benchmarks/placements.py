"""How good are placements by load, and how quickly found? Beside EPLB's own algorithm, on the same tables of loads.

    python benchmarks/placements.py
    python benchmarks/placements.py --trace recording.csv      a recorded trace, of any format that is known

The fullest device over the mean, mean over layers: simulated on the loads themselves. A trace is cut in two besides:
placements are fitted on its first half and judged on its second.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "placing"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from eplb_oracle import rebalance_experts

from expert_parallel import balancedness, place_experts
from expert_parallel.balance import imbalance_ratio
from expert_parallel.formats.traces import read_trace
from expert_parallel.report.table import of_rows

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
    """Rows of balancedness on the half that placements were fitted on, and on the other."""
    half = len(trace) // 2
    fit, test = trace[:half].loads(), trace[half:].loads()
    for devices, copies in OF_A_TRACE:
        for strategy in ("contiguous", "replicated" if copies else "balanced"):
            placement = place_experts(fit, devices, strategy, copies if strategy == "replicated" else 0)
            even = [f"{balancedness(placement.device_loads(loads)):.3f}" for loads in (fit, test)]
            yield (strategy, devices, placement.copies.sum(axis=1).max() - placement.num_experts, *even)


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
        print(of_rows(title, "placement", "devices", "copies", "fitted half", "other half", rows=list(held_out(trace))))


if __name__ == "__main__":
    main()
