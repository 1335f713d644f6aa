"""Balance metrics against numbers worked out by hand and against the published examples."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from expert_parallel import Placement, balancedness, place_experts
from expert_parallel.balance import (
    balancedness_per_layer,
    coefficient_of_variation,
    fan_out,
    imbalance_ratio,
    min_max_ratio,
    routing_entropy,
)
from expert_parallel.placing.copies import lower_bound
from expert_parallel.serving import devices_of_trace
from expert_parallel.study.scenarios import hot_experts, tokens_until_hot

# EPLB's README: loads of 2 layers x 12 experts and where its 16 copies go, two to each of 8 GPUs.
EPLB_WEIGHT = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
EPLB_PHY2LOG = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]

# Two layers on four devices. Means 25 and 10, maxima 40 and 10.
UNEVEN = [[40, 30, 20, 10], [10, 10, 10, 10]]


def test_balancedness_of_uneven_loads():
    assert balancedness_per_layer(UNEVEN) == pytest.approx([25 / 40, 1], abs=1e-6)
    assert balancedness(UNEVEN) == pytest.approx((25 / 40 + 1) / 2, abs=1e-6)
    assert balancedness(UNEVEN, average="aggregate") == pytest.approx((25 + 10) / (40 + 10))
    assert balancedness(UNEVEN) != pytest.approx(balancedness(UNEVEN, average="aggregate"), abs=0.01)


def test_balancedness_reduces_over_devices():
    """vLLM once logged 0.517 where 0.876 was right: it took the maximum over layers, not devices."""
    one_does_it_all = [[100, 0, 0, 0], [100, 0, 0, 0]]
    assert balancedness(one_does_it_all) == pytest.approx(0.25, abs=1e-6)
    assert balancedness(one_does_it_all, average="aggregate") == pytest.approx(0.25)


def test_the_other_metrics_of_uneven_loads():
    assert imbalance_ratio(UNEVEN) == pytest.approx([0.6, 0])
    # Deviations 15, 5, -5, -15: variance (225 + 25 + 25 + 225) / 4 = 125.
    assert coefficient_of_variation(UNEVEN) == pytest.approx([math.sqrt(125) / 25, 0])
    assert min_max_ratio(UNEVEN) == pytest.approx([0.25, 1])


def test_a_layer_without_load_is_even_and_no_load_at_all_has_no_balance():
    nothing = [[0, 0, 0]]
    assert math.isnan(balancedness(nothing)) and math.isnan(balancedness(nothing, average="aggregate"))
    assert balancedness([[0, 0, 0], [1, 1, 1]]) == 1
    assert imbalance_ratio(nothing).tolist() == coefficient_of_variation(nothing).tolist() == [0]
    assert min_max_ratio(nothing).tolist() == [1]
    assert routing_entropy(nothing).tolist() == [0]


def test_the_published_eplb_example():
    held = np.zeros((2, 8, 12), dtype=bool)
    for layer, experts in enumerate(EPLB_PHY2LOG):
        held[layer, np.arange(16) // 2, experts] = True
    placement = Placement(held)
    assert placement.copies.tolist() == [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]]
    loads = placement.device_loads(EPLB_WEIGHT)
    # GPU 0 of layer 0: half of expert 5 and expert 6.
    assert loads[0, 0] == 165 / 2 + 39
    assert balancedness_per_layer(loads) == pytest.approx([0.828, 0.805], abs=5e-4)


def test_routing_entropy_by_hand():
    # Shares 1/2, 1/4, 1/4, 0: 1.5 bits of 2.
    assert routing_entropy([[2, 1, 1, 0], [1, 1, 1, 1], [7, 0, 0, 0]]) == pytest.approx([0.75, 1, 0])
    assert routing_entropy([[5]]) == 1
    assert not np.signbit(routing_entropy([[7, 0], [0, 0]])).any()  # no "-0.000" in a table


def test_fan_out_by_hand():
    placement = place_experts(np.ones((2, 6)), 3)  # 0 1 | 2 3 | 4 5
    experts = [[[0, 1], [0, 2]], [[0, 5], [4, 5]]]  # token, layer
    # Layer 0: devices {0} and {0, 2}; layer 1: {0, 1} and {2}.
    assert fan_out(devices_of_trace(experts, placement.held)).tolist() == [1.5, 1.5]
    assert fan_out(np.zeros((0, 2, 3), dtype=int)).tolist() == [0, 0]
    # Three tokens of one layer: on 1, 3 and 2 devices.
    assert fan_out(np.array([[[4, 4, 4]], [[2, 0, 1]], [[5, 0, 5]]])).tolist() == [2]


def test_lower_bound_by_hand():
    loads = [[60, 20, 10, 10], [25, 25, 25, 25]]
    assert lower_bound(loads, 2).tolist() == [60, 50]  # the hot expert; the mean
    assert lower_bound(loads, 4, redundant=1).tolist() == [30, 25]
    assert lower_bound(loads, 4, redundant=2).tolist() == [25, 25]  # 60/3 = 20 < the mean
    # Never more copies than devices: at 3 copies on 3 devices the rest goes elsewhere.
    assert lower_bound([[90, 3]], 3, redundant=5).tolist() == [31]


def test_hot_experts_by_hand():
    # Four times the mean is 100 and 90: 140 - 3 x 11.8 = 104.5 is over it, 120 - 3 x 11.0 = 87.1 is not.
    loads = np.full((2, 8), 60 / 7)
    loads[:, 3] = [140, 120]
    assert hot_experts(loads).nonzero()[0].tolist() == [0]
    assert hot_experts(loads).nonzero()[1].tolist() == [3]
    assert hot_experts(loads, sigmas=0)[1, 3]
    assert not hot_experts([[4, 0, 0, 0, 0, 0, 0, 0]], factor=4).any()  # four tokens prove nothing


def test_tokens_until_an_expert_is_seen_to_be_hot():
    """Top-1 of 100, always expert 7: n - 3 sqrt(n) > 0.04 n first holds at n = 10 (10 - 9.49 = 0.51 > 0.4)."""
    assert tokens_until_hot(np.full((50, 1), 7), 7, 100) == 10
    assert tokens_until_hot(np.full((9, 1), 7), 7, 100) is None
    assert tokens_until_hot(np.full((50, 1), 7), 6, 100) is None


@given(arrays(np.int64, (2, 12), elements=st.integers(0, 1000)), st.integers(1, 12))
@settings(max_examples=100)
def test_metrics_keep_their_bounds(loads, num_devices):
    assume(loads.any())
    placement = place_experts(loads, num_devices)
    device_loads = placement.device_loads(loads)
    assert device_loads.sum(axis=1) == pytest.approx(loads.sum(axis=1))
    assert (device_loads.max(axis=1) >= lower_bound(loads, num_devices) - 1e-9).all()
    for average in ("layers", "aggregate"):
        assert 1 / num_devices - 1e-6 <= balancedness(device_loads, average) <= 1 + 1e-12
    # balancedness and imbalance ratio say the same thing in two ways
    busy = loads.sum(axis=1) > 0
    expected = 1 / (1 + imbalance_ratio(device_loads))
    assert balancedness_per_layer(device_loads)[busy] == pytest.approx(expected[busy], abs=1e-4)


@pytest.mark.parametrize(
    ("loads", "message"),
    [
        ([1, 2], r"\[layers, experts\]"),
        (np.zeros((2, 0)), r"\[layers, experts\]"),
        ([[1, -1]], "layer 0: expert 1 has load -1.0"),
        ([[1, 1], [np.nan, 1]], "layer 1: expert 0 has load nan"),
    ],
)
@pytest.mark.parametrize("metric", [balancedness, imbalance_ratio, coefficient_of_variation, routing_entropy])
def test_loads_that_are_none(metric, loads, message):
    with pytest.raises(ValueError, match=message):
        metric(loads)


def test_an_average_that_does_not_exist():
    with pytest.raises(ValueError, match="'mean'"):
        balancedness([[1, 2]], average="mean")
