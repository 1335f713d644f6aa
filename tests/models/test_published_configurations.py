"""Published configurations, and those that transformers writes: what mlx-lm builds is built, all else is one line."""

import csv
import inspect
import pkgutil
from pathlib import Path

import mlx.core as mx
import mlx_lm.models
import pytest
from conftest import ROOT
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes

from expert_parallel.models.architecture import describe
from expert_parallel.models.configurations import Configuration, load_configuration
from expert_parallel.models.lazy import build_model

PUBLISHED = ROOT.parent / "shared" / "published-configs"


def published():
    if not (PUBLISHED / "published.tsv").is_file():
        return [pytest.param(None, marks=pytest.mark.skip("no published configurations beside the project"))]
    with (PUBLISHED / "published.tsv").open() as file:
        rows = csv.DictReader(file, delimiter="\t")
        return [pytest.param(row, id=row["file"]) for row in rows]


@pytest.mark.parametrize("row", published())
def test_published_configurations(row):
    configuration = load_configuration(str(PUBLISHED / f"{row['file']}.json"))
    if row["mlx-lm 0.32.2"] == "refuses":
        reason = {"tie_word": "'tie_word_embeddings'", "unknown": "not supported"}[row["note"][:8].strip("_ ")]
        with pytest.raises(ValueError, match=reason) as caught:
            describe(configuration)
        assert "\n" not in str(caught.value)
        return
    parameters = describe(configuration).whole.parameters / 1e9
    rounded = 0.03 if "rounded" in row["note"] else 0.02
    assert parameters == pytest.approx(float(row["published parameters (1e9)"]), rel=rounded)


# --- as transformers writes them -------------------------------------------------------------------------

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "enable_moe_block": True,
    "top_k_experts": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}


def moe_architectures():
    """model_types that mlx-lm and transformers both know and mlx-lm builds with experts."""
    mapping = pytest.importorskip("transformers").models.auto.configuration_auto.CONFIG_MAPPING
    for module in pkgutil.iter_modules(mlx_lm.models.__path__):
        if module.name not in mapping:
            continue
        source = Path(module.module_finder.path, f"{module.name}.py").read_text()  # importing olmo ends the process
        if "SwitchGLU" in source or "SwitchMLP" in source:
            yield module.name, mapping[module.name]


def small(kind) -> dict:
    """A small configuration, as transformers itself writes it."""
    known = inspect.signature(kind).parameters
    return kind(**{name: value for name, value in SMALL.items() if name in known}).to_dict()


def as_transformers_4(config: dict, kind) -> dict:
    """What stands in rope_parameters now stood at top level, and fields had the names of the architecture."""
    old = {"head_dim": SMALL["head_dim"], **config, "torch_dtype": config.get("dtype") or "bfloat16"}
    if "text_config" in old:
        old["text_config"] = as_transformers_4(old["text_config"], kind)
    rope = old.pop("rope_parameters", None) or {}
    scaled = rope.get("rope_type", "default") != "default"
    old |= {name: value for name, value in rope.items() if name != "rope_type"}
    old["rope_scaling"] = {**rope, "type": rope["rope_type"]} if scaled else None
    return old | {name: old[now] for name, now in kind.attribute_map.items() if now in old}


def stock_runs(config) -> bool:
    """Whether mlx-lm itself builds the model and runs a token, without computing it."""
    try:
        model_class, arguments_class = _get_classes(config)
        model = model_class(arguments_class.from_dict(config))
        model(mx.zeros((1, 1), dtype=mx.int32), cache=make_prompt_cache(model))
    except Exception:
        return False
    return True


@pytest.mark.parametrize("kind", ["bert", "cache", "olmo", "../x", ""])
def test_a_model_type_that_is_none(kind):
    """cache is a module of mlx-lm and no architecture; importing olmo without its library ends the process."""
    with pytest.raises(ValueError, match="here: mlx-lm cannot build this model: "):
        build_model(Configuration("here", {"model_type": kind}))


def test_what_transformers_writes_is_built_where_mlx_lm_builds_it():
    built = refused = 0
    for name, kind in moe_architectures():
        try:
            new = small(kind)
        except Exception:  # its own checks do not take our numbers together
            continue
        for config in (new, as_transformers_4(new, kind)):
            if stock_runs(config):
                try:
                    build_model(Configuration(name, config))
                    built += 1
                except ValueError as error:  # built by mlx-lm with another rope than the file's: a wrong answer
                    assert config is new and "its rope_parameters say" in str(error), (name, error)
            else:
                with pytest.raises(ValueError, match=f"{name}: mlx-lm cannot build this model: ") as caught:
                    build_model(Configuration(name, config))
                assert "\n" not in str(caught.value)
                refused += 1
    assert built >= 30, (built, refused)


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_rope_parameters_that_mlx_lm_would_ignore_are_refused(name):
    """As transformers 5 writes them: built with the default rope_theta, 3 to 7% of the likeliest tokens agreed."""
    file = ROOT.parent / "shared" / "cases" / "03-rope-parameters" / f"{name}.config.json"
    if not file.is_file():
        pytest.skip("no such case beside the project")
    configuration = load_configuration(str(file))
    with pytest.raises(ValueError, match=r"rope_parameters say rope_theta \[150.0\]") as caught:
        build_model(configuration)
    assert "\n" not in str(caught.value)
    configuration.config["rope_theta"] = 150.0
    build_model(configuration)


def test_a_field_that_stands_for_nothing_is_none_of_our_business():
    """transformers writes sliding_window: 0 for a Qwen2-MoE without one; mlx-lm does not look at it."""
    file = ROOT.parent / "shared" / "cases" / "04-sliding-window-zero" / "config.json"
    if not file.is_file():
        pytest.skip("no such case beside the project")
    assert describe(load_configuration(str(file))).num_experts > 1
