"""Plots: pictures of loads as matplotlib's Figures, for --plots and notebooks; no global backend is touched."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..files import written_whole


def load_map(loads, across: str, title: str = "", source: str = "measured"):
    """Loads [L, E or D] as colours, each layer over its own mean; `across` names the columns, "expert" or "device"."""
    from matplotlib.figure import Figure

    loads = np.asarray(loads, float)
    figure = Figure(figsize=(9, 1.5 + 0.25 * max(4, len(loads))), layout="constrained")
    axes = figure.subplots()
    relative = loads / np.maximum(loads.mean(axis=1, keepdims=True), 1e-12)
    image = axes.imshow(relative, aspect="auto")
    axes.set(xlabel=across, ylabel="MoE layer")
    axes.set_title(f"Slots per {across}, over the layer's mean\n{title} ({source})", parse_math=False)
    figure.colorbar(image, ax=axes)
    return figure


def save_plots(folder, figures: dict) -> list[Path]:
    """Write {name: Figure} as PNG files into a folder, made if need be; returns their paths."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = [Path(folder) / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        with written_whole(path, "wb") as file:
            figure.savefig(file, dpi=110, format="png")
    return paths
