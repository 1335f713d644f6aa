"""One table: a figure is defined once, and prints, goes into JSON and shows itself in a notebook.

loads = Figure("loads", "load", [9, 4, 7], "{:.1f}", means="tokens of the fullest device")
Table("Balance", [Figure(None, "layer", [0, 1, 2]), loads], "balance", "measured")      columns over rows
Table("Speed", [Figure("seconds", "one token", 0.2, "{} s")], "time", facts=True)       a line each
"""

from __future__ import annotations

import html
import math
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..files import plain

MOST_ROWS = 16  # that are printed; JSON has all
SHADES = " ░▒▓█"  # of a row's mean under 1/4, 3/4, 5/4, 7/4, and over
SHADES_MEAN = "blank is under 1/4, ░ under 3/4, ▒ under 5/4, ▓ under 7/4, █ more"
COLOURS = {"░": "#56b4e9", "▓": "#e69f00", "█": "#d55e00"}  # below and above it; Okabe and Ito's, for every eye


@dataclass(frozen=True)
class Figure:
    """One figure, or a column of them.

    key     in JSON; None: it is printed only
    label   in print
    value   in a table of columns one for each row
    show    a format, or a function from a value to its text
    source  measured, simulated or modelled, where that is not the table's; stands behind the label
    means   what it is, where the label does not say; stands under the table
    beside  the bound or chance level that it can be held against; stands in brackets behind it
    """

    key: str | None
    label: str
    value: object
    show: str | Callable = "{}"
    source: str = ""
    means: str = ""
    beside: Figure | None = None

    def heading(self, of_column: bool) -> str:
        behind = self.beside.label if of_column and self.beside else self.source
        return f"{self.label} ({behind})" if behind else self.label

    def text(self, row: int | None = None) -> str:
        """The value, or that of a row, in print; text from outside stays as it is, but for what steers a terminal."""
        value = self.value if row is None else self.value[row]
        if isinstance(value, float | np.floating) and not math.isfinite(value):
            text = "not a number"
        elif value is None or isinstance(value, str) and not value:
            text = "-" if value is None else ""
        else:
            text = self.show.format(value) if isinstance(self.show, str) else self.show(value)
        text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
        if not self.beside or value is None:
            return text
        of_what = "" if row is not None else f"{self.beside.label}: "
        source = f", {self.beside.source}" if self.beside.source else ""
        return f"{text} ({of_what}{self.beside.text(row)}{source})"


@dataclass
class Table:
    """Figures under a title: columns with a value for each row, or `facts`, a line each.

    section  where in the report's JSON, e.g. "balance" or "routing.all"; "": at its top; None: nowhere
    source   measured, simulated or modelled, and on what; in JSON, and in the heading where the title does not say it
    also     {key: value} of what JSON has besides
    first    of a long table those rows are printed that have least of this, a value for each row
    order    what that makes them, e.g. "the most skewed"
    detail   for who asks for all of the report; see `on_a_screen`
    """

    title: str
    figures: list[Figure]
    section: str | None = None
    source: str = ""
    note: str = ""
    also: dict = field(default_factory=dict)
    facts: bool = False
    first: object = None
    order: str = "the first"
    detail: bool = False

    def heading(self) -> str:
        return f"{self.title} ({self.source})" if self.source and self.source not in self.title else self.title

    def cells(self) -> list[list[str]]:
        """What is printed, row by row; facts that are not there have no line."""
        if self.facts:
            lines = [[f.heading(False), f.text()] for f in self.figures if f.value is not None]
            return [line for line in lines if line[1]]
        rows = range(len(self.figures[0].value))
        if len(rows) > MOST_ROWS:
            rows = rows if self.first is None else np.argsort(self.first, kind="stable").tolist()
            rows = sorted(rows[:MOST_ROWS])
        return [[figure.text(row) for figure in self.figures] for row in rows]

    def notes(self) -> str:
        """What stands under the table: that rows were left out, what the figures mean."""
        count = 0 if self.facts else len(self.figures[0].value)
        cut = f"{MOST_ROWS} of {count} rows, {self.order}; --json has all." if count > MOST_ROWS else ""
        return " ".join(filter(None, (cut, self.note, *(f"{f.label}: {f.means}." for f in self.figures if f.means))))

    def __rich_console__(self, console, options):
        from rich.table import Table as Grid
        from rich.text import Text

        grid = Grid(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=not self.facts)
        for n, label in enumerate(("", "") if self.facts else [figure.heading(True) for figure in self.figures]):
            justify = "left" if n == 0 or self.facts else "right"
            grid.add_column(Text(label), justify=justify, header_style="dim", overflow="fold")
        for row in self.cells():
            grid.add_row(*map(_coloured, row))
        lines = console.render_lines(grid, options, pad=False) if grid.row_count else []
        rows = (Text.assemble(*((segment.text, segment.style or "") for segment in line)) for line in lines)
        for text in (Text(self.heading(), style="bold"), *rows, _coloured(self.notes())):
            for line in text.wrap(console, options.max_width) if text else ():
                line.rstrip()  # rich fills lines with blanks
                yield line

    def __str__(self) -> str:
        """As it is printed where there is no terminal: 80 columns, no colours."""
        from rich.console import Console

        console = Console(width=80, color_system=None)
        with console.capture() as printed:
            console.print(self)
        return printed.get()

    def to_json(self) -> dict:
        """{key: value}, with the source; what is no number is null."""
        figures = [f for figure in self.figures for f in (figure, figure.beside) if f and f.key is not None]
        source = {"source": self.source} if self.source else {}
        return source | plain({f.key: f.value for f in figures} | self.also)

    def _repr_html_(self) -> str:
        head = [] if self.facts else [("th", [figure.heading(True) for figure in self.figures])]
        rows = [
            "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
            for tag, row in [*head, *(("td", row) for row in self.cells())]
        ]
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"<h4>{html.escape(self.heading())}</h4><table>{body}</table><p>{html.escape(self.notes())}</p>"


def _coloured(text: str):
    from rich.text import Text

    return Text.assemble(*((letter, COLOURS.get(letter, "")) for letter in text))


def of_rows(title: str, *labels: str, rows) -> Table:
    """A table that is printed only, of rows of cells; for benchmarks."""
    columns = list(zip(*rows, strict=True)) or [()] * len(labels)
    return Table(title, [Figure(None, label, cells) for label, cells in zip(labels, columns, strict=True)])


def of_records(title: str, key: str | None, records, *columns, also=None, **more) -> Table:
    """A table of records [{name: value}], or {"name" of the record: {name: value}}, which JSON has under `key`.

    columns     (name in the record, label[, show]); a function from the record may stand for the name
    also, more  of Table
    """
    rows = [{"name": n, **row} for n, row in records.items()] if isinstance(records, dict) else records
    figures = [
        Figure(None, label, [name(row) if callable(name) else row.get(name) for row in rows], *show)
        for name, label, *show in columns
    ]
    return Table(title, figures, also={**({key: records} if key else {}), **(also or {})}, **more)


def facts(title: str, items: dict, **more) -> Table:
    """Names and texts, a line each, that are printed only."""
    return Table(title, [Figure(None, name, text) for name, text in items.items()], facts=True, **more)


def on_a_screen(tables: list[Table], full: bool = False) -> list[Table]:
    """The tables to print, and what is said of those that are left out; `full`: all that have a title."""
    shown = [table for table in tables if table.title and (full or not table.detail)]
    left_out = [table.title.partition(" (")[0] for table in tables if table.title and table.detail and not full]
    names = facts("More", {"--full": ", ".join(left_out)})
    return [*shown, names] if left_out else shown


def sections(tables: list[Table], **others) -> dict:
    """The tables' figures as one JSON document, tables of one section together, others at its top."""
    document = plain(others)
    for table in tables:
        place = document
        for name in filter(None, (table.section or "").split(".")):
            place[name] = place = place.get(name) or {}
        if table.section is not None:
            place |= {key: value for key, value in table.to_json().items() if key != "source" or key not in place}
    return document


def shades(loads) -> str:
    """A row of loads as shades against its mean, as a cell: half of the mean is ░, twice the mean █."""
    loads = np.asarray(loads, float)
    levels = np.clip(np.round(loads / max(loads.mean(), 1e-12) * 2), 0, 4).astype(int)
    return "".join(SHADES[level] * (3 if len(loads) <= 20 else 1) for level in levels)


def size(num_bytes: float) -> str:
    """Bytes for people, in decimal units as disks and vendors count."""
    unit, power = next(((u, p) for u, p in (("GB", 9), ("MB", 6), ("kB", 3)) if abs(num_bytes) >= 10**p), ("B", 0))
    return f"{num_bytes / 10**power:.2f} {unit}" if power else f"{num_bytes:.0f} B"


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
