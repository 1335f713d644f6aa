"""Plots: pictures of loads, for --plots and notebooks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .whole_files import written_whole


def plot_loads(folder, loads, device_loads, title: str = "") -> list[Path]:
    """Write expert_loads.png and device_loads.png into a folder (made if need be); returns their paths.

    loads [L, E] slots per expert;  device_loads [L, D]
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [
        ("expert_loads.png", loads, "expert", "Slots per expert, over the layer's mean"),
        ("device_loads.png", device_loads, "device", "Slots per device, over the layer's mean"),
    ]
    written = []
    for name, values, across, caption in pictures:
        values = np.asarray(values, dtype=float)
        relative = values / np.maximum(values.mean(axis=1, keepdims=True), 1e-12)
        figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.25 * max(4, len(values))), layout="constrained")
        image = axes.imshow(relative, aspect="auto", interpolation="nearest", cmap="viridis")
        axes.set(xlabel=across, ylabel="MoE layer", title=f"{caption}\n{title} (measured)")
        figure.colorbar(image, ax=axes)
        with written_whole(folder / name, "wb") as file:
            figure.savefig(file, dpi=110, format="png")
        pyplot.close(figure)
        written.append(folder / name)
    return written
