"""Files that scripts write: whole or not at all, and nothing that is no plain file is ever replaced."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

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
    with pytest.raises(ValueError, match="is a folder"):
        output.check_writable(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        output.check_writable(tmp_path / "no" / "a.json")


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
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (status, output), done.stderr
    assert len(done.stderr.splitlines()) == (status == 2)
