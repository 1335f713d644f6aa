"""How fast are real ranks? Stock mlx-lm, its tensor parallelism and expert parallelism side by side.

    python benchmarks/speed_of_ranks.py                                      shipped model
    python tools/make_checkpoint.py --out checkpoints/coder-4 --layers 4     1.8 GB, full width
    python benchmarks/speed_of_ranks.py --model checkpoints/coder-4 --json speed.json

    stock                     mlx-lm, one process
    2 simulated               one process, two devices by turns
    tensor parallel           mlx-lm's own, every expert is split
    head                      and its output head, which mlx-lm leaves whole, split as "rest split" has it
    rest whole, rest split    expert parallel, all that is no expert on every rank or sharded
    copies                    rest split, and a quarter of the experts is held twice
    quick                     products go the quicker ways that a trial finds (expert_parallel/device), as they do by
                              default: over two streams in one process, many tokens at once; else as mlx-lm has them

    decode   given tokens one by one
    prompt   filling the cache, as generation does: of the last layer stock computes keys and values alone
    layers   the same prompt through all of every layer

All processes are alive at once and idle but for those whose turn it is; every round goes through all
variants, so that a noisy machine slows all of them alike. Printed: the median of each round's ratio
to stock and to tensor parallelism on the same ranks, with the middle half of the ratios; how much of that
the head's split is; then where a token's time goes on rank 0, taken with a stop after every part.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from rich.progress import track
from turns import Workers, answer, read_turn

from expert_parallel import load_sharded, place_experts
from expert_parallel.checkpoint.finding import SHIPPED
from expert_parallel.checkpoint.loading import load_whole
from expert_parallel.checkpoint.opened import Checkpoint
from expert_parallel.command import output
from expert_parallel.device.lanes import Lanes
from expert_parallel.device.trials import quicken_products
from expert_parallel.projection.constants import head_seconds, random_tokens, seconds_of_prompt, seconds_per_token
from expert_parallel.ranks.hybrid import split_head
from expert_parallel.report import table
from expert_parallel.report.measuring import resident_bytes, time_parts

CONTEXT = 8
STOCK, TENSOR, TENSOR_QUICK = "stock", "tensor parallel", "tensor, head, quick"
ONE_PROCESS = (STOCK, "2 simulated", "2 simulated, quick")
ON_RANKS = (TENSOR, TENSOR_QUICK, "rest whole", "rest split", "rest split, quick", "split, copies, quick")
LIKE = ((TENSOR, TENSOR_QUICK), (TENSOR, "rest whole"), (TENSOR, "rest split"),
        (TENSOR_QUICK, "rest split, quick"), (TENSOR_QUICK, "split, copies, quick"))  # fmt: skip
PARTS = ("total", "experts", "head", "collectives", "waiting")
WORKS = {"decode": "ms/token", "prompt": "ms", "layers": "ms"}


# --- one process of a backend, which waits for its turns -----------------------------------------


def build(variant, args, group):
    """The model of a variant; ValueError where it cannot be split."""
    if variant == STOCK:
        return load_whole(args.model)[0]
    if variant.startswith("tensor"):
        model = load_whole(args.model)[0]
        model.shard(group)
        if "head" in variant and not split_head(model, group):
            raise ValueError("the output head is no product of its own without a bias, and stays whole")
        mx.eval(model.parameters())
        mx.clear_cache()
        if variant.endswith("quick"):
            quicken_products(model, Lanes(1))
        return model
    if group.size() == 1:
        options = {"num_devices": int(variant.split()[0])}
    else:
        options = {"group": group, "attention": "sharded" if "split" in variant else "replicated"}
    options["streams"] = "auto" if variant.endswith("quick") else "off"
    if "copies" in variant:
        shape = Checkpoint(args.model).shape
        devices = max(group.size(), 2)
        options["placement"] = place_experts(np.ones(shape), devices, "replicated", redundant=shape[1] // 4)
    return load_sharded(args.model, **options)[0]


def take_turn(turn, model, tokens, prompt, group):
    """Seconds of one turn on this rank."""
    mx.eval(mx.distributed.all_sum(mx.ones(1), group=group))
    if turn["work"] == "decode":
        return float(seconds_per_token(model, tokens, CONTEXT, rounds=1).mean())
    if turn["work"] == "prompt":
        return seconds_of_prompt(model, prompt, rounds=1)
    cache = make_prompt_cache(model)
    if turn["work"] == "layers":
        begin = time.perf_counter()
        mx.eval(model.model(mx.array([prompt]), cache=cache))
        return time.perf_counter() - begin
    mx.eval(model(mx.array([tokens[:CONTEXT]]), cache=cache))
    with time_parts(len(tokens), group) as seconds:
        for token in tokens:
            mx.eval(model(mx.array([[token]]), cache=cache))
    each = {name: value / len(tokens) for name, value in vars(seconds).items() if name in PARTS}
    return {**each, "head": head_seconds(model, model.args.hidden_size)}


def worker(args):
    """Build the variants of one backend, then take turns as files in the folder say."""
    group = mx.distributed.init()
    models = {}
    for variant in args.variants:
        try:
            models[variant] = build(variant, args, group)
        except ValueError as error:
            models[variant] = str(error)
    known = next(model for model in models.values() if not isinstance(model, str))
    tokens, prompt = random_tokens(known, args.tokens), random_tokens(known, args.prompt_tokens, seed=1)
    refused = {variant: model for variant, model in models.items() if isinstance(model, str)}
    answer(args, group, 0, {"refused": refused, "resident": resident_bytes()["now"], "ranks": group.size()})
    number = 1
    while (turn := read_turn(args.folder, number, args.parent)) is not None:
        if turn["backend"] == args.worker:
            answer(args, group, number, take_turn(turn, models[turn["variant"]], tokens, prompt, group))
        number += 1


# --- the one who asks --------------------------------------------------------------------------


def spread(values):
    """Median and middle half of [rounds]."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def run(args):
    variants = {"one process": ONE_PROCESS, **dict.fromkeys(args.backends, ON_RANKS)}
    console = output.console()
    same = ("--model", args.model, "--tokens", args.tokens, "--prompt-tokens", args.prompt_tokens)
    with Workers(args, variants, __file__, same) as workers:
        refused = {(b, v): why for b, started in workers.started.items() for v, why in started["refused"].items()}
        cases = [(b, v) for b, names in variants.items() for v in names if (b, v) not in refused]
        seconds = {(*case, work): [] for case in cases for work in WORKS}
        plan = [(n, case, work) for n in range(args.rounds + 1) for work in WORKS for case in cases]
        for n, case, work in track(plan, "measuring", console=output.console(), transient=True):
            if n == 0 and work != "decode":
                continue  # the round of decoding warms up
            taken = workers.ask(*case, work)
            if n:
                seconds[(*case, work)].append(taken)
        profiles = {case: workers.ask(*case, "profile") for case in cases}

    # Ratios are speeds: of two times in the same round.
    rows, figures = [], []
    for (backend, variant, work), times in seconds.items():
        times = np.array(times)
        stock = spread(np.array(seconds["one process", STOCK, work]) / times)
        tensor = seconds.get((backend, TENSOR, work))
        tensor = spread(np.array(tensor) / times) if tensor and variant != TENSOR else None
        figures.append(
            {"backend": backend, "variant": variant, "work": work, "seconds": times.tolist(), "speed_to_stock": stock,
             "speed_to_tensor_parallelism": tensor}
        )  # fmt: skip
        rows.append((work, backend, variant, times, stock, tensor))
    name = Path(args.model).name
    for work, unit in WORKS.items():
        cells = [
            (backend, variant, f"{1e3 * np.median(times):.1f}", words(stock), words(tensor) if tensor else "")
            for at, backend, variant, times, stock, tensor in rows
            if at == work
        ]
        what = f"{args.tokens} tokens" if work == "decode" else f"a prompt of {args.prompt_tokens}"
        title = f"{work} (measured, {name}, {what}, {args.rounds} rounds; speed as a ratio)"
        console.print(table.of_rows(title, "over", "variant", unit, "to stock", "to tensor", rows=cells))
    speed = lambda backend, work, slow, quick: np.array(seconds[backend, slow, work]) / seconds[backend, quick, work]  # noqa: E731
    cells = [
        (work, backend, quick, slow, words(spread(speed(backend, work, slow, quick))))
        for backend in args.backends
        for slow, quick in LIKE
        for work in WORKS
        if {(backend, slow), (backend, quick)} <= set(cases)
    ]
    if cells:
        console.print(table.of_rows("Like with like (measured; speed as a ratio)", "work", "over", "of", "to", "speed",
                                    rows=cells))  # fmt: skip
    parts = [
        (backend, variant, *(f"{1e3 * profile[part]:.1f}" for part in PARTS))
        for (backend, variant), profile in profiles.items()
    ]
    title = "Where a token's time goes (measured on rank 0 with stops, ms; stock's experts are not told apart)"
    console.print(table.of_rows(title, "over", "variant", *PARTS, rows=parts))
    for (backend, variant), why in refused.items():
        console.print(f"{variant} over {backend} is not possible here: {why}")
    if args.json:
        profile = [{"backend": b, "variant": v, **parts} for (b, v), parts in profiles.items()]
        about = {"environment": table.environment(), "model": name, "ranks": args.ranks, "tokens": args.tokens}
        about |= {"prompt_tokens": args.prompt_tokens, "source": "measured"}
        output.write_json(args.json, {**about, "speeds": figures, "seconds_per_token_with_stops": profile})


def words(ratio):
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED, help="checkpoint folder (default: the shipped model)")
    parser.add_argument("--backends", nargs="+", default=["mpi", "ring"], choices=("mpi", "ring"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16, help="decoded per turn (default: 16)")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one turn, or for loading")
    parser.add_argument("--json", type=Path)
    for hidden in ("--worker", "--folder", "--parent"):
        parser.add_argument(hidden, help=argparse.SUPPRESS, type=Path if hidden == "--folder" else str)
    parser.add_argument("--variants", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    with output.exit_on_user_error():
        worker(args) if args.worker else run(args)


if __name__ == "__main__":
    main()
