"""The runs that witnesses look at: in one process, with copies, with moved experts, over two ranks. Each runs once.

Nothing is imported from the package but the script: what it left is read from its files.
"""

import contextlib
import importlib
import io
import json
import math
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import witness
from conftest import ROOT, SHIPPED, launch
from witness import Run

import qwen3_expert_parallel
from expert_parallel.serving import Serving  # listened to, and for ranks asked

CONFIG = json.loads((SHIPPED / "config.json").read_text())
L, E, K = CONFIG["num_hidden_layers"], CONFIG["num_experts"], CONFIG["num_experts_per_tok"]
PROMPT = "class Parser:\n    def parse(self, text):\n        if not text:"
STOP = 14  # the fourth token of the answer, where the run "ended" has its end
TIMED = 4  # extra tokens on which the time of the parts is taken
WEIGHTS = witness.weigh(SHIPPED)
HORIZON = 10**8  # so many tokens repay every move

MOVING, OVER_RANKS = ("moved", "moved_twice"), ("ranks", "ranks_with_copies", "ranks_with_sharded_attention")
RUNS = ("alone", "ended", "copies", *MOVING, *OVER_RANKS)
FOLDER = tempfile.TemporaryDirectory()  # goes when the tests end


def run_of(name):
    """The Run of this name; a skip where it cannot run here."""
    outcome = outcome_of(name)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


@cache
def outcome_of(name):
    """The Run, or how it failed: it would not do better for the next test."""
    folder = Path(FOLDER.name) / name
    folder.mkdir(exist_ok=True)
    try:
        return started(name, folder)
    except Exception as error:
        return error


def started(name, folder):
    if name == "alone":
        return in_one_process(folder, 24)
    if name == "ended":
        return in_one_process(folder, 24, model=str(ending_at(STOP, folder / "model")))
    if name == "one token":
        return in_one_process(folder, 1)
    if name == "copies":
        trace = run_of("alone").asked["trace"]
        return in_one_process(folder, 12, placement="replicated", placement_trace=trace, redundant_experts=16)
    if name in MOVING:
        # Looks after 33 tokens, which only learns, after 49, and in the longer run, which begins alike, after 97.
        tokens, before = (40, [(0, witness.contiguous(L, 8, E))]) if name == "moved" else (92, run_of("moved").history)
        return in_one_process(folder, tokens, before, rebalance_every=16, rebalance_horizon=HORIZON)
    if not mx.distributed.is_available("ring"):
        pytest.skip("this MLX has no ring: ranks cannot run")
    if name == "ranks":
        return over_two_ranks(folder, 10)
    if name == "ranks_with_sharded_attention":
        return over_two_ranks(folder, 6, attention="sharded")
    (folder / "by_hand.json").write_text('{"strategy": "by hand", "every_layer": ["0-79", "48-127"]}')
    return over_two_ranks(folder, 8, placement=str(folder / "by_hand.json"), combine="gather")


def ending_at(token, copy):
    """The shipped model in another folder, where it stops at this token."""
    shutil.copytree(SHIPPED, copy)
    (copy / "config.json").write_text(json.dumps(CONFIG | {"eos_token_id": token}))
    (copy / "generation_config.json").unlink()
    return copy


def options_of(folder, tokens, more):
    files = {"json": folder / "o.json", "trace": folder / "t.npz", "save_placement": folder / "p.json"}
    files = {name: str(path) for name, path in files.items()}
    return {
        "model": str(SHIPPED.relative_to(ROOT)),
        "prompt": PROMPT,
        "max_tokens": tokens,
        "dtype": "float32",
        "verify": True,
        "full": True,
        "trials": 3,
        **files,
        **more,
    }


def line_of(asked):
    values = {f"--{name.replace('_', '-')}": value for name, value in asked.items()}
    return [str(word) for name, value in values.items() for word in ([name] if value is True else [name, value])]


def left(asked, before, **more):
    """The Run of what lies in the files now; before: where experts were until the last move, None without moves."""
    chosen, prefill = witness.read_trace(asked["trace"])
    document = json.loads(Path(asked["json"]).read_text(), parse_constant=pytest.fail)
    last = witness.read_placement(asked["save_placement"])
    if before:
        moved = [look["after_tokens"] for look in document["rebalancing"]["looks"] if look["moved"]]
        history = [*before, (moved[len(before) - 1], last)]
    else:
        history = [(0, last)]
    return Run(document=document, chosen=chosen, prefill=prefill, history=history, asked=asked, **more)


def in_one_process(folder, tokens, before=None, **more):
    """Run the script here, and overhear what mlx-lm answers it."""
    asked, responses, dealt, out = options_of(folder, tokens, more), [], [], io.StringIO()
    generation = importlib.import_module("mlx_lm.generate")
    original = generation.stream_generate

    def overheard(*arguments, **options):
        if not responses:  # trials at loading deal out slots, too
            dealt.clear()
        for response in original(*arguments, **options):
            yield response
        responses.append(response)

    def heard(serving, ids):
        device = devices(serving, ids)
        dealt.append(device.reshape(-1, K).tolist())
        return device

    devices = Serving.devices
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(generation, "stream_generate", overheard)
        patch.setattr(Serving, "devices", heard)
        patch.setattr(sys, "argv", ["qwen3_expert_parallel.py", *line_of(asked)])
        patch.setenv("COLUMNS", "160")
        patch.chdir(ROOT)
        peak, begin = witness.peak_of_process(), time.perf_counter()
        qwen3_expert_parallel.main()
        wall = time.perf_counter() - begin
    peak = (peak, witness.peak_of_process() or math.inf)
    run = left(asked, before, text=out.getvalue(), wall=wall, responses=responses, peak=peak)
    answered = []  # what was dealt comes pass by pass, in them layer by layer; the tokens of the run are the first
    while len(answered) < len(run.chosen):
        answered += zip(*dealt[:L], strict=True)
        del dealt[:L]
    return run if before else replace(run, dealt=answered)


def over_two_ranks(folder, tokens, **more):
    asked, begin = options_of(folder, tokens, {"timeout": 60.0, **more}), time.perf_counter()
    results = launch("ring", 2, "qwen3_expert_parallel.py", *line_of(asked), tmp_path=folder)
    assert all(status == 0 for status, _, _ in results), results
    wall = time.perf_counter() - begin
    run = left(asked, None, text=results[0][1], wall=wall, ranks=2)
    if "placement" not in asked:
        return run
    # Nobody listens in other processes: the same choice is asked for again, for a prompt but for its last token in one
    # pass, and then token by token; what every rank counted is held against it.
    prompt, dealt = run.prefill.count(True) - 1, [[] for _ in run.chosen]
    for l, row in enumerate(run.history[0][1]):
        serving = Serving(np.array([[e in mine for e in range(E)] for mine in row]))
        for start, end in [(0, prompt), *((t, t + 1) for t in range(prompt, len(run.chosen)))]:
            ids = np.array([of_layers[l] for of_layers in run.chosen[start:end]])
            for of_token, devices in zip(dealt[start:end], serving.devices(ids).tolist(), strict=True):
                of_token.append(devices)
    return replace(run, dealt=dealt)
