"""Parity is a measurement: it differs where the model was tampered with, and says nothing of what was not compared."""

import contextlib
import importlib
import io
import json
import shutil
import sys

import mlx.core as mx
import pytest
import witness
from conftest import ROOT, SHIPPED
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from witness_runs import PROMPT, TIMED, ending_at

import qwen3_expert_parallel

FIRST = 329  # token of the shipped model's answer to the prompt


def run(folder, model=SHIPPED, tokens=6, tamper=lambda model: None):
    """(printed text, document) of a run in this process; tamper gets the sharded model just before it answers."""
    generation, out = importlib.import_module("mlx_lm.generate"), io.StringIO()
    original, answering = generation.stream_generate, []

    def tampered(model, *arguments, **options):
        answering.append(model)
        if len(answering) == 1:  # the second is stock's
            tamper(model)
        return original(model, *arguments, **options)

    line = ["--model", model, "--prompt", PROMPT, "--max-tokens", tokens, "--devices", 4, "--verify", "--dtype"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(generation, "stream_generate", tampered)
        arguments = [*line, "float32", "--trials", 0, "--json", folder / "o.json"]
        patch.setattr(sys, "argv", ["qwen3_expert_parallel.py", *map(str, arguments)])
        patch.setenv("COLUMNS", "160")
        patch.chdir(ROOT)
        qwen3_expert_parallel.main()
    assert len(answering) == 2 and answering[0] is not answering[1]
    return out.getvalue(), json.loads((folder / "o.json").read_text(), parse_constant=pytest.fail)


def parity_of(text):
    return witness.facts(witness.blocks_of(text)["Parity with stock mlx-lm (measured)"])


def projections(model, layer):
    """mlx-lm's modules of a layer's experts, on whichever device they are."""
    found = [
        m for name, m in model.named_modules() if f"layers.{layer}." in name and isinstance(m, QuantizedSwitchLinear)
    ]
    assert len(found) == 3 * 4  # up, gate and down of each device
    return found


def test_one_layer_tampered_with_gives_other_tokens_and_logits(tmp_path):
    def turn_round(model):
        for projection in projections(model, layer=1):
            projection.scales, projection.biases = -3 * projection.scales, -3 * projection.biases

    text, document = run(tmp_path, tamper=turn_round)
    parity = document["parity"]
    assert parity["tokens_equal"] is False
    assert parity["max_abs_logit_difference"] > 0.1
    assert parity_of(text) == {
        "tokens": f"NOT the same (the first {parity['tokens_equal_at_first']} of {parity['tokens_compared']} are)",
        "largest logit difference": f"{parity['max_abs_logit_difference']:.3g} ({parity['logits_compared']} compared)",
    }


def test_a_little_of_one_expert_gives_other_logits_though_the_tokens_stay(tmp_path):
    def nudge(model):
        for projection in projections(model, layer=2):
            for name in ("scales", "biases"):
                array = projection[name]
                projection[name] = mx.concatenate([array[:1] * 1.001, array[1:]])

    text, document = run(tmp_path, tamper=nudge)
    parity = document["parity"]
    assert parity["tokens_equal"] is True
    assert 0 < parity["max_abs_logit_difference"] < 0.1
    tokens, logits = parity["tokens_compared"], parity["logits_compared"]
    assert parity_of(text)["tokens"] == f"the same ({tokens} compared)"
    assert (
        parity_of(text)["largest logit difference"] == f"{parity['max_abs_logit_difference']:.3g} ({logits} compared)"
    )


def test_a_model_that_is_left_alone_is_the_same(tmp_path):
    parity = run(tmp_path)[1]["parity"]
    assert parity["tokens_equal"] is True and parity["tokens_compared"] == 6
    assert parity["max_abs_logit_difference"] <= (0 if mx.default_device() == mx.cpu else 1e-3)


def test_of_no_tokens_parity_says_nothing(tmp_path):
    """A model whose first word is its last: nothing is left to compare, and that is said."""
    text, document = run(tmp_path, ending_at(FIRST, tmp_path / "model"))
    assert document["generation"]["tokens"] == [] and document["parity"]["tokens_compared"] == 0
    assert parity_of(text)["tokens"] == "none to compare"
    speed = witness.facts(witness.blocks_of(text)["Speed (measured, one run)"])
    assert "generation" not in speed and f"on {TIMED} tokens" in speed["share of time in experts"]


def test_of_no_tokens_the_document_does_not_say_that_they_are_equal(tmp_path):
    document = run(tmp_path, ending_at(FIRST, tmp_path / "model"))[1]
    assert document["parity"]["tokens_equal"] is None


def test_no_tokens_have_no_speed(tmp_path):
    text, document = run(tmp_path, ending_at(FIRST, tmp_path / "model"))
    assert document["generation"]["tokens_per_second"] is None
    assert "tokens/s" not in witness.facts(witness.blocks_of(text)["Speed (measured, one run)"]).get("generation", "")


@pytest.mark.parametrize("layer", [0, 2])
def test_weights_that_are_no_numbers_are_said(tmp_path, layer):
    folder = shutil.copytree(SHIPPED, tmp_path / "model")
    path = folder / "model.safetensors"
    weights = mx.load(str(path))
    name = f"model.layers.{layer}.mlp.switch_mlp.down_proj.scales"
    weights[name] = weights[name] * float("nan")
    mx.save_safetensors(str(path), weights, {"format": "mlx"})
    text, document = run(tmp_path, folder)
    assert document["parity"]["max_abs_logit_difference"] is None
    assert parity_of(text)["largest logit difference"].startswith("not a number")
    assert f"answers not-a-number from layer {layer} on" in " ".join(text.split())
