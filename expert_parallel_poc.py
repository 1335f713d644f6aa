"""Skewed routing: what does it cost, and what helps? One MoE layer, no model.

    python expert_parallel_poc.py                    five scenarios on 8 devices
    python expert_parallel_poc.py --scenarios hot,drifting --devices 16
    python expert_parallel_poc.py --trace trace.npz  recorded: own, vLLM's, ...
    python expert_parallel_poc.py --trace code.npz --test-trace prose.npz
    python expert_parallel_poc.py --fail-device 3    what a lost device costs

A layer with real (random) weights runs over simulated devices, each with its
own experts and stream, and is checked against mlx-lm's layer and against a
dense computation. Qwen3-Coder's 128 experts, top-8, at an eighth of its width.
Remedies are fitted on the first half of the tokens and judged on the second,
in batches of 256 that wait for their fullest device.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from expert_parallel.command import limits, output
from expert_parallel.command.words import WORDS

SCENARIOS = ("balanced", "skewed", "hot", "drifting", "correlated")


def setup_arg_parser():
    parser = output.Parser(description=__doc__, epilog=WORDS, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scenarios", metavar="LIST", help=f"of {', '.join(SCENARIOS)} (default: all; with --trace none)")
    add("--trace", type=Path, metavar="FILE", help="recorded routing, of any format in the README")
    add("--test-trace", type=Path, metavar="FILE", help="judge remedies on this trace, fitted on the other")
    add("--devices", type=int, default=8, help="simulated devices (default: 8)")
    add("--redundant-experts", type=int, metavar="R", help="copies of hot experts per layer (default: one per device)")
    add(
        "--experts",
        type=int,
        metavar="E",
        help="experts in the layer, or in the model of a trace (default: 128, or as many as the trace says or shows)",
    )
    add("--top-k", type=int, metavar="K", help="experts chosen per token (default: 8; a trace has its own)")
    add("--hidden", type=int, default=256, help="width of a token (default: 256, Qwen3-Coder has 2048)")
    add("--expert-width", type=int, default=96, help="width of an expert (default: 96, Qwen3-Coder has 768)")
    add("--tokens", type=int, metavar="N", help="tokens routed per scenario (default: 8192)")
    add("--bandwidth", type=float, default=5.0, help="GB/s of each device's link, for modelled times (default: 5)")
    add("--latency", type=float, default=20.0, help="microseconds of a message, for modelled times (default: 20)")
    add(
        "--expert-memory",
        metavar="LIST",
        help="with --trace, what caches of these sizes would hit, such as 10%%,25%%,4GB; one expert a layer at least",
    )
    add(
        "--fail-device",
        type=int,
        action="append",
        metavar="D",
        help="lose this one: what goes with it, what is left and what the way back takes; may be given again",
    )
    add("--expert-bytes", metavar="SIZE", help="of an expert (default: Qwen3-Coder's in 4 bits, 2.65MB)")
    add("--disk", type=float, metavar="GB/S", help="that experts are read with (default: 3, assumed)")
    add("--seed", type=int, default=0, help="of weights, tokens and scenarios (default: 0)")
    add("--json", type=Path, metavar="FILE", help="save all figures; - for standard output, and then nothing else")
    add("--html", type=Path, metavar="FILE", help="save a page with everything in it, to read in a browser")
    add("--quiet", action="store_true", help="print nothing")
    return parser


def run(args, tell):
    # 1. What to study, and the layer to study it on.
    names = limits.check_study(args, SCENARIOS)
    tell("making the layer")
    import mlx.core as mx
    import numpy as np

    from expert_parallel.placing.strategies import place_experts
    from expert_parallel.projection.links import Link
    from expert_parallel.report import disk, survival, table, workbench
    from expert_parallel.study.phases import MEASURED, SmallLayer, scenario_tokens
    from expert_parallel.study.remedies import recorded
    from expert_parallel.study.scenarios import SCENARIOS as MEANING

    console = output.console(args.quiet or output.to_standard_output(args.json))
    traces = [path for path in (args.trace, args.test_trace) if path]
    experts, top_k = args.experts or 128, args.top_k
    if traces:
        *trace, notes = recorded(traces, args.experts)
        experts, top_k = trace[0].num_experts, trace[0].experts.shape[2]
        tell()
        for note in notes:
            console.print(note)
    default = args.devices if args.devices > 1 else 0
    redundant = default if args.redundant_experts is None else args.redundant_experts
    place_experts(np.ones((1, experts)), args.devices, "replicated", redundant)  # mistakes are said now
    layer = SmallLayer(args.hidden, args.expert_width, experts, top_k, args.seed)
    link, about = Link(args.latency * 1e-6, args.bandwidth * 1e9), table.environment()
    tell()
    console.print(
        f"{experts} experts, top-{top_k}, hidden {args.hidden}, expert width {args.expert_width}, float32"
        f"\n{about['device']}, {about['cores']} cores, mlx {about['mlx']};"
        f" link {args.bandwidth:g} GB/s, {args.latency:g} us (assumed); words: --help\n"
    )

    # 2. Each scenario, and the trace with its own choices on random tokens.
    results, shown = {}, []
    for name in [*names, *([args.trace.name] if traces else [])]:
        tell(f"{name}: measuring, and fitting remedies")
        if name in MEANING:
            parts = scenario_tokens(layer, name, args.tokens, args.seed)
        else:
            parts = (*trace, mx.random.normal((MEASURED, args.hidden), key=mx.random.key(args.seed + 1)), None)
        tables = workbench.study(layer, *parts, args.devices, redundant, link)
        if args.expert_memory and name not in MEANING:
            tables += disk.of_trace(traces, args.experts, args.expert_memory, args.expert_bytes, args.disk)
        if args.fail_device:
            on = (args.devices, redundant, args.fail_device, args.expert_bytes, args.disk)
            tables += survival.of_placements(*parts[:2], *on)
        results[name] = table.sections(tables)
        shown += [replace(part, title=f"{name}: {part.title}") for part in tables]
        tell()
        console.rule(f"{name}: {MEANING.get(name, 'recorded trace')}", style="dim", align="left")
        for part in tables:
            console.print(part)
            console.print()

    # 3. The same figures for programs.
    document = {"environment": about, "options": vars(args), "results": results}
    if args.json:
        output.write_json(args.json, document)
    if args.html:
        from expert_parallel.report import page

        page.save_page(args.html, "What skewed routing costs", shown, {}, document)


def main():
    args = setup_arg_parser().parse_args()
    with output.exit_on_user_error(), output.progress_line(not args.quiet) as tell:
        run(args, tell)


if __name__ == "__main__":
    main()
