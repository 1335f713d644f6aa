"""What do many sequences at once change? Balance, experts read, fan-out and tokens a second, for 1 to 32 of them.

    python benchmarks/batches.py                                               shipped model
    python tools/make_checkpoint.py --out checkpoints/coder-4 --layers 4       1.8 GB, full width
    python benchmarks/batches.py --model checkpoints/coder-4 --context 2 --steps 8 --rounds 3

Sequences are windows of the held-out texts beside the model, of all domains by turns; random tokens where there are
none. They are decoded as written, a step of B sequences is the model on [B, 1] with a cache, so every variant has the
same tokens behind and before it.

    counted    on one recording, the same tokens for every B: 32 sequences in groups of B
    measured   every turn decodes for --seconds; each round goes through all variants and all B (see speed_of_ranks.py,
               where the variants are explained), so that a noisy machine slows all of them alike
    modelled   with constants measured here on one process, 1 sequence and a prompt of 32, and a link on all-sums alone

Dimensions: S sequences, N steps, B sequences a step, L MoE layers, E experts, k chosen, D devices.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from rich.progress import track
from speed_of_ranks import STOCK, TENSOR, TENSOR_QUICK, build
from steps_of_batches import count, elsewhere, modelled, wanted_by_chance
from turns import Workers, answer, read_turn

from expert_parallel import place_experts, record_routing
from expert_parallel.checkpoint.finding import SHIPPED
from expert_parallel.checkpoint.opened import Checkpoint
from expert_parallel.command import output
from expert_parallel.models.architecture import describe
from expert_parallel.models.configurations import load_configuration
from expert_parallel.projection.constants import measure_machine, random_tokens
from expert_parallel.projection.hardware import Machine
from expert_parallel.projection.link_probe import measure_link
from expert_parallel.projection.step import uniform_experts
from expert_parallel.report import table

BATCHES, SEQUENCES = (1, 4, 8, 16, 32), 32
ONE_PROCESS = (STOCK, "2 simulated", "2 simulated, quick", "8 simulated, quick")
ON_RANKS = (TENSOR, TENSOR_QUICK, "rest whole", "rest split", "rest split, quick")


# --- one process of a backend, which waits for its turns ---------------------------------------------------------


def sequences(model, args) -> np.ndarray:
    """Token ids [S, context + steps]: windows of held-out text of every domain by turns, or random ones."""
    length, texts = args.context + args.steps, sorted((Path(args.model) / "held-out").glob("*.txt"))
    if not texts:
        return np.array(random_tokens(model, SEQUENCES * length)).reshape(SEQUENCES, length)
    tokenizer = Checkpoint(args.model).tokenizer()
    ids = [tokenizer.encode(text.read_text(), add_special_tokens=False) for text in texts]
    starts = [(ids[n % len(ids)], n // len(ids) * length) for n in range(SEQUENCES)]
    if any(len(of_text) < at + length for of_text, at in starts):
        raise ValueError(f"the held-out texts are too short for {SEQUENCES} windows of {length} tokens: fewer --steps")
    return np.array([of_text[at : at + length] for of_text, at in starts])


class Decoding:
    """B sequences of a model, decoded from the same place at every turn."""

    def __init__(self, model, ids, batch, context):
        self.model, self.ids, self.context = model, mx.array(ids[:batch]), context
        self.cache = make_prompt_cache(model)
        mx.eval(model(self.ids[:, :context], cache=self.cache))

    def seconds(self, steps: int) -> float:
        """Of one step, the mean of so many; the cache is afterwards what it was."""
        begin = time.perf_counter()
        for n in range(steps):
            at = self.context + n % (self.ids.shape[1] - self.context)
            mx.eval(self.model(self.ids[:, at : at + 1], cache=self.cache))
        seconds = (time.perf_counter() - begin) / steps
        for entry in self.cache:
            entry.trim(steps)
        return seconds


def recorded(model, ids, context) -> list:
    """Experts [S, N, L, k] of the tokens after the context; causal, so as if decoded one by one."""
    with record_routing(model) as trace:
        mx.eval(model.model(mx.array(ids)))  # all but the head, which routes nothing
    return trace.experts.reshape(*ids.shape, *trace.experts.shape[1:])[:, context:].tolist()


def worker(args):
    group, models, places = mx.distributed.init(), {}, {}
    for variant in args.variants:
        try:
            models[variant] = build(variant, args, group)
        except ValueError as error:
            models[variant] = str(error)
    ids = sequences(next(model for model in models.values() if not isinstance(model, str)), args)
    refused = {variant: model for variant, model in models.items() if isinstance(model, str)}
    answer(args, group, 0, {"refused": refused, "ranks": group.size()})
    number = 1
    while (turn := read_turn(args.folder, number, args.parent)) is not None:
        if turn["backend"] == args.worker:
            model, work = models[turn["variant"]], turn["work"]
            if work == "machine":
                described = describe(load_configuration(args.model))
                try:
                    found = dataclasses.asdict(
                        measure_machine(model, described.demand, described.outside["head"].bytes)
                    )
                except ValueError as busy:
                    found = str(busy)
            elif work == "routing":
                found = recorded(model, ids, args.context)
            else:
                key = turn["variant"], work["batch"]
                if key not in places:
                    places[key] = Decoding(model, ids, work["batch"], args.context)
                mx.eval(mx.distributed.all_sum(mx.ones(1), group=group))
                found = places[key].seconds(work["steps"])
            answer(args, group, number, found)
        number += 1


# --- the one who asks --------------------------------------------------------------------------------------------


def measure(args):
    """What was measured here.

    ({(backend, variant, B): seconds of a step by round}, refused, Machine or why there is none, recording [S, N, L, k])
    """
    variants = {"one process": ONE_PROCESS, **dict.fromkeys(args.backends, ON_RANKS)}
    same = ("--model", args.model, "--context", args.context, "--steps", args.steps)
    with Workers(args, variants, __file__, same) as workers:
        refused = {(b, v): why for b, started in workers.started.items() for v, why in started["refused"].items()}
        cases = [(b, v) for b, names in variants.items() for v in names if (b, v) not in refused]
        experts = np.array(workers.ask("one process", STOCK, "routing"))
        seconds = {(*case, batch): [] for case in cases for batch in args.batches}
        for batch in args.batches:
            steps, end = {}, time.monotonic() + 60 * args.minutes
            for n in range(args.rounds + args.warm_up):
                if n > args.warm_up and time.monotonic() > end:
                    break
                for case in track(cases, f"{batch} sequences, round {n + 1}", console=output.console(), transient=True):
                    taken = workers.ask(*case, {"batch": batch, "steps": steps.get(case, 1)})
                    steps.setdefault(case, max(1, min(args.steps, int(args.seconds / taken))))
                    if n >= args.warm_up:
                        seconds[(*case, batch)].append(taken)
        machine = "not asked for" if args.no_model else workers.ask("one process", STOCK, "machine")
        machine = machine if isinstance(machine, str) else Machine(**machine)
    return seconds, refused, machine, experts


def run(args):
    seconds, refused, machine, experts = measure(args)
    demand, console = describe(load_configuration(args.model)).demand, output.console()
    links = {backend: measure_link(backend)[0] for backend in args.backends}
    S, N, L, k = experts.shape
    E, name, figures = demand.num_experts, Path(args.model).name, {}

    # 1. What a step asks for
    uniform = uniform_experts(S * N, L, E, k).reshape(S, N, L, k)
    counted = {
        (devices, batch, kind): count(ids, place_experts(np.ones((L, E)), devices).held, batch)
        for devices in (2, 8) for batch in args.batches for kind, ids in (("measured", experts), ("uniform", uniform))
    }  # fmt: skip
    rows = []
    for batch in args.batches:
        (two, even), (eight, all_even) = [[counted[D, batch, kind] for kind in ("measured", "uniform")] for D in (2, 8)]
        chance = wanted_by_chance(E, k, batch)
        pairs = [(two["wanted"], chance), (two["balancedness"], even["balancedness"])]
        pairs += [(eight[what], all_even[what]) for what in ("balancedness", "fan_out", "devices")]
        rows.append((f"{batch}", *(f"{a:.{1 if a > 9 else 2}f} / {b:.{1 if b > 9 else 2}f}" for a, b in pairs)))
    names = ("sequences", "experts wanted", "balancedness of 2", "of 8", "fan-out of 8", "devices a step")
    title = (
        f"A step and layer ({name}, means of {S * N} tokens; measured / uniform: modelled for experts, else simulated)"
    )
    console.print(table.of_rows(title, *names, rows=rows))

    # 2. Speed
    for title, cell in (("tokens/s (measured", lambda times, stock, B: B / times), ("over stock (measured", lambda
                         times, stock, B: stock / times)):  # fmt: skip
        cases, rows = list(dict.fromkeys(key[:2] for key in seconds)), []
        for case in cases:
            row = []
            for B in args.batches:
                values = cell(np.array(seconds[(*case, B)]), np.array(seconds["one process", STOCK, B]), B)
                low, middle, high = np.min(values), np.median(values), np.max(values)
                digits = 2 if high < 20 else 0
                row.append(f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})")
            rows.append((words(*case), *row))
        rounds = sorted({len(times) for times in seconds.values()})
        whole = (
            f"{title}, {name}, medians of {'-'.join(map(str, rounds))} rounds, lowest and highest; sequences at once)"
        )
        console.print(table.of_rows(whole, "variant", *map(str, args.batches), rows=rows))
    for (backend, variant), why in refused.items():
        console.print(f"{variant} over {backend} is not possible here: {why}")

    # 3. The model of speed, held against it; and what it says of machines that are not here
    foretold = {}
    if isinstance(machine, str):
        console.print(f"no model of this machine: {machine}")
    else:
        foretold = modelled(args, demand, machine, links, experts)
    cases = [case for case in dict.fromkeys(key[:2] for key in foretold) if (*case, 1) in seconds]
    ratios = {key: foretold[key] / min(seconds[key]) for key in foretold if key in seconds}
    rows = [(words(*case), *(f"{1e3 * foretold[(*case, B)]:.1f} ({ratios[(*case, B)]:.2f})" for B in args.batches))
            for case in cases]  # fmt: skip
    title = f"ms a step (modelled, {name}; behind it modelled / shortest measured), sequences at once"
    console.print(table.of_rows(title, "variant", *map(str, args.batches), rows=rows))
    far = elsewhere(args.batches, experts, E)
    kinds = dict.fromkeys(row[0] for row in far)
    rows = [(kind, *(f"{speed:.0f}" for which, _, speed in far if which == kind)) for kind in kinds]
    title = f"tokens/s of Qwen3-Coder-30B (modelled, as uneven as {name}), sequences at once"
    console.print(table.of_rows(title, "machines", *map(str, args.batches), rows=rows))

    if args.json:
        figures = {
            "environment": table.environment(), "model": name, "context": args.context,
            "counted": [{"devices": D, "sequences": B, "routing": kind, **found}
                        for (D, B, kind), found in counted.items()],
            "wanted_by_chance_modelled": {B: wanted_by_chance(E, k, B) for B in args.batches},
            "speeds": [{"backend": b, "variant": v, "sequences": B, "seconds_per_step_measured": times,
                        "seconds_per_step_modelled": foretold.get((b, v, B))} for (b, v, B), times in seconds.items()],
            "elsewhere_modelled": [dict(zip(("machines", "sequences", "tokens_per_second"), row, strict=True))
                                   for row in far],
        }  # fmt: skip
        output.write_json(args.json, figures)


def words(backend, variant) -> str:
    return variant if backend == "one process" else f"{variant}, {backend}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHIPPED), help="checkpoint folder (default: the shipped model)")
    parser.add_argument("--backends", nargs="+", default=["mpi"], choices=("mpi", "ring"))
    parser.add_argument("--ranks", type=int, default=2, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before those that count")
    parser.add_argument("--minutes", type=float, default=10, help="for each B, after which no further round begins")
    parser.add_argument("--context", type=int, default=32, help="tokens before those that are decoded")
    parser.add_argument("--steps", type=int, default=64, help="tokens of each sequence that are decoded, at most")
    parser.add_argument("--seconds", type=float, default=0.5, help="of decoding in one turn; one step at least")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one turn, or for loading")
    parser.add_argument("--no-model", action="store_true", help="do not measure this machine's constants")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="divisors of 32, sequences at once")
    parser.add_argument("--json", type=Path)
    for hidden in ("--worker", "--folder", "--parent"):
        parser.add_argument(hidden, help=argparse.SUPPRESS, type=Path if hidden == "--folder" else str)
    parser.add_argument("--variants", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    with output.exit_on_user_error():
        worker(args) if args.worker else run(args)


if __name__ == "__main__":
    main()
