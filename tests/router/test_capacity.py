"""Capacity: the field's formulas, and limits by hand and by property."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_parallel.router.capacity import Capacity, adaptive_capacity, expert_capacity, limit_slots

GATES = np.array([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.4, 0.35, 0.25]])


def test_drop_by_score_and_by_position():
    """Three tokens want expert 0, which has two places."""
    experts = [[0], [0], [0]]
    assert limit_slots(experts, GATES, 2)[1].ravel().tolist() == [True, True, False]  # 0.4 is the lowest gate
    assert limit_slots(experts, GATES, 1)[1].ravel().tolist() == [False, True, False]
    assert limit_slots(experts, GATES, 1, drop="position")[1].ravel().tolist() == [True, False, False]
    assert not limit_slots(experts, GATES, 0)[1].any()


def test_reroute_to_the_next_best_with_room():
    experts, kept = limit_slots([[0], [0], [0]], GATES, 1, reroute=True)
    # Token 1 keeps expert 0; token 2 wants expert 1 more (0.35) than token 0 (0.3), which goes to 2.
    assert experts.ravel().tolist() == [2, 0, 1] and kept.all()
    experts, kept = limit_slots([[0, 1], [0, 1], [0, 1]], GATES, 2, reroute=True)
    assert kept.sum() == 6 and (np.bincount(experts.ravel()) == 2).all()
    # The third token finds no room with either; expert 2 has room for both slots, and gets one.
    experts, kept = limit_slots([[0, 1]] * 3, np.tile([0.4, 0.3, 0.2, 0.1], (3, 1)), 2, reroute=True)
    assert experts.tolist() == [[0, 1], [0, 1], [2, 3]] and kept.all()


@st.composite
def batches(draw):
    num_tokens, num_experts = draw(st.integers(1, 30)), draw(st.integers(2, 12))
    k = draw(st.integers(1, num_experts))
    random = np.random.default_rng(draw(st.integers(0, 9999)))
    gates = random.dirichlet(np.full(num_experts, 0.3), num_tokens)
    return np.argsort(-gates, axis=1)[:, :k], gates, draw(st.integers(0, num_tokens))


@given(batches(), st.sampled_from(["score", "position"]))
@settings(max_examples=150)
def test_limits_hold_and_no_place_is_wasted(batch, drop):
    experts, gates, capacity = batch
    num_experts = gates.shape[1]
    wanted = np.bincount(experts.ravel(), minlength=num_experts)
    same, kept = limit_slots(experts, gates, capacity, drop)
    assert np.array_equal(same, experts)
    assert np.bincount(experts[kept], minlength=num_experts).tolist() == np.minimum(wanted, capacity).tolist()
    new, still = limit_slots(experts, gates, capacity, drop, reroute=True)
    counts = np.bincount(new[still], minlength=num_experts)
    assert (counts <= capacity).all()
    assert (still >= kept).all() and np.array_equal(new[kept], experts[kept])
    for row, ok in zip(new, still, strict=True):
        assert len(set(row[ok])) == ok.sum()  # no expert twice for a token
        if not ok.all():  # dropped in the end: every expert with room is one the token has or had asked for
            tried = set(row.tolist()) | set(experts[(new == row).all(axis=1).argmax()].tolist())
            assert all(counts[e] >= capacity or e in tried for e in range(num_experts))


def test_adaptive_capacity_by_hand():
    assert adaptive_capacity([10, 4, 2, 0]) == 10
    # 16 slots, an eighth may go: 2 of the 10.
    assert adaptive_capacity([10, 4, 2, 0], tolerance=0.125) == 8
    assert adaptive_capacity([10, 4, 2, 0], tolerance=0.5) == 3  # drops 7 and 1
    assert adaptive_capacity([0, 0]) == 0


def test_capacity_formulas_of_the_field():
    rules = ("megatron", "deepspeed", "tutel")
    assert [expert_capacity(10, 8, 128, rule=rule) for rule in rules] == [1, 4, 8]
    assert [expert_capacity(4096, 8, 128, rule=rule) for rule in rules] == [256, 256, 256]
    # 100 x 8 / 128 = 6.25 slots on average; 1.25 of that is 7.8125. Tutel: 8 int(1.25 x 1).
    assert [expert_capacity(100, 8, 128, 1.25, rule) for rule in rules] == [8, 8, 8]
    with pytest.raises(ValueError, match="megatron, deepspeed or tutel"):
        expert_capacity(10, 8, 128, rule="other")
    with pytest.raises(ValueError, match="over 0, got megatron, 0"):
        expert_capacity(10, 8, 128, factor=0)


def test_capacity_mistakes():
    for options, message in [
        ({"factor": 0}, "over 0, got megatron, 0"),
        ({"rule": "mine"}, "megatron, deepspeed or tutel"),
        ({"drop": "random"}, "score or position"),
        ({"tolerance": 1.5}, "tolerance"),
    ]:
        with pytest.raises(ValueError, match=message):
            Capacity(**options)
