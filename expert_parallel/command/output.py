"""Output: the console, a bar of bytes, figures for programs, and how a script ends when something is wrong."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path

from ..files import plain, written_whole


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line too."""

    def error(self, message):
        self.exit(2, f"error: {message} (--help explains)\n")


def without_options(description: str) -> None:
    """Of a script that is one flat text: --help works, Control-C and `| head` end it without a word.

    Nothing in a notebook, whose arguments and signals are its own.
    """
    if hasattr(sys.modules["__main__"], "__file__"):
        Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
        for number in (signal.SIGINT, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)


def to_standard_output(path) -> bool:
    """Whether `--json -` was asked for; then nothing else goes there."""
    return str(path) == "-"


def check_writable(path) -> None:
    """Say now, not after a long run, that a file could not be written."""
    path = Path(path)
    folder = path.absolute().parent
    if path.name == "-":
        raise ValueError("cannot write -: only --json - goes to standard output; give a file's name")
    if not folder.is_dir():
        raise ValueError(f"cannot write {path}: folder {folder} does not exist")
    # Not pathlib's, which raise for a name that is too long.
    if os.path.isdir(path):  # noqa: PTH112
        raise ValueError(f"cannot write {path}: it is a folder")
    if os.path.exists(path) and not os.path.isfile(path):  # noqa: PTH110, PTH113
        if not os.access(path, os.W_OK):  # a pipe or a device
            raise ValueError(f"cannot write {path}: no permission")
        return
    # A name can be too long, a disk read-only, a folder another's: a file is begun and given up.
    with contextlib.suppress(_GivenUp), written_whole(path):
        raise _GivenUp


class _GivenUp(Exception):
    """The trial of `check_writable` is done."""


def check_outputs(outputs: dict, inputs: dict) -> None:
    """That every output can be written, into a file of its own that is none of what is read.

    outputs  {option: path}, those without a path are skipped, as is `--json -`
    inputs   {what it is: path}; a folder stands for all that is in it
    """
    taken = {}
    for option, path in outputs.items():
        if path is None or option == "--json" and to_standard_output(path):
            continue
        other = taken.setdefault(Path(path).resolve(), option)
        if other != option:
            raise ValueError(f"{other} and {option} both name {path}: give each a file of its own")
        for what, source in inputs.items():
            if _is_read(Path(path), Path(source).expanduser()):
                raise ValueError(f"{option} {path} would be written over {what}: give a file elsewhere")
        check_writable(path)


def _is_read(path: Path, source: Path) -> bool:
    """Whether a file at `path` would lie in what is read, or take the place of a file that is read there."""
    real, here = path.resolve(), path.parent.resolve()  # of a link both count: the hub's cache has links to its blobs
    near = [place for place in (real, *real.parents, here, *here.parents) if os.path.exists(place)]  # noqa: PTH110
    if source.exists() and any(map(source.samefile, near)):  # names may differ in case
        return True
    return real in near and any(file.exists() and file.samefile(real) for file in source.rglob("*"))


def write_json(path, figures: dict) -> None:
    """Figures as a file for programs, see `written_whole`; `-` is standard output. What is no number becomes null."""
    text = json.dumps(plain(figures), indent=1, allow_nan=False) + "\n"
    if to_standard_output(path):
        sys.stdout.write(text)
        return
    with written_whole(path) as file:
        file.write(text)


def console(quiet: bool = False):
    """Where reports go: standard output, 80 columns where it is not a terminal; nowhere where it was closed."""
    from rich.console import Console

    class Reporting(Console):
        def on_broken_pipe(self):
            raise BrokenPipeError  # rich itself would exit with status 1, which can mean a damaged checkpoint

    if sys.stdout is None:  # started with >&-
        return Console(quiet=True, file=io.StringIO())
    columns, of_mpi = os.environ.get("COLUMNS", ""), "OMPI_COMM_WORLD_RANK" in os.environ
    terminal = sys.stdout.isatty() and not of_mpi  # Open MPI gives ranks a terminal, wherever their output goes
    width = None if terminal else int(columns) if columns.isdecimal() and int(columns) else 80
    plain = {"force_terminal": False} if of_mpi else {}
    return Reporting(quiet=quiet, width=width, highlight=False, markup=False, emoji=False, **plain)


@contextlib.contextmanager
def progress_bar(what: str, show: bool):
    """A bar of bytes on standard error while the block runs, where that is a terminal; gives (done, total) -> None."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    show = show and sys.stderr is not None and sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not show) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def progress_line(show: bool = True):
    """Gives (what) -> None, which shows what is under way on standard error where that is a terminal; () wipes it.

    It is to be wiped before anything else is printed.
    """
    if not (show and sys.stderr is not None and sys.stderr.isatty()):
        yield lambda what=None: None
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    with contextlib.ExitStack() as line:

        def tell(what=None):
            line.close()
            if what:  # as Text: a name in brackets is no markup; and slowly, for it may be a time that is taken
                line.enter_context(console.status(Text(what), refresh_per_second=4))

        yield tell


def warn(line: str) -> None:
    """A line on standard error that a user who asked for the answer alone should read, too."""
    with contextlib.suppress(OSError, AttributeError):  # closed by whoever started us
        sys.stderr.write(f"{line}\n")


def exit_of(error: BaseException) -> tuple[int, str] | None:
    """(exit status, one line) that a program ends with; None for an error that is our own mistake."""
    if isinstance(error, BrokenPipeError):  # `| head` closed the other end
        return 141, ""
    if isinstance(error, KeyboardInterrupt):
        return 130, "; ".join(["stopped", *map(str, error.args)])
    if isinstance(error, ValueError | OSError):
        return 2, "error: " + " ".join(str(error).split())
    return None


@contextlib.contextmanager
def exit_on_user_error(prefix: str = ""):
    """Turn the errors of wrong input into one line on standard error and exit status 2."""
    # Closed by whoever started us: what is opened next would get their numbers, and MLX takes file 0 for an error.
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115, PTH123, for as long as the process lives
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a report goes on after what its encoding has not
    try:
        try:
            # Of ranks the watch process hears the launcher, see ranks/watch.py.
            with contextlib.nullcontext() if prefix else _exit_on_signals():
                yield
        finally:
            _flush_output()
    except (Exception, KeyboardInterrupt) as error:
        known = exit_of(error)
        if known is None:
            raise
        status, line = known
        if line:
            start = "\n" if status == 130 else ""  # the answer may stand in mid-line
            # One write, so that lines of several ranks do not mix.
            (sys.stderr or io.StringIO()).write(f"{start}{prefix}{line}\n")
        raise SystemExit(status) from None


@contextlib.contextmanager
def _exit_on_signals():
    """End by SystemExit when the process is told to, so that what is half-written is taken away."""
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]  # as by nohup
    before = {n: signal.signal(n, lambda number, _: sys.exit(128 + number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _flush_output() -> None:
    """Print what still waits; where that fails drop it, or Python would try again at its end and complain."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise
