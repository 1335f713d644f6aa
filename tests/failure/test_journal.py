"""The journal as a file: cut at any byte, damaged, full, locked, of another version."""

import json
import resource
import subprocess
import sys
import zlib

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from expert_parallel.failure import journal as module
from expert_parallel.failure.journal import Journal, read_past

HEADER = {"options": {"temp": 0.5}, "prompt": {"text": "ü\n"}}
TOKENS = [17, 0, 151643, 17, 5]


def written(path, tokens=TOKENS, end="length"):
    journal = Journal(path, resume=False)
    journal.begin(HEADER)
    for token in tokens:
        journal.add(token)
    if end:
        journal.end(end)
    journal.close()
    return path.read_bytes()


def test_every_prefix_of_a_journal_holds_its_whole_lines_and_is_written_on(tmp_path):
    path = tmp_path / "run.jsonl"
    whole = written(path)
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        lines = whole[:size].count(b"\n")
        journal = Journal(path, resume=True)
        past = journal.past
        assert past.tokens == TOKENS[: max(0, lines - 1)] and (past.header is not None) == (lines > 0)
        assert past.end == ("length" if lines == len(TOKENS) + 2 else None)
        journal.begin(HEADER)
        for token in TOKENS[len(past.tokens) :]:
            journal.add(token)
        if past.end is None:
            journal.end("length")
        journal.close()
        assert path.read_bytes() == whole, size


@given(st.data())
def test_damage_is_found_and_named_by_its_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "run.jsonl"
    whole = written(path)
    at = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[at]))
    damaged = whole[:at] + bytes([byte]) + whole[at + 1 :]
    if b"\n" not in damaged[at:]:  # the last newline: as if it was cut
        assert read_past(damaged).tokens == TOKENS and read_past(damaged).end is None
        return
    line = 1 + whole[:at].count(b"\n")
    words = "no journal|first line" if line == 1 else f"damaged in line {line}:"
    with pytest.raises(ValueError, match=words):
        read_past(damaged)


@pytest.mark.parametrize("change", [lambda lines: lines[:2] + lines[3:], lambda lines: lines[:3] + lines[2:],
                                    lambda lines: [*lines, lines[-2]]])  # fmt: skip
def test_lines_that_are_lost_doubled_or_after_the_end(tmp_path, change):
    lines = change(written(tmp_path / "run.jsonl").splitlines(keepends=True))
    with pytest.raises(ValueError, match=r"damaged in line [348]:"):
        read_past(b"".join(lines))


@pytest.mark.parametrize("line", [{"n": 0}, {"token": 5}, {"n": 0, "token": "5"}, {"n": 1, "token": 5}, {"end": None}])
def test_a_line_that_is_sound_and_says_nothing_is_refused(line, tmp_path):
    begun = written(tmp_path / "run.jsonl", [], end=None)
    body = json.dumps(line).encode()[:-1]
    crc = zlib.crc32(body, read_past(begun).crc)
    with pytest.raises(ValueError, match=r"x is damaged in line 2: restore it"):
        read_past(begun + body + b', "crc": %d}\n' % crc, "x")


def test_another_version_and_other_files_are_refused(tmp_path):
    whole = written(tmp_path / "run.jsonl")
    body = whole.split(b"\n")[0].rpartition(b', "crc')[0].replace(b'"journal": 1', b'"journal": 2')
    with pytest.raises(ValueError, match="x is a journal of version 2, this can read version 1"):
        read_past(body + b', "crc": %d}\n' % zlib.crc32(body), "x")
    for other in (b'{"a": 1}\n', b"\x89PNG\n\n", b"\n", b'[1]\n{"n": 0}\n', b"without an end", b'{"a": 1}'):
        with pytest.raises(ValueError, match="x is no journal of this project"):
            read_past(other, "x")


def test_a_journal_is_never_begun_over_another(tmp_path):
    path = tmp_path / "run.jsonl"
    whole = written(path, end=None)
    with pytest.raises(ValueError, match=r"run\.jsonl is there already: --resume .*run\.jsonl continues it"):
        Journal(path, resume=False)
    assert path.read_bytes() == whole
    with pytest.raises(OSError, match=r"cannot resume .*none\.jsonl: No such file or directory; --journal FILE begins"):
        Journal(tmp_path / "none.jsonl", resume=True)
    with pytest.raises(OSError, match="cannot write .*/nowhere/run.jsonl: No such file"):
        Journal(tmp_path / "nowhere" / "run.jsonl", resume=False)
    with pytest.raises(ValueError, match="cannot write /dev/full: a journal needs a file"):
        Journal("/dev/full", resume=False)


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    path = tmp_path / "run.jsonl"
    whole = written(path, end=None)
    code = "import sys; from expert_parallel.failure.journal import Journal; j = Journal(sys.argv[1], True);"
    code += "print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, path], cwd=ROOT, stdin=-1, stdout=-1) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=r"another process writes .*run\.jsonl"):
            Journal(path, resume=True)
        other.kill()
        other.wait()
    assert path.read_bytes() == whole
    Journal(path, resume=True).close()


FULL = """
import resource, sys
from expert_parallel.failure.journal import Journal
journal = Journal(sys.argv[1], resume=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    journal.begin({"a": 1})
    for token in range(10):
        journal.add(token)
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit of file sizes here")
def test_what_a_full_disk_took_is_whole(tmp_path):
    """A part of a line is taken before the disk says that it is full: it counts for nothing."""
    path = tmp_path / "run.jsonl"
    lengths = []
    for size in (10, 60, 90, 100, 150):
        path.unlink(missing_ok=True)
        done = subprocess.run([sys.executable, "-c", FULL, path, str(size)], cwd=ROOT, capture_output=True, text=True)
        past = read_past(path.read_bytes())
        safe = f"its {len(past.tokens)} tokens are safe" if past.header else "nothing was lost"
        assert done.stdout == f"cannot write {path}: File too large; {safe}: make room, then --resume {path}\n"
        assert path.stat().st_size == size and past.tokens == list(range(len(past.tokens)))
        lengths.append(len(past.tokens))
        journal = Journal(path, resume=True)
        journal.begin({"a": 1})
        journal.add(7)
        journal.close()
        assert read_past(path.read_bytes()).tokens == [*past.tokens, 7]
    assert lengths == [0, 0, 1, 1, 2]


def test_what_a_loss_of_power_may_take_is_bounded(tmp_path, monkeypatch):
    """The header, the end, and a token a second after the last time."""
    synced, now = [], [100.0]
    monkeypatch.setattr(module.os, "fsync", lambda file: synced.append(len(journal.path.read_bytes().splitlines())))
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    journal = Journal(tmp_path / "run.jsonl", resume=False)
    journal.begin(HEADER)
    for later in (0.3, 0.3, 0.5, 0.5, 0.9):  # 1.1 s after the header, 1.4 s after that
        now[0] += later
        journal.add(1)
    journal.end("length")
    assert synced == [1, 4, 6, 7]
    journal.close()


def test_lines_are_json(tmp_path):
    lines = [json.loads(line) for line in written(tmp_path / "run.jsonl").splitlines()]
    assert lines[0]["journal"] == 1 and [line["token"] for line in lines[1:-1]] == TOKENS
    assert [line["n"] for line in lines[1:-1]] == list(range(len(TOKENS))) and lines[-1]["end"] == "length"
