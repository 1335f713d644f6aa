"""The checkpoint maker: the published geometry to the byte, a folder mlx-lm loads, nothing half-written."""

import json
import signal
import sys
from collections import namedtuple

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, quantize_model
from tokenizers import Tokenizer, models

from expert_parallel.command.output import exit_on_user_error
from tools import make_checkpoint, random_weights

SMALL = {
    **make_checkpoint.QWEN3_CODER_30B,
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "moe_intermediate_size": 128,
    "num_experts": 16,
}


@pytest.fixture
def inputs(tmp_path):
    """A config and a tokenizer of 100 words."""
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    vocabulary = {**{f"w{n}": n for n in range(99)}, "<end>": 99}
    Tokenizer(models.WordLevel(vocabulary, unk_token="w1")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"})
    )
    return tmp_path


def run(inputs, *arguments, monkeypatch):
    """The script as from the terminal, in this process."""
    out = inputs / "out"
    fixed = ["--config", inputs / "small.json", "--tokenizer", inputs / "tokenizer", "--out", out]
    monkeypatch.setattr(sys, "argv", ["make_checkpoint.py", *map(str, fixed), *map(str, arguments)])
    with exit_on_user_error():
        make_checkpoint.main()
    return out


def test_qwen3_coder_has_the_published_bytes():
    tensors, config = random_weights.plan(make_checkpoint.QWEN3_CODER_30B, bits=4, group_size=64)
    total = sum(tensor.nbytes for tensor in tensors.values())
    experts = sum(tensor.nbytes for name, tensor in tensors.items() if ".switch_mlp." in name)
    # 48 layers x 128 experts x 3 x (768 x 2048 / 2 packed + 768 x 2048 / 64 x 4 of scales and biases)
    assert experts == 48 * 128 * 3 * (786_432 + 98_304) == 16_307_453_952
    assert total == 17_180_913_664
    assert config["quantization"]["model.layers.47.mlp.gate"] == {"group_size": 64, "bits": 8}
    files = random_weights.split(tensors, 5 * 10**9)
    assert [len(files), max(sum(t.nbytes for t in f.values()) for f in files) <= 5 * 10**9] == [4, True]


def test_mlx_lm_loads_the_folder(inputs, monkeypatch, capsys):
    out = run(inputs, "--max-file-size", "1MB", monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    assert "RANDOM" in printed and "random, untrained" in printed
    assert "RANDOM" in (out / "README.md").read_text()
    config = json.loads((out / "config.json").read_text())
    assert config["random_weights"]["trained"] is False and config["eos_token_id"] == 99

    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 1 and files[-1].name == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 1_010_000 for file in files)

    model, tokenizer = mlx_lm.load(str(out))
    expected = _get_classes(SMALL)[0](_get_classes(SMALL)[1].from_dict(SMALL))
    expected, _ = quantize_model(expected, SMALL, 64, 4)
    shapes = {name: array.shape for name, array in tree_flatten(expected.parameters())}
    loaded = dict(tree_flatten(model.parameters()))
    assert {name: array.shape for name, array in loaded.items()} == shapes
    assert {array.dtype for array in loaded.values()} == {mx.uint32, mx.bfloat16}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(shapes)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in loaded.values())
    assert tokenizer.eos_token_ids == {99}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_keep_activations_in_scale(inputs, monkeypatch, bits):
    out = run(inputs, "--bits", bits, "--quiet", monkeypatch=monkeypatch)
    model, _ = mlx_lm.load(str(out))
    up = model.layers[1].mlp.switch_mlp.up_proj
    weights = np.array(
        mx.dequantize(up.weight, up.scales, up.biases, group_size=64, bits=bits).astype(mx.float32)
    )  # [16, 128, 256]
    assert abs(weights.mean()) < 0.001
    assert weights.std() == pytest.approx(256**-0.5 * (13 / 12) ** 0.5, rel=0.02)  # uniform spread of half: + 1/12
    assert np.std(weights[3] - weights[4]) > 0.05  # experts differ
    model.set_dtype(mx.float32)
    logits = np.array(model(mx.arange(64)[None]))
    assert np.isfinite(logits).all() and 0.3 < logits.std() < 3


def test_the_seed_decides(inputs, monkeypatch):
    weights = []
    for seed in (0, 0, 7):
        out = run(inputs, "--seed", seed, "--quiet", monkeypatch=monkeypatch)
        weights.append((out / "model.safetensors").read_bytes())
        out.rename(inputs / f"done-{len(weights)}")
    assert weights[0] == weights[1] != weights[2]


def test_fewer_layers():
    config = {**SMALL, "num_hidden_layers": 4, "layer_types": ["a", "b", "a", "b"], "mlp_only_layers": [0]}
    cut = random_weights.cut_layers(config, 3)
    assert (cut["num_hidden_layers"], cut["layer_types"], cut["mlp_only_layers"]) == (3, ["a", "b", "a"], [0])
    nested = random_weights.cut_layers({"text_config": config, "other": 1}, 2)
    assert nested["text_config"]["num_hidden_layers"] == 2 and nested["other"] == 1
    for number in (0, 5):
        with pytest.raises(ValueError, match=f"--layers {number}: the config has 1 to 4"):
            random_weights.cut_layers(config, number)


MISTAKES = {
    "--layers 4": "--layers 4: the config has 1 to 3",
    "--seed -1": "--seed -1: needs 0 or more",
    "--max-file-size big": "--max-file-size big: expected a size",
    "--config missing.json": "cannot read config missing.json",
    "--tokenizer /": "/ has no tokenizer.json",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(inputs, monkeypatch, capsys, arguments):
    before = sorted(inputs.iterdir())
    with pytest.raises(SystemExit) as caught:
        run(inputs, *arguments.split(), monkeypatch=monkeypatch)
    lines = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and MISTAKES[arguments] in lines[-1] and "Traceback" not in "".join(lines)
    assert sorted(inputs.iterdir()) == before


def test_configs_that_cannot_be_built(inputs, monkeypatch, capsys):
    for change, message in (
        ({"mlp_only_layers": [0, 1, 2]}, "no Mixture-of-Experts layers"),
        ({"model_type": "qwen99"}, "qwen99 not supported"),
        ({"rope_theta": None}, "error: "),
        ({"vocab_size": 64}, "ids up to 99, the model's vocabulary is 64"),
    ):
        config = {key: value for key, value in (SMALL | change).items() if value is not None}
        (inputs / "small.json").write_text(json.dumps(config))
        with pytest.raises(SystemExit):
            run(inputs, monkeypatch=monkeypatch)
        assert message in capsys.readouterr().err
        assert sorted(path.name for path in inputs.iterdir()) == ["small.json", "tokenizer"]


def test_a_full_disk_and_an_existing_folder_are_seen_before_writing(inputs, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 50_000_000))
        with pytest.raises(SystemExit):
            run(inputs, monkeypatch=monkeypatch)
    assert "has 50.00 MB free; --layers N writes less" in capsys.readouterr().err
    (inputs / "out").mkdir()
    with pytest.raises(SystemExit):
        run(inputs, monkeypatch=monkeypatch)
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["interrupt", "terminate", "error"])
def test_an_interrupted_run_leaves_nothing(inputs, monkeypatch, how, capsys):
    def stop(*_):
        assert list(inputs.glob("out.*.part/tokenizer.json"))
        assert not list(inputs.glob("out.*.part/config.json"))  # it comes last: without it nothing loads
        if how == "interrupt":
            raise KeyboardInterrupt
        if how == "terminate":
            signal.raise_signal(signal.SIGTERM)
        raise OSError(28, "No space left on device")

    before, handler = sorted(inputs.iterdir()), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(make_checkpoint, "write_weights", stop)
    with pytest.raises(SystemExit) as caught:
        run(inputs, monkeypatch=monkeypatch)
    assert caught.value.code == {"interrupt": 130, "terminate": 143, "error": 2}[how]
    assert sorted(inputs.iterdir()) == before and signal.getsignal(signal.SIGTERM) is handler
