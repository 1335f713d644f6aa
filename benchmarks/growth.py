"""Does anything grow faster than its work? Time against devices, tokens, layers and copies.

    python benchmarks/growth.py
    python benchmarks/growth.py --plots docs/growth.png

Measured on random layers of the shipped model's shape (128 experts, top-8, 256 wide, 4-bit) and on skewed routing:
seconds of processor that this process takes, the least of several rounds. Growth is the exponent: 1 where twice the
size takes twice as long, 0 where size does not matter. Beside it that of the work, which is counted:

    decode, prompt  products called, copied experts that are chosen, slots of a prompt
    placement       pairs of a slot and a device
    dealing         of a step's slots among copies: slots that leave a choice, cells of the table devices x experts
    others          tokens x layers; figures of balance also devices x layers
"""

import argparse
import json
import sys
import tempfile
import time
from math import ceil, log2
from pathlib import Path
from timeit import timeit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.qwen3_moe import Model, ModelArgs

from expert_parallel import RoutingTrace, place_experts, shard_model
from expert_parallel.checkpoint.finding import SHIPPED
from expert_parallel.command import output
from expert_parallel.report import plots, run, table
from expert_parallel.serving import Serving
from expert_parallel.study.chance import expected_fan_out
from expert_parallel.trace import record_routing

E, K, LEAST, TOLERANCE = 128, 8, 0.01, 0.15  # experts, chosen; seconds of calls for one time; of an exponent
SMALL = {"devices": 8, "tokens": 64, "layers": 2, "copies": 0}
LARGE = {"devices": 8, "tokens": 4096, "layers": 16, "copies": 32}  # where no model computes
DEVICES, LAYERS, COPIES = (1, 2, 4, 8, 16, 32, 64, 128), (1, 2, 4, 8, 16), (8, 16, 32, 64, 128)
PROMPTS, TOKENS = (16, 32, 64, 128, 256), (512, 1024, 2048, 4096, 8192, 16384)
LOADS = np.random.default_rng(0).lognormal(size=(96, E))  # of layers
CONFIG = json.loads((Path(SHIPPED) / "config.json").read_text())  # 128 experts, top-8, 256 wide


def placed(devices, layers, copies):
    return place_experts(LOADS[:layers], devices, "replicated" if copies else "balanced", redundant=copies)


def trace_of(layers, tokens):
    random = np.random.default_rng(1)
    rank = np.log(LOADS[:layers]) + random.gumbel(size=(512, layers, E))
    some = np.argpartition(-rank, K - 1, axis=2)[..., :K]
    return RoutingTrace(np.stack([some[random.integers(512, size=tokens), l] for l in range(layers)], axis=1), E)


def forward(devices, tokens, layers, copies, _):
    """This and all below: a call to be timed, and its work."""
    model = Model(ModelArgs.from_dict({**CONFIG, "num_hidden_layers": layers}))
    nn.quantize(model, group_size=64, bits=4)
    shard_model(model, placed(devices, layers, copies))
    ids, chosen = mx.random.randint(0, 256, (1, tokens)), min(1, tokens * K / E)
    touched = expected_fan_out([E // devices] * devices, E, K) if tokens == 1 else devices
    work = layers * (tokens * (tokens > 1) * K + 5 + 3 * touched + chosen * min(copies, E))
    return lambda: mx.eval(model(ids, cache=make_prompt_cache(model))), work


def placement(devices, tokens, layers, copies, _):
    return lambda: placed(devices, layers, copies), layers * (E + copies) * devices


def dealing(devices, tokens, layers, copies, _):
    serving, trace = [Serving(held) for held in placed(devices, layers, copies).held], trace_of(layers, tokens)
    ids = trace.experts.astype(np.int64)
    call = lambda: [each.devices(ids[:, l]) for l, each in enumerate(serving)]  # noqa: E731
    return call, trace.loads()[np.stack([each.shared for each in serving])].sum() + layers * devices * E


class Idle(nn.Module):
    """In place of a layer's experts: nothing is computed."""

    holds_experts, num_experts = True, E

    def __call__(self, x, indices):
        return x


class Routed(nn.Module):
    """A model that does nothing but ask its experts, for the indices [L, 1, k] that it is called with."""

    def __init__(self, layers):
        super().__init__()
        self.layers = [holding("mlp", holding("experts", Idle())) for _ in range(layers)]

    def __call__(self, indices):
        for layer, row in zip(self.layers, indices, strict=True):
            layer.mlp.experts(row, row)


def holding(name, module):
    outer = nn.Module()
    outer[name] = module
    return outer


def recorder(devices, tokens, layers, copies, _):
    ids = [[mx.array(row[None]) for row in token] for token in trace_of(layers, tokens).experts]
    model = Routed(layers)

    def record():
        with record_routing(model) as trace:
            for token in ids:
                model(token)
        return trace

    return record, layers * tokens


def figures(devices, tokens, layers, copies, _):
    trace, first, numbers = trace_of(layers, tokens), placed(devices, layers, 0), list(range(layers))
    call = lambda: (run.routing(trace, numbers), run.balance(trace, [(0, first.held)], numbers, first))  # noqa: E731
    return call, layers * (tokens + devices)


def save(devices, tokens, layers, copies, folder):
    trace = trace_of(layers, tokens)
    return lambda: trace.save(f"{folder}/saved.npz"), layers * tokens


def read(devices, tokens, layers, copies, folder):
    trace_of(layers, tokens).save(path := f"{folder}/{layers}-{tokens}.npz")
    return lambda: RoutingTrace.load(path), layers * tokens


STUDIES = {
    "decode step": (forward, {**SMALL, "tokens": 1}, {"devices": DEVICES, "layers": LAYERS, "copies": COPIES}),
    "prompt": (forward, SMALL, {"devices": DEVICES, "tokens": PROMPTS, "layers": LAYERS, "copies": COPIES}),
    "placement": (placement, LARGE, {"devices": DEVICES[1:], "layers": (6, 12, 24, 48, 96), "copies": COPIES}),
    "dealing": (dealing, LARGE, {"devices": DEVICES[1:], "tokens": TOKENS, "layers": LAYERS, "copies": COPIES}),
    "recorder": (recorder, {**LARGE, "layers": 8}, {"tokens": TOKENS[:4], "layers": LAYERS[:4]}),
    "figures": (figures, LARGE, {"devices": DEVICES, "tokens": TOKENS, "layers": LAYERS}),
    "save": (save, LARGE, {"tokens": TOKENS, "layers": LAYERS}),
    "read": (read, LARGE, {"tokens": TOKENS, "layers": LAYERS}),
}  # fmt: skip


def seconds(call, times=1):
    return timeit(call, timer=time.process_time, number=times) / times


def growth(sizes, values):
    """(exponent over the whole range, the steepest between neighbours)."""
    over = lambda a, b: log2(values[b] / values[a]) / log2(sizes[b] / sizes[a])  # noqa: E731
    return over(0, -1), max(over(n, n + 1) for n in range(len(sizes) - 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plots", type=Path, metavar="FILE", help="draw it, as PNG")
    args = parser.parse_args()
    rows, found = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, (make, base, ranges) in STUDIES.items():
            for against, sizes in ranges.items():
                calls, work = zip(*(make(*{**base, against: n}.values(), folder) for n in sizes), strict=True)
                times = [ceil(LEAST / max(1e-6, min(seconds(c), seconds(c)))) for c in calls]  # the first warms up
                took = np.min([list(map(seconds, calls, times)) for _ in range(args.rounds)], axis=0)
                (ours, steepest), (its, most) = growth(sizes, took), growth(sizes, work)
                found.append((name, against, np.array(sizes), took, np.array(work)))
                shown = [f"{1e3 * took[0]:.3g}", f"{1e3 * took[-1]:.3g}", f"{ours:.2f} ({steepest:.2f})"]
                shown += [f"{its:.2f} ({most:.2f})", "faster" if ours > its + TOLERANCE else ""]
                rows.append((name, against, f"{sizes[0]}-{sizes[-1]}", *shown))
    title = f"Growth (measured, {args.rounds} rounds; exponents, in brackets the steepest doubling)"
    labels = ("what", "against", "sizes", "ms, first", "last", "growth", "of its work", "")
    for part in (rows[: table.MOST_ROWS], rows[table.MOST_ROWS :]):
        output.console().print(table.of_rows(title, *labels, rows=part))
    if args.plots:
        plots.save_plots(args.plots.parent, {args.plots.stem: plots.growth_lines(found, list(SMALL), list(STUDIES))})


if __name__ == "__main__":
    main()
