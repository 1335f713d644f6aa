"""Files that scripts write: whole or not at all, and nothing that is no plain file is ever replaced."""

import importlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SHIPPED, of_a_user, run_script

from expert_parallel import RoutingTrace
from expert_parallel.command import output
from expert_parallel.files import written_whole


def test_a_failed_write_leaves_what_was_there(tmp_path):
    (tmp_path / "a.json").write_text("before")
    with pytest.raises(KeyError), written_whole(tmp_path / "a.json") as file:
        file.write("half")
        raise KeyError
    assert (tmp_path / "a.json").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_pipe_is_written_into_and_stays_a_pipe(tmp_path):
    """`--json /dev/stdout`, started by root, once put a plain file in the place of the device."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    output.check_writable(pipe)
    output.write_json(pipe, {"a": 1})
    assert json.loads(reader.communicate(timeout=30)[0]) == {"a": 1}
    reader = subprocess.Popen(["head", "-c", "1", pipe], stdout=subprocess.DEVNULL)
    with pytest.raises(OSError, match="cannot write .*pipe: Broken pipe"):
        output.write_json(pipe, {"a": "x" * 1_000_000})
    reader.wait(timeout=30)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    assert pipe.is_fifo()


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for value in (1, 2):
        output.write_json(tmp_path / "link", {"a": value})
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "target").read_text()) == {"a": 2}


def test_names_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="only --json - goes to standard output"):
        output.check_writable("-")
    with pytest.raises(ValueError, match="only --json - goes to standard output"):
        output.check_outputs({"--json": "-", "--journal": "-"}, {})
    with pytest.raises(ValueError, match="is a folder"):
        output.check_writable(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        output.check_writable(tmp_path / "no" / "a.json")
    for name in ("x" * 250, "x" * 300):  # the first is a name, but the file beside it has none
        with pytest.raises(OSError, match="cannot write .*xxx: File name too long"):
            output.check_outputs({"--json": tmp_path / name}, {"the model": tmp_path / "model"})
    assert not list(tmp_path.iterdir())  # nor does the trial leave anything
    there = tmp_path / ("x" * 250)
    there.write_text("old")
    with pytest.raises(OSError, match="File name too long"):  # it could be opened, but not be replaced whole
        output.check_writable(there)
    assert there.read_text() == "old"


def test_a_trace_goes_into_a_pipe_and_is_refused_where_it_cannot_go(tmp_path, run_here):
    done = run_here("qwen3_expert_parallel.py", "--model", SHIPPED, "--trace", os.devnull)
    assert (done.returncode, done.stdout) == (2, "") and "cannot write /dev/null: a trace needs a file" in done.stderr
    trace = RoutingTrace(np.zeros((3, 1, 2), dtype=int), 4)
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    trace.save(tmp_path / "pipe")
    (tmp_path / "read.npz").write_bytes(reader.communicate(timeout=30)[0])
    assert RoutingTrace.load(tmp_path / "read.npz").experts.shape == (3, 1, 2)


def test_a_model_of_the_hub_by_its_name_is_not_written_over_either(tmp_path, monkeypatch, run_here):
    """model_analysis.py reads no more than the configuration, but weights lie beside it."""
    from expert_parallel.models import configurations

    (tmp_path / "config.json").write_text((SHIPPED / "config.json").read_text())
    monkeypatch.setattr(configurations, "resolve_model", lambda *_: tmp_path)
    done = run_here("model_analysis.py", "--model", "owner/name", "--json", tmp_path / "model.safetensors")
    assert done.returncode == 2 and "would be written over the model" in done.stderr


@pytest.mark.parametrize(
    ("command", "status", "output"),
    [
        ("{script} >&-", 0, ""),
        ("{script} --json {file} >&- && cat {file} | head -c 1", 0, "{"),
        ("set -o pipefail; {script} | head -c 3", 141, "qwe"),
        ("{script} --quiet --json /dev/stdout | head -c 1", 0, "{"),
        ("{script} --json - | head -c 1", 0, "{"),
    ],
)
def test_output_that_is_closed_or_taken_in_part_gives_no_traceback(command, status, output, tmp_path):
    script = f"{sys.executable} model_analysis.py --model qwen1.5-moe-a2.7b --devices 1 2"
    command = command.format(script=script, file=tmp_path / "o.json")
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=of_a_user(), capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (status, output), done.stderr
    assert len(done.stderr.splitlines()) == (status == 2)


def test_characters_that_the_stream_cannot_encode_are_replaced():
    """It stopped at the line after the answer, without a report."""
    options = ("--model", SHIPPED, "--max-tokens", 2, "--no-verify")
    result = run_script("qwen3_expert_parallel.py", *options, LC_ALL="POSIX", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, "")
    assert "?" * 80 in result.stdout and "Speed (measured, " in result.stdout


# --- output never destroys input ----------------------------------------------------------------------------


@pytest.fixture
def readable(tmp_path):
    """A model, a prompt, a trace and a placement to read, and a fingerprint of all of it."""
    shutil.copytree(SHIPPED, tmp_path / "model", ignore=shutil.ignore_patterns("held-out"))
    (tmp_path / "prompt.py").write_text("import os\n")
    RoutingTrace(np.random.default_rng(0).integers(0, 128, (1100, 4, 8)), 128).save(tmp_path / "trace.npz")
    (tmp_path / "placement.json").write_text('{"every_layer": ["0-63", "64-127"]}')
    (tmp_path / "link.json").symlink_to(tmp_path / "model" / "config.json")
    for folder in ("hub", "adapter"):
        (tmp_path / folder).mkdir()
    for path in filter(Path.is_file, (tmp_path / "model").iterdir()):  # as the hub's cache: links to its blobs
        (tmp_path / "hub" / path.name).symlink_to(path)
    (tmp_path / "adapter" / "adapters.safetensors").write_text("weights")
    return tmp_path


def fingerprint(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


MAIN = ["qwen3_expert_parallel.py", "--model", "{0}/model", "--max-tokens", "1", "--no-verify", "--quiet"]
OVER = [
    [*MAIN, "--json", "{0}/model/config.json"],
    [*MAIN, "--json", "{0}/model/new.json"],
    [*MAIN, "--json", "{0}/link.json"],
    [*MAIN, "--trace", "{0}/model/model.safetensors"],
    [*MAIN, "--prompt", "{0}/prompt.py", "--json", "{0}/prompt.py"],
    [*MAIN, "--placement", "{0}/placement.json", "--save-placement", "{0}/placement.json"],
    [*MAIN, "--placement", "balanced", "--placement-trace", "{0}/trace.npz", "--trace", "{0}/trace.npz"],
    [*MAIN, "--plots", "{0}/model"],
    [*MAIN, "--model", "{0}/hub", "--json", "{0}/hub/config.json"],
    [*MAIN, "--model", "{0}/hub", "--json", "{0}/model/model.safetensors"],
    [*MAIN, "--adapter-path", "{0}/adapter", "--json", "{0}/adapter/adapter_config.json"],
    [*MAIN, "--adapter-path", "{0}/adapter", "--trace", "{0}/adapter/adapters.safetensors"],
    ["model_analysis.py", "--model", "{0}/model", "--json", "{0}/model/new.json"],
    ["model_analysis.py", "--model", "{0}/hub", "--json", "{0}/hub/config.json"],
    ["model_analysis.py", "--model", "{0}/hub", "--json", "{0}/model/model.safetensors"],
    ["model_analysis.py", "--model", "{0}/hub/config.json", "--json", "{0}/hub/config.json"],
    ["model_analysis.py", "--model", "{0}/model/config.json", "--json", "{0}/model/config.json"],
    ["model_analysis.py", "--model", "{0}/model", "--trace", "{0}/trace.npz", "--json", "{0}/trace.npz"],
    ["model_analysis.py", "--model", "{0}/model", "--prompt", "{0}/prompt.py", "--json", "{0}/prompt.py"],
    ["model_analysis.py", "--model", "{0}/model", "--prompt", "a={0}/prompt.py", "--json", "{0}/prompt.py"],
    ["model_analysis.py", "--model", "mixtral-8x7b", "--json", "expert_parallel/models/configs/mixtral-8x7b.json"],
    ["expert_parallel_poc.py", "--trace", "{0}/trace.npz", "--json", "{0}/trace.npz"],
]


@pytest.mark.parametrize("arguments", OVER, ids=lambda arguments: " ".join(arguments[-2:]))
def test_output_over_input_is_refused_and_nothing_changes(arguments, readable, monkeypatch, capsys):
    before = fingerprint(readable)
    bundled = fingerprint(ROOT / "expert_parallel" / "models" / "configs")
    monkeypatch.chdir(ROOT)
    script = importlib.import_module(arguments[0].removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [argument.format(readable) for argument in arguments])
    with pytest.raises(SystemExit) as end:
        script.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and "would be written over" in err and len(err.splitlines()) == 1
    assert fingerprint(readable) == before
    assert fingerprint(ROOT / "expert_parallel" / "models" / "configs") == bundled


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_part_of_a_file(number, tmp_path):
    code = (
        "import os, time\nfrom expert_parallel.command.output import exit_on_user_error\n"
        "from expert_parallel.files import written_whole\n"
        f"with exit_on_user_error(), written_whole(r'{tmp_path}/o.json') as file:\n"
        "    file.write('half'); print('ready', flush=True); time.sleep(30)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 128 + number and not err
    assert not list(tmp_path.iterdir())


def test_json_has_no_number_that_is_none(tmp_path):
    output.write_json(tmp_path / "o.json", {"a": float("nan"), "b": np.array([1.0, np.inf]), "c": {"d": np.float32(2)}})
    assert json.loads((tmp_path / "o.json").read_text()) == {"a": None, "b": [1.0, None], "c": {"d": 2.0}}


# --- figures for programs, alike in all scripts -----------------------------------------------------------------


SCRIPTS = {
    "qwen3_expert_parallel.py": ["--model", SHIPPED, "--max-tokens", 2, "--no-verify"],
    "model_analysis.py": ["--model", "qwen1.5-moe-a2.7b", "--devices", 1, 2],
    "expert_parallel_poc.py": ["--scenarios", "hot", "--tokens", 1024, "--hidden", 16, "--expert-width", 8],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_json_alone_goes_to_standard_output_and_says_what_was_asked_for(run_here, script):
    run = run_script if script == MAIN[0] else run_here
    result = run(script, *SCRIPTS[script], "--json", "-")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout, parse_constant=pytest.fail)  # nothing but JSON, and no NaN in it
    options, arguments = figures["options"], iter(map(str, SCRIPTS[script]))
    assert options["json"] == "-" and options["quiet"] is False
    for argument in arguments:
        if argument.startswith("--") and argument != "--no-verify":
            found = options[argument[2:].replace("-", "_")]
            assert str(found[0] if isinstance(found, list) else found) == next(arguments)
    assert {"device", "cores", "system", "python", "mlx", "mlx_lm", "numpy"} <= set(figures["environment"])


@pytest.mark.parametrize("name", ["[red]a.npz", "[[x]].npz", ":smile:.npz"])
def test_names_of_files_are_shown_as_they_are(run_here, name, tmp_path):
    experts = np.random.default_rng(0).random((1100, 1, 16)).argsort(axis=2)[..., :4]
    RoutingTrace(experts, 16).save(tmp_path / name)
    result = run_here("expert_parallel_poc.py", "--trace", tmp_path / name, "--hidden", 16, "--expert-width", 8)
    assert result.returncode == 0, result.stderr
    assert f"{name}: recorded trace" in result.stdout


def test_a_program_that_nohup_started_outlives_its_terminal():
    code = (
        "import os, signal\nfrom expert_parallel.command.output import exit_on_user_error\n"
        "with exit_on_user_error():\n    os.kill(os.getpid(), signal.SIGHUP)\n    print('still here')\n"
    )
    command = [sys.executable, "-c", code]
    for before, out, status in (("", "", 129), ("nohup ", "still here\n", 0)):
        line = f"{before}{shlex.join(command)}"
        done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert (done.returncode, done.stdout) == (status, out), done.stderr


def test_signals_are_handled_as_before_once_a_script_is_done():
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with output.exit_on_user_error():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before


def test_how_a_program_ends():
    assert output.exit_of(KeyboardInterrupt()) == (130, "stopped")
    assert output.exit_of(KeyboardInterrupt("go on")) == (130, "stopped; go on")
    assert output.exit_of(BrokenPipeError()) == (141, "")
    assert output.exit_of(ValueError("two\nlines")) == (2, "error: two lines")
    assert output.exit_of(OSError("no disk")) == (2, "error: no disk")
    assert output.exit_of(KeyError("our own mistake")) is None


def test_the_line_at_the_end_begins_anew_only_where_an_answer_may_stand(capsys):
    for error, line in ((ValueError("no"), "rank 1: error: no\n"), (KeyboardInterrupt(), "\nrank 1: stopped\n")):
        with pytest.raises(SystemExit), output.exit_on_user_error("rank 1: "):
            raise error
        assert capsys.readouterr().err == line


# --- terminals --------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def under_way(*show):
    """What is shown unless False says no; a bar is always told."""
    with output.progress_bar("reading", *show or [True]) as read:
        read(5, 10)
    wiped = sys.stderr.getvalue() if sys.stderr else ""
    with output.progress_line(*show) as tell:
        tell("measuring [this][/x]")
        time.sleep(0.2)  # it is drawn from a thread
    return wiped


def test_what_is_under_way_is_shown_on_standard_error_where_that_is_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert under_way().endswith("\x1b[2K")
    assert "reading" in terminal.getvalue() and "measuring [this][/x]" in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", asked_not_to := Terminal())
    under_way(False)
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())
    under_way()
    monkeypatch.setattr(sys, "stderr", None)
    under_way()
    assert asked_not_to.getvalue().strip() == file.getvalue().strip() == capsys.readouterr().out.strip() == ""


def test_text_is_printed_in_a_terminal_as_it_is(monkeypatch):
    """Without the colours in which rich shows numbers and paths, in the terminal's width; in a pipe 80 columns."""
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    output.console().print("12 tokens of 'a.npz' " * 8)
    assert "\x1b" not in terminal.getvalue()
    assert 80 < max(map(len, terminal.getvalue().splitlines())) <= 100
