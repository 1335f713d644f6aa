"""Real ranks, over MPI and over sockets: the tokens and logits of stock mlx-lm."""

import json
import shutil
import subprocess
from pathlib import Path

import mlx_lm
import pytest
from checkpoints import QWEN3, Rank, save
from conftest import ROOT, SHIPPED, launch, launch_command

SCRIPT = "qwen3_expert_parallel.py"
CASES = "tests/ranks/rank_cases.py"
RUN = (SCRIPT, "--model", SHIPPED, "--max-tokens", 6, "--prompt", "import os\n", "--verify")


def figures_of(backend, ranks, tmp_path, *arguments):
    results = launch(backend, ranks, *RUN, "--json", tmp_path / "o.json", *arguments, tmp_path=tmp_path)
    assert all(status == 0 for status, _, _ in results), results
    return json.loads((tmp_path / "o.json").read_text()), results


def assert_parity(figures):
    assert figures["parity"]["tokens_equal"] is True
    assert figures["parity"]["max_abs_logit_difference"] < 1e-4


@pytest.mark.parametrize(("backend", "combine"), [("mpi", "reduce"), ("ring", "gather")])
def test_two_ranks_say_what_stock_says(backend, combine, tmp_path):
    figures, results = figures_of(backend, 2, tmp_path, "--combine", combine)
    assert_parity(figures)
    counted = figures["communication"]["counted"]
    assert counted["payload_bytes_per_token"] == pytest.approx(figures["communication"]["bytes_per_token"], rel=0.15)
    held = [rank["expert_bytes"] for rank in figures["ranks"]]
    assert held[0] == held[1] == figures["memory"]["full_model_expert_bytes"] // 2
    reports = [out for _, out, _ in results if "Parity" in out]
    assert len(reports) == 1 and "\x1b" not in reports[0]  # Open MPI's ranks have a terminal, this test has none


# --- many cases in one launch -----------------------------------------------------------------------

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}  # divide over 2 and 4 ranks
MODELS = {
    "4bit": {"config": QWEN3 | HEADS, "quantised": True},
    "float32": {"config": QWEN3 | HEADS, "quantised": False},
    "hf": {"config": QWEN3 | HEADS, "quantised": False, "layout": "per-expert", "num_files": 2},
    "few": {"config": QWEN3 | {"num_experts": 2, "num_experts_per_tok": 1}, "quantised": True},
}
BY_HAND = {  # of 8 experts, copies among them
    2: ["0-4", "3-7"],
    3: ["0-3", "3-5", "6,7,0"],
    8: ["7", "6", "5", "4", "3", "2", "1,0", "0"],
}
COPIES = {2: ["0-111", "16-127"], 3: ["0-127", "42-127", "85-127"]}  # of the shipped model's 128


@pytest.fixture(scope="module")
def models(run_here, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    folders = {name: save(root / name, **how) for name, how in MODELS.items()}
    trace = root / "trace.npz"
    options = ("--model", folders["4bit"], "--max-tokens", 20, "--devices", 2, "--trace", trace, "--no-verify")
    result = run_here(SCRIPT, *options, "--prompt", "w5 w90 w17")
    assert result.returncode == 0, result.stderr
    return folders | {"shipped": SHIPPED, "trace": trace}


def cases_of(ranks):
    """{name: options}, with {model} names to fill in: every way over two ranks, over more what depends on how many."""
    replicated = ("--placement", "replicated", "--placement-trace", "{trace}", "--redundant-experts", "3")
    shipped = ("--model", "{shipped}", "--prompt", "import os\n")
    moving = (*shipped, "--max-tokens", "25", "--rebalance-every", "8", "--rebalance-horizon", "100000000")
    cases = {
        "by hand": ("--model", "{float32}", "--placement", "{by_hand}"),
        "replicated": ("--model", "{hf}", *replicated),
        "hybrid": ("--model", "{4bit}" if ranks == 2 else "{float32}", "--attention", "sharded"),
    }
    if ranks == 2:
        cases["on disk"] = ("--model", "{4bit}", "--expert-memory", "40%", "--prefetch", "next-layer")
        cases["on disk, copies"] = (
            *shipped,
            "--placement",
            "{copies}",
            "--expert-memory",
            "12%",
            "--cache-policy",
            "lfu",
        )
    if ranks == 3:
        cases["on disk"] = ("--model", "{hf}", "--expert-memory", "50%", "--combine", "gather")
    if ranks <= 3:
        cases["contiguous"] = ("--model", "{4bit}")
    if ranks == 2:
        cases["sampled"] = ("--model", "{4bit}", "--temp", "0.8", "--seed", "7", "--max-tokens", "16")
        cases["copies"] = (*shipped, "--placement", "{copies}")
        cases["rebalanced"] = (*moving, "--combine", "gather")
    if ranks == 3:
        cases["more ranks than experts"] = ("--model", "{few}")
        cases["rebalanced copies"] = (*moving, "--placement", "{copies}")
    else:
        cases["gather"] = ("--model", "{4bit}", "--combine", "gather", "--placement", "round-robin")
    if ranks == 8:  # where mlx-lm's tensor parallelism cannot split it, see below
        cases["shipped"] = shipped
    return cases


def refusal(name, ranks):
    """What the line of a case that cannot run says, None for one that runs."""
    if name == "hybrid" and ranks > 2:
        return f"4 heads (n_heads), which do not divide over {ranks} ranks"
    return "3 devices: needs 1 to 2" if name == "more ranks than experts" else None


@pytest.mark.parametrize(
    ("backend", "ranks"), [("ring", 2), pytest.param("ring", 3, marks=pytest.mark.slow), ("mpi", 8)]
)
def test_every_way_to_spread_says_what_stock_says(backend, ranks, models, tmp_path):
    places = {name: str(path) for name, path in models.items()}
    for name, devices in {"by_hand": BY_HAND[ranks], "copies": COPIES.get(ranks)}.items():
        places[name] = str(tmp_path / f"{name}-placement.json")
        Path(places[name]).write_text(json.dumps({"every_layer": devices}))
    cases = cases_of(ranks)
    common = ["--prompt", "w5 w90 w17 w4 w33", "--max-tokens", "6", "--verify", "--trials", "0", "--quiet", "--json"]
    lines = [
        [*common, str(tmp_path / f"{name}.json"), *(option.format(**places) for option in options)]
        for name, options in cases.items()
    ]
    (tmp_path / "cases.json").write_text(json.dumps(lines))
    results = launch(
        backend, ranks, "tests/ranks/rank_cases.py", tmp_path / "cases.json", tmp_path=tmp_path, timeout=240
    )
    assert all(status == 0 for status, _, _ in results), results
    of_rank = [json.loads((tmp_path / f"rank-{r}.json").read_text()) for r in range(ranks)]

    for case, name in enumerate(cases):
        answers = [rank[case] for rank in of_rank]
        assert all(answer == answers[0] for answer in answers), name
        if refused := refusal(name, ranks):
            assert refused in answers[0]["error"]
            continue
        figures = json.loads((tmp_path / f"{name}.json").read_text())
        assert_parity(figures)
        assert figures["generation"]["tokens"] == answers[0]["tokens"], name
        if name.startswith("rebalanced"):
            assert any(look["moved"] for look in figures["rebalancing"]["looks"]), name
        if name.startswith("on disk"):
            by_device = figures["cache"]["by_device"]
            assert [each["device"] for each in by_device] == list(range(ranks))
            assert all(sum(each["misses"]) == sum(read["experts"] for read in each["reads"]) > 0 for each in by_device)
            assert figures["cache"]["misses"] == sum(sum(each["misses"]) for each in by_device)
        if name == "hybrid":
            rest = figures["memory"]["full_model_bytes"] - figures["memory"]["full_model_expert_bytes"]
            assert figures["ranks"][0]["rest_bytes"] < rest * 0.8
        if name == "copies":  # share the slots
            slots = [sum(rank["slots_computed_per_layer"]) for rank in figures["ranks"]]
            assert abs(slots[0] - slots[1]) < 0.1 * sum(slots), slots  # by the first holder alone: 0.8


def test_tensor_parallelism_cannot_split_the_shipped_model_over_eight_ranks():
    model, _ = mlx_lm.load(str(SHIPPED))
    with pytest.raises(ValueError, match="needs to be divisible by the quantization group size"):
        model.shard(Rank(0, 8))


def test_one_process_is_the_same_code_path(run_here):
    assert run_here(*RUN, "--devices", 2).returncode == 0


@pytest.mark.skipif(not shutil.which("mpirun"), reason="no mpirun on this machine")
def test_standard_input_reaches_every_rank():
    """mpirun hands it to rank 0 alone."""
    ((command, environment),) = launch_command("mpi", 2, *RUN[:3], "--prompt", "-", "--max-tokens", 4, "--quiet")
    options = {"capture_output": True, "text": True, "timeout": 60}
    result = subprocess.run(command, cwd=ROOT, env=environment, input="import os\n", **options)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
