"""What do lost devices cost in quality? Perplexity of the shipped model without the experts that went with them.

    python benchmarks/lost_devices.py

1, 2 and 4 of 8 devices are gone: each one alone, and some sets of two and of four. Placements are fitted on the first
tokens of each held-out text, perplexity is measured on later ones. What stands in for the lost experts:

    drop         nothing: their slots give zero
    renormalise  the token's other experts, with weights that make up for them
    reroute      the next best experts that live, chosen by the router

With no copies, with copies of the hottest, with one copy of each; beside experts at random, as many as a device holds.
Twelve minutes of one core.
"""

import argparse
import math
import sys
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from expert_parallel import Placement, load_sharded, place_experts, record_routing
from expert_parallel.checkpoint.finding import SHIPPED
from expert_parallel.command import output
from expert_parallel.failure.losses import lose_devices
from expert_parallel.failure.survival import gone, protected
from expert_parallel.report import plots, table

DEVICES, WINDOW, FITTED = 8, 512, 1024  # FITTED tokens of each text come first, judged ones start at 2048
WAYS = ("drop", "renormalise", "reroute")
CASES = (  # copies, ways
    ("none", WAYS),
    ("none, experts at random", ("reroute",)),
    ("16 of the hottest", ("reroute",)),
    ("32 of the hottest", ("reroute",)),
    ("one of each", ("reroute",)),
)


def placements(loads) -> dict:
    """{copies: Placement} by expert loads [L, E]."""
    homes = np.random.default_rng(0).permuted(np.tile(np.arange(loads.shape[1]) % DEVICES, (len(loads), 1)), axis=1)
    at_random = Placement(homes[:, None] == np.arange(DEVICES)[:, None])
    even = place_experts(loads, DEVICES, "balanced")
    hot = [place_experts(loads, DEVICES, "replicated", copies) for copies in (16, 32)]
    return dict(zip((name for name, _ in CASES), (even, at_random, *hot, protected(even, loads)), strict=True))


def perplexity(placement, lost, way, windows) -> float:
    """On windows [1, 513], of a model that has lost these devices."""
    model, _ = load_sharded(SHIPPED, placement=placement)
    if lost:
        lose_devices(model, lost, on_failure=way)
    loss = 0.0
    for window in windows:
        loss += nn.losses.cross_entropy(model(window[:, :-1]), window[:, 1:], reduction="sum").item()
    return math.exp(loss / (len(windows) * WINDOW))


def picture(document: dict):
    """Perplexity over devices lost, a line for each way and copies: mean over the sets, and the worst; of its JSON."""
    rows = [
        {"way": each["way"] if each["copies"] == "none" else f"{each['way']}, copies: {each['copies']}",
         "lost": each["lost"], "perplexity": float(np.mean(each["perplexity"])), "worst": max(each["perplexity"])}
        for each in document["results"] if "random" not in each["copies"]
    ]  # fmt: skip
    caption = (
        f"{SHIPPED.name}, {document['tokens']:,} held-out tokens, {DEVICES} devices, balanced; ends: the worst set"
    )
    return plots.quality_lines(rows, "lost", document["stock"], caption)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--windows", type=int, default=1, help=f"of {WINDOW} tokens from each of five texts, 1 to 4 (default: 1)")
    add("--sets", type=int, default=4, help="of devices, for 2 and 4 lost, and for experts at random (default: 4)")
    add("--json", type=Path)
    add("--plots", type=Path, metavar="DIR", help="save a picture, lost_devices.png")
    args = parser.parse_args()
    with output.exit_on_user_error():
        if not 1 <= args.windows <= 4 or not 1 <= args.sets <= 28:
            raise ValueError(f"--windows {args.windows}, --sets {args.sets}: needs 1 to 4, and 1 to 28")
        # 1. Loads of the first tokens, and what is judged on.
        model, tokenizer = load_sharded(SHIPPED, num_devices=1)
        files = sorted((SHIPPED / "held-out").glob("*.txt"))
        texts = [tokenizer.encode(file.read_text(encoding="utf-8"), verbose=False) for file in files]
        with record_routing(model) as trace:
            for ids in texts:
                for start in range(0, FITTED, WINDOW):
                    mx.eval(model(mx.array([ids[start : start + WINDOW]])))
        starts = range(2048, 2048 + args.windows * WINDOW, WINDOW)
        windows = [mx.array([ids[start : start + WINDOW + 1]]) for start in starts for ids in texts]

        # 2. Every single loss, and the same sets of two and four for all.
        random, lost = np.random.default_rng(1), {1: [(device,) for device in range(DEVICES)]}
        for count in (2, 4):
            every = list(combinations(range(DEVICES), count))
            lost[count] = [every[n] for n in sorted(random.choice(len(every), args.sets, replace=False))]
        placed, results = placements(trace.loads()), []
        stock = perplexity(placed["none"], (), None, windows)
        jobs = [(copies, way, count) for copies, ways in CASES for way in ways for count in lost]
        for copies, way, count in tqdm(jobs, leave=False, disable=None):
            sets = lost[count][:: DEVICES // args.sets or 1] if "random" in copies and count == 1 else lost[count]
            missing = [float(gone(placed[copies].held, some).sum(axis=1).mean()) for some in sets]
            if not any(missing):
                sets, missing = sets[:1], missing[:1]  # all of them are the model as it was: one is asked whether
            found = [perplexity(placed[copies], some, way, windows) for some in sets]
            results.append({"copies": copies, "way": way, "lost": count, "sets": sets, "experts_gone": missing,
                            "perplexity": found})  # fmt: skip

        # 3. A row for each way, the losses side by side.
        rows = []
        for copies, way in dict.fromkeys((each["copies"], each["way"]) for each in results):
            row = [copies, way]
            for each in (each for each in results if (each["copies"], each["way"]) == (copies, way)):
                cost = np.array(each["perplexity"]) / stock - 1
                row += [f"{np.mean(each['experts_gone']):.1f}", f"{cost.mean():+.1%} ({cost.max():+.1%})"]
            rows.append(row)
        about = table.environment()
        print("{device}, {device_name}, {cores} cores; mlx {mlx}, mlx-lm {mlx_lm}; ".format(**about) + SHIPPED.name)
        title = f"Perplexity over {stock:.3f} without losses, mean (worst) of the sets, measured on"
        labels = [label for count in lost for label in ("gone", f"{count} of {DEVICES} lost")]
        columns = ("copies", "way", *labels)
        print(f"{title} {len(windows) * WINDOW:,} tokens; gone: experts of a layer")
        widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        for row in (columns, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        document = {"source": "measured", "tokens": len(windows) * WINDOW, "stock": stock, "environment": about,
                    "results": results}  # fmt: skip
        if args.json:
            output.write_json(args.json, document)
        if args.plots:
            plots.save_plots(args.plots, {"lost_devices": picture(document)})


if __name__ == "__main__":
    main()
