"""What does skewed routing cost on several devices, and what helps? No model needed.

    python expert_parallel_poc.py
    python expert_parallel_poc.py --devices 4 --experts 60 --top-k 4
    python expert_parallel_poc.py --trace run.npz            routing recorded from a real model

One MoE layer with real (random) weights; D devices that hold their experts and compute on
streams of their own, checked bit for bit against the whole layer. Loads and times are
measured on this machine, routing is synthetic unless it comes from a trace. Placements are
fitted on the first half of the tokens and judged on the second.
"""

import argparse
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU

from expert_parallel import RoutingTrace, balance, place_experts, report
from expert_parallel.moe import ExpertShard, SimulatedDevices
from expert_parallel.scenarios import SCENARIOS, synthesise


def setup_arg_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--devices", type=int, default=8)
    add("--experts", type=int, default=128, help="as in Qwen3-Coder-30B (default: 128)")
    add("--top-k", type=int, default=8)
    add("--hidden", type=int, default=256, help="Qwen3-Coder has 2048 (default: 256, to be quick)")
    add("--expert-width", type=int, default=128, help="Qwen3-Coder has 768 (default: 128)")
    add("--tokens", type=int, default=512)
    add("--redundant-experts", type=int, default=16, help="copies for the replicated placement (default: 16)")
    add("--scenario", choices=[*SCENARIOS, "all"], default="all")
    add("--trace", type=Path, metavar="FILE", help="a recorded trace instead of scenarios; its first layer is computed")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE")
    add("--quiet", action="store_true")
    return parser


def make_experts(args, num_experts):
    """A whole layer's experts, 4-bit as in the published checkpoints."""
    mx.random.seed(args.seed)
    experts = SwitchGLU(args.hidden, args.expert_width, num_experts)
    nn.quantize(experts, group_size=64, bits=4)
    experts.set_dtype(mx.float32)
    mx.eval(experts.parameters())
    return experts


def milliseconds(compute, rounds=5):
    """Median time of a computation, after one to warm up."""
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        mx.eval(compute())
        times.append(1e3 * (time.perf_counter() - begin))
    return float(np.median(times[1:]))


def compute_layer(experts, held, ids, x):
    """Measured on one layer: exactness, time of the whole layer, of each device alone, of all on streams."""
    indices = mx.array(ids.astype(np.uint32))
    streams = [mx.new_stream(mx.default_device()) for _ in held]
    devices = SimulatedDevices([ExpertShard.cut(experts, held, d) for d in range(len(held))], streams)
    serving = devices.shards[0]._assignment.devices(ids).reshape(-1)
    slots = [np.flatnonzero(serving == d) for d in range(len(held))]
    alone = [milliseconds(lambda d=d: devices.shards[d].rows(x, ids, slots[d]), 3) for d in range(len(held))]
    return {
        "exact": bool(mx.array_equal(devices(x, indices), experts(x, indices))),
        "whole_layer_ms": milliseconds(lambda: experts(x, indices)),
        "on_streams_ms": milliseconds(lambda: devices(x, indices)),
        "device_ms": alone,
        "slots": [len(s) for s in slots],
    }


def remedies(args, fit, test):
    """Placements against each other: fitted on one half, balancedness and fan-out on the other."""
    pairs = fit.experts
    options = {
        "contiguous": {},
        "round-robin": {},
        "balanced": {},
        "replicated": {"redundant": args.redundant_experts},
        "affinity": {"coactivation": pairs},
    }
    rows = {}
    for strategy, extra in options.items():
        placement = place_experts(fit.loads(), args.devices, strategy, **extra)
        loads = placement.device_loads(test.loads())
        rows[strategy] = {
            "balancedness": balance.balancedness(loads),
            "fitted": balance.balancedness(placement.device_loads(fit.loads())),
            "fullest_over_mean": float(1 + balance.imbalance_ratio(loads).mean()),
            "fan_out": float(balance.fan_out(test.experts, placement.held).mean()),
        }
    return rows


def examine(name, trace, args):
    """All figures of one scenario."""
    half = len(trace) // 2
    fit, test = trace[:half], trace[half:]
    placement = place_experts(trace.loads(), args.devices)
    ids = test.experts[: args.tokens, 0]
    x = mx.random.normal((len(ids), args.hidden))
    measured = compute_layer(make_experts(args, trace.num_experts), placement.held[0], ids, x)
    if not measured["exact"]:
        raise AssertionError("the devices' sum differs from the whole layer")
    busiest, mean = max(measured["device_ms"]), float(np.mean(measured["device_ms"]))
    return {"scenario": name, "measured": measured, "straggler": busiest / mean, "remedies": remedies(args, fit, test)}


def main():
    args = setup_arg_parser().parse_args()
    with report.exit_on_user_error():
        for name in ("devices", "experts", "top_k", "hidden", "expert_width", "tokens"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
        if args.hidden % 64 or args.expert_width % 64:
            raise ValueError("--hidden and --expert-width must be multiples of 64, the quantisation group")
        if args.json:
            report.check_writable(args.json)
        # 1. Routing: recorded, or synthetic scenarios.
        if args.trace:
            traces = {str(args.trace): RoutingTrace.load(args.trace)}
        else:
            names = SCENARIOS if args.scenario == "all" else [args.scenario]
            shape = (2 * args.tokens, args.experts, args.top_k)
            traces = {name: synthesise(name, *shape, seed=args.seed) for name in names}
        if min(map(len, traces.values())) < 2:
            raise ValueError("a trace of at least 2 tokens is needed: one half to fit, one to judge")
        # 2. Real weights on real shards, measured; placements compared on tokens they were not fitted on.
        console, results = report.console(args.quiet), []
        for name, trace in traces.items():
            figures = examine(name, trace, args)
            results.append(figures)
            measured = figures["measured"]
            console.rule(f"{name}: {SCENARIOS.get(name, 'recorded routing')}", style="dim", align="left")
            items = {
                "slots per device": " ".join(map(str, measured["slots"])),
                "same as the whole layer": "bit for bit" if measured["exact"] else "NO",
                "whole layer at once": f"{measured['whole_layer_ms']:.1f} ms",
                "devices on streams": f"{measured['on_streams_ms']:.1f} ms",
                "slowest device alone": f"{max(measured['device_ms']):.1f} ms, {figures['straggler']:.2f}x the mean: "
                + ("the straggler is the bottleneck" if figures["straggler"] > 1.25 else "devices are even"),
            }
            console.print(report.facts(f"One layer, contiguous placement, {len(trace) // 2} tokens (measured)", items))
            rows = [
                (strategy, f"{r['balancedness']:.3f}", f"{r['fitted']:.3f}", f"{r['fullest_over_mean']:.2f}x",
                 f"{r['fan_out']:.2f}")
                for strategy, r in figures["remedies"].items()
            ]  # fmt: skip
            columns = ("placement", "balancedness", "where fitted", "fullest / mean", "fan-out")
            title = f"Remedies, judged on tokens they were not fitted on ({args.devices} devices, simulated)"
            console.print(report.table(title, *columns, rows=rows))
        # 3. The same figures for programs.
        if args.json:
            report.write_json(args.json, {"environment": report.environment(), "scenarios": results})


if __name__ == "__main__":
    main()
