"""Chance levels against closed forms and plain loops."""

import math
import random

import numpy as np
import pytest

from expert_parallel import place_experts
from expert_parallel.balance import fan_out
from expert_parallel.projection.step import uniform_experts
from expert_parallel.serving import devices_of_trace
from expert_parallel.study import chance
from expert_parallel.study.chance import expected_fan_out, uniform_routing


def by_loops(tokens, top_k, devices_of, num_devices, rounds=400):
    """Means over draws, with Python's own generator."""
    draw, found = random.Random(1), []
    for _ in range(rounds):
        counts = [0] * len(devices_of)
        for _ in range(tokens):
            for expert in draw.sample(range(len(devices_of)), top_k):
                counts[expert] += 1
        loads = [0.0] * num_devices
        for count, holders in zip(counts, devices_of, strict=True):
            for device in holders:
                loads[device] += count / len(holders)
        mean = sum(counts) / len(counts)
        entropy = -sum(c / sum(counts) * math.log(c / sum(counts), len(counts)) for c in counts if c)
        found.append((max(counts) / mean, counts.count(0), sum(loads) / num_devices / max(loads), entropy))
    return [sum(column) / rounds for column in zip(*found, strict=True)]


@pytest.mark.parametrize(("tokens", "top_k", "num_experts", "devices"), [(17, 8, 128, 8), (1, 2, 8, 4), (60, 2, 16, 3)])
def test_uniform_routing_is_what_loops_find(tokens, top_k, num_experts, devices):
    held = place_experts(np.ones((1, num_experts)), devices).held[0]
    holders = [np.flatnonzero(column).tolist() for column in held.T]
    hottest, never, even, entropy = by_loops(tokens, top_k, holders, devices)
    found = uniform_routing(tokens, top_k, held)
    assert found["hottest_over_mean"] == pytest.approx(hottest, rel=0.04)
    assert found["never_used"] == pytest.approx(never, rel=0.04, abs=0.1)
    assert found["balancedness"] == pytest.approx(even, rel=0.03)
    assert found == uniform_routing(tokens, top_k, held)  # the same every time
    assert found["entropy"] == pytest.approx(entropy, rel=0.002)
    if tokens == 1:
        assert found["entropy"] == pytest.approx(np.log(top_k) / np.log(num_experts))


def test_17_tokens_look_skewed_by_chance_and_many_do_not():
    held = place_experts(np.ones((1, 128)), 8).held[0]
    few, many = uniform_routing(17, 8, held), uniform_routing(100_000, 8, held)
    assert few["balancedness"] == pytest.approx(0.75, abs=0.02)
    assert few["hottest_over_mean"] == pytest.approx(4.1, abs=0.2)
    assert few["never_used"] == pytest.approx(128 * (15 / 16) ** 17) == pytest.approx(42.7, abs=0.1)
    assert many["balancedness"] > 0.99 and many["hottest_over_mean"] < 1.05 and many["never_used"] < 1e-9


def test_long_traces_take_few_draws(monkeypatch):
    """At most four million random numbers for a figure: a long trace scatters little. And no two parts are alike."""
    drawn = []

    def spied(num_tokens, num_layers, num_experts, top_k, seed):
        drawn.append((num_tokens * num_experts, seed))
        return uniform_experts(num_tokens, num_layers, num_experts, top_k, seed)

    monkeypatch.setattr(chance, "uniform_experts", spied)
    held = place_experts(np.ones((1, 8)), 2).held[0]
    for tokens, draws in ((17, 200), (10_000, 50), (100_000, 5), (600_000, 1)):
        drawn.clear()
        uniform_routing(tokens, 2, held)
        assert sum(count for count, _ in drawn) == draws * tokens * 8 and len(set(drawn)) == len(drawn)


def test_replicas_share():
    held = np.array([[1, 1, 1, 0], [1, 0, 0, 1]], dtype=bool)
    _, _, even, _ = by_loops(40, 1, [[0, 1], [0], [0], [1]], 2)
    assert uniform_routing(40, 1, held)["balancedness"] == pytest.approx(even, rel=0.04)


def test_expected_fan_out():
    # k=1 touches one device; k=E all; two of four experts, two a device: same device 2 of 6 pairs.
    assert expected_fan_out([3, 3, 2], 8, 1) == pytest.approx(1)
    assert expected_fan_out([3, 3, 2], 8, 8) == pytest.approx(3)
    assert expected_fan_out([2, 2], 4, 2) == pytest.approx(1 + 4 / 6)
    # The field's approximation for independent picks, D (1 - (1 - 1/D)^k), is close: 5.25 for D=8, k=8.
    assert expected_fan_out([16] * 8, 128, 8) == pytest.approx(8 * (1 - (7 / 8) ** 8), rel=0.03)


def test_measured_fan_out_of_uniform_routing_is_the_expected_one():
    random = np.random.default_rng(0)
    experts = random.random((20_000, 1, 128)).argsort(axis=-1)[..., :8]
    placement = place_experts(np.ones((1, 128)), 8)
    assert fan_out(devices_of_trace(experts, placement.held))[0] == pytest.approx(
        expected_fan_out([16] * 8, 128, 8), rel=0.005
    )
