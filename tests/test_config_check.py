"""Configurations that cannot be: every one gets one line that names the field."""

import json
import math

import pytest
from conftest import CONFIG

from expert_parallel.architecture import describe
from expert_parallel.lazy_model import Configuration, load_configuration, shortened


def refusal(config):
    with pytest.raises(ValueError) as caught:
        describe(Configuration("x", config))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(**changes):
    return {k: v for k, v in {**CONFIG, **changes}.items() if v is not ...}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "bert"}, '"bert"'),
        ({"model_type": "cache"}, '"cache"'),  # a module of mlx-lm, but of no architecture
        ({"mlp_only_layers": [0, 1, 2]}, "dense"),
        ({"hidden_size": ..., "num_attention_heads": ...}, "lacks hidden_size, num_attention_heads"),
        ({"num_experts_per_tok": ...}, "lacks num_experts_per_tok"),
        ({"num_experts": ..., "num_local_experts": 16}, "it has num_local_experts"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok = 17, but num_experts = 16"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok = null"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 is not a multiple of num_key_value_heads = 3"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers = 1000000000000, which is not in 1 to 10,000"),
        ({"num_experts": 10**9}, "num_experts = 1000000000"),
        ({"tie_word_embeddings": "no"}, 'tie_word_embeddings = "no", which is not true or false'),
        ({"torch_dtype": ["float32"]}, 'torch_dtype = ["float32"]'),
        ({"text_config": 7}, "text_config = 7"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
        ({"rms_norm_eps": "small"}, 'rms_norm_eps = "small"'),
        ({"rope_scaling": "yarn"}, 'rope_scaling = "yarn"'),
        ({"quantization": "4bit"}, 'quantization = "4bit"'),
        ({"quantization": {"group_size": 64}}, "bits = null"),
        ({"quantization": {"group_size": 64, "bits": True}}, "bits = true"),
        ({"quantization": {"group_size": 0, "bits": 4}}, "group_size = 0"),  # mlx divides by it
        ({"quantization": {"group_size": 10**12, "bits": 4}}, "group_size = 1000000000000"),
        ({"quantization": {"group_size": 64, "bits": 7}}, '"bits": 7'),
        ({"quantization": {"group_size": 48, "bits": 4}}, "supported group sizes are 32, 64, and 128"),
        ({"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp9"}}, '"mxfp9"'),
        ({"quantization": {"group_size": 32, "bits": 4, "lm_head": {"group_size": 32, "bits": 9}}}, "of lm_head"),
        ({"quantization": {"group_size": 128, "bits": 4}}, "groups of 128 divide no weight"),
        ({"quantization_config": "awq"}, 'quantization_config = "awq"'),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors cannot be read"),
        ({"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": 3}}, "excepts 3"),
    ],
    ids=str,
)
def test_the_field_is_named(changes, words):
    assert words in refusal(changed(**changes))


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size", "num_experts", "head_dim"])
@pytest.mark.parametrize("value", ["64", -1, 1.5, math.nan, True, [], {}, None], ids=str)
def test_counts_are_whole_numbers(field, value):
    assert f"{field} = " in refusal(changed(**{field: value}))


@pytest.mark.parametrize(
    ("name", "place", "field", "value"),
    [
        ("mixtral-8x7b", None, "num_attention_heads", 24),  # 4096 / 24 is no whole number, and there is no head_dim
        ("deepseek-v3", None, "topk_group", "x"),
        ("deepseek-v3", None, "n_group", None),
        ("gpt-oss-20b", None, "sliding_window", 0),
        ("gpt-oss-20b", "rope_scaling", "beta_slow", -1),
        ("gpt-oss-20b", None, "rope_scaling", {"type": "yarn"}),
        ("gpt-oss-20b", None, "rope_scaling", {"type": "spiral", "factor": 2}),
        ("llama-4-scout", "text_config", "num_hidden_layers", None),
        ("llama-4-scout", "text_config", "num_experts_per_tok", 17),
        ("llama-4-scout", "text_config", "rope_theta", []),
    ],
)
def test_other_architectures_and_inner_fields(name, place, field, value):
    config = shortened(load_configuration(name).config, 4)
    inner = {**config.get(place, {}), field: value} if place else value
    assert (place if place == "rope_scaling" else field) in refusal({**config, place or field: inner})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[1, 2]", "no JSON object, but [1, 2]"),
        (b'{"hidden_size": 1}', "no model_type"),
        (b'{"model_type": 3}', "no model_type"),
        (b'{"model_type": "\xff"}', "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_files_that_hold_no_configuration(content, words, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="config.json") as caught:
        load_configuration(str(path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_null_where_it_means_nothing_is_said():
    config = changed(quantization_config=None, rope_scaling=None, torch_dtype=None, sliding_window=None)
    assert describe(Configuration("x", json.loads(json.dumps(config)))).num_experts == 16
