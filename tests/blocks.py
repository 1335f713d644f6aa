"""Small models of mlx-lm's other architectures, with random weights."""

import importlib

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 24,
         "shared_expert_intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
         "rms_norm_eps": 1e-6, "vocab_size": 97, "num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 3,
         "rope_theta": 1e4, "sliding_window": 64, "tie_word_embeddings": False, "decoder_sparse_step": 1,
         "mlp_only_layers": [], "max_position_embeddings": 99, "norm_topk_prob": True, "rotary_dim": 16,
         "shared_intermediate_size": 24, "linear_num_value_heads": 2, "linear_num_key_heads": 2,
         "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
         "partial_rotary_factor": 0.5, "logits_scaling": 1.0, "attention_multiplier": 1.0,
         "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_bias": False}  # fmt: skip
DEEPSEEK = {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1,
            "routed_scaling_factor": 1.0, "kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8,
            "v_head_dim": 8, "qk_nope_head_dim": 8, "moe_layer_freq": 1, "first_k_dense_replace": 0}  # fmt: skip


def small_model(kind, **changes):
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict({"model_type": kind, **SMALL, **changes}))
    model.update(tree_map(lambda a: mx.random.normal(a.shape) * 0.3, model.parameters()))
    mx.eval(model.parameters())
    return model


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)


# Whether weights are probabilities over the chosen experts alone.
KINDS = {"olmoe": False, "qwen2_moe": False, "mixtral": True, "gpt_oss": True, "qwen3_moe": True}
