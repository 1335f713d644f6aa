"""What a monitor counts and says while a model serves, against plain loops and a client of Prometheus' own."""

import re
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from conftest import SHIPPED, random_model

from expert_parallel import balancedness, load_sharded, place_experts, record_routing, shard_model
from expert_parallel.moving.live import CHECK, LiveRebalancing
from expert_parallel.moving.monitor import Monitor
from expert_parallel.moving.plan import Costs, Rebalancer

L, E, D, K = 3, 16, 4, 4  # of random_model


def placement():
    return place_experts(np.ones((L, E)), D)


def numbers_of(text):
    """{name or (name, labels): value} by a reader that is not ours."""
    parser = pytest.importorskip("prometheus_client.parser")
    families = list(parser.text_string_to_metric_families(text))
    assert all(family.documentation and family.type in ("counter", "gauge") for family in families)
    samples = [sample for family in families for sample in family.samples]
    return {(s.name, *s.labels.values()) if s.labels else s.name: s.value for s in samples}


def feed(model, passes, seed=0):
    tokens = np.random.default_rng(seed).integers(0, 90, (passes, 2))
    for row in tokens:
        mx.eval(model(mx.array(row[None])))


def test_slots_by_device_are_those_that_were_recorded():
    model, lines = shard_model(random_model(), placement()), []
    with record_routing(model) as trace, Monitor(model, placement(), every=30, tell=lines.append) as monitor:
        feed(model, 2 * CHECK + 3)
    seen = trace.experts[: 2 * (2 * CHECK - 1)]  # each look counts the passes before the one that is about to begin
    loads = [[int((seen[:, layer] // 4 == device).sum()) for device in range(D)] for layer in range(L)]
    found = numbers_of(monitor.metrics())
    assert found["expert_parallel_tokens_total"] == monitor.tokens == len(seen)
    slots = [found["expert_parallel_device_slots_total", str(device)] for device in range(D)]
    assert slots == np.sum(loads, axis=0).tolist() and sum(slots) == len(seen) * L * K
    # A line after 30 tokens or more: the first look has 30, the second 32.
    first = [[int((seen[:30, layer] // 4 == device).sum()) for device in range(D)] for layer in range(L)]
    shares = [f"{share:.0%}" for share in np.sum(first, axis=0) / np.sum(first)]
    assert lines[0] == f"30 tokens: balancedness {balancedness(first):.2f}, load by device {' '.join(shares)}"
    later = np.array(loads) - first
    assert found["expert_parallel_balancedness"] == pytest.approx(balancedness(later))
    assert len(lines) == 2 and lines[1].startswith("32 tokens: ")


def test_other_models_of_the_class_are_not_counted_and_nothing_stays_behind():
    model, other = shard_model(random_model(), placement()), random_model(seed=5)
    original = type(model).__call__
    with Monitor(model, placement()) as monitor:
        feed(other, 3 * CHECK)
        assert monitor.passes == 0
        feed(model, 1)
        assert monitor.passes == 1
    assert type(model).__call__ is original
    assert np.array_equal(np.array(model(mx.array([[1, 2]]))), np.array(random_model()(mx.array([[1, 2]]))))


@pytest.mark.parametrize("longest", [None, 1e-12])
def test_experts_move_while_it_watches_and_no_logit_with_them(longest):
    """At once or an expert at each pass."""
    model, lines = shard_model(random_model(), placement()), []
    stock = random_model()
    costs = Costs(expert_bytes=1, bytes_per_second=1e12, seconds_per_slot=1.0)
    live = LiveRebalancing(model, Rebalancer(placement(), costs, every_tokens=32), longest=longest)
    with Monitor(model, placement(), live=live, every=64, tell=lines.append) as monitor:
        for seed in range(6):
            tokens = mx.array(np.random.default_rng(seed).integers(0, 9, (1, 2)))
            for _ in range(CHECK):
                assert np.array_equal(np.array(model(tokens)), np.array(stock(tokens)))
        while live.ahead:
            assert np.array_equal(np.array(model(tokens)), np.array(stock(tokens)))
    moved = sum(look["moved"] for look in live.looks)
    found = numbers_of(monitor.metrics())
    assert found["expert_parallel_moves_total"] == moved > 0 and monitor.placement == live.changes[-1][1]
    pauses = [look["pause_seconds"] for look in live.looks]
    assert found["expert_parallel_pause_seconds_total"] == pytest.approx(sum(pauses))
    assert found["expert_parallel_longest_pause_seconds"] == live.longest_pause
    assert live.longest_pause > (
        max(pauses) if longest is None else max(p["longest_layer_seconds"] for p in live.looks)
    )
    # What is counted belongs to the placement of its time, and a move has as many steps as devices change.
    assert monitor.slots.sum() == monitor.tokens * L * K
    differ = [int((a.held != b.held).sum()) for (_, a), (_, b) in pairwise(live.changes)]
    assert len(differ) == moved if longest is None else len(differ) > 4 * moved
    assert sum(look["experts_read_here"] for look in live.looks) == sum(look["moves_of_all"] for look in live.looks)
    assert re.search(r", experts have moved \d times$", lines[-1])


def test_hits_of_experts_on_disk():
    model, _ = load_sharded(SHIPPED, num_devices=2, expert_memory="25%")
    caches, lines = [store.cache for layer in model.layers for store in layer.mlp.switch_mlp.stores], []

    def counts():
        return sum(cache.hits for cache in caches), sum(cache.misses for cache in caches)

    def tell(line):
        hits, misses = counts()
        lines.append((line, f", {hits / (hits + misses):.0%} of experts were in memory"))

    with Monitor(model, place_experts(np.ones((4, 128)), 2), every=16, tell=tell) as monitor:
        feed(model, CHECK)
    found = numbers_of(monitor.metrics())
    hits, misses = counts()
    assert (found["expert_parallel_cache_hits_total"], found["expert_parallel_cache_misses_total"]) == (hits, misses)
    assert hits > 0 and misses > 0 and all(line.endswith(end) for line, end in lines) and len(lines) == 1
