"""The report of lost devices: every figure again by plain loops over the trace, and what the script refuses."""

import functools
import importlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import witness
from checkpoints import adapter
from conftest import SHIPPED
from mlx_lm import load
from printed import columns_of, facts_of

from expert_parallel.failure.losses import Losses
from expert_parallel.report.failure import journal, lost
from expert_parallel.report.table import sections
from expert_parallel.study.chance import uniform_routing
from expert_parallel.trace import RoutingTrace

L, E, D, K = 4, 128, 8, 8
HIDDEN, WIDTH = 256, 64  # of the shipped model's experts: 4 bits, a scale and a bias of 4 bytes for each 64 weights
EXPERT_BYTES = 3 * HIDDEN * WIDTH * (4 / 8 + 2 * 4 / 64)
PROMPT = "def add(a, b):\n"
LONG = PROMPT * 40  # 320 tokens


def run(run_here, folder, *more):
    files = {"json": folder / "o.json", "trace": folder / "t.npz"}
    line = [word for name, path in files.items() for word in (f"--{name}", path)]
    asked = ("--model", SHIPPED, "--prompt", PROMPT, "--max-tokens", 14, "--trials", 0, "--full")
    result = run_here("qwen3_expert_parallel.py", *asked, *line, *more)
    assert result.returncode == 0, result.stderr
    document = json.loads(files["json"].read_text(), parse_constant=pytest.fail)
    return result.stdout, document, *witness.read_trace(files["trace"])


def contiguous():
    return [set(range(16 * d, 16 * d + 16)) for d in range(D)]


def share_of(experts, chosen):
    slots = [expert for token in chosen for of_layer in token for expert in of_layer]
    return sum(expert in experts for expert in slots) / len(slots)


def test_dropped_experts_slot_by_slot(run_here, tmp_path):
    """Devices 3 and 5 vanish after 4 and 9 tokens: what they held is nobody's."""
    text, document, chosen, prefill = run(
        run_here, tmp_path, "--fail-device", "3@4", "--fail-device", "5@9", "--on-failure", "drop"
    )
    failures, prompt = document["failures"], prefill.count(True)
    assert document["options"]["fail_device"] == ["3@4", "5@9"]
    cuts = [0, prompt + 3, prompt + 8, len(chosen)]  # the pass of a token comes before the next is sampled
    gone = [set(range(48, 64)), set(range(48, 64)) | set(range(80, 96))]
    for n, (row, mine) in enumerate(zip(failures["losses"], gone, strict=True)):
        begin, start, end = cuts[n : n + 3]
        held = [contiguous(), [set() if d == 3 else m for d, m in enumerate(contiguous())]][n]
        after = [held[d] - mine for d in range(D)]
        before, since = (
            [[x for x, kept in zip(row, now, strict=True) if kept] for row in witness.loads_of(part, [(0, [now] * L)])]
            for part, now in ((chosen[begin:start], held), (chosen[start:end], after))
        )
        expected = {
            "devices": [(3, 5)[n]],
            "after_tokens": (4, 9)[n],
            "experts_held_by_them": 16 * L,
            "experts_gone": L * len(mine),
            "gone_by_layer": {str(layer): sorted(mine) for layer in range(L)},
            "repair_experts": L * len(mine),
            "repair_bytes": int(L * len(mine) * EXPERT_BYTES),
            "repair_seconds_modelled": lambda seconds: 0 < seconds < 60,
            "pause_seconds_measured": None,
            "tokens_since": end - start,
            "slots_unserved_share": share_of(mine, chosen[start:end]),
            "experts_unserved_share": len(mine) / E,
            "balancedness_before": witness.evenness(before)[1],
            "balancedness_since": witness.evenness(since)[1],
            "balancedness_since_if_uniform_simulated": lambda even: 0.4 < even < 0.9,
        }
        assert not witness.differences(row, expected)
    rest = {key: value for key, value in failures.items() if key != "losses"}
    assert rest == {
        "source": "measured; names with modelled or simulated in them are not", "on_failure": "drop",
        "answer_stays": False, "slots_rerouted_share": None, "did_not_happen": [],
    }  # fmt: skip
    # The whole run's balance counts no slot of nobody's, and no device for one.
    history = [(0, [contiguous()] * L)]
    history += [(cuts[n + 1], [[m - gone[n] for m in contiguous()]] * L) for n in range(2)]
    assert document["balance"]["device_loads"] == witness.loads_of(chosen, history)
    touched = [
        len({e // 16 for e in experts if n < cuts[1] or e not in gone[n >= cuts[2]]})
        for n, token in enumerate(chosen)
        for experts in token
    ]
    assert document["balance"]["fan_out"] == pytest.approx(sum(touched) / len(touched))
    # As printed.
    rows = columns_of(text, "Lost devices (drop: another answer)", 2)
    assert rows["device"] == ("3", "5") and rows["after tokens"] == ("4", "9")
    assert rows["experts gone"] == ("64 of 512", "128 of 512") and rows["bytes"] == ("1.97 MB", "3.93 MB")
    assert rows["would read"] == ("64", "128")  # nothing is, and the seconds are of another way
    since = columns_of(text, "Since each loss, until the next (measured; uniform: simulated)", 2)
    assert since["tokens"] == ("5", "6") and "the last one known among them" in " ".join(text.split())
    assert since["unserved"] == tuple(f"{row['slots_unserved_share']:.1%}" for row in failures["losses"])
    assert since["still gone"] == ("12.5%", "25.0%")
    for label, key in (("balance before", "before"), ("since", "since"), ("uniform", "since_if_uniform_simulated")):
        assert since[label] == tuple(f"{row[f'balancedness_{key}']:.3f}" for row in failures["losses"])
    # The verdict, and memory: what is lost is held by nobody.
    lost = "device 3 after 4 tokens, device 5 after 9 tokens: 128 experts had no other copy; drop changes the answer"
    assert facts_of(text, "In short")["lost"].startswith(lost)
    assert facts_of(text, "In short")["real ranks"].startswith("each of 8, had none been lost, would send 7.17 kB a")
    assert [n for n, size in enumerate(document["memory"]["experts_per_device_bytes"]) if not size] == [3, 5]
    assert [n for n, size in enumerate(document["memory"]["per_device_bytes"]) if not size] == [3, 5]  # nor the rest
    first = document["parity"]["tokens_equal_at_first"]
    assert first >= 4 and document["parity"]["tokens_equal"] is False


def test_rerouted_slots_are_counted_while_the_answer_came(run_here, tmp_path, monkeypatch):
    counted, count = [], Losses.rerouted.fget
    monkeypatch.setattr(Losses, "rerouted", property(lambda self: counted.append(count(self)) or counted[-1]))
    text, document, chosen, prefill = run(run_here, tmp_path, "--fail-device", "2", "--on-failure", "reroute")
    failures = document["failures"]
    assert not any(32 <= e < 48 for token in chosen for experts in token for e in experts)
    assert failures["losses"][0]["slots_unserved_share"] == 0 and failures["losses"][0]["tokens_since"] == len(chosen)
    assert failures["losses"][0]["balancedness_before"] is None
    share = failures["slots_rerouted_share"]
    assert share == pytest.approx(counted[0] / (len(chosen) * L * K)) and 0.02 < share < 0.4
    assert f"{share:.1%} of all choices were not the router's first" in " ".join(text.split())


@pytest.mark.parametrize(
    ("more", "how", "line"),
    [
        ((), "recover", "device 6 after 3 tokens: 64 experts had no other copy and were read again in "),
        (("--redundant-experts", "each"), "failover", "device 6 after 3 tokens: copies took over, the answer stays"),
        (("--redundant-experts", "each"), "drop", "device 6 after 3 tokens: copies took over, the answer stays"),
    ],
)
def test_what_leaves_the_answer_is_compared_with_stock(more, how, line, run_here, tmp_path):
    text, document, _, _ = run(run_here, tmp_path, "--fail-device", "6@3", "--on-failure", how, "--verify", *more)
    assert document["parity"]["tokens_equal"] is True and document["parity"]["max_abs_logit_difference"] == 0
    row = document["failures"]["losses"][0]
    assert facts_of(text, "In short")["lost"].startswith(line)
    assert document["failures"]["answer_stays"]
    assert 0 < row["pause_seconds_measured"] < 60 if how == "recover" else row["pause_seconds_measured"] is None
    printed = columns_of(text, f"Lost devices ({how}: the same answer)", 1)
    if how == "recover":
        assert (printed["read"], printed["seconds"]) == (("64",), (f"{row['pause_seconds_measured']:.3f}",))
    assert row["repair_experts"] == row["experts_gone"] == (64 if how == "recover" else 0)
    held = document["memory"]["experts_per_device_bytes"]
    assert held[6] == 0 and sum(held) == (L * E if how == "recover" else L * (2 * E - 32)) * EXPERT_BYTES


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Of attention alone, and of experts, whose layout holds no single ones."""
    found = {"attention": ["self_attn.q_proj"], "experts": ["mlp.switch_mlp.up_proj"]}
    for name, keys in found.items():
        found[name], _ = adapter(tmp_path_factory.mktemp("adapters") / name, load(str(SHIPPED))[0], 4, keys=keys)
    return found


@pytest.fixture(scope="module")
def whole(run_here, tmp_path_factory):
    """(options) -> (tokens, routing) of a run that loses nothing, the same one for all that ask for it."""

    @functools.cache
    def of(*line):
        _, document, *routing = run(run_here, tmp_path_factory.mktemp("whole"), *line)
        return document["generation"]["tokens"], routing

    return of


@pytest.mark.parametrize("how", [pytest.param("failover", marks=pytest.mark.slow), "recover"])
def test_a_loss_in_bfloat16_changes_no_bit(how, whole, run_here, tmp_path, monkeypatch):
    """Slow on CPUs; what takes over has lain in memory from the start, what is read again has its type to get."""
    test_a_loss_beside_other_options_changes_no_bit(
        how, ("--dtype", "bfloat16"), {}, whole, run_here, tmp_path, monkeypatch
    )


@pytest.mark.parametrize("how", ["failover", "recover"])
@pytest.mark.parametrize(
    "beside",
    [
        ("--adapter-path", "attention"),
        ("--adapter-path", "experts"),
        ("--streams",),
        ("--kv-bits", 8),
        pytest.param(("--dtype", "float16"), marks=pytest.mark.slow),
        ("--temp", 1, "--seed", 5),
        pytest.param(("--prompt", LONG), marks=pytest.mark.slow),
    ],
    ids=lambda words: "-".join(map(str, words))[:24].strip("-"),
)
def test_a_loss_beside_other_options_changes_no_bit(how, beside, adapters, whole, run_here, tmp_path, monkeypatch):
    """Text, routing of every token and logits are those of the run without it, and of stock mlx-lm."""
    generation = importlib.import_module("mlx_lm.generate")
    in_parts = functools.partial(generation.stream_generate, prefill_step_size=64)  # of the long prompt
    monkeypatch.setattr(generation, "stream_generate", in_parts)
    line = [adapters.get(word, word) for word in beside]
    line += ["--on-failure", how] + ["--redundant-experts", "each"] * (how == "failover")
    if "experts" in beside and how == "recover":
        result = run_here("qwen3_expert_parallel.py", "--model", SHIPPED, "--fail-device", "6@3", *line)
        assert result.returncode == 2 and "in a layout that single ones cannot be read" in result.stderr
        return
    lost = ["--fail-device", "6@3"] + ["--fail-device", "1@9"] * (how == "recover")
    _, document, *routing = run(run_here, tmp_path, *lost, "--verify", *line)
    tokens, routing_whole = whole(*line[: len(beside)])
    assert routing[1].count(True) > (4 * 64 if LONG in beside else 0)
    assert routing == routing_whole and document["generation"]["tokens"] == tokens
    assert document["parity"]["tokens_equal"] is True and document["parity"]["max_abs_logit_difference"] == 0
    assert [row["after_tokens"] for row in document["failures"]["losses"]] == ([3, 9] if how == "recover" else [3])


def test_two_losses_by_hand_after_the_second_of_which_no_token_comes():
    """Three devices with four experts in two layers, device 0 with none in one; 1000 bytes were read in two seconds."""
    held = np.zeros((2, 3, 4), bool)
    held[0, [0, 0, 1, 2], [0, 1, 2, 3]] = held[1, [1, 1, 1, 2], [0, 1, 2, 3]] = True
    changes, events = [(0, held)], []
    for device, start in ((1, 2), (2, 5)):
        before, after = changes[-1][1], changes[-1][1].copy()
        after[:, device] = False
        arrivals = before & ~after
        changes.append((start, after))
        events.append({"devices": [device], "after_tokens": start, "before": before, "gone": ~after.any(axis=1),
                       "arrivals": arrivals, "pause_seconds": 0.25})  # fmt: skip
    losses = SimpleNamespace(changes=changes, events=events, model=None, on_failure="drop", rerouted=0, planned={})
    trace = RoutingTrace(np.random.default_rng(0).permuted(np.tile(np.arange(4), (5, 2, 1)), axis=2)[..., :2], 4)
    whole, reading = (
        SimpleNamespace(expert_bytes=np.array([100, 30])),
        SimpleNamespace(bytes_read_experts=1000, seconds=2),
    )
    tables = lost(losses, trace, [1, 3], whole, reading)
    first, second = sections(tables)["failures"]["losses"]
    assert (first["repair_bytes"], second["repair_bytes"]) == (190, 130)
    assert (first["repair_seconds_modelled"], second["repair_seconds_modelled"]) == (190 / 500, 130 / 500)
    assert (first["tokens_since"], second["tokens_since"]) == (3, 0)
    uniform = uniform_routing(3, 2, held[0, [0, 2]])["balancedness"]
    assert first["balancedness_since_if_uniform_simulated"] == uniform
    assert second["balancedness_since"] is second["balancedness_since_if_uniform_simulated"] is None
    printed = columns_of(str(tables[0]), "Lost devices (drop: another answer)", 2)
    assert printed["seconds"] == ("0.380", "0.260") and printed["bytes"] == ("190 B", "130 B")


@pytest.mark.parametrize(("replayed", "differing"), [(0, 0), (5, 0), (5, 2)])
def test_what_came_from_a_journal(replayed, differing):
    figures = {"file": "run.jsonl", "tokens_replayed": replayed, "tokens_new": 7, "differing": differing,
               "seconds_replay": 0.256}  # fmt: skip
    text = str(table := journal(figures))
    assert table.to_json()["source"] == "measured"
    assert facts_of(text, "Journal") == {
        "journal": "run.jsonl",
        **({"tokens from it": "5, gone through in 0.26 s"} if replayed else {}),
        "new tokens": "7",
        **({"chosen otherwise": "2 of them, by the model as it is here"} if differing else {}),
    }


def test_an_answer_that_ends_before(run_here, tmp_path, monkeypatch):
    """A stop token comes first: nothing was lost, and the report says so."""
    generation = importlib.import_module("mlx_lm.generate")
    original = generation.stream_generate

    def short(*arguments, **options):
        for n, response in enumerate(original(*arguments, **options)):
            yield response
            if n == 2:
                return

    monkeypatch.setattr(generation, "stream_generate", short)
    text, document, _, _ = run(run_here, tmp_path, "--fail-device", "6@13")
    assert document["failures"]["losses"] == [] and document["failures"]["did_not_happen"] == [[13, [6]]]
    assert facts_of(text, "Lost devices")["none"] == "the answer ended before" and "lost" not in facts_of(
        text, "In short"
    )


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("--fail-device", "8"), "--fail-device 8: there are devices 0 to 7"),
        (("--fail-device", "9", "--fail-device", "1"), "--fail-device 9: there are devices 0 to 7"),
        (("--fail-device", "3@14", "--fail-device", "1@2"), "--fail-device 3@14: the answer has 14 tokens"),
        (("--fail-device", "x"), "--fail-device x: needs a device, or DEVICE@TOKENS such as 3@16, both from 0 up"),
        (("--devices", 2, "--fail-device", "1@3", "--fail-device", "0"), "all 2 devices are lost"),
        (("--fail-device", "1", "--on-failure", "failover"), "without device 1 nobody holds 64 experts"),
        (("--on-failure", "drop"), "--on-failure is of no use without --fail-device"),
        (("--fail-device", "1", "--rebalance-every", 4), "it does not go with --rebalance-every"),
        (("--fail-device", "1", "--expert-memory", "50%"), "it does not go with --expert-memory"),
    ],
)
def test_what_is_refused(more, line, run_here):
    result = run_here("qwen3_expert_parallel.py", "--model", SHIPPED, "--max-tokens", 14, *more)
    assert result.returncode == 2 and line in result.stderr and result.stderr.count("\n") == 1 and not result.stdout
