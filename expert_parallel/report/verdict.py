"""The verdict on a run, in six lines at most: from the figures of its report, for who reads no table."""

from __future__ import annotations

from math import ceil, floor, log10

from ..failure.planned import in_words
from .table import Table, facts, size

CLEAR = 0.05  # of balancedness below chance level, from which on routing and not the number of tokens is the reason

ROUNDING = 1e-2  # of a logit, which sums in another order may give


def verdict(document: dict) -> Table:
    """Same answer or not, what a device holds, what imbalance costs and what would help, speed and its reason.

    document  the run's JSON (see `table.sections`), with its options
    """
    items = {
        "answer": _answer(document["parity"], document["not_a_number"]),
        "lost": _lost(document["failures"]),
        "memory": _memory(document["memory"]),
        "disk": _disk(document["cache"]),
        "balance": _balance(document["balance"], document["placement"], document["failures"]),
        "speed": _speed(document),
        "real ranks": _ranks(document),
    }
    return facts("In short", items)


def _answer(parity: dict | None, broken: dict | None) -> str:
    if broken:
        return "not a number: see below"
    if parity is None:
        return "not compared with stock mlx-lm (--verify compares every token and logit)"
    off = parity["max_abs_logit_difference"]
    logits = f"{parity['logits_compared']:,} logits {'to the bit' if off == 0 else f'within {_up(off)}'}"
    differ = f"logits differ by up to {off:.3g}"
    if parity["tokens_equal"] and off > ROUNDING:
        return f"the same {parity['tokens_compared']} tokens as stock mlx-lm's, but {differ}"
    if parity["tokens_equal"]:
        return f"the same as stock mlx-lm's: {parity['tokens_compared']} tokens, {logits}"
    if parity["tokens_equal"] is None:
        return f"no tokens as stock mlx-lm's; {logits}"
    first, count = parity["tokens_equal_at_first"], parity["tokens_compared"]
    return f"NOT the same tokens as stock mlx-lm's after the first {first} of {count}; {differ}"


def _up(value: float) -> str:
    """Rounded up to one digit: a bound stays one."""
    step = 10.0 ** floor(log10(value)) if value else 1.0
    return f"{step * ceil(value / step * (1 - 1e-9)):.1g}"


def _lost(failures: dict | None) -> str | None:
    if not failures or not failures["losses"]:
        return None
    losses, how = failures["losses"], failures["on_failure"]
    when = in_words(losses)
    if not any(row["experts_gone"] for row in losses):
        return f"{when}: copies took over, the answer stays"
    # What was read again can be lost again: each loss counts its own then, else what is gone since the first.
    count = sum(row["experts_gone"] for row in losses) if how == "recover" else losses[-1]["experts_gone"]
    gone = f"{when}: {count} experts had no other copy"
    if how == "recover":
        pause = sum(row["pause_seconds_measured"] for row in losses)
        return f"{gone} and were read again in {pause:.2f} s, the answer stays"
    return f"{gone}; {how} changes the answer"


def _memory(memory: dict) -> str:
    fullest = size(max(memory["per_device_bytes"]))
    return f"the fullest device holds {fullest} of {size(memory['full_model_bytes'])}, {memory['reduction']:.2f}x less"


def _disk(cache: dict | None) -> str | None:
    if cache is None:
        return None
    known = f"{cache['hit_rate']:.0%} of the experts that steps wanted were in memory"
    waited = f"computing waited {cache['reads']['seconds_waited']:.1f} of {cache['seconds']:.1f} s"
    return f"{known} ({cache['policy']}); {size(cache['bytes_read_per_token'])} read a token, {waited}"


def _balance(balance: dict, placement: dict, failures: dict | None) -> str | None:
    even, chance = balance["balancedness_layers"], balance["balancedness_if_uniform_simulated"]
    if placement["devices"] == 1 or even is None:
        return None
    if losses := (failures or {}).get("losses"):
        times = {"before": losses[0]["balancedness_before"], "after": losses[-1]["balancedness_since"]}
        known = ", ".join(f"{value:.2f} {when}" for when, value in times.items() if value is not None)
        known += f" the loss{'es' * (len(losses) > 1)}" if known else ""
        return f"balancedness {known}: of the devices that live, mean load over the fullest one's" if known else None
    text = f"balancedness {even:.2f}, the devices' mean load over the fullest one's: 1 is even"
    text += f", and a router that chose at random would give {chance:.2f}"
    if even > chance - CLEAR:
        return f"{text}: no more than so few tokens scatter"
    more = {"contiguous": "balanced", "round-robin": "balanced", "balanced": "replicated --redundant-experts 16"}
    better = more.get(placement["strategy"])
    return f"{text}. To try: --trace FILE, then --placement {better} --placement-trace FILE" if better else text


def _speed(document: dict) -> str | None:
    speeds, placement = document["generation"], document["placement"]
    ours, stock = speeds["tokens_per_second"], speeds["stock_tokens_per_second"]
    runs = len(speeds["runs"]["tokens_per_second"])
    how = f"medians of {runs} runs" if runs > 1 else "one run each"
    if ours is None:
        return None
    several = f" of {len(batch['sequences'])} sequences together" if (batch := document.get("batch")) else ""
    text = f"{ours:.1f} tokens/s{several}" + (f", stock mlx-lm {stock:.1f} ({how})" if stock else "")
    if placement["ranks"] > 1:
        seconds = document["ranks"][0]["seconds"]
        parts = (1e3 * seconds[part] / seconds["tokens"] for part in ("collectives", "waiting"))
        return text + "; rank 0 spends {:.2f} ms a token in collectives, {:.2f} waiting".format(*parts)
    return f"{text}: one process plays {placement['devices']} devices" if placement["devices"] > 1 else text


def _ranks(document: dict) -> str | None:
    sent = document["communication"]["ring_bytes_sent_per_token_and_rank"]
    if document["placement"]["ranks"] > 1 or not sent:
        return None
    lost = (document["failures"] or {}).get("losses")
    who = f"each of {document['placement']['devices']}, had none been lost," if lost else "each"
    return f"{who} would send {size(sent)} a token (modelled); model_analysis.py says what your hardware makes of it"
