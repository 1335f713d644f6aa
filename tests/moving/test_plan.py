"""Rebalancing: averages, moves and decisions by hand; and experts that move during a generation."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import SHIPPED, launch, random_model, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_parallel import Placement, place_experts, record_routing, shard_model
from expert_parallel.layers import expert_tensors, moe_layers
from expert_parallel.moving.live import move_experts, watch_loads
from expert_parallel.moving.plan import Costs, LoadAverage, Move, Rebalancer, moves_between, propose, renumber

FREE = Costs(expert_bytes=1, bytes_per_second=1e12, seconds_per_slot=1.0)


def placed(*devices, layers=1):
    count = 1 + max(max(experts) for experts in devices)
    held = np.zeros((layers, len(devices), count), dtype=bool)
    for d, experts in enumerate(devices):
        held[:, d, experts] = True
    return Placement(held)


# --- moving average -----------------------------------------------------------------------------


def test_average_forgets_by_half_lives():
    average = LoadAverage(half_life=100)
    assert average.loads is None
    average.add([[100.0, 0.0]], 100)  # one slot per token, all to expert 0
    assert average.loads.tolist() == [[1.0, 0.0]]
    average.add([[0.0, 100.0]], 100)
    # The older hundred counts half of the newer one: 1/3 to 2/3.
    assert average.loads[0] == pytest.approx([1 / 3, 2 / 3])
    average.add([[0.0, 0.0]], 0)
    assert average.loads[0] == pytest.approx([1 / 3, 2 / 3])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(5, 500))
@settings(max_examples=50, deadline=None)
def test_average_does_not_depend_on_how_tokens_are_batched(sizes, half_life):
    """Even traffic: one batch or many give the same."""
    whole, parts = LoadAverage(half_life), LoadAverage(half_life)
    for average in (whole, parts):
        average.add([[30.0, 10.0]], 20)
    whole.add([[0.0, 2.0 * sum(sizes)]], sum(sizes))
    for size in sizes:
        parts.add([[0.0, 2.0 * size]], size)
    assert whole.loads[0] == pytest.approx(parts.loads[0])


# --- moves --------------------------------------------------------------------------------------


def test_moves_by_hand():
    old, new = placed([0, 1], [2, 3]), placed([0, 3], [1, 2])
    assert moves_between(old, new) == [Move(0, 3, source=1, destination=0), Move(0, 1, source=0, destination=1)]
    assert moves_between(old, old) == []
    # A copy that is dropped moves nothing.
    assert moves_between(placed([0, 1], [1, 2]), placed([0, 1], [2])) == []


def test_renumbered_devices_keep_what_they_hold():
    old = place_experts(np.ones((2, 8)), 4)
    turned = old.held[:, [2, 3, 0, 1]]
    assert np.array_equal(renumber(old.held, turned), old.held)
    other = placed([0, 1, 2], [3, 4, 5], [6, 7, 8]).held
    mixed = placed([6, 7, 2], [0, 1, 5], [3, 4, 8]).held
    assert renumber(other, mixed)[0, 0].nonzero()[0].tolist() == [0, 1, 5]


def test_pause_by_hand():
    old, new = placed([0, 1], [2, 3], layers=2).held, placed([2, 3], [0, 1], layers=2).held.copy()
    new[1] = old[1]
    costs = Costs(expert_bytes=100, bytes_per_second=50, seconds_per_slot=1, seconds_per_layer=0.5)
    assert costs.pause(old, new).tolist() == [4 * 2 + 2 * 0.5, 0]
    side_by_side = Costs(100, 50, 1, 0.5, side_by_side=True)
    assert side_by_side.pause(old, new).tolist() == [2 * 2 + 0.5, 0]


# --- decisions ------------------------------------------------------------------------------------


def test_one_swap_repays_its_pause_or_nothing_moves():
    """Devices 6+4 and 1+1 slots per token: swapping 4 for 1 leaves 7 of 10 on the fuller, 3 slots less."""
    current, loads = placed([0, 1], [2, 3]), np.array([[6.0, 4, 1, 1]])
    costs = Costs(expert_bytes=10, bytes_per_second=10, seconds_per_slot=0.01)
    plan = propose(current, loads, costs, horizon_tokens=100)
    assert len(plan.moves) == 2 and plan.bytes == 20
    assert plan.pause_seconds == pytest.approx(2.0)
    assert plan.gain_seconds == pytest.approx(3 * 100 * 0.01)
    assert plan.worthwhile
    assert (plan.balancedness_before, plan.balancedness_after) == pytest.approx((0.6, 6 / 7), abs=1e-4)
    stay = propose(current, loads, costs, horizon_tokens=60)  # saves 1.8 s, costs 2 s
    assert stay.placement == current and not stay.worthwhile and stay.pause_seconds == stay.gain_seconds == 0


def test_only_layers_that_gain_are_touched():
    current = place_experts(np.ones((2, 8)), 2)
    loads = np.array([[9.0, 9, 9, 9, 1, 1, 1, 1], [1.0] * 8])
    plan = propose(current, loads, FREE, 1000)
    assert {move.layer for move in plan.moves} == {0}
    assert np.array_equal(plan.placement.held[1], current.held[1])
    assert plan.placement.device_loads(loads)[0].tolist() == [20, 20]
    assert len(plan.moves) == 4  # two swaps suffice


def test_copies_follow_the_heat():
    """A copy of expert 0 stands on both devices; expert 7 gets hot."""
    current = placed([0, 1, 2, 3, 4], [0, 5, 6, 7, 8])
    loads = np.array([[1.0, 1, 1, 1, 1, 1, 1, 20, 1]])
    plan = propose(current, loads, FREE, 1000)
    assert plan.placement.devices_of(0, 7) == [0, 1]
    assert plan.placement.device_loads(loads).max() == pytest.approx(14)
    assert (plan.placement.held.sum(axis=2) == 5).all()
    assert len(plan.moves) <= 3


@given(st.integers(0, 500))
@settings(max_examples=40, deadline=None)
def test_a_plan_is_a_placement_and_never_slower(seed):
    random = np.random.default_rng(seed)
    num_experts, num_devices = int(random.integers(4, 24)), int(random.integers(2, 5))
    redundant = int(random.integers(0, 4))
    loads = random.pareto(1.0, (2, num_experts)) + 0.01
    current = place_experts(random.random((2, num_experts)) + 0.1, num_devices, "replicated", redundant)
    costs = Costs(expert_bytes=1000, bytes_per_second=1e6, seconds_per_slot=1e-4)
    plan = propose(current, loads, costs, 200)
    assert (plan.placement.held.sum(axis=2) == current.held.sum(axis=2)).all() or redundant or num_experts % num_devices
    assert (plan.placement.held.sum(axis=(1, 2)) == current.held.sum(axis=(1, 2))).all()
    before, after = (p.device_loads(loads).max(axis=1) for p in (current, plan.placement))
    assert (after <= before + 1e-9).all()
    saved = (before - after).sum() * 200 * 1e-4
    assert plan.gain_seconds == pytest.approx(saved)
    assert plan.pause_seconds == pytest.approx(len(plan.moves) * 1e-3)
    assert plan.gain_seconds >= plan.pause_seconds


@pytest.mark.parametrize("redundant", [0, 8])
def test_groups_stay_in_the_nodes_they_were_placed_in(redundant, tmp_path):
    """Rebalancing once searched over all devices: traffic between nodes that the groups were to avoid."""
    random = np.random.default_rng(redundant)
    before, after = random.zipf(1.5, (2, 3, 32)).clip(max=200).astype(float)
    place_experts(before, 8, "replicated", redundant, num_nodes=2, num_groups=4).save(tmp_path / "placement.json")
    current = Placement.load(tmp_path / "placement.json")
    plan = propose(current, after, FREE, 1000)
    assert plan.moves and plan.balancedness_after > plan.balancedness_before + 0.02
    node = [placement.held.reshape(3, 2, 4, 32).any(axis=2) for placement in (current, plan.placement)]
    assert (node[0] == node[1]).all() and (node[1].sum(axis=1) == 1).all()
    mixed = Placement(np.ones((3, 8, 32)), metadata={"num_nodes": 2})
    with pytest.raises(ValueError, match="none in two"):
        propose(mixed, after, FREE, 1000)


def test_rebalancer_looks_when_it_is_time():
    current = place_experts(np.ones((1, 8)), 2)
    even, skewed = np.full((1, 8), 1.0), np.array([[3.0, 2, 1, 1, 0.4, 0.3, 0.2, 0.1]])
    watcher = Rebalancer(current, FREE, every_tokens=100, half_life=100)
    assert watcher.observe(even * 40, 40) is None and watcher.observe(even * 60, 60) is None
    assert not watcher.looks  # the first look only learns
    assert watcher.observe(even * 100, 100) is None and len(watcher.looks) == 1  # looked; nothing to gain
    assert watcher.observe(skewed * 100, 100) is None  # what was known before does not explain this
    plan = watcher.observe(skewed * 100, 100)
    assert plan is not None and plan.moves and watcher.placement == plan.placement
    assert watcher.observe(skewed * 99, 99) is None and len(watcher.looks) == 3

    impatient = Rebalancer(current, FREE, every_tokens=10_000, half_life=100, threshold=0.9)
    impatient.learn(skewed * 100, 100)
    assert impatient.observe(skewed * 63, 63) is None
    assert impatient.observe(skewed, 1) is not None  # 64 tokens: balancedness 40/70
    dear = Rebalancer(current, Costs(10**9, 1.0, 1e-9), every_tokens=10, half_life=100)
    dear.learn(skewed * 100, 100)
    assert dear.observe(skewed * 10, 10) is None and not dear.looks[0].worthwhile and dear.placement is current


def test_noise_moves_nothing():
    """Uniform choices: whatever a search makes of one batch does not hold in the next."""
    random, moves = np.random.default_rng(0), 0
    watcher = Rebalancer(place_experts(np.ones((4, 32)), 4), FREE, every_tokens=100, half_life=200)
    for _ in range(20):
        loads = np.stack([np.bincount(random.integers(0, 32, 400), minlength=32) for _ in range(4)])
        plan = watcher.observe(loads, 100)
        moves += len(plan.moves) if plan else 0
    assert len(watcher.looks) == 19 and moves <= 4


def test_a_gain_is_judged_on_fresh_tokens():
    current, loads = placed([0, 1], [2, 3]), np.array([[6.0, 4, 1, 1]])
    assert propose(current, loads, FREE, 10, fresh=loads, fresh_tokens=10**9).worthwhile
    fresh = np.array([[3.0, 3, 3, 3]])  # the skew is gone
    assert not propose(current, loads, FREE, 10, fresh=fresh, fresh_tokens=10**9).moves
    # 3 slots less on the fullest device; the noise of 2 tokens is sqrt(2 ln 2 x 6 / 2) = 2.04, of 1 token 2.88
    plan = propose(current, loads, FREE, 1, fresh=loads, fresh_tokens=2)
    assert plan.gain_seconds == pytest.approx(3 - np.sqrt(2 * np.log(2) * 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LoadAverage(0), "half-life"),
        (lambda: LoadAverage(5).add([[1, -1]], 1), "expert 1 has load -1"),
        (lambda: propose(place_experts(np.ones((1, 4)), 2), np.ones((1, 5)), FREE, 10), r"\[1, 5\].*\[1, 4\]"),
        (lambda: propose(place_experts(np.ones((1, 4)), 2), np.ones((1, 4)), FREE, 0), "horizon"),
        (lambda: Rebalancer(place_experts(np.ones((1, 4)), 2), FREE, every_tokens=0), "every 0 tokens"),
        (lambda: Rebalancer(place_experts(np.ones((1, 4)), 2), FREE, threshold=2), "threshold"),
        (lambda: moves_between(placed([0], [1]), placed([0], [1], layers=2)), "placements of"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- one process -----------------------------------------------------------------------------------


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
            expected = len(moves_between(Placement(held_now(model)), placements[0]))
            reports.append((move_experts(model, placements[0]), expected))
            assert np.array_equal(held_now(model), placements.pop(0).held)

    answer, logits = run(model, prompt, 12, between)
    assert answer == stock
    assert np.array_equal(logits, last)
    assert len(reports) == 3
    for report, expected in reports:
        assert report.experts == expected
        assert report.bytes == expected * expert_bytes
    # Nothing is held twice: memory is what the last placement says.
    assert sum(a.nbytes for _, a in _expert_arrays(model)) == 3 * 16 * expert_bytes


def _expert_arrays(model):
    stores = [store for layer in moe_layers(model) for store in layer.experts.stores]
    return [item for store in stores for item in expert_tensors(store.experts).items()]


def held_now(model):
    return np.stack([layer.experts.held for layer in moe_layers(model)])


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
    moves = moves_between(Placement(held_now(model)), then)
    move_experts(model, then, rows)
    assert sorted(asked) == sorted((m.layer, m.expert) for m in moves)
    prompt = mx.array([list(range(20))])
    assert mx.array_equal(model(prompt), whole(prompt))


def test_live_loads_are_those_of_the_trace_and_moves_go_on_behind_them():
    model = shard_model(random_model(), place_experts(np.ones((3, 16)), 2))
    prompt = list(range(1, 12))
    with record_routing(model) as trace, watch_loads(model) as live:
        total, tokens = 0, 0

        def between(step):
            nonlocal total, tokens
            loads, count = live.take()
            total, tokens = total + loads, tokens + count
            if step == 1:
                move_experts(model, place_experts(np.ones((3, 16)), 2, "round-robin"))

        run(model, prompt, 5, between)
        loads, count = live.take()
    assert np.array_equal(total + loads, trace.loads())
    assert tokens + count == len(trace) == 11 + 5
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
    with watch_loads(model) as live:

        def between(step):
            plan = watcher.observe(*live.take())
            if plan:
                report = move_experts(model, plan.placement)
                assert report.experts == len(plan.moves)

        answer, logits = run(model, prompt, 60, between)
    assert answer == stock and np.array_equal(logits, last)
    assert len(watcher.looks) == 5 and any(plan.worthwhile for plan in watcher.looks)
    assert np.array_equal(held_now(model), watcher.placement.held)


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
            moved.append(move_experts(model, placements.pop(0)).experts)

    answer, logits = run(model, prompt, 24, between)
    assert answer == tokens and np.array_equal(logits, last)
    assert len(moved) == 4 and min(moved) > 0


# --- in a run ---------------------------------------------------------------------------------------


def test_a_run_that_rebalances_says_the_same(tmp_path):
    out = tmp_path / "o.json"
    options = ("--max-tokens", 100, "--rebalance-every", 32, "--rebalance-horizon", 10**6, "--devices", 4)
    result = run_script("qwen3_expert_parallel.py", "--model", SHIPPED, *options, "--verify", "--json", out)
    assert result.returncode == 0, result.stderr
    figures = json.loads(out.read_text())
    assert figures["parity"]["tokens_equal"] and figures["parity"]["max_abs_logit_difference"] == 0
    moved = [look for look in figures["rebalancing"]["looks"] if look["moved"]]
    assert moved and all(look["bytes_read_here"] == look["bytes_of_all"] > 0 for look in moved)
    assert all(look["pause_seconds"] > 0 for look in moved)


def test_nothing_moves_where_it_would_not_repay_the_pause(tmp_path):
    out = tmp_path / "o.json"
    options = ("--max-tokens", 70, "--rebalance-every", 32, "--rebalance-horizon", 1, "--devices", 4)
    result = run_script("qwen3_expert_parallel.py", "--model", SHIPPED, *options, "--no-verify", "--json", out)
    assert result.returncode == 0, result.stderr
    looks = json.loads(out.read_text())["rebalancing"]["looks"]
    assert looks and not any(look["moved"] for look in looks)


def test_ranks_read_only_what_moves_to_them_and_say_the_same(tmp_path):
    out = tmp_path / "o.json"
    options = ("--max-tokens", 100, "--rebalance-every", 32, "--rebalance-horizon", 10**6, "--verify", "--json", out)
    command = ("qwen3_expert_parallel.py", "--model", SHIPPED, *options)
    results = launch("ring", 2, *command, tmp_path=tmp_path)
    assert all(status == 0 for status, _, _ in results), results
    figures = json.loads(out.read_text())
    assert figures["parity"]["tokens_equal"] and figures["parity"]["max_abs_logit_difference"] < 1e-4
    moved = [look for look in figures["rebalancing"]["looks"] if look["moved"]]
    assert moved and all(0 < look["bytes_read_here"] < look["bytes_of_all"] for look in moved)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--rebalance-every", 0), "--rebalance-every must be at least 1"),
        (("--rebalance-horizon", 5), "of no use without --rebalance-every"),
        (("--rebalance-every", 5, "--rebalance-threshold", 2), "--rebalance-threshold must be between"),
    ],
)
def test_odd_rebalancing_options(options, line):
    result = run_script("qwen3_expert_parallel.py", "--model", SHIPPED, *options)
    assert result.returncode == 2 and line in result.stderr and "Traceback" not in result.stderr
