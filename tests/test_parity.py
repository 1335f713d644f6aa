"""The first property: sharded and stock models say the same, bit for bit in one process on the CPU."""

import io
import re
import time
from collections import Counter
from functools import partialmethod

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import SHIPPED, random_model
from mlx.utils import tree_map_with_path
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.qwen3_moe import Qwen3MoeSparseMoeBlock
from mlx_lm.models.switch_layers import SwitchGLU
from mlx_lm.tuner.utils import linear_to_lora_layers

from expert_parallel import Placement, ShardedExperts, place_experts, record_routing, shard_model
from expert_parallel.device.masked import measure_masked
from expert_parallel.layers import expert_tensors, moe_layers, moe_shape
from expert_parallel.stores import InMemory, picked, rows_of
from expert_parallel.trials import why_not_reduce

BATCH = mx.array([[5, 6, 7, 8, 9, 30, 2, 11, 60, 61, 62], [9, 3, 11, 12, 44, 1, 8, 80, 81, 82, 96]])


def placed(model, devices, strategy="contiguous"):
    return place_experts(np.zeros(moe_shape(model)), devices, strategy)


def store_of(experts, held, device):
    """One device's experts, cut out of a whole layer."""
    return InMemory(experts, held.shape[1], np.flatnonzero(held[device]), rows_of(experts))


def skip_slots(model, selection):
    for layer in moe_layers(model):
        layer.experts.masked_up_to = {"compact": 0, "masked": 10**6}[selection]


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
    shard_model(model, placed(model, 2), streams="on")
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
def test_copies_and_both_ways_to_skip_slots(selection):
    model = random_model(quantize=True)
    expected = prefill_and_decode(model)
    shard_model(model, replicated_placement(3, 16, 3, np.random.default_rng(1)))
    skip_slots(model, selection)
    assert_identical(prefill_and_decode(model), expected)


@pytest.mark.parametrize("selection", ["compact", "masked"])
def test_shards_add_up_and_serve_each_slot_once(selection):
    experts = moe_layers(random_model())[0].experts
    x, indices = mx.random.normal((2, 7, 64)), mx.random.randint(0, 16, (2, 7, 4))
    held = replicated_placement(1, 16, 4, np.random.default_rng(2)).held[0]
    parts = []
    for d in range(4):
        rank = ShardedExperts({d: store_of(experts, held, d)}, held)
        parts.append(getattr(rank, selection)(x, indices))
    served = sum((mx.abs(p).sum(-1) > 0).astype(mx.int32) for p in parts)
    assert (served == 1).all().item()
    assert mx.array_equal(sum(parts), experts(x, indices))


def test_devices_hold_their_experts_and_nothing_else():
    model, _ = load(str(SHIPPED))
    layers = moe_layers(model)
    whole = [sum(a.nbytes for a in leaves(layer.experts)) for layer in layers]
    shard_model(model, placed(model, 8))
    for layer, total in zip(moe_layers(model), whole, strict=True):
        sizes = [sum(a.nbytes for a in leaves(store)) for store in layer.experts.stores]
        assert sum(sizes) == total
        assert sizes == [total // 8] * 8


def test_memory_of_the_whole_layer_is_given_back():
    """Slices would be views that keep the whole tensor alive: then nothing shrinks."""
    model = random_model(num_experts=64)
    experts = moe_layers(model)[0].experts
    held = placed(model, 8).held[0]
    del model
    before = mx.get_active_memory()
    shard = store_of(experts, held, 0)
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
    shard = layer.experts.stores[2]
    shard.update({"experts": {"down_proj": {"weight": mx.zeros_like(shard.experts.down_proj.weight)}}})
    after = layer.experts(x, indices)
    changed = np.array(mx.any(before != after, axis=-1))
    assert np.array_equal(changed, np.isin(np.array(indices), shard.ids))
    assert changed.any()
    assert not changed.all()


def test_a_slot_of_a_foreign_expert_is_refused_and_not_computed_with_a_local_number():
    """Global ids used as local ones are right on device 0 and silently wrong elsewhere (vllm-gaudi 1796)."""
    store = store_of(moe_layers(random_model())[0].experts, placed(random_model(), 4).held[0], 3)
    assert store.ids.tolist() == [12, 13, 14, 15]
    for experts in ([1], [12, 1], [1, 15]):
        with pytest.raises(IndexError, match="expert 1 is not here"):
            store(mx.zeros((2, 64)), np.arange(len(experts)), np.array(experts))
    assert store(mx.zeros((2, 64)), np.arange(2), np.array([12, 15])).shape == (2, 64)


def test_rows_are_picked_in_the_order_asked_for():
    rows = {"a": mx.array([[1], [2], [3]]), "b": mx.array([4, 5, 6])}
    for at in ([2, 0, 1], [1], [0, 0, 2]):
        got = picked(rows, at)
        assert got["a"].tolist() == [[at_one + 1] for at_one in at] and got["b"].tolist() == [
            at_one + 4 for at_one in at
        ]
    assert picked(rows, np.arange(3)) is rows


def test_a_store_has_one_spare_expert_at_most():
    """Asked again after a change elsewhere; its own change gives it back."""
    store = store_of(moe_layers(random_model())[0].experts, placed(random_model(), 4).held[0], 3)
    for _ in range(2):
        assert store.rows_with_spare().tolist() == [4] * 12 + [0, 1, 2, 3]
        assert {len(array) for array in expert_tensors(store.experts).values()} == {5}
    whole = rows_of(moe_layers(random_model())[0].experts)
    store.hold([0, 13], whole)
    assert {len(array) for array in expert_tensors(store.experts).values()} == {2} and store.ids.tolist() == [0, 13]
    assert all(mx.array_equal(array, whole([0, 13])[name]) for name, array in expert_tensors(store.experts).items())


def test_wrong_placements_are_refused_with_the_numbers():
    with pytest.raises(ValueError, match="3 layers of 8 experts.*3 of 16"):
        shard_model(random_model(), place_experts(np.zeros((3, 8)), 2))
    with pytest.raises(ValueError, match="no Mixture-of-Experts layers"):
        shard_model(random_model(mlp_only_layers=[0, 1, 2]), place_experts(np.zeros((3, 8)), 2))


def test_what_mlx_could_not_compute_is_refused_when_it_is_sharded():
    """bfloat16 experts that are not quantised ended in mlx's "Type bfloat16 not supported" at the first token."""
    model = random_model()
    model.set_dtype(mx.bfloat16)
    with pytest.raises(ValueError, match=r"mlx.core.bfloat16 cannot be computed here .*call model.set_dtype"):
        shard_model(model, placed(model, 2))
    model.set_dtype(mx.float32)
    mx.eval(shard_model(model, placed(model, 2))(mx.array([[1, 2]])))


@pytest.mark.parametrize("ways", [{"combine": "sum"}, {"attention": "half"}, {"combine": None}], ids=str)
def test_unknown_ways_are_refused_in_one_process_too(ways):
    with pytest.raises(ValueError, match=f"{next(iter(ways))} is .*{next(iter(ways.values()))!r}"):
        shard_model(random_model(), placed(random_model(), 2), **ways)


def test_one_device_is_the_untouched_module():
    model = random_model()
    originals = [expert_tensors(layer.experts) for layer in moe_layers(model)]
    shard_model(model, placed(model, 1))
    for layer, original in zip(moe_layers(model), originals, strict=True):
        held = expert_tensors(layer.experts.stores[0].experts)
        assert held.keys() == original.keys()
        assert all(held[name] is original[name] for name in original)


def test_random_numbers_that_come_after_are_the_same():
    """Trials draw from keys of their own: an answer that is sampled stays what it was."""
    model = random_model()
    mx.random.seed(7)
    expected = mx.random.uniform(shape=(4,))
    mx.random.seed(7)
    shard_model(model, placed(model, 2), group=None)
    for layer in moe_layers(model):
        assert why_not_reduce(layer) is None
    assert mx.array_equal(mx.random.uniform(shape=(4,)), expected)


def test_a_second_sharding_is_refused_and_changes_nothing():
    model = random_model()
    expected = prefill_and_decode(model)
    shard_model(model, placed(model, 3))
    with pytest.raises(ValueError, match="spread already"):
        shard_model(model, placed(model, 2))
    assert_identical(prefill_and_decode(model), expected)


def test_rounding_in_half_precision_does_not_keep_blocks_from_summing():
    model = random_model()
    model.set_dtype(mx.float16)
    assert {why_not_reduce(layer) for layer in moe_layers(model)} == {None}


# --- what only structure and trial can tell ---------------------------------------------------------------


def primitives(y):
    """Operations of a lazy array's graph, by name."""
    graph = io.StringIO()
    mx.export_to_dot(graph, y)
    return Counter(re.findall(r'label ="(\w+)"', graph.getvalue()))


@pytest.mark.parametrize(("redundant", "most"), [(0, 2), (16, 3)])
def test_a_masked_token_on_a_rank_adds_few_operations_to_stocks_graph(redundant, most):
    """Each costs a launch on a GPU: 22 a layer in an earlier design, 4 at most here."""
    tokens = []
    for sharded in (False, True):
        model, _ = load(str(SHIPPED))
        if sharded:
            strategy = "replicated" if redundant else "contiguous"
            placement = place_experts(np.ones(moe_shape(model)), 2, strategy, redundant)
            for layer, held in zip(moe_layers(model), placement.held, strict=True):
                layer.experts = ShardedExperts({1: store_of(layer.experts, held, 1)}, held)
            skip_slots(model, "masked")
        cache = make_prompt_cache(model)
        mx.eval(model(mx.array([[1, 2, 3]]), cache=cache))
        tokens.append(primitives(model(mx.array([[5]]), cache=cache)))
    added = tokens[1] - tokens[0]
    assert sum(added.values()) == most * len(moe_layers(model)), added
    assert not tokens[0] - tokens[1]


def test_masked_devices_in_one_process_compute_every_slot_each():
    model, _ = load(str(SHIPPED))
    shard_model(model, placed(model, 8))
    for selection, slots in (("compact", 8), ("masked", 64)):
        skip_slots(model, selection)
        for layer in moe_layers(model):
            layer.experts.slots_served[:] = 0
        mx.eval(model(mx.array([[5]])))
        assert [int(layer.experts.slots_served.sum()) for layer in moe_layers(model)] == [slots] * 4


def test_the_way_to_skip_slots_is_measured_away_from_the_cpu(monkeypatch):
    model = shard_model(random_model(), placed(random_model(), 2))
    assert measure_masked(moe_layers(model)) == 0
    monkeypatch.setattr("expert_parallel.device.masked.mx.default_device", lambda: mx.Device(mx.gpu))
    for quicker, most in (("masked", 512), ("compact", 0)):

        def waits(self, x, indices, quicker=quicker, way=None):
            time.sleep(0.0005 if way == quicker else 0.005)
            return x

        for way in ("compact", "masked"):
            monkeypatch.setattr(ShardedExperts, way, partialmethod(waits, way=way))
        assert measure_masked(moe_layers(model)) == most
        assert all(layer.experts.masked_up_to == most for layer in moe_layers(model))


@pytest.mark.parametrize(("compact", "most"), [(1.05, 0), (1.15, 512)])
def test_masked_must_be_a_tenth_quicker_on_the_device(compact, most, monkeypatch):
    """Of 64 tokens at most, eight slots each."""
    seconds = {"compact": compact, "masked": 1.0}
    monkeypatch.setattr("expert_parallel.device.masked.mx.default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr("expert_parallel.device.masked._quickest", lambda way, x, ids: seconds[way.__name__])
    model = shard_model(random_model(), placed(random_model(), 2))
    assert measure_masked(moe_layers(model)) == most
    monkeypatch.setattr(mx.distributed, "all_min", lambda mine, group: mx.minimum(mine, 64))  # as another rank found
    assert measure_masked(moe_layers(model), Rank()) == min(most, 64)
    assert {layer.experts.masked_up_to for layer in moe_layers(model)} == {min(most, 64)}


@pytest.mark.parametrize("devices", [1, 3, 16])
def test_adapters_on_experts_are_spread_too(devices):
    """A LoRA on the experts was dropped in silence: its rows kept the numbers of the whole layer."""
    model = random_model(quantize=True)
    linear_to_lora_layers(model, 3, {"rank": 4, "scale": 20.0, "dropout": 0.0})
    assert any("lora" in name for name in expert_tensors(moe_layers(model)[0].experts))
    model.update(
        tree_map_with_path(
            lambda path, a: mx.random.normal(a.shape) * 0.1 if "lora" in path else a, model.trainable_parameters()
        )
    )
    model.eval()
    expected = prefill_and_decode(model)
    shard_model(model, placed(model, devices))
    assert_identical(prefill_and_decode(model), expected)
    other = place_experts(np.zeros((3, 16)), devices, "round-robin")
    for layer, held in zip(moe_layers(model), other.held, strict=True):
        layer.experts.change(held)
    assert_identical(prefill_and_decode(model), expected)
    skip_slots(model, "masked")
    assert_identical(prefill_and_decode(model), expected)


class OddExperts(SwitchGLU):
    """Gives every expert a weight of its own that nothing but its number says."""

    def __call__(self, x, indices):
        return super().__call__(x, indices) * (1 + indices[..., None])


class HardlyOddExperts(OddExperts):
    """The same, by a thousandth: rounding to some, on the CPU it is another answer."""

    def __call__(self, x, indices):
        return SwitchGLU.__call__(self, x, indices) * (1 + 1e-3 * (indices[..., None] // 8))


class NormedExperts(SwitchGLU):
    """Carries a module for its block to use, as muse_spark's do."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.norm = nn.RMSNorm(64)


@pytest.mark.parametrize("kind", [OddExperts, HardlyOddExperts])
def test_experts_that_answer_otherwise_when_spread_are_refused(kind):
    if kind is HardlyOddExperts and mx.default_device() != mx.cpu:
        pytest.skip("a GPU may round otherwise")
    model = random_model()
    layer = moe_layers(model)[1]
    odd = kind(64, 64, 16)
    odd.update(layer.experts.parameters())
    layer.experts = odd
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.switch_mlp: its experts answer otherwise"):
        shard_model(model, placed(model, 2))


def test_what_stands_in_answers_for_the_attributes_of_what_it_replaces():
    model = random_model()
    layer = moe_layers(model)[0]
    layer.experts = NormedExperts(64, 64, 16)
    norm = layer.experts.norm.weight
    shard_model(model, placed(model, 3))
    assert mx.array_equal(moe_layers(model)[0].experts.norm.weight, norm)
    with record_routing(model):
        assert mx.array_equal(model.model.layers[0].mlp.switch_mlp.norm.weight, norm)
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        moe_layers(model)[0].experts.nothing_of_that_name  # noqa: B018


class Rank:
    """A group for what is decided without a collective."""

    def rank(self):
        return 0

    def size(self):
        return 2


class BlockWithMore(Qwen3MoeSparseMoeBlock):
    """Adds something of its own under a name that says nothing."""

    def __call__(self, x):
        return super().__call__(x) + 0.5 * x


def test_ranks_sum_what_is_split_and_nothing_that_each_has_whole():
    """step3p5 calls its shared expert share_expert; a rule over names summed it once per rank."""
    model = random_model()
    model.model.layers[1].mlp.__class__ = BlockWithMore
    placement = placed(model, 2)
    with pytest.raises(ValueError, match=r'"reduce" is not possible for model\.layers\.1.*use "gather"'):
        shard_model(model, placement, group=Rank(), combine="reduce")
    model = random_model()
    model.model.layers[1].mlp.__class__ = BlockWithMore
    shard_model(model, placement, group=Rank())
    assert [layer.experts.group is not None for layer in moe_layers(model)] == [False, True, False]
    assert [layer.block.sharding_group is None for layer in moe_layers(model)] == [False, True, False]
    gathering = shard_model(random_model(), placement, group=Rank(), combine="gather")
    assert all(layer.experts.group and layer.block.sharding_group is None for layer in moe_layers(gathering))
    with pytest.raises(ValueError, match='mlx-lm has sharded, whose sum needs combine "reduce"'):
        shard_model(random_model(), placement, group=Rank(), combine="gather", attention="sharded")


def test_layers_come_in_the_order_of_the_forward_pass():
    assert [layer.number for layer in moe_layers(random_model(num_hidden_layers=12))] == list(range(12))


def test_experts_that_answer_no_number_do_so_when_they_are_spread():
    model = random_model()
    experts = moe_layers(model)[1].experts
    experts.down_proj.weight = mx.where(mx.arange(16)[:, None, None] == 5, mx.nan, experts.down_proj.weight)
    assert moe_layers(shard_model(model, placed(model, 2)))[1].experts.num_experts == 16
