"""Every MoE architecture that mlx-lm and transformers both know, tiny and random: spread it answers as before."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes
from test_published_configurations import as_transformers_4, moe_architectures, small, stock_runs

from expert_parallel import place_experts, record_routing, shard_model
from expert_parallel.layers import moe_layers, moe_shape

LARGEST = 20_000_000  # parameters; some configuration classes take no small sizes
SLOW_OR_LARGE = "stock mlx-lm does not run it here, or its configuration class takes no small sizes"


def configurations():
    try:
        return dict(moe_architectures())
    except BaseException:  # without transformers: pytest's own skip
        return {}


def built(name, kind, quantised):
    """mlx-lm's model with random weights in float32; a skip where stock has none of it."""
    try:
        config = small(kind)
    except Exception:
        pytest.skip("its configuration class does not take our numbers together")
    config = config if stock_runs(config) else as_transformers_4(config, kind)
    if not stock_runs(config):
        pytest.skip(SLOW_OR_LARGE)
    model_class, arguments_class = _get_classes(config)
    model = model_class(arguments_class.from_dict(config))
    if sum(array.size for _, array in tree_flatten(model.parameters())) > LARGEST:
        pytest.skip(SLOW_OR_LARGE)
    mx.random.seed(0)

    def filled(_, array):
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        return mx.random.normal(array.shape) * 0.1 if array.ndim > 1 else array.astype(mx.float32)

    model.update(tree_map_with_path(filled, model.parameters()))
    if quantised:
        can = lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0  # noqa: E731
        nn.quantize(model, group_size=32, bits=4, class_predicate=can)
    model.set_dtype(mx.float32)
    model.eval()
    return model


def answers(model):
    cache = make_prompt_cache(model)
    logits = [model(mx.array([tokens]), cache=cache) for tokens in ([1, 5, 9, 2, 7, 11, 3], [4])]
    mx.eval(logits)
    return logits


@pytest.mark.parametrize("quantised", [False, True], ids=["float32", "4-bit"])
@pytest.mark.parametrize("name", configurations())
def test_every_architecture_is_bit_identical_when_spread(name, quantised):
    model = built(name, configurations()[name], quantised)
    expected = answers(model)
    with record_routing(model) as trace:
        answers(model)
    assert len(trace) == 8
    placement = place_experts(np.ones(moe_shape(model)), 3)
    shard_model(model, placement)
    for masked_up_to in (0, 10**6):
        for layer in moe_layers(model):
            layer.experts.masked_up_to = masked_up_to
        assert all(mx.array_equal(a, b, equal_nan=True) for a, b in zip(answers(model), expected, strict=True))
