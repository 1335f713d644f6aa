"""How good is the shipped model, and do its experts specialise? By text domain, on held-out files.

    python benchmarks/tiny_model_quality.py

Measured with stock mlx-lm on models/tiny-qwen3-moe/held-out: perplexity and bits per byte in
windows of 512 tokens; balancedness of 8 contiguous devices over 2,048 tokens; and how much of
one domain's traffic goes to the 16 experts that another domain uses most (of 128; chance is 0.125).
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import load

from expert_parallel import balancedness, place_experts, record_routing
from expert_parallel.balance import balancedness_per_layer
from expert_parallel.checkpoint.finding import SHIPPED
from expert_parallel.command import output
from expert_parallel.report import table

WINDOW, MOST, END = 512, 16_384, "<|endoftext|>"


def domain_figures(model, tokenizer, text):
    """Perplexity and bits per byte over up to MOST tokens, and expert loads [L, E] of the first 2,048."""
    ids = [0]
    for document in text.split(END):
        ids += [*tokenizer.encode(document, verbose=False), 0]
    ids = ids[: MOST + 1]
    loss = count = 0
    loads = None
    for start in range(0, len(ids) - 1, WINDOW):
        window = mx.array([ids[start : start + WINDOW + 1]])
        with record_routing(model) as trace:
            logits = model(window[:, :-1])
            loss += nn.losses.cross_entropy(logits, window[:, 1:], reduction="sum").item()
        count += window.shape[1] - 1
        if start < 2048:
            loads = trace.loads() if loads is None else loads + trace.loads()
    size = len(tokenizer.decode(ids).replace(END, "").encode())
    return math.exp(loss / count), loss / math.log(2) / size, loads


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, tokenizer = load(str(args.model))
    model.set_dtype(mx.float32)
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted((args.model / "held-out").glob("*.txt"))}
    results = {name: domain_figures(model, tokenizer, text) for name, text in texts.items()}

    console, rows = output.console(), []
    for name, (perplexity, bits, loads) in results.items():
        per_layer = balancedness_per_layer(place_experts(loads, 8).device_loads(loads))
        hottest, unused = loads.max(axis=1) / loads.mean(axis=1), (loads == 0).sum(axis=1)
        rows.append(
            (name, f"{perplexity:.1f}", f"{bits:.2f}", f"{per_layer.min():.2f} - {per_layer.max():.2f}",
             f"{hottest.min():.1f} - {hottest.max():.1f}x", f"{unused.min()} - {unused.max()}")
        )  # fmt: skip
    columns = ("domain", "perplexity", "bits/byte", "balancedness", "hottest / mean", "unused experts")
    console.print(
        table.of_rows("Held-out files (measured; ranges over layers, 8 contiguous devices)", *columns, rows=rows)
    )

    shares = {}
    for user, (_, _, loads) in results.items():
        for owner, (_, _, other) in results.items():
            top = np.argsort(-other, axis=1)[:, :16]
            share = np.take_along_axis(loads, top, axis=1).sum(axis=1) / loads.sum(axis=1)
            shares[user, owner] = float(share.mean())
    rows = [(user, *(f"{shares[user, owner]:.2f}" for owner in results)) for user in results]
    title = "Share of a domain's traffic (row) on the 16 favourites of another (column)"
    console.print()
    console.print(table.of_rows(title, "traffic of", *results, rows=rows))
    whole = sum(loads for _, _, loads in results.values())
    console.print(
        f"\nall domains together: balancedness {balancedness(place_experts(whole, 8).device_loads(whole)):.2f}"
    )
    if args.json:
        output.write_json(args.json, {f"{user} on {owner}": share for (user, owner), share in shares.items()})


if __name__ == "__main__":
    main()
