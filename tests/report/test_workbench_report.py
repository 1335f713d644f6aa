"""The workbench's report: what it prints held against its JSON, and figures recomputed by plain loops."""

import json
import random
import re

import mlx.core as mx
import numpy as np
import pytest
from printed import facts_of, lines_of

from expert_parallel import place_experts
from expert_parallel.projection.links import Link
from expert_parallel.report import workbench
from expert_parallel.report.table import sections
from expert_parallel.study.phases import MEASURED, SmallLayer, scenario_tokens
from expert_parallel.study.remedies import Choices

E, K, D = 32, 4, 4


@pytest.fixture(scope="module")
def hot():
    """(tables, JSON, fit, test) of a layer with one hot expert."""
    layer = SmallLayer(32, 16, E, K)
    fit, test, x, wish = scenario_tokens(layer, "hot", 2048)
    tables = workbench.study(layer, fit, test, x, wish, D, 4, Link(20e-6, 5e9))
    return "\n".join(map(str, tables)), json.loads(json.dumps(sections(tables), allow_nan=False)), fit, test


def test_loads_of_devices_counted_slot_by_slot(hot):
    text, figures, _, test = hot
    loads = [0] * D
    for token in test.experts[:, 0].tolist():
        for expert in token:
            loads[expert // (E // D)] += 1
    assert figures["device_loads_simulated"] == [loads]
    shares = " ".join(f"{100 * load / sum(loads):.0f}" for load in loads)
    title = f"{D} contiguous devices, {MEASURED} tokens, 5 passes, layer 0"
    assert facts_of(text, title)["load per device, %"] == f"{shares} (simulated)"


def by_chance(tokens, rounds=200):
    """Balancedness of contiguous devices when every expert is as likely, by Python's own dice."""
    dice, found = random.Random(5), []
    for _ in range(rounds):
        loads = [0] * D
        for _ in range(tokens):
            for expert in dice.sample(range(E), K):
                loads[expert // (E // D)] += 1
        found.append(sum(loads) / D / max(loads))
    return sum(found) / rounds


def test_what_is_printed_is_what_json_says(hot):
    text, figures, fit, test = hot
    facts = facts_of(text, f"{D} contiguous devices")
    assert (figures["tokens_fit"], figures["tokens_test"]) == (len(fit.experts), len(test.experts)) == (1024, 1024)
    phases, parts = figures["phases_seconds_measured"], figures["parts_seconds"]
    for label, seconds in (("one pass, ms (measured)", phases), ("machines, ms", parts)):
        said = dict(re.findall(r"(\w+) ([\d.]+)", facts[label]))
        assert said == {name: f"{1e3 * seconds[name]:.1f}" for name in said}
    assert set(said) == set(parts) == set(figures["parts_sources"])  # the share below is of what stands there
    modelled = [name for name, source in figures["parts_sources"].items() if source == "modelled"]
    assert modelled == ["communication"]
    assert re.search(r"routing [\d.]+ \(measured\); communication [\d.]+ \(modelled\)$", facts["machines, ms"])
    largest = max(parts, key=parts.get)
    assert figures["bottleneck"] == largest
    assert facts["bottleneck"] == f"{largest}, {parts[largest] / sum(parts.values()):.0%} of the layer"
    assert facts["balance without copies"] == f"at most {figures['most_balancedness_without_copies']:.3f} (bound)"
    assert facts["off mlx-lm, off dense"] == f"0, {figures['parity']['dense']:.1g} (measured)"
    hottest, rule = figures["hot_experts"]["hottest"][0], figures["hot_experts"]["rule"]
    assert facts["hottest expert"].startswith(f"#{hottest['expert']} of layer 0, {hottest['over_mean']:.1f}x the mean")
    even = figures["hot_experts"]["uniform_simulated"]
    assert facts["hottest expert"].endswith(f"(uniform: {even:.2f}x, simulated)") and 1.1 < even < 1.3
    even = figures["balancedness_if_uniform_simulated"]
    assert facts["balance if uniform"] == f"{even:.3f}, batches of 256 tokens (simulated)"
    assert by_chance(256) == pytest.approx(even, rel=0.01)
    assert facts["seen after"] == f"{hottest['tokens_until_seen']} tokens: {rule}"


def test_what_was_learnt_in_print_and_json(hot):
    text, figures, fit, test = hot
    facts = facts_of(text, f"{D} contiguous devices")
    counts = np.zeros((2, E))
    for n, part in enumerate((fit, test)):
        for token in part.experts[:, 0].tolist():
            for expert in token:
                counts[n][expert] += 1
    cosine = counts[0] @ counts[1] / (counts[0] @ counts[0] * (counts[1] @ counts[1])) ** 0.5
    found = figures["stability_simulated"]
    assert found["cosine"] == pytest.approx(cosine) and 0.98 < found["cosine_if_shuffled"] < 1
    shuffled = f"{found['cosine_if_shuffled']:.3f} if shuffled (simulated)"
    assert facts["loads that last"] == f"cosine {cosine:.3f} of both parts; {shuffled}"
    enough = figures["enough_tokens_simulated"]
    assert enough in (16, 64, 256) and facts["enough to fit on"].startswith(f"{enough} tokens of 1024: more gain at")
    over = figures["over_optimum_simulated"]
    rest = ", ".join(f"{name} {over[name]:.2f}" for name in ("least loaded", "by turns", "shared equally"))
    assert sorted(facts["among copies"].split(": ")[1].removesuffix(" (simulated)").split(", ")) == sorted(
        rest.split(", ")
    )
    assert "learning_curve" not in figures


def test_remedies_in_print_and_json(hot):
    text, figures, *_ = hot
    assert max(map(len, text.splitlines())) <= 80
    head, *lines = lines_of(text, "Remedies (balancedness and fan-out simulated)")
    times, *timed, first, second = lines_of(text, "Remedies, ms of the slowest device")
    assert f"{first} {second}" == (
        "measured: median of 5 passes in turn with the others', and their range; not the load that is modelled"
    )
    assert head.split() == ["remedy", "fit", "test", "fan-out", "price"]
    assert re.split(r"\s{2,}", times) == ["remedy", "modelled, fit", "measured, test", "range"]
    for line, of_times, remedy in zip(lines, timed, figures["remedies"], strict=True):
        modelled, measured = (remedy[f"slowest_device_seconds_{way}"] for way in ("modelled", "measured"))
        low, high = remedy["slowest_device_seconds_spread"]
        assert 0 < low <= measured <= high
        cells = [f"{remedy['balancedness_fit']:.2f}", f"{remedy['balancedness_test']:.2f}", f"{remedy['fan_out']:.1f}"]
        assert line.removeprefix(remedy["remedy"]).split()[:3] == cells
        assert line.endswith(remedy["price"])
        cells = [f"{1e3 * seconds:.1f}" for seconds in (modelled, measured, low, high)]
        assert of_times.removeprefix(remedy["remedy"]).replace(" to ", " ").split() == cells
    assert [remedy["remedy"] for remedy in figures["remedies"]][:5] == [
        "contiguous", "round-robin", "balanced", "replicated", "affinity",
    ]  # fmt: skip


def test_balancedness_of_a_remedy_by_a_plain_loop(hot):
    _, figures, fit, test = hot
    for part, key in ((fit, "balancedness_fit"), (test, "balancedness_test")):
        placement, means, highest = place_experts(fit.loads(), D, "balanced"), 0, 0
        for start in range(0, len(part.experts), 256):
            loads = [0] * D
            for expert in part.experts[start : start + 256].ravel().tolist():
                loads[placement.devices_of(0, expert)[0]] += 1
            means, highest = means + sum(loads) / D, highest + max(loads)
        assert figures["remedies"][2][key] == pytest.approx(means / highest)


def test_even_routing_has_no_hot_expert_and_proposes_nothing():
    experts = np.tile(np.arange(E).reshape(-1, K), (256, 1))[:, None]
    choices, layer = Choices(experts, E), SmallLayer(32, 16, E, K)
    x = mx.random.normal((MEASURED, 32))
    tables = workbench.study(layer, choices, choices, x, None, D, 4, Link(20e-6, 5e9))
    facts, figures = facts_of(str(tables[0]), f"{D} contiguous"), sections(tables)
    assert facts["load per device, %"] == "25 25 25 25 (simulated)"
    assert facts["proposed"] == "nothing: no placement is quicker by 2% or more (modelled, fit)"
    assert "no cap and re-route and no load-aware router: they need the router's scores" in str(tables[1])
    assert "hottest expert" not in facts and "seen after" not in facts
    assert figures["hot_experts"]["hottest"] == [] and figures["proposed"]["remedy"] == "contiguous"
    assert figures["most_balancedness_without_copies"] == pytest.approx(1)


def test_words():
    plan = {"remedy": "balanced", "seconds_measured": [0.006, 0.0035], "seconds_modelled": [0.005, 0.003]}
    assert workbench.proposed_text(plan) == "balanced: 6.0 to 3.5 ms (measured, test), 5.0 to 3.0 (modelled, fit)"
    hot = {"expert": 3, "over_mean": 12.34, "alone_over_device_mean": 1.5, "layer": 7}
    assert workbench.hottest_text(hot) == "#3 of layer 7, 12.3x the mean, too much for one device"
    assert workbench.hottest_text(hot | {"alone_over_device_mean": 0.9}) == "#3 of layer 7, 12.3x the mean"


# --- a trace of two layers ------------------------------------------------------------------------------------------

LINK = Link(1e-3, 2e6)  # slow, so that every step and byte of it counts


@pytest.fixture(scope="module")
def traced():
    """(tables, JSON, fit, test, what is timed): layer 0 is even, layer 1 favours experts 12 to 15, 13 most of all."""
    wish = np.random.default_rng(3).gumbel(size=(2048, 2, E))
    wish[:, 1, 12:16] += 1.5
    wish[:, 1, 13] += 2
    experts = np.argsort(-wish, axis=2)[..., :K]
    fit, test, layer = Choices(experts[:1024], E), Choices(experts[1024:], E), SmallLayer(32, 16, E, K)
    timed, real = [], workbench.slowest_device_work
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workbench, "slowest_device_work", lambda *asked: timed.append(asked[2:]) or real(*asked))
        tables = workbench.study(layer, fit, test, mx.random.normal((MEASURED, 32)), None, D, 4, LINK)
    return "\n".join(map(str, tables)), json.loads(json.dumps(sections(tables), allow_nan=False)), fit, test, timed


def timed_tokens(test):
    """Choices of layer 1 of the 512 tokens that are timed: evenly from first to last."""
    return [test.experts[n * (len(test.experts) - 1) // (MEASURED - 1), 1].tolist() for n in range(MEASURED)]


def counted(tokens):
    """Slots of each contiguous device."""
    slots = [0] * D
    for token in tokens:
        for expert in token:
            slots[expert // (E // D)] += 1
    return slots


def test_the_layer_with_the_fullest_device_is_the_one_that_is_looked_at(traced):
    text, figures, fit, test, _ = traced
    loads = [counted(test.experts[:, l].tolist()) for l in range(2)]
    assert max(loads[1]) > 1.3 * max(loads[0]) and figures["device_loads_simulated"] == loads
    assert figures["layer"] == figures["hot_experts"]["layer"] == 1
    title = f"{D} contiguous devices, {MEASURED} tokens, 5 passes, layer 1"
    shares = " ".join(f"{100 * load / sum(loads[1]):.0f}" for load in loads[1])
    assert facts_of(text, title)["load per device, %"] == f"{shares} (simulated)"
    counts = np.bincount(fit.experts[:, 1].ravel(), minlength=E)
    hottest = figures["hot_experts"]["hottest"][0]
    assert hottest["expert"] == counts.argmax() == 13
    assert hottest["over_mean"] == pytest.approx(counts[13] * E / counts.sum())
    assert hottest["alone_over_device_mean"] == pytest.approx(counts[13] * D / counts.sum())


def test_what_a_machine_would_take_of_a_layer(traced):
    """Tokens live on the devices in turn, go to each other device of their experts once, and come back."""
    _, figures, _, test, _ = traced
    phases, parts, tokens = figures["phases_seconds_measured"], figures["parts_seconds"], timed_tokens(test)
    assert phases["device_slots"] == counted(tokens)
    alone = phases["device_seconds"]
    assert parts["compute"] == pytest.approx(sum(alone) / D)
    assert parts["straggler"] == pytest.approx(max(alone) - sum(alone) / D)
    assert parts["routing"] == phases["route"]
    out, into = [0] * D, [0] * D
    for number, token in enumerate(tokens):
        home = number % D
        for device in {expert // (E // D) for expert in token} - {home}:
            out[home] += 32 * 4  # of float32
            into[device] += 32 * 4
    one_way = (D - 1) * 1e-3 + max(out + into) / 2e6
    assert parts["communication"] == pytest.approx(2 * one_way)
    assert figures["bottleneck"] == "communication"


def test_seconds_of_a_remedy_are_the_slots_of_its_fullest_device(traced):
    """By its balancedness on the fit in batches of 256, each slot as long as it took on the timed devices."""
    _, figures, fit, _, _ = traced
    phases, means, highest = figures["phases_seconds_measured"], 0, 0
    for start in range(0, 1024, 256):
        slots = counted(fit.experts[start : start + 256, 1].tolist())
        means, highest = means + sum(slots) / D, highest + max(slots)
    of_a_slot = sum(phases["device_seconds"]) / (MEASURED * K)
    expected = MEASURED * K / D / (means / highest) * of_a_slot
    remedies = {remedy["remedy"]: remedy for remedy in figures["remedies"]}
    assert remedies["contiguous"]["slowest_device_seconds_modelled"] == pytest.approx(expected)
    even = MEASURED * K / D * of_a_slot
    for name in ("balanced", "replicated"):  # no device can have less than the mean
        assert even <= remedies[name]["slowest_device_seconds_modelled"] * (1 + 1e-9) < expected
    dropping = remedies["cap and drop"]
    assert dropping["slowest_device_seconds_modelled"] < even * 1.25 * 1.05  # nobody takes more than 1.25 of its share


def test_what_is_timed_of_a_remedy_is_its_own_placement_and_tokens_of_that_layer(traced):
    _, figures, fit, test, timed = traced
    works = dict(zip((remedy["remedy"] for remedy in figures["remedies"]), timed, strict=True))
    for name in ("contiguous", "round-robin", "balanced", "replicated"):
        held, experts, kept = works[name]
        assert experts.tolist() == timed_tokens(test) and kept is None
        assert np.array_equal(held, place_experts(fit.loads(), D, name, 4 if name == "replicated" else 0).held[1])
    dropped = works["cap and drop"][2]
    assert dropped.shape == (MEASURED, K) and 0.5 < dropped.mean() < 1


def test_without_copies_the_hottest_expert_has_company(traced, hot):
    """A device has E / D experts: beside the hottest of a layer at best its coldest ones."""
    for _, figures, _, test in (traced[:4], hot):
        bounds = []
        for l in range(test.experts.shape[1]):
            counts = sorted(np.bincount(test.experts[:, l].ravel(), minlength=E).tolist())
            mean = sum(counts) / D
            bounds.append(mean / max(mean, counts[-1] + sum(counts[: E // D - 1])))
        assert figures["most_balancedness_without_copies"] == pytest.approx(sum(bounds) / len(bounds))
        assert min(bounds) < 0.9


def test_differences_are_the_largest_of_all_values():
    """From the whole layer, from a dense one on 32 tokens, and how large that one's values are."""
    layer = SmallLayer(16, 8, 8, 2)
    x, wish = mx.random.normal((40, 16), key=mx.random.key(3)), mx.zeros((40, 8))
    _, experts, weights = layer.route(x, wish)
    whole, dense = layer.whole(x, experts, weights), layer.dense(x[:32], experts[:32], weights[:32])
    off = mx.zeros((40, 16))
    off[0, 3], off[35, 2] = -0.5, 0.75  # one among the 32, one beyond
    found = workbench.differences(layer, x, wish, whole + off)
    assert found["whole_layer"] == pytest.approx(0.75, abs=1e-6) and found["dense"] == pytest.approx(0.5, abs=1e-5)
    assert found["dense_largest_value"] == pytest.approx(np.abs(np.array(dense)).max())
