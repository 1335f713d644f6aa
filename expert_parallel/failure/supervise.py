"""A run that is watched from outside: where a rank dies or is silent, all are ended and started anew from the journal.

What notices what, and when: a rank that dies ends the others within a second (ranks/watch.py), which is seen here
within POLL; one that is stopped, or waits without end, is ended by its own watch process after `silent` seconds, and
one that is stopped from here, too. Should that fail, everything is ended after `2 * silent + MARGIN` seconds without a
sign: no output, no new token; ALONE when the answer is there. Where the supervisor itself is gone ranks end by
themselves (ranks/launch.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..ranks.launch import ROOT, SUPERVISOR, rank_commands
from .journal import Past, read_past

POLL = 0.05  # seconds between two looks at the processes
LOOK = 1.0  # seconds between two looks for a stopped process, when nothing else is heard
GRACE = 1.0  # seconds for the others to say their last lines when one has ended with an error
MARGIN = 10.0  # seconds more than twice `silent` without a sign
ALONE = 600.0  # seconds at least without a sign when the answer is there: rank 0 may compare and draw
ANSWERS = 10.0  # seconds for a host to answer
PORT = 32323  # of the ring over hosts; each start takes others
STANDBY = Path(__file__).with_name("standby.py")
WRONG_INPUT, LOST, STOPPED = 2, 3, 130  # exit statuses


@dataclass(frozen=True)
class Plan:
    """What is to be started.

    options   of qwen3_expert_parallel.py, without --journal, --resume and --timeout
    hosts     addresses, this machine's first; (): all ranks are here
    restarts  at most
    silent    seconds until a rank that waits or stands still is ended
    fewer     each restart is on one rank fewer
    standby   the ranks of the next start wait beside those at work, with all imported; not with hosts
    """

    options: list[str]
    journal: Path
    ranks: int
    backend: str = "ring"
    hosts: tuple[str, ...] = ()
    restarts: int = 10
    silent: float = 30.0
    fewer: bool = False
    standby: bool = False

    def command(self, folder: Path | None = None) -> list[str]:
        """Of a rank. What is in the journal goes on; where nothing is, it begins.

        folder  where it waits for a file "go"; None: it starts at once
        """
        begun = self.journal.is_file() and self.journal.stat().st_size
        line = [sys.executable, str(ROOT / "qwen3_expert_parallel.py")]
        line = [sys.executable, str(STANDBY), str(folder)] if folder else line
        kept = "--resume" if begun else "--journal"
        line += [*self.options, "--timeout", f"{self.silent:g}", kept, str(self.journal)]
        alone = self.ranks == 1 and not {"--devices", "--redundant-experts"} & {*self.options}  # copies want several
        return [*line, "--devices", "1"] if alone else line

    def commands(self, attempt: int, folder: Path, waiting: bool = False) -> list[tuple[list[str], dict]]:
        """(command, environment) of each process to start here."""
        command = self.command(folder if waiting else None)
        if self.ranks == 1:  # MPI in a process by itself starts a daemon, in a session of its own
            return [(command, {**os.environ, "PYTHONPATH": str(ROOT), "MLX_MPI_LIBNAME": "none"})]
        if not self.hosts:  # a rank that starts beside others must not be bound to a core of theirs
            free = {"OMPI_MCA_hwloc_base_binding_policy": "none"}
            return [(line, env | free) for line, env in rank_commands(self.backend, self.ranks, command, folder)]
        return over_hosts(self.hosts, command, folder, PORT + 64 * (attempt % 256))

    def next(self) -> Plan:
        """Where to go on: a host that does not answer is left out, and with `fewer` one rank more."""
        hosts = answering(self.hosts) if self.hosts else ()
        ranks = len(hosts) or self.ranks
        if self.fewer and ranks == self.ranks:
            ranks = max(1, ranks - 1)
        return replace(self, hosts=hosts[:ranks], ranks=ranks)


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
    spare = None
    try:
        for restart in range(plan.restarts + 1):
            start, spare = spare or Start(plan, restart), None
            try:
                status, what = start.run()
                if status == 0:
                    start.report(out)
            finally:
                spare = start.close()
            if status in (0, WRONG_INPUT, STOPPED):
                if status == 0 and restart:
                    say(f"complete after {restart} restart{'s' * (restart > 1)}")
                return status
            what += f" after {len(past_of(plan.journal).tokens)} tokens"
            if restart < plan.restarts:
                plan = spare.plan if spare else plan.next()
                where = f"{plan.ranks} ranks" if plan.ranks > 1 else "one process"
                say(f"{what}: restart {restart + 1} of at most {plan.restarts}, on {where}")
        say(f"{what}: given up after {plan.restarts} restarts; the same command goes on from {plan.journal}")
        return status
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the same command goes on from {plan.journal}") from None
    finally:
        if spare:
            spare.close()


def past_of(journal: Path) -> Past:
    """What the journal holds now; nothing where it is not there, or none."""
    with contextlib.suppress(OSError, ValueError):
        return read_past(journal.read_bytes())
    return Past()


class Start:
    """One start of all ranks, until `close`, after which no process of it is left.

    number   of the start
    waiting  until `run`, which they then do at once
    """

    def __init__(self, plan: Plan, number: int, waiting: bool = False):
        self.plan, self.number, self.spare = plan, number, None
        self.processes: list[subprocess.Popen] = []
        self._folder = tempfile.TemporaryDirectory()
        self._out = open(Path(self._folder.name) / "out", "w+b")  # noqa: PTH123, SIM115, closed by close()
        self._heard, told = os.pipe()
        os.set_blocking(self._heard, False)
        pipes = {"stdin": subprocess.DEVNULL, "stdout": self._out, "stderr": told}
        os.mkfifo(here := os.path.join(self._folder.name, "supervisor"))  # noqa: PTH118
        self._here = os.open(here, os.O_RDWR)  # until this process ends, however it does
        try:
            for command, environment in plan.commands(number, Path(self._folder.name), waiting):
                # A session of its own each: all of it can be ended, and Control-C comes here alone.
                pipes |= {"env": environment | {SUPERVISOR: here}, "start_new_session": True}
                self.processes.append(subprocess.Popen(command, **pipes))
        except BaseException:
            self.close()
            raise
        finally:
            os.close(told)

    def run(self) -> tuple[int, str]:
        """(exit status, what ended it). What ranks say on standard error is passed on as it comes."""
        Path(self._folder.name, "go").touch()
        sign, last, failed, look = time.monotonic(), None, None, self.plan.silent
        while True:
            statuses = [process.poll() for process in self.processes]
            bad = [status for status in statuses if status]
            if None not in statuses or bad and failed and time.monotonic() - failed > GRACE:
                return _verdict(statuses)
            failed = failed or (time.monotonic() if bad else None)
            seen = (_pass_on(self._heard), os.fstat(self._out.fileno()).st_size, _size(self.plan.journal))
            if seen != last:
                sign, last, look = time.monotonic(), (0, *seen[1:]), self.plan.silent
                self._have_a_spare()
            elif (quiet := time.monotonic() - sign) > look:
                ended, look = past_of(self.plan.journal).end is not None, quiet + LOOK
                if quiet > (ALONE if ended else 2 * self.plan.silent + MARGIN) or self._stopped():
                    return LOST, f"no sign of life for {quiet:.0f} s"
            time.sleep(POLL)

    def _stopped(self) -> bool:
        """Whether a process of the ranks was stopped by a signal, as when a laptop's lid or a debugger does it."""
        return any(state.startswith("T") for _, state in _members([process.pid for process in self.processes]))

    def _have_a_spare(self) -> None:
        """From the first token on, so that nothing disturbs the start: what is imported then is not for this run."""
        if self.plan.standby and not self.plan.hosts and not self.spare and past_of(self.plan.journal).tokens:
            self.spare = Start(self.plan.next(), self.number + 1, waiting=True)

    def report(self, out) -> None:
        """Standard output of all, into a binary file."""
        self._out.seek(0)
        shutil.copyfileobj(self._out, out)
        out.flush()

    def close(self) -> Start | None:
        """End what is left; the spare, where there is one that can go on."""
        end_sessions([process.pid for process in self.processes])
        for process in self.processes:
            process.wait()
        _pass_on(self._heard)
        os.close(self._heard)
        os.close(self._here)
        self._out.close()
        self._folder.cleanup()
        spare, self.spare = self.spare, None
        if spare and any(process.poll() is not None for process in spare.processes):
            spare = spare.close()
        return spare


def _verdict(statuses: list[int | None]) -> tuple[int, str]:
    """(exit status, words): wrong input is not mended by a restart, unless what was wrong came from a rank killed."""
    bad = [(rank, status) for rank, status in enumerate(statuses) if status]
    if not bad:
        return 0, "complete"
    for wanted in (WRONG_INPUT, STOPPED):
        if wanted in statuses and not any(status < 0 for _, status in bad):
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
        mine = _members(leaders)
        for pid, _ in mine:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not mine:
            return
        time.sleep(0.02)


def _members(leaders: list[int]) -> list[tuple[int, str]]:
    """(pid, state) of every process of these sessions that is not gone."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,state="], capture_output=True, text=True).stdout
    found = []
    for pid, state in map(str.split, listed.splitlines()):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if not state.startswith("Z") and os.getsid(int(pid)) in leaders:
                found.append((int(pid), state))
    return found
