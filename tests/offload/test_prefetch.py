"""Experts foretold and read ahead: the answer stays, and what is said of it is true."""

import threading

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import QWEN3, save
from mlx_lm.generate import generate_step

from expert_parallel import load_sharded, record_routing
from expert_parallel.checkpoint.loading import load_whole
from expert_parallel.layers import moe_layers
from expert_parallel.offload.prefetch import Foreteller, followers, likeliest, router_of
from expert_parallel.offload.store import OnDisk
from expert_parallel.trace import RoutingTrace

CONFIG = {**QWEN3, "num_hidden_layers": 4, "num_experts": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("prefetch") / "model", CONFIG, True)


def tokens_of(model, count=20):
    return [token for (token, _), _ in zip(generate_step(mx.array([3, 1, 4]), model), range(count), strict=False)]


def noting(asked, read):
    return lambda foretold: (asked.append(set(foretold.tolist())), read(foretold))


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("how", ["next-layer", "learned"])
def test_answers_stay_and_recall_is_counted(folder, how, devices):
    whole = load_sharded(folder, num_devices=1)[0]
    with record_routing(whole) as before:
        expected = tokens_of(whole)
    model = load_sharded(folder, num_devices=devices, expert_memory="50%", prefetch=how, cache_trace=before)[0]
    tellers = [module for module in model.modules() if isinstance(module, Foreteller)]
    asked = []
    for teller in tellers:
        teller._read_ahead = noting(asked, teller._read_ahead)
    with record_routing(model) as trace:
        assert tokens_of(model) == expected
    assert (trace.experts == before.experts).all()
    # 1. Each pass foretells layers 1 to 3 in order; of what they wanted so many were right.
    passes = [trace.experts[trace.steps == step] for step in np.unique(trace.steps)]
    wanted = [set(each[:, layer].ravel().tolist()) for each in passes for layer in (1, 2, 3)]
    right = [len(a & b) for a, b in zip(asked, wanted, strict=True)]
    assert sum(teller.right for teller in tellers) == sum(right) > 0
    assert sum(teller.wanted for teller in tellers) == sum(map(len, wanted))
    # 2. What was read ahead and then wanted counts as useful, and as a hit.
    stores = [store for layer in moe_layers(model) for store in layer.experts.stores]
    assert 0 < sum(s.reads.useful for s in stores) <= sum(s.reads.experts_ahead for s in stores)
    assert sum(store.reads.experts for store in stores) == sum(store.cache.misses for store in stores)


@pytest.mark.parametrize("how", ["next-layer", "learned"])
def test_each_layer_foretells_the_next(folder, how):
    """By that one's router, or by what was learned of these two."""
    whole = load_sharded(folder, num_devices=1)[0]
    with record_routing(whole) as before:
        tokens_of(whole)
    x, ids = mx.random.normal((1, 3, 64)), mx.random.randint(0, 16, (1, 3, 4))
    learned, routers = followers(before), [router_of(layer) for layer in moe_layers(whole)]
    model = load_sharded(folder, num_devices=1, expert_memory="50%", prefetch=how, cache_trace=before)[0]
    found = sorted((path, module) for path, module in model.named_modules() if isinstance(module, Foreteller))
    foretellers = [module for _, module in found]
    for number, teller in enumerate(foretellers[:-1]):
        expected = routers[number + 1](x) if how == "next-layer" else likeliest(learned[number], np.array(ids)[0])
        assert set(np.ravel(teller._foretell(x, ids)).tolist()) == set(np.ravel(np.array(expected)).tolist())
        assert teller._expect_next == foretellers[number + 1].expect
    assert foretellers[-1]._foretell is None


def test_a_layer_is_read_ahead_after_the_other(folder, monkeypatch):
    model = load_sharded(folder, num_devices=1, expert_memory="50%")[0]
    two, began = threading.Barrier(2), []

    def read(store, experts, rows):
        began.append(store)
        with pytest.raises(threading.BrokenBarrierError):  # nobody else comes to read meanwhile
            two.wait(0.1)
        return 0, 0

    monkeypatch.setattr(OnDisk, "_read", read)
    stores = [layer.experts.stores[0] for layer in moe_layers(model)[:2]]
    for store in stores:
        store.read_ahead(np.arange(4))
    for store in stores:
        store._settle(())
    assert began == stores


def test_the_router_alone_chooses_as_its_block_does(folder):
    model = load_whole(folder)[0]
    layer, x = moe_layers(model)[1], mx.random.normal((1, 3, 64))
    with record_routing(model) as trace:
        mx.eval(layer.block(x))
        mx.eval([other.block(x) for other in moe_layers(model)])
    assert np.array_equal(np.array(router_of(layer)(x))[0], trace.experts[-3:, 1])
    assert layer.experts is moe_layers(model)[1].experts


def test_a_router_that_cannot_be_asked_by_itself_is_refused(folder):
    layer = moe_layers(load_whole(folder)[0])[0]
    layer.block.__class__ = type("Block", (type(layer.block),), {"__call__": lambda self, x, more: x})
    with pytest.raises(ValueError, match=r"layers.0.mlp.switch_mlp: its router cannot be asked by itself .* learned"):
        router_of(layer)


def test_followers_are_the_logarithms_of_how_often_experts_go_together():
    """Two layers, four experts, top-1 by hand: 0 is followed by 1 three times of four, 2 by 3 always."""
    pairs = [[0, 1]] * 3 + [[0, 2]] + [[2, 3]] * 4
    follow = followers(RoutingTrace(np.array(pairs)[:, :, None], 4))
    assert follow.shape == (1, 4, 4)
    together, expected, prior = 3 + 1, 4 * 3 / 8 + 1, (3 + 1) / (8 + 4)
    assert follow[0, 0, 1] == pytest.approx(np.log(together / expected) + np.log(prior), rel=1e-6)
    assert likeliest(follow[0], np.array([[0], [2]])).tolist() == [[1], [3]]


def test_learned_recall_on_other_tokens_is_that_of_the_link():
    """Layer 1 wants what layer 0 does, one further: all of it is foretold on other tokens; a guess has a quarter."""
    random = np.random.default_rng(0)
    first = np.argsort(random.random((400, 16)), axis=1)[:, :4]
    trace = RoutingTrace(np.stack([first, (first + 1) % 16], axis=1), 16)
    found = likeliest(followers(trace[:200])[0], trace.experts[200:, 0].astype(int))
    right = [len(set(a) & set(b)) for a, b in zip(found.tolist(), trace.experts[200:, 1].tolist(), strict=True)]
    assert sum(right) / 800 > 0.95


def test_blocks_that_take_their_tokens_flat(tmp_path):
    """OLMoE's hands its experts [T, H]: its router is asked as the model asks it."""
    config = {**CONFIG, "model_type": "olmoe", "num_key_value_heads": 2, "clip_qkv": None}
    folder = save(tmp_path / "model", config, False)
    expected = tokens_of(load_whole(folder)[0])
    model = load_sharded(folder, num_devices=1, expert_memory="50%", prefetch="next-layer")[0]
    assert tokens_of(model) == expected
    assert sum(m.right for m in model.modules() if isinstance(m, Foreteller)) > 0
