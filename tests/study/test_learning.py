"""What a placement learns from a trace: against loads counted here, and cases whose answer is known."""

import numpy as np
import pytest

from expert_parallel import Placement, place_experts
from expert_parallel.balance import balancedness
from expert_parallel.study.learning import among_copies, enough_tokens, learning_curve, stability
from expert_parallel.study.remedies import BATCH, Choices, device_slots, served

E, K, L = 32, 4, 2


def skewed(tokens, seed, favourites=0):
    """Choices of tokens that prefer some experts, the same ones for the same `favourites`."""
    wish = np.random.default_rng(favourites).normal(size=(L, E))
    noise = np.random.default_rng(seed).gumbel(size=(tokens, L, E))
    return Choices(np.argsort(-(wish + noise), axis=2)[..., :K], E)


def by_hand(placement, batches):
    """Sum of means over sum of maxima; copies dealt out evenly by trying every device for each slot in turn."""
    means = maxima = 0.0
    for batch in batches:
        for l in range(L):
            load = np.zeros(placement.num_devices)
            for expert in batch.experts[:, l].reshape(-1):
                load[placement.devices_of(l, expert)[0]] += 1
            means, maxima = means + load.mean(), maxima + load.max()
    return means / maxima


def test_the_learning_curve_without_copies():
    fit, test = skewed(300, 1), skewed(600, 2)
    curve = learning_curve(fit, test, 4, 0)
    assert [row["tokens"] for row in curve] == [18, 75, 300]
    for row in curve:
        part = fit.part(slice(row["tokens"]))
        placement = place_experts(part.loads(), 4, "balanced")
        assert row["balancedness_fit"] == pytest.approx(by_hand(placement, part.batches()))
        assert row["balancedness_test"] == pytest.approx(by_hand(placement, test.batches()))
    assert curve[0]["balancedness_fit"] > curve[0]["balancedness_test"]
    assert curve[-1]["balancedness_test"] > curve[0]["balancedness_test"]


@pytest.mark.parametrize(("tokens", "lengths"), [(256, [16, 64, 256]), (33, [16, 33]), (32, [32])])
def test_lengths_that_are_tried(tokens, lengths):
    """Quarters of all tokens down to 16."""
    assert [row["tokens"] for row in learning_curve(skewed(tokens, 1), skewed(64, 2), 4, 0)] == lengths


def test_the_learning_curve_with_copies():
    fit, test = skewed(300, 1), skewed(600, 2)
    row = learning_curve(fit, test, 4, 8)[-1]
    placement = place_experts(fit.loads(), 4, "replicated", 8)
    slots = [device_slots(served(placement, batch), 4) for batch in test.batches()]
    assert [int(of_batch.sum()) for of_batch in slots] == [BATCH * L * K, BATCH * L * K, (600 - 2 * BATCH) * L * K]
    assert row["balancedness_test"] == pytest.approx(balancedness(np.concatenate(slots), "aggregate"))
    assert row["balancedness_test"] > learning_curve(fit, test, 4, 0)[-1]["balancedness_test"]


@pytest.mark.parametrize(
    ("worth", "enough"),
    [
        ([0.5, 0.7, 0.9], 3),
        ([0.5, 0.895, 0.9], 2),
        ([0.9, 0.7, 0.9], 1),
        ([0.9, 0.88, 0.9], 1),
        ([0.8, 0.9, 0.7], 2),
        ([0.0, 0.01], 1),
    ],
)
def test_how_many_tokens_are_enough(worth, enough):
    assert enough_tokens([{"tokens": n + 1, "balancedness_test": w} for n, w in enumerate(worth)]) == enough


def test_loads_of_the_same_kind_last_and_of_another_do_not():
    same = stability(skewed(2000, 1), skewed(2000, 2))
    other = stability(skewed(2000, 1), skewed(2000, 2, favourites=1))
    assert same["cosine"] == pytest.approx(same["cosine_if_shuffled"], abs=0.005) and same["cosine"] > 0.99
    assert other["cosine"] < 0.9 < other["cosine_if_shuffled"]


def test_likeness_of_loads_by_hand():
    """Expert 0 alone then and now, 0 then and 1 now, and 3 of 5 to 0 then, 4 of 5 now: 1, 0 and (12 + 2) / sqrt(13 17).

    Tokens dealt out anew: of every layer as many slots of each expert, so that the first stays as it is.
    """
    then, now = np.zeros((5, 3, 1), int), np.zeros((5, 3, 1), int)
    now[:, 1], then[:2, 2], now[:1, 2] = 1, 1, 1
    found = stability(Choices(then, 2), Choices(now, 2))
    assert found["cosine"] == pytest.approx((1 + 0 + 14 / np.sqrt(13 * 17)) / 3)
    possible = [mean_cosine(a, b) for a in range(6) for b in range(4)]
    assert min(abs(found["cosine_if_shuffled"] - one) for one in possible) < 1e-9


def mean_cosine(a, b):
    """Of the layers above, where a of five tokens choose expert 1 in the second one, and b of three in the third."""
    cosines = [1.0]
    for mine, all_of_them in ((a, 5), (b, 3)):
        one, other = np.array([5 - mine, mine]), np.array([5 - all_of_them + mine, all_of_them - mine])
        cosines.append(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
    return sum(cosines) / 3


def test_ways_to_deal_slots_by_hand():
    """Expert 0 is on both devices, 1 on the first alone. Slots 0 0 0 1 1 and again: the first has two beforehand."""
    held = Placement(np.array([[[1, 1], [1, 0]]], dtype=bool)).held
    experts = np.array([0, 1, 0, 1, 0])[:, None, None]
    # The optimum is 3 (of 5 slots); by turns, every other slot to the second device: 0, 2, 4 are the first's, too.
    over = among_copies(held, [Choices(experts, 2)])
    assert over == pytest.approx({"least loaded": 1.0, "by turns": 5 / 3, "shared equally": 3.5 / 3})


def test_the_least_loaded_is_not_always_the_best():
    """Experts 0, 1, 2 once each, 3 never. 0 goes to the first device, though the third is the one for it."""
    held = np.array([[[1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 1]]], dtype=bool)
    once = Choices(np.array([0, 1, 2])[:, None, None], 4)
    worse = {"least loaded": 2.0, "by turns": 2.0, "shared equally": 4 / 3}
    assert among_copies(held, [once]) == pytest.approx(worse)
    # A second layer and batch in which there is no choice, 3 slots each: 2 + 9 over 1 + 9.
    both = np.array([held[0], [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]]], dtype=bool)
    batches = [Choices(np.array([[0, 1], [1, 1], [2, 1]])[..., None], 4), Choices(np.full((3, 2, 1), 3), 4)]
    assert among_copies(both, batches)["least loaded"] == pytest.approx(11 / 10)


def test_no_way_beats_the_optimum():
    fit, test = skewed(300, 1), skewed(600, 2)
    held = place_experts(fit.loads(), 4, "replicated", 8).held
    over = among_copies(held, test.batches())
    assert min(over["least loaded"], over["by turns"]) >= 1
    assert over["shared equally"] > 0.99  # parts of slots: below the optimum by less than one slot
