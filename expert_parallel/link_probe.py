"""Link probe: time all-sums between local processes over the ring or MPI, and fit a link to them.

python -m expert_parallel.link_probe        what each rank runs; rank 0 prints JSON
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx

from .communication import Link, fit_link

PAYLOADS = (8192, 65536, 524288, 4194304)  # bytes


def rank_commands(backend: str, num_ranks: int, command: list[str], folder: Path) -> list[tuple[list[str], dict]]:
    """(command, environment) of every process to start, for local ranks over "ring" or "mpi".

    Raises ValueError if the backend is not installed.
    """
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    if backend == "mpi":
        if shutil.which("mpirun") is None:
            raise ValueError("MPI is not installed: there is no mpirun; apt install openmpi-bin libopenmpi-dev")
        here |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return [(["mpirun", "--oversubscribe", "-np", str(num_ranks), *command], here)]
    if backend != "ring":
        raise ValueError(f'a local backend is "ring" or "mpi", got {backend!r}')
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(num_ranks)]
    hosts = [[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]
    for s in sockets:
        s.close()
    hostfile = folder / "hosts.json"
    hostfile.write_text(json.dumps(hosts))
    return [(command, {**here, "MLX_RANK": str(r), "MLX_HOSTFILE": str(hostfile)}) for r in range(num_ranks)]


def run_ranks(backend: str, num_ranks: int, command: list[str], timeout: float = 300) -> str:
    """Run a command as local ranks; standard output of all together. ValueError if one fails or none ends in time."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                line,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            for line, environment in rank_commands(backend, num_ranks, command, Path(folder))
        ]
        outputs, end = [], time.monotonic() + timeout
        try:
            for process in processes:
                out, err = process.communicate(timeout=max(end - time.monotonic(), 1))
                if process.returncode:
                    reason = (err.strip().splitlines() or ["no message"])[-1]
                    raise ValueError(f"{num_ranks} ranks over {backend} failed: {reason}")
                outputs.append(out)
        except subprocess.TimeoutExpired:
            raise ValueError(f"{num_ranks} ranks over {backend} did not end within {timeout:g} s") from None
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):  # mpirun's own children too
                    os.killpg(process.pid, signal.SIGKILL)
    return "".join(outputs)


def measure_link(backend: str, num_ranks: int = 2, timeout: float = 120) -> tuple[Link, list[tuple[int, float]]]:
    """(link fitted, [(payload bytes, seconds)]) of all-sums between local processes."""
    output = run_ranks(backend, num_ranks, [sys.executable, "-m", "expert_parallel.link_probe"], timeout)
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
