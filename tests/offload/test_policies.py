"""What a cache of experts hits, against plain references, the optimum by trying everything, and published figures."""

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import counting_hits, fewest_misses, lru_hits

from expert_parallel.formats.traces import read_trace
from expert_parallel.offload.policies import HALVED, POLICIES, Cache, hottest
from expert_parallel.offload.replay import in_one, replay
from expert_parallel.trace import RoutingTrace

REAL = ROOT.parent / "shared" / "traces" / "qwen3-30b-a3b.route.csv"
EVERY = (*POLICIES, "belady")


def random_trace(seed, tokens=200, layers=2, top_k=3, experts=12, prefill=0):
    """Skewed choices, a prompt's first tokens in one pass."""
    random = np.random.default_rng(seed)
    taste = random.gumbel(size=(tokens, layers, experts)) + 2 * random.normal(size=(1, layers, experts))
    chosen = np.argsort(-taste, axis=2)[..., :top_k]
    return RoutingTrace(chosen, experts, np.arange(tokens) < prefill)


def steps_of(trace, layer):
    """The experts that each forward pass wanted of a layer."""
    return [trace.experts[trace.steps == step, layer].ravel() for step in np.unique(trace.steps)]


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(3, 12))
def test_hits_are_those_of_plain_references(seed, room):
    trace = random_trace(seed)
    for policy, reference in (
        ("lru", lru_hits),
        ("lfu", counting_hits),
        ("aging", lambda steps, room: counting_hits(steps, room, HALVED)),
    ):
        hits, wanted = replay(trace, room, policy)
        for layer in range(2):
            assert hits[:, layer].tolist() == reference(steps_of(trace, layer), room), policy
            assert wanted[:, layer].tolist() == [3] * 200


@settings(max_examples=60)
@given(st.lists(st.sets(st.integers(0, 5), min_size=2, max_size=2), min_size=1, max_size=12), st.integers(2, 5))
def test_no_choice_of_who_goes_misses_less_than_belady(steps, room):
    trace = RoutingTrace(np.array([sorted(step) for step in steps])[:, None], 6)
    hits, wanted = replay(trace, room, "belady")
    assert (wanted - hits).sum() == fewest_misses(steps, room)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(0, 60))
def test_no_policy_beats_belady_in_waves_either(seed, room, prefill):
    trace = random_trace(seed, tokens=80, prefill=prefill)
    pinned = hottest(trace.loads(), room, 3)
    best = replay(trace, room, "belady")[0].sum()
    for policy in POLICIES:
        assert replay(trace, room, policy, pinned if policy == "pinned" else None)[0].sum() <= best, policy


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 12), st.sampled_from(POLICIES), st.integers(0, 30))
def test_the_running_cache_hits_what_the_replay_says(seed, room, policy, prefill):
    trace = random_trace(seed, layers=1, prefill=prefill)
    pinned = hottest(trace.loads(), room, 3) if policy == "pinned" else [()]
    cache = Cache(12, room, policy, pinned[0])
    for step in steps_of(trace, 0):
        wanted = np.unique(step)
        here = set(cache.held)
        come, row, wave, hits = cache.step(wanted)
        assert sorted(come) == wanted.tolist() and set(come[:hits]) == here & set(wanted.tolist())
        for first in set(wave.tolist()):  # those of a wave stand in places of their own
            assert len(set(row[wave == first])) == (wave == first).sum() <= room
        assert (np.array(cache.held)[row[wave == wave[-1]]] == come[wave == wave[-1]]).all()
    foretold, wanted = replay(trace, room, policy, pinned if policy == "pinned" else None)
    assert (cache.hits, cache.misses) == (foretold.sum(), (wanted - foretold).sum())
    assert all(cache.held[place] == expert for expert, place in enumerate(cache.place) if place >= 0)


def test_pinned_experts_stay_and_the_hottest_are_pinned():
    loads = np.array([[5, 1, 9, 2, 7, 0]])
    assert [each.tolist() for each in hottest(loads, 4, 2)] == [[2, 4]]
    assert [each.tolist() for each in hottest(loads, 2, 3)] == [[]]
    cache = Cache(6, 3, "pinned", [2, 4])
    for step in ([2, 4], [0], [1], [3], [5]):
        cache.step(np.array(step))
    assert set(cache.held) == {2, 4, 5}


def test_claims_age():
    """An expert of long ago counts for less than one of now: it was used three times, 2 halvings before."""
    for policy, gone in (("lfu", 1), ("aging", 0)):
        cache = Cache(4, 2, policy)
        for step in [[0]] * 3 + [[1]] * 2:
            cache.step(np.array(step))
        cache.claim[0] *= 1 if policy == "lfu" else 0.25
        cache.step(np.array([3]))
        assert cache.place[gone] < 0


@pytest.mark.parametrize("policy", EVERY)
def test_a_prompt_that_wants_more_than_there_is_room_for_is_one_step(policy):
    trace = random_trace(0, tokens=40, prefill=40)
    hits, wanted = replay(trace, 4, policy, hottest(trace.loads(), 4, 3) if policy == "pinned" else None)
    assert hits.shape == (2, 1, 2)[1:] and not hits.any()
    assert wanted.tolist() == [[len(np.unique(trace.experts[:, layer])) for layer in range(2)]]


def test_one_small_cache_over_all_layers_hits_nothing_at_all():
    """Each token asks for more over all layers than it holds, so each expert is gone before it is asked for again.

    What a step wants of one layer never goes for another of its own, so it takes a layer less than a token touches.
    """
    trace = random_trace(3, layers=5)
    trace.experts[:] = trace.experts[0]  # every token wants the very same
    whole = in_one(trace)
    assert whole.experts.shape == (1000, 1, 3) and whole.num_experts == 60
    assert replay(whole, 12, "lru")[0].sum() == 0
    assert replay(whole, 15, "lru")[0].sum() == 199 * 15
    with pytest.raises(ValueError, match="decode tokens alone"):
        in_one(random_trace(0, prefill=2))


@pytest.mark.skipif(not REAL.exists(), reason="the recorded trace is not here")
def test_the_real_trace_hits_what_an_independent_replay_found():
    """In per cent; 48 layers of 128 experts, 6 a token, a cache a layer, 128 decode tokens from empty caches."""
    decode = read_trace(REAL).phase("decode")
    for room, figures in {8: (42.7, 46.0, 52.0), 16: (60.7, 64.2, 74.8), 32: (80.5, 81.8, 88.1)}.items():
        for policy, figure in zip(("lru", "lfu", "belady"), figures, strict=True):
            hits, wanted = replay(decode, room, policy)
            assert abs(100 * hits.sum() / wanted.sum() - figure) < 0.3, (room, policy)
