"""Does the projection hold? Constants fitted on one process predict runs it has not seen.

    python tools/make_checkpoint.py --out checkpoints/coder-4 --layers 4        1.8 GB, full width
    python benchmarks/projection_check.py --model checkpoints/coder-4 --json check.json

Fitted: bandwidths, fixed cost and arithmetic on one process with the whole model, and a link on
all-sums alone. Predicted, then measured: decoding and a prompt on 2 real ranks (MPI and ring), and
on simulated devices. Both sides get the same tokens, so the fullest device is known, not guessed;
of several rounds the shortest time of each token counts. A first row far from 1 means that the
machine was busy with something else, and nothing here is to be trusted.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mlx.core as mx
import numpy as np

from expert_parallel import load_sharded, place_experts, record_routing
from expert_parallel.checkpoint.loading import load_whole
from expert_parallel.command import output
from expert_parallel.models.architecture import describe
from expert_parallel.models.configurations import load_configuration
from expert_parallel.projection.constants import measure_machine, random_tokens, seconds_of_prompt, seconds_per_token
from expert_parallel.projection.link_probe import measure_link
from expert_parallel.projection.step import estimate, fullest_device
from expert_parallel.ranks.launch import run_ranks
from expert_parallel.report import table

CONTEXT = 8


def times_of(model, tokens, prompt, rounds):
    seconds = seconds_per_token(model, tokens, CONTEXT, rounds).mean()
    return {"decode": float(seconds), "prompt": seconds_of_prompt(model, prompt, rounds, whole=True)}


def worker(args):
    """One rank: time its share; rank 0 prints."""
    group = mx.distributed.init()
    model, _ = load_sharded(args.model, group=group)
    tokens, prompt = random_tokens(model, args.tokens), random_tokens(model, args.prompt_tokens, seed=1)
    mx.eval(mx.distributed.all_sum(mx.ones(1), group=group))
    times = times_of(model, tokens, prompt, args.rounds)
    if group.rank() == 0:
        print(json.dumps(times), flush=True)


def run(args):
    console = output.console()

    # 1. Fit on one process
    configuration = load_configuration(args.model)
    described = describe(configuration)
    demand, head = described.demand, described.outside["head"].bytes
    model = load_whole(args.model)[0]
    machine = measure_machine(model, demand, head, args.tokens, args.prompt_tokens, args.rounds)
    tokens, prompt = random_tokens(model, args.tokens), random_tokens(model, args.prompt_tokens, seed=1)
    with record_routing(model) as decoded:
        seconds_per_token(model, tokens, CONTEXT, rounds=1)
    with record_routing(model) as read:
        seconds_of_prompt(model, prompt, rounds=1)
    measured = {("1 process", "one whole"): times_of(model, tokens, prompt, args.rounds)}
    del model
    mx.clear_cache()

    # 2. Predict, then measure
    shape = (demand.num_moe_layers, demand.num_experts)

    def predicted(devices, link=None):
        held = place_experts(np.ones(shape), devices).held
        one = fullest_device(decoded.experts[CONTEXT + 1 :], held)
        many = fullest_device(read.experts, held, len(prompt))
        where = (demand, machine, devices, link)
        decoding = estimate(*where, one, context=CONTEXT + len(tokens) // 2)
        return {"decode": decoding.seconds, "prompt": estimate(*where, many, tokens=len(prompt)).seconds}

    links = {}
    expected = {("1 process", "one whole"): predicted(1)}
    for devices in args.devices:
        # Simulated devices take turns in one process: all experts, one after the other.
        expected["1 process", f"{devices} simulated"] = expected["1 process", "one whole"]
        model = load_sharded(args.model, num_devices=devices)[0]
        measured["1 process", f"{devices} simulated"] = times_of(model, tokens, prompt, args.rounds)
        del model
        mx.clear_cache()
    for backend in args.backends:
        link, rows = measure_link(backend)
        links[backend] = {
            "latency_seconds": link.latency_seconds,
            "bytes_per_second": link.bytes_per_second,
            "rows": rows,
        }
        expected["2 ranks", backend] = predicted(2, link)
        command = [sys.executable, __file__, "--worker", "--model", args.model]
        command += [
            "--tokens",
            str(args.tokens),
            "--prompt-tokens",
            str(args.prompt_tokens),
            "--rounds",
            str(args.rounds),
        ]
        printed = run_ranks(backend, 2, command, timeout=args.timeout)
        line = next(line for line in printed.splitlines() if line.startswith('{"decode"'))
        measured["2 ranks", backend] = json.loads(line)

    # 3. Report
    rows, worst = [], 0.0
    for case, times in measured.items():
        for work in ("decode", "prompt"):
            ratio = expected[case][work] / times[work]
            fitted = case == ("1 process", "one whole")
            worst = worst if fitted else max(worst, abs(ratio - 1))
            rows.append((" ".join(case), work, times[work], expected[case][work], ratio, fitted))
    print_rows = [
        (c, w, f"{1e3 * t:.1f}", f"{1e3 * e:.1f}", f"{r:.2f}{' (fitted)' if f else ''}") for c, w, t, e, r, f in rows
    ]
    title = f"Projection against measurement ({configuration.name}, milliseconds)"
    console.print(table.of_rows(title, "run", "of", "measured", "predicted", "ratio", rows=print_rows))
    console.print(f"largest error of a prediction: {worst:.0%}")
    if args.json:
        figures = {
            "environment": table.environment(),
            "machine": {name: value for name, value in vars(machine).items() if name != "memory_bytes"},
            "links": links,
            "runs": [
                dict(zip(("run", "of", "measured", "predicted", "ratio", "fitted"), row, strict=True)) for row in rows
            ],
            "largest_error": worst,
        }
        output.write_json(args.json, figures)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder, full width and few layers")
    parser.add_argument("--devices", type=int, nargs="*", default=[2, 8], help="simulated devices to try")
    parser.add_argument("--backends", nargs="*", default=["mpi", "ring"], choices=("mpi", "ring"))
    parser.add_argument("--tokens", type=int, default=12, help="decoded in each run")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="more where other programs run")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for the ranks of one run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    with output.exit_on_user_error():
        worker(args) if args.worker else run(args)


if __name__ == "__main__":
    main()
