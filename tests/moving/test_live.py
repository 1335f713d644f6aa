"""Experts that move during a generation: the answers stay, in one process and over ranks; only what moves is read."""

import json
import types
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import Rank
from conftest import SHIPPED, launch, random_model

from expert_parallel import Placement, place_experts, record_routing, shard_model
from expert_parallel.layers import expert_tensors, moe_layers
from expert_parallel.moving import live
from expert_parallel.moving.live import LiveRebalancing, move_experts
from expert_parallel.moving.plan import Costs, Rebalancer

FREE = Costs(expert_bytes=1, bytes_per_second=1e12, seconds_per_slot=1.0)


def run(model, tokens, steps, between=None):
    """Greedy tokens after a prompt; `between(step)` runs between forward passes."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    answer, logits = [], model(mx.array([tokens]), cache=cache)
    for step in range(steps):
        answer.append(int(logits[0, -1].argmax()))
        if between:
            between(step)
        logits = model(mx.array([answer[-1:]]), cache=cache)
        mx.eval(logits)
    return answer, np.array(logits)


@pytest.mark.parametrize("quantize", [False, True])
def test_experts_move_during_a_generation(quantize):
    prompt = list(range(1, 30))
    stock, last = run(random_model(quantize=quantize), prompt, 12)
    placements = [
        place_experts(np.ones((3, 16)), 3, "round-robin"),
        place_experts(np.random.default_rng(1).random((3, 16)), 3, "replicated", redundant=4),
        place_experts(np.random.default_rng(2).random((3, 16)), 3, "balanced"),
    ]
    model = shard_model(random_model(quantize=quantize), place_experts(np.ones((3, 16)), 3))
    expert_bytes = sum(a.nbytes for _, a in _expert_arrays(model)) // (3 * 16)
    reports = []

    def between(step):
        if step % 3 == 2 and placements:
            expected = (placements[0].held & ~held_now(model)).sum()
            reports.append((move_experts(model, placements[0]), expected))
            assert np.array_equal(held_now(model), placements.pop(0).held)

    answer, logits = run(model, prompt, 12, between)
    assert answer == stock
    assert np.array_equal(logits, last)
    assert len(reports) == 3
    for report, expected in reports:
        assert report["experts_read_here"] == expected
        assert report["bytes_here"] == expected * expert_bytes
        assert 0 < report["longest_layer_seconds"] < report["pause_seconds"]
    # Nothing is held twice: memory is what the last placement says.
    assert sum(a.nbytes for _, a in _expert_arrays(model)) == 3 * 16 * expert_bytes


def _expert_arrays(model):
    stores = [store for layer in moe_layers(model) for store in layer.experts.stores]
    return [item for store in stores for item in expert_tensors(store.experts).items()]


def held_now(model):
    return np.stack([layer.experts.held for layer in moe_layers(model)])


def test_costs_are_the_slowest_ranks_of_reads_that_a_move_would_make(monkeypatch):
    """Read are experts that the store lacks, its own where it has all; of several ranks the slowest counts."""
    own, read, alone = expert_tensors(random_model().layers[0].mlp.switch_mlp), [], mx.distributed.init(backend="any")

    def rows(layer):
        assert layer == 0
        return lambda ids: read.extend(ids) or {name: array[mx.array(ids)] for name, array in own.items()}

    for devices in (1, 3):  # of three the first holds most
        model = shard_model(random_model(), place_experts(np.ones((3, 16)), devices))
        store = moe_layers(model)[0].experts.stores[0]
        read.clear()
        costs = live.measured_costs(model, rows, alone)
        seconds = costs.expert_bytes / costs.bytes_per_second, costs.seconds_per_slot, costs.seconds_per_layer
        assert 0 < min(seconds) <= max(seconds) < 5 and not costs.side_by_side
        assert len(read) == live.TIMES and set(read) <= set(range(16)) - (
            set(store.ids.tolist()) if devices > 1 else set()
        )
    ranks = [{"read": 1.0, "slots": 8.0, "change": 3.0}, {"read": 2.0, "slots": 4.0, "change": 5.0}]
    monkeypatch.setattr(live, "gather_objects", lambda group, value: ranks)
    costs = live.measured_costs(model, rows, None)
    size = sum(a.nbytes for _, a in _expert_arrays(model)) // (3 * 16)
    assert (costs.expert_bytes, costs.bytes_per_second) == (size, size / 2.0)
    assert (costs.seconds_per_slot, costs.seconds_per_layer) == (8.0 / 6, 5.0)  # six slots of six experts
    assert live.measured_costs(model, rows, Rank(0, 2)) == replace(costs, side_by_side=True)


def test_costs_are_of_a_token_an_expert_and_a_layer(monkeypatch):
    """Timed are one token by eight experts, one expert that is read, all rows of the first layer in another order."""
    model = shard_model(random_model(), place_experts(np.ones((3, 16)), 1))
    first = moe_layers(model)[0].experts.stores[0].experts
    own, turned, asked, original = expert_tensors(first), [], set(), type(first).__call__

    def call(self, x, ids):
        asked.add((self is first, x.shape, tuple(ids.reshape(-1).tolist())))
        return original(self, x, ids)

    def rows(layer):
        return lambda ids: asked.add((layer, len(ids))) or {name: array[mx.array(ids)] for name, array in own.items()}

    monkeypatch.setattr(type(first), "__call__", call)
    monkeypatch.setattr(live, "picked", lambda tensors, at: turned.append((tensors["up_proj.weight"], list(at))) or own)
    monkeypatch.setattr(live, "gather_objects", lambda group, value: [value, dict.fromkeys(value, 1e9)])
    costs = live.measured_costs(model, rows, None)
    assert asked == {(True, (1, 64), tuple(range(8))), (0, 1)} and costs.seconds_per_slot == 1e9 / 8
    assert all(tensor is own["up_proj.weight"] and at == list(range(15, -1, -1)) for tensor, at in turned) and turned


def test_nothing_that_is_where_it_should_be_moves():
    model = shard_model(random_model(), then := place_experts(np.ones((3, 16)), 3))
    figures = {"experts_read_here": 0, "bytes_here": 0, "pause_seconds": 0, "longest_layer_seconds": 0}
    assert move_experts(model, then) == figures
    held = then.held.copy()
    held[1] = held[1][::-1]  # of one layer the first device and the last change places: 6 and 5 experts
    assert move_experts(model, Placement(held))["experts_read_here"] == 11


def test_rows_can_come_from_elsewhere():
    whole = random_model(quantize=True)
    model = shard_model(random_model(quantize=True), place_experts(np.ones((3, 16)), 4))
    asked = []

    def rows(layer):
        def read(ids):
            asked.extend((layer, int(expert)) for expert in ids)
            return {
                n: mx.take(a, mx.array(ids), axis=0)
                for n, a in expert_tensors(moe_layers(whole)[layer].experts).items()
            }

        return read

    then = place_experts(np.ones((3, 16)), 4, "round-robin")
    moves = np.argwhere(then.held & ~held_now(model))
    move_experts(model, then, rows)
    assert sorted(asked) == sorted((l, e) for l, _, e in moves.tolist())
    prompt = mx.array([list(range(20))])
    assert mx.array_equal(model(prompt), whole(prompt))


class Watcher:
    """In place of a Rebalancer: notes what it is shown, and moves once."""

    def __init__(self, placement, then, every_tokens):
        self.placement, self.then, self.every_tokens = placement, then, every_tokens
        self.shown, self.looks = [], []

    def observe(self, loads, tokens):
        self.shown.append((loads, tokens))
        if len(self.shown) != 2:
            return None
        rebalancer = Rebalancer(self.placement, FREE, every_tokens=1)
        rebalancer.learn(loads, tokens)
        rebalancer.observe(loads, tokens)
        self.looks.append(replace(rebalancer.looks[0], placement=self.then))
        self.placement = self.then
        return self.looks[0]


def test_the_rebalancer_sees_the_loads_of_the_trace_and_moves_go_on_behind_it():
    start, then = (place_experts(np.ones((3, 16)), 2, strategy) for strategy in ("contiguous", "round-robin"))
    model, watcher = shard_model(random_model(), start), Watcher(start, then, every_tokens=2)
    with record_routing(model) as trace, LiveRebalancing(model, watcher) as live:
        run(model, list(range(1, 12)), 6, lambda step: live.after_token())
    assert [tokens for _, tokens in watcher.shown] == [11 + 1, 2, 2]  # between passes: the last one comes after
    assert np.array_equal(sum(loads for loads, _ in watcher.shown), trace[:16].loads())
    assert live.changes == [(0, start), (14, then)] and live.looks[0]["after_tokens"] == 14
    assert held_now(model)[0, 1].nonzero()[0].tolist() == [1, 3, 5, 7, 9, 11, 13, 15]


def test_rebalancing_online_end_to_end():
    prompt = list(range(1, 30))
    stock = random_model(quantize=True)
    with record_routing(stock) as trace:
        stock, last = run(stock, prompt, 60)
    hottest_together = np.zeros((3, 4, 16), dtype=bool)
    for layer, loads in enumerate(trace.loads()):
        for d, experts in enumerate(np.argsort(-loads).reshape(4, 4)):
            hottest_together[layer, d, experts] = True
    start = Placement(hottest_together)
    model = shard_model(random_model(quantize=True), start)
    watcher = Rebalancer(start, FREE, every_tokens=10, half_life=50)
    with LiveRebalancing(model, watcher) as live:
        answer, logits = run(model, prompt, 60, lambda step: live.after_token())
    assert answer == stock and np.array_equal(logits, last)
    assert len(watcher.looks) == 5 and np.array_equal(held_now(model), watcher.placement.held)
    looks = live.figures()["looks"]
    assert [look["after_tokens"] for look in looks] == [48, 58, 68, 78, 88]  # after the prompt and ten passes each
    moved = [look["moved"] for look in looks]
    assert any(moved) and sum(moved) == len(live.changes) - 1
    for look in looks:
        assert look["experts_read_here"] == look["moves_of_all"] and (look["pause_seconds"] > 0) == look["moved"]


# --- the shipped model ------------------------------------------------------------------------------


def test_shipped_model_under_every_placement_and_moved_while_it_writes(shipped):
    from mlx_lm import load

    def fresh():
        model, tokenizer = load(str(shipped))
        model.set_dtype(mx.float32)
        return model, tokenizer

    stock, tokenizer = fresh()
    prompt = tokenizer.encode("def read_lines(path):\n    with open(path) as file:\n")
    with record_routing(stock) as trace:
        tokens, last = run(stock, prompt, 24)
    placements = [
        place_experts(trace.loads(), 8, "balanced"),
        place_experts(trace.loads(), 8, "replicated", redundant=8),
        place_experts(trace.loads(), 8, "replicated", redundant=11),  # 139 slots: some devices hold one more
        place_experts(trace.loads(), 8, "affinity", coactivation=trace.experts),
    ]
    model = shard_model(fresh()[0], place_experts(trace.loads(), 8))
    moved = []

    def between(step):
        if step % 5 == 4 and placements:
            moved.append(move_experts(model, placements.pop(0))["experts_read_here"])

    answer, logits = run(model, prompt, 24, between)
    assert answer == tokens and np.array_equal(logits, last)
    assert len(moved) == 4 and min(moved) > 0


# --- in a run ---------------------------------------------------------------------------------------


def test_a_run_that_rebalances_says_the_same(run_here, tmp_path):
    out = tmp_path / "o.json"
    options = ("--max-tokens", 50, "--rebalance-every", 16, "--rebalance-horizon", 10**8, "--devices", 4, "--trials", 0)
    result = run_here("qwen3_expert_parallel.py", "--model", SHIPPED, *options, "--verify", "--json", out)
    assert result.returncode == 0, result.stderr
    figures = json.loads(out.read_text())
    assert figures["parity"]["tokens_equal"] and figures["parity"]["max_abs_logit_difference"] == 0
    moved = [look for look in figures["rebalancing"]["looks"] if look["moved"]]
    assert moved and all(look["bytes_here"] == look["bytes_of_all"] > 0 for look in moved)
    assert all(look["pause_seconds"] > 0 for look in moved)


def test_nothing_moves_where_it_would_not_repay_the_pause(run_here, tmp_path):
    out = tmp_path / "o.json"
    options = ("--max-tokens", 20, "--rebalance-every", 8, "--rebalance-horizon", 1, "--devices", 4, "--trials", 0)
    result = run_here("qwen3_expert_parallel.py", "--model", SHIPPED, *options, "--no-verify", "--json", out)
    assert result.returncode == 0, result.stderr
    looks = json.loads(out.read_text())["rebalancing"]["looks"]
    assert looks and not any(look["moved"] for look in looks)


def test_ranks_read_only_what_moves_to_them_and_say_the_same(tmp_path):
    out = tmp_path / "o.json"
    options = ("--max-tokens", 26, "--rebalance-every", 8, "--rebalance-horizon", 10**8, "--trials", 1)
    command = ("qwen3_expert_parallel.py", "--model", SHIPPED, *options, "--verify", "--json", out)
    results = launch("ring", 2, *command, tmp_path=tmp_path)
    assert all(status == 0 for status, _, _ in results), results
    figures = json.loads(out.read_text())
    assert figures["parity"]["tokens_equal"] and figures["parity"]["max_abs_logit_difference"] < 1e-4
    moved = [look for look in figures["rebalancing"]["looks"] if look["moved"]]
    assert moved and all(0 < look["bytes_here"] < look["bytes_of_all"] for look in moved)
    assert all(0 < look["experts_read_here"] < look["moves_of_all"] for look in moved)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--rebalance-every", 0), "--rebalance-every must be at least 1"),
        (("--rebalance-every", 5, "--rebalance-horizon", "9" * 400), "must be between 1 and 1000000000000, got 999"),
        (("--rebalance-horizon", 5), "of no use without --rebalance-every"),
        (("--rebalance-every", 5, "--rebalance-threshold", 2), "--rebalance-threshold must be between"),
    ],
)
def test_odd_rebalancing_options(run_here, options, line):
    result = run_here("qwen3_expert_parallel.py", "--model", SHIPPED, *options)
    assert result.returncode == 2 and line in result.stderr and "Traceback" not in result.stderr


def test_what_was_asked_for_is_what_is_watched(monkeypatch):
    """Looks, threshold, horizon and the type of rows that are read; what tokens say halves from look to look."""
    asked = types.SimpleNamespace(rebalance_every=48, rebalance_threshold=0.7, rebalance_horizon=999)
    rows = types.SimpleNamespace(reads_rows=True, rows=lambda layer, dtype=None: (layer, dtype), folder="here")
    model = shard_model(random_model(), then := place_experts(np.ones((3, 16)), 2))
    monkeypatch.setattr(live, "measured_costs", lambda model, rows, group: replace(FREE, expert_bytes=rows(5)))
    watched = live.start_rebalancing(asked, model, then, rows, mx.float16, None)
    assert watched.rows(2) == (2, mx.float16) and watched.rebalancer.costs.expert_bytes == (5, mx.float16)
    how = watched.rebalancer
    assert (how.every_tokens, how.threshold, how.half_life, how.horizon_tokens) == (48, 0.7, 48, 999)
    assert how.placement is then and watched.model is model and watched.changes == [(0, then)]
    assert watched.longest is None
    asked.rebalance_pause, costs = 0.5, Costs(1, 4.0, 1.0, 0.1)
    monkeypatch.setattr(live, "measured_costs", lambda model, rows, group: costs)
    assert live.start_rebalancing(asked, model, then, rows, None, None).longest == 0.5
    asked.rebalance_pause = 0.3
    with pytest.raises(
        ValueError, match="^--rebalance-pause 0.3: an expert takes 0.35 s to move here, as measured: give at least that"
    ):
        live.start_rebalancing(asked, model, then, rows, None, None)
    rows.reads_rows = False
    with pytest.raises(
        ValueError, match="^--rebalance-every 48: here stores its .* cannot be read from; leave it out, or"
    ):
        live.start_rebalancing(asked, model, then, rows, None, None)
