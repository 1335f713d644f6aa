"""The notebook runs from its first cell to its last, and has pictures and tables in it."""

import json

from conftest import ROOT

NOTEBOOK = json.loads((ROOT / "notebooks" / "expert_parallelism.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_every_cell_runs(monkeypatch):
    """With half of its text, which takes most of its time."""
    monkeypatch.chdir(ROOT / "notebooks")
    names, whole, half = {"__name__": "__main__"}, "[:2048]).reshape(4, 512)", "[:1024]).reshape(2, 512)"
    cells = ["".join(cell["source"]) for cell in CODE]
    assert sum(whole in cell for cell in cells) == 1
    for cell in cells:
        exec(compile(cell.replace(whole, half), "the notebook", "exec"), names)
    assert len(names["tokenizer"].encode(names["text"], verbose=False)) >= 2048
    assert names["even"]["balanced"][0] > names["even"]["contiguous"][0]
    assert len(names["answered"]) > names["answered"].prefill.sum() == len(names["prompt"])
    lost = {name: float(difference) for name, (difference, _) in names["lost"].items()}
    assert [name for name, difference in lost.items() if not difference] == ["recover", "failover, one copy of each"]


def test_what_it_shows_is_kept():
    results = [
        output["data"] for cell in CODE for output in cell["outputs"] if output["output_type"] == "execute_result"
    ]
    assert sum("image/png" in data for data in results) == 4
    assert sum("<table>" in "".join(data.get("text/html", "")) for data in results) == 6
    assert not [output for cell in CODE for output in cell["outputs"] if output.get("name") == "stderr"]
