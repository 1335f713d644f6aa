"""Pictures as matplotlib's Figures, for --plots, --html and notebooks; no global backend is touched.

Dimensions: T tokens, L MoE layers, E experts, k chosen per token, D devices. Colours are cividis, which is as readable
without colour; what bars are made of has patterns besides. Every caption says what was run, and how it is known.
"""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np

from ..failure.planned import in_words
from ..files import written_whole
from ..placing.affinity import coactivation

COLOURS = ("#00224e", "#a59c74", "#fee838")  # the ends of cividis and its middle
MARKERS = "os^Dv<>pXh"  # to be told where colours are not
PATTERNS = ("", "//", "..")
MOST_OVER_MEAN = {"expert": 4, "device": 2}  # of the colour scale


def of_run(document: dict, trace, placement) -> dict:
    """{name: Figure} of a run of the main script.

    document   its JSON (see `table.sections`)
    trace      a RoutingTrace of it;  placement  the one at its end
    """
    ran, memory = document["placement"], document["memory"]
    caption = f"{document['model']['name']}, {len(trace)} tokens, top-{trace.experts.shape[2]} of {trace.num_experts}"
    lost = in_words((document["failures"] or {}).get("losses"))
    on_devices = f"{caption}, {ran['devices']} devices, {ran['strategy']}{lost and f', lost: {lost}'}"
    ranks = document["ranks"] or [{"seconds": document["time"]}]
    figures = {
        "expert_loads": load_map(trace.loads(), "expert", on_devices, held=placement.held),
        "device_loads": load_map(document["balance"]["device_loads"], "device", on_devices),
        "memory": memory_bars(memory, on_devices),
        "time": time_bars([rank["seconds"] for rank in ranks], on_devices),
    }
    if trace.experts.shape[2] > 1:  # else there are no pairs
        figures["coactivation"] = pairs_map(trace.experts, trace.num_experts, caption)
    if document["cache"]:
        figures["hit_rate"] = hit_lines(document["cache"]["budgets"], caption)
    return figures


def of_analysis(document: dict, caption: str = "") -> dict:
    """{name: Figure} of model_analysis.py's JSON; empty where no number of devices holds the model."""
    projection = document["projection"]
    fits = any(row["fits"] for row in projection["devices"])
    return {"speed": speed_lines(projection, caption)} if fits else {}


def load_map(loads, across: str, caption: str = "", source: str = "measured", held=None):
    """Loads [L, E or D] as colours, each layer over its own mean, on a scale that is the same for every run.

    across  what the columns are, "expert" or "device"
    held    bool [L, D, E]: experts stand in the order of the devices that hold them first, with lines between devices
    """
    from matplotlib.patheffects import withStroke

    loads, label, ends = np.asarray(loads, float), across, []
    if held is not None:
        home = held.argmax(axis=1)  # [L, E]
        order = home.argsort(axis=1, kind="stable")
        loads, label = np.take_along_axis(loads, order, axis=1), "expert, in the order of devices"
        ends = [np.searchsorted(np.sort(row), range(1, held.shape[1])) for row in home]
    axes = _axes(
        f"Slots of each {across} over the layer's mean", f"{caption} ({source})", label, "MoE layer", len(loads)
    )
    relative, most = loads / np.maximum(loads.mean(axis=1, keepdims=True), 1e-12), MOST_OVER_MEAN[across]
    image = axes.imshow(relative, aspect="auto", cmap="cividis", vmin=0, vmax=most, interpolation="nearest")
    for layer, lines in enumerate(ends):
        drawn = axes.vlines(lines - 0.5, layer - 0.5, layer + 0.5, colors="white", linewidth=1)
        drawn.set_path_effects([withStroke(linewidth=2, foreground="black")])  # to be told from bright cells
    axes.figure.colorbar(image, ax=axes, extend="max", ticks=range(most + 1), label="1 is even")
    return axes.figure


def pairs_map(experts, num_experts: int, caption: str = ""):
    """How often two experts are chosen together, over what chance gives: [E, E], both summed over layers.

    experts  [T, L, k]; expert e of one layer has nothing to do with that of the next: for one layer give
             `experts[:, [layer]]`. Chance: as many pairs in each layer, each as likely as both its experts are
             chosen often; 1 is no preference. Pairs that chance never gives, an expert with itself or one that
             was not chosen, are masked.
    """
    pairs = coactivation(experts, num_experts)
    often = pairs.sum(axis=2)  # [L, E], times k - 1
    chance = often[:, :, None] * often[:, None] * (1 - np.eye(num_experts))
    chance *= (pairs.sum(axis=(1, 2)) / np.maximum(chance.sum(axis=(1, 2)), 1))[:, None, None]
    together, chance = pairs.sum(axis=0), chance.sum(axis=0)
    over = np.ma.masked_where(chance == 0, together / np.where(chance > 0, chance, 1))
    axes = _axes(
        "Pairs of experts chosen together, over chance", f"{caption} (measured)", "expert", "expert", rows=18, width=7
    )
    image = axes.imshow(over, cmap="cividis", vmin=0, vmax=4, interpolation="nearest")
    label = "1 is chance, all layers together; white: no such pair"
    axes.figure.colorbar(image, ax=axes, extend="max", ticks=range(5), label=label)
    return axes.figure


def memory_bars(memory: dict, caption: str = ""):
    """Bytes of each device, experts, the rest and key-value cache, against the whole model; `memory` of the JSON."""
    parts = {"experts": memory["experts_per_device_bytes"], "the rest": memory["rest_per_device_bytes"]}
    on_each = [memory["kv_cache_bytes"] * (rest > 0) for rest in parts["the rest"]]  # not on lost ones
    parts["key-value cache"] = on_each
    largest = memory["full_model_bytes"]
    power, unit = next((p, u) for p, u in ((9, "GB"), (6, "MB"), (3, "kB"), (0, "B")) if largest >= 10**p or not p)
    axes = _axes("Memory of each device", f"{caption} ({memory['source']})", "device", unit)
    _bars(axes, {name: np.divide(values, 10**power) for name, values in parts.items()})
    axes.axhline(largest / 10**power, color="black", linestyle="--", label="the whole model")
    axes.figure.legend(loc="outside lower center", ncols=4)
    return axes.figure


def time_bars(seconds: list[dict], caption: str = ""):
    """Milliseconds of a token by part, for each rank; `seconds` of each as in the JSON."""
    spent = [
        {**each, "else": each["total"] - each["experts"] - each["collectives"] - each["waiting"]} for each in seconds
    ]
    names = {"experts": "experts", "else": "all else", "collectives": "collectives", "waiting": "waiting"}
    parts = {label: [1e3 * each[name] / each["tokens"] for each in spent] for name, label in names.items()}
    axes = _axes("Time of a token, with a stop after each part", f"{caption} (measured)", "rank", "ms")
    _bars(axes, {label: times for label, times in parts.items() if any(times)})
    axes.figure.legend(loc="outside lower center", ncols=4)
    return axes.figure


def speed_lines(projection: dict, caption: str = ""):
    """Tokens a second of one sequence over numbers of devices, with the bound; `projection` of the analysis' JSON."""
    rows = [row for row in projection["devices"] if row["fits"]]
    labels = {"tokens_per_second": "expert parallel", "tokens_per_second_if_even": "were its load even"}
    labels["hybrid_tokens_per_second"] = "attention sharded, too"
    setting = f"{projection['link']}, {projection['context']} tokens, {projection['routing']}"
    axes = _axes("Decoding one sequence", f"{caption}, {setting} routing (modelled)", "devices", "tokens/s")
    styles = zip(labels.items(), ("o-", "s--", "^:"), ("#00224e", "#7d7c78", "#a59c74"), strict=True)
    for (name, label), style, colour in styles:
        known = [(row["devices"], row[name]) for row in rows if row.get(name)]
        if known:
            axes.plot(*zip(*known, strict=True), style, color=colour, label=label)
    axes.axhline(projection["bound_tokens_per_second"], color="black", linestyle="-.", label="were experts free")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts := [row["devices"] for row in rows], labels=map(str, counts))
    axes.set_ylim(bottom=0)
    axes.figure.legend(loc="outside lower center", ncols=4)
    return axes.figure


def hit_lines(budgets: list[dict], caption: str = ""):
    """Hit rate over the share of experts in memory, a line for each policy; `budgets` of the run's JSON."""
    axes = _axes("Hit rate of a cache of experts for each layer", f"{caption} (simulated)", "experts in memory, %", "")
    styles = {"lru": "o-", "lfu": "s--", "aging": "^:", "belady": "D-."}
    colours = dict(zip(styles, ("#00224e", "#7d7c78", "#a59c74", "black"), strict=True))
    memory = [100 * row["chance"] for row in budgets]
    for name, style in styles.items():
        label = "Belady, the bound" if name == "belady" else name
        axes.plot(memory, [row[name] for row in budgets], style, color=colours[name], label=label)
    axes.plot((0, 100), (0, 1), color="#bbbbbb", label="kept at random")
    axes.set(xlim=(0, 100), ylim=(0, 1), ylabel="hits / experts wanted")
    axes.figure.legend(loc="outside lower center", ncols=5)
    return axes.figure


def quality_lines(rows: list[dict], over: str, without: float, caption: str = ""):
    """Perplexity over "balancedness" or over devices "lost", a line for each way; dashed what it is without any.

    rows     [{"way", "perplexity", and balancedness or lost}]; what is "worst" besides ends a line upwards
    without  perplexity of the model as it is
    """
    titles = {"balancedness": "What balance costs in quality", "lost": "What lost devices cost in quality"}
    labels = {"balancedness": "balancedness, 1 is even", "lost": "devices lost"}
    axes = _axes(titles[over], f"{caption} (measured)", labels[over], "perplexity, lower is better", rows=12)
    axes.axhline(without, color="black", linestyle="--", linewidth=1, label="the model as it is")
    ways = list(dict.fromkeys(row["way"] for row in rows))
    for n, way in enumerate(ways):
        mine = sorted((row for row in rows if row["way"] == way), key=lambda row: row[over])
        x, y = ([row[key] for row in mine] for key in (over, "perplexity"))
        higher = [row.get("worst", row["perplexity"]) - row["perplexity"] for row in mine]
        colour, line = ("#00224e", "#7d7c78", "#a59c74", "black")[n % 4], ("-", ":", "-.")[n // 4 % 3]
        line = line if len(mine) > 1 else ""
        how = {"marker": MARKERS[n % len(MARKERS)], "linestyle": line, "color": colour, "capsize": 3 * any(higher)}
        axes.errorbar(x, y, [[0] * len(y), higher] if any(higher) else None, label=way, **how)
    axes.set_yscale("log")
    ticks = [10 * n for n in (1, 2, 3, 5, 7, 10, 15, 20, 30, 50) if 10 * n >= without / 2]
    axes.set_yticks(ticks, labels=map(str, ticks))
    axes.minorticks_off()
    axes.set_ylim(
        0.95 * min(without, *(row["perplexity"] for row in rows)),
        1.05 * max(row.get("worst", row["perplexity"]) for row in rows),
    )
    if over == "lost":
        axes.set_xticks(sorted({row[over] for row in rows}))
    axes.figure.legend(loc="outside lower center", ncols=3)
    return axes.figure


def growth_lines(found: list[tuple], against: list[str], names: list[str]):
    """Time over size, a panel for each thing that grows; dotted: the work.

    found  [(name, against what, sizes [n], seconds [n], work [n])]
    """
    figure = _figure_class()(figsize=(9, 7), layout="constrained")
    for axes, grows in zip(figure.subplots(2, 2).flat, against, strict=True):
        for name, over, sizes, seconds, work in found:
            if over == grows:
                n = names.index(name)
                colour = ("#00224e", "#7d7c78", "#a59c74", "black")[n % 4]
                axes.plot(sizes / sizes[0], seconds / seconds[0], f"{MARKERS[n]}-", color=colour, label=name)
                axes.plot(sizes / sizes[0], work / work[0], ":", color=colour, linewidth=1)
        axes.set(xlabel=f"{grows} over the fewest", ylabel="time over that of the fewest")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
    lines = {text: line for axes in figure.axes for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4)
    figure.suptitle("Time over size; dotted: the work (measured, random layers of 128 experts)", fontsize="medium")
    return figure


def _axes(title: str, caption: str, x: str, y: str, rows: int = 8, width: float = 9):
    """Axes of a new Figure, as high as so many rows want."""
    figure = _figure_class()(figsize=(width, 1.8 + 0.25 * max(4, rows)), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(f"{title}\n{caption}", parse_math=False, fontsize="medium", wrap=True)
    return axes


@cache
def _figure_class():
    from matplotlib.figure import Figure

    class Picture(Figure):
        """A Figure that a notebook shows by itself, whatever its backend is, or without one."""

        def _repr_png_(self) -> bytes:
            self.savefig(data := io.BytesIO(), dpi=110, format="png")
            return data.getvalue()

    return Picture


def _bars(axes, parts: dict) -> None:
    """Parts {label: values} upon each other, a bar for each value."""
    below = 0.0
    for n, (label, values) in enumerate(parts.items()):
        style = {"color": COLOURS[n % 3], "hatch": PATTERNS[n % 3] or PATTERNS[n // 3], "edgecolor": "white"}
        axes.bar(range(len(values)), values, bottom=below, label=label, **style)
        below = below + np.asarray(values)
    axes.set_xticks(range(len(values))[:: -(-len(values) // 32)])
    axes.set_xlim(-0.5, max(len(values), 4) - 0.5)  # one bar is no wall


def save_plots(folder, figures: dict) -> list[Path]:
    """Write {name: Figure} as PNG files into a folder, made if need be; returns their paths."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = [Path(folder) / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        with written_whole(path, "wb") as file:
            file.write(figure._repr_png_())
    return paths
