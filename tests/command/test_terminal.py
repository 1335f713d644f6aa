"""In a terminal something moves all the time, and is gone in the end; a pipe gets the report alone."""

import os
import pty
import select
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SHIPPED, of_a_user

STUDY = ("expert_parallel_poc.py", "--scenarios", "hot", "--tokens", "1024")
MOST_SILENCE = 5  # seconds; without a sign of life it was up to 26 where the machine had other work too


def in_a_terminal(*command):
    """(standard output, what a terminal got as standard error, longest silence on both in seconds)."""
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=of_a_user(TERM="xterm"), stdout=subprocess.PIPE,
        stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    got, open_ones, heard, silence = {terminal: b"", process.stdout.fileno(): b""}, [terminal], time.monotonic(), 0
    open_ones.append(process.stdout.fileno())
    while open_ones:
        for one in select.select(open_ones, [], [])[0]:
            try:
                read = os.read(one, 65536)
            except OSError:  # Linux: nobody has the other end of the terminal open
                read = b""
            got[one] += read
            silence, heard = max(silence, time.monotonic() - heard), time.monotonic()
            if not read:
                open_ones.remove(one)
    assert process.wait() == 0, got
    process.stdout.close()
    os.close(terminal)
    err, out = (text.decode() for text in got.values())
    return out, err, silence


@pytest.mark.parametrize(
    ("command", "told", "printed"),
    [
        (("qwen3_expert_parallel.py", "--model", SHIPPED, "--trials", "1"),
         ("starting", "placing experts, contiguous", "reading ", "reading the prompt, 17 tokens", "timing its parts",
          "comparing with stock mlx-lm", "timing run 1 of 1"), "Parity with stock mlx-lm"),
        (STUDY, ("making the layer", "hot: measuring, and fitting remedies"), "Remedies"),
        (("model_analysis.py",), ("describing qwen3-coder-30b",), "Projection"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_nothing_is_silent_for_long(command, told, printed):
    out, err, silence = in_a_terminal(*command)
    assert silence < MOST_SILENCE
    places = [err.find(what) for what in told]
    assert -1 not in places and places == sorted(places)
    assert err.rfind("\x1b[?25h") > err.rfind("\x1b[?25l")  # the cursor is back
    assert err.endswith("\x1b[2K") and printed in out and "\x1b" not in out
