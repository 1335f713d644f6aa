"""Remedies for skewed routing: what is said of each, counted again slot by slot; what is taken of recorded traces."""

import numpy as np
import pytest

from expert_parallel import RoutingTrace, place_experts
from expert_parallel.moving.plan import Costs, Rebalancer
from expert_parallel.placing.affinity import coactivation
from expert_parallel.router.capacity import limit_slots
from expert_parallel.study import remedies
from expert_parallel.study.remedies import Choices, biased_choices, compare, learn_bias, recorded

E, K, L, D = 16, 3, 2, 4
COSTS = Costs(expert_bytes=1000, bytes_per_second=1e9, seconds_per_slot=1e-5, side_by_side=True)


def choices_of(wish, tokens, seed, top_k=K):
    """Choices of a router with preferences [L, E] and their gates; each expert is as likely as its gate says."""
    logits = wish + np.random.default_rng(seed).gumbel(size=(tokens, *wish.shape))
    gates = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    return Choices(np.argsort(-gates, axis=-1)[..., :top_k], wish.shape[1], gates)


WISH = np.random.default_rng(5).normal(size=(L, E))
FIT, TEST = choices_of(WISH, 600, 1), choices_of(WISH + np.eye(L, E), 900, 2)  # other load than it was fitted on


def counted(placement, experts, kept=None):
    """(balancedness, fan-out) of experts with one holder each: batches of 256, a batch waits for its fullest device."""
    kept = np.ones(experts.shape, dtype=bool) if kept is None else kept
    means = maxima = touched = 0.0
    for start in range(0, len(experts), 256):
        for l in range(L):
            load = [0] * D
            for token, ok in zip(experts[start : start + 256, l], kept[start : start + 256, l], strict=True):
                devices = [placement.devices_of(l, e)[0] for e, kept_one in zip(token, ok, strict=True) if kept_one]
                touched += len(set(devices))
                for device in devices:
                    load[device] += 1
            means, maxima = means + sum(load) / D, maxima + max(load)
    return means / maxima, touched / (len(experts) * L)


def capped(choices, reroute):
    """Choices and what is kept of them: no expert has more of a batch than 1.25 times the mean, rounded up."""
    experts, kept = choices.experts.copy(), np.ones(choices.experts.shape, dtype=bool)
    for start in range(0, len(experts), 256):
        rows = slice(start, start + 256)
        most = int(np.ceil(1.25 * len(experts[rows]) * choices.experts.shape[2] / E))
        for l in range(L):
            experts[rows, l], kept[rows, l] = limit_slots(
                experts[rows, l], choices.gates[rows, l], most, "score", reroute
            )
    return experts, kept


def check(outcome, fit, test, kept_of_fit=None, kept=None):
    even, _ = counted(outcome.placement, fit, kept_of_fit)
    assert outcome.balancedness_fit == pytest.approx(even)
    assert (outcome.balancedness_test, outcome.fan_out) == pytest.approx(counted(outcome.placement, test, kept))


@pytest.fixture(scope="module")
def outcomes():
    return {each.remedy: each for each in compare(FIT, TEST, D, 4, COSTS)}


def test_every_remedy_is_there(outcomes):
    changing = ["cap and drop", "cap and re-route", "load-aware router", "rebalancing"]
    assert list(outcomes) == ["contiguous", "round-robin", "balanced", "replicated", "affinity", *changing]
    unknown = compare(Choices(FIT.experts, E), Choices(TEST.experts, E), D, 4, COSTS)
    assert [each.remedy for each in unknown] == [*list(outcomes)[:6], "rebalancing"]  # without gates


@pytest.mark.parametrize("name", ["contiguous", "round-robin", "balanced", "affinity"])
def test_placements_are_fitted_on_one_part_and_judged_on_the_other(outcomes, name):
    pairs = {"coactivation": coactivation(FIT.experts, E)} if name == "affinity" else {}
    assert outcomes[name].placement == place_experts(FIT.loads(), D, name, **pairs)
    check(outcomes[name], FIT.experts, TEST.experts)
    per_layer = outcomes[name].balancedness_fit_per_layer
    alone = [counted_layer(outcomes[name].placement, l) for l in range(L)]
    assert per_layer == pytest.approx(alone) and outcomes[name].price == ""


def counted_layer(placement, layer):
    """Balancedness of one layer on the tokens it was fitted on."""
    loads = [
        np.bincount(FIT.experts[start : start + 256, layer].ravel(), minlength=E) @ placement.held[layer].T
        for start in range(0, 600, 256)
    ]
    return sum(map(np.mean, loads)) / sum(map(np.max, loads))


def test_copies_cost_memory(outcomes):
    copied = outcomes["replicated"]
    assert copied.placement.held.sum(axis=(1, 2)).tolist() == [E + 4] * L and copied.price == "+25% experts held"


def test_affinitys_bound_and_what_became_of_it(outcomes):
    affinity, balanced = outcomes["affinity"].placement, outcomes["balanced"].placement
    for part, choices in (("fit", FIT), ("test", TEST)):
        over = []
        for l in range(L):
            load = np.bincount(choices.experts[:, l].ravel(), minlength=E)
            fullest = [max(load[p.experts_on(l, d)].sum() for d in range(D)) for p in (affinity, balanced)]
            over.append(fullest[0] / fullest[1] - 1)
        assert outcomes["affinity"].figures[f"fullest_over_balanced_{part}"] == pytest.approx(max(over))
    assert outcomes["affinity"].figures["balance_bound"] == 0.05


@pytest.mark.parametrize("reroute", [False, True])
def test_limits_say_what_they_took(outcomes, reroute):
    outcome = outcomes["cap and re-route" if reroute else "cap and drop"]
    (fit, kept_of_fit), (test, kept) = (capped(part, reroute) for part in (FIT, TEST))
    check(outcome, fit, test, kept_of_fit, kept)
    lost, moved = (~kept).sum() / kept.size, (kept & (test != TEST.experts)).sum() / kept.sum()
    assert outcome.price == (f"{moved:.1%} re-routed" if reroute else f"{lost:.1%} dropped") and max(lost, moved) > 0.02
    assert outcome.placement == place_experts(FIT.loads(), D)


def test_tokens_without_a_slot_go_nowhere():
    """Top-1 of 4 experts, all tokens want expert 0: of a batch of 64 it takes 64 / 4 x 1.25 = 20."""
    wish = np.zeros((1, 4))
    wish[0, 0] = 50
    fit, test = choices_of(wish, 64, 1, 1), choices_of(wish, 64, 2, 1)
    outcome = {each.remedy: each for each in compare(fit, test, 2, 0, COSTS)}["cap and drop"]
    assert outcome.price == "68.8% dropped" and outcome.fan_out == 20 / 64


def test_a_router_that_minds_its_devices(outcomes):
    """Chosen are the highest gates times exp(bias), fitted for contiguous devices."""
    outcome, bias = outcomes["load-aware router"], learn_bias(FIT, place_experts(FIT.loads(), D))
    fit, test = (np.argsort(-part.gates * np.exp(bias), axis=2)[..., :K] for part in (FIT, TEST))
    check(outcome, fit, test)
    same = sum(
        len(set(one) & set(other))
        for one, other in zip(test.reshape(-1, K).tolist(), TEST.experts.reshape(-1, K).tolist(), strict=True)
    )
    assert outcome.price == f"{1 - same / test.size:.1%} re-chosen" and same < 0.98 * test.size
    assert outcome.balancedness_fit > 0.95 > 0.9 > outcomes["contiguous"].balancedness_fit
    assert np.array_equal(biased_choices(FIT, np.zeros((L, E))).loads(), FIT.loads())


def test_no_move_pays_where_moves_are_dear():
    still = compare(FIT, TEST, D, 0, Costs(1000, 1e-3, 1e-5))
    by_name = {each.remedy: each for each in still}
    balanced, rebalancing = by_name["balanced"], by_name["rebalancing"]
    assert rebalancing.price == "no move pays" and set(rebalancing.figures.values()) == {0}
    assert rebalancing.placement == balanced.placement
    for figure in ("balancedness_fit", "balancedness_test", "fan_out"):
        assert getattr(rebalancing, figure) == pytest.approx(getattr(balanced, figure)), figure


@pytest.mark.parametrize(("tokens", "every"), [(1024, 256), (8192, 512)])
def test_rebalancing_looks_at_whole_batches_and_sixteen_times_at_most(tokens, every, monkeypatch):
    """Batch after batch; a move has two looks to repay itself in, after which what was seen counts half."""
    watchers = []

    class Watched(Rebalancer):
        def observe(self, loads, tokens):
            watchers.append(self)
            return super().observe(loads, tokens)

    monkeypatch.setattr(remedies, "Rebalancer", Watched)
    drifting = np.linspace(WISH, WISH[:, ::-1], tokens)
    test = choices_of(np.zeros((L, E)), tokens, 3)
    test = Choices(np.argsort(-(np.log(test.gates) + drifting), axis=2)[..., :K], E)
    (outcome,) = (each for each in compare(FIT, test, D, 0, COSTS) if each.remedy == "rebalancing")
    assert len(watchers) == tokens // 256 and len({id(each) for each in watchers}) == 1
    looks = [look for look in watchers[0].looks if len(look.moves)]
    assert len(watchers[0].looks) == tokens // every and watchers[0].placement == outcome.placement
    assert (watchers[0].half_life, watchers[0].horizon_tokens) == (2 * every, 2 * every)
    figures = {"moves": sum(len(look.moves) for look in looks), "bytes": sum(look.bytes for look in looks)}
    figures |= {
        f"{name}_modelled": sum(getattr(look, name) for look in looks) for name in ("pause_seconds", "gain_seconds")
    }
    assert outcome.figures == pytest.approx(figures) and figures["moves"] > 0
    # Judged batch by batch on the placement that stood when it came, the first one fitted on the tokens before.
    again = Rebalancer(place_experts(FIT.loads(), D, "balanced"), COSTS, every, None, 2 * every, 2 * every)
    again.learn(FIT.loads(), len(FIT.experts))
    means = maxima = touched = 0.0
    for batch in test.batches():
        loads = again.placement.device_loads(batch.loads())
        means, maxima = means + loads.mean(axis=1).sum(), maxima + loads.max(axis=1).sum()
        touched += counted(again.placement, batch.experts)[1] / (tokens // 256)
        again.observe(batch.loads(), 256)
    assert (outcome.balancedness_test, outcome.fan_out) == pytest.approx((means / maxima, touched))
    assert outcome.price == f"{figures['moves']} moves, {figures['pause_seconds_modelled'] * 1000:.1f} ms"


# --- recorded traces --------------------------------------------------------------------------------


def numbered(path, tokens):
    """A trace whose tokens choose the expert of their own number."""
    RoutingTrace(np.arange(tokens)[:, None, None], 4096).save(path)
    return path


def test_short_traces_are_cut_in_two_and_two_are_taken_whole(tmp_path):
    one, two = numbered(tmp_path / "one.npz", 1000), numbered(tmp_path / "two.npz", 200)
    fit, test, notes = recorded([one])
    assert fit.experts.ravel().tolist() == list(range(500)) and test.experts.ravel().tolist() == list(range(500, 1000))
    assert (fit.num_experts, fit.experts.dtype, notes) == (4096, np.int64, [])
    assert len(recorded([numbered(tmp_path / "least.npz", 64)])[0].experts) == 32
    fit, test, _ = recorded([one, two])
    assert (len(fit.experts), len(test.experts)) == (1000, 200)
    RoutingTrace(np.zeros((100, 2, 1)), 4096).save(tmp_path / "other.npz")
    RoutingTrace(np.arange(100)[:, None, None], 128).save(tmp_path / "fewer.npz")
    for other in ("other.npz", "fewer.npz"):
        with pytest.raises(ValueError, match="different models|warm-up"):
            recorded([one, tmp_path / other])


def test_of_long_traces_whole_batches_are_taken_evenly(tmp_path, monkeypatch):
    """Four batches of 256 from 3000 tokens: the first and the last, and two between, as far from each other."""
    monkeypatch.setattr(remedies, "MOST_TRACED", 1024)
    fit, test, notes = recorded([numbered(tmp_path / "long.npz", 3000)])
    taken = np.concatenate([fit.experts, test.experts]).reshape(4, 256)
    assert taken[:, 0].tolist() == [0, 914, 1829, 2744]
    assert (taken == taken[:, :1] + np.arange(256)).all()
    assert notes == ["long.npz: every 2.9th batch of its 3000 tokens is taken"]
    assert len(recorded([numbered(tmp_path / "just.npz", 1024)])[0].experts) == 512


@pytest.mark.parametrize(("tokens", "taken"), [(65_536, 65_536), (65_537, 65_536), (64, 64)])
def test_how_many_tokens_are_taken(tokens, taken, tmp_path):
    RoutingTrace((np.arange(tokens) % 4096)[:, None, None], 4096).save(tmp_path / "t.npz")
    fit, test, notes = recorded([tmp_path / "t.npz"])
    assert len(fit.experts) + len(test.experts) == taken and len(notes) == (taken < tokens)
    RoutingTrace(np.arange(63)[:, None, None], 4096).save(tmp_path / "short.npz")
    with pytest.raises(ValueError, match="63 tokens, at least 64 are needed"):
        recorded([tmp_path / "short.npz"])


def test_what_was_guessed_and_left_out_is_noted(tmp_path):
    experts = np.random.default_rng(0).integers(0, 8, (300, 2, 2))
    experts[0] = 7
    np.save(tmp_path / "bare.npy", np.concatenate([np.repeat(experts[:1], 30, axis=0), experts[1:]]))
    _, _, notes = recorded([tmp_path / "bare.npy"])
    guess = "bare.npy: taken for 8 experts, the highest that occurs (--experts)"
    assert sorted(notes) == ["bare.npy: left out 30 warm-up rows, all alike", guess]
    fit, _, notes = recorded([tmp_path / "bare.npy"], 16)
    assert fit.num_experts == 16 and len(notes) == 1
