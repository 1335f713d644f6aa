"""Fitting the M4 Max on published rows, and predictions stated before any comparison."""

from dataclasses import replace

import numpy as np
import pytest
from test_step import DEMAND, decode, read

from expert_parallel.models.architecture import describe
from expert_parallel.models.configurations import load_configuration
from expert_parallel.projection.hardware import (
    M4_MAX_BYTES,
    M4_MAX_LAYER_SECONDS,
    M4_MAX_OPERATIONS,
    MACHINES,
    Machine,
)
from expert_parallel.projection.step import Demand, Fullest, estimate, fit_arithmetic


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
