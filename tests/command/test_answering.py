"""Several prompts decoded together: stock mlx-lm's tokens, and a report of what that meant for balance."""

import json
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import Rank
from conftest import SHIPPED, launch, random_model
from mlx_lm import batch_generate, load
from test_options import Tokenizer, arguments

from expert_parallel import RoutingTrace, place_experts
from expert_parallel.checkpoint.opened import Checkpoint
from expert_parallel.command import answering, limits
from expert_parallel.command.prompts import Prompt, read_prompts
from expert_parallel.report import batch

LINES = ["def add(a, b):", "import os", "class Parser:  # of texts", "for i in range(10):", "if not text:"]
TOKENS = 12
SCRIPT = "qwen3_expert_parallel.py"
RUN = ("--model", SHIPPED, "--max-tokens", TOKENS, "--trials", 0)


@pytest.fixture(scope="module")
def stock():
    """(tokenizer, texts -> tokens of each by mlx-lm's batch_generate)."""
    model, tokenizer = load(str(SHIPPED))
    model.set_dtype(mx.float32)

    def answers(texts):
        ids = [tokenizer.encode(text) for text in texts]
        return batch_generate(model, tokenizer, ids, max_tokens=TOKENS, return_token_ids=True).token_ids

    return tokenizer, answers


def lines_file(folder, lines=LINES, between="\n \n"):
    path = folder / "lines.txt"
    path.write_text(between.join(lines) + "\n", newline="")
    return path


# --- all of it --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(run_here, tmp_path_factory):
    """(printed, JSON, trace) of a run with copies of hot experts or without."""
    folder = tmp_path_factory.mktemp("run")
    files = ("--prompts", lines_file(folder), "--json", folder / "o.json", "--trace", folder / "t.npz")
    done = run_here(SCRIPT, *RUN, *files, "--html", folder / "o.html")
    assert done.returncode == 0, done.stderr
    assert all(line in (folder / "o.html").read_text() for line in LINES[:2])
    document = json.loads((folder / "o.json").read_text(), parse_constant=pytest.fail)
    return done.stdout, document, RoutingTrace.load(folder / "t.npz")


def test_tokens_are_those_of_mlx_lm_s_batch(whole, stock):
    tokenizer, answers = stock
    printed, document, _ = whole
    rows = document["batch"]["sequences"]
    assert [row["prompt"] for row in rows] == LINES
    assert [row["tokens"] for row in rows] == answers(LINES) and all(row["as_stock"] for row in rows)
    assert [row["text"] for row in rows] == [tokenizer.decode(row["tokens"]) for row in rows]
    assert document["parity"]["tokens_equal"] is True and document["parity"]["max_abs_logit_difference"] == 0
    told = sum(len(row["tokens"]) + row["prompt_tokens"] for row in rows)
    assert document["parity"]["logits_compared"] == told * 4096
    # One after another, under their first words.
    text = document["generation"]["text"]
    for n, row in enumerate(rows, start=1):
        assert f"[{n}] {' '.join(row['prompt'].split())}\n{row['text']}\n" in text
    assert text in printed and f" tokens/s of {len(LINES)} sequences together" in " ".join(printed.split())
    assert document["generation"]["tokens"] == sum((row["tokens"] for row in rows), [])
    assert document["generation"]["seconds_to_first_token"] is None


def test_the_trace_has_every_token_once_and_the_balance_of_steps_is_counted_from_it(whole):
    _, document, trace = whole
    rows, found = document["batch"]["sequences"], document["batch"]
    assert len(trace) == sum(row["prompt_tokens"] + len(row["tokens"]) for row in rows)
    assert trace.prefill.sum() == sum(row["prompt_tokens"] - 1 for row in rows)
    assert sum(map(sum, document["balance"]["device_loads"])) == len(trace) * 4 * 8
    steps = {}
    for experts, step, prefill in zip(trace.experts.tolist(), trace.steps.tolist(), trace.prefill, strict=True):
        if not prefill:
            steps.setdefault(step, []).append(experts)

    def means(groups):
        even, busy = [], []
        for tokens in groups:
            for layer in range(4):
                loads = [0] * 8
                for token in tokens:
                    for expert in token[layer]:
                        loads[expert // 16] += 1
                even.append(sum(loads) / 8 / max(loads))
                busy.append(sum(load > 0 for load in loads))
        return np.mean(even), np.mean(busy)

    together, alone = means(steps.values()), means([token] for tokens in steps.values() for token in tokens)
    assert (found["balancedness_of_a_step"], found["devices_of_a_step"]) == pytest.approx(together, abs=1e-4)
    assert (found["balancedness_one_by_one_simulated"], found["devices_one_by_one_simulated"]) == pytest.approx(
        alone, abs=1e-4
    )
    assert found["decode_steps"] == len(steps) == TOKENS + 1 and found["tokens_per_step"] == len(LINES)
    longest = max(row["prompt_tokens"] for row in rows)
    assert found["padding_tokens"] == sum(longest - row["prompt_tokens"] for row in rows)


@pytest.mark.slow
def test_more_prompts_than_mlx_lm_decodes_at_once(run_here, tmp_path, stock):
    """The later ones join when others have left; with copies and sampling, and the answers alone."""
    lines = [f"x{n} = [{n}" for n in range(35)]
    path = lines_file(tmp_path, lines, "\n")
    done = run_here(SCRIPT, *RUN, "--prompts", path, "--quiet", "--json", tmp_path / "o.json",
                    "--redundant-experts", "each", "--devices", 3)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "o.json").read_text())["batch"]["sequences"]
    assert [row["tokens"] for row in rows] == stock[1](lines)
    assert done.stdout.startswith("[1] x0 = [0\n") and done.stdout.count("\n[") == 34 and "In short" not in done.stdout


def test_ranks_say_the_same_and_must_have_the_same_prompts(tmp_path, stock):
    files = ("--prompts", lines_file(tmp_path), "--json", tmp_path / "o.json")
    results = launch("ring", 2, SCRIPT, *RUN, *files, tmp_path=tmp_path)
    assert [status for status, *_ in results] == [0, 0], results
    document = json.loads((tmp_path / "o.json").read_text())
    assert [row["tokens"] for row in document["batch"]["sequences"]] == stock[1](LINES)
    assert document["parity"]["tokens_equal"] is True and document["parity"]["max_abs_logit_difference"] < 1e-3
    (tmp_path / "0").mkdir(), (tmp_path / "1").mkdir()
    lines_file(tmp_path / "0"), lines_file(tmp_path / "1", ["other", *LINES[1:]])
    shell = f"exec {__import__('sys').executable} {SCRIPT} --model {SHIPPED} --prompts {tmp_path}/$MLX_RANK/lines.txt"
    code = f"import os; os.execl('/bin/sh', 'sh', '-c', {shell!r})"
    results = launch("ring", 2, "-c", code, tmp_path=tmp_path)
    assert [status for status, *_ in results] == [2, 2], results
    assert all("has other prompt (" in err and err.count("\n") == 1 for *_, err in results)


# --- its parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [("--prompt", "x"), ("--journal", "j"), ("--resume", "j"), ("--fail-device", "1"), ("--rebalance-every", 8),
     ("--kv-bits", 4)],
)  # fmt: skip
def test_what_does_not_go_with_several_prompts(other):
    with pytest.raises(ValueError, match=f"^--prompts decodes several sequences .* does not go with {other[0]}$"):
        limits.check_numbers(arguments("--prompts", "file", *other))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file; give a text file with one prompt a line"),
        (b" \n\n", "^--prompts .*lines.txt is empty"),
        (b"\xff\xfe", "^--prompts .*lines.txt is not UTF-8"),
        ("folder", "not a file; give a text file"),
        (b"short\n\n0123456789\n", "lines.txt, line 3: the prompt has 10 tokens, the model's context is 10"),
    ],
)
def test_files_that_hold_no_prompts(content, words, tmp_path):
    path = tmp_path / "lines.txt"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=words):
        read_prompts(arguments("--prompts", path), Tokenizer(False), 10, None, None)


def test_standard_input_holds_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^--prompts -: no such file"):
        read_prompts(arguments("--prompts", "-"), Tokenizer(False), 10)


def test_prompts_are_lines_and_each_has_its_own_room(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes(b"\xef\xbb\xbfab\r\n\n  \n  c d\x0b\n" + b"long" * 20)
    prompt = read_prompts(arguments("--prompts", path), Tokenizer(False), 100)
    assert [each.text for each in prompt.several] == ["ab", "  c d\x0b", "long" * 20]
    assert [each.max_tokens for each in prompt.several] == [64, 64, 20] and prompt.max_tokens == 64
    assert "cut to 20" in prompt.note and prompt.each_ids() == [list(map(ord, each.text)) for each in prompt.several]
    assert prompt.ids == sum(prompt.each_ids(), []) and prompt.text.startswith("3 together: ab |   c d")
    assert prompt.several[1].begins == "c d" and prompt.several[2].begins == ("long" * 20)[:57] + "..."


def test_every_token_of_a_rank_is_agreed_on_and_checked(monkeypatch):
    asked = []

    def all_sum(values, group):  # of two ranks, of which the other has zeros and its voice
        asked.append(group)
        return values + mx.array([0] * (len(values) - 1) + [values[-1].item()], mx.int32)

    monkeypatch.setattr(mx.distributed, "all_sum", all_sum)
    args = SimpleNamespace(seed=0, temp=0, top_p=1, min_p=0, top_k=0, kv_bits=None)
    tokenizer, prompt, ranks = Checkpoint(SHIPPED).tokenizer(), Prompt([1, 2], "a", 3), Rank(0, 2)
    tokens, *_ = answering.generate(random_model(), tokenizer, prompt, args, ranks, lambda: None)
    assert len(tokens) == 3 and asked == [ranks] * 4  # mlx-lm begins with one more than it says
    monkeypatch.setattr(mx.distributed, "all_sum", lambda values, group: values)
    with pytest.raises(RuntimeError, match="the connection to a peer was lost"):
        answering.generate(random_model(), tokenizer, prompt, args, ranks, lambda: None)


class Plain:
    """A tokenizer of nothing."""

    eos_token_ids, has_thinking = {3}, False
    decode = staticmethod(str)


def test_nothing_is_said_where_not_all_ranks_had_a_part(capsys):
    """In any one step of a batch."""

    class Broken:
        unchecked = 0

        def __call__(self, tokens):
            self.unchecked += 1
            return tokens

        def check(self, steps):
            assert steps == self.unchecked > 3
            raise RuntimeError("the connection to a peer was lost")

    broken = Broken()
    how = {"sampler": lambda logprobs: broken(mx.argmax(logprobs, axis=-1)), "stream": None}
    prompts = [Prompt([5, 6], "a", 3), Prompt([7], "b", 3)]
    with pytest.raises(RuntimeError):
        answering.together(random_model(), Plain(), prompts, how, broken, lambda: None, True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("first", [[6, 5], [6, 4]])
def test_not_a_number_is_seen_in_a_sequence_that_ended_before(first):
    """Token 5 is none; the first sequence has one token and the second two."""
    model = random_model()
    weight = model.model.embed_tokens.weight
    model.model.embed_tokens.weight = weight.at[5].add(mx.nan)
    how = {"sampler": lambda logprobs: mx.argmax(logprobs, axis=-1), "stream": None}
    prompts = [Prompt(first, "a", 1), Prompt([7, 8], "b", 3)]
    *_, last, _ = answering.together(model, Plain(), prompts, how, None, lambda: None, False)
    assert mx.isnan(last.logprobs).any().item() == (5 in first)


def test_another_answer_than_stock_s_is_said_of_its_sequence():
    prompts = tuple(Prompt([1, 2], text, 4) for text in ("one", "two"))
    mine, theirs = (SimpleNamespace(answers=[[7, 8], last], texts=["a", "b"]) for last in ([9], [5]))
    trace = RoutingTrace(np.zeros((4, 1, 2)), 4)
    for stock, said in (([theirs], ["the same", "NOT the same"]), ([], ["not compared"] * 2)):
        table, _ = batch.of_run(
            Prompt([], "", 4, "", prompts), mine, stock, trace, place_experts(np.ones((1, 4)), 2), None
        )
        assert [row[-1] for row in table.cells()] == said
