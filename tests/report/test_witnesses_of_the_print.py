"""What a run prints, cell by cell, is what its JSON says, and each label is that of the figures under it.

The figures themselves have their witnesses in test_witnesses_of_the_document.py. A table that is new in print fails
here until it is compared.
"""

import math
import re

import pytest
import witness
from conftest import SHIPPED
from witness import columns, facts, human
from witness_runs import MOVING, OVER_RANKS, PROMPT, RUNS, WEIGHTS, E, K, L, run_of


@pytest.fixture(params=RUNS)
def run(request):
    return run_of(request.param)


def block(run, start):
    """Lines of the one block whose title begins so, and what its title ends with."""
    (title,) = [title for title in witness.blocks_of(run.text) if title.startswith(start)]
    return witness.blocks_of(run.text)[title], title.removeprefix(start)


def mean(values):
    return sum(values) / len(values)


def test_every_block_is_known(run):
    parts = ["What runs where", "answer", "In short", "Parity with stock mlx-lm", "Routing (", "Routing by phase"]
    parts += ["Balance over devices", "Balance over all layers", "Load per device", "Memory per device"]
    parts += ["Memory over all", "Communication", "Speed"]
    parts += ["Rebalancing"] if "rebalance_every" in run.asked else []
    parts += ["Ranks"] if run.ranks > 1 else []
    titles = list(witness.blocks_of(run.text))
    assert len(titles) == len(parts) and titles[:3] == ["answer", "What runs where", "In short"]
    assert all(sum(title.startswith(part) for title in titles) == 1 for part in parts)


def test_in_short(run):
    """The verdict's figures are those of the tables under it."""
    short, document = facts(block(run, "In short")[0]), run.document
    parity, memory, balance = document["parity"], document["memory"], document["balance"]
    off = parity["max_abs_logit_difference"]
    same, _, logits = short["answer"].partition(" logits ")
    assert same == f"the same as stock mlx-lm's: {parity['tokens_compared']} tokens, {parity['logits_compared']:,}"
    bound = float(logits.removeprefix("within ").replace("to the bit", "0"))
    assert off <= bound <= 2 * off
    fullest, whole = human(max(memory["per_device_bytes"])), human(memory["full_model_bytes"])
    times = memory["full_model_bytes"] / max(memory["per_device_bytes"])
    assert short["memory"] == f"the fullest device holds {fullest} of {whole}, {times:.2f}x less"
    even = mean([(mean(row) + 1e-5) / (max(row) + 1e-5) for row in balance["device_loads"]])
    assert f"balancedness {even:.2f}, the devices' mean load over the fullest one's: 1 is even" in short["balance"]
    assert f"chose at random would give {balance['balancedness_if_uniform_simulated']:.2f}" in short["balance"]
    ours, theirs = (document["generation"][f"{whose}tokens_per_second"] for whose in ("", "stock_"))
    assert short["speed"].startswith(f"{ours:.1f} tokens/s, stock mlx-lm {theirs:.1f} (medians of 3 runs)")
    assert ("real ranks" in short) == (run.ranks == 1)


QUICKER = (
    r"(\d+ of \d+ linear layers|experts) (split over streams|take a prompt's tokens at once), from \d+"
    " tokens? on|devices side by side"
)


def test_what_runs_where(run):
    where, document = facts(block(run, "What runs where")[0]), run.document
    about, first = document["environment"], run.history[0][1]
    counts = sorted({len(experts) for layer in first for experts in layer})
    held = " to ".join(map(str, counts[:1] + counts[-1:] if len(counts) > 1 else counts))
    copies = sum(map(len, first[0])) - E
    more = f", {copies} copies a layer" if copies else ""
    files, _, seconds = where.pop("read").partition(" of files in ")
    assert files == human(WEIGHTS["files"] if run.ranks == 1 else read_by_rank_0(run))
    assert 0 <= float(seconds.removesuffix(" s")) <= run.wall
    ways = (found for found in where.pop("products", "").split("; ") if found)  # what a trial finds is the machine's
    assert all(re.fullmatch(QUICKER, way) for way in ways)
    assert where == {
        "model": run.asked["model"],
        "MoE layers": f"{L} x {E} experts",
        "dtype": "experts 4-bit in groups of 64, the rest also 8-bit (gate), float32",
        "prompt": f"{run.prefill.count(True)} tokens: {repr(PROMPT)[1:-1]}",
        "devices": f"{run.ranks} ranks" if run.ranks > 1 else f"{len(first[0])} simulated in one process",
        "placement": f"{document['placement']['strategy']}, {held} of {E} experts on each device{more}",
        "running on": f"{about['device']}, {about['device_name']}, {about['cores']} cores, {about['system']}",
        "versions": f"mlx {about['mlx']}, mlx-lm {about['mlx_lm']}, Python {about['python']}",
    }


def read_by_rank_0(run):
    """Bytes of files: all that is no expert, and its own experts in the files' types."""
    as_in_files = witness.weigh(SHIPPED, float_width=2)
    return as_in_files["rest"] + sum(len(layer[0]) for layer in run.history[0][1]) * as_in_files["one"]


def test_the_answer(run):
    assert witness.blocks_of(run.text)["answer"] == run.document["generation"]["text"].strip("\n")


def test_parity(run):
    lines, label = block(run, "Parity with stock mlx-lm")
    parity = run.document["parity"]
    assert label == f" ({parity['source']})" == " (measured)"
    assert facts(lines) == {
        "tokens": f"the same ({parity['tokens_compared']} compared)",
        "largest logit difference": f"{parity['max_abs_logit_difference']:.3g} ({parity['logits_compared']} compared)",
    }


def test_routing(run):
    lines, label = block(run, "Routing (")
    figures = run.document["routing"]["all"]
    assert label == f"{figures['source']}, {figures['tokens']} tokens, top-{K} of {E})"
    assert label.startswith("measured")
    head, rows, note = columns(lines, L)
    assert head == ["layer", "hottest expert", "load / mean", "entropy (1 = even)", "never used"]
    chance = figures["uniform_simulated"]
    assert note == (
        f"Uniform routing of as many tokens (simulated): {chance['hottest_over_mean']:.2f}x, {chance['entropy']:.3f},"
        f" {chance['never_used']:.0f} never used."
    )
    for l, row in enumerate(rows):
        hottest, over = figures["hottest_expert_per_layer"][l], figures["hottest_over_mean_per_layer"][l]
        entropy, unused = figures["entropy_per_layer"][l], figures["unused_experts_per_layer"][l]
        assert row == [f"{l}", f"#{hottest}", f"{over:.2f}x", f"{entropy:.3f}", f"{unused}"]


def test_routing_by_phase(run):
    lines, label = block(run, "Routing by phase")
    assert label == f" ({run.document['routing']['source']}, means over layers; if uniform: simulated)"
    assert run.document["routing"]["source"] == "measured"
    head, rows, note = columns(lines, 4)
    assert head == ["phase", "tokens", "entropy", "hottest / mean", "never used"] and not note
    for name, row, even in zip(("prefill", "decode"), rows[::2], rows[1::2], strict=True):
        figures = run.document["routing"][name]
        chance = figures["uniform_simulated"]
        cells = [f"{chance['entropy']:.3f}", f"{chance['hottest_over_mean']:.2f}x", f"{chance['never_used']:.1f}"]
        assert even == ["if uniform", "-", *cells]
        entropy, over = mean(figures["entropy_per_layer"]), mean(figures["hottest_over_mean_per_layer"])
        unused = mean(figures["unused_experts_per_layer"])
        assert row == [name, f"{figures['tokens']}", f"{entropy:.3f}", f"{over:.2f}x", f"{unused:.1f}"]


def test_balance_over_devices(run):
    lines, label = block(run, "Balance over devices")
    figures = run.document["balance"]
    assert label == f" ({figures['source']})" == " (measured)"
    head, rows, note = columns(lines, L)
    assert head == ["layer", "balancedness", "max/mean-1", "std/mean", "min/max", "fan-out"]
    names = ("balancedness", "imbalance_ratio", "coefficient_of_variation", "min_max_ratio")
    for l, row in enumerate(rows):
        cells = [f"{figures[f'{name}_per_layer'][l]:.3f}" for name in names]
        assert row == [f"{l}", *cells, f"{figures['fan_out_per_layer'][l]:.2f}"]
    assert f"balancedness: mean / max, 1 is even, 1/{len(figures['device_loads'][0])} all on one device." in note
    assert "fan-out: devices that a token goes to." in note


def test_balance_over_all_layers(run):
    lines, label = block(run, "Balance over all layers")
    figures = run.document["balance"]
    assert label == f" ({figures['source']})" == " (measured)"
    uniform = figures.get("fan_out_if_uniform_modelled")
    beside = "" if uniform is None else f" (uniform: {uniform:.2f}, modelled)"
    expected = {
        "balancedness, mean over layers (SGLang)": beside_chance(figures),
        "balancedness, aggregate (vLLM)": f"{figures['balancedness_aggregate']:.3f}",
        "devices touched per token (fan-out)": f"{figures['fan_out']:.2f}{beside}",
    }
    if "placement_trace" in run.asked:
        tokens = len(witness.read_trace(run.asked["placement_trace"])[0])
        there, unseen = (figures[f"balancedness_{name}_simulated"] for name in ("fitted", "expected"))
        expected[f"placement fitted on {tokens} tokens"] = f"{there:.3f} on those (simulated, copies share equally)"
        expected["to expect on unseen tokens"] = f"{unseen:.3f} (simulated: first half fits, second judges)"
    for name in ("prefill", "decode"):
        phase = figures["phases"][name]
        line = f"balancedness in {name} ({phase['tokens']} tokens)"
        expected[line] = beside_chance(phase)
    expected["note"] = (
        "SGLang: mean load over the fullest device's in each layer, then the mean of layers; vLLM: both are summed over"
        " layers first."
    )
    assert facts(lines) == expected


def beside_chance(figures):
    even = figures["balancedness_if_uniform_simulated"]
    return f"{figures['balancedness_layers']:.3f} (uniform: {even:.3f}, simulated)"


def test_the_map_of_loads(run):
    lines, label = block(run, "Load per device")
    assert lines[0].split() == ["layer", "devices"]
    assert " ".join(lines[1 + L :]) == (
        "three characters a device; of the layer's mean blank is under 1/4, ░ under 3/4, ▒ under 5/4, ▓ under 7/4, █"
        " more."
    )
    assert label in ("", " (measured)")
    expected = witness.shades(run.document["balance"]["device_loads"])
    assert sum(line is not None for line in expected) > 0
    assert all(line in (None, shown) for line, shown in zip(expected, lines[1 : 1 + L], strict=True))


def test_memory(run):
    lines, label = block(run, "Memory per device")
    figures, first = run.document["memory"], run.history[0][1]
    assert label == f" ({figures['source']})"
    head, rows, note = columns(lines, len(first[0]))
    assert head == ["device", "experts", "the rest", "together"] and not note
    for device, row in enumerate(rows):
        names = ("experts_per_device_bytes", "rest_per_device_bytes", "per_device_bytes")
        assert row == [f"{device}", *(human(figures[name][device]) for name in names)]
    whole, experts = human(figures["full_model_bytes"]), human(figures["full_model_expert_bytes"])
    fullest = human(max(figures["per_device_bytes"]))
    assert facts(block(run, "Memory over all")[0]) == {
        "whole model": f"{whole} in memory, {experts} of it experts",
        "fullest device": f"{fullest}: {figures['reduction']:.2f}x less than the whole",
        "experts alone": f"{figures['reduction_of_experts']:.2f}x less",
        "key-value cache": f"{human(figures['kv_cache_bytes'])} on each device besides",
        "process at its peak": f"{human(figures['peak_process_bytes'])}, with Python and MLX",
    }


def test_communication(run):
    lines, label = block(run, "Communication")
    figures = run.document["communication"]
    alone = "; in one process nothing is sent" if run.ranks == 1 else ""
    assert label == f" ({figures['source']}, {figures['value_bytes']}-byte values{alone})"
    both, used = figures["bytes_per_token_by_combine"], figures["combine"]
    sent = figures["ring_bytes_sent_per_token_and_rank"]
    expected = {
        "reduce: weighted sums, all-summed": f"{human(both['reduce'])} per token",
        "gather: every slot's output, all-summed": f"{human(both['gather'])} per token",
        f"{used} by a ring, sent by each rank": f"{human(sent)} per token",
    }
    if run.ranks > 1:
        counted = figures["counted"]
        text = f"{human(counted['payload_bytes_per_token'])} per token at most, {counted['calls']} calls"
        expected[f"counted at the calls ({counted['source'].partition(' ')[0]})"] = text
        expected["note"] = (
            "at most: of a prompt MLX carries out only what its caches need; calls: of collectives, by each rank"
        )
    assert facts(lines) == expected


def test_speed(run):
    lines, label = block(run, "Speed")
    figures, seconds = run.document["generation"], run.document["time"]
    assert label == f" ({figures['source']}, medians of 3 runs after a warm-up, lowest and highest behind)"
    spread = {name: f"{min(speeds):.1f} to {max(speeds):.1f}" for name, speeds in figures["runs"].items()}
    prompt, answer = figures["prompt_tokens"], f"{run.prefill.count(False)} tokens"
    answer += ", the end token among them" if run is run_of("ended") else ""
    share = seconds["experts"] / seconds["total"]
    assert facts(lines) == {
        "time to first token": f"{figures['seconds_to_first_token']:.3f} s",
        "prompt": f"{figures['prompt_tokens_per_second']:.1f} tokens/s"
        f" ({prompt} tokens; {spread['prompt_tokens_per_second']})",
        "generation": f"{figures['tokens_per_second']:.1f} tokens/s ({answer}; {spread['tokens_per_second']})",
        "generation by stock mlx-lm": f"{figures['stock_tokens_per_second']:.1f} tokens/s"
        f" ({spread['stock_tokens_per_second']})",
        "share of time in experts": f"{share:.0%} (measured on {seconds['tokens']} tokens with stops)",
        "note": "with stops: extra tokens, with a wait after each part, which makes them slower",
    }
    assert seconds["source"].startswith("measured")


@pytest.mark.parametrize("name", MOVING)
def test_rebalancing(name):
    run = run_of(name)
    lines, label = block(run, "Rebalancing")
    looks = run.document["rebalancing"]["looks"]
    head, rows, note = columns(lines, len(looks))
    assert head == ["after", "moved", "bytes", "pause", "predicted", "gain", "unmoved", "as moved"] and not label
    for look, row in zip(looks, rows, strict=True):
        cells = ["-"] * 6
        if look["moved"]:
            pauses = (look[name] for name in ("pause_seconds", "pause_seconds_modelled", "gain_seconds_modelled"))
            evenness = (look["since"][name] for name in ("balancedness_unmoved", "balancedness"))
            cells = [human(look["bytes_of_all"]), *(f"{s:.2f} s" for s in pauses), *(f"{b:.3f}" for b in evenness)]
        assert row == [f"{look['after_tokens']}", f"{look['moves_of_all']}" if look["moved"] else "stay", *cells]
    assert "the pause are measured, predicted pause and gain modelled" in note
    assert "balancedness of the tokens since (measured)" in note


@pytest.mark.parametrize("name", OVER_RANKS)
def test_ranks(name):
    run = run_of(name)
    lines, label = block(run, "Ranks")
    tokens = run.document["time"]["tokens"]
    assert label == f" (measured; milliseconds per token, on {tokens} tokens with stops)"
    head, rows, note = columns(lines, 2)
    assert head == ["rank", "experts", "process", "slots", "experts ms", "collectives ms", "waiting ms"]
    assert note == (
        "slots: (token, chosen expert) pairs that a rank computed, in all layers; waiting: for the slowest rank"
    )
    for number, (rank, row) in enumerate(zip(run.document["ranks"], rows, strict=True)):
        took = [1000 * rank["seconds"][part] / tokens for part in ("experts", "collectives", "waiting")]
        slots = sum(rank["slots_computed_per_layer"])
        sizes = [human(rank["expert_bytes"]), human(rank["resident"]["now"])]
        assert row == [f"{number}", *sizes, f"{slots}", *(f"{ms:.2f}" for ms in took)]


def test_shares_lie_between_none_and_all(run):
    balance, parts = run.document["balance"], run.document["routing"]
    shares = [balance["balancedness_layers"], balance["balancedness_aggregate"], *balance["min_max_ratio_per_layer"]]
    shares += [share for name in ("all", "prefill", "decode") for share in parts[name]["entropy_per_layer"]]
    assert all(math.isfinite(share) and 0 <= share <= 1 for share in shares)
