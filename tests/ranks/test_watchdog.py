"""The process beside a rank: what it hears, whom it believes, and what becomes of a rank whose watch is gone."""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, launch_command
from test_rank_failures import BACKENDS, NEEDS_MPI, errors_of, started

WATCH = ROOT / "expert_parallel" / "ranks" / "watch.py"
TOKEN = b"0123456789abcdef"


class Beside:
    """A stand-in for a rank, and the process that watches it."""

    def __init__(self, name="rank 7: error: ", host="127.0.0.1", rank=("sleep", "60")):
        self.rank = subprocess.Popen(rank)
        command = [sys.executable, "-I", "-S", str(WATCH), name, str(self.rank.pid), host]
        self.process = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1)
        self.port = int(self.process.stdout.readline())
        self.tell(f"token {TOKEN.decode()}")

    def tell(self, *lines):
        self.process.stdin.write("".join(f"{line}\n" for line in lines).encode())
        self.process.stdin.flush()

    def ends(self, seconds=10):
        """(status of the rank, what was said, how long it took)."""
        begin = time.monotonic()
        status = self.rank.wait(timeout=seconds)
        took = time.monotonic() - begin
        return status, self.process.communicate(timeout=10)[1].decode(), took


@pytest.fixture
def beside():
    """Makes them, and ends them with the test."""
    made = []

    def make(**how):
        made.append(Beside(**how))
        return made[-1]

    yield make
    for one in made:
        for process in (one.rank, one.process):
            process.kill()
            process.wait()


def connect(port, words=b""):
    connection = socket.create_connection(("127.0.0.1", port), timeout=5)
    connection.sendall(words)
    return connection


def peer(port):
    connection = connect(port, TOKEN)
    assert connection.recv(2) == b"ok"
    return connection


# --- time limits and stops -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped", [False, True])
def test_the_time_limit_ends_a_rank_stopped_or_not(beside, stopped):
    one = beside()
    if stopped:
        os.kill(one.rank.pid, signal.SIGSTOP)
    one.tell("limit 0.5 it took too long")
    status, said, took = one.ends()
    assert (status, said) == (-signal.SIGQUIT, "\nrank 7: error: it took too long\n")
    assert 0.2 < took < 2


def test_a_rank_that_cannot_hear_is_ended_by_force(beside):
    one = beside(rank=["bash", "-c", "trap '' QUIT; sleep 60 & wait"], host="")
    assert one.port == 0  # nobody joins it: it does not listen
    time.sleep(0.3)
    one.tell("limit 0.1 over")
    assert one.ends()[0] == -signal.SIGKILL


def test_a_limit_that_is_taken_back_ends_nothing(beside):
    one = beside()
    one.tell("limit 0.3 too long", "limit 0 ")
    time.sleep(1.4)  # longer than between two looks at whether it is stopped
    assert one.rank.poll() is None


@pytest.mark.parametrize("goodbye", [False, True])
def test_a_rank_that_is_stopped_where_it_has_no_limit_is_ended_too(beside, goodbye):
    """Rank 0 under mpirun, stopped in its last moments, hung the run without end: its watch was gone by then."""
    one = beside()
    one.tell("limit 1 too long", "limit 0 ", *["bye"] * goodbye)
    os.kill(one.rank.pid, signal.SIGSTOP)
    status, said, took = one.ends()
    assert status and "stopped by a signal for 1 s" in said and took < 5


@pytest.mark.skipif(not shutil.which("ps"), reason="no ps on this machine")
@pytest.mark.parametrize("linux", [Path("/proc/self").exists(), False])
def test_a_stopped_process_is_told_from_others(monkeypatch, linux):
    spec = importlib.util.spec_from_file_location("watch", WATCH)
    watch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(watch)
    monkeypatch.setattr(watch.os.path, "isdir", lambda path: linux)
    process = subprocess.Popen(["sleep", "60"])
    assert not watch.is_stopped(process.pid)
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    assert watch.is_stopped(process.pid)
    process.kill()
    process.wait()
    assert not watch.is_stopped(process.pid)


# --- peers and strangers ---------------------------------------------------------------------------------------


def test_a_peer_that_goes_without_goodbye_ends_the_rank_and_one_with_it_does_not(beside):
    one = beside()
    polite, other = peer(one.port), peer(one.port)
    polite.sendall(b"bye")
    polite.close()
    time.sleep(0.3)
    assert one.rank.poll() is None
    other.close()
    status, said, _ = one.ends()
    assert status == -signal.SIGQUIT
    assert said == "\nrank 7: error: lost another rank: its process was ended or crashed\n"


def test_a_lost_rank_ends_those_that_joined_rank_0(beside):
    first, second, third = (beside(name=f"rank {r}: error: ") for r in range(3))
    for one in (second, third):
        one.tell(f"join 127.0.0.1 {first.port} {TOKEN.decode()}")
    time.sleep(0.5)
    assert first.rank.poll() is second.rank.poll() is None
    third.process.stdin.close()  # as the end of its process does
    for rank, one in enumerate((first, second)):
        status, said, _ = one.ends()
        assert status and said.startswith(f"\nrank {rank}: error: lost another rank"), (rank, said)


def test_ranks_that_said_goodbye_go_one_by_one(beside):
    first, second = beside(), beside()
    second.tell(f"join 127.0.0.1 {first.port} {TOKEN.decode()}", "bye")  # before it has joined
    time.sleep(0.5)
    second.process.stdin.close()
    assert second.process.wait(timeout=5) == 0
    time.sleep(0.3)
    assert first.rank.poll() is None and first.process.poll() is None
    first.tell("bye")
    first.process.stdin.close()
    assert first.process.wait(timeout=5) == 0


def test_strangers_can_neither_end_a_rank_nor_hold_its_watch_up(beside):
    """Every user of the machine can connect; who does not say the token first is nobody."""
    one = beside()
    strangers = [connect(one.port) for _ in range(100)]
    for words in (b"", TOKEN[:-1], TOKEN.upper(), b"bye", b"x" * 100_000):
        with contextlib.suppress(OSError):  # sent away in mid-word
            connect(one.port, words).close()
    friend = peer(one.port)  # is heard, though 32 say nothing
    if Path("/proc/self/fd").exists():
        assert len(list(Path(f"/proc/{one.process.pid}/fd").iterdir())) < 60
    for stranger in strangers[::2]:
        stranger.close()
    time.sleep(0.3)
    assert one.rank.poll() is None
    one.tell("limit 0.5 over")
    assert one.ends()[2] < 2
    friend.close()


def test_an_address_of_another_machine_is_left_to_mlx(beside):
    assert connect(beside(host="203.0.113.1").port)


# --- the last line -------------------------------------------------------------------------------------------


def test_a_rank_that_speaks_itself_is_not_spoken_for(beside):
    one = beside()
    one.tell("hush")
    assert one.process.stdout.readline() == b"ok\n"
    one.process.send_signal(signal.SIGTERM)  # from mpirun, as it ends all ranks
    status, said, _ = one.ends()
    assert (status, said) == (-signal.SIGQUIT, "")


def test_a_rank_that_speaks_itself_has_the_time_to(beside, tmp_path):
    """It heard of a lost rank as its watch did, was told to speak, and ended by that watch before it had."""
    code = "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.02)\ntime.sleep(0.5); sys.exit(7)"
    one = beside(rank=[sys.executable, "-I", "-S", "-c", code, tmp_path / "lost"])  # no shell: bash ignores SIGQUIT
    other = peer(one.port)
    one.tell("hush")
    assert one.process.stdout.readline() == b"ok\n"
    (tmp_path / "lost").touch()
    other.close()
    assert one.rank.wait(timeout=10) == 7


def test_nobody_has_to_read_the_line(beside):
    one = beside()
    one.process.stderr.close()
    one.tell("limit 0.1 over")
    assert one.rank.wait(timeout=10) == -signal.SIGQUIT


# --- real ranks ------------------------------------------------------------------------------------------------

AT_WORK = "tests/ranks/rank_at_work.py"
STOP = "os.kill(os.getpid(), 19)"


def at_work(backend, rank, change, tmp_path, monkeypatch, timeout=1, steps=3000):
    """Ends of two ranks, of which one carries out the change: (statuses, standard output, {rank: line}, seconds)."""
    monkeypatch.setenv("NOTE", str(note := tmp_path / "note"))
    with started(backend, 2, AT_WORK, timeout, steps, rank, change, tmp_path=tmp_path) as processes:
        while not note.exists():
            ended = None not in [process.poll() for process in processes]
            # All may have ended between the look at the note and that at them: on a busy machine that took long enough.
            assert not ended or note.exists(), [process.communicate() for process in processes]
            time.sleep(0.02)
        begin = time.monotonic()
        results = [(*process.communicate(timeout=40), process.returncode) for process in processes]
        took = time.monotonic() - begin
    out = "".join(out.decode() for out, _, _ in results)
    lines = errors_of([(status, "", err.decode()) for _, err, status in results])
    return [status for *_, status in results], out, lines, took


FAIL = "noted(); raise RuntimeError('[malloc] Unable to allocate 9 bytes.')"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [FAIL, "noted(); os.kill(os.getpid(), 9)"], ids=["fails", "killed"])
def test_a_rank_that_ends_in_the_middle_ends_the_others_soon(backend, change, tmp_path, monkeypatch):
    """One that failed said goodbye to the others' watchdogs, which then waited for all of --timeout."""
    statuses, _, lines, took = at_work(backend, 1, change, tmp_path, monkeypatch, timeout=60)
    assert took < 15
    assert "error: lost another rank" in lines[0] or "stopped by the launcher: another rank failed" in lines[0]
    if change == FAIL:
        assert lines[1].startswith("error: RuntimeError: [malloc] Unable to allocate 9 bytes. (")
    assert statuses == [3, 1 if change == FAIL else -9] if backend == "ring" else statuses[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_watch_is_killed_does_not_wait_for_ever(backend, rank, tmp_path, monkeypatch):
    statuses, _, lines, took = at_work(backend, rank, "noted(); os.kill(watch, 9)", tmp_path, monkeypatch, timeout=60)
    assert all(statuses) and took < 15
    assert lines[rank] == "error: its watch process was ended"
    assert re.match("error: (lost another rank|stopped by the launcher)", lines[1 - rank])


@pytest.mark.parametrize(("backend", "rank"), [("ring", 0), *(pytest.param("mpi", r, marks=NEEDS_MPI) for r in (0, 1))])
def test_a_rank_that_is_stopped_ends_the_run_within_its_time_limit(backend, rank, tmp_path, monkeypatch):
    statuses, _, lines, took = at_work(backend, rank, f"noted(); {STOP}", tmp_path, monkeypatch)
    assert all(statuses) and took < 6
    assert rank in lines


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_that_is_stopped_in_its_last_moments_does_too(backend, tmp_path, monkeypatch):
    """Its watch had gone; rank 1 waited in MPI_Finalize without end."""
    change = f"atexit.register(lambda: (noted(), {STOP}))"
    statuses, out, lines, took = at_work(backend, 0, change, tmp_path, monkeypatch, steps=10)
    assert statuses[0] and took < 9
    assert out == "done\n" * 2
    assert lines[0] == "error: its process was stopped by a signal for 1 s (--timeout)"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_watch_that_is_stopped_does_not_hold_the_run_up(backend, tmp_path, monkeypatch):
    change = "noted(); os.kill(watch, 19); [watchdog.limit(30, 'x' * 60) for _ in range(2000)]; os.kill(watch, 18)"
    statuses, out, _, _ = at_work(backend, 0, change, tmp_path, monkeypatch, timeout=10, steps=20)
    assert not any(statuses) and out.replace("\n", "") == "done" * 2  # mpirun may mix two ranks' lines


def test_where_the_ranks_have_not_met_the_interpreters_own_clock_is_left(tmp_path):
    """Where MLX waits for the others it holds the GIL: no Python thread notices that the watch is gone."""
    command, environment = launch_command("ring", 2, AT_WORK, 1, 1, 1, "", tmp_path=tmp_path)[0]
    rank = subprocess.Popen(command, cwd=ROOT, env={**environment, "MEETING": "1"})
    listed = []
    while not listed:
        listed = subprocess.run(["pgrep", "-P", str(rank.pid), "-f", "watch.py"], capture_output=True).stdout.split()
    os.kill(int(listed[0]), signal.SIGSTOP)
    assert rank.wait(timeout=30) == 1
    os.kill(int(listed[0]), signal.SIGKILL)


def test_the_watch_listens_where_it_is_told_and_its_secret_is_on_no_command_line(tmp_path, monkeypatch):
    """It listened on every interface, with its token in the process list: any user could end a run."""
    change = "print(os.popen('ps -ww -eo args').read()); noted()"
    _, out, _, _ = at_work("ring", 1, change, tmp_path, monkeypatch, timeout=30, steps=10)
    listed = re.findall(rf"{WATCH} rank (\d): error:  \d+ ?(.*)\n", out)
    assert {("0", "127.0.0.1"), ("1", "")} <= set(listed) and len(set(listed)) == 2


@pytest.mark.parametrize(("closed", "status"), [(True, 0), (False, 3)])
def test_a_watch_that_ends_after_the_run_ends_no_rank(closed, status):
    code = (
        "import os, signal, time\n"
        "from expert_parallel.ranks.watchdog import Watchdog\n"
        "watchdog = Watchdog()\n"
        "watchdog._port\n"  # it has begun
        f"watchdog.close() if {closed} else None\n"
        "os.kill(watchdog._process.pid, signal.SIGKILL)\n"
        "time.sleep(1)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == status and ("its watch process was ended" in ended.stderr) == (not closed)
