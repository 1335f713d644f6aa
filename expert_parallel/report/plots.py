"""Plots: pictures of loads, for --plots and notebooks. No global backend of matplotlib is touched."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..files import written_whole


def load_map(loads, across: str, title: str = ""):
    """matplotlib's Figure of loads [L, E or D], each layer over its own mean; `across` names the columns."""
    from matplotlib.figure import Figure

    values = np.asarray(loads, dtype=float)
    relative = values / np.maximum(values.mean(axis=1, keepdims=True), 1e-12)
    figure = Figure(figsize=(9, 1.5 + 0.25 * max(4, len(values))), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(relative, aspect="auto", interpolation="nearest", cmap="viridis")
    caption = f"Slots per {across}, over the layer's mean\n{title} (measured)"
    axes.set(xlabel=across, ylabel="MoE layer", title=caption)
    figure.colorbar(image, ax=axes)
    return figure


def plot_loads(folder, loads, device_loads, title: str = "") -> list[Path]:
    """Write expert_loads.png and device_loads.png into a folder (made if need be); returns their paths.

    loads [L, E] slots per expert;  device_loads [L, D]
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for across, values in (("expert", loads), ("device", device_loads)):
        written.append(folder / f"{across}_loads.png")
        with written_whole(written[-1], "wb") as file:
            load_map(values, across, title).savefig(file, dpi=110, format="png")
    return written
