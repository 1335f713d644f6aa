"""How a server ends that cannot begin, or is ended: each process by itself, at once, with one line at most."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from types import SimpleNamespace

import mlx.core as mx
import pytest
from conftest import ROOT, launch, of_a_user
from test_mlx_lm_tools import in_float32, serving  # noqa: F401, a fixture

from expert_parallel.command import server_ends
from expert_parallel.ranks import watchdog


def lines_of_ours(text):
    """What a person has to read of it: no line of mlx-lm's log, no warning, nothing that is empty."""
    mlx_lm = re.compile(r"\d{4}-\d\d-\d\d .* - (INFO|WARNING) - |.*UserWarning|  warnings.warn|127.0.0.1 - -")
    return [line for line in text.splitlines() if line.strip() and not mlx_lm.match(line)]


@pytest.fixture
def taken():
    with socket.create_server(("127.0.0.1", 0)) as port:
        yield port.getsockname()[1]


def test_a_server_that_cannot_begin_ends_with_a_line(in_float32, taken, tmp_path):  # noqa: F811
    """mlx-lm loads in a thread: its server would go on without a model, and a thread would keep it without a port."""
    (tmp_path / "dense").mkdir()
    config = json.loads((in_float32 / "config.json").read_text())
    dense = {**config, "model_type": "qwen3"}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(dense))
    cases = {
        "does not exist": ("--model", tmp_path / "nothing"),
        "in use": ("--model", in_float32, "--port", taken),
        "": ("--model", tmp_path / "dense"),
    }
    command = [sys.executable, "-m", "expert_parallel", "server", "--port", "0"]
    started = {
        words: subprocess.Popen(
            [*command, *map(str, line)],
            cwd=ROOT, env=of_a_user(), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for words, line in cases.items()
    }  # fmt: skip
    for words, process in started.items():
        _, err = process.communicate(timeout=120)
        (line,) = lines_of_ours(err)
        assert process.returncode == 2 and line.startswith("error: ") and words in line


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ring", "mpi"])
def test_ranks_that_cannot_begin_end_together(backend, in_float32, taken, tmp_path):  # noqa: F811
    line = ("-m", "expert_parallel", "server", "--model", in_float32, "--port", taken)
    results = launch(backend, 2, *line, tmp_path=tmp_path)
    said = "".join(err for _, _, err in results)
    assert all(results[n][0] for n in range(len(results))) and "Traceback" not in said
    assert "rank 0: error: " in said and "in use" in said


def test_a_signal_ends_a_server_of_one_process(monkeypatch):
    """Python would wait at its end for the thread that generates; wrong options come before there is one."""
    left = []
    monkeypatch.setattr(server_ends.os, "_exit", left.append)
    for status in (143, 2):
        with contextlib.suppress(SystemExit), server_ends.whole("", None, mx.distributed.init()):
            sys.exit(status)
    assert left == [143]


def test_ranks_of_a_server_leave_with_the_status_that_ended_them(monkeypatch):
    left = []
    monkeypatch.setattr(server_ends.os, "_exit", left.append)
    monkeypatch.setattr(watchdog, "failing_together", lambda *_: contextlib.nullcontext())
    for status in (None, 0, 2, 143, "of a library"):
        with server_ends.whole("rank 1: ", None, SimpleNamespace(size=lambda: 2)):
            sys.exit(status)
    assert left == [0, 0, 2, 143, 1]


def test_a_server_that_is_told_to_end_does_not_wait_for_its_thread():
    """SIGTERM, of one process."""
    code = (
        "import threading, time; from expert_parallel.command import output, server_ends;"
        "from types import SimpleNamespace as S\n"
        "threading.Thread(target=time.sleep, args=(30,)).start()\n"
        "with output.exit_on_user_error(), server_ends.whole('', None, S(size=lambda: 1)):\n"
        " print('up', flush=True); time.sleep(30)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(10) == 143
        finally:
            process.kill()


@pytest.mark.slow
def test_sigterm_ends_a_server_that_has_answered(in_float32, tmp_path):  # noqa: F811
    with serving("one", in_float32, tmp_path) as (address, (process,)):
        body = json.dumps({"prompt": "class", "max_tokens": 4}).encode()
        urllib.request.urlopen(f"{address}/v1/completions", data=body, timeout=60).close()
        process.terminate()
        assert process.wait(20) == 143


@contextlib.contextmanager
def under_load(address):
    """Requests that go on until the server is gone."""

    def ask():
        body = json.dumps({"prompt": "class", "max_tokens": 400}).encode()
        with contextlib.suppress(Exception):
            while True:
                urllib.request.urlopen(f"{address}/v1/completions", data=body, timeout=60).close()

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    yield
    for thread in threads:
        thread.join(70)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_killed_under_load_ends_the_other(lost, in_float32, tmp_path):  # noqa: F811
    with serving("ring", in_float32, tmp_path) as (address, processes), under_load(address):
        processes[lost].kill()
        assert processes[1 - lost].wait(20) == 3
    text = (tmp_path / f"err{1 - lost}").read_text()
    ours = [line for line in lines_of_ours(text) if line.startswith("rank ")]
    assert "Traceback" not in text and len(ours) == 1 and "lost another rank" in ours[0]


@pytest.mark.slow
def test_control_c_ends_ranks_with_a_line_each(in_float32, tmp_path):  # noqa: F811
    with serving("ring", in_float32, tmp_path) as (address, processes), under_load(address):
        for process in processes:
            process.send_signal(signal.SIGINT)
        assert all(process.wait(20) in (130, 3) for process in processes)
        assert 130 in [process.returncode for process in processes]
    for rank in (0, 1):
        text = (tmp_path / f"err{rank}").read_text()
        ours = [line for line in lines_of_ours(text) if line.startswith("rank ")]
        assert "Traceback" not in text and len(ours) <= 1


@pytest.mark.slow
def test_control_c_of_mpirun(in_float32, tmp_path):  # noqa: F811
    with serving("mpi", in_float32, tmp_path) as (address, (mpirun,)), under_load(address):
        mpirun.send_signal(signal.SIGINT)
        assert mpirun.wait(30)
    text = (tmp_path / "err0").read_text()
    assert "Traceback" not in text
    assert all(len(re.findall(f"^rank {rank}: ", text, re.MULTILINE)) <= 1 for rank in (0, 1))
