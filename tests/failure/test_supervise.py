"""The supervisor: what it notices, when, what it starts anew and what not; that nothing of it is left."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, SHIPPED, of_a_user

from expert_parallel.failure import standby
from expert_parallel.failure import supervise as module
from expert_parallel.failure.journal import Journal, read_past
from expert_parallel.failure.supervise import LOST, Plan, Start, answering, end_sessions, over_hosts, supervise

SCRIPT = ROOT / "tools" / "supervise.py"
EMPTY = Path("/nowhere/run.jsonl")


@dataclass(frozen=True)
class Scripted(Plan):
    """Each start is what bash makes of the next of these lines, for all ranks; it keeps to the last."""

    lines: tuple[tuple[str, ...], ...] = ()

    def commands(self, attempt, folder, waiting=False):
        lines = self.lines[min(attempt, len(self.lines) - 1)]
        wait = f"while [ ! -e {folder}/go ]; do sleep 0.02; done; " if waiting else ""
        return [(["bash", "-c", wait + line], dict(os.environ)) for line in lines]


def scripted(*lines, journal=EMPTY, ranks=1, **how):
    lines = tuple(line if isinstance(line, tuple) else (line,) for line in lines)
    return Scripted([], Path(journal), ranks, lines=lines, **how)


def carried_out(plan):
    """(exit status, what was said, standard output, seconds)."""
    said, out, began = [], io.BytesIO(), time.monotonic()
    status = supervise(plan, said.append, out)
    return status, said, out.getvalue().decode(), time.monotonic() - began


def children_of(parent):
    """Those with sessions of their own, which the supervisor's `ps` has not."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
    pids = [int(pid) for pid, its in map(str.split, listed.splitlines()) if int(its) == parent]
    return [pid for pid in pids if alive(pid)]


def alive(session):
    return module._members([session])


# --- what is noticed ------------------------------------------------------------------------------------------


def test_one_that_is_killed_is_started_anew_and_the_answer_comes_once():
    status, said, out, seconds = carried_out(scripted("echo half; kill -9 $$", "echo whole"))
    assert (status, out) == (0, "whole\n") and seconds < 2
    assert said == ["the run was ended by SIGKILL after 0 tokens: restart 1 of at most 10, on one process",
                    "complete after 1 restart"]  # fmt: skip


def test_it_is_given_up_after_so_many_restarts(capfd):
    status, said, out, _ = carried_out(scripted("echo no >&2; exit 3", restarts=2))
    assert (status, out) == (3, "") and len(said) == 3
    assert said[-1].startswith(
        "the run ended with status 3 after 0 tokens: given up after 2 restarts; the same command"
    )
    assert capfd.readouterr().err == "no\n" * 3


@pytest.mark.parametrize("lines", [("exit 2",), ("exit 3", "exit 2"), ("exit 130", "exit 3")])
def test_wrong_input_and_control_c_are_not_tried_again(lines):
    status, said, _, _ = carried_out(scripted(lines, "echo never", ranks=len(lines)))
    assert (status, said) == (130 if "exit 130" in lines else 2, [])


def test_what_a_rank_calls_wrong_when_another_was_killed_is_no_wrong_input():
    """A ring whose peer is gone hands out whatever was in memory, which may look like a wrong file."""
    status, said, out, _ = carried_out(scripted(("kill -9 $$", "exit 2"), ("echo a", "true"), ranks=2))
    assert (status, out) == (0, "a\n") and said[0].startswith("rank 0 was ended by SIGKILL")


def test_the_others_are_ended_when_one_was_lost(monkeypatch):
    monkeypatch.setattr(module, "GRACE", 0.3)
    status, said, _, seconds = carried_out(scripted(("sleep 60", "exit 3"), ("true", "true"), ranks=2))
    assert status == 0 and seconds < 5
    assert said[0] == "rank 1 ended with status 3 after 0 tokens: restart 1 of at most 10, on 2 ranks"


def test_one_without_a_sign_is_ended_in_the_stated_time(monkeypatch):
    """Not one that says something, or writes its journal."""
    monkeypatch.setattr(module, "MARGIN", -0.8)
    status, said, _, seconds = carried_out(scripted("sleep 60", "true", silent=1))  # after 1.2 s
    assert status == 0 and 1.2 <= seconds < 4 and said[0].startswith("no sign of life for")
    monkeypatch.setattr(module, "MARGIN", -1)
    status, said, _, seconds = carried_out(scripted("kill -STOP $$", "true", silent=1))
    assert status == 0 and 1 <= seconds < 4 and said[0].startswith("no sign of life for")
    assert carried_out(scripted("for n in 1 2 3 4; do echo $n; sleep 0.4; done", silent=1))[:2] == (0, [])


def test_when_the_answer_is_there_only_one_that_is_stopped_is_ended(tmp_path, monkeypatch):
    """Rank 0 compares and draws in silence; a stop in that phase whose watch was killed too hung for ten minutes."""
    monkeypatch.setattr(module, "MARGIN", -10)
    monkeypatch.setattr(module, "LOOK", 0.1)
    journal = Journal(tmp_path / "run.jsonl", resume=False)
    journal.begin({})
    journal.end("length")
    journal.close()
    assert carried_out(scripted("sleep 2", journal=journal.path, silent=1))[:2] == (0, [])
    status, said, _, _ = carried_out(scripted("kill -STOP $$", "true", journal=journal.path, silent=1))
    assert status == 0 and said[0].startswith("no sign of life for")


def test_nothing_is_left_of_a_start_that_was_ended():
    """mpirun gives its children groups of their own."""
    start = Start(scripted("set -m; sleep 61 & sleep 62 & kill -9 $$"), 0)
    session = start.processes[0].pid
    assert start.run() == (LOST, "the run was ended by SIGKILL")
    assert len(alive(session)) == 2
    start.close()
    assert alive(session) == []


def test_sessions_of_others_are_left_alone():
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as other:
        end_sessions([2**22 + 1])
        assert other.poll() is None
        end_sessions([other.pid])
        assert other.wait(timeout=5) == -signal.SIGKILL


# --- what is started next -------------------------------------------------------------------------------------


def test_fewer_ranks_after_each_loss():
    status, said, _, _ = carried_out(scripted("exit 3", ranks=3, restarts=3, fewer=True))
    assert status == 3 and [line.rpartition("on ")[2] for line in said[:3]] == ["2 ranks", "one process", "one process"]


def test_the_command_goes_on_where_the_journal_has_something(tmp_path):
    plan = Plan(["--max-tokens", "3"], tmp_path / "run.jsonl", 2, silent=7)
    assert plan.command()[2:] == ["--max-tokens", "3", "--timeout", "7", "--journal", str(plan.journal)]
    plan.journal.write_bytes(b"")
    assert "--journal" in plan.command()
    plan.journal.write_bytes(b"{")
    assert plan.command()[-2:] == ["--resume", str(plan.journal)]
    one = lambda *options: Plan([*options], EMPTY, 1).command()[-2:]  # noqa: E731
    assert one() == ["--devices", "1"]
    assert one("--redundant-experts", "8") == one("--devices", "2") == ["--journal", str(EMPTY)]
    assert Plan([], EMPTY, 1).commands(0, tmp_path)[0][1]["MLX_MPI_LIBNAME"] == "none"


def test_a_spare_waits_from_the_first_token_on_and_goes_on_at_once(tmp_path):
    """It is not started before, nor left behind when it was not needed."""
    path = tmp_path / "run.jsonl"
    code = "from expert_parallel.failure.journal import Journal as J; import sys; j = J(sys.argv[1], False);"
    token = f"{sys.executable} -c '{code} j.begin({{}}); j.add(5)' {path}"
    note = f"echo $$ >> {tmp_path}/pids; "
    plan = scripted(
        f"{note}PYTHONPATH={ROOT} {token}; sleep 1; exit 3", f"{note}echo whole", journal=path, standby=True
    )
    status, said, out, _ = carried_out(plan)
    assert (status, out) == (0, "whole\n") and "after 1 tokens: restart 1" in said[0]
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2 and not any(map(alive, pids))
    start = Start(scripted("sleep 0.5", "echo never", journal=path, standby=True), 0)
    assert start.run()[0] == 0
    waiting = start.spare.processes[0].pid
    assert alive(waiting)
    spare = start.close()
    spare.close()
    assert not alive(waiting)


@pytest.mark.parametrize("there", [True, False])
def test_who_waits_or_starts_late_ends_in_one_line_without_its_supervisor(there, tmp_path):
    """Its pipe has no writer, or is gone with the folder that it was in."""
    pipe = tmp_path / "supervisor"
    if there:
        os.mkfifo(pipe)
    for line in ([ROOT / "expert_parallel" / "failure" / "standby.py", tmp_path], [ROOT / "qwen3_expert_parallel.py"]):
        how = of_a_user(PYTHONPATH=str(ROOT), EXPERT_PARALLEL_SUPERVISOR=str(pipe))
        done = subprocess.run([sys.executable, *line], env=how, timeout=60, capture_output=True)
        assert (done.returncode, done.stderr) == (3, b"error: the supervisor of this run was ended\n")


def test_a_rank_that_stands_by_begins_when_it_is_wanted(tmp_path, monkeypatch):
    begun = []
    script = SimpleNamespace(main=lambda: begun.append(sys.argv))
    monkeypatch.setattr(standby, "import_module", lambda name: script)
    monkeypatch.setattr(standby, "end_with_supervisor", lambda: None)
    monkeypatch.setattr(sys, "argv", ["standby.py", str(tmp_path), "--seed", "5"])
    rank = threading.Thread(target=standby.main)
    rank.start()
    rank.join(0.3)
    assert rank.is_alive() and not begun
    (tmp_path / "go").touch()
    rank.join(10)
    assert begun == [["qwen3_expert_parallel.py", "--seed", "5"]]


@pytest.mark.parametrize(
    ("ranks", "more"), [(1, ("--standby",)), pytest.param(2, (), marks=pytest.mark.slow), (2, ("--backend", "mpi"))]
)
def test_ranks_end_when_their_supervisor_is_killed(ranks, more, tmp_path):
    """So do the spare that waits, mpirun, and the watch processes; what is in the journal is whole."""
    if "mpi" in more and not shutil.which("mpirun"):
        pytest.skip("no mpirun on this machine: install Open MPI to run the MPI tests")
    path = tmp_path / "run.jsonl"
    line = ["--ranks", ranks, "--journal", path, *more, "--", "--model", SHIPPED, "--max-tokens", 20000, "--quiet"]
    with subprocess.Popen([sys.executable, SCRIPT, *map(str, line)], cwd=ROOT, env=of_a_user(), stdin=-3, stdout=-3,
                          stderr=-3) as supervisor:  # fmt: skip
        end = time.monotonic() + 90
        sessions, number = [], 1 if "mpi" in more else 2
        while not path.exists() or path.read_bytes().count(b"\n") < 5 or len(sessions) < number:
            sessions = children_of(supervisor.pid)
            assert time.monotonic() < end and supervisor.poll() is None
            time.sleep(0.02)
        assert len(sessions) == number and all(map(alive, sessions))
        supervisor.kill()
    end = time.monotonic() + 10
    while any(map(alive, sessions)) and time.monotonic() < end:
        time.sleep(0.05)
    left = [member for session in sessions for member in alive(session)]
    for session in sessions:
        end_sessions([session])
    assert not left and len(read_past(path.read_bytes()).tokens) >= 4


# --- over hosts -----------------------------------------------------------------------------------------------

SSH = """#!/bin/bash
# As ssh does: HOST COMMAND after the options, in a shell of its own; a host with a file "dead-HOST" is gone.
while [ "${1:0:1}" = - ]; do shift 2; done
host=$1; shift
[ -e "$0-slow-$host" ] && sleep 60
[ -e "$0-dead-$host" ] && exit 255
echo "$$ $host $*" >> "$0-log"
env -u MLX_RANK -u MLX_HOSTFILE bash -c "$*"
"""


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """A stand-in for ssh, first on PATH."""
    path = tmp_path / "bin" / "ssh"
    path.parent.mkdir()
    path.write_text(SSH)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    return path


def test_hosts_that_do_not_answer_are_left_out(ssh, monkeypatch):
    monkeypatch.setattr(module, "ANSWERS", 1.0)
    Path(f"{ssh}-dead-c").touch()
    Path(f"{ssh}-slow-d").touch()
    began = time.monotonic()
    assert answering(("a", "b", "c", "d", "e")) == ("a", "b", "e")  # a is this machine
    assert time.monotonic() - began < 5


def test_a_remote_rank_gets_the_hostfile_and_its_number(ssh, tmp_path):
    commands = over_hosts(
        ("10.0.0.1", "it's"), ["bash", "-c", "cat $MLX_HOSTFILE; echo $MLX_RANK; exit 7"], tmp_path, 99
    )
    for rank, (command, environment) in enumerate(commands):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        hosts, number = done.stdout.rsplit("]", 1)
        assert json.loads(hosts + "]") == [["10.0.0.1:99"], ["it's:100"]] and int(number) == rank
        assert done.returncode == 7
    assert commands[0][0][0] == "bash" and commands[1][0][:4] == ["ssh", "-o", "BatchMode=yes", "it's"]


def test_a_run_over_hosts_goes_on_without_the_one_that_was_lost(ssh, tmp_path):
    """The whole of it, with real ranks: one is killed while it answers and its host is gone; the other ends alone."""
    path, tokens = tmp_path / "run.jsonl", 300
    line = ["--hosts", "127.0.0.1,127.0.0.2", "--silent", "60", "--journal", path, "--", "--model", SHIPPED]
    line += ["--max-tokens", tokens, "--no-verify", "--trials", 0, "--quiet"]
    process = subprocess.Popen([sys.executable, SCRIPT, *map(str, line)], cwd=ROOT, env=of_a_user(), stdin=-3,
                               stdout=-1, stderr=-1, text=True)  # fmt: skip
    end = time.monotonic() + 90
    while not path.exists() or path.read_bytes().count(b"\n") < 5:
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.02)
    Path(f"{ssh}-dead-127.0.0.2").touch()
    session = int(Path(f"{ssh}-log").read_text().split()[0])
    os.killpg(session, signal.SIGKILL)
    out, said = process.communicate(timeout=90)
    assert process.returncode == 0, said
    assert "rank 1 was ended by SIGKILL" in said and "on one process" in said and "complete after 1 restart" in said
    past = read_past(path.read_bytes())
    assert len(past.tokens) == tokens and past.end == "length"
    alone = subprocess.run([sys.executable, "qwen3_expert_parallel.py", *map(str, line[7:])], cwd=ROOT,
                           env=of_a_user(), capture_output=True, text=True)  # fmt: skip
    assert alone.stdout == out and out.strip()


# --- the script -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("--hosts", "a,b", "--backend", "mpi"), "--hosts is one rank on each of 2 machines, over the ring"),
        (("--hosts", "a,b", "--ranks", "3"), "--hosts is one rank on each of 2 machines"),
        (("--hosts", "a,b", "--standby"), "--standby is for ranks on one machine"),
        (("--ranks", "0"), "--ranks must be between 1 and 1024, got 0"),
        (("--silent", "0.5"), "--silent must be between 1 and"),
        (("--restarts", "-1"), "--restarts must be between 0 and"),
        (("--", "--resume", "x"), "--resume behind --: --journal and --silent before it say that"),
        (("--", "--timeout=5"), "--timeout=5 behind --"),
        (("--", "--prompt", "-"), "--prompt -: standard input cannot be read again"),
    ],
)
def test_what_cannot_be_supervised_is_refused(line, words):
    done = subprocess.run([sys.executable, SCRIPT, "--journal", "/nowhere/x", *line], cwd=ROOT, capture_output=True,
                          text=True, env=of_a_user())  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith(f"error: {words}") and done.stderr.count("\n") == 1


def test_wrong_input_of_a_rank_is_the_supervisors(tmp_path):
    line = ["--ranks", "1", "--journal", tmp_path / "run.jsonl", "--", "--temp", "-1"]
    done = subprocess.run([sys.executable, SCRIPT, *map(str, line)], cwd=ROOT, capture_output=True, text=True,
                          env=of_a_user())  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: --temp must be between 0")


def test_control_c_ends_it_and_all_ranks(tmp_path):
    default = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731, which background jobs ignore
    line = ["--ranks", "2", "--journal", tmp_path / "run.jsonl", "--", "--model", SHIPPED, "--quiet"]
    pipes = {"stdin": -3, "stdout": -1, "stderr": -1, "text": True, "preexec_fn": default}
    process = subprocess.Popen([sys.executable, SCRIPT, *map(str, line)], cwd=ROOT, env=of_a_user(), **pipes)
    end, ranks = time.monotonic() + 30, []
    while len(ranks) < 2 and time.monotonic() < end:
        ranks = children_of(process.pid)
        time.sleep(0.05)
    assert len(ranks) == 2
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in said
    assert said.splitlines()[-1] == f"stopped; the same command goes on from {tmp_path / 'run.jsonl'}"
    assert not any(map(alive, ranks))
