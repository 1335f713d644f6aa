"""Of a run's tables those with a row for each layer or device are named, not printed, unless all are asked for."""

import pytest
from conftest import SHIPPED
from printed import facts_of, lines_of

from expert_parallel.report.run import not_a_number

LINE = ("--model", SHIPPED, "--max-tokens", 2, "--prompt", "class A:", "--no-verify", "--trials", 0)
LONG = ["Balance over devices", "Load per device", "Memory per device", "Routing"]


def test_long_tables_are_named_where_they_are_not_shown(run_here):
    done = run_here("qwen3_expert_parallel.py", *LINE)
    assert done.returncode == 0, done.stderr
    assert sorted(facts_of(done.stdout, "More")["--full"].split(", ")) == LONG
    assert not any(line.startswith(tuple(f"{title} (" for title in LONG)) for line in done.stdout.splitlines())
    whole = run_here("qwen3_expert_parallel.py", *LINE, "--full")
    assert "More" not in whole.stdout.splitlines()
    assert all(lines_of(whole.stdout, title) for title in LONG)


@pytest.mark.parametrize("layer", [0, 3, None])
def test_what_is_no_number_is_measured(layer):
    assert not_a_number(layer).to_json()["source"] == "measured"
