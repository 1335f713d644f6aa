"""Loading: read only the experts that a device holds, and never the whole model at once.

Dimensions: L MoE layers, E experts, D devices.

Single rows come from the files where their layout allows it (checkpoint.py); else one layer at a
time is evaluated, cut and freed.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from .checkpoint import build_lazily, find_cached, resolve_model, tokenizer_of
from .moe import (
    ExpertShard,
    SimulatedDevices,
    _same_kind,
    check_computable,
    check_placement,
    check_ways,
    moe_layers,
    num_experts,
    switch_linears,
    take_experts,
)
from .placement import Placement, place_experts
from .ranks import install_shard, shard_rest
from .tensor_files import read_rows, read_whole

__all__ = [
    "ReadReport", "activation_dtype", "expert_reader", "find_cached", "load_sharded", "load_whole", "resolve_model",
]  # fmt: skip

# --- dtype ------------------------------------------------------------------------------------------


def activation_dtype(dtype=None) -> mx.Dtype | None:
    """dtype of everything that is not packed; None leaves the checkpoint's.

    dtype  None   float32 on the CPU, the checkpoint's own on a GPU
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


def _as(array, dtype):
    return array.astype(dtype) if dtype is not None and mx.issubdtype(array.dtype, mx.floating) else array


# --- reading ----------------------------------------------------------------------------------------


@dataclass
class ReadReport:
    """What one process read of a checkpoint.

    bytes_read_experts, bytes_read_rest  of tensors, headers not counted
    seconds                              from the first look at the folder to the last byte
    """

    bytes_read_experts: int = 0
    bytes_read_rest: int = 0
    seconds: float = 0.0


def load_whole(path_or_repo, dtype=None, progress=None, tokenizer_config=None):
    """(model, tokenizer, config) as `mlx_lm.load` gives them, checked first, in `activation_dtype(dtype)`."""
    folder = resolve_model(path_or_repo)
    lazy, dtype = build_lazily(folder), activation_dtype(dtype)
    check_computable(moe_layers(lazy.model), dtype)
    tokenizer = tokenizer_of(folder, lazy.config, tokenizer_config)
    total = sum(_stored_bytes(module) for _, module in lazy.model.named_modules())
    _read_rest(lazy.model, (), dtype, _Counter(progress, total))
    return lazy.model, tokenizer, lazy.config


def load_sharded(
    path_or_repo,
    num_devices: int | None = None,
    placement: Placement | str | Path | None = None,
    group=None,
    dtype=None,
    strategy: str = "contiguous",
    combine: str = "auto",
    attention: str = "replicated",
    streams: bool = False,
    progress=None,
    tokenizer_config: dict | None = None,
    return_report: bool = False,
):
    """(model, tokenizer): the model with its experts spread, reading only what this process holds.

    One process (`group` None or of size 1) builds D simulated devices and reads each row once.
    One of N ranks reads the experts of device number `group.rank()` and all that is no expert.

    num_devices   D; where None, what the placement or the group says
    placement     a Placement or a file of one; where None, `strategy` without loads
    dtype         see `activation_dtype`; packed weights stay as they are
    combine, attention, streams  see `shard_model`
    progress      called as progress(done_bytes, total_bytes)
    return_report a third value, a ReadReport
    Raises ValueError, FileNotFoundError or OSError in one line, before anything large is read.
    """
    began, report = time.perf_counter(), ReadReport()
    check_ways(combine, attention)
    group = None if group is None or group.size() == 1 else group
    folder = resolve_model(path_or_repo)
    lazy, dtype = build_lazily(folder), activation_dtype(dtype)
    model = lazy.model
    placement = _placement(model, num_devices, placement, group, strategy)
    layers = check_placement(model, placement)
    check_computable(layers, dtype)
    tokenizer = tokenizer_of(folder, lazy.config, tokenizer_config)

    devices = [group.rank()] if group else list(range(placement.num_devices))
    paths = tuple(f"{layer.path}." for layer in layers)
    experts = [layer.experts for layer in layers]
    rest = sum(_stored_bytes(m) for path, m in model.named_modules() if not f"{path}.".startswith(paths))
    report.bytes_read_rest = total = rest  # read whole even where only a part is kept (attention="sharded")
    for held, stacked, sources in zip(placement.held, experts, lazy.sources, strict=True):
        share = held[devices].any(axis=0).mean() if sources else 1
        total += round(share * _layer_bytes(stacked))
    counter = _Counter(progress, total)

    if group and attention == "sharded":
        shard_rest(model, layers, group)
    lanes = [mx.new_stream(mx.default_device()) for _ in devices] if streams else None
    for layer, held, sources in zip(layers, placement.held, lazy.sources, strict=True):
        read = _read_experts if sources else _cut_experts
        modules, size = read(experts.pop(0), sources, held, devices, dtype)
        shards = [ExpertShard(module, held, device) for device, module in zip(devices, modules, strict=True)]
        if group:
            install_shard(layer, shards[0], group, combine, rest_sharded=attention == "sharded")
        else:
            layer.experts = SimulatedDevices(shards, lanes)
        report.bytes_read_experts += size
        counter.add(size)
    _read_rest(model, paths, dtype, counter)
    report.seconds = time.perf_counter() - began
    return (model, tokenizer, report) if return_report else (model, tokenizer)


def _placement(model, num_devices, placement, group, strategy):
    layers = moe_layers(model)
    if not layers:
        raise ValueError("this model has no Mixture-of-Experts layers: there is nothing to spread")
    shape = (len(layers), num_experts(layers[0].experts))
    if isinstance(placement, (str, Path)):
        placement = Placement.load(placement, *shape)
    if placement is None:
        wanted = num_devices if num_devices is not None else group.size() if group else None
        if wanted is None:
            raise ValueError("num_devices, a placement or a group is needed to spread the experts")
        placement = place_experts(np.zeros(shape), wanted, strategy)
    for count, what in ((num_devices, "devices are asked for"), (group and group.size(), "ranks are running")):
        if count is not None and count != placement.num_devices:
            raise ValueError(f"the placement is for {placement.num_devices} devices, {count} {what}")
    return placement


def _read_experts(experts, sources, held, devices, dtype):
    """(modules, bytes read): a module like `experts` for each device, of rows from the files."""
    wanted = np.flatnonzero(held[devices].any(axis=0))
    modules, size = [_same_kind(experts) for _ in devices], 0
    for (projection, parameter), stored in sources.items():
        like = dict(experts.named_modules())[projection][parameter]
        data = _stored_rows(stored, like, wanted)
        size += data.nbytes
        for device, module in zip(devices, modules, strict=True):
            mine = np.flatnonzero(held[device][wanted])
            rows = _rows_like(like, data if len(mine) == len(wanted) else data[mine], dtype)
            mx.eval(rows)
            dict(module.named_modules())[projection][parameter] = rows
    return modules, size


def expert_reader(path_or_repo, dtype=None):
    """read(layer, expert) -> {projection: {parameter: its row [1, ...]}}, for `moving.move_experts`.

    ValueError where the files' layout holds no single experts.
    """
    folder = resolve_model(path_or_repo)
    lazy, dtype = build_lazily(folder), activation_dtype(dtype)
    if not all(lazy.sources):
        raise ValueError(f"{folder} stores its experts in a layout that single ones cannot be read from")
    likes = [dict(layer.experts.named_modules()) for layer in moe_layers(lazy.model)]

    def read(layer: int, expert: int) -> dict:
        rows = defaultdict(dict)
        for (projection, parameter), stored in lazy.sources[layer].items():
            like = likes[layer][projection][parameter]
            rows[projection][parameter] = _rows_like(like, _stored_rows(stored, like, [expert]), dtype)
        return rows

    return read


def _stored_rows(stored, like, experts) -> np.ndarray:
    """Rows of these experts as bytes, from one tensor for all or from a tensor each."""
    if stored[0].shape == like.shape:
        return read_rows(stored[0], experts)
    return read_whole([stored[expert] for expert in experts])


def _rows_like(like, data: np.ndarray, dtype) -> mx.array:
    return _as(mx.array(data).view(like.dtype).reshape(len(data), *like.shape[1:]), dtype)


def _cut_experts(experts, _, held, devices, dtype):
    """As `_read_experts`, from a whole layer that is evaluated and freed again."""
    modules = []
    for device in devices:
        module = take_experts(experts, np.flatnonzero(held[device]).tolist())
        if dtype is not None:
            module.set_dtype(dtype)
        mx.eval(module.parameters())
        modules.append(module)
    return modules, _layer_bytes(experts)


def _read_rest(model, expert_paths, dtype, counter):
    """Evaluate what is still lazy, a tensor at a time, so that only one is ever there in two dtypes."""
    for path, module in model.named_modules():
        if expert_paths and f"{path}.".startswith(expert_paths):
            continue
        for name in [name for name, value in module.items() if isinstance(value, mx.array)]:
            if not name.startswith("_"):
                size = module[name].nbytes
                module[name] = _as(module[name], dtype)
                mx.eval(module[name])
                counter.add(size)
    if dtype is not None:
        model.set_dtype(dtype)  # arrays in lists, which few architectures have
    mx.eval(model.parameters())
    mx.clear_cache()
    counter.finish()


def _stored_bytes(module) -> int:
    return sum(v.nbytes for k, v in module.items() if isinstance(v, mx.array) and not k.startswith("_"))


def _layer_bytes(experts) -> int:
    return sum(array.nbytes for _, linear in switch_linears(experts) for array in linear.parameters().values())


class _Counter:
    """Passes on (done_bytes, total_bytes)."""

    def __init__(self, progress, total):
        self.progress, self.done, self.total = progress or (lambda done, total: None), 0, total

    def add(self, size):
        self.done += size
        self.progress(min(self.done, self.total), self.total)

    def finish(self):
        self.progress(self.total, self.total)
