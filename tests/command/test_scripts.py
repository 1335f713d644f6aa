"""The scripts as a user meets them: what they print, write, and refuse."""

import functools
import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import types

import mlx.core as mx
import pytest
from conftest import CONFIG, ROOT, SHIPPED, of_a_user, random_model, run_script, save_model

from expert_parallel.command.options import PICTURES

SCRIPT = "qwen3_expert_parallel.py"


@pytest.fixture
def here(run_here):
    return functools.partial(run_here, SCRIPT)


BRIEF = ("--model", SHIPPED, "--trials", 0)  # where no speed is looked at: of this model three more runs are timed
QUICK = (*BRIEF, "--max-tokens", 2, "--no-verify", "--quiet")


def refused(result, *words):
    """One line on standard error, exit status 2, no traceback."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0], lines[0]


def test_main_script_answers_reports_and_writes(here, tmp_path):
    files = {name: tmp_path / f"out.{name}" for name in ("json", "npz", "placement")}
    result = run_script(
        SCRIPT, "--model", SHIPPED, "--prompt", "import os\n", "--max-tokens", 8, "--devices", 3,
        "--json", files["json"], "--trace", files["npz"], "--save-placement", files["placement"],
        "--plots", tmp_path / "plots",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    for words in (
        "experts 4-bit in groups of 64, the rest also 8-bit (gate), float32",
        "contiguous, 42 to 43 of 128 experts",
        "by stock mlx-lm",
    ):
        assert words in result.stdout
    for heading in ("Parity", "Routing", "Balance", "Memory over all", "Communication", "Speed"):
        assert heading in result.stdout
    figures = json.loads(files["json"].read_text())
    assert figures["parity"]["tokens_equal"] is True
    assert figures["parity"]["max_abs_logit_difference"] == 0
    assert len(figures["generation"]["tokens"]) == 8
    assert sum(figures["memory"]["experts_per_device_bytes"]) == figures["memory"]["full_model_expert_bytes"]
    assert figures["memory"]["experts_per_device_bytes"] == figures["memory"]["experts_per_device_bytes_modelled"]
    assert figures["communication"]["bytes_per_token"] == 4 * 256 * 4  # layers, hidden, float32
    prompt, layers, top_k = figures["generation"]["prompt_tokens"], 4, 8
    assert sum(map(sum, figures["balance"]["device_loads"])) == (prompt + 8) * layers * top_k
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {f"{name}.png" for name in PICTURES}
    again = here(
        *BRIEF, "--prompt", "import os\n", "--max-tokens", 8, "--devices", 3, "--quiet",
        "--placement", files["placement"],
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip() == figures["generation"]["text"].strip()


def test_prompts_from_file_and_standard_input(here, tmp_path):
    (tmp_path / "prompt.txt").write_text("import sys\n")
    common = (*BRIEF, "--max-tokens", 4, "--quiet", "--no-verify")
    answers = [here(*common, "--prompt", prompt).stdout for prompt in ("import sys\n", tmp_path / "prompt.txt")]
    answers.append(run_script(SCRIPT, *common, "--prompt", "-", stdin="import sys\n").stdout)
    assert answers[0]
    assert answers[0] == answers[1] == answers[2]


def test_sampling_with_a_seed_is_repeatable(here):
    common = (*BRIEF, "--max-tokens", 12, "--quiet", "--temp", 1, "--no-verify")
    one, two, other = (here(*common, "--seed", seed).stdout for seed in (7, 7, 8))
    assert one == two
    assert one != other


MINIMAL = ROOT / "minimal_qwen3_example.py"


def test_what_the_minimal_example_says_is_so(capsys):
    """By its own trace, counted: the prompt and 40 tokens of answer, 16 experts on each device in order."""
    names = runpy.run_path(str(MINIMAL))
    out, chosen = capsys.readouterr().out, names["trace"].experts
    loads = [[int((chosen[:, l] // 16 == d).sum()) for d in range(8)] for l in range(4)]
    assert len(chosen) == len(names["prompt"]) + 40
    assert sum(loads[0]) == 8 * len(chosen)
    mean = sum(sum(row) / 8 / max(row) for row in loads) / 4
    assert out.splitlines()[0] == f"device 3 holds experts {list(range(48, 64))} of layer 0"
    assert out.splitlines()[-2:] == [
        f"{len(chosen)} tokens recorded, slots per device in layer 0: {loads[0]}",
        f"balancedness {mean:.2f} (measured on this text)",
    ]


def test_minimal_example_ends_without_a_traceback():
    """It once ran in spite of --help, and `| head -1` or Control-C gave twenty lines of Python."""
    refused(run_script(MINIMAL.name, "--devices", 4), "unrecognized arguments")
    quiet = of_a_user(PYTHONUNBUFFERED="1")
    piped = f"{sys.executable} {MINIMAL} | head -1"
    done = subprocess.run(piped, shell=True, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=120)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")
    stopped = subprocess.Popen([sys.executable, MINIMAL], cwd=ROOT, env=quiet, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    first = stopped.stdout.readline()
    stopped.send_signal(signal.SIGINT)
    _, error = stopped.communicate(timeout=60)
    assert (stopped.returncode, error, first[:8]) == (-signal.SIGINT, "", "device 3")


def test_minimal_example_pasted_into_a_notebook_takes_any_model(tmp_path, monkeypatch, capsys):
    """There is no __file__, the arguments are the notebook's; of Mixtral, gpt-oss, DeepSeek the first layer is dense or
    args have no num_experts."""
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    cell, before = {"__name__": "__main__"}, signal.getsignal(signal.SIGINT)
    monkeypatch.chdir(tmp_path)
    folder = save_model(random_model(vocab_size=4096, mlp_only_layers=[0]), tmp_path / "model", vocab_size=4096,
                        mlp_only_layers=[0])  # fmt: skip
    lines = MINIMAL.read_text()
    assert len(lines.splitlines()) <= 40 and "load(str(SHIPPED))" in lines
    exec(compile(lines.replace("load(str(SHIPPED))", f"load({str(folder)!r})"), "<cell>", "exec"), cell)
    assert "balancedness 0." in capsys.readouterr().out and signal.getsignal(signal.SIGINT) is before


def test_default_model_comes_from_the_hub_cache_if_it_is_there(tmp_path):
    """A folder in the hub's cache layout stands in for the downloaded model."""
    snapshot = (
        tmp_path / "hub/models--mlx-community--Qwen3-Coder-30B-A3B-Instruct-4bit/snapshots" / ("0" * 40)
    )  # fmt: skip
    save_model(random_model(vocab_size=4096), snapshot, vocab_size=4096)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text("0" * 40)
    common = (SCRIPT, "--max-tokens", 2, "--prompt", "a b", "--devices", 2)
    cached = run_script(*common, HF_HUB_CACHE=str(tmp_path / "hub"))
    assert cached.returncode == 0, cached.stderr
    assert "found in the local hub cache" in cached.stdout
    empty = run_script(*common, HF_HUB_CACHE=str(tmp_path / "none"))
    assert empty.returncode == 0, empty.stderr
    assert "shipped with this project" in empty.stdout


BAD_ARGUMENTS = {
    "no such folder": (["--model", "./nowhere"], "nowhere"),
    "hub out of reach": (["--model", "nobody/no-such-model"], "nobody/no-such-model"),
    "more devices than experts": (["--devices", "129"], "129"),
    "zero devices": (["--devices", "0"], "--devices"),
    "negative devices": (["--devices", "-3"], "--devices"),
    "empty prompt": (["--prompt", ""], "prompt is empty"),
    "blank prompt": (["--prompt", " \n"], "prompt is empty"),
    "no tokens": (["--max-tokens", "0"], "--max-tokens"),
    "unknown placement": (["--placement", "random"], "random"),
    "placement without a trace": (["--placement", "balanced"], "--placement-trace"),
    "json into no folder": (["--json", "nowhere/x.json"], "nowhere"),
    "json is a folder": (["--json", "tests"], "tests"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS, ids=str)
def test_bad_arguments(here, case):
    arguments, word = BAD_ARGUMENTS[case]
    refused(
        here("--model", SHIPPED, *arguments, "--max-tokens", *(["4"] if case != "no tokens" else ["0"])),
        word,
    )


def test_a_prompt_longer_than_the_context(here):
    refused(here("--model", SHIPPED, "--prompt", "x = 1\n" * 400), "context is 512")


@pytest.fixture
def broken(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(SHIPPED, folder)
    return folder


def test_a_dense_model(here, tmp_path):
    changes = {"mlp_only_layers": [0, 1, 2], "vocab_size": 4096}
    folder = save_model(random_model(**changes), tmp_path / "dense", **changes)
    refused(here("--model", folder), "no Mixture-of-Experts layers")


def test_a_truncated_weight_file_leaves_no_output(here, broken, tmp_path):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(here("--model", broken, "--json", tmp_path / "o.json"), "model.safetensors", "truncated")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("content", [b"", b"1234", b"\xff" * 64], ids=["empty", "short", "garbage"])
def test_a_damaged_weight_file(here, broken, content):
    (broken / "model.safetensors").write_bytes(content)
    refused(here("--model", broken), "model.safetensors is truncated or corrupt")


def test_a_missing_weight_file(here, broken):
    (broken / "model.safetensors").unlink()
    refused(here("--model", broken), "has no model*.safetensors")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_type": "no_such_architecture"}'], ids=str)
def test_a_bad_config(here, broken, text):
    (broken / "config.json").write_text(text)
    refused(here("--model", broken))


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"every_layer": ["0-126"]}', '{"every_layer": ["0-63", "64-128"]}'], ids=str
)
def test_a_bad_placement_file(here, tmp_path, text):
    path = tmp_path / "placement.json"
    path.write_text(text)
    refused(here("--model", SHIPPED, "--devices", 2, "--placement", path), "placement.json")


def test_scripts_explain_themselves():
    for script in sorted(ROOT.glob("*_*.py")):
        result = run_script(script.name, "--help")
        assert result.returncode == 0, result.stderr
        assert "python " + script.name in result.stdout


@pytest.mark.parametrize("script", ["qwen3_expert_parallel.py", "model_analysis.py", "expert_parallel_poc.py"])
def test_help_begins_with_the_words_of_the_script_line_by_line(run_here, script):
    words = importlib.import_module(script.removesuffix(".py")).__doc__.strip().splitlines()
    printed = run_here(script, "--help").stdout.splitlines()
    begin = printed.index(words[0])
    assert printed[begin : begin + len(words)] == words


def test_the_tokens_that_are_timed_go_on_after_the_answer(here, tmp_path):
    """252 of prompt, 2 of answer, and 4 that are timed no longer fit into the 256 that a cache begins with."""
    options = ("--no-verify", "--max-tokens", 2, "--prompt", "x = 1\n" * 63, "--json", tmp_path / "o.json")
    assert here(*BRIEF, *options).returncode == 0
    figures = json.loads((tmp_path / "o.json").read_text())
    assert (figures["generation"]["prompt_tokens"], figures["time"]["tokens"]) == (252, 4)
    assert figures["memory"]["kv_cache_bytes"] == 512 * 4 * 2 * 2 * 64 * 4  # layers, keys and values, heads of 64


def test_a_long_prompt_is_no_file_name(here):
    result = here(*BRIEF, "--max-tokens", 1, "--quiet", "--no-verify", "--prompt", "x = 1; " * 60)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("option", "value"), [("--seed", -1), ("--seed", 1 << 64), ("--temp", "nan"), ("--top-p", 2), ("--timeout", -1)]
)
def test_numbers_out_of_range_are_refused(here, option, value):
    refused(here("--model", SHIPPED, option, value), option, str(value))


def test_prompts_that_are_no_text_and_plots_into_a_file_are_refused(here, tmp_path):
    (tmp_path / "prompt").write_bytes(b"\xff\xfe\x00abc")
    refused(here("--model", SHIPPED, "--prompt", tmp_path / "prompt"), "UTF-8")
    refused(here("--model", SHIPPED, "--plots", tmp_path / "prompt"), "--plots takes a folder")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")  # noqa: PTH110
@pytest.mark.parametrize("option", ["--json", "--html", "--trace", "--save-placement", "--plots"])
def test_a_full_disk_leaves_no_part_of_a_file(here, tmp_path, monkeypatch, option):
    """The disk fills up while the file is written; what stood there before stays."""
    name = "expert_loads.png" if option == "--plots" else "out"
    (tmp_path / name).write_text("from an earlier run")
    real = open

    def full(file, mode="r", *args, **kwargs):
        handle = real(file, mode, *args, **kwargs)
        if str(file).startswith(str(tmp_path)) and "r" not in mode:
            handle.close()
            handle = real("/dev/full", mode, *args, **kwargs)
        return handle

    monkeypatch.setattr("io.open", full)  # pathlib's
    monkeypatch.setattr("builtins.open", full)  # matplotlib's
    result = here(*QUICK[:-1], option, tmp_path if option == "--plots" else tmp_path / "out")
    refused(result, f"cannot write {tmp_path / name}", "No space left")
    assert "Speed" in result.stdout  # the report is not lost with the file
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "from an earlier run"


def test_two_outputs_into_one_file_are_refused(here, tmp_path):
    refused(here(*QUICK, "--json", tmp_path / "x", "--trace", tmp_path / "x"), "--trace and --json both name")


@pytest.mark.parametrize("arguments", [(), ("--quiet",)], ids=["report", "answer"])
def test_a_reader_that_closes_the_pipe_ends_it_in_silence(arguments):
    """As `| head -1` does: exit status 141, as a shell reports SIGPIPE, and nothing on standard error."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        command = [sys.executable, SCRIPT, *map(str, QUICK[:-1]), *arguments]
        result = subprocess.run(
            command, cwd=ROOT, env=of_a_user(), stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert (result.returncode, result.stderr) == (141, "")


def test_standard_output_may_be_closed():
    command = f"{sys.executable} {SCRIPT} --max-tokens 2 --no-verify >&-"
    result = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=of_a_user(), capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("tests", ["--prompt tests is a folder"]),
        ("nowhere/prompt.txt", ["--prompt nowhere/prompt.txt", "no such file"]),
        (b"abc\0def", ["not UTF-8 text"]),
        (b" \n", ["prompt is empty"]),
    ],
    ids=["folder", "no file", "binary", "blank file"],
)
def test_prompts_that_are_none(here, tmp_path, prompt, words):
    if isinstance(prompt, bytes):
        (tmp_path / "prompt").write_bytes(prompt)
        prompt = tmp_path / "prompt"
    refused(here(*QUICK, "--prompt", prompt), *words)


def test_closed_standard_input_is_an_empty_prompt():
    command = f"{sys.executable} {SCRIPT} --prompt - <&-"
    refused(
        subprocess.run(["bash", "-c", command], cwd=ROOT, env=of_a_user(), capture_output=True, text=True),
        "prompt is empty",
    )


@pytest.mark.slow
def test_more_tokens_than_the_context_holds_are_cut_and_that_is_said(here, tmp_path):
    prompt = "x = 1\n" * 126
    result = here(*BRIEF, "--no-verify", "--prompt", prompt, "--max-tokens", 600, "--json", tmp_path / "o.json")
    figures = json.loads((tmp_path / "o.json").read_text())["generation"]
    assert figures["prompt_tokens"] + len(figures["tokens"]) == 512
    assert f"--max-tokens 600 is cut to {len(figures['tokens'])}" in " ".join(result.stdout.split())


def test_a_context_in_the_text_part_of_a_configuration_counts(here, tmp_path):
    """Qwen3.5, Llama 4, gemma 4 and Kimi-K2.5 keep it there: longer prompts were run."""
    folder = save_model(random_model(vocab_size=4096), tmp_path / "model")
    weights = mx.load(str(folder / "model.safetensors"))
    mx.save_safetensors(str(folder / "model.safetensors"), {f"language_model.{n}": a for n, a in weights.items()})
    config = {"model_type": "qwen3_vl_moe", "text_config": CONFIG | {"vocab_size": 4096}, "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    refused(here("--model", folder, "--prompt", "x = 1\n" * 64), "tokens, the model's context is 128")
    result = here("--model", folder, "--prompt", "x = 1\n" * 31, "--max-tokens", 100, "--no-verify")
    assert "--max-tokens 100 is cut to" in result.stdout and result.returncode == 0, result.stderr


@pytest.mark.parametrize("arguments", [["--max-tokens", "ten"], ["--combine", "sum"], ["--no-such-option"]], ids=str)
def test_options_that_do_not_parse(here, arguments):
    refused(here(*arguments), arguments[0], "--help")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts_per_tok": 200}, ["-200", "128"]),
        ({"hidden_size": "256"}, ["TypeError"]),
        ({"model_type": "qwen99"}, ["qwen99"]),
        ({"quantization": None, "quantization_config": {"bits": 4}}, ["quant_method"]),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be(here, broken, change, words):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | change))
    refused(here("--model", broken), "config.json: mlx-lm cannot build this model", *words)


def test_a_placement_file_says_how_many_devices(here, tmp_path):
    (tmp_path / "p.json").write_text('{"every_layer": ["0-79", "48-127"]}')
    assert "2 simulated" in here(*QUICK[:-1], "--placement", tmp_path / "p.json").stdout
    refused(here(*QUICK, "--placement", tmp_path / "p.json", "--devices", 3), "places 2 devices, this run has 3")
    refused(here(*QUICK, "--placement", tmp_path / "p.json", "--redundant-experts", 3), "names the copies itself")
    refused(here(*QUICK, "--placement-trace", tmp_path / "p.json"), "of no use with --placement contiguous")


def test_one_copy_of_each_expert(here):
    """Twice the experts on each device, and the answer of stock mlx-lm."""
    printed = here(*BRIEF, "--max-tokens", 2, "--redundant-experts", "each").stdout
    assert "contiguous, 32 of 128 experts on each device, 128 copies a layer" in " ".join(printed.split())
    assert "the same as stock mlx-lm's: 2 tokens" in printed and "Parity" in printed


def test_a_file_that_is_no_trace(here, tmp_path):
    (tmp_path / "prose.md").write_text("Words with a comma,\nand others.\n")  # which is no table that was cut off
    arguments = ("--placement", "balanced", "--placement-trace", tmp_path / "prose.md")
    refused(here(*QUICK, *arguments), "prose.md: it is no routing trace that this project knows")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_files_of_a_model_that_hold_nothing_readable(here, broken, name):
    (broken / name).write_text("{")
    refused(here("--model", broken), str(broken))


def test_a_process_by_itself_marks_no_weights(here, monkeypatch):
    """There is nobody to compare them with."""
    monkeypatch.setattr("expert_parallel.ranks.group.checkpoint_mark", lambda *_: pytest.fail("read for nothing"))
    assert here(*QUICK).returncode == 0


def test_an_interrupt_in_mid_answer_leaves_one_line_and_no_file(tmp_path):
    """Ctrl-C: exit status 130."""
    command = [sys.executable, SCRIPT, "--max-tokens", "490", "--json", tmp_path / "o.json", "--trace", tmp_path / "t"]
    heeded = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # a job in the background ignores it
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, env=of_a_user(), text=True, **pipes, **heeded)
    while not process.stdout.readline().startswith("answer ─"):
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.split()) == (130, ["stopped"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dtype", "value"), [("float32", 4), ("float16", 2), ("keep", 2)])
def test_communication_follows_the_dtype_of_the_run(here, tmp_path, dtype, value):
    """The report counted 4 bytes a value on every CPU, whatever --dtype said; the shipped model is bfloat16."""
    result = here(*BRIEF, "--prompt", "a", "--max-tokens", 2, "--dtype", dtype, "--json", tmp_path / "o.json")
    figures = json.loads((tmp_path / "o.json").read_text())
    assert figures["communication"]["value_bytes"] == value
    assert figures["communication"]["bytes_per_token"] == 4 * 256 * value  # layers, hidden
    assert f"{value}-byte values" in result.stdout
    assert figures["parity"]["max_abs_logit_difference"] == 0
