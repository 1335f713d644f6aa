"""Lazy models: from a configuration to mlx-lm's own model with every shape and dtype, and no weights.

mlx evaluates nothing until it must, so a model of any size is built in a fraction of a second and a few megabytes,
and its arrays know how many bytes they would have.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.utils import quantize_model

from ..checkpoint.finding import classes_of, in_a_line
from ..checkpoint.opened import build
from ..layers import cast, moe_layers
from .configurations import Configuration

UNQUANTISED = 16  # bits that stand for the configuration's own floating point


def build_model(configuration: Configuration, bits=None, group_size=None, mode="affine") -> nn.Module:
    """mlx-lm's model of a configuration: lazy, in the configuration's floating point.

    bits  None: quantised as the configuration says, a bundled one that says nothing to 4 bits; 16: not at all;
          else as `mlx_lm.convert` would with these
    Whether it can be built is mlx-lm's answer: ValueError with its reason for one that cannot, or for a dense one.
    """
    config, where = configuration.config, str(configuration.file or f"the configuration {configuration.name}")
    if bits is not None:
        config = {name: value for name, value in config.items() if not name.startswith("quantization")}
    with TemporaryDirectory() as folder:  # mlx-lm's own loader, from a folder without weights
        Path(folder, "config.json").write_text(json.dumps(config))
        model, loaded = build(Path(folder), where, strict=False, get_model_classes=_without_weights)
    moe_layers(model)
    if bits is None and configuration.bundled and not loaded.get("quantization"):
        bits = 4
    try:
        if bits is None:
            _quantise(model, loaded.get("quantization"), config)
        elif bits != UNQUANTISED:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints the bits per weight
                quantize_model(model, {}, group_size, bits, mode=mode)
            _check_packed(model, group_size, mode)
    except Exception as error:  # whatever mlx and mlx-lm stumble over in odd numbers
        raise ValueError(f"{where}: this quantisation is not possible: {in_a_line(error)}") from None
    return _cast(model, config)


def _without_weights(config):
    model_class, args_class = classes_of(config)

    def make(args):
        model = model_class(args)
        model.sanitize = lambda weights: weights  # those of some architectures look for names that are not there
        return model

    return make, args_class


def _quantise(model, quantization: dict | None, config: dict):
    """What mlx-lm's loader would find packed in a checkpoint: by its usual rules, as there is none to look at.

    quantization  as its loader leaves it; what it says of single modules is done
    """
    if not quantization:
        return
    fields = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config") or {}
    fields = fields.get("quantization", fields)
    excepted = [
        name for key in ("modules_to_not_convert", "ignore", "exclude_modules") for name in fields.get(key) or []
    ]
    usual = getattr(model, "quant_predicate", lambda path, module: True)
    group_size, mode = quantization["group_size"], quantization.get("mode", "affine")
    width = _group_of(group_size, mode)

    def decide(path, module):
        if path in quantization or not hasattr(module, "to_quantized") or module.weight.shape[-1] % width:
            return False
        if any(fnmatch.fnmatch(path, pattern) or fnmatch.fnmatch(path, f"{pattern}.*") for pattern in excepted):
            return False
        return bool(usual(path, module))  # other bits than the usual ones would stand in the configuration

    nn.quantize(model, group_size=group_size, bits=quantization["bits"], mode=mode, class_predicate=decide)
    _check_packed(model, group_size, mode)


def _group_of(group_size, mode) -> int:
    """Null is mlx's own for the mode."""
    return group_size or {"affine": 64, "nvfp4": 16}.get(mode, 32)


def _check_packed(model, group_size, mode):
    if not any("scales" in module for _, module in model.named_modules()):
        raise ValueError(f"groups of {_group_of(group_size, mode)} divide no weight of this model")


def _cast(model, config):
    """All floating-point arrays that mlx-lm lets be cast, in place, as the configuration says; bfloat16 without."""
    said = config.get("torch_dtype") or config.get("dtype") or (config.get("text_config") or {}).get("dtype")
    dtype = {"float32": mx.float32, "float16": mx.float16}.get(str(said).removeprefix("torch."), mx.bfloat16)
    castable = getattr(model, "cast_predicate", lambda _: True)
    model.update(tree_map_with_path(lambda path, a: cast(a, dtype) if castable(path) else a, model.parameters()))
    return model


def shortened(config: dict, num_layers: int) -> dict:
    """The configuration with its first layers only; lists with an entry per layer are cut too."""
    inner = config if "num_hidden_layers" in config else (config.get("text_config") or {})
    whole = inner.get("num_hidden_layers")
    if whole is None:
        raise ValueError(f"a {config['model_type']} configuration has no num_hidden_layers: it cannot be shortened")
    cut = {k: v[:num_layers] if isinstance(v, list) and len(v) == whole else v for k, v in inner.items()}
    cut["num_hidden_layers"] = min(num_layers, whole)
    return cut if inner is config else {**config, "text_config": cut}


def fill_randomly(model: nn.Module) -> nn.Module:
    """Give a quantised lazy model weights that mean nothing, for timing; in place, returns it."""
    for _, module in model.named_modules():
        if "scales" not in module:
            continue
        *rows, width = module.weight.shape
        random = mx.random.randint(0, 256, (*rows, 4 * width), mx.uint8)  # of a wider type the lowest bits are 0
        module.weight = random.view(mx.uint32)
        if module.scales.dtype == mx.uint8:
            module.scales = mx.full(module.scales.shape, 118, mx.uint8)  # 2 ** -9
        else:
            scale = 1 / math.sqrt(module.scales.shape[-1] * module.group_size) / 2**module.bits
            module.scales = mx.full(module.scales.shape, scale, module.scales.dtype)
            module.biases = -module.scales * 2 ** (module.bits - 1)
    mx.eval(model.parameters())
    return model
