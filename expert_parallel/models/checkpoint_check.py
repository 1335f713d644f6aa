"""Checkpoint check: a folder's safetensors files against its configuration and index, without reading weights.

Only headers are read. What mlx-lm's own `sanitize` makes of the tensors is compared with what its model wants, tensor
by tensor: names, shapes, bytes. Of what type the weights are the files say, not the configuration.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import mlx.core as mx

from ..checkpoint.opened import in_a_line
from ..checkpoint.tensors import INDEX, StoredTensor, read_header
from .configurations import Configuration
from .lazy import build_model, quantise, tensors_of


@dataclass
class CheckpointReport:
    """Result of `check_checkpoint`; figures count bytes of tensors, without the files' headers.

    problems  {"kind", "name", "words"}: what is wrong about which file or tensor; kinds are file, index, duplicated,
              missing, extra, shape, type
    """

    problems: list[dict] = field(default_factory=list)
    num_files: int = 0
    num_tensors: int = 0
    bytes_on_disk: int = 0
    bytes_loaded: int | None = None
    bytes_predicted: int | None = None
    tensors_equal: int = 0

    @property
    def ok(self) -> bool:
        return not self.problems

    def add(self, kind: str, name: str, words: str) -> None:
        self.problems.append({"kind": kind, "name": name, "words": words})

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
    model, report = build_model(configuration), CheckpointReport(num_files=len(files))
    headers: dict[str, StoredTensor] = {}
    damaged = set()
    for path in files:
        try:
            found = read_header(path)
        except (ValueError, OSError) as error:
            report.add("file", path.name, str(error).removeprefix(f"{path} "))
            damaged.add(path.name)
            continue
        for name in found.keys() & headers.keys():
            report.add(
                "duplicated", name, f"is in {headers[name].file.name} and in {path.name}; mlx-lm takes one of them"
            )
        headers |= found
    report.num_tensors, report.bytes_on_disk = len(headers), sum(header.nbytes for header in headers.values())
    _against_index(report, folder / INDEX, {path.name for path in files}, damaged, headers)
    if not damaged:  # what a damaged file would have held would all be called missing
        _against_model(report, configuration, model, files)
    return report


def _against_index(report, path: Path, files: set, damaged: set, headers: dict[str, StoredTensor]) -> None:
    """What index and files say differently; of the tensors in damaged files nothing is said again."""
    if not path.is_file():
        return
    try:
        index = json.loads(path.read_text())
        placed = {name: str(file) for name, file in index["weight_map"].items()}
        total = index.get("metadata", {}).get("total_size")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        report.add("index", path.name, "is not a weight index")
        return
    for file, count in Counter(placed.values()).items():
        if file not in files:
            report.add("missing", file, f"is named by the index for {count} tensors and is not there")
    for file in sorted(files - set(placed.values())):
        report.add("extra", file, "is not named by the index, but mlx-lm loads it")
    for name, file in placed.items():
        found = headers[name].file.name if name in headers else "none"
        if file in files - damaged and file != found:
            report.add("index", name, f"should be in {file} and is in {found}")
    for name in headers.keys() - placed.keys():
        report.add("index", name, "is in no line of the index")
    if isinstance(total, int) and total != report.bytes_on_disk and report.ok and not damaged:
        report.add("index", "total_size", f"says {total:,} bytes, the tensors have {report.bytes_on_disk:,}")


def _against_model(report, configuration: Configuration, model, files: list[Path]) -> None:
    """Compare what mlx-lm makes of the tensors with what its model wants; lazily, nothing is computed."""
    tensors: dict[str, mx.array] = {}
    for path in files:
        tensors |= mx.load(str(path))
    try:
        tensors = model.sanitize(tensors) if hasattr(model, "sanitize") else tensors
        quantise(model, configuration, tensors=tensors)
    except Exception as error:  # whatever an architecture's sanitize stumbles over
        report.add("missing", "sanitize", f"mlx-lm cannot take the tensors together: {in_a_line(error)}")
        return
    wanted = tensors_of(model)
    report.bytes_loaded = sum(array.nbytes for array in tensors.values())
    report.bytes_predicted = sum(array.nbytes for array in wanted.values())
    for name, array in wanted.items():
        found = tensors.get(name)
        if found is None:
            report.add("missing", name, f"{list(array.shape)} is not in the checkpoint")
        elif found.shape != array.shape:
            report.add("shape", name, f"is {list(found.shape)}, the configuration makes it {list(array.shape)}")
        elif found.dtype != array.dtype:
            report.add("type", name, f"is {found.dtype}, the other tensors make it {array.dtype}")
        else:
            report.tensors_equal += 1
    for name in tensors.keys() - wanted.keys():
        report.add("extra", name, f"{list(tensors[name].shape)} is not part of the model")
