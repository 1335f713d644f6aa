"""One page of a run: a file of HTML with everything in it, which needs no network and runs no script."""

from __future__ import annotations

import base64
import html

from ..files import plain, written_whole
from .table import Table

STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; } h4 { margin: 1.6rem 0 .3rem; font-size: 1.05rem; }
section { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .12rem 1.1rem .12rem 0; text-align: right; vertical-align: top; white-space: pre-wrap; }
th { font-weight: normal; opacity: .7; border-bottom: 1px solid; }
th:first-child, td:first-child, .facts td { text-align: left; }
.facts td:first-child { white-space: nowrap; }
p { margin: .3rem 0; max-width: 46rem; opacity: .8; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid #a59c74; padding-left: .8rem; }
figure { margin: 1.2rem 0; overflow-x: auto; }
img { max-width: 100%; min-width: 42rem; height: auto; background: white; }
@media print { section, figure { break-inside: avoid; } img { min-width: 0; } }
"""


def page(title: str, tables: list[Table], figures: dict, document: dict, answer: str | None = None) -> str:
    """The HTML of a report: its first table, the answer, pictures, all other tables, options and versions.

    tables    the verdict first, if there is one; those without a title are for programs alone
    figures   {name: matplotlib's Figure}
    document  the run's JSON, for its "options" and "environment"
    answer    text of the model
    """
    tables = [table for table in tables if table.title]
    parts = [f"<h1>{html.escape(title)}</h1>", _section(tables[0])]
    if answer is not None:
        parts.append(f"<h4>Answer</h4><pre>{html.escape(answer)}</pre>")
    parts += [_picture(name, figure) for name, figure in figures.items()]
    parts += map(_section, tables[1:])
    for name in ("options", "environment"):
        rows = "".join(
            f"<tr><td>{html.escape(key)}</td><td>{html.escape(str(value))}</td></tr>"
            for key, value in plain(document[name]).items()
            if value is not None
        )
        parts.append(f'<h4>{name.capitalize()}</h4><section class="facts"><table>{rows}</table></section>')
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def _section(table: Table) -> str:
    kind = ' class="facts"' if table.facts else ""
    return f"<section{kind}>{table._repr_html_()}</section>"


def _picture(name: str, figure) -> str:
    text = html.escape(figure.axes[0].get_title().replace("\n", ": "))
    source = base64.b64encode(figure._repr_png_()).decode()
    return f'<figure id="{html.escape(name)}"><img alt="{text}" src="data:image/png;base64,{source}"></figure>'


def save_page(path, *arguments, **more) -> None:
    """Write the `page` of these arguments; whole or not at all."""
    with written_whole(path) as file:
        file.write(page(*arguments, **more))
