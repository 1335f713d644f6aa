import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.qwen3_moe import Model, ModelArgs

from expert_parallel import Placement, place_experts, shard_model
from expert_parallel.models.memory import live_expert_bytes, model_bytes, stored_as

SMALL = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
    "moe_intermediate_size": 32,
    "rms_norm_eps": 1e-6,
    "vocab_size": 100,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
    "norm_topk_prob": True,
}


@pytest.fixture
def model():
    return Model(ModelArgs.from_dict(SMALL))


def test_bytes_by_hand(model):
    """float32: an expert is 3 x 64 x 32 values; layer 1 is dense."""
    found = model_bytes(model)
    assert found.num_experts == 6
    assert found.expert_bytes.tolist() == [3 * 64 * 32 * 4] * 2
    attention = 64 * 64 * 2 + 64 * 32 * 2 + 2 * 16 + 2 * 64  # q o, k v, norms of heads, norms of the layer
    rest = 3 * attention + 2 * 6 * 64 + 3 * 64 * 128 + 2 * 100 * 64 + 64
    assert found.rest == rest * 4
    assert found.experts == 6 * 2 * 3 * 64 * 32 * 4
    assert found.total == found.experts + found.rest


def test_quantised_bytes_by_hand(model):
    """4 bit, groups of 32, float32 scale and bias: 4 + 2 bits of 32-bit words a value."""
    nn.quantize(
        model,
        group_size=32,
        bits=4,
        class_predicate=lambda path, _: path.endswith(("gate_proj", "up_proj", "down_proj")) and "switch" in path,
    )
    assert model_bytes(model).expert_bytes.tolist() == [3 * 64 * 32 // 2 + 3 * 64 * 32 // 32 * 8] * 2


def test_what_devices_hold_predicted_and_live(model):
    weighed = model_bytes(model)
    held = np.zeros((2, 3, 6), dtype=bool)
    held[:, 0, :2] = held[:, 1, 2:4] = held[:, 2, 4:] = True
    held[0, 2, 0] = True  # a second copy of expert 0 in the first MoE layer
    placement = Placement(held)
    one = 3 * 64 * 32 * 4
    assert weighed.per_device(placement).tolist() == [4 * one, 4 * one, 5 * one]
    assert live_expert_bytes(model).tolist() == [weighed.experts]
    shard_model(model, placement)
    assert live_expert_bytes(model).tolist() == weighed.per_device(placement).tolist()
    again = model_bytes(model)  # a sharded model weighs the same, copies and all
    assert (again.total, again.rest, again.num_experts) == (weighed.total, weighed.rest, 6)


def test_refuses_a_dense_model():
    dense = Model(ModelArgs.from_dict({**SMALL, "mlp_only_layers": [0, 1, 2]}))
    for weigh in (model_bytes, live_expert_bytes):
        with pytest.raises(ValueError, match="no Mixture-of-Experts"):
            weigh(dense)


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (lambda path: 4, "experts 4-bit in groups of 32, the rest also float32"),
        (lambda path: 8 if "switch_mlp" in path else 4, "experts 8-bit in groups of 32, the rest 4-bit, float32"),
        (lambda path: 8 if path.endswith("mlp.gate") else 4,
         "experts 4-bit in groups of 32, the rest also float32, 8-bit (gate)"),
        (lambda path: 6 if "down_proj" in path else 4, "experts 4-bit in groups of 32, 6-bit (down_proj), the rest"),
        (lambda path: 8 if path.endswith(("q_proj", "mlp.gate")) else 4,
         "experts 4-bit in groups of 32, the rest also 8-bit (gate and q_proj), float32"),
        (lambda path: 8 if path.endswith(("q_proj", "k_proj", "mlp.gate")) else 4,
         "experts 4-bit in groups of 32, the rest also 8-bit, float32"),
        (lambda path: None, "float32"),
    ],
)  # fmt: skip
def test_what_experts_and_the_rest_are_stored_as(model, bits, words):
    """With bits of their own for some modules the default's were said of all."""

    def decide(path, module):
        fits = bits(path) and hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
        return fits and {"bits": bits(path), "group_size": 32}

    nn.quantize(model, class_predicate=decide)
    assert stored_as(model).startswith(words) and stored_as(model).count(" (") == words.count(" (")
    shard_model(model, place_experts(np.ones((2, 6)), 3))
    assert stored_as(model).startswith(words)
