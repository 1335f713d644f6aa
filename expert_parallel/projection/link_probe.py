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


def measure_link(backend: str, num_ranks: int = 2, timeout: float = 120) -> tuple[Link, list[tuple[int, float]]]:
    """(link fitted, [(payload bytes, seconds)]) of all-sums between local processes."""
    output = run_ranks(backend, num_ranks, [sys.executable, "-m", "expert_parallel.projection.link_probe"], timeout)
    line = next((line for line in output.splitlines() if line.startswith('{"payloads"')), None)
    if line is None:
        raise ValueError(f"{num_ranks} ranks over {backend} said nothing")
    measured = json.loads(line)
    if measured["size"] != num_ranks:
        raise ValueError(f"{num_ranks} ranks over {backend} did not find each other: MLX does not load this backend")
    rows = list(zip(measured["payloads"], measured["seconds"], strict=True))
    return fit_link(measured["payloads"], measured["seconds"], num_ranks), rows


def main():
    group = mx.distributed.init()
    seconds = []
    for payload in PAYLOADS:
        x = mx.ones(payload // 4)
        mx.eval(x, mx.distributed.all_sum(x, group=group))
        times = []
        for _ in range(30):
            begin = time.perf_counter()
            mx.eval(mx.distributed.all_sum(x, group=group))
            times.append(time.perf_counter() - begin)
        seconds.append(statistics.median(times))
    if group.rank() == 0:
        print(json.dumps({"payloads": PAYLOADS, "seconds": seconds, "size": group.size()}), flush=True)


if __name__ == "__main__":
    main()
