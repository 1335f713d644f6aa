"""Every MoE architecture of the installed mlx-lm, tiny: which there are, a configuration and a random model of each."""

import importlib
import pkgutil
import re
from pathlib import Path

import mlx.core as mx
import mlx_lm.models
import muse_spark_without_metal
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.cache import make_prompt_cache

LARGEST = 4_000_000  # parameters
PROMPT, NEXT = [1, 5, 9, 2, 7, 11, 3], [4]

# Fields by name, whatever the architecture; each takes those it knows, and its own defaults for all others.
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    # experts
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_top_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "num_shared_expert": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    # attention
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attention_bias": False,
    "use_bias": False,
    "use_qk_norm": True,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "sliding_window": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "index_head_dim": 32,
    "index_n_heads": 4,
    "index_topk": 4,
    # attention without scores, state spaces
    "full_attention_interval": 2,
    "layer_group_size": 2,
    "group_norm_size": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "linear_attn_config": {
        "kda_layers": [1, 3],
        "full_attn_layers": [2],
        "num_heads": 4,
        "head_dim": 32,
        "short_conv_kernel_size": 4,
    },
    # multipliers
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.25,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
}
ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
YARN = {"rope_theta": 10000.0, "type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}
GEMMA4 = {"enable_moe_block": True, "top_k_experts": 2, "global_head_dim": 32, "num_kv_shared_layers": 0}
GEMMA4 |= {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16, "use_double_wide_mlp": False}
LONGCAT = {"num_layers": 2, "ffn_hidden_size": 128, "expert_ffn_hidden_size": 64, "zero_expert_num": 2}
LONGCAT |= {"attention_method": "MLA", "zero_expert_type": "identity", "mla_scale_q_lora": True}
LONGCAT |= {"mla_scale_kv_lora": True, "ngram_vocab_size_ratio": 4}
MISTRAL4 = {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0}}
MAMBA = {"mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2, "mamba_n_heads": 4, "mamba_d_head": 32}
MAMBA |= {"mamba_n_groups": 1, "mamba_proj_bias": False, "mamba_conv_bias": True}

TYPES = {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}

# What single architectures need besides, or otherwise.
MORE = {
    "afmoe": TYPES,
    "bailing_moe_v3": {"num_key_value_heads": 4},
    "dbrx": {
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 8, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "topk_method": "greedy"},
    "deepseek_v41": {"o_groups": 2, "o_lora_rank": 32, "scoring_func": "sqrtsoftplus", "hc_mult": 4},
    "exaone_moe": {**TYPES, "is_moe_layer": [False, True, True]},
    "gemma4": TYPES | GEMMA4,
    "gemma4_text": TYPES | GEMMA4,
    "glm_moe_dsa": {"moe_layer_freq": 1, "rope_parameters": ROPE},
    "gpt_oss": TYPES,
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention", "mamba"]},
    "hunyuan": {"use_mixed_mlp_moe": True, "use_cla": False, "cla_share_factor": 2}
    | {"rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"}},
    "jamba": {**MAMBA, "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 0}
    | {"expert_layer_period": 2},
    "kimi_k3": {"routed_expert_hidden_size": 32, "latent_moe_use_norm": True, "attn_res_block_size": 2},
    "kimi_linear": {"model_max_length": 256},
    "lfm2_moe": {"use_expert_bias": True, "norm_eps": 1e-6, "conv_bias": False, "conv_L_cache": 3}
    | {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4": {
        "num_hidden_layers": 4,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 8,
        "interleave_moe_layer_step": 1,
    }
    | {"intermediate_size_mlp": 128},
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": LONGCAT,
    "mellum": {**TYPES, "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0, 1],
        "moe_layer_freq": [0, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 8,
        "layernorm_epsilon": 1e-6,
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 32,
        "swa_v_head_dim": 32,
    },
    "minimax": {"rotary_dim": 16},
    "minimax_m3_vl": {"dense_intermediate_size": 128, "moe_layer_freq": [0, 1, 1]},
    "mistral3": {**MISTRAL4, "model_type": "mistral4"},
    "mistral4": MISTRAL4,
    "muse_spark": {
        **TYPES,
        "post_norm_eps": 1e-6,
        "rope_parameters": ROPE,
        "layer_rope_theta": [10000.0, 0, 10000.0],
        "final_logit_softcapping": 30.0,
        "output_multiplier": 1.0,
        "moe_hidden_size": 32,
        "num_shared_experts": 0,
    },
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "mamba_proj_bias": False,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "n_groups": 1,
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-6,
        "use_conv_bias": True,
        "layers_block_type": ["mamba", "moe", "attention", "mlp", "moe"],
        "moe_latent_size": 32,
    },
    "phimoe": {
        "original_max_position_embeddings": 128,
        "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8, "long_mscale": 1.2, "short_mscale": 1.1},
    },
    "phixtral": {"num_vocab": 128, "model_dim": 64, "num_heads": 4, "num_layers": 2, "rotary_dim": 16},
    "step3p5": {"num_attention_groups": 2, "share_expert_dim": 64},
}
OUTSIDE = {  # beside the text_config
    "muse_spark": {"audio_config": {"out_hidden_size": SMALL["hidden_size"]}},
    "prism_hadamard_qwen35": {
        "tensor_namespace": "mlx-vlm-qwen3_5",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [{"path": "model.layers.1.self_attn.o_proj", "embedding": False, "block": 0, "dtype": "float16"}],
    },
}

SOURCES = {m.name: Path(m.module_finder.path, f"{m.name}.py") for m in pkgutil.iter_modules(mlx_lm.models.__path__)}


def architectures() -> list[str]:
    """Model files of mlx-lm with experts of their own, or with a part of such a file; by text: importing olmo exits."""
    text = {name: path.read_text() for name, path in SOURCES.items() if "class ModelArgs" in path.read_text()}
    found, before = {n for n, source in text.items() if re.search(r"Switch(GLU|MLP|Linear)|experts", source)}, set()
    while found != before:
        before = set(found)
        parts = re.compile(rf"^from \.({'|'.join(found)}) import|^from \. import .*\b({'|'.join(found)})\b", re.M)
        found |= {name for name, source in text.items() if parts.search(source)}
    return sorted(found, key=str.lower)


LISTED = ["dbrx"]  # experts in a list, which mlx-lm runs one by one
SPREAD = [name for name in architectures() if name not in LISTED]
WAYS = {"gather": {"combine": "gather"}, "reduce": {"combine": "reduce"}, "hybrid": {"attention": "sharded"}}


def small(name: str) -> dict:
    """A small configuration of an architecture, as config.json would have it."""
    more = MORE.get(name, {})
    module = importlib.import_module(f"mlx_lm.models.{name}")
    fields = {**SMALL, **more}
    if "text_config" in module.ModelArgs.__dataclass_fields__:
        fields = {"text_config": {"model_type": name, **fields}, "vocab_size": SMALL["vocab_size"]} | OUTSIDE.get(
            name, {}
        )
    return {**fields, "model_type": name}


def built(name: str):
    """mlx-lm's own model of a small configuration, with random weights in float32."""
    config = small(name)
    module = importlib.import_module(f"mlx_lm.models.{name}")
    if name == "muse_spark":
        muse_spark_without_metal.stand_in(module)
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    size = sum(array.size for _, array in tree_flatten(model.parameters()))
    assert size < LARGEST, f"{name} has {size:,} parameters: it takes its sizes from fields that are not in SMALL"

    def filled(_, array):
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        return mx.random.normal(array.shape) * 0.1 if array.ndim > 1 else array.astype(mx.float32)

    model.update(tree_map_with_path(filled, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def answers(model) -> list[mx.array]:
    """Logits for a prompt, and for one token after it."""
    cache = make_prompt_cache(model)
    logits = [model(mx.array([tokens]), cache=cache) for tokens in (PROMPT, NEXT)]
    mx.eval(logits)
    return logits
