"""Lazy models: from a configuration to mlx-lm's own model with every shape and dtype, and no weights.

mlx evaluates nothing until it must, so a model of any size is built in a fraction of a second
and a few megabytes, and its arrays know how many bytes they would have.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _compressed_tensors_quantization, infer_quant_config, quantize_model

from .config_check import check_quantization, checked_classes, culprit, read_config
from .default_model import SHIPPED
from .moe import moe_layers

BUNDLED = Path(__file__).resolve().parent / "configs"
UNQUANTISED = 16  # bits that stand for the checkpoint's own floating point


@dataclass(frozen=True)
class Configuration:
    """A model's configuration and where it came from.

    published  what its makers say of its size, with the source (bundled models only)
    folder     the checkpoint's folder, if it has one
    """

    name: str
    config: dict
    published: dict = field(default_factory=dict)
    folder: Path | None = None

    @property
    def bundled(self) -> bool:
        return bool(self.published)


def bundled_names() -> list[str]:
    """Names of the models whose configurations come with this package."""
    return sorted(path.stem for path in BUNDLED.glob("*.json"))


def load_configuration(name: str) -> Configuration:
    """By bundled name, folder, path of a config.json, or hub id (its config.json alone is fetched).

    Raises ValueError in one line that says what is wrong and what would help.
    """
    if name == SHIPPED.name and not Path(name).exists():
        name = str(SHIPPED)
    if not name:
        raise ValueError("the model's name is empty: give a folder, a config.json, a hub id or a bundled name")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model {name}: it has no config.json")
        return Configuration(path.resolve().name, read_config(path / "config.json"), folder=path)
    if path.is_file():
        return Configuration(path.resolve().parent.name or path.stem, read_config(path))
    if name.lower() in bundled_names():
        document = json.loads((BUNDLED / f"{name.lower()}.json").read_text())
        published = {"repository": document["repository"], **document["published"]}
        return Configuration(name.lower(), document["config"], published)
    # "models/typo" looks like a hub id, but whoever has a folder "models" here meant that one.
    if name.count("/") == 1 and not name.startswith((".", "~", "/")) and not path.parent.is_dir():
        return Configuration(name, read_config(_fetch_config(name)))
    raise ValueError(
        f"model {name}: no such folder or file, not a hub id such as Qwen/Qwen3-30B-A3B, and not one of the"
        f" bundled configurations: {', '.join(bundled_names())}"
    )


def _fetch_config(repo: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import RepositoryNotFoundError

    with contextlib.suppress(Exception):  # requests, httpx and the hub each raise their own
        return Path(hf_hub_download(repo, "config.json", local_files_only=True))
    reason = "could not be fetched"
    try:
        HfApi().model_info(repo, timeout=5)  # a dead network shows here, at once; a download tries again and again
        return Path(hf_hub_download(repo, "config.json"))
    except RepositoryNotFoundError:
        reason = "the hub has no such model, or not for everybody"
    except Exception:
        pass
    raise ValueError(
        f"model {repo}: its config.json is not in the hub cache and {reason}; without a network"
        f" give a folder, a config.json, or a bundled name: {', '.join(bundled_names())}"
    ) from None


# --- building -----------------------------------------------------------------------------------


def quantization_of(config: dict) -> dict | None:
    """{"bits", "group_size", "mode", ...} that mlx-lm would load this configuration with, or None for floats.

    mlx-lm's own "quantization", with what it says of single modules; else what its loader makes of
    other tools' "quantization_config". Formats that it turns into floats (fp8 blocks) are None.
    """
    if config.get("quantization"):
        return config["quantization"]
    other = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config") or {}
    method = other.get("quant_method")
    if method == "mxfp4":
        return {"group_size": 32, "bits": 4, "mode": "mxfp4", "except": other.get("modules_to_not_convert", [])}
    if method == "mxfp8":
        return {"group_size": 32, "bits": 8, "mode": "mxfp8"}
    if method == "compressed-tensors":
        try:
            return {**_compressed_tensors_quantization(other), "except": other.get("ignore", [])}
        except Exception as error:  # its fields are looked up without being checked
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise ValueError(f"quantization_config of compressed-tensors cannot be read: {reason}") from None
    if method in ("awq", "gptq"):
        return {"group_size": other.get("group_size", 128), "bits": other.get("bits", 4), "mode": "affine"}
    return None


def build_model(config: dict) -> nn.Module:
    """mlx-lm's model of a configuration: lazy, unquantised, in the configuration's floating point.

    Raises ValueError naming the field for a configuration that mlx-lm cannot build, or a dense one.
    """
    kind = config["model_type"]
    model_class, arguments_class = checked_classes(config)

    def built(config):
        model = model_class(arguments_class.from_dict(config))
        model(mx.zeros((1, 1), dtype=mx.int32), cache=make_prompt_cache(model))  # a token, never computed
        return model

    try:
        model = built(config)
    except Exception as error:  # mlx-lm's classes raise whatever their first use of a field raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        # Without its MoE layers much could be built, but that is no remedy.
        field = culprit(config, arguments_class, lambda changed: 1 / len(moe_layers(built(changed))))
        raise ValueError(f'mlx-lm cannot build this "{kind}" configuration{field}: {reason}') from None
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f'this "{kind}" configuration is of a dense model: it has no Mixture-of-Experts layers')
    dtype = config.get("torch_dtype") or config.get("dtype") or (config.get("text_config") or {}).get("dtype")
    dtype = {"float32": mx.float32, "float16": mx.float16}.get(dtype, mx.bfloat16)
    castable = getattr(model, "cast_predicate", lambda _: True)

    def cast(path, array):
        return array.astype(dtype) if castable(path) and mx.issubdtype(array.dtype, mx.floating) else array

    model.update(tree_map_with_path(cast, model.parameters()))
    return model


def quantise(model: nn.Module, config: dict, bits=None, group_size=None, mode="affine", tensors=None) -> nn.Module:
    """Quantise a lazy model in place as mlx-lm would; returns it.

    bits     None: as the configuration says; 16: not at all; else as `mlx_lm.convert` would with these
    tensors  {name: array} of a checkpoint, lazy too: then what is quantised is what they say
    """
    if bits == UNQUANTISED:
        return model
    if bits is None and (quantization := quantization_of(config)) is not None:
        check_quantization(quantization)
    try:
        if bits is not None:
            bare = {k: v for k, v in config.items() if not k.startswith("quantization")}
            with contextlib.redirect_stdout(io.StringIO()):  # it prints the bits per weight
                quantize_model(model, bare, group_size, bits, mode=mode)
        elif quantization is not None:
            _quantise_as_configured(model, quantization, tensors)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"this quantisation is not possible: {' '.join(str(error).split())[:200]}") from None
    return model


def _quantise_as_configured(model, quantization, tensors):
    """As mlx-lm's `load_model`, which asks the checkpoint; without one its usual rules stand in."""
    excepted = quantization.get("except", [])
    usual = getattr(model, "quant_predicate", lambda path, module: True)

    def decide(path, module):
        if path in quantization:
            return quantization[path]
        if not hasattr(module, "to_quantized"):
            return False
        if tensors is not None:
            return infer_quant_config(path, module, tensors) if f"{path}.scales" in tensors else False
        if any(fnmatch.fnmatch(path, pattern) or fnmatch.fnmatch(path, f"{pattern}.*") for pattern in excepted):
            return False
        return module.weight.shape[-1] % quantization["group_size"] == 0 and bool(usual(path, module))

    nn.quantize(
        model,
        group_size=quantization["group_size"],
        bits=quantization["bits"],
        mode=quantization.get("mode", "affine"),
        class_predicate=decide,
    )
    if not any("scales" in module for _, module in model.named_modules()):
        raise ValueError(f"groups of {quantization['group_size']} divide no weight of this model")


def shortened(config: dict, num_layers: int) -> dict:
    """The configuration with its first layers only; lists with an entry per layer are cut too."""
    inner = config if "num_hidden_layers" in config else (config.get("text_config") or {})
    whole = inner.get("num_hidden_layers")
    if whole is None:
        raise ValueError(f'the "{config["model_type"]}" configuration has no num_hidden_layers: it cannot be shortened')
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
