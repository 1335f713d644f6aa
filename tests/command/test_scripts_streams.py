"""What a script writes as it goes: a word of the answer as soon as it is there, a line over each scenario."""

import contextlib
import importlib
import io
import sys
import types

import mlx_lm
import pytest
from conftest import ROOT, SHIPPED, random_model

import expert_parallel_poc
import qwen3_expert_parallel
from expert_parallel.command.options import parser_of
from expert_parallel.command.prompts import Prompt


class Flushed(io.StringIO):
    """Notes what had been written at each flush."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def flush(self):
        self.seen.append(self.getvalue())


def test_every_word_of_an_answer_is_shown_when_it_comes(monkeypatch):
    """A pipe or a file gets it in the end all the same; who watches gets it at once."""
    monkeypatch.chdir(ROOT)
    out = Flushed()
    loaded, load = [], mlx_lm.load
    asked = ["--model", SHIPPED, "--max-tokens", 5, "--prompt", "class A:", "--verify", "--trials", 0]
    monkeypatch.setattr(mlx_lm, "load", lambda path, **how: loaded.append((path, how)) or load(path, **how))
    monkeypatch.setattr(sys, "argv", ["qwen3_expert_parallel.py", *map(str, asked)])
    with contextlib.redirect_stdout(out):
        qwen3_expert_parallel.main()
    _, _, answer = out.getvalue().partition("answer ─")
    answer = answer.partition("\n")[2].partition("\n─")[0]
    begun = [text.partition("answer ─")[2].partition("\n")[2] for text in out.seen]
    parts = [text for text in dict.fromkeys(begun) if text and answer.startswith(text)]
    assert len(parts) >= 3 and parts == sorted(parts, key=len)
    # Stock's weights are read when they are needed: never all of them in two types.
    assert loaded == [(str(SHIPPED), {"adapter_path": None, "lazy": True})]


class Response(types.SimpleNamespace):
    """One of mlx-lm's."""


@pytest.mark.parametrize(
    ("line", "cache", "sampler"),
    [
        ((), {}, {"temp": 0.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0}),
        (
            ("--kv-bits", 4, "--temp", 0.5, "--top-p", 0.9, "--top-k", 3, "--min-p", 0.1),
            {"kv_bits": 4, "quantized_kv_start": 0},
            {"temp": 0.5, "top_p": 0.9, "min_p": 0.1, "top_k": 3},
        ),
    ],
)
@pytest.mark.parametrize("ended", [False, True])
def test_what_mlx_lm_is_asked_and_what_is_made_of_its_answers(line, cache, sampler, ended, monkeypatch, capsys):
    """The end token is no token of the answer, and what comes with it may still be text."""
    module, samplers = map(importlib.import_module, ("mlx_lm.generate", "mlx_lm.sample_utils"))
    asked, heard, after, passes = {}, [], [], []

    def stream(model, tokenizer, prompt, max_tokens, **how):
        asked.update(how, prompt=prompt, max_tokens=max_tokens, tokenizer=tokenizer)
        for token, text in ((7, "a"), (8, "b c")):
            yield Response(token=token, text=text, finish_reason=None)
        yield Response(token=9, text=".", finish_reason="stop" if ended else "length")

    monkeypatch.setattr(module, "stream_generate", stream)
    monkeypatch.setattr(samplers, "make_sampler", lambda **how: lambda logprobs: (how, logprobs))
    args = parser_of("").parse_args([*map(str, line)])
    tokens, text, last, _ = qwen3_expert_parallel.generate(
        random_model(), "tokenizer", Prompt([1, 2], "x", 11), args, None, lambda: heard.append(1), True,
        chosen=lambda token: passes.append(token) or token, after_token=after.append,
    )  # fmt: skip
    assert tokens == [7, 8] + [9] * (not ended) and text == "ab c." and last.token == 9
    assert len(heard) == 3 and after == [7, 8, 9] and capsys.readouterr().out == "ab c.\n"
    assert (asked.pop("prompt"), asked.pop("max_tokens"), asked.pop("tokenizer")) == ([1, 2], 11, "tokenizer")
    assert asked.pop("sampler")("logprobs") == (sampler, "logprobs") == passes[0]
    assert len(asked.pop("prompt_cache")) == 3 and asked.pop("stream")
    assert asked == cache


@pytest.mark.parametrize(("devices", "copies"), [(1, 0), (2, 2)])
def test_a_study_says_its_scenario_at_the_left_and_copies_as_many_as_devices(devices, copies, monkeypatch, capsys):
    """One device has no room for a copy."""
    from expert_parallel.report import workbench

    seen = []
    monkeypatch.setattr(workbench, "study", lambda *parts: seen.append(parts[-3:-1]) or [])
    line = ["--scenarios", "hot", "--devices", devices, "--experts", 8, "--top-k", 2, "--tokens", 1024, "--hidden", 32]
    monkeypatch.setattr(sys, "argv", ["expert_parallel_poc.py", *map(str, line)])
    expert_parallel_poc.main()
    assert seen == [(devices, copies)]
    assert "\nhot: one expert is wanted by most tokens ─" in capsys.readouterr().out
