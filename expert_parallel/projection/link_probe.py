"""Link probe: time all-sums between local processes over the ring or MPI, and fit a link to them.

python -m expert_parallel.projection.link_probe        what each rank runs; rank 0 prints JSON
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import mlx.core as mx

from ..ranks.launch import run_ranks
from .links import Link, fit_link

PAYLOADS = (8192, 65536, 524288, 4194304)  # bytes


def measure_link(backend: str, num_ranks: int = 2) -> tuple[Link, list[tuple[int, float]]]:
    """(link fitted, [(payload bytes, seconds)]) of all-sums between local processes."""
    output = run_ranks(backend, num_ranks, [sys.executable, "-m", "expert_parallel.projection.link_probe"], timeout=120)
    measured = next((json.loads(line) for line in output.splitlines() if line.startswith('{"size"')), {})
    if measured.get("size") != num_ranks:
        raise ValueError(f"{num_ranks} ranks over {backend} did not find each other: MLX does not load this backend")
    return fit_link(PAYLOADS, measured["seconds"], num_ranks), list(zip(PAYLOADS, measured["seconds"], strict=True))


def all_sum_seconds(payload: int, group, repeats: int = 30) -> float:
    """Median time of an all-sum of so many bytes, after a first one."""
    x, times = mx.ones(payload // 4), []
    mx.eval(x, mx.distributed.all_sum(x, group=group))
    for _ in range(repeats):
        begin = time.perf_counter()
        mx.eval(mx.distributed.all_sum(x, group=group))
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


if __name__ == "__main__":
    ranks = mx.distributed.init()
    seconds = [all_sum_seconds(payload, ranks) for payload in PAYLOADS]
    if ranks.rank() == 0:
        print(json.dumps({"size": ranks.size(), "seconds": seconds}))
