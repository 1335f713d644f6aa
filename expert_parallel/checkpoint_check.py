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
from .tensor_files import INDEX, StoredTensor, read_header


@dataclass(frozen=True)
class Problem:
    """Something wrong: which kind, about what, in words.

    kind  file, index, duplicated, missing, extra, shape, type
    """

    kind: str
    name: str
    words: str


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
    headers: dict[str, StoredTensor] = {}
    readable = []
    for path in files:
        try:
            found = read_header(path)
        except (ValueError, OSError) as error:
            problems.append(Problem("file", path.name, str(error).removeprefix(f"{path} ")))
            continue
        readable.append(path)
        for name, header in found.items():
            if name in headers:
                words = f"is in {headers[name].file.name} and in {path.name}; mlx-lm takes one of them, unsaid which"
                problems.append(Problem("duplicated", name, words))
            headers[name] = header
    damaged = {path.name for path in files if path not in readable}
    problems += _against_index(folder, {path.name for path in files}, damaged, headers)
    report = CheckpointReport(problems, len(files), len(headers), sum(h.nbytes for h in headers.values()))
    if len(readable) < len(files):
        return report  # what a damaged file would have held would all be called missing
    _against_model(report, configuration.config, model, readable)
    return report


def _against_index(folder: Path, files: set, damaged: set, headers: dict[str, StoredTensor]) -> list[Problem]:
    """What index and files say differently; of the tensors in damaged files nothing is said again."""
    path = folder / INDEX
    if not path.is_file():
        return []
    try:
        index = json.loads(path.read_text())
        placed = {name: str(file) for name, file in index["weight_map"].items()}
        total = index.get("metadata", {}).get("total_size")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
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
        if file not in files or file in damaged:
            continue
        if name not in headers:
            problems.append(Problem("index", name, f"should be in {file} and is not"))
        elif headers[name].file.name != file:
            problems.append(Problem("index", name, f"should be in {file} and is in {headers[name].file.name}"))
    problems += [Problem("index", name, "is in no line of the index") for name in headers if name not in placed]
    on_disk = sum(header.nbytes for header in headers.values())
    if isinstance(total, int) and total != on_disk and not problems and not damaged:
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
