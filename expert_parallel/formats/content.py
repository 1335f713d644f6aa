"""Content: what is in a file, by its first bytes: numpy arrays, torch tensors (without torch), JSON, JSON lines, YAML,
CSV.
"""

from __future__ import annotations

import csv
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import yaml

STORAGES = {"LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8}
STORAGES |= {"ByteStorage": np.uint8, "FloatStorage": np.float32, "DoubleStorage": np.float64}


def content_of(path):
    """Arrays, lists and dictionaries that a file holds; rows of a CSV as dictionaries, its comments under "#",
    their lines' numbers under "#line".

    Raises ValueError or OSError for what is none of these; nothing in a file is ever executed: numpy refuses pickles.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(6)
    if start == b"\x93NUMPY":
        return np.load(path)
    if start[:2] == b"PK":
        with zipfile.ZipFile(path) as archive:
            pickled = [name for name in archive.namelist() if name.endswith("data.pkl")]
            if pickled:
                return _Tensors(archive, pickled[0]).load()
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays.files}
    text = path.read_bytes().decode("utf-8-sig")  # some write a byte-order mark first
    try:
        return json.loads(text)
    except ValueError:
        pass
    lines = {n: line for n, line in enumerate(text.splitlines(), start=1) if line.strip()}
    if lines and next(iter(lines.values())).lstrip().startswith("{"):
        return [_record(n, line) for n, line in lines.items()]
    rows = {n: line for n, line in lines.items() if not line.startswith("#")}
    columns = next(iter(rows.values()), "").split(",")
    if len(columns) > 1 and all(name and name == name.strip() and ":" not in name for name in columns):  # else prose
        return _table(rows, " ".join(line for n, line in lines.items() if n not in rows))
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError("it is neither numpy, torch, JSON, YAML nor CSV") from None


def _record(number: int, line: str):
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from None


def _table(rows: dict[int, str], comments: str) -> list[dict]:
    """Of lines by number, the first of which names the columns."""
    columns, *records = csv.reader(rows.values())
    found = []
    for number, fields in zip(list(rows)[1:], records, strict=True):
        if len(fields) < len(columns):
            raise ValueError(f"line {number} is cut off: it has {len(fields)} of {len(columns)} columns")
        found.append({**dict(zip(columns, fields, strict=False)), "#": comments, "#line": number})
    return found


class _Tensors(pickle.Unpickler):
    """What torch.save wrote, with tensors as numpy arrays: only the names that tensors are made of are known.

    The format: a zip archive of data.pkl and a file of raw bytes for each storage (pytorch/torch/serialization.py).
    """

    def __init__(self, archive: zipfile.ZipFile, pickled: str):
        super().__init__(archive.open(pickled))
        self._archive, self._folder = archive, pickled.removesuffix("data.pkl")

    def persistent_load(self, about):
        _, kind, key, _, _ = about
        return np.frombuffer(self._archive.read(f"{self._folder}data/{key}"), kind)

    def find_class(self, module, name):
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilt
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise ValueError(f"it holds {module}.{name}, which is no tensor of numbers")


def _rebuilt(storage, offset, shape, strides, *_):
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if min((offset, *shape, *strides)) < 0 or (0 not in shape and last >= len(storage)):
        raise ValueError(f"a tensor of {list(shape)} is larger than what is stored of it")
    steps = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps).copy()
