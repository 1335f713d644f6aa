"""The process beside a rank: what it hears, whom it believes, and what becomes of a rank whose watch is gone."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SHIPPED, launch_command
from test_rank_failures import BACKENDS, LONG, PATCHED, SCRIPT, errors_of, started

from expert_parallel.ranks.group import processes_started, read_hostfile

WATCH = ROOT / "expert_parallel" / "ranks" / "watch.py"


class Beside:
    """A stand-in for a rank, and the process that watches it."""

    def __init__(self, name="rank 7: error: ", host="127.0.0.1"):
        self.rank = subprocess.Popen(["sleep", "60"])
        command = [sys.executable, "-I", "-S", str(WATCH), name, str(self.rank.pid), host]
        self.process = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1)
        self.port = int(self.process.stdout.readline())

    def tell(self, *lines):
        self.process.stdin.write("".join(f"{line}\n" for line in lines).encode())
        self.process.stdin.flush()

    def close(self):
        self.rank.kill()
        self.rank.wait()
        out, err = self.process.communicate(timeout=10)
        return err.decode()


@pytest.fixture
def beside():
    made = Beside()
    yield made
    made.rank.kill()
    made.process.kill()


def connect(port, words=b""):
    connection = socket.create_connection(("127.0.0.1", port), timeout=5)
    connection.sendall(words)
    return connection


def test_the_time_limit_ends_a_rank_that_is_stopped_too(beside):
    """A stopped process takes no signal but SIGKILL: rank 0 under mpirun, stopped, hung the run without end."""
    os.kill(beside.rank.pid, signal.SIGSTOP)
    begin = time.monotonic()
    beside.tell("token abc", "limit 0.5 it took too long")
    assert beside.rank.wait(timeout=10) == -signal.SIGKILL
    assert 0.4 < time.monotonic() - begin < 6
    assert beside.close() == "\nrank 7: error: it took too long\n"


def test_a_limit_that_is_taken_back_ends_nothing(beside):
    beside.tell("token abc", "limit 0.3 too long", "limit 0 ")
    time.sleep(0.8)
    assert beside.rank.poll() is None
    beside.tell("bye")
    assert beside.process.wait(timeout=5) == 0


def test_a_peer_that_goes_without_goodbye_ends_the_rank_and_one_with_it_does_not(beside):
    beside.tell("token secret")
    polite, other = connect(beside.port, b"secret"), connect(beside.port, b"secret")
    time.sleep(0.3)
    polite.sendall(b"bye")
    polite.close()
    time.sleep(0.3)
    assert beside.rank.poll() is None
    other.close()
    assert beside.rank.wait(timeout=10) < 0
    assert "lost another rank" in beside.close()


def test_strangers_can_neither_end_a_rank_nor_hold_its_watch_up(beside):
    """Every user of the machine can connect; who does not say the token first is nobody."""
    beside.tell("token secret")
    silent = [connect(beside.port) for _ in range(20)]
    connect(beside.port, b"SECRET").close()
    connect(beside.port, b"secre").close()
    connect(beside.port, b"x" * 10_000).close()
    time.sleep(0.3)
    for stranger in silent[:10]:
        stranger.close()
    assert beside.rank.poll() is None
    begin = time.monotonic()
    beside.tell("limit 0.5 over")  # heard at once, though ten strangers still say nothing
    assert beside.rank.wait(timeout=10) < 0
    assert time.monotonic() - begin < 4


def test_the_watch_listens_where_it_is_told_and_its_secret_is_on_no_command_line(tmp_path):
    """It listened on every interface, with its token in the process list: any user could end a run."""
    with started("ring", 2, "-c", PATCHED, 1, "at_token(3, lambda: time.sleep(9))", *LONG, tmp_path=tmp_path):
        deadline = time.monotonic() + 60
        lines = []
        while time.monotonic() < deadline and len(lines) < 2:
            listed = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True).stdout
            lines = [line for line in listed.splitlines() if str(WATCH) in line]
            time.sleep(0.2)
        assert len(lines) >= 2
        assert all(re.fullmatch(r".*watch\.py rank \d: error:  \d+ 127\.0\.0\.1", line) for line in lines), lines


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["the watch is killed", "rank 0 is stopped"])
def test_no_rank_waits_for_ever(backend, what, tmp_path):
    note = tmp_path / "note"
    pid = "os.popen(f'pgrep -P {os.getpid()} -f watch.py').read().split()[0]"
    act = f"os.kill(int({pid}), 9)" if what == "the watch is killed" else "os.kill(os.getpid(), 19)"
    change = f"at_token(5, lambda: (open(r'{note}', 'w').close(), {act}))"
    with started(backend, 2, "-c", PATCHED, 0, change, *LONG, "--timeout", 4, tmp_path=tmp_path) as processes:
        while not note.exists():
            assert processes[0].poll() is None, processes[0].stderr.read()
            time.sleep(0.05)
        begin = time.monotonic()
        results = [(*process.communicate(timeout=40), process.returncode) for process in processes]
        assert time.monotonic() - begin < 25  # measured: 3 to 8 s, its start included; room for a busy machine
    assert all(status for *_, status in results)
    assert errors_of([(status, out, err.decode()) for out, err, status in results])


# --- a launch that falls apart into groups of one -----------------------------------------------------------

APART = {
    "MLX_RANK alone": {"MLX_RANK": "1"},
    "JACCL": {"MLX_RANK": "0", "MLX_IBV_DEVICES": "f.json", "MLX_JACCL_COORDINATOR": "127.0.0.1:5201"},
    "MPICH": {"PMI_SIZE": "2", "PMI_RANK": "1"},
    "Slurm, second task": {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
    "Slurm, first task": {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
    "NCCL": {"MLX_RANK": "1", "MLX_WORLD_SIZE": "2", "NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": "5300"},
}
TOGETHER = [{}, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}]


@pytest.mark.parametrize("environment", APART.values(), ids=APART)
def test_a_launch_that_falls_apart_is_noticed(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes_started()[0] == 2


@pytest.mark.parametrize("environment", TOGETHER, ids=str)
def test_one_process_is_one(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes_started()[0] == 1


def test_a_rank_without_others_stops_in_one_line():
    """Each would have run the whole model by itself, with status 0."""
    command = [sys.executable, SCRIPT, "--model", str(SHIPPED), "--quiet"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "MLX_RANK": "1"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(
        r"\s*rank 1: error: started as one of 2 processes \(MLX_RANK\), but MLX joined 1: .*\n", done.stderr
    )


def test_hostfiles_of_other_kinds_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_RANK", "1")
    for text in ("", '[{"ssh": "a", "ips": ["10.0.0.1"]}, {"ssh": "b", "ips": ["10.0.0.2"]}]', '[["127.0.0.1:1"]]'):
        (tmp_path / "hosts.json").write_text(text)
        monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts.json"))
        with pytest.raises(ValueError, match=r"MLX_HOSTFILE .*hosts\.json"):
            read_hostfile()
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"none\.json"):
        read_hostfile()
    assert launch_command("ring", 2, "x", tmp_path=tmp_path)
