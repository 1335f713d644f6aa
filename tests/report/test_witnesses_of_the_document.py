"""Every figure of a run's JSON, worked out again without the package (witness.py), for six runs (witness_runs.py).

A figure that is new in the document fails here until it has a witness.
"""

import json
import math

import mlx.core as mx
import mlx_lm
import pytest
import witness
from conftest import ROOT, SHIPPED
from mlx_lm.models.cache import make_prompt_cache
from witness import positive
from witness_runs import CONFIG, HORIZON, MOVING, OVER_RANKS, PROMPT, RUNS, STOP, TIMED, WEIGHTS, E, K, L, run_of

from expert_parallel import place_experts  # what is judged; how well it does is counted here

HIDDEN, VOCABULARY = CONFIG["hidden_size"], CONFIG["vocab_size"]


@pytest.fixture(params=RUNS)
def run(request):
    return run_of(request.param)


@pytest.fixture(scope="module")
def stock():
    """(prompt, answer of 92 tokens, tokenizer) by stock mlx-lm and a loop of our own."""
    model, tokenizer = mlx_lm.load(str(SHIPPED))
    model.set_dtype(mx.float32)
    prompt = tokenizer.encode(PROMPT)
    cache, tokens, step = make_prompt_cache(model), [], prompt
    for _ in range(92):
        tokens.append(model(mx.array([step]), cache=cache)[0, -1].argmax().item())
        step = tokens[-1:]
    return prompt, tokens, tokenizer


# --- the document ---------------------------------------------------------------------------------------------------


def test_the_runs_are_what_they_are_meant_to_be():
    copies, moved, moved_twice = map(run_of, ("copies", *MOVING))
    assert all(len(layer[d]) == 18 for layer in copies.history[0][1] for d in range(8))  # (128 + 16) / 8
    assert [start for start, _ in moved.history] == [0, 49]
    assert [start for start, _ in moved_twice.history] == [0, 49, 97]
    assert len(moved.chosen) == 57 and len(moved_twice.chosen) == 109
    for run in (copies, moved, moved_twice):
        for _, held in run.history:
            assert all(set().union(*layer) == set(range(E)) for layer in held)


def test_the_answer_is_that_of_stock(run, stock):
    prompt, tokens, tokenizer = stock
    generation = run.document["generation"]
    count, computed = answered(run, tokens)
    assert generation["tokens"] == tokens[:count]
    assert generation["text"] == tokenizer.decode(tokens[:count])
    assert generation["prompt_tokens"] == len(prompt) == run.prefill.count(True)
    assert run.prefill == [True] * len(prompt) + [False] * computed


def answered(run, tokens):
    """(tokens of the answer, tokens of it that went through the model): the one that ends it went, too."""
    most = run.asked["max_tokens"]
    if run is run_of("ended"):
        return tokens.index(STOP), tokens.index(STOP) + 1
    return most, most


def test_parity(run, stock):
    tokens, _ = answered(run, stock[1])
    most = 0 if run.ranks == 1 and mx.default_device() == mx.cpu else 1e-3
    expected = {
        "source": "measured",
        "tokens_equal": True,
        "max_abs_logit_difference": lambda difference: 0 <= difference <= most,
        "tokens_compared": tokens,
        "tokens_equal_at_first": tokens,
        "logits_compared": (run.prefill.count(True) + tokens) * VOCABULARY,
    }
    assert not witness.differences(run.document["parity"], expected)


def test_routing(run):
    parts = {
        name: [token for token, is_prompt in zip(run.chosen, run.prefill, strict=True) if is_prompt == wanted]
        for name, wanted in (("prefill", True), ("decode", False))
    }
    expected = {"source": "measured", "num_experts": E, "top_k": K, "dropped_tokens": 0}
    expected |= {name: witness.routing(part, L, E) for name, part in parts.items()}
    expected["all"] = {"source": "measured", **witness.routing(run.chosen, L, E)}
    assert not witness.differences(run.document["routing"], expected)


def test_balance(run):
    expected = witness.balance(run.chosen, run.prefill, run.history, E, run.dealt)
    if "placement_trace" in run.asked:
        expected |= fitted(run)
    assert not witness.differences(run.document["balance"], expected)


def fitted(run):
    """What the placement promised: on the tokens it was fitted on, and one of their first half on their second."""
    chosen, _ = witness.read_trace(run.asked["placement_trace"])
    half, loads = len(chosen) // 2, [[0] * E for _ in range(L)]
    for token in chosen[:half]:
        for layer, experts in enumerate(token):
            for expert in experts:
                loads[layer][expert] += 1
    found = place_experts(loads, len(run.history[0][1][0]), run.asked["placement"], run.asked["redundant_experts"])
    held = [[found.experts_on(layer, device) for device in range(found.num_devices)] for layer in range(L)]
    return {
        "balancedness_fitted_simulated": witness.evenness(witness.loads_of(chosen, run.history))[1],
        "balancedness_expected_simulated": witness.evenness(witness.loads_of(chosen[half:], [(0, held)]))[1],
    }


def test_memory(run):
    held = run.history[-1][1]
    devices = len(held[0])
    experts = [sum(len(layer[d]) for layer in held) * WEIGHTS["one"] for d in range(devices)]
    rest, whole = rest_of(run), WEIGHTS["experts"] + WEIGHTS["rest"]
    together = [each + rest for each in experts]
    heads, size = CONFIG["num_key_value_heads"], CONFIG["head_dim"]
    lowest, highest = run.peak
    if run.ranks > 1:
        lowest = highest = max(rank["resident"]["peak"] for rank in run.document["ranks"])
    expected = {
        "source": "measured" if run.ranks > 1 else "experts measured; the rest, here once, modelled on each",
        "experts_per_device_bytes": experts,
        "experts_per_device_bytes_modelled": experts,
        "rest_per_device_bytes": [rest] * devices,
        "per_device_bytes": together,
        "full_model_bytes": whole,
        "full_model_expert_bytes": WEIGHTS["experts"],
        "reduction": whole / max(together),
        "reduction_of_experts": WEIGHTS["experts"] / max(experts),
        "kv_cache_bytes": L * 2 * heads * size * 4 * 256 * math.ceil((len(run.chosen) + TIMED) / 256) // parts_of(run),
        "peak_process_bytes": lambda peak: 0.99 * lowest <= peak <= 1.01 * highest,
    }
    assert not witness.differences(run.document["memory"], expected)


def parts_of(run):
    """Over how many ranks attention and head are split."""
    return run.ranks if run.asked.get("attention") == "sharded" else 1


def rest_of(run):
    """Bytes on each device of all that is no expert."""
    return WEIGHTS["rest"] - (WEIGHTS["split"] - WEIGHTS["split"] // parts_of(run))


def test_communication(run):
    devices, tokens = len(run.history[0][1][0]), len(run.chosen)
    both = {"reduce": L * HIDDEN * 4, "gather": L * HIDDEN * 4 * K}
    used = run.asked.get("combine", "reduce")
    ring = 2 * (devices - 1) / devices * both[used]
    expected = {
        "source": "modelled",
        "combine": used,
        "value_bytes": 4,
        "bytes_per_token": both[used],
        "bytes_per_token_by_combine": both,
        "ring_bytes_sent_per_token_and_rank": round(ring),
    }
    if run.ranks > 1:
        kinds = collectives(run, both[used])
        calls, sent = (sum(kind[n] for kind in kinds.values()) for n in (0, 1))
        expected["counted"] = {
            "source": str,  # see the next test
            "tokens": tokens,
            "calls": calls,
            "payload_bytes": sent,
            "payload_bytes_per_token": sent / tokens,
            "by_kind": kinds,
        }
    assert not witness.differences(run.document["communication"], expected)


def collectives(run, of_experts):
    """{kind: [calls, bytes that a rank hands in]}; mlx-lm reads a prompt but for its last token, then one at a time."""
    tokens, answers, steps = len(run.chosen), run.asked["max_tokens"], 2 + run.asked["max_tokens"]
    agreed = answers + 1  # tokens that rank 0 tells, 4 bytes each, and as many by which all prove that they took part
    if run.asked.get("attention") != "sharded":
        return {"all_sum": [steps * L + agreed, tokens * of_experts + 8 * agreed]}
    attention, head = tokens * L * HIDDEN * 4, tokens * VOCABULARY // 2 * 4
    sums = [steps * 2 * L + agreed, tokens * of_experts + attention + 8 * agreed]
    return {"all_sum": sums, "all_gather": [steps, head]}


@pytest.mark.parametrize("name", ["ranks", "ranks_with_sharded_attention"])
def test_bytes_counted_are_at_least_those_sent(name):
    """Of a prompt but for its last token mlx-lm evaluates the cache alone: the last layer's experts and the head wait
    for ever. Of 460 tokens with sharded attention 15.1 MB were counted and 6.9 MB went over the network interface."""
    run = run_of(name)
    unread = run.prefill.count(True) - 1
    called = sum(sent for _, sent in collectives(run, L * HIDDEN * 4).values())
    head = VOCABULARY // 2 * 4 if run.asked.get("attention") == "sharded" else 0
    sent = called - unread * (HIDDEN * 4 + head)
    counted = run.document["communication"]["counted"]
    assert counted["payload_bytes"] == called > sent > called / 10
    assert "an upper bound" in counted["source"]


def test_speed(run):
    """Of one process mlx-lm's own figures are known; of all the seconds that they make are within the run's."""
    generation = run.document["generation"]
    assert len(run.responses) == (8 if run.ranks == 1 else 0)  # else nothing was overheard
    ours, stock = run.responses[2::2], run.responses[3::2]  # by turns; the first of each is no trial
    runs = {
        "prompt_tokens_per_second": [last.prompt_tps for last in ours] or [positive] * 3,
        "tokens_per_second": [last.generation_tps for last in ours] or [positive] * 3,
        "stock_tokens_per_second": [last.generation_tps for last in stock] or [positive] * 3,
    }
    expected = {
        "source": "measured",
        "runs": runs,
        **{name: sorted(speeds)[1] for name, speeds in generation["runs"].items()},
        "seconds_to_first_token": generation["prompt_tokens"] / generation["prompt_tokens_per_second"],
        "prompt_tokens": run.prefill.count(True),
        "generation_tokens": run.prefill.count(False),
        "text": str,  # see the answer
        "tokens": list,  # see the answer
    }
    assert not witness.differences(generation, expected)
    took = sum(generation["prompt_tokens"] / speed for speed in generation["runs"]["prompt_tokens_per_second"])
    for name, count in (("tokens_per_second", generation["generation_tokens"]),
                        ("stock_tokens_per_second", len(generation["tokens"]))):  # fmt: skip
        took += sum(count / speed for speed in generation["runs"][name])
    assert took + run.document["time"]["total"] < run.wall


def test_one_token_has_no_speed():
    run = run_of("one token")
    took = run.document["generation"]["prompt_tokens"] / run.document["generation"]["prompt_tokens_per_second"]
    speed = run.document["generation"]["tokens_per_second"]
    assert speed is None or 1 / speed > took / 100


def test_where_the_time_goes(run):
    seconds = run.document["time"]
    expected = {"source": "measured with a stop after each part", **seconds_of(run)}
    assert not witness.differences(seconds, expected)
    assert seconds["experts"] + seconds["waiting"] + seconds["collectives"] < seconds["total"] < run.wall
    if run.ranks > 1:
        assert {**run.document["ranks"][0]["seconds"], "source": seconds["source"]} == seconds


def seconds_of(run):
    sent = positive if run.ranks > 1 else 0
    times = {"total": positive, "experts": positive, "waiting": sent, "collectives": sent}
    return {"tokens": TIMED, "value_bytes": 4, **times}


def test_placement_model_options_and_environment(run):
    document, first = run.document, run.history[0][1]
    strategy = run.asked.get("placement", "contiguous")
    expected = {
        "source": "as asked for",
        "strategy": "by hand" if strategy.endswith(".json") else strategy,
        "devices": len(first[0]),
        "ranks": run.ranks,
        "experts_per_device": [[len(experts) for experts in layer] for layer in first],
        "notes": [],  # nothing was left out of a trace, or merged in a file
    }
    assert not witness.differences(document["placement"], expected)
    assert not witness.differences(document["environment"], witness.environment())
    assert document["model"]["environment"] == document["environment"]
    assert document["model"]["name"] == run.asked["model"]
    assert (
        json.loads((ROOT / run.asked["model"] / "config.json").read_text()).items()
        <= document["model"]["config"].items()
    )
    assert run.asked.items() <= document["options"].items()
    others = {name: value for name, value in document["options"].items() if name not in run.asked}
    defaults = {"temp": 0.0, "top_p": 1.0, "combine": "auto", "placement": "contiguous", "attention": "replicated"}
    assert {name: others[name] for name in defaults.keys() - run.asked.keys()}.items() <= defaults.items()
    sections = {
        "model",
        "environment",
        "options",
        "placement",
        "parity",
        "routing",
        "balance",
        "rebalancing",
        "memory",
        "cache",
    }
    sections |= {"communication", "ranks", "generation", "time", "not_a_number", "journal", "failures", "batch"}
    assert set(document) == sections
    assert document["batch"] is None
    assert document["not_a_number"] is None and document["cache"] is None
    assert (document["ranks"] is None) == (run.ranks == 1)
    assert (document["rebalancing"] is None) == ("rebalance_every" not in run.asked)


# --- moves ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MOVING)
def test_rebalancing(name):
    run = run_of(name)
    found = run.document["rebalancing"]
    costs = {"expert_bytes": WEIGHTS["one"], "side_by_side": False}
    costs |= dict.fromkeys(("bytes_per_second", "seconds_per_slot", "seconds_per_layer"), positive)
    looks = [look_of(run, n) for n in range(2, 1 + run.asked["max_tokens"] // 16)]
    source = "measured; names with modelled in them are not"
    expected = {"source": source, "tokens_until_look": 16, "costs": costs, "looks": looks}
    assert not witness.differences(found, expected)
    for look in found["looks"]:
        assert look["longest_layer_seconds"] <= look["pause_seconds"] < run.wall


def look_of(run, number):
    """What is said of a look: after each 16 answered tokens, the first of which are learnt from."""
    starts = [start for start, _ in run.history]
    prompt = run.prefill.count(True)
    after = prompt + 16 * number
    moved = after in starts
    before = [held for start, held in run.history if start < after][-1]
    then = [held for start, held in run.history if start <= after][-1]
    pairs = [(a, b) for old, new in zip(before, then, strict=True) for a, b in zip(old, new, strict=True)]
    arrivals = sum(len(new - old) for old, new in pairs)
    cost = run.document["rebalancing"]["costs"]
    pause = arrivals * WEIGHTS["one"] / cost["bytes_per_second"]
    pause += sum(old != new for old, new in pairs) * cost["seconds_per_layer"]
    fresh = [[n / 16 for n in row] for row in witness.loads_of(run.chosen[after - 16 : after], [(0, before)])]
    fresh_then = [[n / 16 for n in row] for row in witness.loads_of(run.chosen[after - 16 : after], [(0, then)])]
    look = {
        "after_tokens": after,
        "moved": moved,
        "experts_read_here": arrivals,
        "bytes_here": arrivals * WEIGHTS["one"],
        "moves_of_all": arrivals,
        "bytes_of_all": arrivals * WEIGHTS["one"],
        "pause_seconds": positive if moved else 0.0,
        "longest_layer_seconds": positive if moved else 0.0,
        "pause_seconds_modelled": pause,
        "gain_seconds_modelled": gain_of(run, number, before, then, fresh, fresh_then) if moved else 0.0,
        "balancedness_before": witness.evenness(fresh)[1],
        "balancedness_after_modelled": witness.evenness(fresh_then)[1],
    }
    if moved:
        end = next((start for start in starts if start > after), len(run.chosen))
        kept, stayed = (witness.evenness(witness.loads_of(run.chosen[after:end], [(0, held)]))[1] for held in
                        (then, before))  # fmt: skip
        look["since"] = {"tokens": end - after, "balancedness": kept, "balancedness_unmoved": stayed}
    return look


def gain_of(run, number, before, then, fresh, fresh_then):
    """Seconds over the horizon: what the slowest device has less, by the older tokens and by the newest.

    Older ones count half after each 16 tokens. The newest are few: of D devices the fullest seems
    sqrt(2 ln D) sqrt(mean / tokens) fuller than it is.
    """
    prompt = run.prefill.count(True)
    ends = [0, *(prompt + 16 * n for n in range(1, number))]
    known, known_then = [], []
    for held, into in ((before, known), (then, known_then)):
        total, weight = [[0.0] * len(held[0]) for _ in held], 0.0
        for start, end in zip(ends, ends[1:], strict=False):
            keep = 0.5 ** ((end - start) / 16)
            new = (1 - keep) / ((end - start) * math.log(2) / 16)  # as if they came evenly
            loads = witness.loads_of(run.chosen[start:end], [(0, held)])
            total = [
                [keep * a + new * b for a, b in zip(*rows, strict=True)] for rows in zip(total, loads, strict=True)
            ]
            weight = keep * weight + new * (end - start)
        into += [[n / weight for n in row] for row in total]
    slots = 0.0
    for l in range(L):
        if before[l] != then[l]:
            noise = math.sqrt(2 * math.log(len(before[l])) * sum(known[l]) / len(before[l]) / 16)
            slots += min(max(known[l]) - max(known_then[l]), max(fresh[l]) - noise - max(fresh_then[l]))
    return slots * HORIZON * run.document["rebalancing"]["costs"]["seconds_per_slot"]


# --- ranks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OVER_RANKS)
def test_ranks(name):
    run = run_of(name)
    found, held = run.document["ranks"], run.history[0][1]
    for rank, figures in enumerate(found):
        own = sum(len(layer[rank]) for layer in held) * WEIGHTS["one"]
        expected = {
            "expert_bytes_per_device": [own if device == rank else 0 for device in range(2)],
            "expert_bytes": own,
            "rest_bytes": rest_of(run),
            "resident": {"now": positive, "peak": positive},
            "slots_computed_per_layer": lambda slots, rank=rank: slots_can_be(run, rank, slots),
            "seconds": seconds_of(run),
        }
        assert not witness.differences(figures, expected, f"rank {rank}")
        assert own + rest_of(run) < figures["resident"]["now"] <= figures["resident"]["peak"]
        seconds = figures["seconds"]
        assert seconds["experts"] + seconds["waiting"] + seconds["collectives"] < seconds["total"]
    for l in range(L):  # a rank that masks computes the others' slots, too
        assert sum(rank["slots_computed_per_layer"][l] for rank in found) >= len(run.chosen) * K


def slots_can_be(run, rank, slots):
    """Whether a rank answered for so many slots of each layer.

    Its own experts' slots; those that both hold are levelled in each step. Timed tokens do not count.
    """
    steps = [range(run.prefill.count(True) - 1)]  # mlx-lm reads the prompt but for its last token at once
    steps += [[token] for token in range(len(steps[0]), len(run.chosen))]
    everything = len(run.chosen) * K
    both = [rank_document["slots_computed_per_layer"] for rank_document in run.document["ranks"]]
    for l in range(L):
        mine, theirs = run.history[0][1][l][rank], run.history[0][1][l][1 - rank]
        least = most = 0
        for step in steps:
            experts = [expert for token in step for expert in run.chosen[token][l]]
            only, free = sum(e not in theirs for e in experts), sum(e in mine and e in theirs for e in experts)
            level = len(experts) / 2
            least += min(max(math.floor(level), only), only + free)
            most += min(max(math.ceil(level), only), only + free)
        masked = both[0][l] + both[1][l] > everything
        if not least <= slots[l] <= (everything if masked else most):
            return False
    return True
