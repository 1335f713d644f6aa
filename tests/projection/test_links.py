import math

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
    assert traffic_matrix(experts, held, hidden=10, value_bytes=4).tolist() == [[[0, 40], [40, 0]]]
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


@pytest.mark.parametrize(
    ("algorithm", "devices", "latency", "transfer"),
    [
        ("ring", 2, 2e-3, 4e-3),
        ("ring", 4, 6e-3, 6e-3),
        ("tree", 4, 4e-3, 16e-3),
        ("tree", 5, 6e-3, 24e-3),  # a third level
        ("mesh", 4, 1e-3, 12e-3),
        ("switch", 4, 1e-3, 6e-3),
        *((algorithm, 1, 0, 0) for algorithm in ("ring", "tree", "mesh", "switch", "auto")),
    ],
)
def test_times_of_a_collective_by_hand(algorithm, devices, latency, transfer):
    """Steps of 1 ms and 1 MB/s, an all-sum of 4,000 bytes."""
    assert Link(1e-3, 1e6, algorithm).all_sum_parts(4000, devices) == pytest.approx((latency, transfer))


@pytest.mark.parametrize(
    ("payload", "ports", "as_the"),
    [
        (100, math.inf, "mesh"),
        (2500, math.inf, "mesh"),  # 1 + 7.5 ms beside 6 + 3.75
        (4000, math.inf, "ring"),  # 1 + 12 ms beside 6 + 6
        (100, 3, "mesh"),
        (100, 2, "ring"),
    ],  # last, a port is missing
)
def test_auto_takes_the_faster_of_what_can_be_wired(payload, ports, as_the):
    auto = Link(1e-3, 1e6, "auto", ports)
    assert auto.all_sum_parts(payload, 4) == Link(1e-3, 1e6, as_the).all_sum_parts(payload, 4)


def test_time_of_an_all_to_all_by_hand():
    traffic = np.array([[0, 3000, 500], [1000, 0, 0], [0, 2000, 0]])
    assert Link(1e-3, 1e6).all_to_all_time(traffic) == pytest.approx(2e-3 + 5e-3)  # into device 1
    assert Link(1e-3, 1e6).all_to_all_time(traffic.T) == pytest.approx(2e-3 + 5e-3)  # out of it


def test_how_many_devices_a_link_connects():
    most = {name: Link(0, 1, name, ports=7).most_devices for name in ("mesh", "switch", "ring", "tree", "auto")}
    assert most == {"mesh": 8, "switch": 8, "ring": math.inf, "tree": math.inf, "auto": math.inf}
    assert Link(0, 1, "mesh").most_devices == math.inf


@pytest.mark.parametrize("algorithm", ["ring", "tree", "mesh", "switch"])
@pytest.mark.parametrize("num_devices", [2, 3, 8])
def test_fitting_a_link_finds_it_again(algorithm, num_devices):
    truth = Link(50e-6, 1.25e9, algorithm)
    payloads = [4096, 65536, 1 << 20, 1 << 24]
    found = fit_link(payloads, [sum(truth.all_sum_parts(p, num_devices)) for p in payloads], num_devices, algorithm)
    assert found.latency_seconds == pytest.approx(50e-6, rel=1e-6)
    assert found.bytes_per_second == pytest.approx(1.25e9, rel=1e-6)


def test_a_noisy_fit_stays_a_link():
    """Neither term gets negative: bandwidth where more takes less, latency where the line starts below 0."""
    falling = fit_link([4096, 8192, 1 << 20], [9e-4, 1e-4, 5e-4], 2)  # larger payloads took less
    assert falling.bytes_per_second == pytest.approx((2**20 - 4096) / (1e-3 * 5e-4))
    assert falling.latency_seconds == pytest.approx((9e-4 - 4096 / falling.bytes_per_second) / 2)
    steep = fit_link([1000, 100_000], [1e-6, 1e-3], 2)  # the line would start below 0
    assert steep.bytes_per_second == pytest.approx(99_000 / 999e-6)
    assert steep.latency_seconds == 0
