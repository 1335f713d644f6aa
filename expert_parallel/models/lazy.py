"""Lazy models: from a configuration to mlx-lm's own model with every shape and dtype, and no weights.

mlx evaluates nothing until it must, so a model of any size is built in a fraction of a second
and a few megabytes, and its arrays know how many bytes they would have.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import math
from collections import Counter

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _compressed_tensors_quantization, _get_classes, infer_quant_config, quantize_model

from ..checkpoint.opened import check_rope, in_a_line
from ..checkpoint.tensors import read_header
from ..layers import cast, moe_layers
from .configurations import Configuration

UNQUANTISED = 16  # bits that stand for the checkpoint's own floating point


def quantization_of(config: dict) -> dict | None:
    """{"bits", "group_size", "mode", ...} that mlx-lm would load this configuration with, or None for floats.

    mlx-lm's own "quantization", with what it says of single modules; else what its loader makes of
    other tools' "quantization_config". Formats that it turns into floats (fp8 blocks) are None.
    Raises KeyError, ValueError, ... as mlx-lm's loader would.
    """
    if config.get("quantization"):
        return config["quantization"]
    other = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if not other:
        return None
    if "quant_method" not in other:  # mlx-lm's loader would end in a KeyError
        raise ValueError("quantization_config has no quant_method, and mlx-lm cannot know what it describes")
    method = other["quant_method"]
    if method in ("mxfp4", "mxfp8"):
        return {
            "group_size": 32,
            "bits": int(method[-1]),
            "mode": method,
            "except": other.get("modules_to_not_convert"),
        }
    if method == "compressed-tensors":
        return {**_compressed_tensors_quantization(other), "except": other.get("ignore")}
    if method == "modelopt":
        settings = other.get("quantization", other)
        if settings["quant_algo"] != "NVFP4":
            raise ValueError(
                f"quantization_config: mlx-lm does not read modelopt's quant_algo {settings['quant_algo']}"
            )
        group_size = settings.get("group_size", 16)
        return {"group_size": group_size, "bits": 4, "mode": "nvfp4", "except": settings.get("exclude_modules")}
    if method in ("awq", "gptq"):
        return {"group_size": other.get("group_size", 128), "bits": other.get("bits", 4), "mode": "affine"}
    return None


def build_model(configuration: Configuration) -> nn.Module:
    """mlx-lm's model of a configuration: lazy, unquantised, in the configuration's floating point.

    Whether it can be built is mlx-lm's answer: ValueError with its reason for one that cannot, or a dense one.
    """
    config = configuration.config
    try:
        model_class, arguments_class = _get_classes(config)
        model = model_class(arguments_class.from_dict(config))
        model(mx.zeros((1, 1), dtype=mx.int32), cache=make_prompt_cache(model))  # a token, never computed
    except (Exception, SystemExit) as error:  # whatever the first use of a field raises; a missing library exits
        raise ValueError(f"{_named(configuration)}: mlx-lm cannot build this model: {in_a_line(error)}") from None
    check_rope(model, config, _named(configuration))
    moe_layers(model)
    return cast_model(model, _dtype_of(configuration))


def _dtype_of(configuration) -> mx.Dtype:
    """Floating-point type that most tensors of the files have; without files what the configuration says."""
    known, found = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}, Counter()
    for file in sorted(configuration.folder.glob("model*.safetensors"))[:1] if configuration.folder else []:
        with contextlib.suppress(ValueError):  # a damaged file: the check of the files says so
            found.update(known[tensor.dtype] for tensor in read_header(file).values() if tensor.dtype in known)
    if found:
        return found.most_common(1)[0][0]
    config = configuration.config
    said = config.get("torch_dtype") or config.get("dtype") or (config.get("text_config") or {}).get("dtype")
    return {"float32": mx.float32, "float16": mx.float16}.get(str(said).removeprefix("torch."), mx.bfloat16)


def _named(configuration) -> str:
    return str(configuration.file or f"the configuration {configuration.name}")


def cast_model(model: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """All floating-point arrays that mlx-lm lets be cast, in place; returns the model."""
    castable = getattr(model, "cast_predicate", lambda _: True)
    arrays = tree_map_with_path(lambda path, a: cast(a, dtype) if castable(path) else a, model.parameters())
    model.update(arrays)
    return model


def quantise(
    model: nn.Module, configuration: Configuration, bits=None, group_size=None, mode="affine", tensors=None
) -> nn.Module:
    """Quantise a lazy model in place as mlx-lm would; returns it.

    bits     None: as the configuration says; 16: not at all; else as `mlx_lm.convert` would with these
    tensors  {name: array} of a checkpoint, lazy too: then what is quantised is what they say
    """
    config = configuration.config
    if bits == UNQUANTISED:
        return model
    try:
        if bits is not None:
            bare = {k: v for k, v in config.items() if not k.startswith("quantization")}
            with contextlib.redirect_stdout(io.StringIO()):  # it prints the bits per weight
                quantize_model(model, bare, group_size, bits, mode=mode)
        elif (quantization := quantization_of(config)) is not None:
            _quantise_as_configured(model, quantization, tensors)
    except Exception as error:  # whatever mlx and mlx-lm stumble over in odd numbers
        raise ValueError(f"{_named(configuration)}: this quantisation is not possible: {in_a_line(error)}") from None
    return model


def _quantise_as_configured(model, quantization, tensors):
    """As mlx-lm's `load_model`, which asks the checkpoint; without one its usual rules stand in."""
    excepted = quantization.get("except") or []
    usual = getattr(model, "quant_predicate", lambda path, module: True)
    group_size, mode = quantization["group_size"], quantization.get("mode", "affine")
    width = group_size or {"affine": 64, "nvfp4": 16}.get(mode, 32)  # null: mlx's own for the mode

    def decide(path, module):
        if path in quantization:
            return quantization[path]
        if not hasattr(module, "to_quantized"):
            return False
        if tensors is not None:
            return infer_quant_config(path, module, tensors) if f"{path}.scales" in tensors else False
        if any(fnmatch.fnmatch(path, pattern) or fnmatch.fnmatch(path, f"{pattern}.*") for pattern in excepted):
            return False
        return module.weight.shape[-1] % width == 0 and bool(usual(path, module))

    nn.quantize(model, group_size=group_size, bits=quantization["bits"], mode=mode, class_predicate=decide)
    if not any("scales" in module for _, module in model.named_modules()):
        raise ValueError(f"groups of {width} divide no weight of this model")


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
        module.weight = mx.random.randint(0, 2**31 - 1, module.weight.shape, dtype=mx.uint32)
        if module.scales.dtype == mx.uint8:
            module.scales = mx.full(module.scales.shape, 118, dtype=mx.uint8)  # 2 ** -9
        else:
            scale = 1 / math.sqrt(module.scales.shape[-1] * module.group_size) / 2**module.bits
            module.scales = mx.full(module.scales.shape, scale, dtype=module.scales.dtype)
            module.biases = -module.scales * 2 ** (module.bits - 1)
    mx.eval(model.parameters())
    return model


def tensors_of(model: nn.Module) -> dict[str, mx.array]:
    """{name: array} of all parameters, as a checkpoint of the model names them."""
    return dict(tree_flatten(model.parameters()))
