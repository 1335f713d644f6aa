"""Loading: read only the experts that a device holds, and never the whole model at once.

Dimensions: L MoE layers, E experts, D devices.

Single rows come from the files where their layout allows it (opened.py); else one layer at a time is evaluated,
cut and freed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..device.masked import measure_masked
from ..device.trials import quicken
from ..experts import ShardedExperts, check_request, install, is_rank
from ..layers import MoELayer, activation_type, cast, expert_tensors, hidden_size, with_tensors
from ..offload.compress import compress_cold
from ..offload.policies import make_caches
from ..offload.prefetch import read_ahead
from ..offload.store import OnDisk
from ..placement import Placement, contiguous
from ..ranks.hybrid import shard_rest
from ..stores import InMemory, picked
from .opened import Checkpoint
from .rows import OpenFiles


def activation_dtype(dtype=None) -> mx.Dtype | None:
    """dtype of everything that is not packed; None leaves the checkpoint's.

    dtype  None   float32 on the CPU, where anything else is many times slower; the checkpoint's own on a GPU
           "keep" the checkpoint's own
           or float32, bfloat16, float16, as a name or as mlx's dtype
    """
    if dtype is None:
        return mx.float32 if mx.default_device().type == mx.cpu else None
    if dtype == "keep":
        return None
    name = str(dtype).removeprefix("mlx.core.")
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is float32, bfloat16, float16 or keep, got {dtype!r}")
    return getattr(mx, name)


@dataclass
class ReadReport:
    """What one process read of a checkpoint: bytes of tensors, headers not counted; `progress` hears of each.

    seconds  from the first look at the folder to the last byte
    """

    progress: object = None
    total: int = 0
    bytes_read_experts: int = 0
    bytes_read_rest: int = 0
    seconds: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    def add(self, experts: int = 0, rest: int = 0):
        self.bytes_read_experts += experts
        self.bytes_read_rest += rest
        self.seconds = time.perf_counter() - self.began
        if self.progress:
            self.progress(min(self.bytes_read_experts + self.bytes_read_rest, self.total), self.total)


def load_whole(path_or_repo, dtype=None):
    """(model, tokenizer, config) as `mlx_lm.load` gives them, checked first, in `activation_dtype(dtype)`."""
    opened, dtype = Checkpoint(path_or_repo), activation_dtype(dtype)
    check_computable(opened.layers, dtype)
    tokenizer = opened.tokenizer()
    _read_rest(opened.model, (), dtype, ReadReport())
    return opened.model, tokenizer, opened.config


def load_sharded(
    path_or_repo,
    num_devices: int | None = None,
    placement: Placement | str | Path | None = None,
    group=None,
    dtype=None,
    combine: str = "auto",
    attention: str = "replicated",
    streams: str = "auto",
    progress=None,
    tokenizer_config: dict | None = None,
    return_report: bool = False,
    expert_memory=None,
    cache_policy: str = "aging",
    cache_trace=None,
    prefetch: str = "none",
    cold_bits: int | None = None,
    cold_share: float = 0.5,
):
    """(model, tokenizer): the model with its experts spread, reading only what this process holds.

    One process (`group` None or of size 1) builds D simulated devices and reads each row once.
    One of N ranks reads the experts of device number `group.rank()` and all that is no expert.

    path_or_repo  folder, hub id, or a Checkpoint that was opened before and is used up by this
    num_devices   D; where None, what the placement or the group says
    placement     a Placement or a file of one; where None contiguous
    dtype         see `activation_dtype`; packed weights stay as they are
    combine, attention, streams  see `shard_model`
    progress      called as progress(done_bytes, total_bytes)
    return_report a third value, a ReadReport
    expert_memory at most so much for the experts of a device, "4GB" or "25%" of them: the others stay on disk and are
                  read when a token asks for them. None, or more than they take: all are in memory
    cache_policy  which of them stay, see offload/policies.py
    prefetch      none, next-layer or learned: read ahead what the next layer is foretold to want, offload/prefetch.py
    cache_trace   a RoutingTrace of this model, which says what is "pinned" or cold, and from which is "learned"
    cold_bits     so many bits for the `cold_share` of each layer's experts that are least used in the trace; changes
                  the answer, see offload/compress.py
    Raises ValueError, FileNotFoundError or OSError in one line, before anything large is read.
    """
    report, dtype = ReadReport(progress), activation_dtype(dtype)
    opened = path_or_repo if isinstance(path_or_repo, Checkpoint) else Checkpoint(path_or_repo)
    model = opened.model
    placement = _placement(opened, num_devices, placement, group)
    layers, devices = check_request(model, placement, group, combine, attention)
    check_computable(layers, dtype)
    tokenizer = opened.tokenizer(tokenizer_config)
    held, caches = placement.held, None
    if expert_memory is not None:
        empty = [opened.rows(n, dtype).empty(1) for n in range(len(layers))]
        one = np.array([sum(array.nbytes for array in rows.values()) for rows in empty])
        caches = make_caches(held, devices, one, expert_memory, cache_policy, cache_trace, prefetch)
    if cold_bits is not None and cache_trace is None:
        raise ValueError("cold_bits needs a routing trace, which says what is cold")
    if caches and not opened.reads_rows:
        raise ValueError(
            f"{opened.folder}: its experts cannot be read from disk one by one (an adapter, or a layout that mlx-lm"
            " converts): fuse it or convert it with mlx_lm, or leave expert memory out"
        )
    paths = tuple(f"{layer.path}." for layer in layers)
    wanted = [np.flatnonzero(each[devices].any(axis=0) & (caches is None)) for each in held]  # to read, by layer
    report.total = opened.rest_bytes + sum(opened.bytes_to_read(n, ids) for n, ids in enumerate(wanted))

    # 1. All that is no expert; read whole even where only a part of it is kept.
    if attention == "sharded" and is_rank(group):
        shard_rest(model, layers, group)
    _read_rest(model, paths, dtype, report)
    report.bytes_read_rest = opened.rest_bytes
    # 2. Layer by layer the rows of the devices that are here.
    files = OpenFiles()
    for n, (layer, ids) in enumerate(zip(layers, wanted, strict=True)):
        rows = opened.rows(n, dtype)
        rows = rows(ids) if caches is None else rows.opened(files)
        like, opened.experts[n], stores = opened.experts[n], None, {}
        for device in devices:
            mine = np.flatnonzero(held[n, device])
            if caches is None:
                stores[device] = InMemory(like, len(held[n, device]), mine, _of(rows, ids))
            else:
                stores[device] = OnDisk(like, mine, rows, caches[n][device])
        install(layer, ShardedExperts(stores, held[n]), group, combine)
        report.add(experts=opened.bytes_to_read(n, ids))
        del rows, like, stores
    if dtype is not None:
        model.set_dtype(dtype)  # what hangs on the experts' module
    mx.eval(model.parameters())
    mx.clear_cache()
    measure_masked(layers, group)
    if caches and prefetch != "none":
        read_ahead(layers, prefetch, cache_trace)
    if cold_bits is not None:
        compress_cold(model, cache_trace.loads(), cold_share, cold_bits)
    quicken(model, streams, group)
    return (model, tokenizer, report) if return_report else (model, tokenizer)


def check_computable(layers: list[MoELayer], dtype: mx.Dtype | None = None) -> None:
    """ValueError where mlx cannot compute these experts here, found by a trial with one expert of zeros a layer.

    dtype  what everything that is not packed is going to be; None: as it is
    """
    for layer in layers:
        stacked = expert_tensors(layer.experts)
        rows = {name: cast(mx.zeros((1, *array.shape[1:]), array.dtype), dtype) for name, array in stacked.items()}
        x = mx.zeros((1, hidden_size(layer.experts)), activation_type(rows))
        try:
            mx.eval(with_tensors(layer.experts, rows)(x, mx.zeros((1, 1), mx.uint32)))
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"{layer.path}: experts of {x.dtype} cannot be computed here ({error}): load with dtype float32"
            ) from None


def _of(rows, ids):
    """The rows of these experts, read already, as a source."""
    return lambda wanted: picked(rows, np.searchsorted(ids, wanted))


def _placement(opened, num_devices, placement, group):
    if isinstance(placement, str | Path):
        placement = Placement.load(placement, *opened.shape)
    if placement is None:
        wanted = num_devices if num_devices is not None else group.size() if group else None
        if wanted is None:
            raise ValueError("num_devices, a placement or a group is needed to spread the experts")
        placement = contiguous(*opened.shape, wanted)
    if num_devices not in (None, placement.num_devices):
        raise ValueError(f"the placement is for {placement.num_devices} devices, {num_devices} devices are asked for")
    return placement


def _read_rest(model, expert_paths, dtype, report):
    """Evaluate what is still lazy, a tensor at a time, so that only one is ever there in two dtypes."""
    for path, module in model.named_modules():
        if expert_paths and f"{path}.".startswith(expert_paths):
            continue
        for name in [name for name, value in module.items() if isinstance(value, mx.array)]:
            if not name.startswith("_"):
                size = module[name].nbytes
                module[name] = cast(module[name], dtype)
                mx.eval(module[name])
                report.add(rest=size)
    if not expert_paths and dtype is not None:  # arrays in lists, which few architectures have
        model.set_dtype(dtype)
        mx.eval(model.parameters())
