"""Configurations that cannot be: read one, and say in one line which field is wrong and why."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import _get_classes

# Fields that count something, in whatever architecture.
COUNT = re.compile(r"^(num|n)_|_(size|dim|rank|heads|experts|window)$|top_?k$|per_tok(en)?$")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
NEVER_NULL = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
AT_LEAST_ONE = (
    *NEVER_NULL,
    *CHOSEN,
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "attention_chunk_size",
)
# Above these a mistake in writing is sure, and the answer would never come. Expert ids have 16 bits here.
MOST = {"num_hidden_layers": 10_000, **dict.fromkeys(EXPERTS, 65_536)}

# What transformers 5 writes -> what mlx-lm reads.
RENAMED = {"num_experts": "num_local_experts", "rope_theta": "rope_parameters", "num_local_experts": "num_experts"}

STAND_INS = (1, 1.0, [], {}, "linear")


def read_config(path) -> dict:
    """A config.json as a dictionary that names its model_type. ValueError naming the file if it is not that."""
    path = Path(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} cannot be read: its brackets are nested too deeply") from None
    except ValueError as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise ValueError(f"{path} cannot be read: it is not valid JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} cannot be read: it holds no JSON object, but {shown(config)}")
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"{path} names no model_type")
    return config


def shown(value) -> str:
    """A value as JSON, cut where it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def checked_classes(config: dict) -> tuple[type, type]:
    """mlx-lm's (model, arguments) classes of a configuration that passes `check_config`, else a ValueError."""
    try:
        classes = _get_classes(config)
    except Exception:  # a module of mlx-lm that is no architecture raises AttributeError
        kind = config["model_type"]
        raise ValueError(f'mlx-lm does not know model_type "{kind}"; a newer mlx-lm may') from None
    check_config(config, classes[1])
    return classes


def check_config(config: dict, arguments_class) -> None:
    """ValueError naming the field, for what mlx-lm would stumble over later or not at all.

    arguments_class  mlx-lm's dataclass of this architecture: its fields, which are needed, which are yes or no
    """
    objects = dict.fromkeys(("quantization_config", "rope_scaling"), dict | None)
    kinds = {"text_config": dict, **objects, "torch_dtype": str | None, "dtype": str | None}
    for name, kind in kinds.items():
        if name in config and not isinstance(config[name], kind):
            word = "a name" if "dtype" in name else "an object"
            raise ValueError(f"the configuration has {name} = {shown(config[name])}, which is not {word}")
    parameters = inspect.signature(arguments_class).parameters.values()
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in config]
    if missing:
        old = RENAMED.get(missing[0])
        hint = f" (it has {old}, as transformers 5 writes; mlx-lm reads {missing[0]})" if old in config else ""
        raise ValueError(f"the configuration lacks {', '.join(missing)}{hint}")
    for p in parameters:
        needed = p.default is p.empty and p.annotation in (int, "int") and COUNT.search(p.name)
        if needed and not isinstance(config[p.name], int):
            raise ValueError(f"the configuration has {p.name} = {shown(config[p.name])}, which is not a whole number")
        if p.annotation in (bool, "bool") and config.get(p.name) not in (None, True, False):
            raise ValueError(f"the configuration has {p.name} = {shown(config[p.name])}, which is not true or false")
    _check_numbers(config, [p.name for p in parameters])
    _check_numbers(config.get("text_config") or {}, CHOSEN)


def _check_numbers(fields: dict, known) -> None:
    for name, value in fields.items():
        if not COUNT.search(name) or (value is None and name not in NEVER_NULL):
            continue
        low, high = int(name in AT_LEAST_ONE), MOST.get(name, 2**31 - 1)
        for number in (value or [None]) if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, int):
                raise ValueError(f"the configuration has {name} = {shown(value)}, which is not a whole number")
            if not low <= number <= high:
                raise ValueError(f"the configuration has {name} = {shown(value)}, which is not in {low} to {high:,}")

    def first(names):
        return next((n for n in names if isinstance(fields.get(n), int) and fields[n] > 0), None)

    experts, chosen = first(EXPERTS), first(CHOSEN)
    usual = [name for name in CHOSEN if name in known]
    if experts and usual and not chosen:
        raise ValueError(f"the configuration has {experts} = {fields[experts]}, but lacks {usual[0]}")
    if experts and chosen and fields[chosen] > fields[experts]:
        _contradicts(f"{chosen} = {fields[chosen]}, but {experts} = {fields[experts]}")
    hidden, heads, groups = map(fields.get, ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        _contradicts(f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {groups}")
    if (
        isinstance(heads, int)
        and isinstance(hidden, int)
        and hidden % heads
        and not any("head_dim" in n for n in fields)
    ):
        _contradicts(f"hidden_size = {hidden} is not a multiple of num_attention_heads = {heads}, without head_dim")
    kinds, count = fields.get("layer_types"), fields.get("num_hidden_layers")
    if isinstance(kinds, list) and isinstance(count, int) and len(kinds) != count:
        _contradicts(f"layer_types has {len(kinds)} entries, but num_hidden_layers = {count}")


def _contradicts(words: str):
    raise ValueError(f"the configuration contradicts itself: {words}")


def check_quantization(quantization) -> None:
    """ValueError naming what mlx cannot do, of the whole model or of single modules."""
    if not isinstance(quantization, dict):
        raise ValueError(f"the configuration has quantization = {shown(quantization)}, which is not an object")
    if not isinstance(quantization.get("except", []), list):
        raise ValueError(f"quantization_config excepts {shown(quantization['except'])}, which is not a list of modules")
    modules = {f"quantization of {path}": value for path, value in quantization.items() if isinstance(value, dict)}
    for where, fields in {"quantization": quantization, **modules}.items():
        for name in ("bits", "group_size"):
            value = fields.get(name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**16:
                raise ValueError(f"{where} has {name} = {shown(value)}, which is not a whole number of a usual size")
        try:
            weight = mx.zeros((32, 32 * fields["group_size"]))  # lazy, like what comes of it
            mx.quantize(weight, fields["group_size"], fields["bits"], mode=fields.get("mode") or "affine")
        except (ValueError, TypeError) as error:
            said = shown({name: fields[name] for name in ("bits", "group_size", "mode") if name in fields})
            raise ValueError(f"{where} {said} is not possible: {' '.join(str(error).split())[:200]}") from None


def culprit(config: dict, arguments_class, attempt) -> str:
    """' with FIELD = VALUE' for the field without which `attempt(config)` no longer raises; '' if no single one is."""
    defaults = {p.name: p.default for p in inspect.signature(arguments_class).parameters.values()}
    for place in (None, "text_config"):
        fields = config.get(place) or {} if place else config
        of_another_type_first = sorted(fields, key=lambda name: isinstance(fields[name], type(defaults.get(name))))
        for name in of_another_type_first:
            value = fields[name]
            others = {key: fields[key] for key in fields if key != name}
            for changed in (others, *({**others, name: other} for other in STAND_INS)):
                with contextlib.suppress(Exception):
                    attempt({**config, place: changed} if place else changed)
                    return f" with {name} = {shown(value)}"
    return ""
