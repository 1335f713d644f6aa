"""What people who do this job reported elsewhere, each with its right answer."""

import json
import shutil
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import adapter
from conftest import CONFIG, ROOT, SHIPPED, random_model, save_model
from mlx.utils import tree_flatten
from mlx_lm import load

import qwen3_expert_parallel
from expert_parallel import RoutingTrace, load_sharded
from expert_parallel.models.architecture import describe
from expert_parallel.models.checkpoint_check import check_checkpoint
from expert_parallel.models.configurations import load_configuration
from expert_parallel.study.remedies import recorded

CASES = ROOT.parent / "shared" / "cases"
TOKENS = mx.array([[5, 6, 7, 8, 9, 30]])


@pytest.fixture
def refusal(monkeypatch, capsys):
    """The one line in which the main script refuses, run inside this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["qwen3_expert_parallel.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            qwen3_expert_parallel.main()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert end.value.code == 2 and len(lines) == 1, lines
        return lines[0]

    return run


def test_mixed_bits_with_a_null_group_size(tmp_path):
    """mlx_lm.convert --quant-predicate mixed_4_6 writes null for the mode's default (mlx-lm issue 1154)."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 128}
    model = random_model(**sizes)
    modules = {}

    def decide(path, module):
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % 64:
            return False
        modules[path] = {"group_size": None, "bits": 6 if "down_proj" in path else 4, "mode": "affine"}
        return modules[path]

    nn.quantize(model, class_predicate=decide)
    quantization = {"group_size": 64, "bits": 4, "mode": "affine", **modules}
    folder = save_model(model, tmp_path / "mixed", **sizes, quantization=quantization)
    expected = load(str(folder))[0](TOKENS)
    assert mx.array_equal(load_sharded(folder, 5)[0](TOKENS), expected)
    configuration = load_configuration(str(folder))
    assert check_checkpoint(configuration)["ok"]
    assert describe(configuration).bytes.total == sum(a.nbytes for _, a in tree_flatten(model.parameters()))


def test_the_files_dtype_counts(tmp_path):
    """mlx_lm.convert --dtype float16 keeps torch_dtype bfloat16: 165 problems were seen in a good checkpoint."""
    model = random_model(quantize=True)
    model.set_dtype(mx.float16)
    quantization = {"group_size": 32, "bits": 4}
    folder = save_model(model, tmp_path / "half", torch_dtype="bfloat16", quantization=quantization)
    report = check_checkpoint(load_configuration(str(folder)))
    assert report["ok"], report["problems"][:2]
    assert report["bytes_predicted"] == report["bytes_on_disk"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('conversation must start with a system message') }}", "must start with a system message"),
        ("{% for m in messages %}{{ m['content'] }", "TemplateSyntaxError"),
        ("{{ tools[0].name | tojson }}", "UndefinedError"),
        ("{{ something | tojson }}", "TypeError"),
        (
            "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}",
            "prompt is empty",
        ),
    ],
)
def test_chat_templates_that_fail(template, words, tmp_path, refusal):
    folder = tmp_path / "model"
    shutil.copytree(SHIPPED, folder, ignore=shutil.ignore_patterns("held-out"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    assert words in refusal("--model", folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": {"group_size": 64, "bits": 4}}, "quant_method"),
        ({"num_experts": None}, "num_experts"),
    ],
)
def test_configurations_that_mlx_lm_stumbles_over(changes, words, tmp_path, refusal):
    folder = save_model(random_model(), tmp_path / "odd", **changes)
    line = refusal("--model", folder)
    assert words in line or "NoneType" in line
    assert f"{folder / 'config.json'}: mlx-lm cannot build this model" in line


def test_a_model_of_few_experts_takes_as_many_devices(tmp_path, monkeypatch):
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 4096}
    folder = save_model(random_model(**sizes), tmp_path / "four", **sizes)
    out = tmp_path / "o.json"
    line = ["qwen3_expert_parallel.py", "--model", str(folder), "--max-tokens", "2", "--quiet", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", line)
    qwen3_expert_parallel.main()
    assert json.loads(out.read_text())["placement"]["devices"] == 4


def test_experts_that_were_never_chosen_count_where_they_are_named(tmp_path):
    """A model of 32 experts, 27 to 31 never chosen: a trace alone cannot say so (vLLM pull request 28284)."""
    experts = np.random.default_rng(0).integers(0, 27, (1200, 2, 4), dtype=np.int32)
    np.save(tmp_path / "cold_tail.npy", experts)
    fit, test, notes = recorded([tmp_path / "cold_tail.npy"], 32)
    assert fit.num_experts == test.num_experts == 32 and not notes
    fit, _, notes = recorded([tmp_path / "cold_tail.npy"])
    assert fit.num_experts == 27 and "taken for 27 experts" in notes[0]


@pytest.mark.skipif(not CASES.is_dir(), reason="no cases beside the project")
def test_warm_up_in_the_middle_of_a_recorded_trace():
    fit, test, notes = recorded([CASES / "08-trace-warm-up-in-the-middle" / "mid.npy"])
    assert any("warm-up rows" in note for note in notes)
    loads = fit.loads() + test.loads()
    assert (loads.max(axis=1) / loads.mean(axis=1)).max() < 4


def test_values_of_others_are_shown_as_they_are(tmp_path, monkeypatch, capsys):
    """A strategy such as "[/x]" in a placement file ended in a traceback of the library that prints."""
    held = {"every_layer": ["0-63", "64-127"], "strategy": "[/x] [red]"}
    (tmp_path / "p.json").write_text(json.dumps(held))
    line = ["x", "--model", str(SHIPPED), "--max-tokens", "2", "--no-verify", "--placement", str(tmp_path / "p.json")]
    monkeypatch.setattr(sys, "argv", line)
    qwen3_expert_parallel.main()
    assert "[/x] [red], 64 of 128 experts" in capsys.readouterr().out


def test_small_traces_are_saved_small(tmp_path):
    trace = RoutingTrace(np.zeros((4, 2, 3), dtype=int), 256)
    trace.save(tmp_path / "t.npz")
    with np.load(tmp_path / "t.npz") as file:
        assert file["experts"].dtype == np.uint8
    assert RoutingTrace.load(tmp_path / "t.npz").experts.dtype == np.uint16
    assert CONFIG["num_experts"] == 16


def test_an_adapter_on_experts_answers_as_in_stock_mlx_lm(tmp_path, monkeypatch, refusal):
    """mlx_lm.lora adapts experts by default; the adapter was dropped without a word (mlx-lm issue 1172)."""
    folder, arrays = adapter(tmp_path / "adapter", load(str(SHIPPED))[0])
    assert any("switch_mlp" in name for name in arrays)
    outs = {}
    for name, options in {"with": ["--adapter-path", str(folder)], "without": []}.items():
        out = tmp_path / f"{name}.json"
        line = ["x", "--max-tokens", "8", "--verify", "--trials", "0", "--quiet", "--json", str(out)]
        monkeypatch.setattr(sys, "argv", [*line, "--model", str(SHIPPED), *options])
        qwen3_expert_parallel.main()
        outs[name] = json.loads(out.read_text())
        assert outs[name]["parity"]["tokens_equal"] and outs[name]["parity"]["max_abs_logit_difference"] == 0
    assert outs["with"]["generation"]["tokens"] != outs["without"]["generation"]["tokens"]
    assert "adapter" in refusal("--model", SHIPPED, "--adapter-path", tmp_path / "nothing")


def test_options_of_mlx_lm_do_what_they_do_there(tmp_path, monkeypatch, refusal):
    for options in (["--top-k", "1", "--temp", "5"], ["--min-p", "1", "--temp", "5"], ["--kv-bits", "8"]):
        out = tmp_path / "o.json"
        line = ["x", "--max-tokens", "6", "--trials", "0", "--quiet", "--json", str(out), "--model", str(SHIPPED)]
        monkeypatch.setattr(sys, "argv", [*line, *options])
        qwen3_expert_parallel.main()
        assert json.loads(out.read_text())["parity"]["tokens_equal"], options
    assert "there is none" in refusal("--model", SHIPPED, "--system-prompt", "be short", "--ignore-chat-template")
