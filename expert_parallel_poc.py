"""Skewed routing: what does it cost, and what helps? One MoE layer, no model.

    python expert_parallel_poc.py                    five scenarios on 8 devices
    python expert_parallel_poc.py --scenarios hot,drifting --devices 16
    python expert_parallel_poc.py --trace trace.npz  recorded: own, vLLM's, ...
    python expert_parallel_poc.py --trace code.npz --test-trace prose.npz

A layer with real (random) weights runs over simulated devices, each with its
own experts and stream, and is checked against mlx-lm's layer and against a
dense computation. Qwen3-Coder's 128 experts, top-8, at an eighth of its width.
Remedies are fitted on the first half of the tokens and judged on the second,
in batches of 256 that wait for their fullest device.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from expert_parallel.command import options, output

SCENARIOS = ("balanced", "skewed", "hot", "drifting", "correlated")
WORDS = """words in the report:
  load per device        share of the slots, (token, chosen expert) pairs, that
                         each device computes; contiguous: experts in order
  off mlx-lm, off dense  largest difference of a value from mlx-lm's layer, and
                         from computing every expert for every token
  one pass               route (choose experts), dispatch (copy tokens to
                         devices), compute, combine (weigh and add up);
                         medians of so many passes
  machines               the same if each device were a machine: compute is the
                         mean of the devices, straggler what the slowest takes
                         longer, communication from --bandwidth and --latency;
                         the largest is the bottleneck, of the sum
  balancedness           mean device load over the fullest one's; 1 is even
  if uniform             what routing without any preference would give for as
                         many tokens: the level of chance
  seen after             tokens until an expert chosen n times counts as hot
  loads that last        cosine of expert loads of fit and test; if shuffled:
                         what the number of tokens alone costs
  among copies           slots of the fullest device for other ways to deal them
  affinity's bound       how much fuller than balanced's its fullest device is
  fit, test              balancedness on the tokens that a remedy was fitted on,
                         and on those that judge it
  fan-out                devices that a token is sent to
  modelled, fit          ms of the slowest device, from the fit's balancedness;
  measured, test         run on 512 test tokens, in turn with the others
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
    add("--seed", type=int, default=0, help="of weights, tokens and scenarios (default: 0)")
    add("--json", type=Path, metavar="FILE", help="save all figures; - for standard output, and then nothing else")
    add("--html", type=Path, metavar="FILE", help="save a page with everything in it, to read in a browser")
    add("--quiet", action="store_true", help="print nothing")
    return parser


def run(args):
    # 1. What to study, and the layer to study it on.
    names = options.check_study(args, SCENARIOS)
    import mlx.core as mx
    import numpy as np

    from expert_parallel.placing.strategies import place_experts
    from expert_parallel.projection.links import Link
    from expert_parallel.report import table, workbench
    from expert_parallel.study.phases import MEASURED, SmallLayer, scenario_tokens
    from expert_parallel.study.remedies import recorded
    from expert_parallel.study.scenarios import SCENARIOS as MEANING

    console = output.console(args.quiet or output.to_standard_output(args.json))
    experts, top_k, trace = args.experts or 128, args.top_k, None
    if args.trace:
        *trace, notes = recorded(filter(None, (args.trace, args.test_trace)), args.experts)
        ((experts, top_k),) = {(part.num_experts, part.experts.shape[2]) for part in trace}
        for note in notes:
            console.print(note)
    redundant = args.redundant_experts
    if redundant is None:
        redundant = args.devices if args.devices > 1 else 0
    place_experts(np.ones(experts)[None], args.devices, "replicated", redundant)  # mistakes are said now
    layer = SmallLayer(args.hidden, args.expert_width, experts, top_k, args.seed)
    link, about = Link(args.latency * 1e-6, args.bandwidth * 1e9), table.environment()
    console.print(
        f"{experts} experts, top-{top_k}, hidden {args.hidden}, expert width {args.expert_width}, float32"
        f"\n{about['device']}, {about['cores']} cores, mlx {about['mlx']};"
        f" link {args.bandwidth:g} GB/s, {args.latency:g} us (assumed); words: --help\n"
    )

    # 2. Each scenario, and the trace with its own choices on random tokens.
    results, shown = {}, []
    for name in [*names, *([args.trace.name] if trace else [])]:
        if name in MEANING:
            parts = scenario_tokens(layer, name, args.tokens, args.seed)
        else:
            parts = (*trace, mx.random.normal((MEASURED, args.hidden), key=mx.random.key(args.seed + 1)), None)
        tables = workbench.study(layer, *parts, args.devices, redundant, link)
        results[name] = table.sections(tables)
        shown += [replace(part, title=f"{name}: {part.title}") for part in tables]
        console.rule(f"{name}: {MEANING.get(name, 'recorded trace')}", style="dim", align="left")
        console.print(*tables)
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
    with output.exit_on_user_error():
        run(args)


if __name__ == "__main__":
    main()
