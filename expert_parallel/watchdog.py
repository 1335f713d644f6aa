"""A watchdog: ends a rank that waits for peers which will never answer.

A collective whose peer is gone can block inside the library, where no Python signal handler or
thread runs. So a small process beside each rank holds the clock: the rank tells it through a
pipe how long the next step may take, and it ends the rank, with one line, when that time is over.
"""

from __future__ import annotations

import subprocess
import sys

_WATCH = r"""
import os, select, signal, sys
name, rank_pid = sys.argv[1], int(sys.argv[2])
limit, message = None, ""

def end(why):
    sys.stderr.write(f"{name}{why}\n")
    sys.stderr.flush()
    os.kill(rank_pid, signal.SIGKILL)
    os._exit(0)

signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, lambda *_: end("stopped by the launcher: another rank failed or the run was ended"))
while True:
    if not select.select([0], [], [], limit)[0]:
        end(message)
    data = os.read(0, 1 << 16)
    if not data:
        break
    seconds, _, message = data.decode().strip().splitlines()[-1].partition(" ")
    limit = float(seconds) or None
"""


class Watchdog:
    """limit(seconds, message) starts the clock anew; limit(None) stops it. close() when all is well."""

    def __init__(self, name: str = "error: "):
        import os

        command = [sys.executable, "-I", "-S", "-c", _WATCH, name, str(os.getpid())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE)

    def limit(self, seconds: float | None, message: str = "") -> None:
        if self._process.poll() is None:
            self._process.stdin.write(f"{seconds or 0} {message}\n".encode())
            self._process.stdin.flush()

    def close(self) -> None:
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()


class NoWatchdog:
    """For a single process, which waits for nobody."""

    def limit(self, seconds, message=""):
        pass

    def close(self):
        pass
