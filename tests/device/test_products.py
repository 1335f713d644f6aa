"""Products that go other ways than mlx's own: every bit is the same, and where it is not they are not taken."""

import copy
import math
import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from blocks import small_model
from checkpoints import Rank
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from expert_parallel import place_experts, shard_model
from expert_parallel.device import products, trials
from expert_parallel.device.lanes import Lanes, useful_lanes
from expert_parallel.device.products import EXPERTS, LINEAR, Plan
from expert_parallel.layers import moe_layers, moe_shape, projections

PACKED = ({}, {"bits": 4}, {"bits": 8, "group_size": 32}, {"bits": 3, "group_size": 128}, {"mode": "mxfp4"})


@pytest.fixture(autouse=True)
def small_trials(monkeypatch):
    """Rows in more than one piece; no plan from another test."""
    monkeypatch.setattr(products, "DENSE", 16 * 128)
    monkeypatch.setattr(trials, "_plans", {})


@pytest.fixture
def always(monkeypatch):
    """Every way is found quicker from the first token on; whether its bits are the same is still found by trial."""
    monkeypatch.setattr(trials, "from_tokens", lambda *ways, **how: 1)
    monkeypatch.setattr(trials, "slots_from", lambda sharded, lanes: 0)


def linear(bias, packing):
    mx.random.seed(1)
    layer = nn.Linear(128, 44, bias=bias)
    layer.update({name: mx.random.normal(array.shape) for name, array in layer.items()})
    return nn.QuantizedLinear.from_linear(layer, **packing) if packing else layer


@pytest.mark.parametrize("plan", [(1, math.inf), (math.inf, 1), (1, 1)], ids=["split", "together", "both"])
@pytest.mark.parametrize("packing", PACKED, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_to_the_bit(bias, packing, plan, always):
    layer = linear(bias, packing)
    lanes = Lanes(3)  # 44 rows do not divide by it
    found = trials.plans_of_linear([layer], lanes)[0]
    by_groups = "mode" in packing  # which mlx adds up group by group
    assert found == Plan(1, math.inf if by_groups else 1, mx.float32)
    if plan[1] < found.together_from:
        return
    for shape in ((1, 128), (1, 1, 128), (2, 35, 128), (130, 128)):
        x = mx.random.normal(shape, key=mx.random.key(shape[0]))
        expected = layer(x)
        quick = linear(bias, packing)
        trials._install(quick, products.Product(Plan(*plan, mx.float32), lanes))
        assert type(quick) is LINEAR[type(layer)] and isinstance(quick, type(layer))
        assert list(quick.parameters()) == list(layer.parameters())
        assert mx.array_equal(quick(x), expected) and quick(x).shape == expected.shape
        columns_last = mx.contiguous(x.swapaxes(-1, 0)).swapaxes(-1, 0)  # not in the order of its rows
        assert mx.array_equal(quick(columns_last), layer(columns_last))


@pytest.mark.parametrize("sharding", ["all-to-sharded", "sharded-to-all"])
@pytest.mark.parametrize("packing", PACKED[:2], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_layers_of_tensor_parallelism_to_the_bit(bias, packing, sharding, always):
    """Over a group of one, whose sum is what comes in; the sum is asked for once a call, whatever way it goes."""
    group, x = mx.distributed.init(), mx.random.normal((2, 20, 128))
    layer, quick = (nn.layers.distributed.shard_linear(linear(bias, packing), sharding, group=group) for _ in "ab")
    quick.update(layer.parameters())
    plan = trials.plans_of_linear([layer], Lanes(1))[0]
    assert plan.together_from == 1
    trials._install(quick, products.Product(Plan(math.inf, 2, mx.float32), Lanes(1)))
    assert type(quick) is LINEAR[type(layer)]
    assert mx.array_equal(quick(x), layer(x)) and mx.array_equal(quick(x[:1, :1]), layer(x[:1, :1]))


@pytest.mark.parametrize("packing", PACKED)
def test_rows_are_dense_in_pieces_as_equal_as_can_be(packing):
    layer = linear(False, packing)  # 16 rows of 128 numbers at a time, see above
    found = products.pieces(layer, slice(3, 44))
    assert [row for piece in found for row in range(44)[piece]] == list(range(3, 44))
    assert [len(range(44)[piece]) for piece in found] == [13, 14, 14]
    assert [len(y) for y in products.together(layer, slice(3, 44), mx.ones((128, 2)))] == [13, 14, 14]
    assert [len(range(44)[piece]) for piece in products.pieces(layer, slice(3, 44), 5)] == [8, 8, 8, 8, 9]


class Noted(Lanes):
    """Whose turn it was."""

    def __init__(self, count):
        super().__init__(count)
        self.turns = []

    def __call__(self, n):
        self.turns.append(n % self.count)
        return super().__call__(n)


@pytest.mark.parametrize(("count", "turns"), [(44, [0, 1, 0]), (16, [0, 1])])
def test_lanes_take_turns_at_pieces(count, turns):
    """Mlx starts tasks in the order of a result's parts and has few under way: a lane after the other would wait."""
    layer, lanes, x = products.rows(linear(True, {"bits": 4}), slice(0, count)), Noted(2), mx.random.normal((4, 128))
    quick = products.Product(Plan(1, 1, mx.float32), lanes)
    assert mx.array_equal(quick(layer, x, None), layer(x)) and lanes.turns == turns


def test_other_bits_are_never_taken(monkeypatch):
    """What is off by one in the last place for one token of many is found, however quick it is."""
    layer, right = linear(False, {"bits": 4}), products.together
    monkeypatch.setattr(trials, "from_tokens", lambda *ways, **how: 1)
    assert trials.plans_of_linear([layer], Lanes(2))[0] == Plan(1, 1, mx.float32)

    def wrong(module, at, columns, *expert):
        *parts, y = right(module, at, columns, *expert)
        return [*parts, y.at[-1, -1].add(mx.abs(y[-1, -1]) * 1e-6) if columns.shape[1] > 1 else y]

    def split_wrong(parts, lanes, x):
        return mx.concatenate([part(x) for part in reversed(parts)], axis=-1)

    monkeypatch.setattr(trials, "together", wrong)
    monkeypatch.setattr(trials, "split", split_wrong)
    monkeypatch.setattr(trials, "_plans", {})
    assert trials.plans_of_linear([layer], Lanes(2))[0] == Plan(math.inf, math.inf, mx.float32)
    stack = SwitchMLP(64, 32, 4).fc1
    assert trials.plan_of_experts(stack, Lanes(1)) == Plan(math.inf, math.inf, mx.float32)


def test_what_is_not_quicker_is_not_taken(monkeypatch):
    layer, taken = linear(False, {"bits": 4}), []

    monkeypatch.setattr(trials, "_in_lanes", lambda way, lanes, busy: way)

    def seconds(plain, quick, x, gain):
        taken.append(len(x))
        assert isinstance(plain, nn.Module) and not isinstance(quick, nn.Module)
        return 1.0 * len(x), 20.0 + len(x) / 2  # is 1.2 times as quick from 60 tokens on

    monkeypatch.setattr(trials, "_seconds", seconds)
    assert trials.plans_of_linear([layer], Lanes(1))[0] == Plan(math.inf, 64, mx.float32)
    assert taken == [1, 8, 16, 32, 64, 64]  # twice, where it is
    monkeypatch.setattr(trials, "BRIEF", 65)
    monkeypatch.setattr(trials, "_plans", {})
    assert trials.plans_of_linear([layer], Lanes(1))[0] == Plan(math.inf, math.inf, mx.float32)
    assert taken[6:] == [1, 8, 16, 32, 64]


@pytest.mark.parametrize("kind", [SwitchGLU, SwitchMLP])
@pytest.mark.parametrize("packing", PACKED[:4], ids=str)
def test_experts_to_the_bit(kind, packing, always):
    """Long runs of slots of one expert together, short ones as mlx-lm has it, in any order of experts."""
    mx.random.seed(2)
    layer = kind(128, 256, 6, bias=True)
    layer.update({n: {m: mx.random.normal(a.shape) for m, a in part.items()} for n, part in projections(layer)})
    if packing:
        nn.quantize(layer, **packing, class_predicate=lambda _, m: hasattr(m, "to_quantized"))
    x = mx.random.normal((61, 128))
    ids = np.random.default_rng(0).choice(6, (61, 3), p=[0.5, 0.3, 0.1, 0.05, 0.03, 0.02])
    expected = layer(x, mx.array(ids))
    for _, stack in projections(layer):
        assert trials.plan_of_experts(stack, Lanes(1)).together_from == 1
        trials._install(stack, products.ProductOfExperts(Plan(math.inf, 10, mx.float32)))
        assert type(stack) in EXPERTS.values()
    counts = np.bincount(ids.reshape(-1), minlength=6)
    assert counts.max() > 10 > counts.min() > 0
    assert mx.array_equal(layer(x, mx.array(ids)), expected)
    assert mx.array_equal(layer(x[:3], mx.array(ids[:3])), expected[:3])  # too few to be sorted


def test_a_row_for_three_lanes(always):
    gate = nn.QuantizedLinear(64, 1, bias=False)
    x, expected = mx.ones((5, 64)), nn.QuantizedLinear.__call__(gate, mx.ones((5, 64)))
    lanes = Lanes(3)
    trials._install(gate, products.Product(trials.plans_of_linear([gate], lanes)[0], lanes))
    assert mx.array_equal(gate(x), expected)
    assert [len(range(*at.indices(9))) for at in products.equal_parts(7, 3)] == [2, 2, 3]


def test_new_weights_are_followed():
    quick, other = linear(False, {"bits": 4}), linear(False, {"bits": 4})
    trials._install(quick, products.Product(Plan(1, math.inf, mx.float32), Lanes(2)))
    x = mx.random.normal((1, 128))
    quick(x)
    other.scales = other.scales * 2
    quick.update({"scales": other.scales})
    assert mx.array_equal(quick(x), other(x))


def test_a_split_that_does_not_pay_is_not_tried_with_ever_more_tokens(monkeypatch):
    """More would not change what is quicker; mlx's products of float16 take a hundred times as long as of float32."""
    taken = []
    monkeypatch.setattr(trials, "_seconds", lambda *of: taken.append(len(of[2])) or (trials.LONG * taken[-1] / 8,) * 2)
    monkeypatch.setattr(trials, "together", lambda module, at, columns: [mx.zeros((1, 1))])  # other bits
    assert trials.plans_of_linear([linear(False, {"bits": 4})], Lanes(2))[0] == Plan(math.inf, math.inf, mx.float32)
    assert taken == [1, 8, 16] * 2  # once more, for something else may have run beside it


def test_types_without_a_trial_go_as_before():
    quick, layer = linear(False, {}), linear(False, {})
    trials._install(quick, products.Product(Plan(math.inf, 1, mx.float32), Lanes(2)))
    x = mx.random.normal((40, 128)).astype(mx.bfloat16)
    assert mx.array_equal(quick(x), layer(x))


def test_lanes_belong_to_their_thread():
    lanes, found = Lanes(2), []
    x = mx.ones((4, 4))
    mx.eval(x)

    def compute():
        with lanes(1):
            y = x @ x
        mx.eval(y)
        found.append(y.sum().item())

    for _ in range(2):
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
    assert found == [64, 64]
    assert 1 <= useful_lanes(8) <= 8 and useful_lanes(1) == 1


# --- whole models ------------------------------------------------------------------------------------------------


def logits(model):
    prompt = mx.array(np.random.default_rng(0).integers(0, 97, (2, 50)))
    cache = model.make_cache() if hasattr(model, "make_cache") else None
    return [model(prompt), model(prompt[:, :1]), model(prompt[:1, :7], cache=cache)]


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen2_moe", "gpt_oss", "olmoe"])
@pytest.mark.parametrize("streams", ["auto", "on"])
def test_a_model_to_the_bit(kind, streams, always):
    expected = logits(small_model(kind))
    for devices in (1, 3):
        model = small_model(kind)
        shard_model(model, place_experts(np.zeros(moe_shape(model)), devices), streams=streams)
        for got, right in zip(logits(model), expected, strict=True):
            assert mx.array_equal(got, right)
        quick = [module for module in model.modules() if hasattr(module, "_product")]
        assert len(quick) > len(moe_layers(model)) * 3
        assert trials.in_words(model).count("token") > 1


def test_an_embedding_that_is_the_head_is_split(always):
    tied = {"tie_word_embeddings": True}
    expected, model = logits(small_model("qwen3_moe", **tied)), small_model("qwen3_moe", **tied)
    shard_model(model, place_experts(np.zeros(moe_shape(model)), 2))
    assert isinstance(model.model.embed_tokens, products.HEAD[nn.Embedding])
    for got, right in zip(logits(model), expected, strict=True):
        assert mx.array_equal(got, right)
    untied = shard_model(small_model("qwen3_moe"), place_experts(np.zeros((2, 8)), 2))
    assert type(untied.model.embed_tokens) is nn.Embedding


def test_ranks_take_the_least_that_any_of_them_found(always, monkeypatch):
    """Otherwise their graphs differ, and with them the order of pending collectives."""
    other = lambda found, group: mx.where(mx.arange(found.shape[0])[:, None] == 0, math.inf, mx.maximum(found, 5))  # noqa: E731
    monkeypatch.setattr(mx.distributed, "all_max", other)
    model = shard_model(small_model("qwen3_moe"), place_experts(np.zeros((2, 8)), 2), Rank(0, 2))
    linear = [module for module in model.modules() if type(module) in (*LINEAR, *LINEAR.values())]
    found = [m._product.plan.together_from if hasattr(m, "_product") else math.inf for m in linear]
    assert found == [math.inf, *[5] * (len(linear) - 1)] and len(linear) > 8
    assert f"{len(linear) - 1} of {len(linear)} linear layers" in trials.in_words(model)  # without the embedding
    assert "from 5 tokens on" in trials.in_words(model)


def test_off_leaves_mlx_lm_as_it_is(always, monkeypatch):
    monkeypatch.setattr(mx, "new_stream", pytest.fail)
    model = shard_model(small_model("qwen3_moe"), place_experts(np.zeros((2, 8)), 2), streams="off")
    assert not [module for module in model.modules() if hasattr(module, "_product")]
    assert trials.in_words(model) is None


def test_a_copy_of_a_model_is_one_of_its_own(always):
    model = shard_model(small_model("qwen3_moe"), place_experts(np.zeros((2, 8)), 2), streams="on")
    expected, other = logits(model), copy.deepcopy(model)
    quick = [module._product for module in model.modules() if hasattr(module, "_product")]
    copied = [module._product for module in other.modules() if hasattr(module, "_product")]
    assert len(quick) == len(copied) > 8 and [each.plan for each in quick] == [each.plan for each in copied]
    other.lm_head.weight = other.lm_head.weight * 2
    for got, right in zip(logits(other), expected, strict=True):
        assert mx.array_equal(got, right * 2)
    for got, right in zip(logits(model), expected, strict=True):
        assert mx.array_equal(got, right)


def test_experts_that_move_go_the_same_ways(always):
    model, expected = small_model("qwen3_moe"), logits(small_model("qwen3_moe"))
    shard_model(model, place_experts(np.zeros((2, 8)), 2))
    for layer in moe_layers(model):
        held = layer.experts.held[:, ::-1].copy()
        layer.experts.change(held)
        assert all(type(stack) in EXPERTS.values() for s in layer.experts.stores for _, stack in projections(s.experts))
    for got, right in zip(logits(model), expected, strict=True):
        assert mx.array_equal(got, right)


def test_a_split_that_did_not_look_quicker_is_tried_once_more_after_all_others(monkeypatch):
    asked, split_from = [], {40: [math.inf, 8], 44: [1], 48: [math.inf, math.inf]}

    def from_tokens(plain, quick, module, gain=None, longest=math.inf):
        rows = len(module["weight"])
        asked.append((rows, longest < math.inf))
        return split_from[rows].pop(0) if longest < math.inf else math.inf

    monkeypatch.setattr(trials, "_plans", {})
    monkeypatch.setattr(trials, "from_tokens", from_tokens)
    model = nn.Sequential(nn.Linear(8, 40), nn.Linear(40, 44), nn.Linear(44, 48), nn.Linear(8, 40))
    trials.quicken_products(model, Lanes(2))
    tries = [sorted(asked[:3]), sorted(asked[3:5]), sorted(asked[5:])]
    of_split, of_many = ([(rows, split) for rows in (40, 44, 48)] for split in (True, False))
    assert tries == [of_split, [(40, True), (48, True)], of_many]
    assert [layer._product.plan.split_from for layer in model.layers if hasattr(layer, "_product")] == [8, 1, 8]
