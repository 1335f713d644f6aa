"""Reports: tables for people, of the figures that --json saves for programs."""

from __future__ import annotations

import os
import platform

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .placement import Placement

SHADES = " ░▒▓█"


# --- figures ----------------------------------------------------------------------------------


def environment() -> dict:
    """Hardware and versions that every result is to be read with."""
    import mlx_lm

    device = mx.default_device()
    about = mx.device_info()
    name = about.get("device_name") or about.get("architecture") or platform.processor() or platform.machine()
    return {
        "device": "CPU" if device.type == mx.cpu else "GPU",
        "device_name": str(name),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "mlx_lm": mlx_lm.__version__,
        "numpy": np.__version__,
    }


# --- tables -----------------------------------------------------------------------------------


def size(num_bytes: float) -> str:
    """Bytes for people, in decimal units as disks and vendors count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000 or unit == "GB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.2f} {unit}"
        num_bytes /= 1000
    raise AssertionError


def table(title: str, *columns: str, rows=(), names: bool = False) -> Group:
    """A plain table: first column to the left, figures to the right; with `names` two columns of text."""
    result = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=not names)
    for n, column in enumerate(columns):
        justify = "left" if n == 0 or names else "right"
        result.add_column(column, justify=justify, header_style="dim", overflow="fold", no_wrap=names and n == 0)
    for row in rows:
        result.add_row(*map(str, row))
    return Group(Text(title, style="bold"), result)


def what_runs_where(name: str, config: dict, model, placement: Placement, ranks: int, reading, versions) -> Group:
    """Model, types, devices, placement, hardware, versions; `reading` is a loading.ReadReport."""
    dtype = next(
        array.dtype for _, array in tree_flatten(model.parameters()) if mx.issubdtype(array.dtype, mx.floating)
    )
    packed = config.get("quantization") or {}
    weights = f"{packed['bits']}-bit in groups of {packed['group_size']}, " if packed else ""
    counts = placement.held.sum(axis=2)
    held = " to ".join(map(str, sorted({int(counts.min()), int(counts.max())})))
    copies = int(placement.copies.sum()) // placement.num_layers - placement.num_experts
    items = {
        "model": name,
        "MoE layers": f"{placement.num_layers} x {placement.num_experts} experts",
        "dtype": f"{weights}{'the rest ' if packed else ''}{str(dtype).removeprefix('mlx.core.')}",
        "devices": f"{ranks} ranks" if ranks > 1 else f"{placement.num_devices} simulated in one process",
        "placement": f"{placement.strategy}, {held} of {placement.num_experts} experts on each device"
        + (f", {copies} copies a layer" if copies else ""),
        "running on": "{device}, {device_name}, {cores} cores, {system}".format(**versions),
        "read": f"{size(reading.bytes_read_experts + reading.bytes_read_rest)} of files in {reading.seconds:.1f} s",
        "versions": f"mlx {versions['mlx']}, mlx-lm {versions['mlx_lm']}, Python {versions['python']}",
    }
    return facts("What runs where", items)


def facts(title: str, items: dict) -> Group:
    """Name and value, a line each."""
    rows = [(name, value) for name, value in items.items() if value not in (None, "")]
    return table(title, "", "", rows=rows, names=True)


def heat_map(title: str, loads: np.ndarray, row: str = "layer", column: str = "device") -> Group:
    """Loads [rows, columns] as shades, each row against its own mean."""
    loads = np.asarray(loads, dtype=float)
    mean = np.maximum(loads.mean(axis=1, keepdims=True), 1e-12)
    level = np.clip(np.round(loads / mean * 2), 0, 4).astype(int)
    cell = 3 if loads.shape[1] <= 20 else 1
    lines = [
        Text(title, style="bold"),
        Text(f"{row} down, {column} across; blank: under 1/4 of the mean, █: over 7/4"),
    ]
    lines += [Text(f"{r:4d} ") + Text("".join(SHADES[v] * cell for v in level[r])) for r in range(len(loads))]
    return Group(*lines)


def routing_tables(figures: dict, layer_numbers: list[int], most: int = 16) -> list:
    """Tables of `routing_figures`; from `most` layers on only the most skewed ones line by line."""
    whole = figures["all"]
    order = np.argsort(whole["entropy_per_layer"])[:most] if len(layer_numbers) > most else range(len(layer_numbers))
    rows = [
        (
            layer_numbers[l],
            f"#{whole['hottest_expert_per_layer'][l]}",
            f"{whole['hottest_over_mean_per_layer'][l]:.2f}x",
            f"{whole['entropy_per_layer'][l]:.3f}",
            whole["unused_experts_per_layer"][l],
        )
        for l in sorted(int(l) for l in order)
    ]
    note = f", {most} most skewed of {len(layer_numbers)} layers" if len(layer_numbers) > most else ""
    title = f"Routing (measured, {whole['tokens']} tokens, top-{figures['top_k']} of {figures['num_experts']}{note})"
    tables = [table(title, "layer", "hottest expert", "load / mean", "entropy (1 = even)", "never used", rows=rows)]
    phases = [
        (
            name,
            figures[name]["tokens"],
            f"{np.mean(figures[name]['entropy_per_layer']):.3f}",
            f"{np.mean(figures[name]['hottest_over_mean_per_layer']):.2f}x",
            f"{np.mean(figures[name]['unused_experts_per_layer']):.1f}",
        )
        for name in ("prefill", "decode")
        if figures[name]
    ]
    columns = ("phase", "tokens", "entropy", "hottest / mean", "never used")
    return [*tables, table("Routing by phase (means over layers)", *columns, rows=phases)]


def balance_tables(figures: dict, layer_numbers: list[int], most: int = 16) -> list:
    """Tables and a heat map of `balance_figures`."""
    per_layer = figures["balancedness_per_layer"]
    order = np.argsort(per_layer)[:most] if len(per_layer) > most else range(len(per_layer))
    rows = [
        (
            layer_numbers[l],
            f"{per_layer[l]:.3f}",
            f"{figures['imbalance_ratio_per_layer'][l]:.3f}",
            f"{figures['coefficient_of_variation_per_layer'][l]:.3f}",
            f"{figures['min_max_ratio_per_layer'][l]:.3f}",
            f"{figures['fan_out_per_layer'][l]:.2f}",
        )
        for l in sorted(int(l) for l in order)
    ]
    note = f", {most} least balanced of {len(per_layer)} layers" if len(per_layer) > most else ""
    columns = ("layer", "balancedness", "max/mean-1", "std/mean", "min/max", "fan-out")
    summary = {
        "balancedness, mean over layers (SGLang)": f"{figures['balancedness_layers']:.3f}",
        "balancedness, aggregate (vLLM)": f"{figures['balancedness_aggregate']:.3f}",
        "devices touched per token (fan-out)": f"{figures['fan_out']:.2f}"
        + (f" (uniform: {figures['fan_out_if_uniform_modelled']:.2f}, modelled)"
           if "fan_out_if_uniform_modelled" in figures else ""),
    }  # fmt: skip
    for name, phase in figures["phases"].items():
        summary[f"balancedness in {name} ({phase['tokens']} tokens)"] = f"{phase['balancedness_layers']:.3f}"
    words = Text(
        "A device's load: how often its experts were chosen. balancedness: mean / max, 1 is"
        f" even, 1/{len(figures['device_loads'][0])} all on one device. fan-out: devices that a token goes to."
    )
    return [
        Group(table(f"Balance over devices (measured{note})", *columns, rows=rows), words),
        facts("Balance over all layers", summary),
        heat_map("Load per device", figures["device_loads"]),
    ]


def parity_table(figures: dict) -> Group:
    """Of `run_figures.parity_figures`."""
    same = "the same" if figures["tokens_equal"] else "NOT the same"
    items = {
        "tokens": f"{same} ({figures['tokens_compared']} compared)",
        "largest logit difference": f"{figures['max_abs_logit_difference']:.3g}"
        f" ({figures['logits_compared']} compared)",
    }
    return facts("Parity with stock mlx-lm (measured)", items)


def rebalancing_table(figures: dict) -> Group:
    """Of `run_figures.rebalancing_figures`."""
    rows = []
    for look in figures["looks"]:
        row = (look["after_tokens"], look["moves_of_all"] if look["moved"] else "stay")
        if look["moved"]:
            seconds = (look["pause_seconds"], look["pause_seconds_modelled"], look["gain_seconds_modelled"])
            row += (size(look["bytes_of_all"]), *(f"{value:.2f} s" for value in seconds))
            row += tuple(f"{look['since'][name]:.3f}" for name in ("balancedness_unmoved", "balancedness"))
        rows.append(row)
    columns = ("after", "moved", "read", "pause", "predicted", "gain", "unmoved", "as moved")
    side = "" if figures["costs"]["side_by_side"] else ", as if devices ran side by side"
    note = Text(
        "after so many tokens; experts moved, bytes read and pause are measured, predicted pause and gain "
        f"modelled{side}; last, balancedness of the tokens since (measured)"
    )
    return Group(table("Rebalancing", *columns, rows=rows), note)


def memory_tables(figures: dict) -> list:
    """Of `run_figures.memory_figures`."""
    parts = zip(
        figures["experts_per_device_bytes"], figures["rest_per_device_bytes"], figures["per_device_bytes"], strict=True
    )
    rows = [(device, *map(size, part)) for device, part in enumerate(parts)]
    if len(rows) > 16:
        rows = [*rows[:8], ("...", "", "", ""), *rows[-4:]]
    summary = {
        "whole model": f"{size(figures['full_model_bytes'])} in memory, {size(figures['full_model_expert_bytes'])}"
        " of it experts",
        "fullest device": f"{size(max(figures['per_device_bytes']))}: {figures['reduction']:.2f}x less than the whole",
        "experts alone": f"{figures['reduction_of_experts']:.2f}x less",
        "key-value cache": f"{size(figures['kv_cache_bytes'])} on each device besides",
    }
    title = f"Memory per device ({figures['source']})"
    return [table(title, "device", "experts", "the rest", "together", rows=rows), facts("Memory over all", summary)]


def communication_table(figures: dict) -> Group:
    """Of `run_figures.communication_figures`."""
    both, sent = figures["bytes_per_token_by_combine"], figures["ring_bytes_sent_per_token_and_rank"]
    items = {
        "reduce: weighted sums, all-summed": f"{size(both['reduce'])} per token",
        "gather: every slot's output, all-summed": f"{size(both['gather'])} per token",
        f"{figures['combine']} by a ring, sent by each rank": f"{size(sent)} per token",
    }
    if "counted" in figures:
        counted = figures["counted"]
        items["counted at the calls (measured)"] = (
            f"{size(counted['payload_bytes_per_token'])} per token, {counted['calls']} calls in all"
        )
    one = "" if "counted" in figures else "; in one process nothing is sent"
    return facts(f"Communication ({figures['source']}, {figures['value_bytes']}-byte values{one})", items)


def speed_table(figures: dict) -> Group:
    """Speed of the run, and where the time of one token goes."""
    generation, time = figures["generation"], figures["time"]
    spent = max(time["total"], 1e-12)
    stock = figures["parity"] and figures["parity"]["stock_tokens_per_second"]
    items = {
        "prompt": f"{generation['prompt_tokens_per_second']:.1f} tokens/s ({generation['prompt_tokens']} tokens)",
        "generation": f"{generation['tokens_per_second']:.1f} tokens/s ({len(generation['tokens'])} tokens)",
        "generation by stock mlx-lm": f"{stock:.1f} tokens/s" if stock else "",
        "share of time in experts": f"{time['experts'] / spent:.0%} (measured on {time['tokens']} tokens with stops)",
    }
    return facts("Speed (measured)", items)


def rank_table(per_rank: list[dict]) -> Group:
    """What each rank held, computed and waited for."""
    rows = []
    for rank, figures in enumerate(per_rank):
        seconds, slots = figures["seconds"], figures["slots_computed_per_layer"]
        row = (rank, size(figures["expert_bytes"]), size(figures["resident"]["now"]), sum(slots))
        rows.append(
            (
                *row,
                *(f"{1e3 * seconds[part] / seconds['tokens']:.2f}" for part in ("experts", "collectives", "waiting")),
            )
        )
    columns = ("rank", "experts", "process", "slots", "experts ms", "collectives ms", "waiting ms")
    tokens = per_rank[0]["seconds"]["tokens"]
    return table(f"Ranks (measured; milliseconds per token, on {tokens} tokens with stops)", *columns, rows=rows)


def all_tables(figures: dict, layer_numbers: list[int]) -> list:
    """The whole report of `qwen3_expert_parallel.py`, in its order."""
    parts = [parity_table(figures["parity"])] if figures["parity"] else []
    parts += routing_tables(figures["routing"], layer_numbers)
    parts += balance_tables(figures["balance"], layer_numbers)
    parts += [rebalancing_table(figures["rebalancing"])] if figures["rebalancing"] else []
    parts += memory_tables(figures["memory"])
    parts.append(communication_table(figures["communication"]))
    parts += [rank_table(figures["ranks"])] if figures["ranks"] else []
    return [*parts, speed_table(figures)]
