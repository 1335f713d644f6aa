"""Launch: what launchers leave in a rank's environment; local ranks over the ring or MPI, for probes and benchmarks.

Imports the standard library alone, so that a script can ask whether it is a rank before it loads anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PORTS = range(20_000, 32_768)  # below those that systems give to outgoing connections
SUPERVISOR = "EXPERT_PARALLEL_SUPERVISOR"  # a FIFO that the supervisor of this process holds open while it lives


def end_with_supervisor() -> None:
    """From now on this process ends, in one line and with status 3, when the one that supervises it is gone.

    Nothing where it has no supervisor. The pipe's end comes however that one died, also through a launcher between,
    and MLX releases the GIL in all waits, so that the thread hears it.
    """
    if not (path := os.environ.pop(SUPERVISOR, None)):
        return

    def wait():
        with contextlib.suppress(OSError):  # its folder is gone, too
            pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without a writer it opens as well, at its end
            os.set_blocking(pipe, True)
            os.read(pipe, 1)
        with contextlib.suppress(OSError):  # who would have passed it on is gone
            os.write(2, b"error: the supervisor of this run was ended\n")
        os._exit(3)

    threading.Thread(target=wait, daemon=True).start()


def launched() -> tuple[str | None, int, str]:
    """(rank, number of processes, variable that says so) of the launch that this process is part of.

    (None, 1, "") for a process by itself; a number that the launcher does not tell counts as 2. The launcher that
    comes first below decides: those after it may have started the job in which it runs. ValueError for no number.
    """
    environment, task = os.environ.get, os.environ.get("SLURM_PROCID", "0")
    found = (
        (environment("OMPI_COMM_WORLD_RANK"), environment("OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE"),
        (environment("MLX_RANK"), _ranks_of_mlx(), "MLX_RANK"),
        (environment("PMI_RANK"), environment("PMI_SIZE"), "PMI_SIZE"),  # MPICH, Intel MPI
        (task, environment("SLURM_STEP_NUM_TASKS"), "SLURM_STEP_NUM_TASKS"),  # srun
        # SLURM_NTASKS is what a job may start: its own shell or script has it too, as task 0, and is one process.
        (task, environment("SLURM_NTASKS") if task != "0" else None, "SLURM_NTASKS"),
    )
    rank, number, by = next((row for row in found if row[1]), (None, 1, ""))
    if not str(number).isdecimal():
        raise ValueError(f"{by} is {number!r}, which is no number of processes: unset it to run alone")
    return (rank, int(number), by) if int(number) > 1 else (None, 1, "")


def _ranks_of_mlx() -> int | str | None:
    for name in ("MLX_HOSTFILE", "MLX_IBV_DEVICES"):
        with contextlib.suppress(KeyError, OSError, ValueError, TypeError):
            return len(json.loads(Path(os.environ[name]).read_text()))
    return os.environ.get("MLX_WORLD_SIZE") or ("2" if "MLX_RANK" in os.environ else None)


def check_hostfile() -> list[list[str]] | None:
    """What MLX_HOSTFILE names, "ip:port" strings for each rank; None where it is not set. ValueError with its name."""
    path, rank = os.environ.get("MLX_HOSTFILE"), os.environ.get("MLX_RANK", "")
    if path is None:
        return None
    try:
        hosts = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"MLX_HOSTFILE {path} cannot be read: {error}") from None
    good = isinstance(hosts, list) and all(isinstance(host, list) and host for host in hosts)
    if not good or not all(isinstance(address, str) and ":" in address for host in hosts for address in host):
        raise ValueError(
            f'MLX_HOSTFILE {path} should be like [["10.0.0.1:5000"], ["10.0.0.2:5000"]], an entry for each rank; a file'
            " with ssh and ips is for mlx.launch --hostfile"
        )
    if not rank.isdigit() or int(rank) >= len(hosts):
        raise ValueError(f"MLX_HOSTFILE {path} is for ranks 0 to {len(hosts) - 1}, MLX_RANK is {rank or 'not set'}")
    if len(hosts) == 1:  # MLX would try for half a minute
        raise ValueError(f"MLX_HOSTFILE {path} has one entry, a ring has two or more: unset MLX_HOSTFILE to run alone")
    return hosts


def host_of_rank_0() -> str:
    """Address at which ranks can reach rank 0: this machine's own where all are on it, 0.0.0.0 where none is known."""
    with contextlib.suppress(ValueError):  # which is said where the group starts
        if hosts := check_hostfile():
            machines = [host[0].rpartition(":")[0] for host in hosts]
            return machines[0] if len(set(machines)) > 1 else "127.0.0.1"
    coordinator = os.environ.get("MLX_JACCL_COORDINATOR", "").rpartition(":")[0]
    if coordinator or "NCCL_HOST_IP" in os.environ:
        return coordinator or os.environ["NCCL_HOST_IP"]
    number, here = (os.environ.get(f"OMPI_COMM_WORLD_{name}SIZE") for name in ("", "LOCAL_"))
    return "127.0.0.1" if number == here else "0.0.0.0"


def free_ports(count: int) -> list[int]:
    """Ports of this machine for ranks to listen at; no outgoing connection can take one before they do."""
    found = []
    with contextlib.ExitStack() as held:
        for port in random.SystemRandom().sample(PORTS, len(PORTS)):  # others seed the shared generator
            with contextlib.suppress(OSError):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
                found.append(port)
            if len(found) == count:
                return found
    raise ValueError(f"of ports {PORTS[0]} to {PORTS[-1]} not even {count} could be listened at")


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
    hostfile = folder / "hosts.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(num_ranks)]))
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
