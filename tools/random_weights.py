"""Random weights in the layout of a quantised mlx-lm checkpoint, written in bounded memory."""

from __future__ import annotations

import contextlib
import io
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

from expert_parallel.checkpoint.finding import classes_of
from expert_parallel.checkpoint.tensors import INDEX
from expert_parallel.layers import moe_layers

DTYPES = {mx.uint32: "U32", mx.uint8: "U8", mx.int32: "I32", mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32"}
CHUNK = 1 << 23  # values made at a time


@dataclass(frozen=True)
class Plan:
    """A tensor to be written. bits is 0 for one that is not quantised: it gets its initial value."""

    dtype: mx.Dtype
    shape: tuple[int, ...]
    bits: int = 0
    input_dims: int = 0
    initial: mx.array | None = None  # lazy

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


def cut_layers(config: dict, num_layers: int) -> dict:
    """The config with fewer layers; lists with an entry per layer are cut too. ValueError if it has no such field."""
    inner = config if "num_hidden_layers" in config else config.get("text_config", {})
    whole = inner.get("num_hidden_layers")
    if whole is None:
        raise ValueError("this config has no num_hidden_layers: --layers cannot shorten it")
    if not 1 <= num_layers <= whole:
        raise ValueError(f"--layers {num_layers}: the config has 1 to {whole}")
    cut = {k: v[:num_layers] if isinstance(v, list) and len(v) == whole else v for k, v in inner.items()}
    cut["num_hidden_layers"] = num_layers
    return cut if inner is config else {**config, "text_config": cut}


def plan(config: dict, bits: int, group_size: int, seed: int = 0) -> tuple[dict[str, Plan], dict]:
    """Every tensor of the quantised model in order, and its config. Lazy: nothing is computed."""
    config = {k: v for k, v in config.items() if not k.startswith("quantization")}
    mx.random.seed(seed)
    try:
        model_class, args_class = classes_of(config)
        model = model_class(args_class.from_dict(config))
        with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints bits per weight
            model, config = quantize_model(model, config, group_size, bits)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"mlx-lm cannot build a model of this config: {type(error).__name__}: {error}") from error
    moe_layers(model)  # a dense model has nothing to spread, and this says so
    modules, cast = dict(model.named_modules()), getattr(model, "cast_predicate", lambda name: True)
    tensors = {}
    for name, array in tree_flatten(model.parameters()):
        module = modules.get(name.rpartition(".")[0])
        half = mx.issubdtype(array.dtype, mx.floating) and cast(name)
        dtype = mx.bfloat16 if half else array.dtype
        if hasattr(module, "bits") and name.endswith((".weight", ".scales", ".biases")):
            tensors[name] = Plan(dtype, array.shape, module.bits, module.scales.shape[-1] * module.group_size)
        else:
            tensors[name] = Plan(dtype, array.shape, initial=array.astype(dtype))
    return tensors, config


def values(name: str, tensor: Plan, seed: int):
    """The bytes of a tensor, in pieces; they depend on its name and the seed alone.

    Packed weights are random bits, so q is uniform in 0 .. 2^b - 1 with variance (4^b - 1) / 12.
    With scale s and bias -s (2^b - 1) / 2 a weight has mean 0 and deviation s sqrt((4^b - 1) / 12),
    which is set to 1 / sqrt(input_dims): activations neither grow nor vanish.
    """
    module, _, kind = name.rpartition(".")
    if not tensor.bits:
        yield np.array(tensor.initial.reshape(-1).view(mx.uint8))
        return
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(module.encode()), kind == "weight"]))
    count = math.prod(tensor.shape)
    for at in range(0, count, CHUNK):
        number = min(CHUNK, count - at)
        if kind == "weight":
            yield rng.integers(0, 1 << 64, -(-number // 2), dtype=np.uint64).view(np.uint32)[:number]
            continue
        # Scales spread by half around their mean, as those of trained weights do.
        spread = rng.random(number, dtype=np.float32) + 0.5
        scale = spread / math.sqrt(tensor.input_dims * (4**tensor.bits - 1) / 12)
        if kind == "biases":
            scale = scale.astype(ml_dtypes.bfloat16).astype(np.float32) * -(2**tensor.bits - 1) / 2
        yield scale.astype(ml_dtypes.bfloat16)


def split(tensors: dict[str, Plan], max_file_size: int) -> list[dict[str, Plan]]:
    """Tensors by file, in order, each file as full as the limit allows."""
    files, used = [{}], 0
    for name, tensor in tensors.items():
        if files[-1] and used + tensor.nbytes > max_file_size:
            files.append({})
            used = 0
        files[-1][name] = tensor
        used += tensor.nbytes
    return files


def write_weights(folder: Path, tensors: dict[str, Plan], max_file_size: int, seed: int, note=lambda count: None):
    """The safetensors files and their index; a few hundred MB in memory at most. Empties `tensors`."""
    files, index = split(tensors, max_file_size), {}
    total = sum(tensor.nbytes for tensor in tensors.values())
    tensors.clear()
    for number, content in enumerate(files, 1):
        several = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        path = folder / f"model{several}.safetensors"
        with path.open("wb") as file:
            file.write(header_bytes({k: (DTYPES[t.dtype], t.shape, t.nbytes) for k, t in content.items()}))
            for name in list(content):
                index[name] = path.name
                for piece in values(name, content.pop(name), seed):  # popped: a computed value can go again
                    file.write(piece.tobytes())
                    note(piece.nbytes)
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    (folder / INDEX).write_text(json.dumps(document, indent=1) + "\n")


def header_bytes(tensors: dict[str, tuple[str, tuple[int, ...], int]]) -> bytes:
    """What stands before the tensors in a file that holds them in this order: name to (dtype, shape, bytes)."""
    entries, at = {"__metadata__": {"format": "mlx"}}, 0
    for name, (dtype, shape, nbytes) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
