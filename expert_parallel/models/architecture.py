"""Architecture: what is in a Mixture-of-Experts model, layer by layer, from a lazy one.

Dimensions: L MoE layers, E experts, k chosen per token, H hidden.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from ..checkpoint.finding import in_a_line
from ..checkpoint.opened import Checkpoint
from ..layers import MoELayer, expert_tensors, hidden_size, moe_layers, twin
from ..projection.step import Demand
from ..ranks.hybrid import shard_rest
from ..trials import why_not_reduce
from .configurations import Configuration
from .lazy import build_model
from .memory import ModelBytes, array_bytes, dtype_name, model_bytes, stored_as
from .parts import CacheEntry, Part, attention_of, cache_entries, parts_of, try_a_token


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    attention  its kind, e.g. "full, 32 heads (4 kv)"
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
    gathers        MoE layers whose blocks cannot sum their answers over ranks: k times the traffic; found by trial
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
    cache: list[CacheEntry]
    model: nn.Module = field(repr=False)
    gathers: int = 0

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
        whole, experts, idle = self.whole, self.experts, self.num_experts - self.chosen
        return Part(
            whole.parameters - experts.parameters // self.num_experts * idle,
            whole.bytes - experts.bytes // self.num_experts * idle,
        )

    @property
    def read_per_token(self) -> Part:
        """As `active`, without the embedding table, of which one row is read: what decoding must move."""
        table = self.outside["embeddings"] if "head" in self.outside else Part()
        return self.active + Part(-table.parameters, -table.bytes)

    @cached_property
    def demand(self) -> Demand:
        """For `projection`."""
        read, chosen = self.read_per_token, self.chosen
        moe = [layer.parts["experts"] for layer in self.layers if layer.moe]
        parameters = np.array([part.parameters // self.num_experts for part in moe])
        return Demand(
            num_layers=len(self.layers),
            hidden=self.hidden,
            chosen=chosen,
            num_experts=self.num_experts,
            expert_bytes=self.bytes.expert_bytes,
            expert_parameters=parameters,
            rest_bytes=read.bytes - int(self.bytes.expert_bytes.sum()) * chosen,
            rest_parameters=read.parameters - int(parameters.sum()) * chosen,
            head_parameters=self.outside.get("head", self.outside["embeddings"]).parameters,
            cache_per_token=self.cache_per_token,
            windows=tuple((entry.per_token, entry.limit) for entry in self.cache if entry.limit),
            attention=tuple((l.width, l.cache[0].limit if l.cache else None) for l in self.layers if l.width),
            gathers=self.gathers,
        )

    def cache_bytes_at(self, tokens: int) -> int:
        return sum(entry.bytes_at(tokens) for entry in self.cache)

    @property
    def cache_per_token(self) -> int:
        """Bytes that each further token adds to a short context."""
        return sum(entry.per_token for entry in self.cache)


def describe(configuration: Configuration, bits=None, group_size=None, mode="affine") -> Architecture:
    """Look at a configuration's model: the one in its folder, as mlx-lm would load it, or one built without weights.

    bits, group_size, mode  as for `build_model`, whose errors it raises; with bits the folder's weights are not asked
    """
    model = None
    if bits is None and configuration.has_weights:
        with suppress(ValueError, OSError):  # damaged files: checkpoint_check.py says so; there is the configuration
            model = Checkpoint(configuration.folder).model
    return describe_model(model or build_model(configuration, bits, group_size, mode), configuration.name)


def describe_model(model: nn.Module, name: str = "") -> Architecture:
    """Look at a lazy or loaded model of mlx-lm. ValueError where it cannot read a token."""
    try:
        token = try_a_token(model)
    except Exception as error:
        raise ValueError(f"{name} cannot read a single token in mlx-lm: {in_a_line(error)}") from None
    parts, moe = parts_of(model, token), moe_layers(model)
    numbers = [found.number for found in moe]
    layers = []
    for number, layer in enumerate(model.layers):
        attention, width, cache = attention_of(layer, token, number)
        layers.append(Layer(number, number in numbers, attention, parts[number], width, cache))
    return Architecture(
        name=name,
        model_type=model.model_type,
        hidden=hidden_size(moe[0].experts),
        chosen=token.chosen,
        quantisation=stored_as(model),
        bytes=model_bytes(model),
        layers=layers,
        outside=parts[None],
        expert_shapes={n: (str(list(a.shape)), dtype_name(a)) for n, a in expert_tensors(moe[0].experts).items()},
        cache=[entry for one in token.cache for entry in cache_entries(one)],
        model=model,
        gathers=layers_that_gather(moe),
    )


def layers_that_gather(moe: list[MoELayer]) -> int:
    """How many of these layers ranks could not `reduce`; blocks of one kind and shape are tried once.

    Weights are not asked for: a copy of the block has 0.01 in all places, for what it adds and how shows so, too.
    """
    found, count = {}, 0
    for layer in moe:
        kind = type(layer.block), tuple((name, a.shape) for name, a in tree_flatten(layer.block.parameters()))
        if kind not in found:
            copy = twin(layer.block)
            filled = tree_map(lambda a: mx.full(a.shape, 0.01 if mx.issubdtype(a.dtype, mx.floating) else 3, a.dtype),
                              copy.parameters())  # fmt: skip
            copy.update(filled)
            found[kind] = why_not_reduce(moe_layers(copy)[0]) is not None
        count += found[kind]
    return count


# --- over devices -----------------------------------------------------------------------------------------


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
    copy = twin(model)
    shard_rest(copy, moe_layers(copy), PretendGroup(num_devices))
    return array_bytes(copy) - sum(array_bytes(layer.experts) for layer in moe_layers(copy))  # without stand-ins


def fullest_device_bytes(weighed: ModelBytes, num_devices: int, rest: int | None = None, redundant: int = 0) -> int:
    """Bytes of the device that holds most: experts and copies cut as evenly as they go, and the rest.

    rest       bytes of everything else on one device; None: replicated whole
    redundant  copies in each layer beyond one of each expert
    """
    slots = -(-(weighed.num_experts + redundant) // num_devices)
    if slots > weighed.num_experts or not 1 <= num_devices <= weighed.num_experts:
        raise ValueError(
            f"{weighed.num_experts} experts and {redundant} copies do not go on {num_devices} devices:"
            f" 1 to {weighed.num_experts} devices, and no device takes two copies of one expert"
        )
    return slots * int(weighed.expert_bytes.sum()) + (weighed.rest if rest is None else rest)


def fewest_devices(weighed: ModelBytes, device_bytes: float, besides: int = 0) -> int | None:
    """The smallest number of devices of a size that holds the model, the rest replicated; None if none does.

    besides  bytes that each device needs on top, e.g. for caches
    """
    numbers = range(1, weighed.num_experts + 1)
    return next((n for n in numbers if fullest_device_bytes(weighed, n) + besides <= device_bytes), None)
