"""Files that are written whole, or not at all, what JSON can hold, and names that are nearly right."""

from __future__ import annotations

import difflib
import math
import os
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path, mode: str = "w"):
    """A file to write into, which takes its place under its name when the block ends well: a reader never sees half.

    A pipe or a device is written straight into, for a rename would put a plain file in its place.
    Raises OSError in one line that names the path.
    """
    path = Path(path)
    straight = os.path.exists(path) and not os.path.isfile(path)  # noqa: PTH110, PTH113, which raise for long names
    path = path if straight else Path(os.path.realpath(path))  # a link stays, its target is replaced
    beside = path if straight else path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with beside.open(mode) as file:
            yield file
        if not straight:
            beside.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if not straight and os.path.exists(beside):  # noqa: PTH110
            beside.unlink()


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


def nearest(name: str, names) -> str:
    """ ", did you mean ...?" where one of the names is like it, for an error's text; else nothing."""
    found = difflib.get_close_matches(name.lower(), names)
    return f", did you mean {found[0]}?" if found else ""
