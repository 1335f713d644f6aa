"""What is said of experts on disk, against the trace by plain loops, and the print against the JSON."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import SHIPPED
from reference import distinct, fewest_misses, lru_hits

import expert_parallel_poc
import qwen3_expert_parallel
from expert_parallel.report import disk
from expert_parallel.trace import RoutingTrace

PROMPT = "def read(path):"
E, L, K, EXPERT = 128, 4, 8, 7680  # of the shipped model; an expert's bytes in its files


def run(capsys, folder, *options, script=qwen3_expert_parallel):
    """(JSON, trace, print) of a run of the main script."""
    arguments = ["--prompt", PROMPT, "--max-tokens", "24", "--trials", "0", "--full", *options]
    arguments += ["--json", str(folder / "run.json"), "--trace", str(folder / "run.npz")]
    args = script.options.parser_of("").parse_args(arguments)
    script.run(args, script_watchdog())
    return json.loads((folder / "run.json").read_text()), RoutingTrace.load(folder / "run.npz"), capsys.readouterr().out


def script_watchdog():
    from expert_parallel.ranks.watchdog import NoWatchdog

    return NoWatchdog()


def expert_bytes():
    from safetensors import safe_open

    with safe_open(SHIPPED / "model.safetensors", framework="np") as file:
        names = [name for name in file.keys() if ".layers.0.mlp.switch_mlp." in name]  # noqa: SIM118
        sizes = [file.get_slice(name) for name in names]
        of_type = {"U32": 4, "BF16": 2, "F16": 2, "F32": 4}
        return sum(int(np.prod(each.get_shape()[1:])) * of_type[each.get_dtype()] for each in sizes)


def steps_of(trace, layer, low=0, high=E):
    """The experts of one device that each pass wanted of a layer; passes that wanted none are left out."""
    found = []
    for step in np.unique(trace.steps):
        chosen = trace.experts[trace.steps == step, layer].ravel()
        if len(mine := chosen[(chosen >= low) & (chosen < high)]):
            found.append(mine)
    return found


def hits_in_waves(steps, room):
    """LRU where a step may want more than there is room for: as `lru_hits`, and the last wave's stay."""
    if all(len(distinct(step)) <= room for step in steps):
        return lru_hits(steps, room)
    recent, hits = [], []
    for step in map(distinct, steps):
        here = [expert for expert in step if expert in recent]
        hits.append(len(here))
        come = here + [expert for expert in step if expert not in here]
        waves = [come[at : at + room] for at in range(0, len(come), room)]
        for wave in waves:
            others = [expert for expert in recent if expert not in wave]
            new = [expert for expert in wave if expert not in recent]
            gone = max(0, len(recent) + len(new) - room)
            recent = [expert for expert in recent if expert not in set(others[:gone])] + new
        # within a step all were used last: what it wanted stands last, the lowest first
        recent = [e for e in recent if e not in step] + sorted(e for e in recent if e in step)
    return hits


def test_every_figure_is_that_of_the_trace(capsys, tmp_path):
    document, trace, text = run(capsys, tmp_path, "--devices", "1", "--expert-memory", "25%", "--cache-policy", "lru")
    cache, room = document["cache"], 32
    hits = [sum(lru_hits(steps_of(trace, layer), room)) for layer in range(L)]
    wanted = [sum(len(distinct(step)) for step in steps_of(trace, layer)) for layer in range(L)]
    misses = sum(wanted) - sum(hits)
    assert (cache["hits"], cache["misses"], cache["policy"], cache["places"]) == (sum(hits), misses, "lru", L * room)
    assert cache["hit_rate"] == pytest.approx(sum(hits) / sum(wanted))
    assert cache["hit_rate_if_kept_at_random_modelled"] == room / E
    assert cache["bytes_read"] == misses * expert_bytes()
    assert cache["bytes_read_per_token"] == pytest.approx(misses * expert_bytes() / len(trace))
    assert 0 < cache["seconds_waited"] < cache["seconds"]
    # The system may have the small file in memory, and reads whole pages.
    known, most = Path("/proc/self/io").exists(), 2 * cache["bytes_read"] + 10**6
    assert 0 <= cache["bytes_from_device"] <= most if known else cache["bytes_from_device"] is None
    assert cache["layers"]["misses_per_layer"] == [w - h for w, h in zip(wanted, hits, strict=True)]
    assert cache["layers"]["hit_rate_per_layer"] == pytest.approx([h / w for w, h in zip(wanted, hits, strict=True)])
    assert cache["prefetch_recall"] is None and cache["experts_read_ahead"] is None
    # By phase: a prompt's passes and the tokens after it.
    decode = len(np.unique(trace.steps[~trace.prefill]))
    of_layers = [lru_hits(steps_of(trace, layer), room) for layer in range(L)]
    late = sum(sum(each[-decode:]) for each in of_layers)
    by_phase = {row["phase"]: row for row in cache["phases"]}
    assert by_phase["decode"]["hit_rate"] == pytest.approx(late / (decode * L * K))
    assert by_phase["decode"]["wanted"] == K and by_phase["decode"]["tokens"] == decode
    early = sum(map(sum, of_layers)) - late
    assert by_phase["prefill"]["hit_rate"] == pytest.approx(early / (sum(wanted) - decode * L * K))
    assert by_phase["decode"]["belady"] > by_phase["decode"]["hit_rate"]
    # Other budgets, and the print.
    for row in cache["budgets"]:
        here = sum(sum(lru_hits(steps_of(trace, layer), row["places"])) for layer in range(L) if row["places"] >= 32)
        assert row["places"] < 32 or row["lru"] == pytest.approx(here / sum(wanted))
        assert f"{row['places']} {row['chance']:.3f} {row['lru']:.3f} {row['lfu']:.3f}" in " ".join(text.split())
    assert re.search(rf"hit rate +{cache['hit_rate']:.3f} \(kept at random: 0.250\)", text)
    assert f"{cache['hit_rate']:.0%} of the experts that steps wanted were in memory (lru)" in " ".join(text.split())
    assert "the same (24 compared)" in text and document["parity"]["max_abs_logit_difference"] == 0
    assert document["memory"]["experts_per_device_bytes"][0] < 0.26 * document["memory"]["full_model_expert_bytes"]


def test_each_device_has_a_cache_of_its_own(capsys, tmp_path):
    document, trace, _ = run(capsys, tmp_path, "--devices", "4", "--expert-memory", "50%", "--cache-policy", "lru")
    for device, counted in enumerate(document["cache"]["by_device"]):
        held = (32 * device, 32 * (device + 1))
        assert counted["device"] == device and counted["places"] == [16] * L
        assert counted["hits"] == [sum(hits_in_waves(steps_of(trace, layer, *held), 16)) for layer in range(L)]
    assert document["cache"]["hits"] == sum(sum(each["hits"]) for each in document["cache"]["by_device"])
    assert document["cache"]["phases"][1]["hit_rate"] > 0.3


def test_a_device_that_answers_all_is_counted_once():
    trace = RoutingTrace(np.array([[[0, 1]], [[1, 0]]]), 4)
    reads = {"experts": 2, "bytes": 20, "seconds_waited": 0.5, "experts_ahead": 0, "bytes_ahead": 0, "useful": 0}
    devices = [
        {"device": d, "policy": "lru", "prefetch": False, "process_bytes_from_device": None,
         "places": [2], "experts": [2], "hits": [2 - 2 * d],
         "misses": [2 - 2 * d], "pinned": [[]], "reads": [reads], "foretold": 0, "foretold_right": 0}
        for d in (0, 1)
    ]  # fmt: skip
    held = np.array([[[True, True, False, False], [False, False, True, True]]])
    _, phases, *_ = disk.of_run(trace, held, devices, [0], 1.0)
    assert phases.also["phases"] == [{"phase": "decode", "tokens": 2, "wanted": 2.0, "hit_rate": 0.5, "belady": 0.5}]


def test_what_was_foretold_is_said_beside_chance(capsys, tmp_path):
    _, _, text = run(capsys, tmp_path, "--devices", "1")
    trace = tmp_path / "before.npz"
    (tmp_path / "run.npz").rename(trace)
    assert "Experts on disk" not in text
    options = (
        "--expert-memory",
        "25%",
        "--cache-policy",
        "pinned",
        "--prefetch",
        "learned",
        "--placement-trace",
        str(trace),
    )
    document, _, text = run(capsys, tmp_path, "--devices", "1", *options)
    cache = document["cache"]
    assert 0.3 < cache["prefetch_recall"] < 1 and cache["prefetch_recall_by_chance_modelled"] == K / E
    assert cache["experts_read_ahead"] == cache["reads"]["experts_ahead"] >= cache["reads"]["useful"] > 0
    assert f"foretold of what was wanted  {cache['prefetch_recall']:.3f} (guessed: 0.062)" in text
    assert "replayed without reading ahead" in text
    assert all(len(each) == 24 for each in cache["by_device"][0]["pinned"])


def test_pictures_and_page_have_the_hit_rate(capsys, tmp_path):
    plots, page = tmp_path / "plots", tmp_path / "page.html"
    run(capsys, tmp_path, "--devices", "1", "--expert-memory", "25%", "--plots", str(plots), "--html", str(page))
    assert (plots / "hit_rate.png").stat().st_size > 10_000
    assert "Hit rate over budget" in page.read_text()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--cache-policy", "lfu"], "--cache-policy is of no use without --expert-memory SIZE"),
        (["--prefetch", "next-layer"], "--prefetch is of no use without --expert-memory SIZE"),
        (["--expert-memory", "25%", "--cache-policy", "pinned"], "--cache-policy pinned needs --placement-trace"),
        (["--expert-memory", "25%", "--prefetch", "learned"], "--prefetch learned needs --placement-trace"),
        (["--expert-memory", "25%", "--rebalance-every", "8"], "--rebalance-every moves experts in memory"),
        (["--expert-memory", "a lot"], "expert memory is a size such as 4GB"),
        (["--expert-memory", "1kB"], "too small: one expert in each of 4 layers takes"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(options, error):
    args = qwen3_expert_parallel.options.parser_of("").parse_args(["--devices", "1", *options])
    with pytest.raises(ValueError, match=error):
        qwen3_expert_parallel.run(args, script_watchdog())


def test_more_memory_than_the_experts_take_is_all_in_memory(capsys, tmp_path):
    document, _, text = run(capsys, tmp_path, "--devices", "1", "--expert-memory", "1GB")
    assert document["cache"] is None and "Experts on disk" not in text
    assert "expert memory 1GB a device: all experts fit" in " ".join(text.split())


# --- from a trace alone ------------------------------------------------------------------------------------


def study(folder, *options):
    parser = expert_parallel_poc.setup_arg_parser()
    args = parser.parse_args([*options, "--quiet", "--json", str(folder / "study.json"), "--devices", "4"])
    expert_parallel_poc.run(args, lambda what=None: None)
    (result,) = json.loads((folder / "study.json").read_text())["results"].values()
    return result


def save_trace(path, seed, tokens=1200, layers=2, experts=12, top_k=2):
    """Layer 1 wants what layer 0 wanted, one further: all of it can be foretold from another such trace."""
    random = np.random.default_rng(seed)
    taste = random.gumbel(size=(tokens, experts)) + random.normal(size=experts)
    first = np.argsort(-taste, axis=1)[:, :top_k]
    trace = RoutingTrace(np.stack([first, (first + 1) % experts], axis=1), experts)
    trace.save(path)
    return trace


def test_a_trace_alone_says_what_a_budget_hits(tmp_path):
    trace = save_trace(tmp_path / "a.npz", 1)
    options = ("--trace", str(tmp_path / "a.npz"), "--expert-memory", "25%,120MB,50%", "--expert-bytes", "10MB")
    cache = study(tmp_path, *options, "--disk", "2")["cache"]
    assert [row["places"] for row in cache["budgets"]] == [3, 6, 6]  # 120 MB are 12 experts of two layers
    for row in cache["budgets"]:
        hits = sum(sum(lru_hits(steps_of(trace, layer), row["places"])) for layer in range(2))
        assert row["lru"] == pytest.approx(hits / (1200 * 4)) and row["belady"] >= row["lru"]
        missed = 1 - max(row["lru"], row["lfu"], row["aging"])
        assert row["read"] == pytest.approx(missed * 4 * 10e6)
        assert (
            row["milliseconds"] == pytest.approx(1e3 * row["read"] / 2e9) and row["bytes"] == row["places"] * 2 * 10e6
        )
    short = RoutingTrace(trace.experts[:12], 12)
    found = disk.budgets(short, (0.25,)).also["budgets"][0]["belady"]
    misses = sum(fewest_misses([set(step.tolist()) for step in steps_of(short, layer)], 3) for layer in range(2))
    assert found == pytest.approx(1 - misses / (12 * 4))


def test_steps_between_two_uses(tmp_path):
    trace = RoutingTrace(np.array([[[0]], [[1]], [[0]], [[0]], [[2]], [[1]]]), 3)
    assert sorted(disk.reuse(trace).tolist()) == [1, 2, 4]
    saved = save_trace(tmp_path / "a.npz", 2)
    gaps = []
    for layer in range(2):
        for expert in range(12):
            at = [n for n, row in enumerate(saved.experts[:, layer]) if expert in row]
            gaps += [b - a for a, b in zip(at, at[1:], strict=False)]
    reuse = study(tmp_path, "--trace", str(tmp_path / "a.npz"), "--expert-memory", "50%")["cache"]["reuse"]
    assert reuse["median_steps"] == np.median(gaps) and reuse["mean_steps_if_in_turn"] == 6
    assert reuse["ninth_tenth_steps"] == pytest.approx(np.quantile(gaps, 0.9))


def test_another_trace_foretells(tmp_path):
    save_trace(tmp_path / "a.npz", 1), save_trace(tmp_path / "b.npz", 2)
    options = ("--trace", str(tmp_path / "a.npz"), "--test-trace", str(tmp_path / "b.npz"), "--expert-memory", "50%")
    foretold = study(tmp_path, *options)["cache"]["foretold"]
    assert foretold["recall"] > 0.9 and foretold["recall_by_chance_modelled"] == pytest.approx(2 / 12)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--expert-memory", "25%"], "--expert-memory needs --trace"),
        (["--trace", "x", "--expert-memory", "25%,oops"], "expert memory is a size"),
        (["--trace", "x", "--expert-memory", "25%", "--disk", "0"], "--disk 0.0: needs more than 0 GB/s"),
        (["--trace", "x", "--expert-memory", "25%", "--expert-bytes", "-1"], "expert memory is a size"),
        (["--trace", "x", "--expert-bytes", "2MB"], "--expert-bytes is of no use without --expert-memory"),
        (["--trace", "x", "--disk", "2"], "--disk is of no use without --expert-memory"),
        (["--trace", "x", "--expert-memory", "5%", "--expert-bytes", "50%"], "--expert-bytes 50% is a share"),
    ],
)
def test_what_the_study_cannot_do_is_refused(options, error):
    with pytest.raises(ValueError, match=error):
        expert_parallel_poc.run(expert_parallel_poc.setup_arg_parser().parse_args(options), lambda what=None: None)
