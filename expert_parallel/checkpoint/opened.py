"""Checkpoints: a model's folder, opened once; its model is built without reading a weight.

What mlx-lm's expert arrays [E, ...] are made of says how single rows of them can be read:

    mlx's layout           one tensor [E, ...] for all experts          read rows of it
    Hugging Face's layout  one tensor per expert, stacked by mlx-lm     read the tensors of these experts
    anything else          split, scaled or converted on the way        a whole layer is evaluated and cut
"""

from __future__ import annotations

import io
import math
import re
from collections import defaultdict

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_adapters, load_model, load_tokenizer

from ..layers import expert_tensors, moe_layers
from .finding import classes_of, in_a_line, read_config, resolve_model
from .rows import StoredRows
from .tensors import StoredTensor, checkpoint_tensors, index_problem


def build(folder, where, **how) -> tuple[nn.Module, dict]:
    """(model, config) of mlx-lm's own `load_model`, lazy: no weight is read, shapes, types and bytes are known.

    where  what to name in the one line of the ValueError, which has mlx-lm's reason why it cannot build the model
    """
    try:
        model, config = load_model(folder, lazy=True, **how)
        model(mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(model))  # a token, never computed
    except (Exception, SystemExit) as error:  # whatever an architecture stumbles over; a missing library exits
        raise ValueError(f"{where}: mlx-lm cannot build this model: {in_a_line(error)}") from error
    _check_rope(model, config, where)
    return model, config


def _check_rope(model, config, where):
    """Some of mlx-lm's architectures read rope_theta at top level alone, not in transformers 5's rope_parameters, and
    go on with a default: another model's answer. So what the file says is compared with what the built model uses.
    """
    turns = [module for module in model.modules() if isinstance(getattr(module, "base", None), int | float)]
    bases = sorted({float(module.base) for module in turns})
    for fields in (config, config.get("text_config") or {}):
        said = fields.get("rope_parameters") or {}
        parts = [part for part in (said, *said.values()) if isinstance(part, dict) and part.get("rope_theta")]
        thetas = {float(part["rope_theta"]) for part in parts}
        if parts and bases and not thetas & {*bases}:
            wrong, field = f"rope_theta {sorted(thetas)}, not {bases}", "rope_theta"
        elif said.get("rope_type", "default") != "default" and turns and all(type(m) is nn.RoPE for m in turns):
            wrong, field = f"rope_type {said['rope_type']}, not plain", "rope_scaling"
        else:
            continue
        raise ValueError(
            f"{where}: its rope_parameters say {wrong} as mlx-lm builds this architecture, which reads {field}"
            " at top level: write it there, too, or the answer is not this model's"
        )


class Checkpoint:
    """A model's folder, opened once; no weight is read.

    folder, config  config as mlx-lm's loader leaves it
    model           mlx-lm's, lazy: shapes, types and bytes are known
    layers, experts its MoE layers, and mlx-lm's lazy module of each one's experts
    rest_bytes      of all that is no expert, as stored

    adapter_path       folder of a LoRA adapter of mlx_lm.lora; experts that it adapts are read a whole layer at a time
    trust_remote_code  whether code in the folder may run, as mlx-lm and transformers ask
    Raises ValueError, FileNotFoundError or OSError in one line for what cannot be loaded, a dense model among it.
    """

    def __init__(self, path_or_repo, adapter_path=None, trust_remote_code: bool = False):
        self.folder, self._trusted = resolve_model(path_or_repo), trust_remote_code
        read_config(self.folder / "config.json")
        tensors, arrays = checkpoint_tensors(self.folder), {}
        try:
            how = {"get_model_classes": _noting(arrays), "trust_remote_code": trust_remote_code}
            self.model, self.config = build(self.folder, self.folder / "config.json", **how)
        except ValueError as error:
            raise ValueError(index_problem(self.folder, tensors) or str(error)) from error
        if adapter_path is not None:
            try:
                self.model = load_adapters(self.model, str(adapter_path))
            except Exception as error:  # of missing files, other shapes, ...
                raise ValueError(f"adapter {adapter_path} does not fit this model: {in_a_line(error)}") from None
            self.model.eval()
        del self.model.sanitize  # the instance's; the class has its own
        self.layers = moe_layers(self.model)
        self.rest_bytes = sum(array.nbytes for _, array in tree_flatten(self.model.parameters()))
        self.experts = [layer.experts for layer in self.layers]
        stacked = list(map(expert_tensors, self.experts))
        self._like = [{name: (array.shape, array.dtype) for name, array in each.items()} for each in stacked]
        self._stored = _stored_rows(stacked, arrays, tensors)
        self.rest_bytes -= sum(array.nbytes for each in stacked for array in each.values())

    @property
    def shape(self) -> tuple[int, int]:
        """(L, E)."""
        return len(self.layers), next(iter(self._like[0].values()))[0][0]

    @property
    def reads_rows(self) -> bool:
        """Whether single experts of every layer can be read from the files."""
        return all(self._stored)

    def rows(self, layer: int, dtype: mx.Dtype | None = None) -> StoredRows:
        """The source of MoE layer `layer` (see stores.py), with `dtype` for all that is not packed; None: as stored."""
        stored = self._stored[layer]
        return StoredRows(stored, self._like[layer], None if stored else self.experts[layer], dtype)

    def bytes_to_read(self, layer: int, ids) -> int:
        """Of the files for these experts: their rows, or the whole layer where its layout has none."""
        size = sum(math.prod(shape) * dtype.size for shape, dtype in self._like[layer].values())
        return size // self.shape[1] * len(ids) if self._stored[layer] else size

    def tokenizer(self, extra: dict | None = None):
        """mlx-lm's tokenizer of the folder. FileNotFoundError or ValueError in one line."""
        extra = {**({"trust_remote_code": True} if self._trusted else {}), **(extra or {})}
        known = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken", "*.py")
        if not any(any(self.folder.glob(pattern)) for pattern in known):  # transformers would make up an empty one
            raise FileNotFoundError(f"{self.folder} has no tokenizer: neither tokenizer.json nor another kind")
        try:
            return load_tokenizer(self.folder, extra, eos_token_ids=self.config.get("eos_token_id"))
        except Exception as error:  # transformers raises OSError, ValueError, TypeError, ... for a missing file
            raise ValueError(f"{self.folder} has no tokenizer that can be read: {in_a_line(error)}") from error


def _noting(arrays: dict):
    """mlx-lm's way to a model's classes; the model notes the lazy arrays that its `sanitize` is given."""

    def classes(config):
        model_class, args_class = classes_of(config)

        def make(args):
            model = model_class(args)
            sanitize = getattr(model, "sanitize", dict)

            def sanitize_and_note(weights):
                arrays.update(weights)
                return sanitize(weights)

            model.sanitize = sanitize_and_note
            return model

        return make, args_class

    return classes


def _stored_rows(stacked: list[dict], arrays: dict, tensors: dict) -> list[dict[str, list[StoredTensor]] | None]:
    """By layer {"down_proj.weight": its tensors in the files}, one [E, ...] or E of them; None in any other layout."""
    names = {id(array): [name] for name, array in arrays.items()}
    made = [array for each in stacked for array in each.values() if id(array) not in names]
    names |= zip(map(id, made), _parts_of_stacks(made, arrays), strict=True)

    def stored(array):
        parts = [tensors[name] for name in names[id(array)]]
        return parts if sum(t.nbytes for t in parts) == array.nbytes else None  # float64 is narrowed while it is loaded

    found = [{name: stored(array) for name, array in each.items()} for each in stacked]
    return [each if all(each.values()) else None for each in found]


def _parts_of_stacks(made: list, arrays: dict) -> list[list[str]]:
    """For each lazy array the names of the arrays that it is a stack of, in order, read off the graph of operations.

    [] where anything else was done to their values on the way.
    """
    if not made:
        return []
    # 1. The graph as text: operations have numbers, arrays the names given here.
    graph = io.StringIO()
    parts = {f"part{n}": array for n, array in enumerate(arrays.values())}
    mx.export_to_dot(graph, *made, **parts, **{f"made{n}": array for n, array in enumerate(made)})
    names = dict(zip(parts, arrays, strict=True))
    operation = dict(re.findall(r'(\d+) \[label ="(\w+)"', graph.getvalue()))
    inputs, maker = defaultdict(list), {}
    for source, target in re.findall(r"(\S+) -> (\S+)", graph.getvalue()):
        if target in operation:
            inputs[target].append(source.strip('"'))
        else:
            maker[target.strip('"')] = source

    # 2. A stack is a concatenation of loaded arrays, each with an axis more.
    def part(name):
        if operation[maker[name]] != "ExpandDims":
            return None
        inner = inputs[maker[name]][0]
        return names[inner] if inner in names and operation[maker[inner]] == "Load" else None

    result = []
    for n, array in enumerate(made):
        last = maker.get(f"made{n}")
        found = [part(name) for name in inputs[last]] if operation.get(last) == "Concatenate" else [None]
        fits = all(name and arrays[name].shape == array.shape[1:] for name in found)
        result.append(found if fits else [])
    return result
