"""What does it cost to shard and to record, and what do quicker products give? Against stock mlx-lm, one process.

    python benchmarks/cost_of_sharding.py
    python benchmarks/cost_of_sharding.py --rounds 15 --json cost.json
    python benchmarks/cost_of_sharding.py --model checkpoints/coder-4 --rounds 2 --prompt-tokens 512 \\
        --variants "stock mlx-lm" "2 devices, quick"

Measured: decode of single tokens with a cache, or a prompt that fills one, variants interleaved within every round, so
that a noisy machine slows all of them alike; "quick" lets products go the ways that a trial finds quicker (--streams
auto), the others compute as mlx-lm does. Two variants are no sharding, and say what none can do without: "choice read"
waits in each layer for the chosen experts, "choice read, 8 parts" then asks mlx-lm's own module for each eighth of the
experts by itself. Printed: the median of the ratios to stock of each round, with the middle half of them. All must
answer with the same bits.
"""

import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache

from expert_parallel import place_experts, record_routing, shard_model
from expert_parallel.checkpoint.finding import SHIPPED
from expert_parallel.command import output
from expert_parallel.layers import StandIn, moe_layers, moe_shape, num_experts
from expert_parallel.projection.constants import random_tokens
from expert_parallel.report import table

STOCK = "stock mlx-lm"


class ChoiceRead(StandIn):
    """mlx-lm's experts, once the host knows which are asked."""

    parts = 1

    def __call__(self, x, indices):
        ids = np.array(indices)
        if self.parts == 1:
            return self.experts(x, indices)
        flat, of, y = ids.reshape(-1), ids.reshape(-1) * self.parts // num_experts(self.experts), []
        places = [np.flatnonzero(of == part) for part in np.unique(of)]
        rows = x.reshape(-1, x.shape[-1])
        for at in places:
            mine = rows if len(rows) == 1 else rows[mx.array(at // ids.shape[-1])]
            chosen = mx.array(flat[at][None] if len(rows) == 1 else flat[at][:, None])
            y.append(self.experts(mine, chosen).reshape(len(at), -1))
        back = mx.array(np.argsort(np.concatenate(places)))
        return mx.concatenate(y)[back].reshape(*indices.shape, -1)


class InEightParts(ChoiceRead):
    parts = 8


def build(folder, devices=None, streams="off"):
    model, _ = load(str(folder))
    if mx.default_device().type == mx.cpu:
        model.set_dtype(mx.float32)
    if isinstance(devices, type):
        for layer in moe_layers(model):
            layer.experts = devices(layer.experts)
    elif devices:
        shard_model(model, place_experts(np.zeros(moe_shape(model)), devices), streams=streams)
    return model


def seconds_per_token(model, tokens, record=False):
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[1, 2, 3, 4]]), cache=cache))
    token = mx.array([[5]])
    begin = time.perf_counter()
    with record_routing(model) if record else nullcontext():
        for _ in range(tokens):
            logits = model(token, cache=cache)[:, -1:]
            token = mx.argmax(logits, axis=-1)
            mx.eval(token)
    return (time.perf_counter() - begin) / tokens, logits


def seconds_of_prompt(model, tokens, record=False):
    """Through all of every layer; of the last one generation needs keys and values alone."""
    prompt, cache = mx.array([random_tokens(model, tokens)]), make_prompt_cache(model)
    begin = time.perf_counter()
    with record_routing(model) if record else nullcontext():
        hidden = model.model(prompt, cache=cache)
        mx.eval(hidden)
    return time.perf_counter() - begin, hidden


VARIANTS = {  # devices or what stands before the experts, streams, recording
    "stock mlx-lm": (None, "off", False),
    "stock, recording": (None, "off", True),
    "choice read": (ChoiceRead, "off", False),
    "choice read, 8 parts": (InEightParts, "off", False),
    "1 device": (1, "off", False),
    "1 device, recording": (1, "off", True),
    "8 devices": (8, "off", False),
    "1 device, quick": (1, "auto", False),
    "2 devices, quick": (2, "auto", False),
    "8 devices, quick": (8, "auto", False),
    "8 devices, recording": (8, "off", True),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED, help="folder (default: the shipped model)")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--tokens", type=int, default=100, help="per variant and round")
    parser.add_argument("--prompt-tokens", type=int, help="a prompt of so many instead")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
                        help=f"of {', '.join(VARIANTS)}; stock is always among them")  # fmt: skip
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    names = [STOCK, *(name for name in args.variants if name != STOCK)]
    models = {how: build(args.model, *how) for how in {VARIANTS[name][:2] for name in names}}
    prompt = args.prompt_tokens
    take, count = (seconds_of_prompt, prompt) if prompt else (seconds_per_token, args.tokens)
    times = {name: [] for name in names}
    for round_number in range(args.rounds + 1):
        for name in names:
            seconds, answer = take(models[VARIANTS[name][:2]], count, VARIANTS[name][2])
            if name == STOCK:
                expected = answer
            elif not mx.array_equal(answer, expected).item():
                raise SystemExit(f"{name} answers with other bits than stock mlx-lm")
            if round_number:  # the first round warms up
                times[name].append(seconds)
    ratios = {name: np.array(values) / np.array(times[STOCK]) for name, values in times.items()}
    quartiles = {name: np.percentile(values, [25, 50, 75]) for name, values in ratios.items()}
    rows = [
        (name, f"{1e3 * np.median(times[name]):.3f}", f"{q[1]:.3f}", f"{q[0]:.3f} - {q[2]:.3f}")
        for name, q in quartiles.items()
    ]
    console = output.console()
    what = f"Time of a prompt of {prompt} tokens" if prompt else "Time per token"
    each = "" if prompt else f" of {args.tokens} tokens"
    title = f"{what} (measured, {Path(args.model).name}, {args.rounds} interleaved rounds{each}; the same bits)"
    console.print(table.of_rows(title, "variant", "ms", "to stock", "middle half", rows=rows))
    if args.json:
        figures = {
            "environment": table.environment(),
            "prompt_tokens": prompt,
            "seconds": times,
            "ratio_quartiles": quartiles,
        }
        output.write_json(args.json, figures)


if __name__ == "__main__":
    main()
