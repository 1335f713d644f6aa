"""Checkpoints of small random models in every layout, and a group for what is decided without a collective."""

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import _get_classes, quantize_model
from tokenizers import Tokenizer, models, pre_tokenizers

from expert_parallel.checkpoint.tensors import INDEX

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES |= {"vocab_size": 96, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "num_experts_per_tok": 3}
SIZES |= {"tie_word_embeddings": False, "max_position_embeddings": 128, "eos_token_id": 0, "intermediate_size": 64}
QWEN3 = {
    **SIZES,
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "moe_intermediate_size": 64,
    "head_dim": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
MIXTRAL = {**SIZES, "model_type": "mixtral", "num_local_experts": 8}
GRANITE = {
    **SIZES,
    "model_type": "granitemoe",
    "num_local_experts": 8,
    "attention_bias": False,
    "logits_scaling": 1.0,
    "attention_multiplier": 0.2,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
}
# At 4 bits an expert's 64 x 64 matrix is 2048 B and 64 groups of 2 + 2 B; it has three of them.
EXPERT_BYTES = 3 * (2048 + 256)
PER_EXPERT = {"qwen3_moe": {}, "mixtral": {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}}


def save(folder: Path, config: dict, quantised: bool, dtype=mx.float32, layout="mlx", num_files=1) -> Path:
    """A checkpoint of small random weights. layout: mlx, per-expert (Hugging Face) or fused (granitemoe's own)."""
    mx.random.seed(1)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    model.set_dtype(dtype)
    if quantised:
        model, config = quantize_model(model, config, 64, 4)
    weights = {}
    for name, array in tree_flatten(model.parameters()):
        block, switch, tail = name.partition(".switch_mlp.")
        if not switch or layout == "mlx":
            weights[name] = array
        elif layout == "per-expert":
            projection, kind = tail.split(".")
            projection = PER_EXPERT[config["model_type"]].get(projection, projection)
            for expert, rows in enumerate(array):
                weights[f"{block}.experts.{expert}.{projection}.{kind}"] = mx.contiguous(rows)
        elif tail == "down_proj.weight":
            weights[f"{block}.output_linear.weight"] = array
        elif tail == "gate_proj.weight":
            up = dict(model.named_modules())[f"{block}.switch_mlp"].up_proj.weight
            weights[f"{block}.input_linear.weight"] = mx.concatenate([array, up], axis=1)
    folder.mkdir(parents=True)
    names, place = sorted(weights), {}
    for number in range(num_files):
        file = "model.safetensors" if num_files == 1 else f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        part = {name: weights[name] for name in names[number::num_files]}
        mx.save_safetensors(str(folder / file), part, metadata={"format": "mlx"})
        place |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = {"<end>": 0, **{f"w{n}": n for n in range(1, 96)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"})
    )
    return folder


LAYOUTS = {
    "mlx-4bit": {"config": QWEN3, "quantised": True, "dtype": mx.bfloat16},
    "mlx-float32": {"config": QWEN3, "quantised": False},
    "mlx-4bit-3-files": {"config": QWEN3, "quantised": True, "dtype": mx.bfloat16, "num_files": 3},
    "hf-bf16-2-files": {
        "config": QWEN3,
        "quantised": False,
        "dtype": mx.bfloat16,
        "layout": "per-expert",
        "num_files": 2,
    },
    "mixtral-hf-4bit": {"config": MIXTRAL, "quantised": True, "dtype": mx.bfloat16, "layout": "per-expert"},
    "granite-fused": {"config": GRANITE, "quantised": False, "dtype": mx.bfloat16, "layout": "fused"},
}


class Rank:
    """A group as loading sees it; what ranks agree on while they load, see conftest.py."""

    def __init__(self, rank, size):
        self._rank, self._size = rank, size

    def rank(self):
        return self._rank

    def size(self):
        return self._size


def adapter(folder, model, layers=2, **settings):
    """A LoRA of random numbers, on experts and attention alike (or `keys`), as mlx_lm.lora saves it."""
    settings = {"rank": 4, "scale": 20.0, "dropout": 0.0, **settings}
    linear_to_lora_layers(model, layers, settings)
    arrays = {name: array for name, array in tree_flatten(model.parameters()) if "lora" in name}
    arrays = {
        name: mx.random.normal(array.shape, key=mx.random.key(n)) * 0.05
        for n, (name, array) in enumerate(arrays.items())
    }
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    about = {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": settings}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder, arrays
