"""When trials take a way: from how many tokens or slots on, with what gain, and how often they look."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from blocks import small_model
from mlx_lm.models.switch_layers import SwitchLinear

from expert_parallel import place_experts, shard_model
from expert_parallel.device import products, trials
from expert_parallel.device.lanes import Lanes
from expert_parallel.device.products import Plan
from expert_parallel.layers import moe_layers

STEPS = [1, 8, 16, 32, 64]


@pytest.fixture(autouse=True)
def no_plans(monkeypatch):
    monkeypatch.setattr(trials, "_plans", {})


@pytest.fixture
def asked(monkeypatch):
    """(rows, lanes, whether both ways say the same) of every trial; none finds a way quicker but those in `quick`."""
    asked, in_lanes = SimpleNamespace(all=[], quick=[]), trials._in_lanes

    def noting(way, lanes, busy):
        made = in_lanes(way, lanes, busy)
        made.busy = busy
        return made

    def from_tokens(plain, quick, module, *limits):
        x, busy = trials._random(module, 2), getattr(plain, "busy", None)
        first, second = (way(x) if busy is None else way(x)[0] for way in (plain, quick))
        asked.all.append((first.shape[-1], busy, mx.array_equal(first, second).item()))
        return asked.quick.pop(0) if asked.quick else math.inf

    monkeypatch.setattr(trials, "_in_lanes", noting)
    monkeypatch.setattr(trials, "from_tokens", from_tokens)
    return asked


def sharded(devices=2, streams="off", **changes):
    model = small_model("qwen3_moe", **changes)
    layers = len(moe_layers(model))
    return shard_model(model, place_experts(np.zeros((layers, 8)), devices), streams=streams)


@pytest.mark.parametrize(
    ("plain", "quick", "taken"),
    [
        ([3, 3, 3], [1, 9, 1], 3),
        ([1, 3, 1, 1, 1], [3, 3, 3, 3, 0.25], 5),  # something else ran beside it
        ([1.5] * 8, [1.4] * 8, 8),
        ([1.5] * 4, [0.75] * 3 + [0.5], 4),  # twice as quick is not quicker than that
        ([0.1] * 3, [0.2] * 3, 3),  # nothing to save
        ([100] * 3, [95] * 3, 3),  # too long to go on
        ([7.5, 3.75, 3.75, 10], [7.5, 3.75, 3.75, 10], 4),  # 30 ms are not
    ],
)
def test_a_way_that_does_not_look_quicker_is_tried_again(plain, quick, taken, monkeypatch):
    clock = iter([seconds / 1e3 for pair in zip(plain, quick, strict=True) for seconds in pair])
    monkeypatch.setattr(trials.timeit, "timeit", lambda way, number: number * next(clock))
    found = trials._seconds(lambda x: x, lambda x: x, mx.ones(1), 2)
    assert found == (min(plain) / 1e3, min(quick) / 1e3)
    assert len(list(clock)) == 2 * (len(plain) - taken) == 0


@pytest.mark.parametrize(
    ("seconds", "found"),
    [([(2, 1), (2, 1)], True), ([(2, 1), (1, 1)], False), ([(1, 1)], False), ([(trials.BRIEF, 0)], False)],
)
def test_what_is_quicker_is_so_twice(seconds, found, monkeypatch):
    left = list(seconds)
    monkeypatch.setattr(trials, "_seconds", lambda *ways: left.pop(0))
    assert trials._is_quicker(None, None, None) == (found, seconds[-1][0]) and not left


@pytest.mark.parametrize(
    ("slow", "fast", "longest", "found", "tried"),
    [
        (lambda n: 1.0, lambda n: 1 / n, math.inf, 8, 2),
        (lambda n: 2.0, lambda n: 1.0, math.inf, math.inf, 5),  # no more than the gain
        (lambda n: trials.BRIEF * n / 8, lambda n: 0.0, math.inf, 16, 3),  # brief at 8, too
        (lambda n: n / 8, lambda n: 1.0 * n, 2.0, math.inf, 4),  # at 16 it takes just the longest
        (lambda n: n / 8, lambda n: n / 100, 0.0, 1, 1),
    ],
)
def test_from_how_many_tokens(slow, fast, longest, found, tried, monkeypatch):
    taken = []
    monkeypatch.setattr(
        trials, "_seconds", lambda plain, quick, x, gain: taken.append(len(x)) or (slow(len(x)), fast(len(x)))
    )
    assert trials.from_tokens(None, None, nn.Linear(8, 8), 2, longest) == found
    assert taken == [*STEPS[:tried], *[found] * (found < math.inf)]  # twice, where it is


@pytest.mark.parametrize(
    ("slow", "fast", "found", "tried"),
    [
        (lambda n: trials.LONG, lambda n: trials.LONG / n, 8, 2),
        (lambda n: 1.2 * 2**-9, lambda n: 2**-9, math.inf, 5),  # no more than the gain
        (lambda n: trials.BRIEF * n / 8, lambda n: 0.0, 16, 3),
        (lambda n: trials.LONG * n / 8, lambda n: 1.0, math.inf, 3),  # at 8 it is just as long as allowed
    ],
)
def test_from_how_many_slots_devices_go_side_by_side(slow, fast, found, tried, monkeypatch):
    experts, lanes, taken = moe_layers(sharded())[0].experts, Lanes(2), []

    def seconds(by_turns, beside, x, gain):
        for way, slots in ((by_turns, math.inf), (beside, 0)):
            mx.eval(way(x))
            assert experts.side_by_side_from == slots and experts.lanes is lanes
        taken.append(x.shape[1])
        return slow(taken[-1]), fast(taken[-1])

    monkeypatch.setattr(trials, "_seconds", seconds)
    experts.slots_served[:] = served = list(range(1, 1 + len(experts.slots_served)))
    for _ in range(2):  # the second time it is known
        assert trials.slots_from(experts, lanes) == found * min(8, experts.num_experts)
        assert taken == [*STEPS[:tried], *[found] * (found < math.inf)] and experts.slots_served.tolist() == served


def test_experts_on_disk_are_no_measure():
    stores = [SimpleNamespace(all_here=True), SimpleNamespace(all_here=False)]
    assert trials.slots_from(SimpleNamespace(stores=stores), Lanes(1)) == math.inf


@pytest.mark.parametrize(("streams", "slots", "split"), [("auto", 7, math.inf), ("on", 0, 1)])
@pytest.mark.parametrize("layers", [1, 2])
def test_side_by_side_as_asked_for(streams, slots, split, layers, monkeypatch, asked):
    monkeypatch.setattr(trials, "useful_lanes", lambda devices: devices)
    monkeypatch.setattr(trials, "slots_from", lambda sharded, lanes: 7)
    model = sharded(2, streams, num_hidden_layers=layers)
    assert {layer.experts.side_by_side_from for layer in moe_layers(model)} == {slots}
    products = [m._product.plan.split_from for m in model.modules() if hasattr(m, "_product")]
    assert set(products) == ({split} if streams == "on" else set())


def test_one_device_has_nobody_beside_it(monkeypatch, asked):
    monkeypatch.setattr(trials, "slots_from", pytest.fail)
    assert moe_layers(sharded(1, "on"))[0].experts.side_by_side_from == math.inf


@pytest.mark.parametrize(("quick", "busy", "tries"), [([1], 2, 1), ([math.inf, 8], 2, 2), ([], 1, 2)])
def test_a_product_is_timed_in_the_lanes_that_a_model_has(quick, busy, tries, asked, monkeypatch):
    """A few rows of it: as many as two lanes have at once; split at all, all lanes are busy."""
    monkeypatch.setattr(products, "DENSE", 64 * 4)
    asked.quick = quick
    trials.plans_of_linear([nn.Linear(64, 100)], Lanes(2))
    assert asked.all == [(64, None, True)] * tries + [(4, busy, True)]


def test_experts_are_timed_in_all_lanes_by_shape(asked, monkeypatch):
    sorted_too, call = set(), SwitchLinear.__call__
    monkeypatch.setattr(
        SwitchLinear, "__call__", lambda *of, **how: sorted_too.add(how["sorted_indices"]) or call(*of, **how)
    )
    asked.quick = [1, 8]
    shapes = [(64, 32, 4), (64, 48, 4), (64, 32, 6)]
    plans = [trials.plan_of_experts(SwitchLinear(*shape, bias=False), Lanes(3)) for shape in shapes]
    assert [plan.together_from for plan in plans] == [1, 8, 1] and sorted_too == {True}
    assert asked.all == [(32, 3, True), (48, 3, True)]


def test_a_product_in_so_many_lanes():
    entered = []
    answer = trials._in_lanes(lambda x: x + len(entered), lambda n: nullcontext(entered.append(n)), 3)
    assert answer(10) == [11, 12, 13] and entered == [0, 1, 2]


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_bits_of_one_token_and_of_more_are_compared(tokens, asked, monkeypatch):
    right = trials.together

    def wrong(module, at, columns, *expert):
        parts = right(module, at, columns, *expert)
        return [y + 1 for y in parts] if min(columns.shape[1], 3) == tokens else parts

    monkeypatch.setattr(trials, "together", wrong)
    trials.plans_of_linear([nn.Linear(64, 44)], Lanes(1))
    trials.plan_of_experts(SwitchLinear(64, 44, 2), Lanes(1))
    assert not asked.all


def test_what_mlx_does_not_have_is_not_the_same():
    def none(x):
        raise ValueError("no such product")

    layer = nn.Linear(8, 8)
    assert trials._all_same(layer, layer, layer, (1,)) and not trials._all_same(layer, none, layer, (1,))


def test_lanes_of_one_are_not_tried_again(asked):
    layer = nn.Linear(64, 44)
    assert len(trials.plans_of_linear([layer, layer], Lanes(1))) == 2
    assert len(asked.all) == 1


@pytest.mark.parametrize(
    ("plans", "side_by_side", "words"),
    [
        ([(1, math.inf), (8, math.inf)], (), "2 of {} linear layers split over streams, from 1 token on"),
        ([(math.inf, 2)], (), "1 of {} linear layers take a prompt's tokens at once, from 2 tokens on"),
        ([], (1,), "devices side by side"),
        ([], (), None),
    ],
)
def test_in_words(plans, side_by_side, words):
    model = sharded()
    linear = [module for module in model.modules() if type(module) in trials.LINEAR]
    for plan, module in zip(plans, linear, strict=False):
        trials._install(module, trials.Product(Plan(*plan, mx.float32), Lanes(1)))
    for layer in side_by_side:
        moe_layers(model)[layer].experts.side_by_side_from = 0
    assert trials.in_words(model) == (words and words.format(len(linear)))
