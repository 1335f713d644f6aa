"""What this project takes of mlx-lm, name by name: where a new version moves one, this says which."""

import ast
import importlib
import inspect

import mlx.core as mx
import pytest
from conftest import ROOT, random_model
from mlx_lm import utils
from mlx_lm.models.cache import KVCache
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from expert_parallel.models.parts import CACHE_STEP
from expert_parallel.projection.step import PREFILL_CHUNK

generate = importlib.import_module("mlx_lm.generate")  # its package has a function of this name
SOURCES = [*(ROOT / "expert_parallel").rglob("*.py"), *(ROOT / "tools").glob("*.py"), *ROOT.glob("*.py")]
TAKEN = {
    (node.module, alias.name, str(path.relative_to(ROOT)))
    for path in SOURCES
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").partition(".")[0] == "mlx_lm"
    for alias in node.names
}
ARGUMENTS = [
    (utils.load_model, "lazy strict get_model_classes trust_remote_code"),
    (utils.load_tokenizer, "tokenizer_config_extra eos_token_ids"),
    (utils.load_adapters, "adapter_path"),
    (utils.quantize_model, "group_size bits mode"),
    (generate.stream_generate, "stream max_tokens"),
    (generate.generate_step, "sampler prompt_cache stream kv_bits quantized_kv_start prefill_step_size"),
    (SwitchGLU, "input_dims hidden_dims num_experts bias"),
    (SwitchMLP, "input_dims hidden_dims num_experts bias"),
]


@pytest.mark.parametrize(("module", "name", "path"), sorted(TAKEN))
def test_a_name_is_where_it_was(module, name, path):
    assert hasattr(importlib.import_module(module), name), f"{name} left {module}, {path} needs it"


def test_private_names_are_taken_in_one_place():
    private = {(name, path) for _, name, path in TAKEN if name.startswith("_") and not path.startswith("tools")}
    assert private == {(name, "expert_parallel/checkpoint/finding.py") for name in ("_download", "_get_classes")}


@pytest.mark.parametrize(("function", "names"), ARGUMENTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_function_still_has_the_arguments_that_it_is_given(function, names):
    missing = set(names.split()) - inspect.signature(function).parameters.keys()
    assert not missing, f"mlx-lm's {function.__name__} has no {missing}"


def test_what_is_hooked_into_is_there():
    """Experts below a block that has `sharding_group`, the choice by mx.argpartition, and the steps of caches."""
    model = random_model()
    block = model.layers[0].mlp
    assert {"gate", "switch_mlp"} <= block.keys(), "the block's parts have other names"
    assert {"gate_proj", "up_proj", "down_proj"} <= block.switch_mlp.keys(), "SwitchGLU's parts have other names"
    assert getattr(block, "sharding_group", "gone") is None, "mlx-lm's hook for a sum over ranks has another name"
    assert hasattr(model, "shard") and hasattr(model, "sanitize")
    assert "argpartition" in inspect.getsource(type(block).__call__), "the choice is made by something else"
    assert KVCache.step == CACHE_STEP, "caches grow by other steps"
    chunk = inspect.signature(generate.generate_step).parameters["prefill_step_size"].default
    assert chunk == PREFILL_CHUNK, "a prompt is read in other steps"
    assert block(mx.zeros((1, 2, 64))).shape == (1, 2, 64)
