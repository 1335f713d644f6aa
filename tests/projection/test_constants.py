"""Constants of this machine, fitted on times that are given: the machine that would have taken them is found again."""

import json
import runpy
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import random_model
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from expert_parallel.projection import constants, link_probe
from expert_parallel.projection.step import Demand

L, E, K = 3, 8, 2  # layers, all of them MoE, experts, chosen
DEMAND = Demand(
    num_layers=L, hidden=64, chosen=K, num_experts=E, expert_bytes=np.full(L, 1_000_000),
    expert_parameters=np.full(L, 2_000_000), rest_bytes=30_000_000, rest_parameters=60_000_000, cache_per_token=768,
)  # fmt: skip
HEAD = 10_000_000  # bytes


def fitted(monkeypatch, tokens, without, head=0.02, prompt=10.0):
    """measure_machine where tokens take so many seconds each, with experts and without, the head and a prompt."""
    model, turns = random_model(num_experts=E, num_experts_per_tok=K), iter((tokens, without))

    def per_token(model, ids, rounds):
        assert (ids, rounds) == (constants.random_tokens(model, 2), 5)
        return np.array(next(turns))

    def of_prompt(model, ids, rounds, whole=False):
        assert ids == constants.random_tokens(model, 16, seed=1) and whole == (rounds > 1)
        mx.eval(model(mx.array([ids])))  # its routing is recorded
        return prompt

    def of_cache(model, demand, rounds):
        assert (demand, rounds) == (DEMAND, 5)
        return 7e9

    monkeypatch.setattr(constants, "seconds_per_token", per_token)
    monkeypatch.setattr(constants, "seconds_of_prompt", of_prompt)
    monkeypatch.setattr(constants, "head_seconds", lambda *_: head)
    monkeypatch.setattr(constants, "cache_speed", of_cache)
    return constants.measure_machine(model, DEMAND, HEAD, num_tokens=2, prompt_tokens=16, rounds=5)


def test_the_machine_is_what_the_times_leave(monkeypatch):
    """The head moves 0.5 GB/s; 30 MB of the rest take 60 of 90 ms; 6 MB of experts take 30 ms."""
    machine = fitted(monkeypatch, [0.11, 0.13], [0.08, 0.10])
    assert machine.bytes_per_second == pytest.approx(0.5e9)
    assert machine.layer_seconds == pytest.approx((0.09 - 0.06) / L)
    assert machine.expert_bytes_per_second == pytest.approx(L * K * 1e6 / 0.03)
    assert (machine.cache_bytes_per_second, machine.kind) == (7e9, "CPU")
    # 10 s of 16 tokens, less 30 ms of layers; 2 operations a parameter and token, 2 of 8 experts each
    operations = 2 * 16 * (60e6 + L * K * 2e6)
    assert machine.operations_per_second == pytest.approx(operations / (10 - 0.03), rel=1e-6)
    assert machine.source == "measured here with 3 layers, 3 of them MoE" and machine.name == "this machine"


@pytest.mark.parametrize(("metal", "kind"), [(True, "Metal"), (False, "CUDA")])
def test_a_gpu_is_apples_or_else_of_cuda(metal, kind, monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    assert fitted(monkeypatch, [0.11, 0.13], [0.08, 0.10]).kind == kind


def test_where_the_rest_moves_faster_than_the_head_it_counts(monkeypatch):
    machine = fitted(monkeypatch, [0.12, 0.12], [0.05, 0.05])
    assert machine.bytes_per_second == pytest.approx(30e6 / 0.05)
    assert machine.layer_seconds == 0


def test_a_busy_machine_is_not_fitted(monkeypatch):
    fitted(monkeypatch, [0.100, 0.100], [0.0979, 0.0979])
    with pytest.raises(ValueError, match="token took 100.0 ms, without its experts 98.1 ms"):
        fitted(monkeypatch, [0.100, 0.100], [0.0981, 0.0981])


class Clock:
    """perf_counter that advances by the given seconds between the first and second, third and fourth, ... call."""

    def __init__(self, *seconds):
        self.seconds, self.calls, self.now = seconds, 0, 0.0

    def perf_counter(self):
        if self.calls % 2:
            self.now += self.seconds[self.calls // 2]
        self.calls += 1
        return self.now


def test_the_shortest_of_the_rounds_counts_token_by_token(monkeypatch):
    clock = Clock(3, 1, 2, 5)  # two rounds of two tokens
    monkeypatch.setattr(constants, "time", clock)
    assert constants.seconds_per_token(random_model(), [1, 2], rounds=2).tolist() == [2, 1]
    assert clock.calls == 8
    monkeypatch.setattr(constants, "time", Clock(3, 1, 2))
    assert constants.seconds_of_prompt(random_model(), [1, 2, 3], rounds=3) == 1
    monkeypatch.setattr(constants, "time", Clock(6, 5, 4, 3, 2, 1, 0))
    assert constants.head_seconds(random_model(), 64) == 1


def test_a_cache_is_as_quick_as_a_longer_context_takes_longer(monkeypatch):
    """Two rounds with 1 token before, two with 1,000: 768 B a token in 1 s more."""
    monkeypatch.setattr(constants, "time", Clock(3, 2, 3, 4))
    assert constants.cache_speed(random_model(), DEMAND, tokens=1000, rounds=2) == 768 * 1000
    monkeypatch.setattr(constants, "time", Clock(3, 2, 2, 1))
    assert constants.cache_speed(random_model(), DEMAND, tokens=1000, rounds=2) == 0
    monkeypatch.setattr(constants, "time", Clock(3, 2, 2, 3))
    assert constants.cache_speed(random_model(), DEMAND, tokens=1000, rounds=2) == 0  # nothing to divide by
    mixed = [KVCache(), RotatingKVCache(8)]
    monkeypatch.setattr(constants, "make_prompt_cache", lambda model: mixed)
    assert constants.cache_speed(random_model(), DEMAND) == 0


def test_caches_are_filled_as_in_generation(monkeypatch):
    model = random_model()
    cache = make_prompt_cache(model)
    monkeypatch.setattr(constants, "make_prompt_cache", lambda model: cache)
    constants.seconds_after(model, 50)
    assert {entry.offset for entry in cache} == {1 + 50 + 2}  # what was there, the filling, two tokens
    constants.seconds_of_prompt(model, [1, 2, 3], rounds=1)
    assert {entry.offset for entry in cache} == {53 + 3}
    constants.seconds_per_token(model, [1, 2, 3, 4], context=2, rounds=1)
    assert {entry.offset for entry in cache} == {56 + 2 + 1 + 4}


@pytest.mark.parametrize("whole", [False, True])
def test_a_whole_prompt_goes_through_all_of_the_last_layer(whole, monkeypatch):
    model, asked = random_model(), []
    call = type(model.layers[-1]).__call__
    monkeypatch.setattr(constants, "seconds_of", lambda work: asked.append(work()) or 1)
    constants.seconds_of_prompt(model, [1, 2, 3], rounds=1, whole=whole)
    [(_, answers)] = asked
    assert type(model.layers[-1]).__call__ is call and len(answers) == whole
    if whole:
        assert mx.allclose(model.model.norm(answers[0]), model.model(mx.array([[1, 2, 3]])), atol=1e-5)


def test_random_tokens_are_alike_everywhere_and_of_the_vocabulary():
    model = random_model()
    ids = constants.random_tokens(model, 500)
    assert ids == constants.random_tokens(model, 500) != constants.random_tokens(model, 500, seed=1)
    vocabulary = model.args.vocab_size
    assert min(ids) >= 0 and vocabulary * 0.9 < max(ids) < vocabulary
    model.second_table = nn.Embedding(1000, 4)  # the larger one counts
    assert 900 < max(constants.random_tokens(model, 500)) < 1000


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_that_is_timed_is_the_models(tied, monkeypatch):
    """A layer of its own, or the embeddings where they serve as one: one token, and so as many logits."""
    model, seen = random_model(tie_word_embeddings=tied), []
    head = type(model.model.embed_tokens).as_linear if tied else type(model.lm_head).__call__
    where = (type(model.model.embed_tokens), "as_linear") if tied else (type(model.lm_head), "__call__")
    monkeypatch.setattr(*where, lambda self, x: seen.append((x.shape, self)) or head(self, x))
    constants.head_seconds(model, 64, rounds=2)
    assert seen == [((1, 1, 64), model.model.embed_tokens if tied else model.lm_head)] * 2


# --- links --------------------------------------------------------------------------------------------------------


def test_a_link_is_fitted_on_what_rank_0_printed(monkeypatch):
    """Two steps of 50 us and 1 GB/s between two ranks; other lines are of no interest."""
    seconds = [1e-4 + payload / 1e9 for payload in link_probe.PAYLOADS]
    asked = []

    def ranks(backend, count, command, timeout):
        asked.append((backend, count, command[1:]))
        assert timeout <= 120  # it is one step of a report: who waits does not learn of more than this
        return "warning\n" + json.dumps({"size": 2, "seconds": seconds}) + "\n"

    monkeypatch.setattr(link_probe, "run_ranks", ranks)
    link, rows = link_probe.measure_link("ring")
    assert link.latency_seconds == pytest.approx(50e-6) and link.bytes_per_second == pytest.approx(1e9)
    assert rows == list(zip((8192, 65536, 524288, 4194304), seconds, strict=True))
    assert asked == [("ring", 2, ["-m", "expert_parallel.projection.link_probe"])]
    for output in ("", json.dumps({"size": 1, "seconds": seconds})):
        monkeypatch.setattr(link_probe, "run_ranks", lambda *_, said=output, **more: said)
        with pytest.raises(ValueError, match="2 ranks over mpi did not find each other"):
            link_probe.measure_link("mpi")


def test_an_all_sum_takes_the_median_of_its_times(monkeypatch):
    sizes, group = [], mx.distributed.init()
    real = mx.distributed.all_sum
    monkeypatch.setattr(mx.distributed, "all_sum", lambda x, group: sizes.append(x.nbytes) or real(x, group=group))
    monkeypatch.setattr(link_probe, "time", Clock(9, 2, 3))
    assert link_probe.all_sum_seconds(8192, group, repeats=3) == 3
    assert sizes == [8192] * 4


def test_alone_the_probe_says_that_it_is(monkeypatch, capsys):
    """What each rank runs, here as a group of one: a line of JSON, a time for each payload."""
    asked = []
    real = mx.distributed.all_sum
    monkeypatch.setattr(mx.distributed, "all_sum", lambda x, group: asked.append(x.nbytes) or real(x, group=group))
    monkeypatch.delitem(sys.modules, "expert_parallel.projection.link_probe")
    runpy.run_module("expert_parallel.projection.link_probe", run_name="__main__")
    found = json.loads(capsys.readouterr().out)
    assert found["size"] == 1 and len(found["seconds"]) == 4 and all(s > 0 for s in found["seconds"])
    assert sorted(set(asked)) == [8192, 65536, 524288, 4194304]
