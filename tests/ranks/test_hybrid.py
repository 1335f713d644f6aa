"""What is split besides experts: the output head row by row, and mlx-lm's own sharding, seen from each rank."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from checkpoints import Rank
from conftest import random_model
from mlx.utils import tree_flatten

from expert_parallel import place_experts, shard_model
from expert_parallel.layers import moe_layers
from expert_parallel.ranks.hybrid import ShardedHead, shard_rest


@pytest.fixture
def gathered(monkeypatch):
    """all_gather of ranks that are asked one after the other: call them all, then again with what each had given."""
    given = []

    def all_gather(y, group):
        given.append((group.rank(), y))
        return mx.concatenate([dict(given).get(rank, mx.zeros_like(y)) for rank in range(group.size())])

    monkeypatch.setattr(mx.distributed, "all_gather", all_gather)


@pytest.mark.parametrize("shape", [(2, 5, 64), (5, 64)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", ["float32", "quantised"])
def test_each_rank_has_its_rows_of_the_head_and_every_logit_is_the_whole_heads(kind, ranks, shape, gathered):
    """97 words over 8 ranks: 13 each, 6 on the last."""
    mx.random.seed(0)
    head = nn.Linear(64, 97, bias=False)
    head = nn.QuantizedLinear.from_linear(head, 32, 4) if kind == "quantised" else head
    x = mx.random.normal(shape)
    expected = head(x)
    copies = []
    for rank in range(ranks):
        copy = type(head)(64, 97, bias=False, **({"group_size": 32, "bits": 4} if kind == "quantised" else {}))
        copy.update({name: array + 0 for name, array in head.parameters().items()})
        copies.append(ShardedHead(copy, Rank(rank, ranks)))
    share = -(-97 // ranks)
    assert [len(copy.part.weight) for copy in copies] == [share] * (ranks - 1) + [97 - share * (ranks - 1)]
    for copy in copies:
        copy(x)
    for copy in copies:
        assert mx.array_equal(copy(x), expected)


def test_a_rank_has_its_heads_and_stands_ins_for_experts():
    """Two of four heads, one of two key-value heads; experts wait to be spread over ranks themselves."""
    for rank in (0, 1):
        model, whole = random_model(), random_model()
        layers = moe_layers(model)
        shard_rest(model, layers, Rank(rank, 2))
        attention, stock = model.layers[0].self_attn, whole.layers[0].self_attn
        assert mx.array_equal(attention.q_proj.weight, stock.q_proj.weight[32 * rank : 32 * rank + 32])
        assert mx.array_equal(attention.o_proj.weight, stock.o_proj.weight[:, 32 * rank : 32 * rank + 32])
        assert (attention.n_heads, attention.n_kv_heads) == (2, 1)
        assert mx.array_equal(model.lm_head.part.weight, whole.lm_head.weight[49 * rank : 49 * rank + 49])
        for layer in moe_layers(model):
            assert layer.block.sharding_group.rank() == rank
            assert sum(array.size for _, array in tree_flatten(layer.experts.parameters())) < 64


def test_a_head_that_is_no_plain_one_stays():
    for changes in ({"tie_word_embeddings": True}, {}):
        model = random_model(**changes)
        if not changes:
            model.lm_head = nn.Linear(64, 97, bias=True)
        shard_rest(model, moe_layers(model), Rank(0, 2))
        assert not isinstance(getattr(model, "lm_head", None), ShardedHead)


def test_what_cannot_be_split_is_refused():
    model = random_model(num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(ValueError, match=r"self_attn has 4 heads \(n_heads\), which do not divide over 3 ranks; use"):
        shard_model(model, place_experts([[1] * 16] * 3, 3), Rank(0, 3), attention="sharded")
    model = random_model()
    type(model).shard, original = None, type(model).shard
    try:
        with pytest.raises(ValueError, match="mlx-lm cannot shard the attention over 2 ranks: 'NoneType'"):
            shard_rest(model, moe_layers(model), Rank(0, 2))
        del type(model).shard
        with pytest.raises(ValueError, match="cannot shard the attention of this architecture"):
            shard_rest(model, moe_layers(model), Rank(0, 2))
    finally:
        type(model).shard = original
