"""Safetensors files: where each tensor lies, what is wrong with a folder of them, single rows.

The format (github.com/huggingface/safetensors, README "Format"): 8 bytes length of the header, the header in JSON,
then the tensors' bytes; offsets count from the end of the header. Rows are read, not mapped as by safetensors' own
slices: those fetched 1.19 times the bytes from a cold disk for a half of Qwen3-Coder's experts, reads 1.01 times.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file."""

    file: Path
    dtype: str  # as the format names it: U32, BF16, F32, ...
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    nbytes: int


def read_header(path) -> dict[str, StoredTensor]:
    """The tensors of a file by name, in the order of their bytes. ValueError with the file's name if it is damaged."""
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "a link to nowhere" if path.is_symlink() else "not a file"
        raise ValueError(f"{path} is {what}, not weights; download the model again")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise ValueError(f"{path} is a Git LFS pointer of {size} bytes, not the weights: run `git lfs pull`")
        length = int.from_bytes(start, "little")
        try:
            with safe_open(path, framework="np"):  # checks the header, offsets and the file's size
                entries = json.loads(file.read(length))
        except (SafetensorError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is truncated or corrupt ({size} bytes: {error}); download the model again"
            ) from None
    entries.pop("__metadata__", None)
    tensors = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        tensors[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
    return tensors


def checkpoint_tensors(folder) -> dict[str, StoredTensor]:
    """Every tensor of a folder's weight files. FileNotFoundError where there are none, ValueError for damaged ones."""
    tensors, files = {}, sorted(Path(folder).glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no model*.safetensors: there are no weights in it")
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise ValueError(f"{folder}: {name} is in {tensors[name].file.name} and in {file.name}; remove one")
            tensors[name] = tensor
    return tensors


def index_problem(folder, tensors: dict[str, StoredTensor]) -> str | None:
    """What a folder's index says that its files do not hold; None where they agree or there is no index.

    mlx-lm loads by the files alone: an index that lies explains why weights are missing, it stops nothing.
    """
    index = Path(folder) / INDEX
    if not index.exists():
        return None
    try:
        document = json.loads(index.read_text())
        named = {name: str(file) for name, file in document["weight_map"].items()}
        total = document.get("metadata", {}).get("total_size")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{index} is corrupt: no weight_map can be read from it ({type(error).__name__}: {error})"
    files = sorted({*named.values()})
    missing = [name for name in files if not (Path(folder) / name).exists()]
    if missing:
        what = f"{len(missing)} of the {len(files)} weight files that {INDEX} names"
        return f"{folder}: {what} are missing, the first is {missing[0]}; download the model again"
    lost = [name for name, file in named.items() if name not in tensors or tensors[name].file.name != file]
    lost += [name for name in tensors if name not in named]
    if lost:
        return f"{folder}: {len(lost)} tensors are not where {INDEX} says, the first is {lost[0]}"
    size = sum(tensor.nbytes for tensor in tensors.values())
    if isinstance(total, int) and total != size:
        return f"{folder}: {INDEX} says total_size {total:,} B, the tensors have {size:,} B"
    return None


def places_of(stored: list[StoredTensor], rows) -> tuple[list[tuple[Path, int]], int]:
    """([(file, offset)] of rows, bytes of each) of one tensor with a row for each, or of a tensor for each row."""
    if len(stored) > 1:
        return [(stored[row].file, stored[row].offset) for row in rows], stored[0].nbytes
    size = stored[0].nbytes // stored[0].shape[0]
    return [(stored[0].file, stored[0].offset + int(row) * size) for row in rows], size


def read_rows(stored: list[StoredTensor], rows) -> np.ndarray:
    """Rows as bytes, uint8 [n, bytes per row], and nothing else of the files.

    stored  one tensor whose leading axis is meant, or a tensor for each row
    rows    ascending; neighbours in a file are read in one go
    """
    places, per_row = places_of(stored, rows)
    data = np.empty((len(places), per_row), np.uint8)
    first = 0
    for n, (file, offset) in enumerate(places):
        following = places[n + 1] if n + 1 < len(places) else None
        if following != (file, offset + per_row):
            _read(*places[first], data[first : n + 1])
            first = n + 1
    return data


def _read(path, offset, data: np.ndarray):
    number = open_for_rows(path)
    try:
        fill(data, number, offset, path)
    finally:
        os.close(number)


def open_for_rows(path) -> int:
    """The number of a file that is opened to read rows here and there."""
    number = os.open(path, os.O_RDONLY)
    if hasattr(os, "posix_fadvise"):  # else the system reads ahead into rows that nobody asked for
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_RANDOM)
    return number


def fill(data: np.ndarray, number: int, offset: int, path) -> None:
    """Fill an array with the bytes of an open file from `offset` on. OSError naming `path` where there are too few."""
    view = memoryview(data.reshape(-1).view(np.uint8))
    while view:
        count = os.preadv(number, [view], offset)  # a single read stops at 2 GiB
        if not count:
            raise OSError(f"{path} ended {len(view)} bytes too early; was it changed while it was read?")
        view, offset = view[count:], offset + count
