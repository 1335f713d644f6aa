"""Safetensors files: where each tensor lies, whether a checkpoint is whole, single rows of it.

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
    """Every tensor of a checkpoint folder, after all checks that need no weights.

    Raises FileNotFoundError for missing files, ValueError for damaged ones.
    """
    folder = Path(folder)
    files = sorted(folder.glob("model*.safetensors"))
    index = folder / INDEX
    named = {}
    if index.exists():
        try:
            named = {name: str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} is corrupt: no weight_map can be read from it ({error})") from None
        missing = sorted({name for name in named.values() if not (folder / name).exists()})
        if missing:
            raise FileNotFoundError(
                f"{folder}: {len(missing)} of the {len(set(named.values()))} weight files that {INDEX} names"
                f" are missing, the first is {missing[0]}; download the model again"
            )
    if not files:
        raise FileNotFoundError(f"{folder} has no model*.safetensors: there are no weights in it")
    tensors = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise ValueError(f"{folder}: {name} is in {tensors[name].file.name} and in {file.name}; remove one")
            tensors[name] = tensor
    absent = [name for name in named if name not in tensors]
    if absent:
        raise ValueError(f"{folder}: {len(absent)} tensors that {INDEX} names are in no file, the first is {absent[0]}")
    return tensors


def read_rows(tensor: StoredTensor, rows) -> np.ndarray:
    """Rows of the leading axis as bytes, uint8 [n, bytes per row], and nothing else of the file.

    rows  ascending; runs of neighbours are read in one go
    """
    rows = np.asarray(rows)
    per_row = tensor.nbytes // tensor.shape[0]
    data = np.empty((len(rows), per_row), dtype=np.uint8)
    runs = np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1)
    with tensor.file.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):  # else the system reads ahead into rows that nobody asked for
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for run in runs:
            if len(run):
                _fill(file, tensor.offset + int(rows[run[0]]) * per_row, data[run[0] : run[-1] + 1])
    return data


def read_whole(tensors: list[StoredTensor]) -> np.ndarray:
    """Tensors of one size as rows, uint8 [n, bytes per tensor]."""
    data = np.empty((len(tensors), tensors[0].nbytes), dtype=np.uint8)
    for row, tensor in zip(data, tensors, strict=True):
        with tensor.file.open("rb", buffering=0) as file:
            _fill(file, tensor.offset, row)
    return data


def _fill(file, offset, data: np.ndarray):
    view = memoryview(data.reshape(-1))
    file.seek(offset)
    while view:
        count = file.readinto(view)  # a single read stops at 2 GiB
        if not count:
            raise OSError(f"{file.name} ended {len(view)} bytes too early; was it changed while it was read?")
        view = view[count:]
