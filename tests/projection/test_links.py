import numpy as np
import pytest

from expert_parallel.projection.links import (
    Link,
    bytes_per_token,
    fit_link,
    ring_traffic,
    traffic_matrix,
)


def test_the_original_writeups_16_kb_are_32_kib_gathered_and_4_kib_reduced():
    assert bytes_per_token(2048, 8, 1, combine="gather") == 32 * 1024
    assert bytes_per_token(2048, 8, 1, combine="reduce") == 4 * 1024
    assert bytes_per_token(2048, 8, 48, combine="gather") == 1_572_864
    assert bytes_per_token(2048, 8, 48, combine="reduce") == 196_608
    assert bytes_per_token(2048, 8, 1, value_bytes=4, combine="reduce") == 8 * 1024  # float32, the CPU


def test_ring_traffic_by_hand():
    assert ring_traffic(1000, 1) == 0
    assert ring_traffic(1000, 2) == 1000
    assert ring_traffic(1000, 4) == 1500
    assert ring_traffic(1000, 8) == 1750


def test_traffic_matrix_by_hand():
    """Experts 0,1 on device 0; 2,3 on device 1. Token 0 lives on 0, token 1 on 1."""
    held = np.array([[[1, 1, 0, 0], [0, 0, 1, 1]]], dtype=bool)
    experts = np.array([[[2, 3]], [[1, 2]]])
    once = traffic_matrix(experts, held, hidden=10)
    assert once.tolist() == [[[0, 20], [20, 0]]]
    # Both tokens on device 0: nothing leaves device 1.
    assert traffic_matrix(experts, held, hidden=10, home=[0, 0]).tolist() == [[[0, 40], [0, 0]]]


def test_a_copy_at_home_costs_no_traffic():
    held = np.ones((1, 3, 4), dtype=bool)
    experts = np.array([[[0, 1]], [[2, 3]], [[1, 2]]])
    assert traffic_matrix(experts, held, hidden=10).sum() == 0


def test_copies_take_turns():
    held = np.array([[[1, 0], [0, 1], [0, 1]]], dtype=bool)  # expert 1 on devices 1 and 2
    experts = np.full((4, 1, 1), 1)
    matrix = traffic_matrix(experts, held, hidden=1, value_bytes=1, home=[0] * 4)[0]
    assert matrix[0].tolist() == [0, 2, 2]


def test_times_of_a_collective_by_hand():
    ring = Link(1e-3, 1e6)
    assert ring.all_sum_time(4000, 1) == 0
    assert ring.all_sum_time(4000, 2) == pytest.approx(2e-3 + 4e-3)
    assert ring.all_sum_time(4000, 4) == pytest.approx(6e-3 + 6e-3)
    assert Link(1e-3, 1e6, "tree").all_sum_time(4000, 4) == pytest.approx(4e-3 + 16e-3)
    assert Link(1e-3, 1e6, "mesh").all_sum_time(4000, 4) == pytest.approx(1e-3 + 12e-3)
    assert Link(1e-3, 1e6, "switch").all_sum_time(4000, 4) == pytest.approx(1e-3 + 6e-3)
    auto = Link(1e-3, 1e6, "auto")
    assert auto.all_sum_time(100, 4) == pytest.approx(1e-3 + 0.3e-3)  # as the mesh
    assert auto.all_sum_time(40_000, 4) == pytest.approx(6e-3 + 60e-3)  # as the ring
    assert ring.all_to_all_time([[0, 3000], [1000, 0]]) == pytest.approx(1e-3 + 3e-3)


@pytest.mark.parametrize("algorithm", ["ring", "tree", "mesh", "switch"])
@pytest.mark.parametrize("num_devices", [2, 3, 8])
def test_fitting_a_link_finds_it_again(algorithm, num_devices):
    truth = Link(50e-6, 1.25e9, algorithm)
    payloads = [4096, 65536, 1 << 20, 1 << 24]
    found = fit_link(payloads, [truth.all_sum_time(p, num_devices) for p in payloads], num_devices, algorithm)
    assert found.latency_seconds == pytest.approx(50e-6, rel=1e-6)
    assert found.bytes_per_second == pytest.approx(1.25e9, rel=1e-6)


def test_a_noisy_fit_stays_a_link():
    found = fit_link([4096, 8192, 1 << 20], [9e-4, 2e-4, 5e-4], 2)
    assert found.latency_seconds >= 0 and found.bytes_per_second > 0
