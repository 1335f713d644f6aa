"""The journal of a run: a file from which the run goes on after it was killed, at whatever moment.

    {"journal": 1, "versions": ..., "model": ..., "options": ..., "prompt": ..., "crc": 2731412205}
    {"n": 0, "token": 262, "crc": 1160406405}
    {"n": 1, "token": 1407, "crc": 3057371829}
    {"end": "length", "crc": 90511012}

A line is written whole, by one write, its newline last: a last line without one was cut by the kill and counts for
nothing. `crc` is CRC-32 over all entries up to there: damage before the end is found, and named by its line.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import weakref
import zlib
from dataclasses import dataclass, field
from pathlib import Path

VERSION = 1  # of the file
BEGINNING = b'{"journal": '  # of every journal
SYNC = 1.0  # seconds between two fsyncs: what a machine that loses its power may lose; a kill loses nothing


@dataclass
class Past:
    """What a journal holds: of a run that was not begun no header, of one that was not finished no end."""

    header: dict | None = None
    tokens: list[int] = field(default_factory=list)
    end: str | None = None
    size: int = 0  # bytes of its whole lines
    crc: int = 0  # over those


def read_past(data: bytes, name: str = "the journal") -> Past:
    """The whole lines of a journal; ValueError that names the line where it is none, or damaged before its end."""
    past = Past()
    *lines, cut = data.split(b"\n")
    if not lines and cut[: len(BEGINNING)] != BEGINNING[: len(cut)]:  # a kill leaves the beginning of a header
        raise ValueError(f"{name} is no journal of this project")
    for number, line in enumerate(lines, start=1):
        body, mark, crc = line.rpartition(b', "crc": ')
        past.crc = zlib.crc32(body, past.crc)
        entry = _entry(body + b"}") if mark and crc == b"%d}" % past.crc else None
        if number == 1 and (entry is None or "journal" not in entry):
            raise ValueError(f"{name} is no journal of this project, or its first line is damaged")
        if number == 1 and entry["journal"] != VERSION:
            raise ValueError(f"{name} is a journal of version {entry['journal']}, this can read version {VERSION}")
        if number == 1:
            past.header = entry
        elif entry is None or past.end is not None or not _comes_next(entry, len(past.tokens)):
            raise ValueError(f"{name} is damaged in line {number}: restore it, or begin another with --journal FILE")
        elif "end" in entry:
            past.end = entry["end"]
        else:
            past.tokens.append(entry["token"])
        past.size += len(line) + 1
    return past


def _entry(line: bytes) -> dict | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _comes_next(entry: dict, n: int) -> bool:
    """Whether it is the end, or token n."""
    return isinstance(entry.get("end"), str) or entry.get("n") == n and isinstance(entry.get("token"), int)


def check_new(path) -> None:
    """ValueError unless a journal can begin there: it is never written over another, nor into what keeps nothing."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"cannot write {path}: a journal needs a file, from which the run can go on")
    if path.exists() and path.stat().st_size:
        raise ValueError(f"{path} is there already: --resume {path} continues it, another name begins anew")


class Journal:
    """A journal that this process writes, and no other: `begin(header)`, `add(token)`, `end(why)`, `close()`.

    Every method raises OSError in one line that names the file; what was written before stays whole.
    """

    def __init__(self, path, resume: bool):
        """Open it, locked; with `resume` it must be there, and `past` is what it holds.

        ValueError where another process writes it, where it holds a run that is not to be resumed, or is damaged.
        """
        self.path, self._synced = Path(path), time.monotonic()
        if resume and os.path.exists(path) and not self.path.is_file():  # noqa: PTH110, which a pipe would not end
            raise ValueError(f"cannot resume {path}: it is {'a folder' if self.path.is_dir() else 'no file'}")
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | (0 if resume else os.O_CREAT), 0o644)
        except OSError as error:
            how = "; --journal FILE begins one" if isinstance(error, FileNotFoundError) and resume else ""
            raise OSError(f"cannot {'resume' if resume else 'write'} {path}: {error.strerror}{how}") from None
        self.close = weakref.finalize(self, os.close, self._file)  # also where a run ends on the way
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process writes {path}: wait until it has ended, or end it") from None
        if not resume:
            check_new(path)
        self.past = read_past(self.path.read_bytes(), str(path))

    def begin(self, header: dict) -> None:
        """Cut off what the kill left half-written; the header is written where there is none."""
        self._carried_out(lambda: os.ftruncate(self._file, self.past.size))
        if self.past.header is None:
            self._write({"journal": VERSION, **header}, sync=True)

    def add(self, token: int) -> None:
        """The next token of the answer."""
        self._write({"n": len(self.past.tokens), "token": token})
        self.past.tokens.append(token)

    def end(self, why: str) -> None:
        """The answer is complete: "stop" or "length"."""
        self._write({"end": why}, sync=True)
        self.past.end = why

    def _write(self, entry: dict, sync: bool = False) -> None:
        body = json.dumps(entry).encode()[:-1]
        self.past.crc = zlib.crc32(body, self.past.crc)
        line = body + b', "crc": %d}\n' % self.past.crc

        def write():
            done = os.write(self._file, line)
            while done < len(line):  # a disk that fills up takes a part first, and says why at the next
                done += os.write(self._file, line[done:])

        self._carried_out(write)
        self.past.size += len(line)
        if sync or time.monotonic() - self._synced > SYNC:
            self._carried_out(lambda: os.fsync(self._file))
            self._synced = time.monotonic()

    def _carried_out(self, what) -> None:
        try:
            what()
        except OSError as error:
            kept = f"its {len(self.past.tokens)} tokens are safe" if self.past.size else "nothing was lost"
            raise OSError(
                f"cannot write {self.path}: {error.strerror}; {kept}: make room, then --resume {self.path}"
            ) from None
