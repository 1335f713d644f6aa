"""The proof of concept, and the kinds of imbalance it makes up."""

import json

import numpy as np
import pytest
from conftest import run_script

from expert_parallel.scenarios import SCENARIOS, synthesise


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenarios_choose_k_different_experts(scenario):
    trace = synthesise(scenario, 200, 32, 4, num_layers=2)
    assert trace.experts.shape == (200, 2, 4)
    assert all(len(set(row)) == 4 for row in trace.experts.reshape(-1, 4).tolist())
    again = synthesise(scenario, 200, 32, 4, num_layers=2)
    assert np.array_equal(trace.experts, again.experts)


def test_scenarios_are_what_they_say():
    loads = {name: synthesise(name, 4000, 32, 4).loads()[0] for name in SCENARIOS}
    assert loads["balanced"].max() < 1.2 * loads["balanced"].mean()
    assert loads["hot"].max() > 0.95 * 4000
    assert loads["skewed"].max() > 3 * loads["skewed"].mean()
    drifting = synthesise("drifting", 4000, 32, 4)
    assert drifting[:400].loads()[0].argmax() < 6
    assert drifting[-400:].loads()[0].argmax() > 25
    with pytest.raises(ValueError, match="unknown scenario"):
        synthesise("none", 10, 8, 2)


def test_script_reports_and_is_exact(tmp_path):
    command = ("expert_parallel_poc.py", "--tokens", 64, "--experts", 16, "--top-k", 2, "--devices", 3, "--hidden", 64)
    result = run_script(*command, "--expert-width", 64, "--redundant-experts", 3, "--json", tmp_path / "o.json")
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "o.json").read_text())["scenarios"]
    assert [f["scenario"] for f in figures] == list(SCENARIOS)
    for f in figures:
        assert f["measured"]["exact"] is True
        assert sum(f["measured"]["slots"]) == 64 * 2
        assert f["remedies"]["balanced"]["fitted"] >= f["remedies"]["contiguous"]["fitted"] - 1e-9


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--devices", 0], "--devices"),
        (["--devices", 200], "200 devices"),
        (["--top-k", 129], "top-129"),
        (["--hidden", 100], "--hidden"),
        (["--trace", "nowhere.npz"], "nowhere.npz"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(arguments, word):
    result = run_script("expert_parallel_poc.py", *arguments)
    assert result.returncode == 2
    assert word in result.stderr
    assert "Traceback" not in result.stderr
