"""What does a better balance cost in quality? Load-aware routing and capacity limits in the shipped model.

    python benchmarks/quality_against_balance.py

Perplexity on held-out text beside the balance of 8 contiguous devices, both measured, for

    fitted bias    -strength x log(load / mean load), fitted on other text of the same domains,
                   levelling experts, or devices
    sign rule      the bias learned online, from none, in one pass over the first part of the text
    capacity       limits per expert and batch: drop by score, by position, or re-route; adaptive

Placements and copies stand at the end: they cost memory or nothing, never quality.
Two minutes on one core.
"""

import argparse
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import load
from tqdm import tqdm

from expert_parallel import balancedness, place_experts
from expert_parallel.checkpoint.finding import SHIPPED
from expert_parallel.command import output
from expert_parallel.report import plots, table
from expert_parallel.router.bias import fit_bias
from expert_parallel.router.control import Capacity, control_router

WINDOW = 512  # tokens of a batch: capacity limits hold for each
LEARNING = 128  # tokens of a batch while the sign rule learns: one step after each
METHODS = 13  # that need the text read, and one read to fit them on and one for the sign rule


def windows(tokenizer, folder, tokens):
    """(fit, test): windows of every domain's first tokens and of those that follow, as [1, 513] arrays."""
    fit, test = [], []
    for path in sorted(folder.glob("*.txt")):
        ids = tokenizer.encode(path.read_text(encoding="utf-8").replace("<|endoftext|>", ""), verbose=False)
        if len(ids) <= 2 * tokens:
            raise ValueError(f"{path} has {len(ids)} tokens, {2 * tokens + 1} are needed: lower --tokens")
        for part, start in ((fit, 0), (test, tokens)):
            part += [mx.array([ids[s : s + WINDOW + 1]]) for s in range(start, start + tokens, WINDOW)]
    return fit, test


def read(model, texts, bar, **control):
    """(perplexity, loads [L, E] as served, control) over the texts."""
    loss = count = 0
    with control_router(model, **control) as routers:
        for text in texts:
            logits = model(text[:, :-1])
            loss += nn.losses.cross_entropy(logits, text[:, 1:], reduction="sum").item()
            count += text.shape[1] - 1
            bar.update(text.shape[1] - 1)
        return math.exp(loss / count), routers.loads, routers


def methods(model, fit, fit_loads, placement, bar):
    """(name, options of control_router) one after the other."""
    yield "as trained", {}
    for strength in (0.25, 0.5, 1.0):
        yield f"bias for experts x {strength:g}", {"bias": fit_bias(fit_loads, strength)}
    for strength in (0.5, 1.0):
        yield f"bias for devices x {strength:g}", {"bias": fit_bias(fit_loads, strength, placement)}
    starts = range(0, WINDOW, LEARNING)
    short = [text[:, start : start + LEARNING + 1] for start in starts for text in fit]  # domains take turns
    _, _, learned = read(model, short, bar, update_rate=0.1, update_every=LEARNING, placement=placement)
    yield "sign rule for devices", {"bias": learned.bias}
    for factor in (2.0, 1.5, 1.0):
        yield f"capacity {factor:g}, by score", {"capacity": Capacity(factor)}
    yield "capacity 1, by position", {"capacity": Capacity(1.0, drop="position")}
    yield "capacity 1, re-route", {"capacity": Capacity(1.0, reroute=True)}
    yield "capacity adaptive, 5%", {"capacity": Capacity(None, tolerance=0.05)}


def picture(document: dict, name: str):
    """Perplexity over balance of devices, a line for each method over its strengths; of its JSON."""
    rows = [
        {"way": re.sub(r" x [\d.]+$|(?<=capacity) [\d.]+", "", each["method"]), "perplexity": each["perplexity"],
         "balancedness": each["balancedness_devices"]}
        for each in document["results"]
    ]  # fmt: skip
    caption = f"{name}, {document['tokens']:,} held-out tokens, {document['devices']} devices"
    return plots.quality_lines(rows, "balancedness", document["results"][0]["perplexity"], caption)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument(
        "--tokens", type=int, default=512, help="of each domain, to fit on and again to judge (default: 512)"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plots", type=Path, metavar="DIR", help="save a picture, quality_against_balance.png")
    parser.add_argument("--quiet", action="store_true")
    args = parser.parse_args()
    with output.exit_on_user_error():
        # 1. The model, and held-out text of every domain in two parts.
        if args.tokens < WINDOW or args.tokens % WINDOW:
            raise ValueError(f"--tokens {args.tokens}: needs a multiple of {WINDOW}")
        model, tokenizer = load(str(args.model))
        if mx.default_device().type == mx.cpu:
            model.set_dtype(mx.float32)
        fit, test = windows(tokenizer, args.model / "held-out", args.tokens)
        if not fit:
            raise ValueError(f"no held-out text in {args.model / 'held-out'}")
        console = output.console(args.quiet)

        # 2. Loads of the first part, for everything that is fitted.
        work = (METHODS + 2) * len(test) * WINDOW
        bar = tqdm(total=work, unit="token", leave=False, disable=args.quiet or None)  # None: off where no terminal is
        _, fit_loads, _ = read(model, fit, bar)
        placement = place_experts(fit_loads, args.devices)

        # 3. Each method on the second part.
        results, stock = [], None
        for name, options in methods(model, fit, fit_loads, placement, bar):
            perplexity, loads, routers = read(model, test, bar, **options)
            stock = stock or (perplexity, loads)
            results.append(
                {"method": name, "perplexity": perplexity, "perplexity_ratio": perplexity / stock[0],
                 "balancedness_devices": balancedness(placement.device_loads(loads)),
                 "balancedness_experts": balancedness(loads), **routers.shares()}
            )  # fmt: skip
        bar.close()
        # 4. What needs no change of the choice.
        for strategy, redundant in (("balanced", 0), ("replicated", args.devices)):
            other = place_experts(fit_loads, args.devices, strategy, redundant)
            results.append(
                {"method": f"{strategy}" + (f", {redundant} copies" if redundant else ""),
                 "perplexity": stock[0], "perplexity_ratio": 1.0,
                 "balancedness_devices": balancedness(other.device_loads(stock[1])),
                 "balancedness_experts": balancedness(stock[1]), "changed": 0.0, "rerouted": 0.0, "dropped": 0.0}
            )  # fmt: skip

        rows = [
            (r["method"], f"{r['perplexity']:.2f}", f"{r['perplexity_ratio'] - 1:+.1%}",
             f"{r['balancedness_devices']:.3f}", f"{r['changed'] + r['rerouted']:.1%}", f"{r['dropped']:.1%}")
            for r in results
        ]  # fmt: skip
        count = sum(text.shape[1] - 1 for text in test)
        title = f"Quality against balance (measured, {count} held-out tokens, {args.devices} devices)"
        about = table.environment()
        console.print("{device}, {cores} cores; mlx {mlx}, mlx-lm {mlx_lm}; ".format(**about) + args.model.name)
        columns = ("method", "perplexity", "cost", "balance", "other expert", "dropped")
        console.print(table.of_rows(title, *columns, rows=rows))
        document = {"source": "measured", "tokens": count, "devices": args.devices, "environment": about,
                    "results": results}  # fmt: skip
        if args.json:
            output.write_json(args.json, document)
        if args.plots:
            plots.save_plots(args.plots, {"quality_against_balance": picture(document, args.model.name)})


if __name__ == "__main__":
    main()
