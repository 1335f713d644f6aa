"""Sharded experts of one layer: who is asked for what when they change devices, and over whom ranks sum."""

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import Rank
from conftest import random_model

from expert_parallel import Placement, place_experts, shard_model
from expert_parallel.device import masked
from expert_parallel.layers import moe_layers
from expert_parallel.stores import InMemory


def held(*devices):
    """bool [D, E] of the experts of each device."""
    count = 1 + max(max(experts) for experts in devices)
    return np.array([[expert in experts for expert in range(count)] for experts in devices])


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        (([0, 1], [2, 3]), ([2, 3], [0, 1]), 2),  # all of it is new on both
        (([0, 1], [2], [3]), ([0, 2], [1], [3]), 2),  # the third device is left alone
        (([0, 1], [2, 3]), ([0, 1, 2], [2, 3]), 1),
    ],
)
def test_devices_that_change_are_asked_and_no_others(before, after, changed, monkeypatch):
    model = random_model(num_experts=4, num_experts_per_tok=2, num_hidden_layers=1)
    tokens = mx.array([[1, 2, 3, 4, 5]])
    expected = model(tokens)
    shard_model(model, Placement(held(*before)[None]))
    asked, hold = [], InMemory.hold
    monkeypatch.setattr(InMemory, "hold", lambda self, ids, rows: asked.append(list(ids)) or hold(self, ids, rows))
    experts = moe_layers(model)[0].experts
    experts.change(held(*after))
    assert asked == [new for old, new in zip(before, after, strict=True) if old != new] and len(asked) == changed
    assert [store.ids.tolist() for store in experts.stores] == [*map(list, after)]
    assert mx.array_equal(model(tokens), expected)


def test_the_quickest_of_six_counts_without_the_first(monkeypatch):
    asked = []

    def repeat(work, **how):
        asked.append((work(), how))
        return [0.5, 9, 3, 1, 2, 8, 7]

    monkeypatch.setattr(masked.timeit, "repeat", repeat)
    monkeypatch.setattr(mx, "eval", lambda answer: answer)
    assert masked._quickest(lambda x, ids: (x, ids), "x", "ids") == 1
    assert asked == [(("x", "ids"), {"number": 1, "repeat": 7})]


def test_slots_are_summed_over_the_group_that_was_given(monkeypatch):
    """Not over all ranks there are: a run may be one of several."""
    model, group, sums = random_model(num_hidden_layers=1), Rank(0, 2), []
    monkeypatch.setattr(mx.distributed, "all_sum", lambda y, group=None: sums.append((y.shape, group)) or y)
    shard_model(model, place_experts(np.ones((1, 16)), 2), group, combine="gather")
    mx.eval(model(mx.array([[1, 2, 3]])))
    assert sums == [((1, 3, 4, 64), group)]
    model = random_model(num_hidden_layers=1)
    shard_model(model, place_experts(np.ones((1, 16)), 2), group, combine="reduce")
    mx.eval(model(mx.array([[1, 2, 3]])))
    assert sums[1:] == [((1, 3, 64), group)]


@pytest.mark.parametrize(("quicker_up_to", "most"), [(0, 0), (1, 4), (8, 32), (64, 256)])
def test_steps_grow_until_masked_is_no_longer_a_tenth_quicker(quicker_up_to, most, monkeypatch):
    """Of one token to 64, each with four experts, all different; exactly a tenth is enough."""
    model = random_model(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    sharded = moe_layers(shard_model(model, place_experts(np.ones((1, 4)), 2)))[0].experts
    asked = []

    def quickest(way, x, ids):
        tokens = x.shape[1]
        assert x.shape == (1, tokens, 64) and np.sort(np.array(ids)).tolist() == [[[0, 1, 2, 3]] * tokens]
        asked.append((way.__name__, tokens))
        sharded.slots_served[:] += 1
        return {"compact": 1.1 if tokens <= quicker_up_to else 1.09, "masked": 1.0}[way.__name__]

    monkeypatch.setattr(masked, "_quickest", quickest)
    assert masked._measured_on(sharded) == most
    sizes = [1, 4, 8, 16, 32, 64]
    tried = sizes[: sum(size <= quicker_up_to for size in sizes) + 1]
    assert asked == [(way, tokens) for tokens in tried for way in ("compact", "masked")]
    assert sharded.slots_served.tolist() == [0, 0]  # no slots of a run


@pytest.mark.parametrize(("device", "ranks", "asked", "most"), [("cpu", 1, 0, 0), ("gpu", 1, 1, 24), ("gpu", 2, 1, 16)])
def test_what_is_measured_on_one_layer_counts_for_all_and_on_every_rank(device, ranks, asked, most, monkeypatch):
    model, seen, group = random_model(), [], Rank(0, ranks)
    layers = moe_layers(shard_model(model, place_experts(np.ones((3, 16)), 2)))
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(getattr(mx, device)))
    monkeypatch.setattr(masked, "_measured_on", lambda experts: seen.append(experts) or 24)
    monkeypatch.setattr(mx.distributed, "all_min", lambda x, group=None: seen.append(group) or mx.array(16))
    assert masked.measure_masked(layers, group) == most
    assert seen == [layers[0].experts, group][: asked + (ranks > 1)] and len(seen) == asked + (ranks > 1)
    assert [layer.experts.masked_up_to for layer in layers] == [most] * 3
