"""Checkpoint check: a folder's safetensors files against its configuration and index, without reading weights.

Only headers are read. What mlx-lm's own `sanitize` makes of the tensors is compared with what its
model wants, tensor by tensor: names, shapes, types, bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx

from .lazy_model import Configuration, build_model, quantise, tensors_of

# safetensors' names of types -> bytes of one value
WIDTHS = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}


@dataclass(frozen=True)
class Problem:
    """Something wrong: which kind, about what, in words.

    kind  file, truncated, index, duplicated, missing, extra, shape, type
    """

    kind: str
    name: str
    words: str


@dataclass(frozen=True)
class Header:
    """Of one tensor in one file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass
class CheckpointReport:
    """Result of `check_checkpoint`; figures count bytes of tensors, without the files' headers."""

    problems: list[Problem]
    num_files: int = 0
    num_tensors: int = 0
    bytes_on_disk: int = 0
    bytes_loaded: int | None = None
    bytes_predicted: int | None = None
    tensors_equal: int = 0

    @property
    def ok(self) -> bool:
        return not self.problems

    def figures(self) -> dict:
        return {"source": "measured on the files' headers", "ok": self.ok, **asdict(self)}


def check_checkpoint(configuration: Configuration) -> CheckpointReport:
    """Everything that is wrong with the checkpoint in `configuration.folder`, not just the first thing.

    Raises ValueError where there is no checkpoint to check or no model to check it against.
    """
    folder = configuration.folder
    files = sorted(folder.glob("model*.safetensors")) if folder else []
    if not files:
        raise ValueError(f"model {configuration.name}: there are no model*.safetensors to check")
    model = build_model(configuration.config)
    problems: list[Problem] = []
    headers: dict[str, Header] = {}
    readable = []
    for path in files:
        found, trouble = read_header(path)
        problems += trouble
        if not trouble:
            readable.append(path)
        for name, header in found.items():
            if name in headers:
                words = f"is in {headers[name].file} and in {path.name}; mlx-lm takes one of them, unsaid which"
                problems.append(Problem("duplicated", name, words))
            headers[name] = header
    problems += _against_index(folder, {path.name for path in files}, headers)
    report = CheckpointReport(problems, len(files), len(headers), sum(h.num_bytes for h in headers.values()))
    if len(readable) < len(files):
        return report  # what a damaged file would have held would all be called missing
    _against_model(report, configuration.config, model, readable)
    return report


def read_header(path: Path) -> tuple[dict[str, Header], list[Problem]]:
    """({name: Header}, problems) of a safetensors file; its weights are not read.

    Format: 8 bytes length of the header, the header in JSON, then the tensors back to back
    (github.com/huggingface/safetensors, README, "Format").
    """
    length = path.stat().st_size
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if length < 8 or size > length - 8:
            return {}, [Problem("truncated", path.name, f"has {length} bytes, its header alone needs {8 + size}")]
        try:
            entries = json.loads(file.read(size))
            entries.pop("__metadata__", None)
            headers = {
                name: Header(path.name, e["dtype"], tuple(e["shape"]), e["data_offsets"][1] - e["data_offsets"][0])
                for name, e in entries.items()
            }
            end = max((e["data_offsets"][1] for e in entries.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return {}, [Problem("file", path.name, "is not a safetensors file: its header is damaged")]
    problems = []
    if length != 8 + size + end:
        state = "is truncated" if length < 8 + size + end else "has bytes too many"
        problems.append(Problem("truncated", path.name, f"{state}: {length:,} bytes instead of {8 + size + end:,}"))
    for name, header in headers.items():
        values = 1
        for dimension in header.shape:
            values *= dimension
        if header.dtype in WIDTHS and values * WIDTHS[header.dtype] != header.num_bytes:
            words = f"{header.dtype} {list(header.shape)} does not take {header.num_bytes:,} bytes"
            problems.append(Problem("file", f"{path.name}: {name}", words))
    return headers, problems


def _against_index(folder: Path, files: set[str], headers: dict[str, Header]) -> list[Problem]:
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        return []
    try:
        index = json.loads(path.read_text())
        placed = dict(index["weight_map"])
        total = index.get("metadata", {}).get("total_size")
    except (ValueError, KeyError, TypeError, AttributeError):
        return [Problem("index", path.name, "is not a weight index")]
    problems = [
        Problem("missing", file, f"is named by the index for {count} tensors and is not there")
        for file, count in Counter(placed.values()).items()
        if file not in files
    ]
    problems += [
        Problem("extra", file, "is not named by the index, but mlx-lm loads it")
        for file in sorted(files - set(placed.values()))
    ]
    for name, file in placed.items():
        if file not in files:
            continue
        if name not in headers:
            problems.append(Problem("index", name, f"should be in {file} and is not"))
        elif headers[name].file != file:
            problems.append(Problem("index", name, f"should be in {file} and is in {headers[name].file}"))
    problems += [Problem("index", name, "is in no line of the index") for name in headers if name not in placed]
    on_disk = sum(header.num_bytes for header in headers.values())
    if isinstance(total, int) and total != on_disk and not problems:
        problems.append(Problem("index", "total_size", f"says {total:,} bytes, the tensors have {on_disk:,}"))
    return problems


def _against_model(report: CheckpointReport, config: dict, model, files: list[Path]) -> None:
    """Compare what mlx-lm makes of the tensors with what its model wants; lazily, nothing is computed."""
    tensors: dict[str, mx.array] = {}
    for path in files:
        tensors |= mx.load(str(path))
    try:
        tensors = model.sanitize(tensors) if hasattr(model, "sanitize") else tensors
    except Exception as error:  # whatever an architecture's sanitize stumbles over
        words = f"mlx-lm cannot take the tensors together: {type(error).__name__}: {str(error)[:120]}"
        report.problems.append(Problem("missing", "sanitize", words))
        return
    try:
        quantise(model, config, tensors=tensors)
    except ValueError as error:
        report.problems.append(Problem("shape", "quantisation", str(error)))
        return
    wanted = tensors_of(model)
    report.bytes_loaded = sum(array.nbytes for array in tensors.values())
    report.bytes_predicted = sum(array.nbytes for array in wanted.values())
    for name, array in wanted.items():
        found = tensors.get(name)
        if found is None:
            report.problems.append(Problem("missing", name, f"{list(array.shape)} is not in the checkpoint"))
        elif found.shape != array.shape:
            words = f"is {list(found.shape)}, the configuration makes it {list(array.shape)}"
            report.problems.append(Problem("shape", name, words))
        elif found.dtype != array.dtype:
            words = f"is {_short(found)}, the configuration makes it {_short(array)}"
            report.problems.append(Problem("type", name, words))
        else:
            report.tensors_equal += 1
    for name, array in tensors.items():
        if name not in wanted:
            report.problems.append(Problem("extra", name, f"{list(array.shape)} is not part of the model"))


def _short(array) -> str:
    return str(array.dtype).rpartition(".")[2]
