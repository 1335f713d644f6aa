"""What benchmarks/overlap.py models, held against schedules that are followed event by event."""

import importlib

import pytest
from conftest import ROOT

from expert_parallel.projection.hardware import LINKS, MACHINES
from expert_parallel.projection.step import estimate


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("overlap")


def followed(compute, collective, layers):
    """Seconds until the last sum has ended; a rank computes the halves by turns, a link carries one sum at a time."""
    rank = link = 0.0
    ended = {"A": 0.0, "B": 0.0}
    for _ in range(layers):
        for half in "AB":
            rank = max(rank, ended[half]) + compute
            link = ended[half] = max(link, rank) + collective
    return link


def test_other_links_are_foretold_from_the_first(benchmark):
    """Of 4 layers 3 sum: 1.2 s of computing beside 30 ms of sums; over the other link 100 ms each, a half's 60."""
    first, other = (0, float("inf")), (5, 10.0)
    seconds = {(first, 64, False): [1.5, 1.23, 1.4], (other, 64, False): [9.0]}
    sums = {(first, 64): 0.01, (first, 32): 0.005, (other, 64): 0.1, (other, 32): 0.06}
    found = benchmark.modelled(seconds, sums, first, 4)
    assert found[first, 64] == pytest.approx(1.23 / followed(0.2, 0.005, 3))
    assert found[other, 64] == pytest.approx(1.5 / followed(0.2, 0.06, 3))


def test_machines_elsewhere_follow_the_model_of_a_step(benchmark):
    demand = benchmark.describe(benchmark.load_configuration("qwen3-coder-30b")).demand
    rows = benchmark.elsewhere()
    assert len(rows) == len(benchmark.ELSEWHERE) * len(benchmark.PROMPTS)
    for machine, link in benchmark.ELSEWHERE:
        (found,) = [ratio for name, T, ratio in rows if T == 512 and machine in name and link in name]
        one, two = (estimate(demand, MACHINES[machine], 2, LINKS[link][0], tokens=T) for T in (512, 256))
        halves = followed((two.fixed + two.rest + two.experts) / 48, (two.latency + two.transfer) / 48, 48)
        assert found == pytest.approx(one.seconds / halves)


def test_links_are_read_as_they_are_written(benchmark):
    assert benchmark.link_of("5:125") == (5, 125) and benchmark.link_of("0") == (0, float("inf"))
