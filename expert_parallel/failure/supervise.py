"""A run that is watched from outside: where a rank dies or is silent, all are ended and started anew from the journal.

What notices what, and when: a rank that dies ends the others within a second (ranks/watch.py), which is seen here
within POLL; one that is stopped, or waits without end, is ended by its own watch process after `silent` seconds. Should
that fail too, everything is ended here after `2 * silent + 10` seconds without a sign: no output, no new token.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..ranks.launch import ROOT, rank_commands
from .journal import Past, read_past

POLL = 0.05  # seconds between two looks at the processes
GRACE = 1.0  # seconds for the others to say their last lines when one has ended with an error
ALONE = 600.0  # seconds at least without a sign when the answer is there: rank 0 may compare and draw
ANSWERS = 10.0  # seconds for a host to answer
PORT = 32323  # of the ring over hosts; each start takes others
WRONG_INPUT, LOST, STOPPED = 2, 3, 130  # exit statuses


@dataclass(frozen=True)
class Plan:
    """What is to be started.

    options   of qwen3_expert_parallel.py, without --journal, --resume and --timeout
    hosts     addresses, this machine's first; (): all ranks are here
    restarts  at most
    silent    seconds until a rank that waits or stands still is ended
    fewer     each restart is on one rank fewer
    """

    options: list[str]
    journal: Path
    ranks: int
    backend: str = "ring"
    hosts: tuple[str, ...] = ()
    restarts: int = 10
    silent: float = 30.0
    fewer: bool = False

    def command(self) -> list[str]:
        """Of a rank. What is in the journal goes on; where nothing is, it begins."""
        begun = self.journal.is_file() and self.journal.stat().st_size
        line = [sys.executable, str(ROOT / "qwen3_expert_parallel.py"), *self.options]
        line += ["--timeout", f"{self.silent:g}", "--resume" if begun else "--journal", str(self.journal)]
        return line if self.ranks > 1 or "--devices" in self.options else [*line, "--devices", "1"]

    def commands(self, attempt: int, folder: Path) -> list[tuple[list[str], dict]]:
        """(command, environment) of each process to start here."""
        if self.ranks == 1:
            return [(self.command(), {**os.environ, "PYTHONPATH": str(ROOT)})]
        if not self.hosts:
            return rank_commands(self.backend, self.ranks, self.command(), folder)
        return over_hosts(self.hosts, self.command(), folder, PORT + 64 * (attempt % 256))


def over_hosts(hosts, command: list[str], folder: Path, port: int) -> list[tuple[list[str], dict]]:
    """A ring: rank 0 here, the others by ssh, each with a copy of the host file."""
    text = json.dumps([[f"{host}:{port + rank}"] for rank, host in enumerate(hosts)])
    (folder / "hosts.json").write_text(text)
    here = {**os.environ, "PYTHONPATH": str(ROOT), "MLX_RANK": "0", "MLX_HOSTFILE": str(folder / "hosts.json")}
    found = [(command, here)]
    for rank, host in enumerate(hosts[1:], start=1):
        line = f"cd {shlex.quote(str(Path.cwd()))} 2>/dev/null || cd {shlex.quote(str(ROOT))}; hosts=$(mktemp)"
        line += f" && printf %s {shlex.quote(text)} > $hosts && export MLX_RANK={rank} MLX_HOSTFILE=$hosts"
        line += f" PYTHONPATH={shlex.quote(str(ROOT))}; {shlex.join(command)}; status=$?; rm -f $hosts; exit $status"
        found.append((["ssh", "-o", "BatchMode=yes", host, line], dict(os.environ)))
    return found


def answering(hosts) -> tuple[str, ...]:
    """This machine, and those of the others that answer `ssh HOST true` in time."""
    asked = [
        subprocess.Popen(["ssh", "-o", "BatchMode=yes", host, "true"], stdin=-3, stdout=-3, stderr=-3)
        for host in hosts[1:]
    ]
    end, good = time.monotonic() + ANSWERS, [hosts[0]]
    for host, process in zip(hosts[1:], asked, strict=True):
        try:
            if process.wait(timeout=max(0.1, end - time.monotonic())) == 0:
                good.append(host)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return tuple(good)


def supervise(plan: Plan, say: Callable[[str], None], out) -> int:
    """Start, watch and restart until the answer is complete: the exit status of the last start.

    say  takes lines on what happens;  out  a binary file, for the whole report, once
    """
    for attempt in range(plan.restarts + 1):
        with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "out", "w+b") as report:  # noqa: PTH123
            status, what = Attempt(plan, attempt, Path(folder), report).run()
            if status in (0, WRONG_INPUT, STOPPED):
                report.seek(0)
                for data in iter(lambda file=report: file.read(1 << 16), b"") if status == 0 else ():
                    out.write(data)
                out.flush()
                if status == 0 and attempt:
                    say(f"complete after {attempt} restart{'s' * (attempt > 1)}")
                return status
        what += f" after {len(past_of(plan.journal).tokens)} tokens"
        if attempt < plan.restarts:
            plan = _next(plan)
            where = f"{plan.ranks} ranks" if plan.ranks > 1 else "one process"
            say(f"{what}: restart {attempt + 1} of at most {plan.restarts}, on {where}")
    say(f"{what}: given up after {plan.restarts} restarts; the same command goes on from {plan.journal}")
    return status


def _next(plan: Plan) -> Plan:
    """Where to go on: a host that does not answer is left out, and with `fewer` one rank more."""
    hosts = answering(plan.hosts) if plan.hosts else ()
    ranks = len(hosts) if hosts else plan.ranks
    if plan.fewer and ranks == plan.ranks:
        ranks = max(1, ranks - 1)
    return replace(plan, hosts=hosts[:ranks], ranks=ranks)


def past_of(journal: Path) -> Past:
    """What the journal holds now; nothing where it is not there, or none."""
    with contextlib.suppress(OSError, ValueError):
        return read_past(journal.read_bytes())
    return Past()


class Attempt:
    """One start of all ranks, to its end; no process of it is left then."""

    def __init__(self, plan: Plan, number: int, folder: Path, report):
        self.plan, self.number, self.folder, self.report = plan, number, folder, report
        self.processes: list[subprocess.Popen] = []

    def run(self) -> tuple[int, str]:
        """(exit status, what ended it). What ranks say on standard error is passed on as it comes."""
        heard, told = os.pipe()
        os.set_blocking(heard, False)
        try:
            for command, environment in self.plan.commands(self.number, self.folder):
                pipes = {"stdin": subprocess.DEVNULL, "stdout": self.report, "stderr": told}
                # A session of its own each: all of it can be ended, and Control-C comes here alone.
                self.processes.append(subprocess.Popen(command, env=environment, start_new_session=True, **pipes))
            return self._watch(heard)
        finally:
            end_sessions([process.pid for process in self.processes])
            for process in self.processes:
                process.wait()
            _pass_on(heard)
            os.close(heard)
            os.close(told)

    def _watch(self, heard: int) -> tuple[int, str]:
        sign, last, failed, limit = time.monotonic(), None, None, 2 * self.plan.silent + 10
        while True:
            statuses = [process.poll() for process in self.processes]
            bad = [status for status in statuses if status]
            if None not in statuses or bad and failed and time.monotonic() - failed > GRACE:
                return _verdict(statuses)
            failed = failed or (time.monotonic() if bad else None)
            seen = (_pass_on(heard), os.fstat(self.report.fileno()).st_size, _size(self.plan.journal))
            if seen != last:
                sign, last = time.monotonic(), (0, *seen[1:])
            elif time.monotonic() - sign > limit:
                if past_of(self.plan.journal).end is None or limit >= ALONE:
                    return LOST, f"no sign of life for {limit:g} s"
                limit = max(ALONE, 10 * self.plan.silent)
            time.sleep(POLL)


def _verdict(statuses: list[int | None]) -> tuple[int, str]:
    """(exit status, words): wrong input counts before all else, for it is not mended by a restart."""
    bad = [(rank, status) for rank, status in enumerate(statuses) if status]
    if not bad:
        return 0, "complete"
    for wanted in (WRONG_INPUT, STOPPED):
        if wanted in statuses:
            return wanted, ""
    rank, status = next(((rank, status) for rank, status in bad if status != LOST), bad[0])  # who was first lost
    who = f"rank {rank}" if len(statuses) > 1 else "the run"
    if status < 0:
        return LOST, f"{who} was ended by {signal.Signals(-status).name}"
    return status, f"{who} ended with status {status}"


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _pass_on(pipe: int) -> int:
    """What waits in the pipe goes to standard error; its length."""
    count = 0
    with contextlib.suppress(BlockingIOError):
        while data := os.read(pipe, 1 << 16):
            count += len(data)
            with contextlib.suppress(OSError):
                os.write(2, data)
    return count


def end_sessions(leaders: list[int]) -> None:
    """SIGKILL for every process of these sessions, until none is left: mpirun's children have groups of their own."""
    for _ in range(100):
        listed = subprocess.run(["ps", "-A", "-o", "pid=,state="], capture_output=True, text=True).stdout
        alive = [int(pid) for pid, state in map(str.split, listed.splitlines()) if not state.startswith("Z")]
        mine = []
        for pid in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getsid(pid) in leaders:
                    mine.append(pid)
                    os.kill(pid, signal.SIGKILL)
        if not mine:
            return
        time.sleep(0.02)
