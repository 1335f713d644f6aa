"""Architecture: what is in a Mixture-of-Experts model, layer by layer, from a lazily built one.

Dimensions: L MoE layers, E experts, k chosen per token, H hidden.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, RotatingKVCache, make_prompt_cache

from .lazy_model import Configuration, build_model, quantise
from .memory import ModelBytes, array_bytes, model_bytes
from .moe import MoELayer, moe_layers, switch_linears
from .projection import Demand
from .ranks import shard_rest
from .routing import Recorder

CACHE_STEP = 256  # tokens by which mlx-lm's caches grow


@dataclass(frozen=True)
class Part:
    """Parameters (of the unquantised model) and bytes (as loaded) of a part."""

    parameters: int = 0
    bytes: int = 0

    def __add__(self, other: Part) -> Part:
        return Part(self.parameters + other.parameters, self.bytes + other.bytes)


@dataclass(frozen=True)
class CacheEntry:
    """What a layer's cache takes: bytes per token up to `limit` tokens, and bytes whatever the length."""

    per_token: int = 0
    limit: int | None = None
    fixed: int = 0

    def bytes_at(self, tokens: int) -> int:
        """Bytes allocated for so many tokens; mlx-lm grows by 256."""
        length = math.ceil(tokens / CACHE_STEP) * CACHE_STEP
        return self.fixed + self.per_token * (length if self.limit is None else min(length, self.limit))


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    attention  its kind, e.g. "full, 32 heads, 4 of keys and values"
    width      query heads times head size, 0 where the layer does not attend
    parts      {"attention", "router", "experts", "shared experts", "dense", "other": Part}
    """

    number: int
    moe: bool
    attention: str
    parts: dict[str, Part]
    width: int = 0
    cache: tuple[CacheEntry, ...] = ()

    @property
    def whole(self) -> Part:
        return sum(self.parts.values(), Part())


@dataclass
class Architecture:
    """A model's contents. `bytes` weighs experts and rest; `layers` and `outside` are where they are.

    outside        {"embeddings", "head", "other": Part}, all that is in no layer
    expert_shapes  {"gate_proj.weight": ("[128, 768, 256]", "uint32"), ...} of the first MoE layer
    chosen         k
    model          the lazy model itself
    """

    name: str
    model_type: str
    hidden: int
    chosen: int
    quantisation: str
    bytes: ModelBytes
    layers: list[Layer]
    outside: dict[str, Part]
    expert_shapes: dict[str, tuple[str, str]]
    cache: list[CacheEntry] = field(default_factory=list)
    model: nn.Module | None = field(default=None, repr=False)

    @property
    def num_experts(self) -> int:
        return self.bytes.num_experts

    @property
    def num_moe_layers(self) -> int:
        return len(self.bytes.expert_bytes)

    @property
    def whole(self) -> Part:
        return sum((layer.whole for layer in self.layers), sum(self.outside.values(), Part()))

    @property
    def experts(self) -> Part:
        return sum((layer.parts["experts"] for layer in self.layers if layer.moe), Part())

    @property
    def active(self) -> Part:
        """All but the experts that are not chosen: what model cards call active."""
        return self._less_idle(self.whole)

    @property
    def read_per_token(self) -> Part:
        """As `active`, without the embedding table, of which one row is read: what decoding must move."""
        table = self.outside.get("embeddings", Part()) if "head" in self.outside else Part()
        return self._less_idle(self.whole) + Part(-table.parameters, -table.bytes)

    def _less_idle(self, whole: Part) -> Part:
        idle = self.num_experts - self.chosen
        experts = self.experts
        return whole + Part(
            -experts.parameters // self.num_experts * idle,
            -experts.bytes // self.num_experts * idle,
        )

    @property
    def demand(self) -> Demand:
        """For `projection`."""
        read, chosen = self.read_per_token, self.chosen
        moe = [layer.parts["experts"] for layer in self.layers if layer.moe]
        parameters = np.array([part.parameters // self.num_experts for part in moe], dtype=np.int64)
        return Demand(
            num_layers=len(self.layers),
            hidden=self.hidden,
            chosen=chosen,
            num_experts=self.num_experts,
            expert_bytes=self.bytes.expert_bytes,
            expert_parameters=parameters,
            rest_bytes=read.bytes - int(self.bytes.expert_bytes.sum()) * chosen,
            rest_parameters=read.parameters - int(parameters.sum()) * chosen,
            head_parameters=self.outside.get("head", self.outside.get("embeddings", Part())).parameters,
            cache_per_token=self.cache_per_token,
            windows=tuple((entry.per_token, entry.limit) for entry in self.cache if entry.limit),
            attention=tuple((l.width, l.cache[0].limit if l.cache else None) for l in self.layers if l.width),
        )

    def cache_bytes_at(self, tokens: int) -> int:
        return sum(entry.bytes_at(tokens) for entry in self.cache)

    @property
    def cache_per_token(self) -> int:
        """Bytes that each further token adds to a short context."""
        return sum(entry.per_token for entry in self.cache)


def describe(configuration: Configuration, bits=None, group_size=None, mode="affine") -> Architecture:
    """Build a configuration lazily and look at it. Errors as `build_model` and `quantise`."""
    model = build_model(configuration.config)
    parameters = {path: array.size for path, array in tree_flatten(model.parameters())}
    quantise(model, configuration.config, bits, group_size, mode)
    num_bytes = {path: array.nbytes for path, array in tree_flatten(model.parameters())}
    parts = _parts(model, parameters, num_bytes)
    chosen, cache = _try_a_token(model, configuration.config["model_type"])
    moe = moe_layers(model)
    numbers = [found.number for found in moe]
    aligned = len(cache) == len(model.layers)  # some hybrids keep caches for a part of their layers only
    layers = [
        Layer(
            number,
            number in numbers,
            _attention(layer, cache[number] if aligned else None),
            parts[number],
            _width(layer, cache[number] if aligned else None),
            _cache_entries(cache[number]) if aligned else (),
        )
        for number, layer in enumerate(model.layers)
    ]
    stacked = [
        (f"{name}.{key}", array)
        for name, linear in switch_linears(moe[0].experts)
        for key, array in linear.parameters().items()
    ]
    return Architecture(
        name=configuration.name,
        model_type=configuration.config["model_type"],
        hidden=stacked_hidden(moe[0]),
        chosen=chosen,
        quantisation=_quantisation(model),
        bytes=model_bytes(model),
        layers=layers,
        outside=parts[None],
        expert_shapes={name: (str(list(array.shape)), _dtype(array)) for name, array in stacked},
        cache=[entry for one in cache for entry in _cache_entries(one)],
        model=model,
    )


class PretendGroup:
    """As a group of N ranks to mlx-lm's `shard()`, which asks it only for its size and a rank."""

    def __init__(self, num_ranks: int):
        self._num_ranks = num_ranks

    def size(self) -> int:
        return self._num_ranks

    def rank(self) -> int:
        return 0


def hybrid_rest_bytes(model: nn.Module, num_devices: int) -> int:
    """Bytes on the fullest device of all but the routed experts, when mlx-lm shards that over the devices.

    The model itself stays as it is. Raises ValueError where mlx-lm cannot, e.g. 4 heads over 8 devices.
    """
    copy = _copy_of(model)
    shard_rest(copy, moe_layers(copy), PretendGroup(num_devices))
    stand_ins = sum(array_bytes(layer.experts) for layer in moe_layers(copy))
    return array_bytes(copy) - stand_ins


def _copy_of(part):
    """A module tree again, sharing its arrays."""
    if isinstance(part, nn.Module):
        copy = type(part).__new__(type(part))
        copy.__dict__.update(part.__dict__)
        dict.update(copy, {name: _copy_of(child) for name, child in part.items()})
        return copy
    if isinstance(part, list | tuple):
        return type(part)(map(_copy_of, part))
    return {name: _copy_of(child) for name, child in part.items()} if isinstance(part, dict) else part


# --- looking at a model -----------------------------------------------------------------------


def _try_a_token(model, kind: str):
    """(k, cache) of a forward pass over one token that is built and never computed."""
    layers, asked = moe_layers(model), []
    originals = [layer.experts for layer in layers]
    cache = make_prompt_cache(model)
    try:
        for layer in layers:
            layer.experts = Recorder(layer.experts, lambda indices: asked.append(indices.shape[-1]))
        model(mx.zeros((1, 1), dtype=mx.int32), cache=cache)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise ValueError(f'this "{kind}" configuration cannot read a single token in mlx-lm: {reason}') from None
    finally:
        for layer, experts in zip(layers, originals, strict=True):
            layer.experts = experts
    return max(asked), cache


def _cache_entries(cache) -> tuple[CacheEntry, ...]:
    """Sizes of a cache that has seen one token."""
    if isinstance(cache, CacheList):
        return tuple(entry for inner in cache.caches for entry in _cache_entries(inner))
    if isinstance(cache, ArraysCache) or getattr(cache, "keys", None) is None:
        return (CacheEntry(fixed=cache.nbytes),)
    per_token = cache.nbytes // cache.keys.shape[2]
    limit = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
    return (CacheEntry(per_token, limit),)


def _parts(model, parameters: dict[str, int], num_bytes: dict[str, int]) -> dict[int | None, dict[str, Part]]:
    """{number of a layer, or None for what is in none: {name of a part: Part}} from sizes by path."""
    modules = dict(model.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    layer_of = {paths[id(layer)]: number for number, layer in enumerate(model.layers)}
    prefix = next(iter(layer_of)).rpartition(".")[0]
    experts = [found.path for found in moe_layers(model)]
    result = {number: {} for number in (None, *layer_of.values())}
    for sizes, as_part in ((parameters, Part), (num_bytes, lambda size: Part(0, size))):
        for path, size in sizes.items():
            depth = prefix.count(".") + 2
            number = layer_of.get(".".join(path.split(".")[:depth])) if path.startswith(f"{prefix}.") else None
            if number is None:
                name = _outside_part(path, modules)
            else:
                name = _layer_part(path, ".".join(path.split(".")[depth:]), experts)
            result[number][name] = result[number].get(name, Part()) + as_part(size)
    return result


def _outside_part(path: str, modules: dict) -> str:
    module = modules.get(path.rpartition(".")[0])
    if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
        return "embeddings"
    return "head" if isinstance(module, nn.Linear | nn.QuantizedLinear) and "head" in path else "other"


def _layer_part(path: str, inner: str, experts: list[str]) -> str:
    """Which part of a layer an array belongs to, by where it is and what mlx-lm calls it."""
    if any(path.startswith(f"{name}.") for name in experts):
        return "experts"
    block = inner.partition(".")[0]
    if "norm" in block:
        return "other"
    if "attn" in block or "attention" in block or block in ("mixer", "mamba", "conv"):
        return "attention"
    if "shared" in inner:
        return "shared experts"
    in_moe_block = any(name.startswith(path[: len(path) - len(inner)] + block + ".") for name in experts)
    return "router" if in_moe_block or "router" in block else "dense"


def _attention(layer, cache) -> str:
    """Kind of attention, from the cache that it asks for and its numbers of heads."""
    module = _attention_module(layer)
    if module is None or isinstance(cache, ArraysCache):
        return "linear or state space" if isinstance(cache, ArraysCache) else "none"
    kind = "full"
    if isinstance(cache, RotatingKVCache):
        kind = f"window of {cache.max_size}"
    elif isinstance(cache, ChunkedKVCache):
        kind = f"chunks of {cache.chunk_size}"
    heads = _first(module, "n_heads", "num_heads", "num_attention_heads")
    if "kv_a_proj_with_mqa" in module:
        return f"{kind} on latents, {heads} heads"
    groups = _first(module, "n_kv_heads", "num_key_value_heads", "num_kv_heads") or heads
    return f"{kind}, {heads} heads, {groups} of keys and values" if heads else kind


def _attention_module(layer):
    children = layer.children().items()
    return next((m for name, m in children if ("attn" in name or "attention" in name) and "norm" not in name), None)


def _width(layer, cache) -> int:
    """Query heads times head size: what the last projection of the attention takes in."""
    module = _attention_module(layer)
    projection = _first(module, "o_proj", "out_proj", "dense", "wo")
    if projection is None or isinstance(cache, ArraysCache):
        return 0
    if "scales" in projection:
        return projection.scales.shape[-1] * projection.group_size
    return projection.weight.shape[-1]


def _first(module, *names):
    return next((value for name in names if (value := getattr(module, name, None))), None)


def stacked_hidden(layer: MoELayer) -> int:
    """H of a MoE layer: what its last projection puts out."""
    linears = dict(switch_linears(layer.experts))
    return (linears["down_proj"] if "down_proj" in linears else linears["fc2"]).output_dims


def _quantisation(model) -> str:
    """In words, from the modules themselves, most common first."""
    kinds = Counter()
    for _, module in model.named_modules():
        if "scales" in module:
            kinds[f"{module.bits}-bit {module.mode}, groups of {module.group_size}"] += array_bytes(module)
        else:
            for array in module.values():
                if isinstance(array, mx.array):
                    kinds[_dtype(array)] += array.nbytes
    return "; ".join(name for name, _ in kinds.most_common(3))


def _dtype(array) -> str:
    return str(array.dtype).rpartition(".")[2]
