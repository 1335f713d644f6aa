"""The page of a run: everything is in it, as it is, and nothing has to be fetched."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import ROOT, SHIPPED

from expert_parallel.command.options import ANALYSIS_PICTURES, PICTURES
from expert_parallel.report.page import page
from expert_parallel.report.plots import load_map
from expert_parallel.report.table import Figure, Table, facts

ODD = "<script>alert('1')</script> & [red]"
WITHOUT_END = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """What a browser makes of it: tags that are well nested, their attributes, and the text in cells and headings."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.cells = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in WITHOUT_END:
            self.open.append(tag)
        if tag in ("td", "th", "h1", "h4", "p", "pre"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th", "h1", "h4", "p", "pre"):
            self.cells[-1] += data


def test_names_are_text_and_everything_is_there():
    tables = [
        facts("In short", {ODD: "same"}),
        Table("", [Figure("x", "not shown", 1)], facts=True),
        Table(ODD, [Figure(None, "layer", [0, 1]), Figure(None, ODD, ["a", ODD])], note="under it", detail=True),
    ]
    document = {"options": {"model": ODD, "trace": None, "devices": 8}, "environment": {"mlx": "0.1"}}
    picture = load_map([[1, 2]], "expert", ODD)
    text = page(ODD, tables, {"loads": picture}, document, f"\n\n{ODD}")
    found = Page(text)
    tags = [tag for tag, _ in found.found]
    assert (
        "script" not in tags
        and "link" not in tags
        and not re.search(r"https?://|//\w", re.sub('"data:[^"]*"', "", text))
    )
    shown = [cell for cell in found.cells if cell]
    assert shown == [
        ODD, "In short", ODD, "same", "Answer", f"\n\n{ODD}", ODD, "layer", ODD, "0", "a", "1", ODD, "under it",
        "Options", "model", ODD, "devices", "8", "Environment", "mlx", "0.1",
    ]  # fmt: skip
    (image,) = [attributes for tag, attributes in found.found if tag == "img"]
    assert image["alt"] == f"Slots of each expert over the layer's mean: {ODD} (measured)"
    kind, data = image["src"].split(",")
    assert kind == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")
    assert "Answer" not in page(ODD, tables, {}, document)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("qwen3_expert_parallel.py", ("--model", SHIPPED, "--max-tokens", 2, "--devices", 2, "--trials", 0)),
        ("model_analysis.py", ()),
        ("expert_parallel_poc.py", ("--scenarios", "balanced", "--tokens", 1024, "--hidden", 32, "--expert-width", 32)),
    ],
)
def test_each_script_makes_a_page_of_all_its_tables(script, arguments, tmp_path, run_here):
    file = tmp_path / "a.html"
    done = run_here(script, *arguments, "--html", file, "--json", tmp_path / "a.json")
    assert done.returncode == 0, done.stderr
    found, document = Page(file.read_text()), json.loads((tmp_path / "a.json").read_text())
    headings = [cell for cell in found.cells if cell]
    bold = [
        line
        for line in done.stdout.splitlines()
        if re.match(r"[A-Z].*(measured|modelled|simulated)|.* devices, 512", line)
    ]
    assert bold and all(any(line in cell for cell in headings) for line in bold if len(line) < 79)
    assert document["environment"]["mlx"] in found.cells and str(file) in found.cells
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("a.html")] == ["a.html"]


@pytest.mark.parametrize("script", ["qwen3_expert_parallel.py", "model_analysis.py"])
def test_a_page_beside_figures_on_standard_output(script, tmp_path, run_here):
    """Nothing else goes there, and the page has the figures that the JSON has."""
    more = ("--model", SHIPPED, "--max-tokens", 1, "--trials", 0) if script.startswith("qwen3") else ()
    done = run_here(script, *more, "--quiet", "--json", "-", "--html", tmp_path / "a.html")
    assert done.returncode == 0, done.stderr
    document, found = json.loads(done.stdout), Page((tmp_path / "a.html").read_text())
    pictures = [attributes["id"] for tag, attributes in found.found if tag == "figure"]
    assert pictures == list(PICTURES if more else ANALYSIS_PICTURES)
    balance = document["balance"]["balancedness_aggregate"] if more else None
    rows = [] if more else document["projection"]["devices"]
    figures = [f"{balance:.3f}"] if more else [str(row["devices"]) for row in rows]
    assert figures and set(figures) <= set(found.cells)


def test_the_analysis_saves_its_picture_and_none_over_what_is_read(tmp_path, run_here):
    folder = tmp_path / "plots"
    assert run_here("model_analysis.py", "--quiet", "--plots", folder).returncode == 0
    assert [path.name for path in folder.iterdir()] == [f"{name}.png" for name in ANALYSIS_PICTURES]
    (folder / "speed.png").write_text("a prompt")
    reads = ("--model", SHIPPED, "--prompt", folder / "speed.png")
    done = run_here("model_analysis.py", "--quiet", *reads, "--plots", folder)
    assert done.returncode == 2 and "--plots (speed.png)" in done.stderr and len(done.stderr.splitlines()) == 1
    assert (folder / "speed.png").read_text() == "a prompt"
    done = run_here("model_analysis.py", "--quiet", "--plots", folder / "speed.png")
    assert done.returncode == 2 and "--plots takes a folder" in done.stderr


def test_a_projection_that_fits_nowhere_has_no_picture(tmp_path, run_here):
    none = ("--model", "deepseek-v3", "--device-memory", 1, "--html", tmp_path / "a.html", "--plots", tmp_path / "p")
    assert run_here("model_analysis.py", "--quiet", *none).returncode == 0
    assert not list((tmp_path / "p").iterdir())
    assert "img" not in [tag for tag, _ in Page((tmp_path / "a.html").read_text()).found]


@pytest.mark.parametrize("script", ["qwen3_expert_parallel.py", "model_analysis.py"])
def test_a_page_over_what_is_read_is_refused(script, tmp_path, run_here):
    for file in filter(Path.is_file, SHIPPED.iterdir()):
        (tmp_path / file.name).symlink_to(file)
    config = tmp_path / "config.json"
    done = run_here(script, "--model", tmp_path, "--html", config)
    assert done.returncode == 2 and f"--html {config} would be written over the model" in done.stderr
    assert config.read_text() == (SHIPPED / "config.json").read_text()


def test_the_proof_of_concepts_page_over_its_trace_is_refused(tmp_path, run_here):
    trace = tmp_path / "t.npz"
    done = run_here("qwen3_expert_parallel.py", "--model", SHIPPED, "--max-tokens", 2, "--quiet", "--trace", trace)
    before = trace.read_bytes()
    done = run_here("expert_parallel_poc.py", "--trace", trace, "--html", trace)
    assert done.returncode == 2 and "would be written over --trace" in done.stderr and trace.read_bytes() == before
    assert not list(ROOT.glob("*.html"))
