"""The rank's side of its watch process (watch.py), and what becomes of the others when one rank ends alone."""

from __future__ import annotations

import ctypes
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path

import mlx.core as mx

from .group import RanksDisagree

LOST_PEER = int(signal.SIGQUIT)  # exit status 3
_LOST = re.compile(r"\bpeer\b|connection|\bjaccl\b|\bNCCL\b|\bMPI_", re.IGNORECASE)


@contextmanager
def failing_together(name: str, watchdog, exit_of):
    """Around the work of a rank: whatever ends it alone ends the other ranks too, within seconds.

    name     that its lines on standard error begin with, e.g. "rank 1: "
    exit_of  (error) -> (exit status, line) for what a user can mend, None for all else
    Such a rank leaves at once and without a goodbye, from which the others' watchdogs learn it: in an orderly
    end the backend would wait for them. Exit status 2 for wrong input, 3 where another rank was lost, as the
    backend's own error or the watchdog says, 1 for all else.
    """
    try:
        yield
    except RanksDisagree as error:
        status, line = exit_of(error)
        sys.stderr.write(f"{name}{line}\n")
        # All have said it before one leaves: mpirun then ends the others at once.
        mx.eval(mx.distributed.all_sum(mx.zeros(1)))
        watchdog.close()
        raise SystemExit(status) from None
    except (Exception, KeyboardInterrupt) as error:
        text = " ".join(str(error).split())
        if isinstance(error, RuntimeError) and _LOST.search(text):
            status, line = LOST_PEER, f"error: lost another rank: {text}"
        elif (known := exit_of(error)) is not None:
            status, line = known
        else:
            at = traceback.extract_tb(error.__traceback__)[-1]
            status, line = 1, f"error: {type(error).__name__}: {text} ({Path(at.filename).name}:{at.lineno})"
        with suppress(OSError):  # whoever read it may be gone
            sys.stdout.flush()
        if line:
            sys.stderr.write(f"\n{name}{line}\n")
            sys.stderr.flush()
        os._exit(status)
    watchdog.close()


class Watchdog:
    """limit(seconds, message) starts the clock anew, limit(None) stops it; close() when all is well."""

    def __init__(self, name: str = "error: "):
        self._name, self._closed, self._token = name, False, secrets.token_hex(16)
        # The signal's number is 3: as its handler, libc's _exit ends the rank with that status wherever it waits.
        libc = ctypes.CDLL(None)
        libc.signal(signal.SIGQUIT, ctypes.cast(libc._exit, ctypes.c_void_p))
        self._host = _own_host()
        watch = Path(__file__).with_name("watch.py")
        command = [sys.executable, "-I", "-S", str(watch), name, str(os.getpid()), self._host]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._port = int(self._process.stdout.readline())
        self._tell(f"token {self._token}")  # not on the command line, which every user of the machine can read
        threading.Thread(target=self._watch_the_watch, daemon=True).start()

    def _watch_the_watch(self):
        """A rank whose watch process was killed must not wait for peers that it could no longer leave."""
        self._process.wait()
        if not self._closed:
            sys.stderr.write(f"\n{self._name}its watch process was ended\n")
            sys.stderr.flush()
            os._exit(LOST_PEER)

    def limit(self, seconds: float | None, message: str = "") -> None:
        self._tell(f"limit {seconds or 0} {message}")

    def address(self) -> dict:
        """Where other watch processes reach this one: to be shared by the ranks, then `join`."""
        host = self._host or socket.gethostname()
        return {"host": host, "port": self._port, "token": self._token}

    def join(self, first: dict) -> None:
        """Hold a connection to rank 0's watch process."""
        self._tell(f"join {first['host']} {first['port']} {first['token']}")

    def close(self) -> None:
        self._closed = True
        if not self._process.stdin.closed:
            self._tell("bye")
            self._process.stdin.close()
        self._process.wait()

    def _tell(self, line: str) -> None:
        try:
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):  # it has ended, or was closed
            pass


def _own_host() -> str:
    """Address to listen at: this machine's own where all ranks are on it, else the one that the launcher uses."""
    environment = os.environ
    if hosts := environment.get("MLX_HOSTFILE"):
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # read_hostfile says it
            return json.loads(Path(hosts).read_text())[int(environment["MLX_RANK"])][0].rpartition(":")[0]
    coordinator = environment.get("MLX_JACCL_COORDINATOR", "").rpartition(":")[0]  # rank 0's, the one that is asked
    if coordinator or environment.get("NCCL_HOST_IP"):
        return (coordinator or environment["NCCL_HOST_IP"]) if environment.get("MLX_RANK", "0") == "0" else "127.0.0.1"
    size, here = (environment.get(f"OMPI_COMM_WORLD_{name}SIZE") for name in ("", "LOCAL_"))
    return "127.0.0.1" if size == here else ""


class NoWatchdog:
    """For a single process, which waits for nobody."""

    def limit(self, seconds, message=""):
        pass

    def close(self):
        pass
