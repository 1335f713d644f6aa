"""The rank's side of its watch process (watch.py), and what becomes of the others when one rank ends alone."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import mlx.core as mx

from .group import RanksDisagree
from .launch import host_of_rank_0, launched

LOST_PEER = int(signal.SIGQUIT)  # exit status 3
_LOST = re.compile(r"\bpeer\b|connection|\bjaccl\b|\bNCCL\b|\bMPI_", re.IGNORECASE)


@contextmanager
def failing_together(name: str, watchdog, exit_of):
    """Around the work of a rank: whatever ends it alone ends the other ranks too, within seconds.

    name     that its lines on standard error begin with, e.g. "rank 1: "
    exit_of  (error) -> (exit status, line) for what a user can mend, None for all else
    Such a rank leaves at once and without a goodbye, from which the others' watch processes learn it: in an orderly
    end the backend would wait for them. Exit status 2 for wrong input, 3 where another rank was lost, as the
    backend's own error or the watch process says, 1 for all else.
    """
    try:
        yield
    except RanksDisagree as error:
        status, line = exit_of(error)
        watchdog.hush()
        _say(f"{name}{line}")
        with suppress(RuntimeError):  # all have said it before one leaves: mpirun then ends the others at once
            mx.eval(mx.distributed.all_sum(mx.zeros(())))
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
        watchdog.hush()
        with suppress(OSError):  # whoever read it may be gone
            sys.stdout.flush()
        if line:
            _say(f"\n{name}{line}")
        os._exit(status)
    watchdog.close()


def _say(line: str) -> None:
    with suppress(OSError, AttributeError):  # closed by whoever started us, or the reader is gone
        sys.stderr.write(f"{line}\n")  # one write, so that lines of several ranks do not mix
        sys.stderr.flush()


class Watchdog:
    """The process beside this rank: limit(seconds, message) starts its clock anew, limit(None) stops it.

    Every wait for other ranks should have a limit; a rank that works alone can do without, as one that is killed or
    stopped in it is noticed all the same. close() when all is well; the watch goes on to the process's very end.
    """

    def __init__(self, name: str = "error: "):
        self.name = name.removesuffix("error: ")  # that other lines of this rank begin with
        self._name, self._ended, self._token = name, False, secrets.token_hex(16)
        # The signal's number is 3: as its handler, libc's _exit ends the rank with that status wherever it waits.
        libc = ctypes.CDLL(None)
        libc.signal(signal.SIGQUIT, ctypes.cast(libc._exit, ctypes.c_void_p))
        self._host = host_of_rank_0() if launched()[0] == "0" else ""  # the others are joined by nobody
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("watch.py"))]
        command += [name, str(os.getpid()), self._host]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        os.set_blocking(self._process.stdin.fileno(), False)  # one that is stopped does not hold the rank up
        self._tell(f"token {self._token}")
        threading.Thread(target=self._watch_the_watch, daemon=True).start()

    def _watch_the_watch(self) -> None:
        """A rank whose watch process was killed must not wait for peers that it could no longer leave."""
        self._process.wait()  # this thread runs in all collectives, for which MLX releases the GIL
        if not self._ended:
            _say(f"\n{self._name}its watch process was ended")
            os._exit(LOST_PEER)

    def limit(self, seconds: float | None, message: str = "") -> None:
        self._tell(f"limit {seconds or 0} {message}")

    def address(self) -> dict:
        """Where other watch processes reach this one: to be shared by the ranks, then `join`."""
        host = socket.gethostname() if self._host == "0.0.0.0" else self._host
        return {"host": host, "port": self._port, "token": self._token}

    @cached_property
    def _port(self) -> int:
        return int(self._process.stdout.readline())

    def join(self, first: dict) -> None:
        """Hold a connection to rank 0's watch process."""
        if first["port"]:
            self._tell(f"join {first['host']} {first['port']} {first['token']}")

    def hush(self) -> None:
        """This rank says its last line itself; does not return where its watch process has said one already."""
        self._ended = True
        self._tell("hush")
        while select.select([self._process.stdout], [], [], 5)[0]:
            if self._process.stdout.readline() in (b"ok\n", b""):
                break

    def close(self) -> None:
        self._ended = True
        self._tell("bye")

    def _tell(self, line: str) -> None:
        with suppress(OSError):  # it has ended, which the thread says
            self._process.stdin.write(f"{line}\n".encode())


class NoWatchdog:
    """For a single process, which waits for nobody."""

    name = ""

    def limit(self, seconds, message=""):
        pass

    def close(self):
        pass
