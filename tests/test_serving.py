"""Who answers which slot: by hand, by property, against every possible choice, and against scipy's linear programme."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from expert_parallel import place_experts
from expert_parallel.serving import Serving, devices_of_trace, level

# Devices 0 and 1 have expert 0; 1 and 2 have expert 1; expert 2 is on device 0 alone, nobody has expert 3.
HELD = np.array([[1, 0, 1, 0], [1, 1, 0, 0], [0, 1, 0, 0]], dtype=bool)


def loads(device, num_devices):
    return np.bincount(device.reshape(-1), minlength=num_devices + 1)[:num_devices]


@st.composite
def problems(draw, most_slots=9):
    """(held, experts [T, k]): up to 4 devices, 5 experts, some with copies and at times one that nobody has."""
    devices, experts = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    held = random.random((devices, experts)) < draw(st.sampled_from([0.2, 0.5, 0.8]))
    lost = ~held.any(axis=0)
    keep = random.random(experts) < 0.9
    held[random.integers(devices), lost & keep] = True
    return held, random.integers(experts, size=(draw(st.integers(1, most_slots)), 1))


def least_by_trying(held, experts):
    """Slots on the fullest device, the least of all choices."""
    holders = [np.flatnonzero(held[:, e]) for e in experts.reshape(-1) if held[:, e].any()]
    return min(np.bincount(choice, minlength=len(held)).max() for choice in itertools.product(*holders))


def test_by_hand():
    serving = Serving(HELD)
    assert serving.home.tolist() == [0, 1, 0, 3]
    # Two slots of expert 2 on device 0; expert 0's three go to device 1, then expert 1's two to the empty device 2.
    experts = np.array([[2, 0], [2, 0], [1, 0], [1, 3]])
    assert serving.devices(experts, greedy=True).tolist() == [[0, 1], [0, 1], [2, 1], [2, 3]]
    # Two of expert 0's: the second goes where fewer are by then.
    assert serving.devices(np.array([0, 0])).tolist() == [0, 1]


def greedy_by_loops(held, experts):
    """Only holders first; then the most wanted, ties by number, whole to its emptiest holder.

    Of equally empty ones to the first from where the step's turn says. What would lie above an equal share of all
    slots goes to the next holder, and what lies above it anyhow slot by slot to the emptiest. An expert's earlier slots
    are those of lower devices.
    """
    turn = int(experts.sum())
    load, given, wanted = [0] * len(held), {}, [int((experts == e).sum()) for e in range(held.shape[1])]
    holders = [np.flatnonzero(column).tolist() for column in held.T]
    alone = [sum(n for n, of in zip(wanted, holders, strict=True) if of == [d]) for d in range(len(held))]
    living = max(1, sum(bool(row.any()) for row in held))
    share = max(-(-sum(n for n, of in zip(wanted, holders, strict=True) if of) // living), *alone)
    for e in sorted(range(len(wanted)), key=lambda e: (len(holders[e]) > 1, -wanted[e], e)):
        if not holders[e]:
            given[e] = wanted[e] * [len(held)]
            continue
        first = [*holders[e][-turn % len(holders[e]) :], *holders[e][: -turn % len(holders[e])]]
        first, given[e] = sorted(first, key=lambda d: load[d]), []
        for _ in range(wanted[e]):
            with_room = [d for d in first if load[d] < share]
            device = with_room[0] if with_room else min(first, key=lambda d: (load[d], first.index(d)))
            load[device] += 1
            given[e].append(device)
        given[e].sort(reverse=True)
    return [given[e].pop() for e in experts.reshape(-1).tolist()]


def test_a_greedy_choice_by_loops():
    """24 experts of 200 slots, many wanted as often: which goes first, and which slot where, is said for ties too."""
    random = np.random.default_rng(2)
    for _ in range(20):
        held = random.random((6, 24)) < 0.3
        held[random.integers(6, size=24), np.arange(24)] = True
        held[5] &= random.random() < 0.5  # at times a device is gone, and what only it had
        experts = random.integers(24, size=(50, 4))
        assert Serving(held).devices(experts, greedy=True).reshape(-1).tolist() == greedy_by_loops(held, experts)


def test_one_holder_leaves_no_choice():
    serving = Serving(np.eye(4, dtype=bool))
    experts = np.array([[3, 1], [1, 1]])
    assert not serving.any_shared
    assert serving.devices(experts, greedy=True).tolist() == serving.devices(experts).tolist() == experts.tolist()


def test_holders_take_turns():
    held = np.array([[1, 1, 0, 1], [0, 1, 1, 1], [0, 0, 0, 1]], dtype=bool)
    assert Serving(held).turns.T.tolist() == [[0, 0, 0], [0, 1, 0], [1, 1, 1], [0, 1, 2]]
    assert Serving(HELD).turns.T.tolist() == [[0, 1], [1, 2], [0, 0], [3, 3]]  # nobody is D


@pytest.mark.parametrize(
    ("load", "amount", "share"),
    [([5, 1, 2], 4, [0, 3, 1]), ([5, 1, 2], 9, [1, 4, 4]), ([3, 3], 1, [1, 0]), ([0, 7], 3, [3, 0]), ([2], 5, [5])],
)
def test_level_by_hand(load, amount, share):
    given = level(np.array(load), amount)
    assert sorted((np.array(load) + given).tolist()) == sorted((np.array(load) + share).tolist())
    assert given.sum() == amount and (given >= 0).all()


@settings(max_examples=150)
@given(problems())
def test_every_slot_has_a_holder_and_the_optimum_is_one(problem):
    held, experts = problem
    serving = Serving(held)
    for device in (serving.devices(experts, greedy=True), serving.devices(experts)):
        assert device.shape == experts.shape
        for of_slot, expert in zip(device.reshape(-1), experts.reshape(-1), strict=True):
            assert held[of_slot, expert] if held[:, expert].any() else of_slot == len(held)
    if held.any(axis=0)[experts].any():
        greedy, best = (loads(one, len(held)).max() for one in (serving.devices(experts, greedy=True), device))
        assert best == least_by_trying(held, experts) <= greedy


@settings(max_examples=100)
@given(problems(most_slots=30))
def test_a_replicated_experts_slots_lie_level(problem):
    """Of one expert no holder gets a slot more than another needs to: nothing else is wanted."""
    held, experts = problem
    shared = np.flatnonzero(held.sum(axis=0) > 1)
    if len(shared):
        got = loads(Serving(held).devices(np.full((7, 1), shared[0])), len(held))[held[:, shared[0]]]
        assert got.sum() == 7 and got.max() - got.min() <= 1


def test_experts_stay_whole_where_the_fullest_device_does_not_mind():
    """Every device that gets slots of an expert reads all of its weights: 64 tokens, top-8 of 128, 32 copies.

    Slot by slot to the emptiest holder, which levels as well, nearly all replicated experts were read twice.
    """
    random, reads, wanted = np.random.default_rng(3), {2: 0, 8: 0}, 0
    popular = random.lognormal(sigma=0.5, size=128)
    for num_devices in reads:
        held = place_experts(popular[None], num_devices, "replicated", 32).held[0]
        for _ in range(10):
            ids = np.stack([random.choice(128, 8, replace=False, p=popular / popular.sum()) for _ in range(64)])
            device = Serving(held).devices(ids)
            assert loads(device, num_devices).max() == 512 / num_devices
            reads[num_devices] += len(set(zip(device.reshape(-1), ids.reshape(-1), strict=True)))
            wanted += len(np.unique(ids)) / 2
    assert reads[2] < 1.02 * wanted and reads[8] < 1.12 * wanted


def test_the_optimum_against_a_linear_programme():
    """64 tokens, top-8 of 128 experts, 32 copies on 8 devices: with scipy's bound, and in about a millisecond."""
    random = np.random.default_rng(0)
    weights = random.zipf(1.6, 128).clip(max=200)
    held = place_experts(weights[None], 8, "replicated", 32).held[0]
    serving, seconds = Serving(held), []
    for _ in range(12):
        experts = np.stack([random.choice(128, 8, replace=False, p=weights / weights.sum()) for _ in range(64)])
        begin = time.perf_counter()
        best = loads(serving.devices(experts), 8)
        seconds.append(time.perf_counter() - begin)
        assert best.sum() == experts.size
        assert best.max() == int(np.ceil(least_by_programme(held, experts) - 1e-6))
        assert best.max() <= loads(serving.devices(experts, greedy=True), 8).max()
    assert np.median(seconds) < 0.02  # about 1 ms; BENCHMARKS.md has it measured


def least_by_programme(held, experts):
    """min t: every expert's slots dealt out among its holders in parts, no device above t."""
    counts = np.bincount(experts.reshape(-1), minlength=held.shape[1])
    pairs = np.argwhere(held)  # (device, expert) of each variable; the last variable is t
    dealt = np.zeros((held.shape[1], len(pairs) + 1))
    above = np.zeros((len(held), len(pairs) + 1))
    for n, (device, expert) in enumerate(pairs):
        dealt[expert, n], above[device, n] = 1, 1
    above[:, -1] = -1
    cost = np.append(np.zeros(len(pairs)), 1)
    return linprog(cost, above, np.zeros(len(held)), dealt, counts, method="highs").fun


def test_a_trace_is_dealt_out_step_by_step():
    """Two tokens of one pass share the devices, a third begins anew; layers have holders of their own."""
    held = np.stack([HELD, HELD[::-1]])
    experts = np.array([[[0, 1], [0, 1]], [[0, 2], [0, 2]], [[0, 2], [2, 2]]])
    device = devices_of_trace(experts, held, [0, 0, 4])
    for layer, start, end in ((0, 0, 2), (0, 2, 3), (1, 0, 2), (1, 2, 3)):
        assert (device[start:end, layer] == Serving(held[layer]).devices(experts[start:end, layer])).all()
    together = devices_of_trace(experts, held)
    assert (together[:, 0] == Serving(held[0]).devices(experts[:, 0])).all()
    turns = devices_of_trace(experts, held, [0, 0, 4], masked_up_to=2)  # steps of 2 slots: the last one
    assert (turns[:2] == device[:2]).all()
    assert (device[2, 0].tolist(), turns[2, 0].tolist()) == ([1, 0], [0, 0])  # expert 0's first holder, though it has 2
    assert (devices_of_trace(experts, held, [0, 0, 4], masked_up_to=1) == device).all()


def test_taking_turns_by_hand():
    serving = Serving(HELD)
    assert serving.taking_turns(np.array([[0, 0], [0, 1]])).tolist() == [[0, 1], [0, 2]]


def test_equals_take_turns_over_the_steps():
    """One slot a step of experts that both devices have: neither device gets them all."""
    serving = Serving(np.ones((2, 8), dtype=bool))
    got = [int(serving.devices(np.array([expert]))[0]) for expert in range(8)]
    assert sorted(got) == [0] * 4 + [1] * 4


def test_steps_of_one_slot_are_dealt_out_like_all_others():
    """Without a GPU nobody takes turns, however few slots a step has."""
    experts, held = np.arange(8).reshape(8, 1, 1), np.ones((1, 2, 8), dtype=bool)
    expected = [int(Serving(held[0]).devices(np.array([expert]))[0]) for expert in range(8)]
    assert devices_of_trace(experts, held, range(8)).reshape(-1).tolist() == expected


def test_long_steps_move_many_slots_at_once(monkeypatch):
    """One slot a chain took seconds for a prompt over 64 devices with copies: so many chains as slots lay wrong."""
    random, chains = np.random.default_rng(0), []
    popular = random.lognormal(size=(1, 128))
    serving = Serving(place_experts(popular, 64, "replicated", redundant=128).held[0])
    ids = random.choice(128, 20_000, p=popular[0] / popular.sum())
    found = Serving._chain
    monkeypatch.setattr(Serving, "_chain", lambda *given: chains.append(0) or found(*given))
    after, before = (loads(serving.devices(ids, greedy=greedy), 64) for greedy in (False, True))
    assert len(chains) < 0.8 * np.maximum(0, before - after.max()).sum()
