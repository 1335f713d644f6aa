"""Warm-up is cut from recorded traces, by all who read them, and they say so."""

import json
import resource
import time

import numpy as np
import pytest
from conftest import SHIPPED

from expert_parallel import RoutingTrace, balancedness, place_experts
from expert_parallel.balance import fan_out
from expert_parallel.formats.traces import from_arrays, read_loads, read_trace
from expert_parallel.formats.warm_up import warm_up_rows, without_warm_up
from expert_parallel.serving import devices_of_trace


def choices(num_tokens, num_layers, top_k, num_experts=16, seed=0):
    scores = np.random.default_rng(seed).random((num_tokens, num_layers, num_experts))
    return scores.argsort(axis=2)[..., :top_k].astype(np.uint16)


def test_warm_up_is_found_and_distorts():
    real = choices(3000, 2, 4)
    blank = np.tile(real[:1], (1500, 1, 1))
    blank[::2] = blank[::2, :, ::-1]  # the same experts in another order
    trace = RoutingTrace(np.concatenate([blank, real[1:]]), 16)
    assert warm_up_rows(trace).sum() == 1500
    clean = without_warm_up(trace)
    assert np.array_equal(clean.experts, real[1:])
    assert clean.metadata["warm_up_rows"] == 1500
    placement = place_experts(clean.loads(), 4)
    with_it, without = (balancedness(placement.device_loads(t.loads())) for t in (trace, clean))
    assert without > 0.95 and with_it < without - 0.1


def test_warm_up_of_each_rank():
    parts = [choices(40, 2, 4, seed=s) for s in (1, 2)]
    parts = [np.concatenate([np.tile(part[:1], (20 + 10 * n, 1, 1)), part[1:]]) for n, part in enumerate(parts)]
    trace = from_arrays(parts, num_experts=16)
    assert np.flatnonzero(np.diff(warm_up_rows(trace).astype(int))).tolist() == [19, 58, 88]
    assert len(without_warm_up(trace)) == 2 * 39


def test_warm_up_in_the_middle_but_not_in_text_or_in_short_runs():
    trace = RoutingTrace(choices(200, 2, 4), 16)
    assert not warm_up_rows(trace).any()
    assert without_warm_up(trace) is trace
    repeated = np.concatenate([np.tile(trace.experts[:1], (15, 1, 1)), trace.experts[1:]])
    assert not warm_up_rows(RoutingTrace(repeated, 16)).any()
    longer = np.concatenate([trace.experts[:1], repeated])  # 16 rows
    assert np.flatnonzero(warm_up_rows(RoutingTrace(longer, 16))).tolist() == list(range(16))
    later = np.concatenate([trace.experts[:50], np.tile(trace.experts[:1], (40, 1, 1)), trace.experts[50:]])
    assert np.flatnonzero(warm_up_rows(RoutingTrace(later, 16))).tolist() == list(range(50, 90))
    only = RoutingTrace(np.tile(trace.experts[:1], (9000, 1, 1)), 16)
    assert warm_up_rows(only).all()


def test_a_long_trace_in_bounded_time_and_memory():
    """A tenth of a million tokens x 48 layers x 8; measured for the whole million: 6 s and 1.2 GB."""
    experts = np.random.default_rng(0).integers(0, 128, (100_000, 48, 8), dtype=np.uint16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    trace = without_warm_up(RoutingTrace(experts, 128))
    placement = place_experts(trace.loads(), 8)
    assert balancedness(placement.device_loads(trace.loads())) > 0.99
    # Eight independent picks on eight devices: 8 (1 - (7/8)^8) of them are touched.
    assert fan_out(devices_of_trace(trace.experts, placement.held)) == pytest.approx(
        np.full(48, 8 * (1 - (7 / 8) ** 8)), rel=0.01
    )
    assert time.process_time() - start < 15
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 500_000 * (1024 if grown > 1e9 else 1)  # kB on Linux, bytes on macOS


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_choice_that_is_frequent_is_no_warm_up(share):
    """Top-1 of one layer: the hot expert is chosen 16 times and more in a row by chance."""
    random = np.random.default_rng(0)
    experts = np.where(random.random(20_000) < share, 3, random.integers(0, 8, 20_000))
    assert not warm_up_rows(RoutingTrace(experts[:, None, None], 8)).any()


# --- those who read traces --------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """{warm, clean, only: a file} of the shipped model's shape: 2,000 warm-up rows as vLLM writes them before text."""
    real = choices(300, 4, 8, 128) // 2  # half of the experts are never chosen
    warm = np.tile(np.arange(8, dtype=np.uint16), (2000, 4, 1))
    for name, experts in {"warm": np.concatenate([warm, real]), "clean": real, "only": warm}.items():
        np.save(tmp_path / f"{name}.npy", experts)
    return {name: tmp_path / f"{name}.npy" for name in ("warm", "clean", "only")}


SAID = "warm.npy: left out 2000 warm-up rows, all alike"


def test_the_reader_leaves_warm_up_out(files):
    assert np.array_equal(read_trace(files["warm"], 128).experts, read_trace(files["clean"], 128).experts)
    assert np.array_equal(read_loads(files["warm"], 128), read_loads(files["clean"], 128))
    for read in (read_trace, read_loads):
        with pytest.raises(ValueError, match="only.npy: it has no tokens but 2000 warm-up rows, all alike"):
            read(files["only"], 128)


@pytest.mark.parametrize("strategy", ["balanced", "affinity"])
def test_placements_do_not_see_warm_up(strategy, files, tmp_path, run_here):
    line = ("--model", SHIPPED, "--max-tokens", 1, "--no-verify", "--trials", 0, "--placement", strategy)
    found = {}
    for name in ("warm", "clean"):
        saved = ("--save-placement", tmp_path / "p.json", "--json", tmp_path / "o.json")
        done = run_here("qwen3_expert_parallel.py", *line, "--placement-trace", files[name], *saved)
        notes = json.loads((tmp_path / "o.json").read_text())["placement"]["notes"]
        assert (SAID in done.stdout, notes) == ((name == "warm"), [SAID] * (name == "warm")), done.stderr
        document = json.loads((tmp_path / "p.json").read_text())
        assert document["metadata"].pop("notes", []) == notes
        found[name] = document
    assert found["warm"] == found["clean"]


def test_projections_do_not_see_warm_up(files, run_here):
    line, found = ("--model", SHIPPED, "--devices", 1, 8), {}
    for name in ("warm", "clean"):
        done = run_here("model_analysis.py", *line, "--trace", files[name], "--json", "-")
        found[name] = json.loads(done.stdout)["projection"]["devices"]
        assert (SAID in run_here("model_analysis.py", *line, "--trace", files[name]).stdout) == (name == "warm")
    assert found["warm"] == found["clean"]
    done = run_here("model_analysis.py", *line, "--trace", files["only"])
    assert done.returncode == 2 and "no tokens but 2000 warm-up rows" in done.stderr
