"""Ranks that fail, differ or get lost: all stop with a clear line each, within seconds."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT, SHIPPED, launch, launch_command

SCRIPT = "qwen3_expert_parallel.py"
RUN = ("--model", SHIPPED, "--prompt", "import os\n", "--no-verify", "--trials", 0, "--quiet")
LONG = (*RUN, "--max-tokens", 480)
NEEDS_MPI = pytest.mark.skipif(not shutil.which("mpirun"), reason="no mpirun on this machine")
BACKENDS = ["ring", pytest.param("mpi", marks=NEEDS_MPI)]

# The script, with a change on one rank: python -c PATCHED RANK CHANGE ARGUMENTS
PATCHED = """
import importlib, os, sys, time
change, sys.argv[1:3] = sys.argv[1:3], []
import qwen3_expert_parallel as script
rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("MLX_RANK")
def at_token(number, what):
    module = importlib.import_module("mlx_lm.generate")
    real = module.stream_generate
    def stream_generate(*args, **options):
        for n, response in enumerate(real(*args, **options)):
            if n == number:
                what()
            yield response
    module.stream_generate = stream_generate
def fail(error):
    raise error
if rank == change[0]:
    exec(change[1])
script.main()
"""


@contextmanager
def started(backend, ranks, *arguments, tmp_path):
    """The processes of a launch, rank 0 or mpirun first; killed at the end."""
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for command, environment in launch_command(backend, ranks, *arguments, tmp_path=tmp_path)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def patched(backend, rank, change, *arguments, tmp_path, timeout=60):
    return launch(backend, 2, "-c", PATCHED, rank, change, *arguments, tmp_path=tmp_path, timeout=timeout)


def errors_of(results):
    """The lines that ranks wrote about their end, by rank."""
    text = "".join(err for _, _, err in results)
    assert "Traceback" not in text, text
    found = re.findall(r"^rank (\d): (.*)$", text, re.MULTILINE)
    assert len(found) == len(dict(found)), f"more than a line of one rank: {text}"
    return {int(rank): line for rank, line in found}


# --- one rank fails -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "status", "line"),
    [
        (
            'fail(RuntimeError("[ring] connection to a peer was lost"))',
            3,
            "error: lost another rank: [ring] connection",
        ),
        ('fail(OSError("no space left for pages"))', 2, "error: no space left for pages"),
        ('fail(KeyError("layers"))', 1, "error: KeyError: 'layers' ("),
        ("fail(KeyboardInterrupt)", 130, "stopped"),
    ],
)
def test_what_ended_a_rank_is_called_by_its_name(change, status, line, tmp_path):
    change = f"script.run = lambda *_: {change}"
    (command, environment) = launch_command("ring", 2, "-c", PATCHED, 0, change, *RUN, tmp_path=tmp_path)[0]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == status
    assert errors_of([(0, "", result.stderr)])[0].startswith(line)


# --- ranks that differ ----------------------------------------------------------------------------------


@NEEDS_MPI
def test_ranks_of_other_versions_stop_instead_of_summing(tmp_path):
    change = "from expert_parallel.report import table; real = table.environment; "
    change += 'table.environment = lambda: real() | {"mlx": "0.1.0"}'
    results = patched("mpi", 1, change, *RUN, "--timeout", 60, tmp_path=tmp_path)
    assert {status for status, _, _ in results} == {2}
    lines = errors_of(results)
    assert sorted(lines) == [0, 1]
    expected = r"error: rank 1 has other mlx \(0\.1\.0, not \d+\.\d+\.\d+\) than rank 0; all ranks stop"
    assert all(re.fullmatch(expected, line) for line in lines.values()), lines


def test_ranks_that_differ_stop_and_name_what_differs(tmp_path):
    for name in ("copy", "other", "broken"):
        shutil.copytree(SHIPPED, tmp_path / name)
    with (tmp_path / "other" / "model.safetensors").open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(bytes(4096))
    os.truncate(tmp_path / "broken" / "model.safetensors", 10**6)
    rank_1 = {  # what differs there: the line of all ranks
        ("--temp", "0.5"): r"rank 1 has other --temp \(0\.5, not 0\.0\) than rank 0; all ranks stop",
        ("--placement", "round-robin"): r"rank 1 has other placement \(\w+, not \w+\) than rank 0; all ranks stop",
        ("--model", f"{tmp_path}/other"): r"rank 1 has other weights \(\w+, not \w+\) than rank 0; all ranks stop",
        ("--model", f"{tmp_path}/broken"): r"(rank 1 stopped: )?.*broken/model\.safetensors.*",
        ("--model", f"{tmp_path}/missing"): r"(rank 1 stopped: )?.*/missing.*",
        ("--devices", "3"): r"(rank 1 stopped: )?--devices 3, but there are 2 ranks: each rank is a device",
        # Two machines seldom have the same folders: not an error.
        ("--model", f"{tmp_path}/copy", "--json", "/nowhere/on/this/machine.json"): None,
    }
    line = [*map(str, RUN), "--max-tokens", "2"]
    cases = [[line, [*line, *options]] for options in rank_1]
    # Rank 0 alone writes.
    cases.append([[*line, "--trace", f"{tmp_path}/missing/o.npz"], line])
    expected = [*rank_1.values(), r"(rank 0 stopped: )?cannot write .*/missing/o\.npz.*"]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    results = launch("ring", 2, "tests/ranks/rank_cases.py", tmp_path / "cases.json", tmp_path=tmp_path)
    assert [status for status, _, _ in results] == [0, 0], results
    for r in range(2):
        found = json.loads((tmp_path / f"rank-{r}.json").read_text())
        for result, line in zip(found, expected, strict=True):
            assert re.fullmatch(line, result["error"]) if line else result["tokens"], result


# --- a launch that goes wrong -----------------------------------------------------------------------------


def test_a_missing_peer_ends_by_the_time_limit(tmp_path):
    command, environment = launch_command("ring", 2, SCRIPT, *RUN, "--timeout", 2, tmp_path=tmp_path)[0]
    begin = time.time()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, stdin=-3)
    assert done.returncode == 3
    assert "did not start within 2 s" in done.stderr
    assert time.time() - begin < 40


def test_standard_input_that_never_ends(tmp_path):
    """mlx.launch keeps its ranks' standard input open for ever."""
    (command, environment), other = launch_command(
        "ring", 2, SCRIPT, *RUN[:2], "--prompt", "-", "--timeout", 5, tmp_path=tmp_path
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "cwd": ROOT}
    ranks = [subprocess.Popen(c, env=e, **pipes) for c, e in ((command, environment), other)]
    for rank in ranks:
        assert rank.wait(timeout=60) == 3
    assert all(re.search(b"no end of standard input within 5 s|lost another", rank.stderr.read()) for rank in ranks)


def test_standard_output_closed_on_rank_0(tmp_path):
    """Closed from the start it is no output at all; closed on the way it ends all ranks."""
    commands = launch_command("ring", 2, SCRIPT, *RUN, "--max-tokens", 400, "--timeout", 100, tmp_path=tmp_path)
    for how, ends in (">&-", (0, 0)), ("| head -c 10; exit ${PIPESTATUS[0]}", (141, 3)):
        limit = "--max-tokens=2" if ends == (0, 0) else "--max-tokens=400"
        lines = ['"$@" ' + limit + f" {how}", '"$@" ' + limit]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        ranks = [
            subprocess.Popen(["bash", "-c", line, "bash", *command], cwd=ROOT, env=environment, **pipes)
            for line, (command, environment) in zip(lines, commands, strict=True)
        ]
        errors = [rank.communicate(timeout=60)[1] for rank in ranks]
        assert tuple(rank.returncode for rank in ranks) == ends, errors
        assert not any("Traceback" in error for error in errors)


@pytest.mark.parametrize("launcher", [pytest.param("mpirun", marks=NEEDS_MPI), "mlx.launch"])
def test_control_c_ends_all_ranks(launcher, tmp_path):
    """A terminal sends SIGINT to the launcher and to all that it started."""
    ((command, environment),) = launch_command("mpi", 2, "-c", PATCHED, "-", "", *LONG)
    if launcher == "mlx.launch":
        command = [
            Path(sys.executable).with_name("mlx.launch"),
            "-n",
            "2",
            "--python",
            sys.executable,
            "--",
            ROOT / SCRIPT,
        ]
        command += LONG
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)

    def as_in_a_terminal():  # where these tests run in the background, SIGINT may be ignored
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment, preexec_fn=as_in_a_terminal, **pipes)
    assert process.stdout.read(8), process.stderr.read()
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=15)
    assert process.returncode != 0 or launcher == "mlx.launch"  # which always has status 0
