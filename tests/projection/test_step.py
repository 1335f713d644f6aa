"""The model of speed: identities that must hold, numbers by hand, and predictions stated before any comparison."""

from dataclasses import replace

import numpy as np
import pytest

from expert_parallel import place_experts
from expert_parallel.models.architecture import describe
from expert_parallel.models.configurations import load_configuration
from expert_parallel.projection.hardware import (
    M4_MAX_BYTES,
    M4_MAX_LAYER_SECONDS,
    M4_MAX_OPERATIONS,
    MACHINES,
    Machine,
)
from expert_parallel.projection.links import Link
from expert_parallel.projection.step import (
    Demand,
    Estimate,
    Fullest,
    estimate,
    even_load,
    fit_arithmetic,
    fullest_device,
    uniform_experts,
)


def one_token_bytes(demand: Demand, context: int = 0) -> float:
    """Bytes that one device alone reads for one token."""
    return demand.rest_bytes + demand.expert_bytes.sum() * demand.chosen + demand.cache_bytes(context)


def fit_machine(
    name: str, rows: list[tuple[Demand, int, float]], prompt: tuple[Demand, int, float] | None = None, source: str = ""
) -> Machine:
    """How the M4 Max's constants were found: bandwidth and cost per layer that explain one device's decoding.

    rows    (demand, context, tokens a second), at least two of different bytes
    prompt  (demand, tokens, prompt tokens a second), for operations_per_second
    """
    seconds = np.array([1 / speed for *_, speed in rows])
    moved = np.array([one_token_bytes(demand, context) for demand, context, _ in rows], dtype=float)
    layers = np.array([demand.num_layers for demand, *_ in rows], dtype=float)
    columns = np.stack([moved, layers], axis=1) / seconds[:, None]
    scale = columns.max(axis=0)
    solution, _, rank, _ = np.linalg.lstsq(columns / scale, np.ones(len(rows)), rcond=None)
    per_byte, per_layer = solution / scale
    if rank < 2 or per_byte <= 0 or per_layer < 0:
        raise ValueError(f"machine {name}: these {len(rows)} speeds do not fit bytes over bandwidth + a cost per layer")
    bandwidth = float(1 / per_byte)
    machine = Machine(name, bandwidth, bandwidth, float("inf"), float(per_layer), source=source)
    return machine if prompt is None else fit_arithmetic(machine, *prompt)


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


# --- fitting, and predictions stated beforehand -----------------------------------------------------


def test_fitting_finds_constants_again():
    truth = Machine("truth", 3e9, 3e9, 5e12, 2e-4)
    heavy = replace(DEMAND, rest_bytes=90_000_000)
    rows = [(d, 100, decode(demand=d, machine=truth, context=100).tokens_per_second) for d in (DEMAND, heavy)]
    prompt = (DEMAND, 512, read(512, machine=truth).tokens_per_second)
    found = fit_machine("found", rows, prompt)
    assert found.bytes_per_second == pytest.approx(3e9)
    assert found.layer_seconds == pytest.approx(2e-4)
    assert found.operations_per_second == pytest.approx(5e12)
    load = Fullest(np.full(4, 16.0), np.full(4, 1e4))
    loaded = estimate(DEMAND, truth, load=load, tokens=512).tokens_per_second
    assert fit_arithmetic(truth, DEMAND, 512, loaded, load).operations_per_second == pytest.approx(5e12)
    with pytest.raises(ValueError, match="no time is left"):
        fit_arithmetic(truth, DEMAND, 512, 1e9)
    with pytest.raises(ValueError, match="do not fit"):
        fit_machine("same", [rows[0], rows[0]])
    with pytest.raises(ValueError, match="do not fit"):  # more bytes in less time
        fit_machine("odd", [(DEMAND, 0, 10.0), (heavy, 0, 20.0)])


@pytest.fixture(scope="module")
def qwen():
    """Qwen3-30B-A3B has the geometry of Qwen3-Coder-30B."""
    configuration = load_configuration("qwen3-coder-30b")
    return {bits: describe(configuration, bits=bits).demand for bits in (3, 4, 5, 6, 8, 16)}


CONTEXT = 2048 + 64  # mlx_lm.benchmark -p 2048 -g 128, at the middle of the answer


def test_the_m4_max_constants_are_what_the_published_rows_give(qwen):
    fitted = fit_machine(
        "M4 Max", [(qwen[4], CONTEXT, 113.33), (qwen[8], CONTEXT, 83.16)], prompt=(qwen[4], 2048, 1753.9)
    )
    assert fitted.bytes_per_second == pytest.approx(M4_MAX_BYTES, rel=1e-3)
    assert fitted.layer_seconds == pytest.approx(M4_MAX_LAYER_SECONDS, rel=1e-3)
    assert fitted.operations_per_second == pytest.approx(M4_MAX_OPERATIONS, rel=1e-3)
    assert fitted.bytes_per_second < 546e9  # not more than the hardware has


@pytest.mark.parametrize(
    ("bits", "tokens_per_second"), [(3, 124.6), (4, 113.3), (5, 103.9), (6, 95.9), (8, 83.2), (16, 55.4)]
)
def test_predictions_for_other_quantisations_on_the_m4_max(qwen, bits, tokens_per_second):
    """4 and 8 bits were fitted; 3, 5, 6 and 16 are predictions written down before any comparison."""
    predicted = estimate(qwen[bits], MACHINES["m4-max"], context=CONTEXT).tokens_per_second
    assert predicted == pytest.approx(tokens_per_second, rel=0.005)


def test_prompt_speed_hardly_depends_on_bits(qwen):
    """Arithmetic, not bandwidth: published 1753.9 at 4 bits (fitted) and 1719.5 at 8 (predicted)."""
    predicted = estimate(qwen[8], MACHINES["m4-max"], tokens=2048).tokens_per_second
    assert predicted == pytest.approx(1719.5, rel=0.05)


def test_the_model_of_another_architecture_holds_for_prompts():
    """mlx-lm pull request 406: gpt-oss-20b at 4 bits on an M4 Max read 2048 tokens at 1588.7 a second."""
    demand = describe(load_configuration("gpt-oss-20b"), bits=4).demand
    predicted = estimate(demand, MACHINES["m4-max"], tokens=2048).tokens_per_second
    assert predicted == pytest.approx(1588.7, rel=0.2)
