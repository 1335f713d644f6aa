"""What expert_parallel_poc.py says of lost devices, recounted slot by slot and set by set."""

import json
from itertools import combinations
from math import ceil

import numpy as np
import pytest
from printed import columns_of

from expert_parallel import place_experts
from expert_parallel.failure.survival import repair
from expert_parallel.placing.affinity import coactivation
from expert_parallel.report.survival import of_placements
from expert_parallel.report.table import sections
from expert_parallel.study.remedies import Choices

E, K, D, L, LOST = 16, 3, 4, 2, [2, 0]
REMEDIES = ("contiguous", "round-robin", "balanced", "replicated", "affinity", "contiguous, each", "balanced, each")


@pytest.fixture(scope="module")
def told():
    """(text, JSON, fit, test): skewed choices, others in the test than in the fit."""
    wish = np.random.default_rng(0).gumbel(size=(1100, L, E)) + np.linspace(0, 2, E)
    wish[600:, :, 3] += 1
    experts = np.argsort(-wish, axis=2)[..., :K]
    fit, test = Choices(experts[:500], E), Choices(experts[500:], E)
    tables = of_placements(fit, test, D, 3, LOST, "2MB", 0.5)
    return "\n\n".join(map(str, tables)), json.loads(json.dumps(sections(tables)))["failures"], fit, test


def held_of(remedy, fit):
    """{layer: {expert: devices}} as it was fitted, and for `each` with what the report says is added: checked apart."""
    strategy = remedy.removesuffix(", each")
    pairs = coactivation(fit.experts, E)
    placement = place_experts(fit.loads(), D, strategy, 3 * (strategy == "replicated"), coactivation=pairs)
    return [{e: set(placement.devices_of(l, e)) for e in range(E)} for l in range(L)]


def fullest(chosen, holders, devices):
    """Slots of the fullest device where each slot goes to any holder: some set of devices is too small for its own."""
    most = 0
    for count in range(1, len(devices) + 1):
        for some in combinations(devices, count):
            alone = sum(1 for e in chosen if holders[e] and holders[e] <= set(some))
            most = max(most, ceil(alone / count))
    return most


def evenness(test, held, devices):
    """Sum of means over sum of maxima, over batches of 256 tokens and layers, of slots that somebody can answer."""
    means = highest = 0
    for start in range(0, len(test.experts), 256):
        for l in range(L):
            chosen = test.experts[start : start + 256, l].ravel().tolist()
            means += sum(bool(held[l][e]) for e in chosen) / len(devices)
            highest += fullest(chosen, held[l], devices)
    return means / highest


@pytest.mark.parametrize("remedy", REMEDIES[:5])
def test_a_loss_recounted(told, remedy):
    text, figures, fit, test = told
    row = figures["placements"][REMEDIES.index(remedy)]
    assert row["remedy"] == remedy
    held = held_of(remedy, fit)
    left = [{e: holders - set(LOST) for e, holders in layer.items()} for layer in held]
    missing = [[e for e in range(E) if not layer[e]] for layer in left]
    slots = [(l, e) for token in test.experts.tolist() for l in range(L) for e in token[l]]
    assert row["gone_computed"] == sum(map(len, missing)) / L
    assert row["slots_lost_by_chance"] == pytest.approx(row["gone_computed"] / E)
    lost = sum(e in missing[l] for l, e in slots) / len(slots)
    assert row["slots_lost_simulated"] == pytest.approx(lost)
    assert row["balancedness_before_simulated"] == pytest.approx(evenness(test, held, range(D)))
    assert row["balancedness_since_simulated"] == pytest.approx(evenness(test, left, (1, 3)))
    number = sum(map(len, missing))
    assert row["repair_bytes"] == 2_000_000 * number and sum(row["repair_experts"]) == number
    assert row["repair_experts"][0] == row["repair_experts"][2] == 0
    assert row["repair_seconds_modelled"] == pytest.approx(2e6 * max(row["repair_experts"]) / 0.5e9)
    assert row["repair_seconds_in_turn_modelled"] == pytest.approx(2e6 * number / 0.5e9)
    assert max(row["repair_experts"]) <= number / 2 + L  # two survivors
    assert row["balancedness_mended_simulated"] >= best_mended(test, left, missing)
    whole = np.array([[[d in layer[e] for e in range(E)] for d in range(D)] for layer in held])
    after = repair(whole, LOST, fit.loads())
    mended = [{e: set(np.flatnonzero(after[l, :, e]).tolist()) for e in range(E)} for l in range(L)]
    assert row["balancedness_mended_simulated"] == pytest.approx(evenness(test, mended, (1, 3)))


def best_mended(test, left, missing):
    """No better than a coin: the least even of ways to give each missing expert to one of the two survivors."""
    random, worst = np.random.default_rng(0), 1
    for _ in range(20):
        held = [{e: left[l][e] or {int(random.choice([1, 3]))} for e in range(E)} for l in range(L)]
        worst = min(worst, evenness(test, held, (1, 3)))
    return worst


def test_with_one_copy_of_each_two_of_four_leave_what_lay_on_both(told):
    _, figures, *_ = told
    for remedy in REMEDIES[5:]:
        row = figures["placements"][REMEDIES.index(remedy)]
        assert 0 < row["gone_computed"] < E / 2  # 2 E / D without copies; 1 / 6 of them on average with one of each
        assert row["balancedness_before_simulated"] > 0.95


def test_any_losses_by_hand(told):
    _, figures, fit, _ = told
    for remedy, row in zip(REMEDIES, figures["survival"], strict=True):
        assert row["remedy"] == remedy
        if remedy.endswith("each"):
            assert row["held"] == 2 and row["of_1"]["unhurt"] == 1 and "of_3" not in row
            assert row["of_2"]["gone_mean"] == pytest.approx(L * E / 6)
            assert row["of_2"]["if_at_random"] == pytest.approx((5 / 6) ** (L * E))
            continue
        held = held_of(remedy, fit)
        assert row["held"] == pytest.approx(sum(len(h) for layer in held for h in layer.values()) / (L * E))
        for m in (1, 2):
            sets = list(combinations(range(D), m))
            lost = [sum(h <= set(some) for layer in held for h in layer.values()) for some in sets]
            found = row[f"of_{m}"]
            assert found["unhurt"] == lost.count(0) / len(sets) and found["gone_worst"] == max(lost)
            assert found["gone_mean"] == pytest.approx(sum(lost) / len(sets))


def test_what_is_printed_is_what_json_says(told):
    text, figures, *_ = told
    assert max(map(len, text.splitlines())) <= 80
    assert figures["lost"] == [0, 2] and figures["expert_bytes"] == 2e6 and figures["bytes_per_second"] == 5e8
    loss = columns_of(text, "Devices 0, 2 of 4 lost (simulated; seconds modelled)", 7)
    rows = figures["placements"]
    assert loss["remedy"] == REMEDIES
    assert loss["gone"] == tuple(f"{row['gone_computed']:.1f}" for row in rows)
    shares = [(row["slots_lost_simulated"], row["slots_lost_by_chance"]) for row in rows]
    assert loss["lost (chance)"] == tuple(f"{100 * slots:.1f}% ({100 * experts:.1f}%)" for slots, experts in shares)
    for label in ("before", "since", "mended"):
        assert loss[label] == tuple(f"{row[f'balancedness_{label}_simulated']:.3f}" for row in rows)
    assert loss["to read"] == tuple(f"{row['repair_bytes'] / 1e6:.2f} MB" for row in rows)
    assert loss["s"] == tuple(f"{row['repair_seconds_modelled']:.3f}" for row in rows)
    even = figures["balancedness_if_uniform_simulated"]
    joined = " ".join(text.split())
    assert f"if uniform, {even['before']:.3f} before and {even['since']:.3f} since" in joined
    assert "experts of 2.00 MB at 0.5 GB/s (assumed)" in joined
    rows = figures["survival"]
    assert "held: over the number of experts; survives: share of the sets" in joined
    any_of = columns_of(text, "Any one or two lost (computed over all sets of devices)", 7)
    assert any_of["held"] == tuple(f"{row['held']:.2f}x" for row in rows)
    assert any_of["survives one"] == tuple(f"{100 * row['of_1']['unhurt']:.0f}%" for row in rows)
    two = [row["of_2"] for row in rows]
    assert any_of["two (at random)"] == tuple(
        f"{100 * each['unhurt']:.0f}% ({100 * each['if_at_random']:.0f}%)" for each in two
    )
    assert any_of["a layer"] == tuple(f"{100 * each['layers_unhurt']:.0f}%" for each in two)
    assert any_of["gone (worst)"] == tuple(
        f"{100 * each['gone_mean'] / (L * E):.1f}% ({100 * each['gone_worst'] / (L * E):.1f}%)" for each in two
    )


def test_uniform_routing_by_pythons_own_dice(told):
    """Batches of 256 tokens on 4 and, since, on 2 devices of 4 experts."""
    import random

    dice, found = random.Random(3), {"before": [], "since": []}
    for _ in range(300):
        loads = [0] * D
        for _ in range(256):
            for e in dice.sample(range(E), K):
                loads[e // 4] += 1
        found["before"].append(sum(loads) / D / max(loads))
        found["since"].append((loads[1] + loads[3]) / 2 / max(loads[1], loads[3]))
    for name, even in told[1]["balancedness_if_uniform_simulated"].items():
        assert even == pytest.approx(np.mean(found[name]), rel=0.01)
    assert set(found) == set(told[1]["balancedness_if_uniform_simulated"])


SMALL = ("--hidden", 16, "--expert-width", 8, "--tokens", 1024, "--experts", 13, "--top-k", 3, "--scenarios", "hot")


def test_the_script_loses_devices(run_here, tmp_path):
    done = run_here("expert_parallel_poc.py", *SMALL, "--devices", 5, "--fail-device", 3, "--fail-device", 1,
                    "--expert-bytes", "1MB", "--disk", 2, "--json", tmp_path / "o.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Devices 1, 3 of 5 lost" in done.stdout and max(map(len, done.stdout.splitlines())) <= 80
    document = json.loads((tmp_path / "o.json").read_text())
    assert document["options"]["fail_device"] == [3, 1]
    figures = document["results"]["hot"]["failures"]
    assert figures["placements"][0]["gone_computed"] in (5, 6) and figures["bytes_per_second"] == 2e9
    whole = run_here("expert_parallel_poc.py", *SMALL, "--devices", 5, "--json", tmp_path / "o.json")
    assert "lost" not in whole.stdout
    assert "failures" not in json.loads((tmp_path / "o.json").read_text())["results"]["hot"]
    two = run_here("expert_parallel_poc.py", *SMALL, "--devices", 2, "--fail-device", 0)
    assert two.returncode == 0 and "Device 0 of 2 lost" in two.stdout and "nan" not in two.stdout


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("--fail-device", 8), "--fail-device 8: there are devices 0 to 7 (--devices)"),
        (("--fail-device=-1",), "--fail-device -1: there are devices 0 to 7"),
        (("--fail-device", 2, "--fail-device", 2), "--fail-device 2: it is named twice"),
        (("--devices", 1, "--fail-device", 0), "--fail-device: with all 1 devices lost none is left"),
        (("--fail-device", "x"), "invalid int value: 'x'"),
        (("--disk", 2), "--disk is of no use without --expert-memory or --fail-device"),
        (("--expert-bytes", "1MB"), "--expert-bytes is of no use without --expert-memory or --fail-device"),
    ],
)
def test_losses_that_cannot_be(run_here, line, words):
    done = run_here("expert_parallel_poc.py", *line)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""
