"""Measuring: figures of this program, not of whoever started it."""

import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, of_a_user, random_model

from expert_parallel import place_experts, shard_model
from expert_parallel.layers import moe_layers
from expert_parallel.report.measuring import time_parts

PEAK = "from expert_parallel.report.measuring import resident_bytes as r; print(r()['peak'])"
GROW = "import numpy; block = numpy.ones(50_000_000)\n"  # 400 MB


def peak_of(code):
    command = [sys.executable, "-c", code]
    return int(subprocess.run(command, cwd=ROOT, env=of_a_user(), capture_output=True, text=True, check=True).stdout)


def test_peak_memory_is_not_inherited_from_a_large_launcher():
    """Linux hands ru_maxrss down: a report of 107 MB was once read as 646 because the launcher had that much."""
    ballast = bytearray(600_000_000)
    ballast[::4096] = b"1" * len(ballast[::4096])
    small = peak_of(PEAK)
    assert small < 300e6
    assert len(ballast) > small


def test_peak_memory_sees_what_the_program_itself_takes():
    assert peak_of(GROW + PEAK) > peak_of(PEAK) + 300e6


@pytest.mark.parametrize("slots", [0, 10**6], ids=["compact", "masked"])
def test_time_in_experts_is_counted_once(slots):
    """Masked shards are called by the simulated devices: counted inside and outside they took 122% of the time."""
    model = shard_model(random_model(), place_experts(np.zeros((3, 16)), 4))
    for layer in moe_layers(model):
        layer.experts.masked_up_to = slots
    with time_parts(tokens=20) as seconds:
        for _ in range(20):
            mx.eval(model(mx.array([[1]])))
    assert seconds.tokens == 20
    assert not any(layer.experts.slots_served.any() for layer in moe_layers(model))  # these are none of the run's
    assert 0 < seconds.experts < seconds.total
