"""A watchdog: ends a rank that waits for peers which will never answer.

A collective whose peer is gone can block inside the library, where no Python signal handler or
thread runs. So a small process beside each rank keeps watch, and ends the rank with one line

    when the time that the rank allowed for its present step is over,
    when another rank's process is gone: the watchdogs hold connections to that of rank 0,
    when the launcher ends the run.
"""

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
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path

import mlx.core as mx

from .output import exit_of
from .ranks import RanksDisagree

_WATCH = r"""
import os, select, signal, socket, sys
name, rank_pid, token = sys.argv[1], int(sys.argv[2]), sys.argv[3].encode()
limit, message, peers, done, pending = None, "", [], False, b""
server = socket.socket()
server.bind(("", 0))
server.listen(128)
print(server.getsockname()[1], flush=True)

def end(why):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one line is enough
    sys.stderr.write("\n" + name + why + "\n")
    sys.stderr.flush()
    for how, seconds in (signal.SIGQUIT, 2), (signal.SIGKILL, 0):
        try:
            os.kill(rank_pid, how)
        except ProcessLookupError:
            break
        while select.select([0], [], [], seconds)[0]:
            if not os.read(0, 1 << 16):  # the rank is gone
                os._exit(0)
    os._exit(0)

signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, lambda *_: end("stopped by the launcher: another rank failed or the run was ended"))
while not done:
    ready = select.select([0, server, *peers], [], [], limit)[0]
    if not ready:
        end(message)
    for source in ready:
        if source is server:
            peer = server.accept()[0]
            peer.settimeout(2)
            try:
                known = peer.recv(64).startswith(token)
            except OSError:
                known = False
            peers.append(peer) if known else peer.close()
        elif source == 0:
            data = os.read(0, 1 << 16)
            done = done or not data  # the rank was killed: its peers learn it from the closed connections
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                command, _, rest = line.decode().partition(" ")
                if command == "limit":
                    seconds, _, message = rest.partition(" ")
                    limit = float(seconds) or None
                elif command == "join":
                    host, port, token = rest.split()
                    try:
                        peer = socket.create_connection((host, int(port)), timeout=5)
                        peer.sendall(token.encode())
                        peer.settimeout(None)
                        peers.append(peer)
                    except OSError:
                        pass  # a firewall between: the time limit is left
                elif command == "bye":
                    done = True
                    for peer in peers:
                        try:
                            peer.sendall(b"bye")
                        except OSError:
                            pass
        else:
            try:
                word = source.recv(64)
            except OSError:
                word = b""
            peers.remove(source)
            if not word and not done:
                end("lost another rank: its process was ended or crashed")
"""


LOST_PEER = int(signal.SIGQUIT)  # exit status 3
_LOST = re.compile(r"\bpeer\b|connection|\bjaccl\b|\bNCCL\b|\bMPI_", re.IGNORECASE)


@contextmanager
def failing_together(name: str, watchdog):
    """Around the work of a rank: whatever ends it alone ends the other ranks too, within seconds.

    name  that its lines on standard error begin with, e.g. "rank 1: "
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
        self._token = secrets.token_hex(8)
        command = [sys.executable, "-I", "-S", "-c", _WATCH, name, str(os.getpid()), self._token]
        # The signal's number is 3: as its handler, libc's _exit ends the rank with that status wherever it waits.
        libc = ctypes.CDLL(None)
        libc.signal(signal.SIGQUIT, ctypes.cast(libc._exit, ctypes.c_void_p))
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._port = int(self._process.stdout.readline())

    def limit(self, seconds: float | None, message: str = "") -> None:
        self._tell(f"limit {seconds or 0} {message}")

    def address(self) -> dict:
        """Where other watchdogs reach this one: to be shared by the ranks, then `join`."""
        hosts = os.environ.get("MLX_HOSTFILE")
        coordinator = os.environ.get("MLX_JACCL_COORDINATOR", "").rpartition(":")[0]  # rank 0's, the one that is asked
        host = coordinator or os.environ.get("NCCL_HOST_IP") or socket.gethostname()
        if hosts:
            entry = json.loads(Path(hosts).read_text())[int(os.environ["MLX_RANK"])]
            entry = entry if isinstance(entry, list) else entry.get("ips", [])
            host = entry[0].rpartition(":")[0] or entry[0] if entry else host
        return {"host": host, "name": socket.gethostname(), "port": self._port, "token": self._token}

    def join(self, first: dict) -> None:
        """Hold a connection to rank 0's watchdog."""
        host = "127.0.0.1" if first["name"] == socket.gethostname() else first["host"]
        self._tell(f"join {host} {first['port']} {first['token']}")

    def close(self) -> None:
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


class NoWatchdog:
    """For a single process, which waits for nobody."""

    def limit(self, seconds, message=""):
        pass

    def close(self):
        pass
