"""What does it cost to shard and to record? Time per token against stock mlx-lm, one process.

    python benchmarks/cost_of_sharding.py
    python benchmarks/cost_of_sharding.py --rounds 15 --json cost.json

Measured: decode of single tokens with a cache, variants interleaved within every round, so
that a noisy machine slows all of them alike; "quick" lets products go the ways that a trial
finds quicker (--streams auto), the others compute as mlx-lm does. Printed: the median of the ratios to stock of
each round, with the middle half of them.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache

from expert_parallel import place_experts, record_routing, shard_model
from expert_parallel.checkpoint.finding import SHIPPED
from expert_parallel.command import output
from expert_parallel.layers import moe_shape
from expert_parallel.report import table


def build(folder, devices=None, streams="off"):
    model, _ = load(str(folder))
    if mx.default_device().type == mx.cpu:
        model.set_dtype(mx.float32)
    if devices:
        shard_model(model, place_experts(np.zeros(moe_shape(model)), devices), streams=streams)
    return model


def seconds_per_token(model, tokens, record=False):
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[1, 2, 3, 4]]), cache=cache))

    def decode():
        token = mx.array([[5]])
        for _ in range(tokens):
            token = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
            mx.eval(token)

    begin = time.perf_counter()
    if record:
        with record_routing(model):
            decode()
    else:
        decode()
    return (time.perf_counter() - begin) / tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED, help="folder (default: the shipped model)")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--tokens", type=int, default=100, help="per variant and round")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    stock, one, eight = build(args.model), build(args.model, 1), build(args.model, 8)
    two_quick, eight_quick = (build(args.model, devices, streams="auto") for devices in (2, 8))
    variants = {
        "stock mlx-lm": (stock, False),
        "stock, recording": (stock, True),
        "1 device": (one, False),
        "1 device, recording": (one, True),
        "8 devices": (eight, False),
        "2 devices, quick": (two_quick, False),
        "8 devices, quick": (eight_quick, False),
        "8 devices, recording": (eight, True),
    }
    times = {name: [] for name in variants}
    for round_number in range(args.rounds + 1):
        for name, (model, record) in variants.items():
            seconds = seconds_per_token(model, args.tokens, record)
            if round_number:  # the first round warms up
                times[name].append(seconds)
    ratios = {name: np.array(values) / np.array(times["stock mlx-lm"]) for name, values in times.items()}
    quartiles = {name: np.percentile(values, [25, 50, 75]) for name, values in ratios.items()}
    rows = [
        (name, f"{1e3 * np.median(times[name]):.3f}", f"{q[1]:.3f}", f"{q[0]:.3f} - {q[2]:.3f}")
        for name, q in quartiles.items()
    ]
    console = output.console()
    title = f"Time per token (measured, {args.rounds} interleaved rounds of {args.tokens} tokens)"
    console.print(table.of_rows(title, "variant", "ms", "to stock", "middle half", rows=rows))
    if args.json:
        figures = {"environment": table.environment(), "seconds_per_token": times, "ratio_quartiles": quartiles}
        output.write_json(args.json, figures)


if __name__ == "__main__":
    main()
