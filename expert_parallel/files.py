"""Files that are written whole, or not at all, and what JSON can hold."""

from __future__ import annotations

import math
import os
from contextlib import contextmanager
from pathlib import Path


def part_of(path: Path) -> Path:
    """Where a file is written until it is whole: beside it, or beside the target of a link."""
    path = Path(os.path.realpath(path))
    return path.with_name(f"{path.name}.{os.getpid()}.part")


@contextmanager
def written_whole(path, mode: str = "w"):
    """A file to write into, which takes its place under its name when the block ends well: a reader never sees half.

    A pipe or a device is written straight into, for a rename would put a plain file in its place.
    Raises OSError in one line that names the path.
    """
    path = Path(path)
    straight = path.exists() and not path.is_file()
    path = path if straight else Path(os.path.realpath(path))  # a link stays, its target is replaced
    beside = path if straight else part_of(path)
    try:
        with beside.open(mode) as file:
            yield file
        if not straight:
            beside.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if not straight:
            beside.unlink(missing_ok=True)


def plain(value):
    """A value in what JSON knows: arrays as lists, what is no number as null, objects by their name."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if hasattr(value, "tolist"):  # numpy's and mlx's
        value = value.tolist()
    if isinstance(value, list | tuple | range):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
