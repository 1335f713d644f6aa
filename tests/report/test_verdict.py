"""The verdict on a run: every line by hand, for runs that differ in what it speaks of."""

import re

import pytest
from printed import facts_of

from expert_parallel.report.verdict import verdict


def document(**changes):
    """Of a run with eight simulated devices, uneven and slower than stock."""
    whole = {
        "parity": {"tokens_equal": True, "tokens_compared": 64, "logits_compared": 331_776,
                   "max_abs_logit_difference": 0.0, "tokens_equal_at_first": 64},
        "not_a_number": None,
        "failures": None,
        "cache": None,
        "memory": {"per_device_bytes": [3_000_000, 3_930_000], "full_model_bytes": 17_690_000, "reduction": 4.5},
        "balance": {"balancedness_layers": 0.6, "balancedness_if_uniform_simulated": 0.88},
        "placement": {"devices": 8, "ranks": 1, "strategy": "contiguous"},
        "generation": {"tokens_per_second": 147.24, "stock_tokens_per_second": 233.0,
                       "runs": {"tokens_per_second": [147.24]}},
        "communication": {"ring_bytes_sent_per_token_and_rank": 7168},
        "ranks": None,
    }  # fmt: skip
    for section, fields in changes.items():
        whole[section] = {**(whole[section] or {}), **fields} if isinstance(fields, dict) else fields
    return whole


def said(**changes):
    return facts_of(str(verdict(document(**changes))), "In short")


def test_the_whole_verdict():
    assert said() == {
        "answer": "the same as stock mlx-lm's: 64 tokens, 331,776 logits to the bit",
        "memory": "the fullest device holds 3.93 MB of 17.69 MB, 4.50x less",
        "balance": "balancedness 0.60, the devices' mean load over the fullest one's: 1 is even, and a router that"
        " chose at random would give 0.88. To try: --trace FILE, then --placement balanced --placement-trace FILE",
        "speed": "147.2 tokens/s, stock mlx-lm 233.0 (one run each): one process plays 8 devices",
        "real ranks": "each would send 7.17 kB a token (modelled); model_analysis.py says what your hardware makes of"
        " it",
    }
    lost = {"on_failure": "drop", "answer_stays": False, "losses": [a_loss(0, 3)]}
    assert len(said(failures=lost)) <= 6


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"parity": {"max_abs_logit_difference": 0.000123}}, "the same as .* logits within 0.0002$"),
        ({"parity": {"max_abs_logit_difference": 0.0003}}, "the same as .* logits within 0.0003$"),
        ({"parity": {"max_abs_logit_difference": 0.0007}}, "the same as .* logits within 0.0007$"),  # by 1e-4: above 7
        (
            {"parity": {"tokens_equal": False, "max_abs_logit_difference": 9.41, "tokens_equal_at_first": 7}},
            "NOT the same tokens as stock mlx-lm's after the first 7 of 64; logits differ by up to 9.41",
        ),
        ({"parity": {"tokens_equal": None}}, "no tokens as"),
        ({"parity": None}, "not compared with stock mlx-lm .--verify"),
        ({"not_a_number": {"from_layer": 2}}, "not a number: see below"),
    ],
)
def test_the_answer(changes, answer):
    assert re.match(answer, said(**changes)["answer"])


def a_loss(after, *devices, gone=64, pause=None, before=0.7, since=0.6):
    return {"devices": devices, "after_tokens": after, "experts_gone": gone, "pause_seconds_measured": pause,
            "balancedness_before": before, "balancedness_since": since}  # fmt: skip


@pytest.mark.parametrize(
    ("how", "losses", "line"),
    [
        (
            "recover",
            [a_loss(0, 3, pause=0.25), a_loss(16, 1, 2, pause=0.5, gone=80)],
            "device 3 before the prompt, devices 1 2 after 16 tokens: 144 experts had no other copy and were read again"
            " in 0.75 s, the answer stays",
        ),
        (
            "drop",
            [a_loss(0, 3), a_loss(16, 1, gone=128)],
            "device 3 before the prompt, device 1 after 16 tokens: 128 experts had no other copy; drop changes"
            " the answer",
        ),
        ("failover", [a_loss(16, 3, gone=0)], "device 3 after 16 tokens: copies took over, the answer stays"),
        (
            "reroute",
            [a_loss(1, 3)],
            "device 3 after 1 token: 64 experts had no other copy; reroute changes the answer",
        ),
        ("drop", [a_loss(16, 3, gone=0)], "device 3 after 16 tokens: copies took over, the answer stays"),
        (
            "drop",
            [a_loss(0, 3, gone=0), a_loss(16, 1)],
            "device 3 before the prompt, device 1 after 16 tokens: 64 experts had no other copy; drop changes"
            " the answer",
        ),
        ("drop", [], None),
    ],
)
def test_what_was_lost(how, losses, line):
    failures = {"on_failure": how, "answer_stays": how in ("recover", "failover"), "losses": losses}
    assert said(failures=failures).get("lost") == line


@pytest.mark.parametrize(
    ("before", "since", "line"),
    [
        (0.671, 0.618, "balancedness 0.67 before, 0.55 after the losses: of the devices that live, mean load over the"),
        (None, 0.618, "balancedness 0.55 after the losses: of"),
        (0.671, None, "balancedness 0.67 before, 0.55 after the losses: of"),
    ],
)
def test_balance_before_a_loss_and_since(before, since, line):
    """That of all devices over the whole run counts the lost ones as idle, and no placement would help."""
    losses = [a_loss(1, 3, before=before, since=since), a_loss(2, 4, before=0.1, since=0.55)]
    assert said(failures={"on_failure": "drop", "losses": losses})["balance"].startswith(line)
    nothing = [a_loss(0, 3, before=None, since=None)]
    assert "balance" not in said(failures={"on_failure": "drop", "losses": nothing})


@pytest.mark.parametrize(
    ("strategy", "even", "end"),
    [
        ("round-robin", 0.6, "--placement balanced --placement-trace FILE"),
        ("balanced", 0.6, "--placement replicated --redundant-experts 16 --placement-trace FILE"),
        ("replicated", 0.6, "a router that chose at random would give 0.88"),
        ("by hand", 0.6, "a router that chose at random would give 0.88"),
        ("contiguous", 0.84, "no more than so few tokens scatter"),
        ("contiguous", 0.82, "--placement-trace FILE"),
        ("contiguous", 0.88 - 0.05, "--placement-trace FILE"),
    ],
)
def test_what_imbalance_costs_and_what_would_help(strategy, even, end):
    line = said(placement={"strategy": strategy}, balance={"balancedness_layers": even})["balance"]
    assert line.startswith(f"balancedness {even:.2f}, the devices' mean load") and line.endswith(end)


def test_one_device_and_one_token_and_ranks():
    alone = said(placement={"devices": 1}, communication={"ring_bytes_sent_per_token_and_rank": 0},
                 generation={"stock_tokens_per_second": None})  # fmt: skip
    assert alone["speed"] == "147.2 tokens/s" and "balance" not in alone and "real ranks" not in alone
    assert "speed" not in said(generation={"tokens_per_second": None})
    more = said(generation={"runs": {"tokens_per_second": [140.0, 154.48]}})
    assert more["speed"].startswith("147.2 tokens/s, stock mlx-lm 233.0 (medians of 2 runs)")
    assert "balance" not in said(balance={"balancedness_layers": None})
    ranks = [{"seconds": {"tokens": 4, "collectives": 0.002, "waiting": 0.006}}, {"seconds": {}}]
    real = said(placement={"ranks": 2}, ranks=ranks)
    assert real["speed"].endswith("(one run each); rank 0 spends 0.50 ms a token in collectives, 1.50 waiting")
    assert "real ranks" not in real


def test_what_a_run_from_disk_waited_for():
    cache = {"hit_rate": 0.874, "policy": "lfu", "bytes_read_per_token": 12_345_678, "seconds": 20.04}
    line = facts_of(str(verdict(document(cache={**cache, "reads": {"seconds_waited": 3.26}}))), "In short")["disk"]
    assert line == (
        "87% of the experts that steps wanted were in memory (lfu); 12.35 MB read a token,"
        " computing waited 3.3 of 20.0 s"
    )
