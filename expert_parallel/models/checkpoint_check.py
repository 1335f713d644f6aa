"""Checkpoint check: a folder's safetensors files against its configuration and index, without reading weights.

What is right is what mlx-lm's own strict load takes; the headers say the rest.
"""

from __future__ import annotations

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoint.opened import Checkpoint
from ..checkpoint.tensors import index_problem, read_header
from .configurations import Configuration
from .lazy import build_model
from .memory import array_bytes


def check_checkpoint(configuration: Configuration) -> dict:
    """{"ok", "problems": [lines], "num_files", "num_tensors", "bytes_on_disk", "bytes_loaded", "bytes_predicted"}.

    Bytes are those of tensors, without the files' headers; as loaded by mlx-lm, and as the configuration alone would
    have it, None where that is not known. Raises ValueError where there is nothing to check.
    """
    if not configuration.has_weights:
        raise ValueError(f"model {configuration.name}: there are no model*.safetensors to check")
    folder, problems, tensors = configuration.folder, [], {}
    # 1. Every file by itself.
    files = sorted(folder.glob("model*.safetensors"))
    for file in files:
        try:
            tensors |= read_header(file)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    # 2. All of them together, as mlx-lm takes them; what a damaged file would have held is not called missing.
    predicted, loaded = _built(configuration), None
    if not problems:
        try:
            loaded = dict(tree_flatten(Checkpoint(folder).model.parameters()))
            problems += _misread(loaded, dict(tree_flatten(predicted.parameters())) if predicted else {})
        except (ValueError, OSError) as error:
            problems.append(str(error))
        index = index_problem(folder, tensors)
        problems += [index] if index and index not in problems else []
    return {
        "source": "measured on the files' headers",
        "ok": not problems,
        "problems": problems,
        "num_files": len(files),
        "num_tensors": len(tensors),
        "bytes_on_disk": sum(tensor.nbytes for tensor in tensors.values()),
        "bytes_loaded": loaded and array_bytes(loaded),
        "bytes_predicted": predicted and array_bytes(predicted),
    }


def _built(configuration):
    try:
        return build_model(configuration)
    except ValueError:  # the strict load says why
        return None


def _misread(loaded: dict, predicted: dict) -> list[str]:
    """Arrays that hold whole numbers where the model wants floating point, or the other way round."""
    return [
        f"{name} is {array.dtype}, the configuration makes it {predicted[name].dtype}"
        for name, array in loaded.items()
        if name in predicted
        and mx.issubdtype(array.dtype, mx.floating) != mx.issubdtype(predicted[name].dtype, mx.floating)
    ]
