"""Lazy models by hand: which modules are packed, in which type the rest is, the first layers, weights of no meaning."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import CONFIG
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from tiny_architectures import small

from expert_parallel.layers import moe_layers
from expert_parallel.models.configurations import Configuration
from expert_parallel.models.lazy import _cast, _group_of, _quantise, build_model, fill_randomly, shortened


def packed(model):
    """{path: (bits, group size, mode)}, but for routers, which mlx-lm gives bits of their own."""
    return {
        path: (module.bits, module.group_size or 16, getattr(module, "mode", "affine"))
        for path, module in model.named_modules()
        if "scales" in module and not path.endswith(".gate")
    }


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.other, self.head = nn.Linear(64, 8), nn.Linear(64, 8), nn.Linear(64, 8)
        self.narrow, self.norm = nn.Linear(48, 8), nn.RMSNorm(64)
        self.experts = SwitchLinear(64, 48, 4)  # [4, 48, 64]


@pytest.mark.parametrize(
    ("said", "config", "expected"),
    [
        ({"group_size": 64, "bits": 4}, {}, {"wide", "other", "head", "experts"}),  # 48 are no groups of 64, and of 16
        ({"group_size": 32, "bits": 4}, {}, {"wide", "other", "head", "experts"}),
        ({"group_size": None, "bits": 4, "mode": "nvfp4"}, {}, {"wide", "other", "head", "narrow", "experts"}),
        ({"group_size": 64, "bits": 4, "head": False}, {}, {"wide", "other", "experts"}),
        ({"group_size": 64, "bits": 4}, {"quantization_config": {"ignore": ["he*"]}}, {"wide", "other", "experts"}),
        ({"group_size": 64, "bits": 4}, {"quantization_config": {"modules_to_not_convert": ["wide"]}},
         {"other", "head", "experts"}),
        ({"group_size": 64, "bits": 4}, {"text_config": {"quantization_config": {"exclude_modules": ["o*r", "x"]}}},
         {"wide", "head", "experts"}),
        ({"group_size": 64, "bits": 4}, {"quantization_config": {"quantization": {"ignore": None}}},
         {"wide", "other", "head", "experts"}),
    ],
)  # fmt: skip
def test_what_a_configuration_packs(said, config, expected):
    model = Small()
    _quantise(model, said, config)
    size = said["group_size"] or 16
    assert packed(model) == dict.fromkeys(expected, (4, size, said.get("mode", "affine")))


def test_what_cannot_be_packed_is_said():
    with pytest.raises(ValueError, match="groups of 128 divide no weight of this model"):
        _quantise(Small(), {"group_size": 128, "bits": 4}, {})
    model = Small()
    _quantise(model, None, {})
    assert not packed(model)
    assert [_group_of(*how) for how in ((None, "affine"), (None, "mxfp4"), (None, "nvfp4"), (128, "nvfp4"))] == [
        64, 32, 16, 128,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, mx.bfloat16),
        ({"torch_dtype": "float16"}, mx.float16),
        ({"dtype": "torch.float32"}, mx.float32),
        ({"torch_dtype": "float16", "dtype": "float32"}, mx.float16),
        ({"text_config": {"dtype": "float32"}}, mx.float32),
        ({"text_config": None, "dtype": "bfloat16"}, mx.bfloat16),
    ],
)
def test_the_type_of_what_is_not_packed(config, dtype):
    model = Small()
    model.cast_predicate = lambda path: path != "norm.weight"
    model.count = mx.zeros(3, mx.int32)
    types = {path: array.dtype for path, array in tree_flatten(_cast(model, config).parameters())}
    assert types.pop("norm.weight") == mx.float32 and types.pop("count") == mx.int32
    assert set(types.values()) == {dtype}


def test_the_first_layers():
    config = {"num_hidden_layers": 3, "kinds": ["a", "b", "c"], "pair": [1, 2], "name": "abc"}
    assert shortened(config, 2) == {"num_hidden_layers": 2, "kinds": ["a", "b"], "pair": [1, 2], "name": "abc"}
    assert shortened(config, 5) == config and config["num_hidden_layers"] == 3
    assert shortened({"x": [1, 2, 3], "text_config": config}, 1) == {
        "x": [1, 2, 3], "text_config": {"num_hidden_layers": 1, "kinds": ["a"], "pair": [1, 2], "name": "abc"},
    }  # fmt: skip
    for nothing in ({"model_type": "m"}, {"model_type": "m", "text_config": None}):
        with pytest.raises(ValueError, match="a m configuration has no num_hidden_layers"):
            shortened(nothing, 2)


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "kimi_k25"])
def test_architectures_that_ask_for_names_of_their_weights_are_built_without(name):
    model = build_model(Configuration(name, small(name)))
    assert len(moe_layers(model)) > 0 and model.model_type == name


@pytest.mark.parametrize(("bits", "group_size", "mode"), [(4, 32, "affine"), (8, 64, "affine"), (4, None, "mxfp4")])
def test_weights_of_no_meaning_are_as_large_as_real_ones(bits, group_size, mode):
    """Of an affine kind they are spread evenly around 0, so that a layer's outputs stay as large as its inputs."""
    model = build_model(Configuration("small", CONFIG), bits, group_size, mode)
    assert set(packed(fill_randomly(model)).values()) == {(bits, group_size or 32, mode)}
    experts = moe_layers(model)[0].experts
    weights = mx.dequantize(experts.up_proj.weight, experts.up_proj.scales, experts.up_proj.get("biases"),
                            group_size or 32, bits, mode).astype(mx.float32)  # fmt: skip
    weights = np.array(weights)
    assert weights.shape == (16, 64, 64) and np.isfinite(weights).all() and len(np.unique(weights)) > 8
    if mode == "affine":
        step = 1 / np.sqrt(64) / 2**bits  # of a weight; half of the steps below 0
        assert (weights.min(), weights.max()) == pytest.approx(
            (-step * 2 ** (bits - 1), step * (2 ** (bits - 1) - 1)), rel=0.01
        )
        assert abs(weights.mean()) < 0.01
    else:
        assert np.abs(weights).max() == pytest.approx(6 * 2.0**-9)


def test_bits_are_those_that_are_asked_for_else_those_of_the_configuration():
    own = {**CONFIG, "quantization": {"group_size": 32, "bits": 8}}
    assert set(packed(build_model(Configuration("own", own))).values()) == {(8, 32, "affine")}
    assert not packed(build_model(Configuration("own", own), 16))
    assert set(packed(build_model(Configuration("own", own), 4, 32)).values()) == {(4, 32, "affine")}
    assert not packed(build_model(Configuration("none", CONFIG)))
    bundled = build_model(Configuration("bundled", CONFIG, {"repository": "r"}))
    assert set(packed(bundled).values()) == {(4, 64, "affine")}
    assert set(packed(build_model(Configuration("bundled", own, {"repository": "r"}))).values()) == {(8, 32, "affine")}
    with pytest.raises(ValueError, match="this quantisation is not possible: .*groups of 128 divide no weight"):
        build_model(Configuration("none", CONFIG), 4, 128)
