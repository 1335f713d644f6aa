"""The report of one run: parity with stock mlx-lm, routing, balance, rebalancing. What it takes: cost.py.

Dimensions: T tokens, L MoE layers, E experts, k chosen per token, D devices.
Every function gives tables whose sections make up the run's JSON.
"""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .. import balance as metrics
from ..placement import Placement
from ..trace import RoutingTrace
from .table import MOST_ROWS, Figure, HeatMap, Table, size


def what_runs_where(name: str, config: dict, model, placement: Placement, ranks: int, reading, versions) -> Table:
    """Model, types, devices, placement, hardware, versions; `reading` is a ReadReport."""
    arrays = [array for _, array in tree_flatten(model.parameters())]
    dtype = next(array.dtype for array in arrays if mx.issubdtype(array.dtype, mx.floating))
    packed = config.get("quantization") or {}
    groups = f" in groups of {packed['group_size']}" if packed.get("group_size") else ""
    weights = f"{packed['bits']}-bit{groups}, the rest " if packed else ""
    counts = placement.held.sum(axis=2)
    held = " to ".join(map(str, sorted({int(counts.min()), int(counts.max())})))
    copies = int(placement.copies.sum()) // placement.num_layers - placement.num_experts
    items = {
        "model": name,
        "MoE layers": f"{placement.num_layers} x {placement.num_experts} experts",
        "dtype": f"{weights}{str(dtype).removeprefix('mlx.core.')}",
        "devices": f"{ranks} ranks" if ranks > 1 else f"{placement.num_devices} simulated in one process",
        "placement": f"{placement.strategy}, {held} of {placement.num_experts} experts on each device"
        + (f", {copies} copies a layer" if copies else ""),
        "running on": "{device}, {device_name}, {cores} cores, {system}".format(**versions),
        "read": f"{size(reading.bytes_read_experts + reading.bytes_read_rest)} of files in {reading.seconds:.1f} s",
        "versions": f"mlx {versions['mlx']}, mlx-lm {versions['mlx_lm']}, Python {versions['python']}",
    }
    experts = Figure("experts_per_device", None, counts.tolist())
    facts = [Figure(None, label, text) for label, text in items.items()]
    about = {"strategy": placement.strategy, "devices": placement.num_devices, "ranks": ranks}
    facts += [Figure(key, None, value) for key, value in about.items()]
    return Table("What runs where", [*facts, experts], "placement", facts=True)


def parity(logits: mx.array, tokens: list[int], stock_logits: mx.array, stock_tokens: list[int], stock_speed) -> Table:
    """Whether stock mlx-lm says the same: tokens of the run, logits [T, V] over prompt and answer."""
    count = len(stock_tokens)
    difference = mx.abs(stock_logits.astype(mx.float32) - logits.astype(mx.float32)).max().item()

    def same(equal):
        return f"{'the same' if equal else 'NOT the same'} ({count} compared)" if count else "none to compare"

    figures = [
        Figure("tokens_equal", "tokens", tokens == stock_tokens, same),
        Figure("tokens_compared", None, count),
        Figure(
            "max_abs_logit_difference", "largest logit difference", difference, f"{{:.3g}} ({logits.size} compared)"
        ),
        Figure("logits_compared", None, logits.size),
        Figure("stock_tokens_per_second", None, stock_speed),
    ]
    return Table("Parity with stock mlx-lm", figures, "parity", "measured", facts=True)


# --- routing ------------------------------------------------------------------------------------------------


def routing(trace: RoutingTrace, layer_numbers: list[int]) -> list[Table]:
    """Per layer hottest expert, entropy, unused experts; the most skewed layers where there are many; by phase."""
    per_layer, rows, note = _routing_of(trace), None, ""
    if len(layer_numbers) > MOST_ROWS:
        rows = sorted(np.argsort(per_layer[2].value, kind="stable")[:MOST_ROWS].tolist())
        note = f", {MOST_ROWS} most skewed of {len(layer_numbers)} layers"
    top_k = trace.experts.shape[2]
    parts = {"all": trace, "prefill": trace.phase("prefill"), "decode": trace.phase("decode")}
    in_json = {
        name: {"tokens": len(part), **{f.key: f.value for f in _routing_of(part)}} if len(part) else None
        for name, part in parts.items()
    }
    in_json |= {"num_experts": trace.num_experts, "top_k": top_k}
    in_json["dropped_tokens"] = trace.metadata.get("dropped_tokens", 0)
    phases = {name: part for name, part in parts.items() if name != "all" and len(part)}
    means = [[np.mean(figure.value) for figure in _routing_of(part)[1:]] for part in phases.values()]
    by_phase = [
        Figure(None, "phase", list(phases)),
        Figure(None, "tokens", [len(part) for part in phases.values()]),
        Figure(None, "entropy", [mean[1] for mean in means], "{:.3f}"),
        Figure(None, "hottest / mean", [mean[0] for mean in means], "{:.2f}x"),
        Figure(None, "never used", [mean[2] for mean in means], "{:.1f}"),
        *(Figure(key, None, value) for key, value in in_json.items()),
    ]
    about = f"measured, {len(trace)} tokens, top-{top_k} of {trace.num_experts}{note}"
    return [
        Table("Routing", [Figure(None, "layer", layer_numbers), *per_layer], "", about, rows=rows),
        Table("Routing by phase", by_phase, "routing", "measured, means over layers"),
    ]


def _routing_of(part: RoutingTrace) -> list[Figure]:
    loads = part.loads()
    hottest = loads.max(axis=1) / np.maximum(loads.mean(axis=1), 1e-12)
    return [
        Figure("hottest_expert_per_layer", "hottest expert", loads.argmax(axis=1).tolist(), "#{}"),
        Figure("hottest_over_mean_per_layer", "load / mean", hottest.tolist(), "{:.2f}x"),
        Figure("entropy_per_layer", "entropy (1 = even)", metrics.routing_entropy(loads).tolist(), "{:.3f}"),
        Figure("unused_experts_per_layer", "never used", (loads == 0).sum(axis=1).tolist()),
    ]


# --- balance ------------------------------------------------------------------------------------------------


def balance(trace: RoutingTrace, changes: list[tuple[int, Placement]], layer_numbers: list[int]) -> list[Table]:
    """Load of each device over a trace; copies share their expert's load.

    changes  [(tokens before, Placement)], the first from token 0 on
    """
    starts = [tokens for tokens, _ in changes]
    parts = [trace[first:end] for first, end in pairwise([*starts, len(trace)])]
    placements = [placement for _, placement in changes]
    devices = placements[0].num_devices

    def device_loads(parts):
        return sum(each.device_loads(part.loads()) for each, part in zip(placements, parts, strict=True))

    loads = device_loads(parts)
    touched = sum(
        metrics.fan_out(part.experts, each.held) * (len(part) / max(len(trace), 1))
        for each, part in zip(placements, parts, strict=True)
    )
    per_layer = [
        Figure(None, "layer", layer_numbers),
        Figure("balancedness_per_layer", "balancedness", metrics.balancedness_per_layer(loads).tolist(), "{:.3f}"),
        Figure("imbalance_ratio_per_layer", "max/mean-1", metrics.imbalance_ratio(loads).tolist(), "{:.3f}"),
        Figure(
            "coefficient_of_variation_per_layer", "std/mean", metrics.coefficient_of_variation(loads).tolist(), "{:.3f}"
        ),
        Figure("min_max_ratio_per_layer", "min/max", metrics.min_max_ratio(loads).tolist(), "{:.3f}"),
        Figure("fan_out_per_layer", "fan-out", np.asarray(touched).tolist(), "{:.2f}"),
    ]
    note = (
        "A device's load: how often its experts were chosen. balancedness: mean / max, 1 is even,"
        f" 1/{devices} all on one device. fan-out: devices that a token goes to."
    )
    uniform = None
    if int(placements[0].copies.max()) == 1:
        counts = placements[0].held.sum(axis=2).mean(axis=0).round().astype(int)
        uniform = metrics.expected_fan_out(counts, trace.num_experts, trace.experts.shape[2])
    beside = "" if uniform is None else f" (uniform: {uniform:.2f}, modelled)"
    whole = [
        Figure("balancedness_layers", "balancedness, mean over layers (SGLang)", metrics.balancedness(loads), "{:.3f}"),
        Figure(
            "balancedness_aggregate",
            "balancedness, aggregate (vLLM)",
            metrics.balancedness(loads, "aggregate"),
            "{:.3f}",
        ),
        Figure("fan_out", "devices touched per token (fan-out)", float(np.mean(touched)), f"{{:.2f}}{beside}"),
        Figure("fan_out_if_uniform_modelled", None, uniform),
    ]
    phases = {}
    for name in ("prefill", "decode"):
        of_phase = [part.phase(name) for part in parts]
        if tokens := sum(map(len, of_phase)):
            part_loads = device_loads(of_phase)
            value = metrics.balancedness(part_loads)
            whole.append(Figure(None, f"balancedness in {name} ({tokens} tokens)", value, "{:.3f}"))
            aggregate = metrics.balancedness(part_loads, "aggregate")
            phases[name] = {"tokens": tokens, "balancedness_layers": value, "balancedness_aggregate": aggregate}
    whole.append(Figure("phases", None, phases))
    order = np.argsort(per_layer[1].value, kind="stable")[:MOST_ROWS]
    rows = sorted(order.tolist()) if len(layer_numbers) > MOST_ROWS else None
    shades = "layer down, device across; blank: under 1/4 of the mean, █: over 7/4"
    return [
        Table("Balance over devices", per_layer, "balance", "measured", note, rows=rows),
        Table("Balance over all layers", whole, "balance", "measured", facts=True),
        HeatMap("Load per device", [Figure("device_loads", "load", loads.tolist())], "balance", note=shades),
    ]


def rebalancing(figures: dict, changes: list[tuple[int, Placement]], trace: RoutingTrace) -> Table:
    """Looks, moves, pauses; for each move what became of the tokens since, with and without it (measured)."""
    ends = [tokens for tokens, _ in changes[2:]] + [len(trace)]
    moved = [look for look in figures["looks"] if look["moved"]]
    for look, (_, before), (first, after), end in zip(moved, changes, changes[1:], ends, strict=False):
        loads = trace[first:end].loads()
        kept, unmoved = (metrics.balancedness(each.device_loads(loads)) for each in (after, before))
        look["since"] = {"tokens": end - first, "balancedness": kept, "balancedness_unmoved": unmoved}

    def column(label, key, show):
        values = [look.get(key) if look["moved"] else None for look in figures["looks"]]
        return Figure(None, label, values, lambda value: "" if value is None else show(value))

    side = "" if figures["costs"]["side_by_side"] else ", as if devices ran side by side"
    columns = [
        Figure(None, "after", [look["after_tokens"] for look in figures["looks"]]),
        Figure(None, "moved", [look["moves_of_all"] if look["moved"] else "stay" for look in figures["looks"]]),
        column("read", "bytes_of_all", size),
        *(
            column(label, key, "{:.2f} s".format)
            for label, key in (
                ("pause", "pause_seconds"),
                ("predicted", "pause_seconds_modelled"),
                ("gain", "gain_seconds_modelled"),
            )
        ),
        *(
            column(label, "since", lambda since, name=name: f"{since[name]:.3f}")
            for label, name in (("unmoved", "balancedness_unmoved"), ("as moved", "balancedness"))
        ),
    ]
    note = (
        "after so many tokens; experts moved, bytes read and pause are measured, predicted pause and gain"
        f" modelled{side}; last, balancedness of the tokens since (measured)"
    )
    data = [Figure(key, None, value) for key, value in figures.items()]
    data.append(Figure("source", None, "measured; names with modelled in them are not"))
    return Table("Rebalancing", columns + data, "rebalancing", note=note)
