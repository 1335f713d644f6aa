"""One table: a figure is defined once, and prints, goes into JSON and shows itself in a notebook.

Table("Balance over devices", [Figure("balancedness", "balancedness", values, "{:.3f}")], "balance", "measured")
"""

from __future__ import annotations

import html
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SHADES = " ░▒▓█"
MOST_ROWS = 16  # that are printed; JSON has all


@dataclass(frozen=True)
class Figure:
    """One figure, or a column of them.

    key    in JSON; None: it is printed only
    label  in print; None: it is in JSON only
    show   a format, or a function from value to text; values that are missing or not a number show as -
    """

    key: str | None
    label: str | None
    value: object
    show: str | Callable = "{}"

    def text(self, value) -> str:
        if value is None or (isinstance(value, float | np.floating) and np.isnan(value)):
            return "-"
        return self.show.format(value) if isinstance(self.show, str) else self.show(value)


@dataclass
class Table:
    """Figures under a title: columns with a value for each row, or `facts`, a line each.

    section  where in the report's JSON, e.g. "balance" or "routing.prefill"; "": nowhere
    source   measured, simulated or modelled, and on what; stands in title and JSON
    rows     numbers of the rows that are printed, in this order; None: all, or the first few
    """

    title: str
    figures: list[Figure]
    section: str = ""
    source: str = ""
    note: str = ""
    facts: bool = False
    rows: list[int] | None = None

    @property
    def heading(self) -> str:
        return f"{self.title} ({self.source})" if self.source else self.title

    def cells(self) -> list[list[str]]:
        """What is printed, row by row."""
        shown = [figure for figure in self.figures if figure.label is not None]
        if self.facts:
            return [[f.label, f.text(f.value)] for f in shown if f.value not in (None, "")]
        count = len(shown[0].value) if shown else 0
        rows = list(range(count)) if self.rows is None else self.rows
        cells = [[figure.text(figure.value[n]) for figure in shown] for n in rows[:MOST_ROWS]]
        return cells + [["..."] + [""] * (len(shown) - 1)] * (len(rows) > MOST_ROWS)

    def __rich__(self):
        from rich.console import Group
        from rich.table import Table as Grid
        from rich.text import Text

        grid = Grid(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=not self.facts)
        labels = ["", ""] if self.facts else [figure.label for figure in self.figures if figure.label is not None]
        for n, label in enumerate(labels):
            justify = "left" if n == 0 or self.facts else "right"
            grid.add_column(label, justify=justify, header_style="dim", overflow="fold", no_wrap=self.facts and n == 0)
        for row in self.cells():
            grid.add_row(*map(Text, row))
        return Group(Text(self.heading, style="bold"), grid, *([Text(self.note)] if self.note else []))

    def to_json(self) -> dict:
        """{key: value}, with the source."""
        source = {"source": self.source} if self.source else {}
        return source | {figure.key: figure.value for figure in self.figures if figure.key is not None}

    def _repr_html_(self) -> str:
        labels = [] if self.facts else [figure.label for figure in self.figures if figure.label is not None]
        lines = [("th", labels)] * bool(labels) + [("td", row) for row in self.cells()]
        rows = ("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) for tag, row in lines)
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"<h4>{html.escape(self.heading)}</h4><table>{body}</table><p>{html.escape(self.note)}</p>"


class HeatMap(Table):
    """Loads [rows, columns] of its one figure as shades, each row against its own mean."""

    def __rich__(self):
        from rich.console import Group
        from rich.text import Text

        loads = np.asarray(self.figures[0].value, dtype=float)
        level = np.clip(np.round(loads / np.maximum(loads.mean(axis=1, keepdims=True), 1e-12) * 2), 0, 4).astype(int)
        cell = 3 if loads.shape[1] <= 20 else 1
        lines = [f"{n:4d} " + "".join(SHADES[shade] * cell for shade in row) for n, row in enumerate(level)]
        return Group(Text(self.heading, style="bold"), Text(self.note), *(Text(line.rstrip()) for line in lines))

    def cells(self) -> list[list[str]]:
        return [[f"{value:g}" for value in row] for row in self.figures[0].value]


def columns(rows: list[dict], *wanted: tuple) -> list[Figure]:
    """Printed columns (label, key, show) of rows that JSON has as they are; what a row lacks shows as -."""
    return [Figure(None, label, [row.get(key) for row in rows], show) for label, key, show in wanted]


def of_rows(title: str, *labels: str, rows) -> Table:
    """A table that is printed only, of rows of cells; for benchmarks."""
    return Table(
        title, [Figure(None, label, list(cells)) for label, cells in zip(labels, zip(*rows, strict=True), strict=True)]
    )


def sections(tables: list[Table]) -> dict:
    """The tables' figures as one JSON document; tables of one section go together."""
    document: dict = {}
    for table in filter(lambda table: table.section, tables):
        place = document
        for name in table.section.split("."):
            place = place.setdefault(name, {})
        place |= {key: value for key, value in table.to_json().items() if key != "source" or key not in place}
    return document


def size(num_bytes: float) -> str:
    """Bytes for people, in decimal units as disks and vendors count."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if abs(num_bytes) >= 10**power:
            return f"{num_bytes / 10**power:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def environment() -> dict:
    """Hardware and versions that every result is to be read with."""
    import mlx.core as mx
    import mlx_lm

    device, about = mx.default_device(), mx.device_info()
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
