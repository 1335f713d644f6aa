"""Skewed routing: what does it cost, and what helps? One MoE layer, no model needed.

    python expert_parallel_poc.py                            five scenarios on 8 simulated devices
    python expert_parallel_poc.py --scenarios hot,drifting --devices 16
    python expert_parallel_poc.py --trace trace.npz          a recorded trace: own, vLLM's or Megatron's
    python expert_parallel_poc.py --trace code.npz --test-trace prose.npz

A layer with real (random) weights runs over D devices, each with its own experts and its own stream,
and is checked against mlx-lm's layer and against a dense computation. Geometry: Qwen3-Coder's 128
experts, top-8, at an eighth of its width. Remedies are fitted on the first half of the tokens and
judged on the second, in batches of 256 that wait for their fullest device.
"""

import argparse
from pathlib import Path

import mlx.core as mx
import numpy as np

from expert_parallel import output, report
from expert_parallel.communication import Link
from expert_parallel.phases import SmallLayer
from expert_parallel.placement import place_experts
from expert_parallel.poc_figures import MEASURED, study, tables
from expert_parallel.remedies import BATCH, Choices
from expert_parallel.scenarios import SCENARIOS, preferences
from expert_parallel.trace_import import fit_and_test, read_trace, without_warm_up

WORDS = """words in the report:
  load per device        share of the slots, (token, chosen expert) pairs, that
                         each device computes; contiguous: experts in order
  off mlx-lm, off dense  largest difference of a value from mlx-lm's layer, and
                         from computing every expert for every token
  one pass               route (choose experts), dispatch (copy tokens to
                         devices), compute, combine (weigh and add up)
  machines               the same if each device were a machine: compute is the
                         measured mean of the devices, straggler what the
                         slowest takes longer, communication from --bandwidth
                         and --latency; the largest is the bottleneck
  balancedness           mean device load over the fullest one's; 1 is even
  seen after             tokens until an expert chosen n times counts as hot
  affinity's bound       how much fuller than balanced's its fullest device may
                         be. It holds for the tokens that it was fitted on
  fit, test              balancedness on the tokens that a remedy was fitted on,
                         and on those that judge it
  fan-out                devices that a token is sent to
  modelled, measured     ms of the slowest device: from the fit's balancedness,
                         and run on 512 test tokens
  round-robin            expert e on device e mod D
  balanced               experts placed so that the fullest device has least
  replicated             balanced, with copies of hot experts
  affinity               experts chosen together are placed together
  cap and drop           an expert takes 1.25 times its even share of a batch;
                         the slots beyond are lost (re-route: go to the next
                         best expert). Changes the model's output
  load-aware router      a bias on the choice levels the devices. Changes the
                         model's output
  rebalancing            balanced, and experts move while that repays the pause
"""

MOST_TRACED = 65_536  # tokens of a longer trace are thinned to so many, whole batches


def setup_arg_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=WORDS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--scenarios", metavar="LIST", help=f"of {', '.join(SCENARIOS)} (default: all; with --trace none)")
    add(
        "--trace", type=Path, metavar="FILE", help="recorded routing: .npz, .npy [tokens, layers, k], Megatron's .jsonl"
    )
    add("--test-trace", type=Path, metavar="FILE", help="judge remedies on this trace, fitted on the other")
    add("--devices", type=int, default=8, help="simulated devices (default: 8)")
    add("--redundant-experts", type=int, metavar="R", help="copies of hot experts per layer (default: one per device)")
    add("--experts", type=int, default=128, help="experts in the layer (default: 128; a trace says it itself)")
    add("--top-k", type=int, default=8, help="experts chosen per token (default: 8)")
    add("--hidden", type=int, default=256, help="width of a token (default: 256, Qwen3-Coder has 2048)")
    add("--expert-width", type=int, default=96, help="width of an expert (default: 96, Qwen3-Coder has 768)")
    add("--tokens", type=int, default=8192, help="tokens routed per scenario (default: 8192)")
    add("--bandwidth", type=float, default=5.0, help="GB/s of each device's link, for modelled times (default: 5)")
    add("--latency", type=float, default=20.0, help="microseconds of a message, for modelled times (default: 20)")
    add("--seed", type=int, default=0, help="of weights, tokens and scenarios (default: 0)")
    add("--json", type=Path, metavar="FILE", help="save all figures")
    add("--quiet", action="store_true", help="print nothing")
    return parser


def check_arguments(args):
    """Names of the scenarios asked for; ValueError for what cannot be."""
    for name, low in (("experts", 1), ("top_k", 1), ("hidden", 1), ("expert_width", 1), ("tokens", 2 * MEASURED)):
        if getattr(args, name) < low:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(args, name)}")
    if args.top_k > args.experts:
        raise ValueError(f"--top-k {args.top_k}: there are {args.experts} experts to choose from")
    if not (args.bandwidth > 0 and 0 <= args.latency < np.inf):
        raise ValueError(f"--bandwidth {args.bandwidth}, --latency {args.latency}: needs more than 0, and 0 or more")
    if not 0 <= args.seed < 1 << 63:
        raise ValueError(f"--seed {args.seed}: needs a whole number from 0 up to 2^63 - 1")
    if args.test_trace and not args.trace:
        raise ValueError("--test-trace needs --trace, the trace to fit on")
    if args.json:
        output.check_writable(args.json)
    names = [] if args.trace and args.scenarios is None else (args.scenarios or ",".join(SCENARIOS)).split(",")
    names = [name.strip() for name in names]
    for name in names:
        preferences(name, 1, 1)
    return names


def synthetic(name, layer, args):
    """(fit, test, x, preference of x): a scenario's tokens through the layer's own router."""
    wish = preferences(name, args.tokens, args.experts, args.seed)
    x = mx.random.normal((args.tokens, args.hidden), key=mx.random.key(args.seed + 1))
    gates, experts, _ = layer.route(x, mx.array(wish))
    choices = Choices(np.array(experts)[:, None], args.experts, np.array(gates)[:, None])
    half = args.tokens // 2
    rows = half + np.linspace(0, args.tokens - half - 1, MEASURED).astype(int)  # evenly from those that judge
    return choices.part(slice(0, half)), choices.part(slice(half, None)), x[mx.array(rows)], wish[rows]


def recorded(args, console):
    """(fit, test) of --trace, and of --test-trace where given; warm-up rows left out."""
    parts = []
    for path in filter(None, (args.trace, args.test_trace)):
        trace = read_trace(path)
        if 0 in trace.experts.shape:
            raise ValueError(f"{path}: nothing in it, it is {list(trace.experts.shape)} [tokens, layers, k]")
        trace = without_warm_up(trace)
        if len(trace) < 2 * MEASURED:
            left = f" after {n} warm-up rows, all alike" if (n := trace.metadata.get("warm_up_rows")) else ""
            raise ValueError(f"{path}: {len(trace)} tokens{left}, at least {2 * MEASURED} are needed")
        if "warm_up_rows" in trace.metadata:
            console.print(f"{path.name}: left out {trace.metadata['warm_up_rows']} warm-up rows, all alike")
        if len(trace) > MOST_TRACED:
            console.print(
                f"{path.name}: every {len(trace) / MOST_TRACED:.1f}th batch of its {len(trace)} tokens is taken"
            )
            starts = np.linspace(0, len(trace) - BATCH, MOST_TRACED // BATCH).astype(int)
            trace = trace[(starts[:, None] + np.arange(BATCH)).ravel()]
        parts.append(trace)
    if len({(part.experts.shape[1:], part.num_experts) for part in parts}) > 1:
        raise ValueError(f"{args.trace} and {args.test_trace} are of different models: {parts[0]}, {parts[1]}")
    fit, test = parts if len(parts) == 2 else fit_and_test(parts[0])
    return tuple(Choices(part.experts.astype(np.int64), part.num_experts) for part in (fit, test))


def main():
    args = setup_arg_parser().parse_args()
    with output.exit_on_user_error():
        # 1. What to study, and the layer to study it on.
        names, console = check_arguments(args), output.console(args.quiet)
        trace = recorded(args, console) if args.trace else None
        if trace:
            args.experts, args.top_k = trace[0].num_experts, trace[0].experts.shape[2]
        redundant = args.redundant_experts
        if redundant is None:
            redundant = args.devices if args.devices > 1 else 0
        place_experts(np.ones((1, args.experts)), args.devices, "replicated", redundant)  # mistakes are said now
        layer = SmallLayer(args.hidden, args.expert_width, args.experts, args.top_k, args.seed)
        link = Link(args.latency * 1e-6, args.bandwidth * 1e9)
        about = report.environment()
        console.print(
            f"{args.experts} experts, top-{args.top_k}, hidden {args.hidden}, expert width {args.expert_width}, float32"
            f"\n{about['device']}, {about['cores']} cores, mlx {about['mlx']};"
            f" link {args.bandwidth:g} GB/s, {args.latency:g} us (assumed); words: --help\n"
        )

        # 2. Each scenario, and the trace with its own choices on random tokens.
        results = {}
        for name in [*names, *([args.trace.name] if trace else [])]:
            if name in SCENARIOS:
                parts = synthetic(name, layer, args)
            else:
                parts = (*trace, mx.random.normal((MEASURED, args.hidden), key=mx.random.key(args.seed + 1)), None)
            results[name] = study(layer, *parts, args.devices, redundant, link)
            console.rule(f"{name}: {SCENARIOS.get(name, 'recorded trace')}", style="dim", align="left")
            for part in tables(results[name]):
                console.print(part)
            console.print()

        # 3. The same figures for programs.
        if args.json:
            options = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
            output.write_json(args.json, {"environment": about, "options": options, "results": results})


if __name__ == "__main__":
    main()
