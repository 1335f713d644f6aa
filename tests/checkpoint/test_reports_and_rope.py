"""By hand: what is said while a checkpoint is read, and whether its positions turn as its configuration says."""

import types

import mlx.core as mx
import mlx.nn as nn
import pytest

from expert_parallel.checkpoint import loading
from expert_parallel.checkpoint.loading import ReadReport, activation_dtype
from expert_parallel.checkpoint.opened import _check_rope


def test_bytes_and_seconds_add_up_and_progress_hears_of_each(monkeypatch):
    """Begun at 10 s; more than all, where a layer is read that was to be shared, is shown as all."""
    clock, heard = iter([10.0, 11.5, 13.0, 17.0]), []
    monkeypatch.setattr(loading, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    report = ReadReport(lambda done, total: heard.append((done, total)), total=100, began=next(clock))
    for more, seconds in (({"experts": 30}, 1.5), ({"rest": 50}, 3.0), ({"experts": 20, "rest": 7}, 7.0)):
        report.add(**more)
        assert report.seconds == seconds
    assert (report.bytes_read_experts, report.bytes_read_rest) == (50, 57)
    assert heard == [(30, 100), (80, 100), (100, 100)]
    quiet = ReadReport()
    assert (quiet.total, quiet.bytes_read_experts, quiet.bytes_read_rest, quiet.seconds) == (0, 0, 0, 0.0)


@pytest.mark.parametrize(
    ("asked", "on_the_cpu", "on_a_gpu"),
    [(None, mx.float32, None), ("keep", None, None), ("bfloat16", mx.bfloat16, mx.bfloat16),
     (mx.float16, mx.float16, mx.float16)],
)  # fmt: skip
def test_what_activations_are_computed_in(asked, on_the_cpu, on_a_gpu, monkeypatch):
    for device, dtype in ((mx.cpu, on_the_cpu), (mx.gpu, on_a_gpu)):
        monkeypatch.setattr(mx, "default_device", lambda device=device: mx.Device(device))
        assert activation_dtype(asked) == dtype
    with pytest.raises(ValueError, match="dtype is float32, bfloat16, float16 or keep, got 'int8'"):
        activation_dtype("int8")


class Yarn(nn.Module):
    base = 10000.0


def said(theta=None, kind=None, **more):
    fields = {name: value for name, value in (("rope_theta", theta), ("rope_type", kind)) if value}
    return {"rope_parameters": {**fields, **more}}


FULL_AND_SLIDING = {"rope_parameters": {"full": {"rope_theta": 1e6}, "sliding": {"rope_theta": 10000.0}}}


@pytest.mark.parametrize(
    ("config", "turns", "wrong"),
    [
        ({}, [nn.RoPE(8)], None),
        ({"rope_parameters": None, "text_config": None}, [nn.RoPE(8)], None),
        (said(10000.0), [nn.RoPE(8)], None),
        (said(10000), [nn.RoPE(8), nn.RoPE(8, base=5.0)], None),  # one of them is enough
        (said(1e6), [nn.RoPE(8)], r"rope_theta \[1000000.0\], not \[10000.0\] .* reads rope_theta at top level"),
        (said(1e6), [], None),  # a model that does not turn
        (FULL_AND_SLIDING, [nn.RoPE(8)], None),
        (FULL_AND_SLIDING, [nn.RoPE(8, base=7.0)], r"rope_theta \[10000.0, 1000000.0\], not \[7.0\]"),
        ({"text_config": said(1e6)}, [nn.RoPE(8)], r"rope_theta \[1000000.0\]"),
        ({**said(10000.0), "text_config": said(10000.0)}, [nn.RoPE(8)], None),
        (said(10000.0, "default"), [nn.RoPE(8)], None),
        (said(10000.0, "yarn"), [Yarn()], None),
        (said(10000.0, "yarn"), [Yarn(), nn.RoPE(8)], None),
        (said(10000.0, "yarn"), [nn.RoPE(8)], "rope_type yarn, not plain .* reads rope_scaling at top level"),
        (said(None, "yarn"), [nn.RoPE(8)], "rope_type yarn, not plain"),
        (said(None, "yarn"), [], None),
    ],
)
def test_positions_turn_as_the_configuration_says(config, turns, wrong):
    model = nn.Module()
    model.layers = turns
    if wrong is None:
        _check_rope(model, config, "here")
        return
    with pytest.raises(ValueError, match=f"^here: its rope_parameters say {wrong}"):
        _check_rope(model, config, "here")
