"""Statistics of routing by hand, and a pass through a model that leaves it as it was."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import random_model

from expert_parallel import place_experts, shard_model
from expert_parallel.layers import moe_layers
from expert_parallel.models import forward
from expert_parallel.models.forward import (
    load_similarity,
    margins,
    next_layer_recall,
    routing_figures,
    run_text,
    strongest_pair,
    time_layers,
)
from expert_parallel.trace import RoutingTrace


def test_margins_by_hand():
    assert margins([[0.1, 0.5, 0.4, 0.2], [3, 3, 3, 0]], top_k=2) == pytest.approx([0.2, 0.0])
    assert np.isinf(margins([[1, 2]], top_k=2)).all()


def test_overlap_by_hand():
    trace = RoutingTrace(np.array([[[0, 1]], [[1, 2]], [[1, 2]], [[3, 0]]]), 4)  # 1 of 2, 2 of 2, 0 of 2

    def overlap(part):
        return routing_figures(part, [None], [0])["layers"][0]["overlap_with_token_before"]

    assert overlap(trace) == pytest.approx(0.5)
    assert overlap(trace[:1]) is None


def test_coactivation_by_hand():
    """0 and 1 always together, in 3 of 6 tokens: 3 against the 3 x 3 / 6 of chance."""
    chosen = np.zeros((6, 6), dtype=bool)
    for token, pair in enumerate([(0, 1), (0, 1), (0, 1), (2, 3), (4, 5), (2, 5)]):
        chosen[token, pair] = True
    assert strongest_pair(chosen) == (0, 1, 2.0)
    assert strongest_pair(chosen[3:]) is None  # nobody met three times


def test_the_next_layer_is_foretold_where_it_follows_and_not_where_it_does_not():
    rng = np.random.default_rng(0)
    first = np.argsort(rng.random((400, 16)), axis=1)[:, :2]
    experts = np.stack([first, (first + 5) % 16, np.argsort(rng.random((400, 16)), axis=1)[:, :2]], axis=1)
    recall, baseline = next_layer_recall(experts, 16)
    assert recall[0] > 0.99
    assert recall[1] == pytest.approx(2 / 16, abs=0.06)
    assert baseline == pytest.approx([2 / 16] * 2, abs=0.06)


def test_the_next_layer_by_plain_loops():
    """Of 60 tokens the first half is learnt from; favourites are skewed, so that weights of frequent experts matter."""
    rng = np.random.default_rng(4)
    first = np.argsort(-rng.gumbel(size=(60, 8)) - np.linspace(2, 0, 8), axis=1)[:, :2]
    second = np.where(rng.random((60, 1)) < 0.6, (first * 3 + 1) % 8, np.argsort(rng.random((60, 8)), axis=1)[:, :2])
    second[:, 1] = np.where(second[:, 0] == second[:, 1], (second[:, 1] + 1) % 8, second[:, 1])
    learnt, asked = list(zip(first, second, strict=True))[:30], list(zip(first, second, strict=True))[30:]
    usual = [sum(e in after for _, after in learnt) / 30 for e in range(8)]
    favourites = sorted(range(8), key=lambda e: -usual[e])[:2]
    told = blind = 0
    for before, after in asked:
        sums = [0.0] * 8
        for a in before:
            seen = [then for now, then in learnt if a in now]
            for e in range(8):
                sums[e] += (sum(e in then for then in seen) + usual[e]) / (len(seen) + 1)
        guesses = sorted(range(8), key=lambda e: -sums[e])[:2]
        told += sum(e in after for e in guesses)
        blind += sum(e in after for e in favourites)
    recall, baseline = next_layer_recall(np.stack([first, second], axis=1), 8)
    assert (recall.tolist(), baseline.tolist()) == ([pytest.approx(told / 60)], [pytest.approx(blind / 60)])
    assert told > blind


def test_similarity_of_loads_by_hand():
    """In layer 0 nothing in common, in layer 1 loads (2, 1) and (4, 2): cosines 0 and 1."""
    one = RoutingTrace(np.array([[[0], [0]], [[0], [0]], [[0], [1]]]), 2)
    other = RoutingTrace(np.array([[[1], [e]] for e in (0, 0, 0, 0, 1, 1)]), 2)
    alike = load_similarity({"one": one, "other": other})
    assert alike["one"] == pytest.approx({"one": 1, "other": 0.5})
    assert alike["other"] == pytest.approx({"one": 0.5, "other": 1})


@pytest.fixture(scope="module")
def model():
    return random_model(mlp_only_layers=[1])


def test_a_pass_sees_what_the_model_does(model):
    tokens = [5, 6, 7, 8, 9, 10]
    before = model(mx.array([tokens]))
    trace, answers = run_text(model, tokens, "text")
    assert mx.array_equal(before, model(mx.array([tokens])))
    assert trace.experts.shape == (6, 2, 4)
    for l, layer in enumerate(moe_layers(model)):
        scores = answers[l]
        assert scores.shape == (6, 16)
        best = np.sort(np.argsort(-scores, axis=1)[:, :4], axis=1)
        assert np.array_equal(best, np.sort(trace.experts[:, l], axis=1))
        assert type(layer.block.gate).__name__ == "Linear"
    figures = routing_figures(trace, answers, [0, 2])
    assert [row["layer"] for row in figures["layers"]] == [0, 2]
    assert all(row["margin_median"] > 0 for row in figures["layers"])
    assert figures["overlap_by_chance"] == 0.25


def test_domains_are_alike_to_themselves(model):
    alike = load_similarity({"a": run_text(model, [1, 2, 3, 4])[0], "b": run_text(model, [50, 60, 70, 80])[0]})
    assert alike["a"]["a"] == pytest.approx(1)
    assert alike["a"]["b"] == pytest.approx(alike["b"]["a"])
    assert alike["a"]["b"] < 0.999


def test_every_layer_gets_a_time_and_the_classes_their_calls_back(model):
    kind = type(model.layers[0])
    original = kind.__call__
    seconds = time_layers(model, [1, 2, 3], repeats=1)
    assert kind.__call__ is original
    assert len(seconds["prompt"]) == len(seconds["token"]) == 3
    assert all(s > 0 for s in seconds["prompt"] + seconds["token"])


def test_a_sharded_model_can_be_looked_at_too():
    model = shard_model(random_model(), place_experts(np.ones((3, 16)), 2))
    assert run_text(model, [1, 2, 3])[0].experts.shape == (3, 3, 4)


def test_times_are_medians_of_a_prompt_and_of_its_last_token_after_it(monkeypatch):
    """Three times both, each with a cache of its own; two layers, whose times differ from run to run."""
    took, asked, caches = iter([[9, 1], [4, 7], [5, 5], [6, 6], [1, 9], [2, 8]]), [], ["a", "b", "c"]

    def one_pass(model, tokens, cache):
        asked.append((tokens, cache))
        return [(seconds, None) for seconds in next(took)]

    monkeypatch.setattr(forward, "_pass", one_pass)
    monkeypatch.setattr(forward, "make_prompt_cache", lambda model: caches.pop(0))
    assert time_layers(None, [1, 2, 3]) == {"prompt": [5, 5], "token": [4, 7]}
    assert asked == [(tokens, cache) for cache in "abc" for tokens in ([1, 2, 3], [3])]


@pytest.mark.parametrize("broken", [None, 0, 1, 2])
def test_the_first_layer_that_answers_no_numbers_is_named(broken):
    model = random_model()
    if broken is not None:
        norm = model.layers[broken].input_layernorm
        norm.weight = norm.weight.at[:1].add(mx.nan)
    assert forward.first_not_a_number(model, [[4], [1, 2, 3]]) == broken
