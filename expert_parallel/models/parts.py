"""Parts: which part of a model an array, a layer or a cache belongs to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, RotatingKVCache

from ..layers import moe_layers

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


def cache_entries(cache) -> tuple[CacheEntry, ...]:
    """Sizes of a cache that has seen one token."""
    if isinstance(cache, CacheList):
        return tuple(entry for inner in cache.caches for entry in cache_entries(inner))
    if isinstance(cache, ArraysCache) or getattr(cache, "keys", None) is None:
        return (CacheEntry(fixed=cache.nbytes),)
    per_token = cache.nbytes // cache.keys.shape[2]
    limit = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
    return (CacheEntry(per_token, limit),)


def parts_of(model, parameters: dict[str, int], num_bytes: dict[str, int]) -> dict[int | None, dict[str, Part]]:
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


def attention_kind(layer, cache) -> str:
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


def attention_width(layer, cache) -> int:
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
