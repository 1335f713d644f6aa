"""Real ranks: each process one device. Installing shards, agreeing, failing together.

Dimensions: N ranks, k experts chosen per token, H hidden, V vocabulary.

    combine="reduce"  the block weighs its own slots, then all ranks sum [..., H]
    combine="gather"  all ranks sum the slot outputs [..., k, H], then the block weighs them:
                      k times the traffic, and right for any architecture
"""

from __future__ import annotations

import hashlib
import json
import os

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from .moe import ExpertShard, MoELayer, check_placement, switch_linears
from .placement import Placement

# --- installing a rank's shards ---------------------------------------------------------------


def can_reduce(block: nn.Module) -> bool:
    """Whether the block sums over ranks by itself, and sums nothing that every rank has whole."""
    return hasattr(block, "sharding_group") and not any("shared" in name for name in block)


def install_shard(layer: MoELayer, shard: ExpertShard, group, combine: str = "auto", rest_sharded: bool = False):
    """Put a rank's shard into its block. ValueError where `reduce` would count something N times."""
    block = layer.block
    hooked = hasattr(block, "sharding_group")
    reducible = hooked if rest_sharded else can_reduce(block)
    if combine == "auto":
        combine = "reduce" if reducible else "gather"
    if combine == "reduce" and not reducible:
        why = "its shared experts are on every rank" if hooked else "its architecture has no hook for it in mlx-lm"
        raise ValueError(f'combine "reduce" is not possible for {layer.path}: {why}; use "gather"')
    if combine == "gather" and rest_sharded and not can_reduce(block):
        raise ValueError(f'{layer.path} has sharded shared experts, whose sum needs combine "reduce"')
    if hooked:
        block.sharding_group = group if combine == "reduce" else None
    shard._gather_group = group if combine == "gather" else None
    layer.experts = shard


def shard_over_ranks(model, placement: Placement, group, combine="auto", attention="replicated") -> nn.Module:
    """Keep on this rank the experts of device number `group.rank()`; in place, returns the model.

    attention  replicated  every rank computes everything that is not an expert
               sharded     attention, dense layers and shared experts by mlx-lm's `shard()`, the
                           rows of the output head by `shard_head`
    """
    layers = check_placement(model, placement)
    if placement.num_devices != group.size():
        raise ValueError(f"the placement is for {placement.num_devices} devices, there are {group.size()} ranks")
    whole = [layer.experts for layer in layers]
    if attention == "sharded":
        shard_rest(model, layers, group)
    for held, layer, experts in zip(placement.held, layers, whole, strict=True):
        shard = ExpertShard.cut(experts, held, group.rank())
        install_shard(layer, shard, group, combine, rest_sharded=attention == "sharded")
    return model


def shard_rest(model: nn.Module, layers: list[MoELayer], group) -> None:
    """Shard all but the routed experts: mlx-lm's own tensor parallelism, with stand-ins for the experts."""
    n = group.size()
    if not hasattr(model, "shard"):
        raise ValueError("mlx-lm cannot shard the attention of this architecture; use --attention replicated")
    for path, module in model.named_modules():
        for name in ("n_heads", "num_heads", "n_kv_heads", "num_key_value_heads"):
            heads = getattr(module, name, n)
            if isinstance(heads, int) and heads % n:
                raise ValueError(
                    f"{path} has {heads} heads ({name}), which do not divide over {n} ranks; use --attention replicated"
                )
    for layer in layers:
        kind = SwitchMLP if isinstance(layer.experts, SwitchMLP) else SwitchGLU
        layer.experts = kind(n, n, 1, bias=any("bias" in linear for _, linear in switch_linears(layer.experts)))
    try:
        model.shard(group)
    except ValueError as error:
        raise ValueError(f"mlx-lm cannot shard the attention over {n} ranks: {error}") from None
    shard_head(model, group)


class ShardedHead(nn.Module):
    """Rows of the output head, V / N on each rank, the last rank's filled up; logits are gathered whole.

    Each logit is computed as in the whole head, so this changes no bit.
    """

    def __init__(self, head: nn.Module, group):
        super().__init__()
        self._group = group
        self._vocabulary = head.weight.shape[0]
        self._share = -(-self._vocabulary // group.size())
        rows = slice(group.rank() * self._share, min((group.rank() + 1) * self._share, self._vocabulary))
        self.part = head
        head.update({name: mx.contiguous(array[rows] + 0) for name, array in head.parameters().items()})

    def __call__(self, x: mx.array) -> mx.array:
        y = self.part(x)
        if y.shape[-1] < self._share:
            y = mx.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, self._share - y.shape[-1])])
        parts = mx.distributed.all_gather(y[None], group=self._group)  # [N, ..., V / N]
        whole = mx.moveaxis(parts, 0, -2).reshape(*y.shape[:-1], -1)
        return whole[..., : self._vocabulary]


def shard_head(model: nn.Module, group) -> None:
    """Spread the rows of `model.lm_head` over ranks, where the model has one."""
    head = getattr(model, "lm_head", None)
    if isinstance(head, (nn.Linear, nn.QuantizedLinear)) and "bias" not in head:
        model.lm_head = ShardedHead(head, group)


# --- agreeing -----------------------------------------------------------------------------------


def start_group(timeout: float, watchdog) -> mx.distributed.Group:
    """This process's group: N ranks under mpirun or mlx.launch, else a group of one."""
    watchdog.limit(timeout, f"the other ranks did not start within {timeout:g} s (--timeout)")
    group = mx.distributed.init()
    launched = int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
    if group.size() != launched and launched > 1:
        raise ValueError(
            f"started as one of {launched} MPI processes, but MLX found no MPI library to join them: "
            "install Open MPI with its development files, or name the library in MLX_MPI_LIBNAME"
        )
    if group.size() > 1:
        addresses = gather_objects(group, watchdog.address())
        if group.rank() > 0:
            watchdog.join(addresses[0])
    watchdog.limit(None)
    return group


def gather_objects(group, value) -> list:
    """The value of every rank, by rank; values are anything that goes into JSON. A collective."""
    if group.size() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8).astype(np.int32)
    lengths = np.array(mx.distributed.all_gather(mx.array([len(data)], dtype=mx.int32), group=group))
    padded = np.zeros((1, int(lengths.max())), dtype=np.int32)
    padded[0, : len(data)] = data
    rows = np.array(mx.distributed.all_gather(mx.array(padded), group=group))
    return [json.loads(row[:n].astype(np.uint8).tobytes()) for row, n in zip(rows, lengths, strict=True)]


class RanksDisagree(ValueError):
    """Some rank stopped or differs; every rank raises this at the same point."""


def agree(group, facts: dict, error: str | None = None) -> None:
    """Stop on every rank unless all have the same facts and none an error. A collective.

    facts  {"placement": ..., "--temp": 0.5}: what must be the same; long ones are compared by hash
    error  this rank's own trouble, so that it does not leave the others waiting
    """
    marks = {name: _short(str(fact)) for name, fact in facts.items()}
    everyone = gather_objects(group, {"marks": marks, "error": error})
    if error:
        raise RanksDisagree(error)
    for rank, other in enumerate(everyone):
        if other["error"]:
            raise RanksDisagree(f"rank {rank} stopped: {other['error']}")
    expected = everyone[0]["marks"]
    for rank, other in enumerate(everyone):
        differing = [name for name in marks if other["marks"].get(name) != expected.get(name)]
        if differing:
            what = [f"{name} ({other['marks'].get(name)}, not {expected.get(name)})" for name in differing]
            raise RanksDisagree(f"rank {rank} has other {', '.join(what)} than rank 0; all ranks stop")


def _short(text: str) -> str:
    return text if len(text) <= 20 else hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def follow_rank_0(group, tokens: mx.array) -> mx.array:
    """Rank 0's sampled tokens, on every rank: no rounding can part the ranks."""
    mine = tokens if group.rank() == 0 else mx.zeros_like(tokens)
    return mx.distributed.all_sum(mine.astype(mx.int32), group=group).astype(tokens.dtype)


def checkpoint_mark(path) -> str:
    """Sizes, headers and samples of the weight files of a checkpoint: differs if the weights do."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(path.glob("model*.safetensors")):
        length = file.stat().st_size
        digest.update(f"{file.name} {length}".encode())
        with file.open("rb") as data:
            header = int.from_bytes(data.read(8), "little")
            digest.update(data.read(min(header, length)))
            for at in np.linspace(8 + header, max(length - 4096, 0), 64, dtype=np.int64):
                data.seek(int(at))
                digest.update(data.read(4096))
    return digest.hexdigest()
