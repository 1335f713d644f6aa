"""Parts: which part of a model an array belongs to, from where it is and what a single token shows.

No rule over names of modules: what is handed a cache attends, what has a row for each expert beside them is the
router, what else is beside them is shared.
"""

from __future__ import annotations

import math
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, RotatingKVCache, make_prompt_cache

from ..layers import moe_layers, num_experts
from ..trace import recorders, replaced

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
    limit = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
    return (CacheEntry(cache.nbytes // cache.keys.shape[2], limit),)


@dataclass
class Token:
    """What one token shows that is built and never computed.

    chosen   k
    cache    mlx-lm's prompt cache after it
    attends  {number of a layer: (name of the module in it that was handed a cache, that cache)}
    """

    chosen: int
    cache: list
    attends: dict[int, tuple[str, object]]


def try_a_token(model) -> Token:
    asked, cache, attends = [], make_prompt_cache(model), {}
    known = {id(entry) for entry in cache} | {id(i) for entry in cache for i in getattr(entry, "caches", ())}
    children = {id(m): (n, name) for n, layer in enumerate(model.layers) for name, m in layer.children().items()}

    def noting(original):
        def call(self, *args, **kwargs):
            handed = [value for value in (*args, *kwargs.values()) if id(value) in known]
            if handed and id(self) in children:
                number, name = children[id(self)]
                attends[number] = name, handed[0]
            return original(self, *args, **kwargs)

        return call

    layers = moe_layers(model)
    kinds = {type(m) for layer in model.layers for m in layer.children().values() if isinstance(m, nn.Module)}
    with recorders(layers, [lambda indices: asked.append(indices.shape[-1])] * len(layers)), ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(replaced(kind, {"__call__": noting(kind.__call__)}))
        model(mx.zeros((1, 1), mx.int32), cache=cache)
    return Token(max(asked), cache, attends)


def parts_of(model, token: Token) -> dict[int | None, dict[str, Part]]:
    """{number of a layer, or None for what is in none: {name of a part: Part}}."""
    moe, modules = moe_layers(model), dict(model.named_modules())
    count = num_experts(moe[0].experts)
    paths = {id(module): path for path, module in modules.items()}
    result, inside = {None: {}}, ()
    for number, layer in enumerate(model.layers):
        path = f"{paths[id(layer)]}."
        found = next((m for m in moe if m.path.startswith(path)), None)
        within = [f"{p}.".removeprefix(path) for p in ((found.path, paths[id(found.block)]) if found else ())]
        experts, block = within or ("", "")
        attention, _ = token.attends.get(number, (None, None))
        names = _names_in(layer, experts, block, attention, count)
        result[number], inside = _summed(layer, names), (*inside, path)
    rows = max(m.weight.shape[0] for m in modules.values() if isinstance(m, nn.Embedding | nn.QuantizedEmbedding))

    def name_outside(path):
        owner = modules.get(path.rpartition(".")[0])
        if isinstance(owner, nn.Embedding | nn.QuantizedEmbedding):
            return "embeddings"
        return "head" if isinstance(owner, nn.Linear | nn.QuantizedLinear) and len(owner.weight) == rows else "other"

    result[None] = _summed(model, lambda path: None if path.startswith(inside) else name_outside(path))
    return result


def _names_in(layer, experts: str, block: str, attention: str | None, count: int):
    """A function from an array's path in a layer to the name of its part.

    experts, block  paths of the routed experts and of what routes to them, ending in a dot; "" where there are none
    attention       name of the child that attends;  count  E
    """

    def unit(path):
        """What an array belongs to as a whole: a child of the layer, or of the block within it."""
        inside = block if block and path.startswith(block) else ""
        return inside + path.removeprefix(inside).partition(".")[0]

    units = defaultdict(list)
    for path, array in tree_flatten(layer.parameters()):
        units[unit(path)].append(array)

    def name(path):
        if experts and path.startswith(experts):
            return "experts"
        if attention and path.startswith(f"{attention}."):
            return "attention"
        in_block = block and path.startswith(block)
        matrices = [array for array in units[unit(path)] if array.ndim > 1]
        # A router has a row for each expert, and so has a shared expert of as many channels in some of its matrices.
        rows = {len(array) for array in matrices or units[unit(path)]}
        if experts and rows == {count} and (matrices or in_block):
            return "router"
        if in_block:
            return "shared experts"
        return "dense" if matrices else "other"

    return name


def _summed(module, name_of) -> dict[str, Part]:
    """Parts of a module's arrays by what `name_of` says of their paths; None leaves one out."""
    result, modules = {}, dict(module.named_modules())
    for path, array in tree_flatten(module.parameters()):
        if (part := name_of(path)) is None:
            continue
        owner, parameters = modules.get(path.rpartition(".")[0], {}), array.size
        if "scales" in owner:  # packed: scales and biases are no parameters of the model
            parameters = {"weight": array.size * 32 // owner.bits, "bias": array.size}.get(path.rpartition(".")[2], 0)
        result[part] = result.get(part, Part()) + Part(parameters, array.nbytes)
    return result


def attention_of(layer, token: Token, number: int) -> tuple[str, int, tuple[CacheEntry, ...]]:
    """(kind, width, cache) of a layer's attention; width is query heads times head size, 0 where there are no scores.

    kind  such as "full, 32 heads (4 kv)", from its number of heads and from the cache it is handed
    """
    name, cache = token.attends.get(number, (None, None))
    if name is None:
        return "none", 0, ()
    entries = cache_entries(cache)
    if isinstance(cache, ArraysCache):
        return "linear or state space", 0, entries
    module, cache = layer[name], cache.caches[0] if isinstance(cache, CacheList) else cache
    kind = "full"
    if isinstance(cache, RotatingKVCache):
        kind = f"window of {cache.max_size}"
    elif isinstance(cache, ChunkedKVCache):
        kind = f"chunks of {cache.chunk_size}"
    names = ("n_heads", "num_heads", "num_attention_heads")
    heads = next((value for attribute in names if (value := getattr(module, attribute, None))), None)
    if heads and getattr(cache, "keys", None) is not None:
        groups, latents = cache.keys.shape[1], cache.keys.shape[-1] != cache.values.shape[-1]
        kind += f" on latents, {heads} heads" if latents else f", {heads} heads ({groups} kv)"
    # The last projection gives a token's width again; what it takes in is all heads side by side.
    last = [m for m in module.children().values() if isinstance(m, nn.Linear | nn.QuantizedLinear)][-1:]
    width = sum(m.scales.shape[1] * m.group_size if "scales" in m else m.weight.shape[1] for m in last)
    return kind, width, entries
