"""The first property: sharded and stock models say the same, bit for bit in one process on the CPU."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import SHIPPED, random_model
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache

from expert_parallel import ExpertShard, Placement, place_experts, shard_model
from expert_parallel.moe import SimulatedDevices, moe_layers, num_experts

BATCH = mx.array([[5, 6, 7, 8, 9, 30, 2, 11, 60, 61, 62], [9, 3, 11, 12, 44, 1, 8, 80, 81, 82, 96]])


def placed(model, devices, strategy="contiguous"):
    layers = moe_layers(model)
    return place_experts(np.zeros((len(layers), num_experts(layers[0].experts))), devices, strategy)


def prefill_and_decode(model, tokens=BATCH):
    """Logits of a whole batch, and of single tokens after it with a cache."""
    cache = make_prompt_cache(model)
    outputs = [model(tokens, cache=cache)]
    outputs += [model(tokens[:, t : t + 1], cache=cache) for t in range(3)]
    mx.eval(outputs)
    return outputs


def assert_identical(first, second):
    for a, b in zip(first, second, strict=True):
        assert mx.array_equal(a, b), f"largest difference {mx.abs(a - b).max().item()}"


@pytest.fixture(scope="module")
def stock():
    model, _ = load(str(SHIPPED))
    model.set_dtype(mx.float32)
    return prefill_and_decode(model)


@pytest.mark.parametrize("strategy", ["contiguous", "round-robin"])
@pytest.mark.parametrize("devices", [1, 2, 3, 5, 7, 8, 128])
def test_shipped_quantised_model_is_bit_identical(devices, strategy, stock):
    model, _ = load(str(SHIPPED))
    model.set_dtype(mx.float32)
    shard_model(model, placed(model, devices, strategy))
    assert_identical(prefill_and_decode(model), stock)


@pytest.mark.parametrize("strategy", ["contiguous", "round-robin"])
@pytest.mark.parametrize("devices", [1, 2, 3, 5, 7, 8, 128])
def test_unquantised_float32_is_bit_identical(devices, strategy):
    model = random_model(num_experts=128, num_experts_per_tok=8)
    expected = prefill_and_decode(model)
    assert_identical(prefill_and_decode(shard_model(model, placed(model, devices, strategy))), expected)


def test_bfloat16_activations_are_bit_identical():
    model, _ = load(str(SHIPPED))
    expected = prefill_and_decode(model)
    assert_identical(prefill_and_decode(shard_model(model, placed(model, 3))), expected)


def test_devices_on_streams_of_their_own_are_bit_identical(stock):
    model, _ = load(str(SHIPPED))
    model.set_dtype(mx.float32)
    shard_model(model, placed(model, 2), streams=True)
    assert_identical(prefill_and_decode(model), stock)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 10, "num_experts_per_tok": 3},
        {"num_experts": 60, "num_experts_per_tok": 4},
        {"norm_topk_prob": False},
        {"decoder_sparse_step": 2},
        {"mlp_only_layers": [1]},
        {"tie_word_embeddings": True},
        {"num_experts": 2, "num_experts_per_tok": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("quantize", [False, True], ids=["float32", "quantised"])
def test_other_configurations_are_bit_identical(changes, quantize):
    model = random_model(quantize=quantize, **changes)
    expected = prefill_and_decode(model)
    devices = min(3, model.args.num_experts)
    assert_identical(prefill_and_decode(shard_model(model, placed(model, devices))), expected)


def replicated_placement(layers, experts, devices, rng):
    held = np.zeros((layers, devices, experts), dtype=bool)
    for layer in range(layers):
        held[layer, rng.permutation(np.arange(experts) % devices), np.arange(experts)] = True
        for expert in rng.choice(experts, experts // 2, replace=False):
            held[layer, rng.integers(devices), expert] = True
    return Placement(held)


@pytest.mark.parametrize("selection", ["compact", "masked"])
def test_copies_and_both_ways_to_skip_slots(selection, monkeypatch):
    monkeypatch.setattr("expert_parallel.moe.slot_selection", lambda *_: selection)
    model = random_model(quantize=True)
    expected = prefill_and_decode(model)
    shard_model(model, replicated_placement(3, 16, 3, np.random.default_rng(1)))
    assert_identical(prefill_and_decode(model), expected)


@pytest.mark.parametrize("selection", ["compact", "masked"])
def test_shards_add_up_and_serve_each_slot_once(selection, monkeypatch):
    monkeypatch.setattr("expert_parallel.moe.slot_selection", lambda *_: selection)
    experts = moe_layers(random_model())[0].experts
    x, indices = mx.random.normal((2, 7, 64)), mx.random.randint(0, 16, (2, 7, 4))
    held = replicated_placement(1, 16, 4, np.random.default_rng(2)).held[0]
    parts = [ExpertShard.cut(experts, held, d)(x, indices) for d in range(4)]
    served = sum((mx.abs(p).sum(-1) > 0).astype(mx.int32) for p in parts)
    assert (served == 1).all().item()
    assert mx.array_equal(sum(parts), experts(x, indices))


def test_devices_hold_their_experts_and_nothing_else():
    model, _ = load(str(SHIPPED))
    layers = moe_layers(model)
    whole = [sum(a.nbytes for a in leaves(layer.experts)) for layer in layers]
    shard_model(model, placed(model, 8))
    for layer, total in zip(moe_layers(model), whole, strict=True):
        sizes = [sum(a.nbytes for a in leaves(shard)) for shard in layer.experts.shards]
        assert sum(sizes) == total
        assert sizes == [total // 8] * 8


def test_memory_of_the_whole_layer_is_given_back():
    """Slices would be views that keep the whole tensor alive: then nothing shrinks."""
    model = random_model(num_experts=64)
    experts = moe_layers(model)[0].experts
    held = placed(model, 8).held[0]
    del model
    before = mx.get_active_memory()
    shard = ExpertShard.cut(experts, held, 0)
    share = sum(a.nbytes for a in leaves(shard))
    del experts
    mx.clear_cache()
    assert mx.get_active_memory() - before < 0
    assert mx.get_active_memory() >= share


def leaves(module):
    from mlx.utils import tree_flatten

    return [leaf for _, leaf in tree_flatten(module.parameters())]


def test_zeroing_a_device_changes_exactly_the_slots_of_its_experts():
    model = random_model()
    layer = moe_layers(shard_model(model, placed(model, 4)))[1]
    x, indices = mx.random.normal((1, 20, 64)), mx.random.randint(0, 16, (1, 20, 4))
    before = layer.experts(x, indices)
    shard = layer.experts.shards[2]
    shard.update({"experts": {"down_proj": {"weight": mx.zeros_like(shard.experts.down_proj.weight)}}})
    after = layer.experts(x, indices)
    changed = np.array(mx.any(before != after, axis=-1))
    assert np.array_equal(changed, np.isin(np.array(indices), shard.expert_ids))
    assert changed.any()
    assert not changed.all()


def test_a_slot_of_a_foreign_expert_is_refused_and_not_computed_with_a_local_number():
    """Global ids used as local ones are right on device 0 and silently wrong elsewhere (vllm-gaudi 1796)."""
    shard = ExpertShard.cut(moe_layers(random_model())[0].experts, placed(random_model(), 4).held[0], 3)
    assert shard.expert_ids == [12, 13, 14, 15]
    with pytest.raises(IndexError, match="device 3"):
        shard.rows(mx.zeros((1, 64)), np.array([[1]]), np.array([0]))


def test_wrong_placements_are_refused_with_the_numbers():
    with pytest.raises(ValueError, match="3 layers of 8 experts.*3 of 16"):
        shard_model(random_model(), place_experts(np.zeros((3, 8)), 2))
    with pytest.raises(ValueError, match="no Mixture-of-Experts layers"):
        shard_model(random_model(mlp_only_layers=[0, 1, 2]), place_experts(np.zeros((3, 8)), 2))


def test_what_mlx_could_not_compute_is_refused_when_it_is_sharded():
    """bfloat16 experts that are not quantised ended in mlx's "Type bfloat16 not supported" at the first token."""
    model = random_model()
    model.set_dtype(mx.bfloat16)
    with pytest.raises(ValueError, match=r"float32 only, not in mlx.core.bfloat16: call model.set_dtype"):
        shard_model(model, placed(model, 2))
    model.set_dtype(mx.float32)
    mx.eval(shard_model(model, placed(model, 2))(mx.array([[1, 2]])))


@pytest.mark.parametrize("ways", [{"combine": "sum"}, {"attention": "half"}, {"combine": None}], ids=str)
def test_unknown_ways_are_refused_in_one_process_too(ways):
    with pytest.raises(ValueError, match=f"{next(iter(ways))} is .*{next(iter(ways.values()))!r}"):
        shard_model(random_model(), placed(random_model(), 2), **ways)


def test_one_device_is_the_untouched_module():
    model = random_model()
    originals = [layer.experts for layer in moe_layers(model)]
    shard_model(model, placed(model, 1))
    for layer, original in zip(moe_layers(model), originals, strict=True):
        assert isinstance(layer.experts, SimulatedDevices)
        assert layer.experts.shards[0].experts is original


def test_a_second_sharding_is_refused_and_changes_nothing():
    model = random_model()
    expected = prefill_and_decode(model)
    shard_model(model, placed(model, 3))
    with pytest.raises(ValueError, match="spread already"):
        shard_model(model, placed(model, 2))
    assert_identical(prefill_and_decode(model), expected)
