"""What cold experts at fewer bits save, and what they cost in quality, on the shipped model.

    python benchmarks/cold_experts.py

Which experts are cold is fitted on the first half of each held-out text, perplexity is measured on the second, in
windows of 512 tokens. Beside it the same share chosen at random and, the other way round, the most used.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from expert_parallel import load_sharded, record_routing
from expert_parallel.checkpoint.finding import SHIPPED
from expert_parallel.models.memory import live_expert_bytes
from expert_parallel.offload.compress import compress_cold
from expert_parallel.report.table import environment, size

WINDOW, HALF = 512, 2048  # tokens


def windows(ids):
    return [mx.array([ids[start : start + WINDOW + 1]]) for start in range(0, len(ids) - WINDOW, WINDOW)]


def perplexity(model, texts):
    loss = count = 0
    for ids in texts:
        for window in windows(ids[HALF : 2 * HALF + 1]):
            loss += nn.losses.cross_entropy(model(window[:, :-1]), window[:, 1:], reduction="sum").item()
            count += WINDOW
    return math.exp(loss / count)


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("{device}, {device_name}, {cores} cores, mlx {mlx}".format(**environment()))
    model, tokenizer = load_sharded(SHIPPED, num_devices=1)
    files = sorted((SHIPPED / "held-out").glob("*.txt"))
    texts = [tokenizer.encode(file.read_text(encoding="utf-8"), verbose=False)[: 2 * HALF + 1] for file in files]
    with record_routing(model) as trace:
        for ids in texts:
            for window in windows(ids[:HALF]):
                mx.eval(model(window))
    loads, before, whole = trace.loads(), perplexity(model, texts), int(live_expert_bytes(model).sum())
    random = np.random.default_rng(0).permuted(np.tile(np.arange(loads.shape[1]), (len(loads), 1)), axis=1)
    print(
        f"fitted on {len(trace):,} tokens, judged on as many; experts at 4 bits {size(whole)}, perplexity {before:.3f}"
    )
    print(f"\n{'share':<8}{'bits':>6}{'experts':>12}{'of 4-bit':>10}{'coldest':>18}{'at random':>18}{'hottest':>18}")
    for bits in (3, 2):
        for share in (0.25, 0.5, 1.0):
            row = []
            for order in (loads, random, -loads):
                model, _ = load_sharded(SHIPPED, num_devices=1)
                compress_cold(model, order, share, bits)
                found = perplexity(model, texts)
                row.append(f"{found:>10.3f} {100 * (found / before - 1):>+6.1f}%")
            held = int(live_expert_bytes(model).sum())
            print(f"{share:<8.0%}{bits:>6}{size(held):>12}{held / whole:>10.2f}{''.join(row)}", flush=True)


if __name__ == "__main__":
    main()
