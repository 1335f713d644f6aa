"""The projection's report held against plain arithmetic that shares no code with the package, and its sentences.

Qwen3-Coder-30B at 4 bits (FACTS): 48 layers of 128 experts, top-8, hidden 2048, 32 heads of 128.
"""

import math
from dataclasses import replace
from math import comb

import numpy as np
import pytest
from conftest import ROOT
from printed import columns_of, facts_of

from expert_parallel.models.architecture import describe
from expert_parallel.models.configurations import load_configuration
from expert_parallel.projection.hardware import LINKS, MACHINES, Machine
from expert_parallel.report import projection
from expert_parallel.report.table import sections
from expert_parallel.trace import RoutingTrace

LAYERS, EXPERTS, CHOSEN, HIDDEN = 48, 128, 8, 2048
EXPERT, EXPERT_PARAMETERS = 2_654_208, 4_718_592
WHOLE_REST = 873_459_712  # bytes of all but the experts, the embedding table too
TABLE = 151_936 * HIDDEN  # parameters of the embedding table, and of the head
REST = WHOLE_REST - TABLE // 2 - TABLE // 64 * 4  # without the table at 4 bits, scale and bias for each group of 64
REST_PARAMETERS = 1_541_093_376 - TABLE
CACHE = LAYERS * 2 * 4 * 128 * 2  # bytes a token: keys and values of 4 heads, 2 bytes
BANDWIDTH, OPERATIONS, PER_LAYER = 473.1e9, 11.04e12, 99.05e-6  # M4 Max
LATENCY, WIRE, PORTS = 25.5e-6, 8.05e9, 4  # Thunderbolt
CONTEXT, DEVICES = 2048, [1, 2, 7, 8]
HYBRID = {2: 8_680_000_000, 7: None}


@pytest.fixture(scope="module")
def described():
    return describe(load_configuration("qwen3-coder-30b"), bits=4)


@pytest.fixture(scope="module")
def trace():
    """300 tokens whose favourites lie on the first devices."""
    skew = np.random.default_rng(1).random((300, LAYERS, EXPERTS)) * np.linspace(1, 2, EXPERTS)[::-1]
    return RoutingTrace(np.argsort(-skew, axis=2)[..., :CHOSEN].astype(np.uint16), EXPERTS, model="skewed")


def setting_of(machine="m4-max", link="thunderbolt-jaccl", devices=DEVICES, memory=None, **more):
    device = MACHINES[machine] if memory is None else replace(MACHINES[machine], memory_bytes=memory)
    return projection.Setting(device, LINKS[link][0], f"[{link}]", LINKS[link][1], CONTEXT, devices, **more)


def report(described, setting, hybrid=None):
    """(figures of the JSON, printed text)"""
    tables = projection.projection(described, setting, hybrid)
    return sections(tables)["projection"], "\n".join(map(str, tables))


# --- witnesses -----------------------------------------------------------------------------------------------


def sizes(devices):
    return [EXPERTS // devices + (n < EXPERTS % devices) for n in range(devices)]


def homes(devices):
    return [device for device, count in enumerate(sizes(devices)) for _ in range(count)]


def fullest_slots_if_uniform(devices):
    """Expected slots of the fullest device for one token: by counting, over choices of 8 of 128 without replacement."""
    expected = 0.0
    for most in range(CHOSEN):  # E max = sum of P(max > m)
        ways = [1] + [0] * CHOSEN
        for held in sizes(devices):
            ways = [sum(ways[k - j] * comb(held, j) for j in range(min(most, k) + 1)) for k in range(CHOSEN + 1)]
        expected += 1 - ways[CHOSEN] / comb(EXPERTS, CHOSEN)
    return expected


def fullest_by_counting(experts, devices):
    """[L] mean over tokens of the slots of the fullest device."""
    home = homes(devices)
    return [
        sum(max(map([home[e] for e in token].count, range(devices))) for token in experts[:, layer].tolist())
        / len(experts)
        for layer in range(LAYERS)
    ]


def all_sum(payload, devices):
    """(latency, transfer): everybody to everybody where there are ports for it and it takes less, else a ring."""
    if devices == 1:
        return 0.0, 0.0
    ring = (2 * (devices - 1) * LATENCY, 2 * (devices - 1) / devices * payload / WIRE)
    mesh = (LATENCY, (devices - 1) * payload / WIRE)
    return mesh if devices <= PORTS + 1 and sum(mesh) < sum(ring) else ring


def decoding(devices, slots, share=1.0):
    """Seconds by cause of one token, `slots` of each layer on the fullest device."""
    latency, transfer = all_sum(2 * HIDDEN, devices)
    times = 2 * LAYERS if share < 1 else LAYERS
    return {
        "fixed": LAYERS * PER_LAYER,
        "rest": share * (REST + CONTEXT * CACHE) / BANDWIDTH,
        "experts": sum(slots) * EXPERT / BANDWIDTH,
        "latency": times * latency,
        "transfer": times * transfer,
    }


def prompt_seconds(devices, slots, different):
    """2,048 tokens at once; slots and different experts [L] of the fullest device."""
    tokens = 2048
    attention = LAYERS * 4 * 32 * 128 * (tokens * (tokens + 1) / 2)
    rest = (2 * (REST_PARAMETERS - TABLE) * tokens + 2 * TABLE + attention) / OPERATIONS
    experts = sum(
        max(2 * EXPERT_PARAMETERS * s / OPERATIONS, EXPERT * d / BANDWIDTH)
        for s, d in zip(slots, different, strict=True)
    )
    collectives = LAYERS * sum(all_sum(tokens * HIDDEN * 2, devices))
    return LAYERS * PER_LAYER + max(rest, REST / BANDWIDTH) + experts + collectives


def test_every_figure_is_what_plain_arithmetic_gives(described, trace):
    figures, _ = report(described, setting_of(trace=trace), HYBRID)
    rows = {row["devices"]: row for row in figures["devices"]}
    assert list(rows) == DEVICES
    first = sum(decoding(1, [CHOSEN] * LAYERS).values())
    for n, row in rows.items():
        parts = decoding(n, fullest_by_counting(trace.experts, n))
        assert row["milliseconds"] == pytest.approx({name: 1e3 * each for name, each in parts.items()})
        assert row["tokens_per_second"] == pytest.approx(1 / sum(parts.values()))
        assert row["speed_up"] == pytest.approx(first / sum(parts.values()))
        even = decoding(n, [CHOSEN / n] * LAYERS)
        assert row["tokens_per_second_if_even"] == pytest.approx(1 / sum(even.values()))
        assert row["bytes"] == -(-EXPERTS // n) * LAYERS * EXPERT + WHOLE_REST + CONTEXT * CACHE
        assert row["fits"]
        # The trace has 300 tokens: a prompt of 2,048 does as many times more, and reads the same experts.
        home, slots, different = homes(n), [], []
        for layer in range(LAYERS):
            devices = [home[expert] for expert in trace.experts[:, layer].ravel().tolist()]
            slots.append(max(map(devices.count, range(n))) * 2048 / 300)
            known = [home[expert] for expert in set(trace.experts[:, layer].ravel().tolist())]
            different.append(max(map(known.count, range(n))))
        assert row["prompt_tokens_per_second"] == pytest.approx(2048 / prompt_seconds(n, slots, different))
    share = (HYBRID[2] - EXPERTS // 2 * LAYERS * EXPERT) / WHOLE_REST
    sharded = decoding(2, fullest_by_counting(trace.experts, 2), share)
    assert rows[2]["hybrid_tokens_per_second"] == pytest.approx(1 / sum(sharded.values()))
    assert all("hybrid_tokens_per_second" not in rows[n] for n in (1, 7, 8))
    bound = 1 / (LAYERS * PER_LAYER + (REST + CONTEXT * CACHE) / BANDWIDTH)
    assert figures["bound_tokens_per_second"] == pytest.approx(bound)
    assert all(row["tokens_per_second"] < bound for row in rows.values())
    best = max(rows, key=lambda n: rows[n]["tokens_per_second"])
    assert (figures["best_devices"], figures["speed_up_over"]) == (best, 1)
    assert figures["usable_bytes"] == 0.75 * 128e9
    assert (figures["source"], figures["routing"], figures["context"]) == ("modelled", "skewed", CONTEXT)


def test_uniform_routing_is_what_counting_expects(described):
    figures, _ = report(described, setting_of())
    for row in figures["devices"]:
        n = row["devices"]
        expected = fullest_slots_if_uniform(n)
        assert row["milliseconds"]["experts"] == pytest.approx(
            1e3 * decoding(n, [expected] * LAYERS)["experts"], rel=0.02
        )
        # A prompt's fullest device is above the mean, by less than 4 standard deviations of 2,048 tokens' slots.
        share = sizes(n)[0] / EXPERTS
        mean = 2048 * CHOSEN * share
        spread = math.sqrt(2048 * CHOSEN * share * (1 - share) * (EXPERTS - CHOSEN) / (EXPERTS - 1))
        slow, fast = (prompt_seconds(n, [s] * LAYERS, [sizes(n)[0]] * LAYERS) for s in (mean + 4 * spread, mean))
        assert 2048 / slow <= row["prompt_tokens_per_second"] * (1 + 1e-9)
        assert row["prompt_tokens_per_second"] <= 2048 / fast * (1 + 1e-9)
    assert fullest_slots_if_uniform(2) == pytest.approx(5.059, abs=0.0005)
    assert figures["routing"] == "uniform"


@pytest.mark.slow
def test_copies_take_memory_and_relieve_the_fullest(described, trace):
    plain, _ = report(described, setting_of(trace=trace))
    copied, _ = report(described, setting_of(trace=trace, redundant=32))
    for n, before, after in zip(DEVICES, plain["devices"], copied["devices"], strict=True):
        slots = -(-(EXPERTS + 32) // n) if n > 1 else EXPERTS  # one device gets none
        assert after["bytes"] == slots * LAYERS * EXPERT + WHOLE_REST + CONTEXT * CACHE
        assert (after["tokens_per_second"] > before["tokens_per_second"]) == (n > 1)
        assert after["tokens_per_second"] <= after["tokens_per_second_if_even"] * (1 + 1e-9)
    uniform, _ = report(described, setting_of(redundant=32))
    for n, row in zip(DEVICES, uniform["devices"], strict=True):  # no placement without copies could do that
        without = 1e3 * decoding(n, [fullest_slots_if_uniform(n)] * LAYERS)["experts"]
        assert row["milliseconds"]["experts"] < (0.97 if n > 1 else 1.001) * without


def test_a_trace_in_which_one_device_has_all_gains_nothing(described):
    hot = RoutingTrace(np.tile(np.arange(8), (64, LAYERS, 1)), EXPERTS)
    figures, _ = report(described, setting_of(trace=hot))
    one, *_, eight = (row["milliseconds"]["experts"] for row in figures["devices"])
    assert eight == pytest.approx(one) == pytest.approx(1e3 * LAYERS * CHOSEN * EXPERT / BANDWIDTH)
    assert figures["routing"] == "trace"


def test_what_is_printed_is_what_the_json_has(described):
    figures, text = report(described, setting_of(), HYBRID)
    title = "Projection (modelled): Apple M4 Max, [thunderbolt-jaccl], uniform routing"
    columns = columns_of(text, title, len(DEVICES))
    assert all(f"{word}:" in text for word in ("if even", "hybrid", "prompt/s"))

    def shown(speed):
        return f"{speed:.0f}" if speed >= 1000 else f"{speed:.1f}" if speed >= 10 else f"{speed:.3f}"

    rows = figures["devices"]
    for heading, key in (("tokens/s", ""), ("if even", "_if_even")):
        assert columns[heading] == tuple(shown(row[f"tokens_per_second{key}"]) for row in rows)
    assert columns["prompt/s"] == tuple(shown(row["prompt_tokens_per_second"]) for row in rows)
    assert columns["hybrid"] == ("-", shown(rows[1]["hybrid_tokens_per_second"]), "-", "-")
    assert columns["speed-up"] == tuple(f"{row['speed_up']:.2f}x" for row in rows)
    assert columns["devices"] == ("1", "2", "7", "8")
    words = {"fixed": "fixed cost per layer", "latency": "latency of collectives"}
    assert columns["most time goes to"] == tuple(
        words[max(row["milliseconds"], key=row["milliseconds"].get)] for row in rows
    )
    facts = facts_of(text, "What it rests on")
    assert facts["bound"].startswith(f"{shown(figures['bound_tokens_per_second'])} tokens/s")
    assert facts["memory"] == "96.00 GB of 128.00 GB for weights and cache (Metal's limit for a GPU)"
    assert facts["speed-up"] == "over 1" and facts["context"].startswith("2,048 tokens")
    assert facts["device"] == figures["hardware_source"] == MACHINES["m4-max"].source
    assert facts["link"] == figures["link_source"] == LINKS["thunderbolt-jaccl"][1]
    assert (figures["hardware"], figures["link"]) == ("Apple M4 Max", "[thunderbolt-jaccl]")
    assert "*" not in facts and facts["differences"].startswith("of 12% or less say little")
    assert "largest error of a prediction: 12%" in (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")
    assert [projection.speed(n) for n in (1753.9, 1000, 65.84, 10, 0.01234)] == [
        "1754",
        "1000",
        "65.8",
        "10.0",
        "0.012",
    ]


# --- what fits, and the sentences -----------------------------------------------------------------------------


def test_what_does_not_fit_is_marked_and_not_proposed(described):
    """One device decodes fastest on these links, and cannot hold the model."""
    figures, text = report(described, setting_of(devices=[1, 2, 4, 8], memory=16e9))
    fullest = [EXPERTS // n * LAYERS * EXPERT + WHOLE_REST + CONTEXT * CACHE for n in (1, 2, 4, 8)]
    assert [row["fits"] for row in figures["devices"]] == [need <= 16e9 * 2 / 3 for need in fullest]
    assert columns_of(text, "Projection", 4)["devices"] == ("1 *", "2", "4", "8")
    assert columns_of(text, "Projection", 4)["speed-up"][:2] == ("-", "1.00x")
    assert (figures["speed_up_over"], figures["best_devices"]) == (2, 4)
    speeds = [row["tokens_per_second"] for row in figures["devices"]]
    assert speeds[0] > max(speeds[1:])
    assert [row["speed_up"] for row in figures["devices"]] == [
        None,
        1,
        *(pytest.approx(s / speeds[1]) for s in speeds[2:]),
    ]
    facts = facts_of(text, "What it rests on")
    assert facts["best number"] == (
        f"4 with {speeds[2]:.1f} tokens/s; more are no faster, 8 give {speeds[3]:.1f};"
        " fewer do not hold it: 17.38 GB on the fullest of 1, 10.67 GB are there"
    )
    assert facts["*"].startswith("does not fit") and facts["speed-up"] == "over 2, the fewest that hold it"


def test_a_byte_decides_what_fits(described):
    need = 17_180_913_664 + CONTEXT * CACHE
    for memory, fits in ((need, True), (need - 1, False)):
        exactly = type("Exactly", (Machine,), {"usable": (memory, "")})(**vars(MACHINES["h100"]))
        figures, _ = report(described, replace(setting_of("h100", "nvlink-h100", [1, 2]), machine=exactly))
        assert [row["fits"] for row in figures["devices"]] == [fits, True]


def test_where_nothing_fits_nothing_is_proposed(described):
    figures, text = report(described, setting_of(devices=[2, 4], memory=3e9))
    assert (figures["best_devices"], figures["speed_up_over"]) == (None, None)
    assert [row["speed_up"] for row in figures["devices"]] == [None, None]
    facts = facts_of(text, "What it rests on")
    assert facts["best number"] == (
        "none of those considered holds the model: 5.15 GB on the fullest of 4, 2.00 GB are there"
    )
    assert "speed-up" not in facts


def test_a_model_that_one_h100_cannot_hold():
    """Speed-ups are over the fewest GPUs that hold it, not over one."""
    kimi = describe(load_configuration("deepseek-v3"), bits=4)
    figures, text = report(kimi, setting_of("h100", "nvlink-h100", [1, 2, 4, 8]))
    assert [row["fits"] for row in figures["devices"]] == [False, False, False, True]
    assert [row["speed_up"] for row in figures["devices"]] == [None, None, None, 1]
    assert columns_of(text, "Projection", 4)["devices"] == ("1 *", "2 *", "4 *", "8")
    best = facts_of(text, "What it rests on")["best number"]
    assert best.startswith("8 with ") and "no other that holds the model was considered; fewer do not hold it" in best
    assert best.endswith("on the fullest of 4, 72.00 GB are there")


def test_speed_ups_are_over_one_device_though_it_was_not_asked_for(described):
    all_of_them, only_two = (report(described, setting_of(devices=n))[0] for n in ([1, 2], [2]))
    assert only_two["devices"] == all_of_them["devices"][1:]
    assert only_two["speed_up_over"] == 1


# --- a single sequence ----------------------------------------------------------------------------------------


def test_one_sequence_by_plain_arithmetic(described):
    """Every column of "One sequence at most", of fullest devices that are counted and drawn here."""
    table = projection.one_sequence(described, setting_of(devices=[1, 2, 8]))[0]
    figures, printed = sections([table])["one_sequence"], str(table)
    cache = CACHE * CONTEXT / BANDWIDTH
    fixed, rest, expert = LAYERS * PER_LAYER, REST / BANDWIDTH + cache, LAYERS * EXPERT / BANDWIDTH
    one = fixed + rest + CHOSEN * expert
    most = one / (fixed + rest + expert)  # one expert a layer is the least that the fullest device has
    assert figures["bound"] == pytest.approx(most, rel=1e-3)
    assert f"gives one sequence more than {most:.2f}x." in " ".join(printed.split())
    assert "does not hold" not in printed
    small = projection.one_sequence(described, setting_of(devices=[1, 2], memory=8e9))[0]
    assert "One device does not hold this model" in " ".join(str(small).split())
    random = np.random.default_rng(5)
    for row, devices in zip(figures["devices"], (2, 8), strict=True):
        home = np.stack([random.permutation(EXPERTS)[:CHOSEN] * devices // EXPERTS for _ in range(6000)])
        fullest = (home[:, :, None] == np.arange(devices)).sum(axis=1).max(axis=1).mean()
        assert row["fullest_experts"] == pytest.approx(fullest, rel=0.02)
        at_most = fixed + rest + row["fullest_experts"] * expert
        assert row["ceiling_if_even"] == pytest.approx(one / (fixed + rest + CHOSEN / devices * expert), rel=1e-3)
        assert row["ceiling"] == pytest.approx(one / at_most, rel=1e-3)
        assert row["break_even_seconds"] == pytest.approx((one - at_most) / LAYERS, rel=2e-3)
        steps = 1 if devices <= PORTS + 1 else 2 * (devices - 1)
        all_sum = steps * LATENCY + (1 if devices == 2 else 2 * (devices - 1) / devices) * HIDDEN * 2 / WIRE
        assert row["speed_up_1"] == pytest.approx(one / (at_most + LAYERS * all_sum), rel=0.02)
        assert row["speed_up_8"] > row["speed_up_1"]
    columns = columns_of(printed, "One sequence at most", 2)
    assert columns["devices"] == ("2", "8")
    formats = {"if even": "{ceiling_if_even:.2f}x", "of 8": "{fullest_experts:.2f}", "at most": "{ceiling:.2f}x"}
    formats |= {str(count): f"{{speed_up_{count}:.2f}}x" for count in (1, 8, 32, 128)}
    for label, shown in formats.items():
        assert columns[label] == tuple(shown.format(**row) for row in figures["devices"])
    assert columns["break-even"] == tuple(f"{1e6 * row['break_even_seconds']:.0f} us" for row in figures["devices"])
    assert table.source == "modelled" and "(modelled)" in printed


def test_one_sequence_with_a_trace_and_alone(described, trace):
    assert projection.one_sequence(described, setting_of(devices=[1])) == []
    skewed = projection.one_sequence(described, setting_of(devices=[4], trace=trace))[0].to_json()
    uniform = projection.one_sequence(described, setting_of(devices=[4]))[0].to_json()
    assert skewed["routing"] == "skewed" and uniform["routing"] == "uniform"
    home = trace.experts.astype(int) // 32
    fullest = (home[..., None] == np.arange(4)).sum(axis=2).max(axis=2).mean()
    assert skewed["devices"][0]["fullest_experts"] == pytest.approx(fullest)
    assert skewed["devices"][0]["ceiling"] < uniform["devices"][0]["ceiling"]


@pytest.mark.parametrize("devices", [2, 8])
def test_more_sequences_at_once_by_plain_arithmetic(described, devices):
    """Each has a cache of its own and its values in the all-sum; they share experts, of which the fullest is drawn."""
    (row,) = projection.one_sequence(described, setting_of(devices=[devices]))[0].to_json()["devices"]
    random, one_read = np.random.default_rng(7), LAYERS * PER_LAYER + REST / BANDWIDTH

    def seconds(count, devices):
        slots, different = [], []
        for _ in range(max(2, 1000 // count)):
            chosen = np.stack([random.permutation(EXPERTS)[:CHOSEN] for _ in range(count)])
            slots.append(np.bincount(chosen.ravel() * devices // EXPERTS, minlength=devices).max())
            different.append(np.bincount(np.unique(chosen) * devices // EXPERTS, minlength=devices).max())
        reading, computing = (
            np.mean(different) * EXPERT / BANDWIDTH,
            np.mean(slots) * 2 * EXPERT_PARAMETERS / OPERATIONS,
        )
        collectives = sum(all_sum(count * HIDDEN * 2, devices))
        caches = count * CACHE * CONTEXT / BANDWIDTH
        return one_read + caches + LAYERS * (max(reading, computing) + collectives)

    for count in (1, 8, 32, 128):
        assert row[f"speed_up_{count}"] == pytest.approx(seconds(count, 1) / seconds(count, devices), rel=0.015)
