"""Traces of other programs: read, cut, and refused with the line that is wrong."""

import resource
import time

import numpy as np
import pytest

from expert_parallel import RoutingTrace, balancedness, place_experts
from expert_parallel.balance import fan_out
from expert_parallel.study.traces import (
    fit_and_test,
    from_arrays,
    read_trace,
    warm_up_rows,
    without_warm_up,
)


def choices(num_tokens, num_layers, top_k, num_experts=16, seed=0):
    scores = np.random.default_rng(seed).random((num_tokens, num_layers, num_experts))
    return scores.argsort(axis=2)[..., :top_k].astype(np.uint16)


def test_vllm_arrays_of_two_requests():
    one, two = choices(5, 2, 3, seed=1), choices(4, 2, 3, seed=2)
    trace = from_arrays([one, two], num_experts=16, prompt_tokens=[3, 1])
    assert np.array_equal(trace.experts, np.concatenate([one, two]))
    assert trace.prefill.tolist() == [True] * 3 + [False] * 2 + [True] + [False] * 3


def test_layers_that_were_left_blank():
    experts = choices(6, 3, 2)
    experts[:, 0] = 0  # a dense layer in a buffer for all layers
    trace = from_arrays([experts], num_experts=16)
    assert np.array_equal(trace.experts, experts[:, 1:])
    assert trace.metadata["blank_layers"] == [0]
    with pytest.raises(ValueError, match="nothing was recorded"):
        from_arrays([np.zeros((4, 2, 2), dtype=int)])


def test_arrays_in_files(tmp_path):
    experts = choices(9, 2, 3)
    np.save(tmp_path / "one.npy", experts)
    np.savez(tmp_path / "several.npz", a=experts[:4], b=experts[4:])
    RoutingTrace(experts, 16, model="m").save(tmp_path / "own.npz")
    for name in ("one.npy", "several.npz", "own.npz"):
        assert np.array_equal(read_trace(tmp_path / name, 16).experts, experts)


def test_files_that_are_no_trace(tmp_path):
    np.save(tmp_path / "flat.npy", np.arange(4))
    np.save(tmp_path / "real.npy", np.zeros((2, 2, 2)))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 not really")
    RoutingTrace(choices(3, 1, 2), 16).save(tmp_path / "own.npz")
    for name, message in [
        ("flat.npy", r"\[tokens, layers, k\], got int64 \[4\]"),
        ("real.npy", "expected integers"),
        ("broken.npz", "cannot read"),
        ("absent.npz", "cannot read"),
        ("trace.txt", "cannot read"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            read_trace(tmp_path / name)
        assert name in str(error.value)
    with pytest.raises(ValueError, match="of 16 experts, not 128"):
        read_trace(tmp_path / "own.npz", 128)
    with pytest.raises(ValueError, match="arrays of different models"):
        from_arrays([choices(3, 1, 2), choices(3, 2, 2)])
    with pytest.raises(ValueError, match="expert 15 does not exist|does not exist"):
        from_arrays([choices(50, 1, 2)], num_experts=8)


# --- warm-up ----------------------------------------------------------------------------------------


def test_warm_up_is_found_and_distorts():
    real = choices(3000, 2, 4)
    blank = np.tile(real[:1], (1500, 1, 1))
    blank[::2] = blank[::2, :, ::-1]  # the same experts in another order
    trace = RoutingTrace(np.concatenate([blank, real[1:]]), 16)
    assert warm_up_rows(trace).sum() == 1500
    clean = without_warm_up(trace)
    assert np.array_equal(clean.experts, real[1:])
    assert clean.metadata["warm_up_rows"] == 1500
    placement = place_experts(clean.loads(), 4)
    with_it, without = (balancedness(placement.device_loads(t.loads())) for t in (trace, clean))
    assert without > 0.95 and with_it < without - 0.1


def test_warm_up_of_each_rank():
    parts = [choices(40, 2, 4, seed=s) for s in (1, 2)]
    parts = [np.concatenate([np.tile(part[:1], (20 + 10 * n, 1, 1)), part[1:]]) for n, part in enumerate(parts)]
    trace = from_arrays(parts, num_experts=16)
    assert np.flatnonzero(np.diff(warm_up_rows(trace).astype(int))).tolist() == [19, 58, 88]
    assert len(without_warm_up(trace)) == 2 * 39


def test_warm_up_in_the_middle_but_not_in_text_or_in_short_runs():
    trace = RoutingTrace(choices(200, 2, 4), 16)
    assert not warm_up_rows(trace).any()
    assert without_warm_up(trace) is trace
    repeated = np.concatenate([np.tile(trace.experts[:1], (15, 1, 1)), trace.experts[1:]])
    assert not warm_up_rows(RoutingTrace(repeated, 16)).any()
    later = np.concatenate([trace.experts[:50], np.tile(trace.experts[:1], (40, 1, 1)), trace.experts[50:]])
    assert np.flatnonzero(warm_up_rows(RoutingTrace(later, 16))).tolist() == list(range(50, 90))
    only = RoutingTrace(np.tile(trace.experts[:1], (9000, 1, 1)), 16)
    assert warm_up_rows(only).all()


def test_fit_and_test_parts():
    trace = RoutingTrace(choices(10, 1, 2), 16)
    fit, test = fit_and_test(trace, 0.7)
    assert np.array_equal(np.concatenate([fit.experts, test.experts]), trace.experts)
    assert len(fit) == 7
    for share in (0, 1, 0.01):
        with pytest.raises(ValueError, match="both parts need tokens"):
            fit_and_test(trace, share)


def test_a_long_trace_in_bounded_time_and_memory():
    """A tenth of a million tokens x 48 layers x 8; measured for the whole million: 6 s and 1.2 GB."""
    experts = np.random.default_rng(0).integers(0, 128, (100_000, 48, 8), dtype=np.uint16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    trace = without_warm_up(RoutingTrace(experts, 128))
    placement = place_experts(trace.loads(), 8)
    assert balancedness(placement.device_loads(trace.loads())) > 0.99
    # Eight independent picks on eight devices: 8 (1 - (7/8)^8) of them are touched.
    assert fan_out(trace.experts, placement.held) == pytest.approx(np.full(48, 8 * (1 - (7 / 8) ** 8)), rel=0.01)
    assert time.process_time() - start < 15
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 500_000 * (1024 if grown > 1e9 else 1)  # kB on Linux, bytes on macOS


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_choice_that_is_frequent_is_no_warm_up(share):
    """Top-1 of one layer: the hot expert is chosen 16 times and more in a row by chance."""
    random = np.random.default_rng(0)
    experts = np.where(random.random(20_000) < share, 3, random.integers(0, 8, 20_000))
    assert not warm_up_rows(RoutingTrace(experts[:, None, None], 8)).any()
