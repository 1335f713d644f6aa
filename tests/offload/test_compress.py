"""Cold experts at fewer bits: which, how they answer, what they weigh."""

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import QWEN3, save

from expert_parallel import load_sharded
from expert_parallel.checkpoint.loading import load_whole
from expert_parallel.layers import moe_layers
from expert_parallel.models.memory import live_expert_bytes, model_bytes
from expert_parallel.offload.compress import compress_cold

LOADS = np.array([[9, 1, 8, 2, 7, 3, 6, 4], [1, 9, 2, 8, 3, 7, 4, 6]])
COLD = ([1, 3, 5, 7], [0, 2, 4, 6])  # the half that is used least


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "model", QWEN3, True)


def by_hand(folder, bits, cold=COLD):
    """The whole model with the rows of these experts made coarser, kept at their width."""
    model = load_whole(folder)[0]
    for layer, ids in zip(moe_layers(model), cold, strict=True):
        for name in ("gate_proj", "up_proj", "down_proj"):
            part = layer.experts[name]
            whole = mx.dequantize(part.weight, part.scales, part.biases, group_size=64, bits=4)
            coarse = mx.quantize(whole[mx.array(ids)], group_size=64, bits=bits)
            whole[mx.array(ids)] = mx.dequantize(*coarse, group_size=64, bits=bits)
            layer.experts[name] = Dense(whole)
    return model


class Dense:
    """A projection of floats; mlx-lm's own has no other way to be made of an array."""

    def __new__(cls, weight):
        from mlx_lm.models.switch_layers import SwitchLinear

        made = SwitchLinear(weight.shape[2], weight.shape[1], weight.shape[0], bias=False)
        made.weight = weight
        return made


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("bits", [2, 3])
def test_the_cold_half_answers_coarser_and_the_hot_as_before(folder, bits, devices):
    model = load_sharded(folder, num_devices=devices)[0]
    text = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    before = model(text)
    compress_cold(model, LOADS, 0.5, bits)
    got, expected = model(text), by_hand(folder, bits)(text)
    assert mx.abs(got - expected).max().item() < 1e-5 < mx.abs(got - before).max().item()
    one, fewer = 3 * (2048 + 512), 3 * (2048 * bits // 4 + 512)  # scales and biases in float32
    assert live_expert_bytes(model).sum() == 2 * 4 * (one + fewer)
    assert model_bytes(model).rest == model_bytes(load_whole(folder)[0]).rest


def test_of_experts_that_are_used_alike_the_first_are_cold(tmp_path):
    """On every machine: numpy's quicker sorts leave equals in an order of their own."""
    model = load_sharded(save(tmp_path / "model", {**QWEN3, "num_experts": 64}, True), num_devices=1)[0]
    cold = list(range(0, 40, 2))
    compress_cold(model, np.array([[1, 2] * 32] * 2), 20 / 64, 2)
    assert [layer.experts.stores[0].cold.ids.tolist() for layer in moe_layers(model)] == [cold] * 2


def test_all_or_none_of_the_experts(folder):
    text = mx.array([[3, 1, 4]])
    model = load_sharded(folder, num_devices=2)[0]
    before = model(text)
    compress_cold(model, LOADS, 0.0, 2)
    assert mx.array_equal(model(text), before).item()
    compress_cold(model, LOADS, 1.0, 2)
    everyone = [list(range(8))] * 2
    assert mx.abs(model(text) - by_hand(folder, 2, everyone)(text)).max().item() < 1e-5


def test_experts_that_were_not_quantised(tmp_path):
    folder = save(tmp_path / "model", QWEN3, False)
    model, text = load_sharded(folder, num_devices=1)[0], mx.array([[3, 1, 4]])
    before = model(text)
    compress_cold(model, LOADS, 0.5, 8)
    assert 0 < mx.abs(model(text) - before).max().item() < 0.05 * mx.abs(before).max().item()


def test_what_cannot_be_is_refused(folder):
    model = load_sharded(folder, num_devices=1)[0]
    with pytest.raises(ValueError, match=r"_proj is 4-bit affine: 4 bits would save nothing"):
        compress_cold(model, LOADS, 0.5, 4)
    with pytest.raises(ValueError, match=r"loads are of \[2, 7\]"):
        compress_cold(model, LOADS[:, :7], 0.5, 2)
    compress_cold(model, LOADS, 0.5, 2)
    with pytest.raises(ValueError, match="on disk or compressed already"):
        compress_cold(model, LOADS, 0.5, 2)
    with pytest.raises(ValueError, match="on disk or compressed already"):
        compress_cold(load_sharded(folder, num_devices=1, expert_memory="50%")[0], LOADS, 0.5, 2)
