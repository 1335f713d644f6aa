"""Measuring: figures of this program, not of whoever started it."""

import subprocess
import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, of_a_user, random_model

from expert_parallel import place_experts, shard_model
from expert_parallel.layers import moe_layers
from expert_parallel.report import measuring
from expert_parallel.report.measuring import count_collectives, resident_bytes, time_parts

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
    assert peak_of(GROW + PEAK) > small + 300e6  # and it sees what the program itself takes


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


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_where_there_is_no_proc_the_peak_is_in_the_systems_own_unit(platform, unit, monkeypatch, tmp_path):
    """getrusage gives kilobytes on Linux and bytes on macOS."""
    monkeypatch.setattr(measuring, "Path", lambda _: tmp_path / "nothing")
    monkeypatch.setattr(measuring.sys, "platform", platform)
    monkeypatch.setattr(measuring.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=5))
    assert resident_bytes() == {"now": 0, "peak": 5 * unit}


# --- a group of ranks, played -----------------------------------------------------------------------------------------


class Ranks:
    """Two ranks of which the other comes 2 s late to every meeting; a real collective then takes 3 s, others 1 s."""

    def __init__(self):
        self.now, self.asked = 0.0, []

    def size(self):
        return 2

    def perf_counter(self):
        return self.now

    def all_sum(self, x, group=None):
        self.now += 3 if x.size > 1 else 2
        self.asked.append((group, x.size))
        return x

    def all_gather(self, x, group=None):
        self.now += 1
        return x


@pytest.fixture
def ranks(monkeypatch):
    played = Ranks()
    for kind in measuring.COLLECTIVES:
        monkeypatch.setattr(mx.distributed, kind, getattr(played, kind))
    monkeypatch.setattr(measuring, "time", played)
    monkeypatch.setattr(measuring, "is_rank", lambda group: group is played)
    return played


def test_waiting_is_told_from_the_collective_itself(ranks):
    """In an empty all-sum of the same group just before each."""
    with time_parts(2, ranks) as seconds:
        mx.distributed.all_sum(mx.ones(8), group=ranks)
        mx.distributed.all_gather(mx.ones(8), group=ranks)
    assert ranks.asked == [(ranks, 1), (ranks, 8), (ranks, 1)]
    assert (seconds.waiting, seconds.collectives, seconds.total, seconds.tokens) == (4, 3 + 1, 8, 2)
    with time_parts(1) as alone:
        mx.distributed.all_sum(mx.ones(8))
    assert (alone.waiting, alone.collectives) == (0, 3)


def test_collectives_are_counted_by_kind_and_by_what_is_handed_in(ranks):
    with count_collectives() as counted:
        for values in (8, 2):
            mx.distributed.all_sum(mx.ones(values), group=ranks)
        mx.distributed.all_gather(mx.ones(3, dtype=mx.float16), group=ranks)
    assert counted == {"all_sum": [2, (8 + 2) * 4], "all_gather": [1, 3 * 2]}
    mx.distributed.all_sum(mx.ones(8))
    assert counted["all_sum"][0] == 2  # not after the block
