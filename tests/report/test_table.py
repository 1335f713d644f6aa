"""One table, four ways to see it: print, JSON, notebook, and as one section of many."""

import io
import json
import re
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from printed import columns_of, facts_of, lines_of
from rich.console import Console

from expert_parallel.command.output import console, write_json
from expert_parallel.report.table import (
    Figure,
    Table,
    environment,
    facts,
    of_records,
    of_rows,
    on_a_screen,
    sections,
    shades,
    size,
)

LAYERS = [
    Figure(None, "layer", [3, 7, 11]),
    Figure("spread", "max/mean", np.array([1.25, 2.0, 1.5]), "{:.2f}x", means="1 is even"),
    Figure("recall", "recall", [0.5, None, 0.75], "{:.1f}", beside=Figure("by_use", "by use", [0.1, 0.2, 0.3])),
]
OUTSIDE = ["[/x]", "[red]hot[/red]", ":smile:.npz", "<b>bold</b>", "{0}{name}", "a\x1b[31mb", "two\nlines"]


def test_a_figure_says_the_same_in_print_json_and_a_notebook():
    table = Table("Spread", LAYERS, "balance", "measured", "Read on.")
    assert str(table).splitlines() == [
        "Spread (measured)",
        "layer  max/mean  recall (by use)",
        "3         1.25x        0.5 (0.1)",
        "7         2.00x                -",
        "11        1.50x        0.8 (0.3)",
        "Read on. max/mean: 1 is even.",
    ]
    spread = {"spread": [1.25, 2.0, 1.5], "recall": [0.5, None, 0.75], "by_use": [0.1, 0.2, 0.3]}
    assert table.to_json() == {"source": "measured", **spread}
    html = table._repr_html_()
    assert "<th>recall (by use)</th>" in html and "<tr><td>11</td><td>1.50x</td><td>0.8 (0.3)</td></tr>" in html
    assert "Spread (measured)" in html and "max/mean: 1 is even." in html


def test_facts_name_their_source_and_their_bound():
    uniform = Figure("fan_out_if_uniform_modelled", "uniform", 5.336, "{:.2f}", "modelled")
    figures = [
        Figure("fan_out", "devices per token", 5.43, "{:.2f}", beside=uniform),
        Figure("counted", "at the calls", 7, source="measured"),
        Figure("missing", "not there", None),
        Figure(None, "empty", ""),
    ]
    table = Table("Over all (modelled)", figures, "x", "modelled", also={"more": (1, np.float32(2))}, facts=True)
    assert facts_of(str(table), "Over all (modelled)") == {
        "devices per token": "5.43 (uniform: 5.34, modelled)",
        "at the calls (measured)": "7",
    }
    assert str(table).count("modelled") == 2  # the title says it already
    figures = {"fan_out": 5.43, "fan_out_if_uniform_modelled": 5.336, "counted": 7, "missing": None, "more": [1, 2.0]}
    assert table.to_json() == {"source": "modelled", **figures}


@pytest.mark.parametrize("text", OUTSIDE, ids=repr)
def test_text_from_outside_is_shown_as_it_is(text, capsys):
    """A strategy "[/x]" in a placement file ended a report in a MarkupError; "[red]" vanished."""
    shown = text.replace("\x1b", "\\x1b").replace("\n", "\\n")
    records = [{"name": text}]
    tables = [of_records("T", "rows", records, ("name", "name"), section="s"), facts("F", {"name": text})]
    for table in [*tables, of_rows("R", "name", rows=[[text]])]:
        console().print(table)
        out = capsys.readouterr().out
        assert shown in out and "\x1b" not in out
        assert text not in table._repr_html_() or "<" not in text
    assert sections(tables) == {"s": {"rows": records}}
    for place in (Table(text, [], note=text, facts=True), Table("T", [Figure(None, text, [1])])):
        console().print(place)
        assert text.split("\n")[0].replace("\x1b", "") in capsys.readouterr().out.replace("\x1b", "")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -np.inf, np.float32("nan")], ids=str)
def test_what_is_no_number_is_null_and_says_so(value, tmp_path):
    columns = Table("C", [Figure("x", "x", [1.5, value], "{:.1f}")], "c", also={"y": {"z": np.array([value])}})
    one = Table("F", [Figure("x", "x", value, "{:.1f}")], "f", facts=True)
    document = sections([columns, one])
    assert document == {"c": {"x": [1.5, None], "y": {"z": [None]}}, "f": {"x": None}}
    assert columns_of(str(columns), "C", 2) == {"x": ("1.5", "not a number")}
    assert facts_of(str(one), "F") == {"x": "not a number"}
    write_json(tmp_path / "o.json", {"raw": value, "path": tmp_path})
    assert json.loads((tmp_path / "o.json").read_text(), parse_constant=pytest.fail)["raw"] is None


def test_long_tables_print_the_rows_that_matter_and_json_has_all():
    values = np.random.default_rng(0).permutation(48) / 48
    figures = [Figure(None, "layer", range(48)), Figure("entropy", "entropy", values, "{:.3f}")]
    table = Table("Routing", figures, "routing", "measured", first=values, order="the most skewed")
    found = columns_of(str(table), "Routing", 16)
    assert [int(layer) for layer in found["layer"]] == sorted(sorted(range(48), key=lambda l: values[l])[:16])
    assert list(found["entropy"]) == [f"{values[int(layer)]:.3f}" for layer in found["layer"]]
    assert lines_of(str(table), "Routing")[17] == "16 of 48 rows, the most skewed; --json has all."
    assert table.to_json()["entropy"] == values.tolist()
    plain = columns_of(str(Table("Plain", figures)), "Plain", 16)
    assert plain["layer"] == tuple(map(str, range(16)))
    assert "--json" not in str(Table("Short", [Figure(None, "n", range(16))]))


def test_printed_lines_fit_80_columns_and_end_without_blanks():
    long = "a name that goes on and on, " * 8
    tables = [
        facts(f"A title that is long: {long}", {"name": long, "a long name of something rather unimportant": long}),
        of_records("T", None, [{"a": long, "b": 1, "c": long}] * 3, ("a", "a"), ("b", "b"), ("c", "c"), note=long),
        Table("Loads", [Figure(None, "layer", (0, 1)), Figure("loads", "load", np.ones((2, 90)), shades)], note=long),
    ]
    for table in tables:
        for line in str(table).splitlines():
            assert len(line) <= 80 and line == line.rstrip()
        assert str(table).replace("\n", " ").count("goes on") >= 8  # wrapped, not cut


def test_shades_hold_each_row_against_its_own_mean():
    """Means 2, 80, 7 and 0; 1/2 of the mean is ░, the mean ▒, 3/2 of it ▓, over 7/4 of it █."""
    loads = np.array([[0, 1, 2, 3, 4], [400, 0, 0, 0, 0], [7, 7, 7, 7, 7], [0, 0, 0, 0, 0]])
    figures = [Figure(None, "layer", range(4)), Figure("device_loads", "devices", loads, shades)]
    table = Table("Load per device", figures, "balance", note="layer down")
    assert table.cells() == [
        ["0", "   ░░░▒▒▒▓▓▓███"],
        ["1", "███            "],
        ["2", "▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒"],
        ["3", " " * 15],
    ]
    assert table.to_json() == {"device_loads": loads.tolist()}
    assert "<td>▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒</td>" in table._repr_html_()
    assert shades([1] * 20 + [20]) == "░" * 20 + "█"  # one letter each where there are many


def test_loads_below_the_mean_are_blue_and_above_it_orange_where_the_terminal_has_colours(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    figures = [Figure(None, "layer", [0]), Figure("device_loads", "devices", [[1, 2, 3, 4, 0]], shades)]
    table = Table("Load per device", figures, note="█ more")

    def printed(**how):
        to = Console(width=80, file=io.StringIO(), **{"force_terminal": True, "color_system": "truecolor", **how})
        to.print(table)
        return to.file.getvalue()

    letters = re.findall("\x1b\\[38;2;([0-9;]+)m(.)", printed())
    assert "▒▒▒" in printed()
    assert letters == [("86;180;233", "░")] * 3 + [("230;159;0", "▓")] * 3 + [("213;94;0", "█")] * 4
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search("\x1b\\[[349]", printed())
    assert printed(force_terminal=False, color_system="auto") == str(table)
    assert [line.split() for line in str(table).splitlines()[1:-1]] == [["layer", "devices"], ["0", "░░░▒▒▒▓▓▓███"]]


def test_details_are_named_in_place_of_being_printed():
    short, untitled = facts("Short", {"a": "1"}), facts("", {"b": "2"}, detail=True)
    long, longer = facts("Long (measured)", {"c": "3"}, detail=True), facts("Longer", {"d": "4"}, detail=True)
    *shown, last = on_a_screen([long, short, untitled, longer])
    assert shown == [short] and str(last) == "More\n--full  Long, Longer\n"
    assert on_a_screen([long, short, untitled, longer], full=True) == [long, short, longer]
    assert on_a_screen([short, untitled]) == [short]


def test_tables_of_one_section_go_together():
    tables = [
        Table("A", [Figure("a", "a", 1)], "balance", "measured", facts=True),
        Table("B", [Figure("b", "b", 2)], "balance", "modelled", facts=True),
        Table("C", [Figure("c", "c", 3)], "balance.phases", "simulated", facts=True),
        Table("D", [Figure("d", "d", 4)], facts=True),
        Table("E", [Figure("e", "e", 5)], "", facts=True),
    ]
    assert sections(tables, options={"p": ROOT}, balance=None, fit=None) == {
        "options": {"p": str(ROOT)},
        "balance": {"source": "measured", "a": 1, "b": 2, "phases": {"source": "simulated", "c": 3}},
        "fit": None,
        "e": 5,
    }


def test_records_are_json_and_columns():
    rows = {"one": {"n": 1, "x": 0.5}, "two": {"n": 2}}
    columns = (("name", ""), ("x", "x", "{:.2f}"), (lambda row: row["n"] * 10, "tens"))
    for records in (rows, [{"name": name, **row} for name, row in rows.items()]):
        table = of_records("T", "rows", records, *columns, section="s", also={"more": 1})
        assert lines_of(str(table), "T") == ["        x  tens", "one  0.50    10", "two     -    20"]
        assert sections([table]) == {"s": {"rows": records, "more": 1}}
    assert of_rows("none", "a", "b", rows=[]).cells() == []


def test_a_terminal_gets_colours_and_a_pipe_does_not():
    code = "from expert_parallel.report.table import *; from expert_parallel.command.output import console;"
    code += "console().print(facts('Title', {'a': 'b'}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "Title\na  b\n"
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="truecolor").print(facts("Title", {"a": "b"}))
    assert "\x1b[1mTitle" in out.getvalue()


def test_sizes_for_people():
    assert [size(n) for n in (0, 999, 1000, 2_654_208, 17_180_913_664, 0.5)] == [
        "0 B", "999 B", "1.00 kB", "2.65 MB", "17.18 GB", "0 B",
    ]  # fmt: skip


def test_a_word_longer_than_the_line_is_folded_and_nothing_of_it_lost():
    text = str(facts("Names", {"file": "x" * 200}))
    assert text.count("x") == 200 and "…" not in text and max(map(len, text.splitlines())) <= 80


def test_the_hardware_is_named_as_mlx_names_it():
    assert environment()["device"] == ("CPU" if mx.default_device() == mx.cpu else "GPU")
    assert (environment()["mlx"], environment()["numpy"]) == (mx.__version__, np.__version__)
