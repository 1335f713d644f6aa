"""The table of claims in BENCHMARKS.md: the script gives it, and so does plain arithmetic that shares no code."""

import importlib.util
import random
import re
import subprocess
import sys

import pytest
from conftest import ROOT, of_a_user

from expert_parallel.projection.links import Link

SCRIPT = ROOT / "benchmarks" / "original_claims.py"
LAYERS, REST_BYTES, EXPERT_BYTES = 48, 873_459_712, 2_654_208
TABLE = 151_936 * 2048


def rows():
    """{claim: the other cells} of the table in BENCHMARKS.md."""
    text = (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8").partition("\n| claim |")[2].partition("\n\n")[0]
    return {cells[1]: cells[2:-1] for cells in (re.split(r" ?\| ?", line) for line in text.splitlines()[2:])}


def test_benchmarks_md_has_what_the_script_prints():
    done = subprocess.run(
        [sys.executable, SCRIPT], cwd=ROOT, env=of_a_user(), capture_output=True, text=True, check=True
    )
    assert done.stdout in (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")


def test_every_claim_of_the_write_up_is_there_with_its_source_and_command():
    found = rows()
    for claim in ("8x", "3.75 B", "~4 GB", "16 KB", "16x", "linear", "2-4x", "10-20x", "512 experts"):
        assert sum(claim in name for name in found) == 1, claim
    for holds, source, command in found.values():
        assert holds and source.startswith("modelled") and re.fullmatch(r"`python \S+\.py( --bits 8)?`", command)


def test_bytes_and_parameters_of_the_claims():
    found = {name.split()[0]: cells[0] for name, cells in rows().items()}
    whole, eighth = 128 * LAYERS * EXPERT_BYTES + REST_BYTES, 16 * LAYERS * EXPERT_BYTES + REST_BYTES
    assert found["8x"].startswith(f"{whole / eighth:.2f}x: {eighth / 1e9:.2f} GB of {whole / 1e9:.2f} GB")
    experts, rest = 16 * LAYERS * 4_718_592 / 1e9, 1_541_093_376 / 1e9
    text = f"{experts + rest:.2f} B: {experts:.2f} B of 16 experts in 48 layers and {rest:.2f} B of the rest"
    assert found["~3.75"].startswith(text)
    at_8 = 30_532_122_624 * (1 + 4 / 64)  # a byte each, scale and bias for each group of 64; a router has no other bits
    assert float(re.search(r"of ([\d.]+) GB at 8", found["~4"])[1]) == pytest.approx(at_8 / 1e9, rel=1e-3)
    slots, summed = 8 * 2048 * 2, 2048 * 2
    assert found["~16"] == (
        f"{slots:,} B a token *and layer* if every slot is sent, {summed:,} B if weighted sums are; over 48 layers"
        f" {slots * LAYERS / 1e6:.2f} MB and {summed * LAYERS / 1e3:.2f} kB"
    )
    active = 1_541_093_376 + 8 * LAYERS * 4_718_592
    assert found["~16x"].startswith(f"128 / 8 = 16 of the experts, {30_532_122_624 / active:.1f}x of all parameters")
    assert f"{(2 * LAYERS * EXPERT_BYTES + REST_BYTES) / 1e9:.2f} GB" in found["64"]


# --- speed-ups on H100s -------------------------------------------------------------------------------------------

MOVED, ARITHMETIC, PER_LAYER = 3350e9 * 473.1 / 546, 0.4 * 989e12, 99.05e-6
REST_READ = REST_BYTES - TABLE // 2 - TABLE // 64 * 4


def seconds(devices, tokens, sequences, experts, slots, first=0):
    """One step; experts and slots of the fullest device. NVLink inside a node of 8, a tree of 2 x 3 steps between 8."""
    head = TABLE * sequences
    multiplied = (1_541_093_376 - 2 * TABLE) * tokens + head
    # Each of many sequences has nothing before its token.
    attended = sequences if sequences > 1 else sum(range(first + 1, first + tokens + 1))
    operations = 2 * multiplied + LAYERS * 4 * 4096 * attended
    rest = max(REST_READ / MOVED + first * 98_304 / MOVED, operations / ARITHMETIC)
    of_experts = LAYERS * max(experts * EXPERT_BYTES / MOVED, 2 * slots * 4_718_592 / ARITHMETIC)
    payload = tokens * 4096
    collective = 0.0
    if devices > 1:
        collective += 6e-6 + 2 * 7 / 8 * payload / 370e9
    if devices > 8:
        collective += 6 * 5e-6 + 6 * payload / 8 / 50e9
    return LAYERS * (PER_LAYER + collective) + rest + of_experts


def fullest_of(devices, tokens, steps=60, seed=5):
    """(different experts, slots) of the fullest device under uniform routing, by drawing it once more."""
    draw, experts, slots = random.Random(seed), 0, 0
    for _ in range(steps):
        chosen = [expert for _ in range(tokens) for expert in draw.sample(range(128), 8)]
        home = [expert * devices // 128 for expert in chosen]
        slots += max(map(home.count, range(devices)))
        home = [expert * devices // 128 for expert in set(chosen)]
        experts += max(map(home.count, range(devices)))
    return experts / steps, slots / steps


def speed_ups_said(claim):
    text = next(cells[0] for name, cells in rows().items() if claim in name)
    return [float(number) for number in re.findall(r"([\d.]+)x", text)]


@pytest.mark.parametrize(("claim", "before", "after"), [("2-4x", 1, 8), ("10-20x", 8, 64), ("linear", 1, 8)])
def test_speed_ups_of_the_claims(claim, before, after):
    """To 2%: both sides draw their tokens."""
    expected = []
    for tokens in (1, 64):
        steps = 2000 if tokens == 1 else 60
        one, many = (seconds(n, tokens, tokens, *fullest_of(n, tokens, steps)) for n in (before, after))
        expected.append(one / many)
    one, many = (
        sum(seconds(n, 2048, 1, *load, first=first) for first in range(0, 8192, 2048))
        for n in (before, after)
        for load in [fullest_of(n, 2048, 2)]
    )
    assert speed_ups_said(claim) == pytest.approx([*expected, one / many], rel=0.02)


def test_nodes_add_up_inside_and_then_a_share_between():
    spec = importlib.util.spec_from_file_location("original_claims", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    inside, between = Link(1e-6, 1e9), Link(1e-4, 1e8)
    parts = script.Nodes(inside, between, per_node=4).all_sum_parts(4000, 8)
    assert parts == pytest.approx((6e-6 + 2e-4, 1.5 * 4000 / 1e9 + 1000 / 1e8))
