"""The model of speed: identities that must hold, and numbers by hand."""

from dataclasses import replace

import numpy as np
import pytest

from expert_parallel import place_experts
from expert_parallel.projection.hardware import (
    Machine,
)
from expert_parallel.projection.links import Link
from expert_parallel.projection.step import (
    Demand,
    Estimate,
    Fullest,
    estimate,
    even_load,
    fullest_device,
    seconds_in_halves,
    uniform_experts,
)

MACHINE = Machine("test", 1e9, 1e9, 1e12, 1e-3, kind="Metal")
DEMAND = Demand(
    num_layers=5,
    hidden=100,
    chosen=4,
    num_experts=16,
    expert_bytes=np.full(4, 1_000_000),
    expert_parameters=np.full(4, 2_000_000),
    rest_bytes=20_000_000,
    rest_parameters=40_000_000,
    cache_per_token=1000,
)
INSTANT = Link(0, 1e18)


def decode(devices=1, link=INSTANT, load=None, demand=DEMAND, machine=MACHINE, **more):
    return estimate(demand, machine, devices, link, load, **more)


def read(tokens, devices=1, link=INSTANT, demand=DEMAND, machine=MACHINE):
    return estimate(demand, machine, devices, link, tokens=tokens)


# --- by hand and identities -----------------------------------------------------------------------


def test_a_token_by_hand():
    """5 layers of 1 ms; 20 MB and 4 layers x 4 experts of 1 MB at 1 GB/s; 200 cached tokens of 1 kB."""
    step = decode(context=200)
    assert step.fixed == pytest.approx(5e-3)
    assert step.rest == pytest.approx(20.2e-3)
    assert step.experts == pytest.approx(16e-3)
    assert (step.latency, step.transfer) == (0, 0)
    assert step.tokens_per_second == pytest.approx(1 / 41.2e-3)
    assert step.bottleneck == "all but the experts"
    fast_cache = replace(MACHINE, cache_bytes_per_second=2e9)
    assert decode(context=200, machine=fast_cache).rest == pytest.approx(20.1e-3)
    slow_experts = replace(MACHINE, expert_bytes_per_second=1e8)
    assert decode(machine=slow_experts).experts == pytest.approx(160e-3)
    assert decode(context=200, batch=3).rest == pytest.approx(20.6e-3)


@pytest.mark.parametrize(
    ("largest", "words"),
    [
        ("fixed", "fixed cost per layer"),
        ("rest", "all but the experts"),
        ("experts", "experts"),
        ("latency", "latency of collectives"),
        ("transfer", "bandwidth of collectives"),
    ],
)
def test_what_takes_most_is_named(largest, words):
    parts = {**dict.fromkeys(("fixed", "rest", "experts", "latency", "transfer"), 1.0), largest: 2.0}
    step = Estimate(**parts, tokens=3)
    assert (step.bottleneck, step.seconds, step.tokens_per_second) == (words, 6.0, 0.5)


def test_layers_with_a_window_are_read_up_to_it():
    """Of 1 kB a token 400 bytes are of layers that keep 100 tokens."""
    windowed = replace(DEMAND, windows=((400, 100),))
    assert windowed.cache_bytes(100) == 100_000
    assert windowed.cache_bytes(1000) == 600 * 1000 + 400 * 100
    longer, shorter = (decode(demand=windowed, context=n).seconds for n in (2000, 1000))
    assert longer - shorter == pytest.approx(600 * 1000 / 1e9)


def test_four_devices_by_hand():
    """The fullest has 3, 1, 2, 2 of each layer's 4 experts; all-sums of 100 values of 2 bytes over a ring."""
    load = Fullest(np.array([3, 1, 2, 2.0]), np.array([3, 1, 2, 2.0]))
    step = decode(4, Link(1e-4, 1e6), load)
    assert step.experts == pytest.approx(8e-3)
    assert step.latency == pytest.approx(4 * 6 * 1e-4)
    assert step.transfer == pytest.approx(4 * 1.5 * 200 / 1e6)
    on_cpu = decode(4, Link(1e-4, 1e6), load, machine=replace(MACHINE, kind="CPU"))
    assert on_cpu.transfer == pytest.approx(2 * step.transfer)  # float32
    assert on_cpu.latency == step.latency


def test_one_device_is_the_case_without_collectives():
    slow = Link(1.0, 1.0)
    assert decode(1, slow).seconds == decode(1, None).seconds
    assert read(100, 1, slow).seconds == read(100, 1, None).seconds


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_perfect_balance_without_latency_is_amdahl(devices):
    """Only the experts shrink: 16 of 41 ms are sharded."""
    one, many = decode(), decode(devices)
    sharded = one.experts / one.seconds
    assert one.seconds / many.seconds == pytest.approx(1 / (1 - sharded + sharded / devices))


def test_more_latency_and_less_bandwidth_never_help():
    times = [decode(4, Link(latency, 1e9)).seconds for latency in (0, 1e-6, 1e-4, 1e-2)]
    assert times == sorted(times)
    assert len(set(times)) == 4
    times = [read(512, 4, Link(0, bandwidth)).seconds for bandwidth in (1e10, 1e8, 1e6)]
    assert times == sorted(times)


def test_imbalance_never_helps():
    uneven = Fullest(np.full(4, 3.0), np.full(4, 3.0))
    assert decode(4, load=uneven).seconds > decode(4).seconds
    assert even_load(DEMAND, 4).experts.tolist() == [1.0] * 4
    many = even_load(DEMAND, 4, batch=10)  # 10 slots a layer; the device has but 4 experts to read
    assert (many.experts.tolist(), many.slots.tolist()) == ([4.0] * 4, [10.0] * 4)


def test_a_prompt_by_arithmetic():
    """2 operations a parameter and token, at 1 TFLOP/s; reading the weights is faster than that."""
    step = read(1000)
    assert step.rest == pytest.approx(2 * 40e6 * 1000 / 1e12)
    assert step.experts == pytest.approx(4 * 2 * 2e6 * 4 * 1000 / 1e12)
    assert step.tokens == 1000
    attending = replace(DEMAND, attention=((64, None), (64, 10)))
    # scores and sums: 4 operations a value of the heads and token looked back on
    assert attending.attention_operations(0, 3) == 2 * 4 * 64 * (1 + 2 + 3)
    assert attending.attention_operations(100, 101) == 4 * 64 * (101 + 10)
    assert read(1000, demand=attending).rest - step.rest == pytest.approx(
        4 * 64 * (1000 * 1001 / 2 + 45 + 991 * 10) / 1e12
    )
    with_head = replace(DEMAND, head_parameters=10_000_000)
    assert read(1000, demand=with_head).rest == pytest.approx((2 * 30e6 * 1000 + 2 * 10e6) / 1e12)


def test_a_later_chunk_of_a_prompt_looks_back_on_those_before_it():
    idle = replace(MACHINE, operations_per_second=1e30)
    later = decode(tokens=2048, context=4096, machine=idle)
    assert later.rest == pytest.approx((20e6 + 4096 * 1000) / 1e9)
    assert (later.fixed, later.tokens) == (5e-3, 2048)
    attending = replace(DEMAND, attention=((64, None),))
    more = decode(tokens=2, context=10, demand=attending, machine=replace(MACHINE, operations_per_second=1e3)).rest
    assert more == pytest.approx((2 * 40e6 * 2 + 4 * 64 * (11 + 12)) / 1e3)
    two = read(3000, 2, Link(1e-4, 1e6, "switch"))
    assert two.latency == pytest.approx(4 * 1e-4)
    assert two.transfer == pytest.approx(4 * 3000 * 200 / 1e6)


def test_batches_read_weights_once():
    one, many = decode(), decode(batch=2)
    assert many.rest == one.rest
    assert many.tokens_per_second > one.tokens_per_second
    huge = decode(batch=10_000)
    assert huge.rest == pytest.approx(2 * 40e6 * 10_000 / 1e12)  # now arithmetic takes longer
    assert huge.tokens == 10_000
    with_head = replace(DEMAND, head_parameters=10_000_000, attention=((64, None),))  # every sequence wants its logits
    expected = (2 * 40e6 * 10_000 + 10_000 * 4 * 64 * 8) / 1e12
    assert decode(batch=10_000, demand=with_head, context=7).rest == pytest.approx(expected)


def test_hybrid_halves_the_rest_and_pays_an_all_sum_per_layer():
    link = Link(1e-5, 1e9)
    replicated = decode(2, link, context=100)
    hybrid = decode(2, link, context=100, rest_share=0.5)
    assert hybrid.rest == pytest.approx(replicated.rest / 2)
    assert hybrid.latency == pytest.approx(replicated.latency * (4 + 5) / 4)
    assert hybrid.transfer == pytest.approx(replicated.transfer * (4 + 5) / 4)
    assert (hybrid.experts, hybrid.fixed) == (replicated.experts, replicated.fixed)


# --- the fullest device ------------------------------------------------------------------------------


def test_fullest_device_by_hand():
    held = place_experts(np.ones((1, 4)), 2).held
    experts = np.array([[[0, 1]], [[0, 2]], [[2, 3]], [[2, 1]]])
    assert fullest_device(experts, held).slots.tolist() == [(2 + 1 + 2 + 1) / 4]
    pairs = fullest_device(experts, held, batch=2)  # steps {0,1,0,2} and {2,3,2,1}
    assert pairs.slots.tolist() == [3.0]
    assert pairs.experts.tolist() == [2.0]


def test_uniform_routing_over_two_devices_gives_5_06_of_8():
    """E max(x, 8 - x) with 64 of 128 experts on each device; 5.09 would be with replacement."""
    from math import comb

    exact = sum(comb(64, x) * comb(64, 8 - x) * max(x, 8 - x) for x in range(9)) / comb(128, 8)
    held = place_experts(np.ones((1, 128)), 2).held
    found = fullest_device(uniform_experts(20_000, 1, 128, 8), held).slots[0]
    assert exact == pytest.approx(5.059, abs=0.0005)
    assert found == pytest.approx(exact, abs=0.02)


def test_a_copy_relieves_the_fullest_device():
    held = np.zeros((1, 2, 4), dtype=bool)
    held[0, 0, :3] = held[0, 1, 3] = True
    experts = np.tile(np.array([[[0, 1]]]), (10, 1, 1))
    assert fullest_device(experts, held).experts.tolist() == [2.0]
    held[0, 1, 1] = True
    assert fullest_device(experts, held).experts.tolist() == [1.0]


def test_uniform_experts_are_different_ones_of_all():
    found = uniform_experts(500, 2, 16, 4)
    assert found.shape == (500, 2, 4)
    assert (np.diff(np.sort(found, axis=-1)) > 0).all()
    assert set(found.ravel()) == set(range(16))


def test_layers_that_gather_send_the_slots_of_a_token():
    """By hand: k times the payload for these layers alone, nothing where the rest is sharded too, nothing alone."""
    some = replace(DEMAND, gathers=1)
    link = Link(1e-5, 1e9)
    plain, gathered = (estimate(demand, MACHINE, 4, link) for demand in (DEMAND, some))
    payload = DEMAND.hidden * MACHINE.value_bytes
    more = (DEMAND.chosen - 1) * payload * 2 * 3 / 4 / 1e9  # a ring of four sends 2 (n - 1) / n of it
    assert gathered.transfer - plain.transfer == pytest.approx(more)
    assert gathered.latency == pytest.approx(plain.latency) and gathered.experts == plain.experts
    for how in ({"rest_share": 0.5}, {}):
        both = [estimate(demand, MACHINE, 4 if how else 1, link, **how) for demand in (DEMAND, some)]
        assert both[0] == both[1]


@pytest.mark.parametrize(("compute", "collective"), [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_halves_take_turns_as_one_follows_them(compute, collective, layers):
    """Event by event: a rank computes one half at a time, the link carries one sum at a time, each in order."""
    rank = link = 0.0
    summed = {"A": 0.0, "B": 0.0}
    for _ in range(layers):
        for half in "AB":
            rank = max(rank, summed[half]) + compute
            link = summed[half] = max(link, rank) + collective
    assert seconds_in_halves(compute, collective, layers) == pytest.approx(link)
