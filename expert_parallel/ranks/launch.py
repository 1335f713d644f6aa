"""Launch: local ranks over the ring or MPI, for probes and benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def rank_commands(backend: str, num_ranks: int, command: list[str], folder: Path) -> list[tuple[list[str], dict]]:
    """(command, environment) of every process to start, for local ranks over "ring" or "mpi".

    Raises ValueError if the backend is not installed.
    """
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
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
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes = [
            subprocess.Popen(line, env=environment, start_new_session=True, **pipes)
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
