"""The most that a single sequence gains: against counting every choice, random choices, and a published study."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from expert_parallel.projection.ceiling import break_even, ceiling, expected_fullest
from expert_parallel.projection.hardware import Machine
from expert_parallel.projection.links import Link
from expert_parallel.projection.step import Demand, Fullest, estimate


@pytest.mark.parametrize(("parts", "top_k"), [([3, 3], 2), ([3, 2, 2], 3), ([1, 4], 5), ([6], 4), ([1] * 5, 3)])
def test_the_fullest_of_every_choice(parts, top_k):
    home = np.repeat(np.arange(len(parts)), parts)
    counted = [np.bincount(home[list(chosen)]).max() for chosen in combinations(range(len(home)), top_k)]
    assert expected_fullest(parts, len(home), top_k) == pytest.approx(np.mean(counted))


def test_the_fullest_of_random_choices():
    """128 experts, top-8, 8 devices of 16: 2.53 experts where 1 would be even."""
    random = np.random.default_rng(0)
    home = np.stack([random.permutation(128)[:8] // 16 for _ in range(4000)])
    drawn = (home[:, :, None] == np.arange(8)).sum(axis=1).max(axis=1)
    assert expected_fullest([16] * 8, 128, 8) == pytest.approx(drawn.mean(), abs=4 * drawn.std() / 4000**0.5)


def demand_of(rest_share, layers=4, experts=512, chosen=10):
    """A model of which all but the experts is so much of what a token reads."""
    each = np.full(layers, 1000.0)
    rest = int(1000 * chosen * layers * rest_share / (1 - rest_share))
    return Demand(layers, 64, chosen, experts, each, each, rest, rest)


MACHINE = Machine("m", 1e6, 1e6, operations_per_second=1e12, layer_seconds=0.0)


@pytest.mark.parametrize(("devices", "published"), [(2, 1.22), (4, 1.39), (7, 1.49)])
def test_a_published_ceiling(devices, published):
    """51% of the bytes outside the experts, top-10 (mesh-llm, issue 1236): at most 1.95x, and less on so many."""
    demand = demand_of(0.51)
    parts = [len(part) for part in np.array_split(np.arange(512), devices)]
    load = Fullest(*2 * [np.full(4, expected_fullest(parts, 512, 10))])
    assert ceiling(demand, MACHINE, devices, load) == pytest.approx(published, abs=0.02)
    assert ceiling(demand, MACHINE, devices) == pytest.approx(1 / (0.51 + 0.49 / devices), rel=1e-3)
    assert ceiling(demand, MACHINE, 10**6) == ceiling(demand, MACHINE, 10) == pytest.approx(1 / 0.559, rel=1e-3)
    slow = replace(MACHINE, bytes_per_second=1e15, expert_bytes_per_second=1e15, operations_per_second=1e6)
    assert ceiling(demand, slow, 10**6) == pytest.approx(1 / 0.559, rel=1e-3)  # of what is computed, too


def test_where_a_link_breaks_even():
    demand = demand_of(0.5)
    load = Fullest(*2 * [np.full(4, 6.0)])
    seconds = break_even(demand, MACHINE, 2, load, 0)
    one = estimate(demand, MACHINE)
    # An all-sum on a ring of two takes two steps of the latency.
    slower, faster = (estimate(demand, MACHINE, 2, Link(seconds * f / 2, 1e30), load) for f in (1.01, 0.99))
    assert faster.seconds < one.seconds < slower.seconds
    assert seconds == pytest.approx(4 * 1000 * (10 - 6) / 1e6 / 4)
