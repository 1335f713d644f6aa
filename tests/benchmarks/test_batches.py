"""What benchmarks/batches.py and serving.py count, held against plain loops."""

import importlib

import numpy as np
import pytest
from conftest import ROOT, random_model

from expert_parallel import place_experts


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return [importlib.import_module(name) for name in ("batches", "serving", "steps_of_batches")]


@pytest.fixture
def recording(scripts):
    """(ids [S, context + N], experts [S, N, L, k]) of a tiny model."""
    model, ids = random_model(), np.random.default_rng(0).integers(0, 97, (8, 7))
    return model, ids, np.array(scripts[0].recorded(model, ids, context=2))


@pytest.mark.parametrize("copies", [0, 5])
@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_counts_are_those_of_plain_loops(scripts, recording, batch, copies):
    _, _, experts = recording
    S, N, L, k = experts.shape
    strategy = {"strategy": "replicated", "redundant": copies} if copies else {}
    held = place_experts(np.ones((L, 16)), 3, **strategy).held
    wanted, balance, fan, touched = [], [], [], []
    for group in range(0, S, batch):
        for n in range(N):
            for layer in range(L):
                ids = experts[group : group + batch, n, layer]
                wanted.append(len(set(ids.ravel().tolist())))
                if copies:
                    continue
                owner = [[int(held[layer, :, expert].argmax()) for expert in token] for token in ids.tolist()]
                loads = [sum(token.count(device) for token in owner) for device in range(3)]
                balance.append(np.mean(loads) / max(loads))
                touched.append(sum(load > 0 for load in loads))
                fan += [len(set(token)) for token in owner]
    found = scripts[2].count(experts, held, batch)
    assert found["wanted"] == pytest.approx(np.mean(wanted))
    if not copies:
        assert found["balancedness"] == pytest.approx(np.mean(balance), abs=1e-5)
        assert found["devices"] == pytest.approx(np.mean(touched)) and found["fan_out"] == pytest.approx(np.mean(fan))
    assert 1 <= found["fan_out"] <= found["devices"] + 1e-9 <= 3.1 and 1 / 3 <= found["balancedness"] <= 1


def test_steps_hold_the_same_token_of_other_sequences(scripts, recording):
    _, _, experts = recording
    steps = scripts[2].in_steps(experts, 4)
    assert steps.shape == (2 * 5, 4, 3, 4)
    assert all(np.array_equal(steps[5 * g + n], experts[4 * g : 4 * g + 4, n]) for g in (0, 1) for n in range(5))


def test_experts_by_chance(scripts):
    rng = np.random.default_rng(0)
    drawn = [len({e for _ in range(8) for e in rng.permutation(128)[:8].tolist()}) for _ in range(400)]
    assert scripts[2].wanted_by_chance(128, 8, 8) == pytest.approx(np.mean(drawn), abs=0.5)
    assert scripts[2].wanted_by_chance(128, 8, 1) == 8


def test_every_turn_decodes_from_the_same_place(scripts, recording):
    """What a recording of a whole text shows is what its tokens choose one by one, in a batch."""
    batches, (model, ids, experts) = scripts[0], recording
    decoding = batches.Decoding(model, ids, 4, context=2)
    for _ in range(2):
        with batches.record_routing(model) as trace:
            assert decoding.seconds(5) > 0
        one_by_one = trace.experts.reshape(5, 4, 3, 4).swapaxes(0, 1)
        assert np.array_equal(np.sort(one_by_one), np.sort(experts[:4].astype(np.uint16)))
        assert {entry.offset for entry in decoding.cache} == {2}


def test_an_answer_is_judged_by_stocks_tokens(scripts):
    class Detokenizer:
        text = ""

        def add_token(self, token):
            self.text += "abc"[token]

        def finalize(self):
            pass

    class Tokenizer:
        detokenizer = property(lambda self: Detokenizer())

    answer = scripts[1].Answer(Tokenizer(), [0, 1, 2], [0.5, 0.25, 2.0])
    assert scripts[1].judged(answer, 3, "abc", True) == scripts[1].judged(answer, 2, "ab", True) == "right"
    assert scripts[1].judged(answer, 3, "ab", False) == "right"  # hung up
    assert scripts[1].judged(answer, 3, "aXc", True) == 0.25 and scripts[1].judged(answer, 3, "Xbc", True) == 0.5
    assert scripts[1].judged(answer, 3, "ab", True) == 2.0  # cut short
