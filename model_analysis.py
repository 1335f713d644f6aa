"""What is in a Mixture-of-Experts model, what it needs, and what it would do on
your hardware.

    python model_analysis.py            Qwen3-Coder-30B, without its weights
    python model_analysis.py --model deepseek-v3 --hardware m3-ultra
    python model_analysis.py --model path/or/hub-id --bits 8 --context 131072
    python model_analysis.py --model models/tiny-qwen3-moe --forward

--model takes a bundled name, a folder, a config.json or a hub id. Every figure
says whether it is measured, simulated or modelled.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from expert_parallel.command import limits, options, output, prompts
from expert_parallel.projection.hardware import LINKS, MACHINES, USUAL_LINK, find

BUNDLED = Path(options.__file__).resolve().parents[1] / "models" / "configs"


def setup_arg_parser():
    names = sorted(path.stem for path in BUNDLED.glob("*.json"))
    parser = output.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="qwen3-coder-30b", help=f"folder, config.json, hub id, or: {', '.join(names)}")
    add("--bits", type=int, choices=(2, 3, 4, 5, 6, 8, 16), help="quantise to so many bits; 16: not at all")
    add("--group-size", type=int, help="of the quantisation (default: 64)")
    add("--mode", default="affine", choices=("affine", "mxfp4", "nvfp4", "mxfp8"), help="of the quantisation")
    add("--context", type=int, default=2048, help="tokens in the cache (default: 2048)")
    add("--devices", type=int, nargs="+", metavar="N", help="numbers of devices to consider (default: 1 2 4 ... 64)")
    add("--device-memory", type=float, metavar="GB", help="of each device, not --hardware's: how many hold the model?")
    add("--redundant-experts", type=int, default=0, metavar="R", help="extra copies per layer")
    add(
        "--hardware",
        default="m4-max",
        help=f"project onto: {', '.join(MACHINES)} (default: m4-max); --bandwidth"
        " and --device-memory make one of your own of it",
    )
    add("--bandwidth", type=float, metavar="GB/S", help="of each device's memory, not --hardware's")
    add("--link", help=f"between devices: {', '.join(LINKS)}")
    add("--trace", type=Path, metavar="FILE", help="routing of the projection (default: uniform)")
    add("--forward", action="store_true", help="run texts through the model (needs its weights)")
    add("--prompt", nargs="+", metavar="[NAME=]TEXT", help="texts or files for --forward, e.g. code=a.py prose=b.txt")
    add("--prompt-tokens", type=int, default=256, help="at most so many tokens of each text (default: 256)")
    add("--measure", action="store_true", help="fit the projection's constants on this machine, a few minutes")
    add("--json", type=Path, metavar="FILE", help="save all figures; - for standard output, and then nothing else")
    add("--plots", type=Path, metavar="DIR", help="save a picture of the projection, speed.png")
    add("--html", type=Path, metavar="FILE", help="save a page with everything in it, to read in a browser")
    add("--quiet", action="store_true", help="print nothing")
    return parser


def check_arguments(args):
    lowest = {"context": 1, "redundant_experts": 0, "prompt_tokens": 1, "group_size": 1}
    limits.check_limits(args, {name: (low, options.MOST) for name, low in lowest.items()})
    if args.bits in (None, 16) and (args.group_size or args.mode != "affine"):
        raise ValueError("--group-size and --mode say how --bits are packed: give --bits from 2 to 8 too")
    if args.device_memory is not None and not 0 < args.device_memory < float("inf"):
        raise ValueError(f"--device-memory must be above 0 and finite, got {args.device_memory:g}")
    if args.bandwidth is not None and not 0 < args.bandwidth < float("inf"):
        raise ValueError(f"--bandwidth must be above 0 and finite, got {args.bandwidth:g}")
    find("hardware", args.hardware, MACHINES)
    find("link", args.link or USUAL_LINK[args.hardware.lower()], LINKS)
    if (args.forward or args.prompt) and (BUNDLED / f"{args.model.lower()}.json").exists():
        raise ValueError(f"--forward needs weights: {args.model} is a configuration alone, give a folder or a hub id")


def run(args, tell):
    check_arguments(args)
    tell(f"describing {args.model}")
    from expert_parallel.formats import traces
    from expert_parallel.models.architecture import describe
    from expert_parallel.models.configurations import load_configuration
    from expert_parallel.report import checks, model, projection, table

    console, shown = output.console(args.quiet or output.to_standard_output(args.json)), []

    def show(*tables):
        shown.extend(tables)
        tell()
        for part in tables:
            console.print(part)
            console.print()

    # 1. What is in it
    configuration = load_configuration(args.model)
    alone = configuration.bundled or Path(args.model).expanduser().is_file()
    read = {"the model": configuration.file if alone else configuration.file.parent, "the trace": args.trace}
    asked = prompts.titled(args.prompt or ())
    read |= {f"the prompt {path}": path for path in asked.values() if os.path.isfile(path)}  # noqa: PTH113
    outputs = {"--json": args.json, "--html": args.html}
    outputs |= limits.picture_files(args.plots, options.ANALYSIS_PICTURES)
    output.check_outputs(outputs, {what: path for what, path in read.items() if path})
    quantisation = {"bits": args.bits, "group_size": args.group_size, "mode": args.mode}
    described = describe(configuration, **quantisation)
    link = args.link or USUAL_LINK[args.hardware.lower()]
    wire, source = find("link", link, LINKS)
    most = min(described.num_experts, wire.most_devices)
    devices = sorted(set(args.devices or [count for count in projection.DEVICES if count <= most]))
    if not 1 <= devices[0] <= devices[-1] <= most:
        limit = "the experts of a layer" if most == described.num_experts else f"what {link} connects"
        raise ValueError(f"--devices {devices}: needs 1 to {most}, {limit}")
    show(*model.architecture(described, configuration, args.context))

    # 2. What it needs on each device
    show(*(needs := model.memory(described, devices, args.redundant_experts)))
    machine = find("hardware", args.hardware, MACHINES)
    machine = machine.with_bandwidth(args.bandwidth) if args.bandwidth else machine
    if args.device_memory:
        machine = replace(machine, memory_bytes=args.device_memory * 1e9)
        usable, whose = machine.usable
        fit = model.fit(described, devices, usable, args.context)
        fit.note = f"So much of {args.device_memory:g} GB is for weights and cache ({whose})."
        fit.also["memory_bytes"] = machine.memory_bytes
        show(fit)

    # 3. What it would do, there and here
    wanted = (described.num_moe_layers, described.chosen, described.num_experts)
    trace = traces.read_trace_for(args.trace, *wanted) if args.trace else None
    for note in traces.notes_of(trace, args.trace.name) if trace else ():
        console.print(note)
    setting = projection.Setting(machine, wire, link, source, args.context, devices, trace, args.redundant_experts)
    hybrid = {row["devices"]: row["hybrid_bytes"] for row in needs[0].to_json()["devices"]}
    show(*projection.projection(described, setting, hybrid), *projection.one_sequence(described, setting))
    if args.measure:
        here, links, measured = checks.machine(configuration, described, quantisation, tell=tell)
        show(measured)
        for name, local in links.items():
            source = "all-sums of 2 processes on this machine, each of which is taken for a machine like it"
            of_it = (args.context, devices, trace, args.redundant_experts)
            setting = projection.Setting(here, local, name, source, *of_it)
            show(*projection.projection(described, setting, section=f"this_machine.projection.{name}"))

    # 4. Its files, and real text through its weights
    whole = True
    if configuration.has_weights:
        from expert_parallel.models.checkpoint_check import check_checkpoint

        checked = check_checkpoint(configuration)
        whole = checked["ok"]
        show(*checks.checkpoint(checked))
    if args.forward or args.prompt:
        from expert_parallel.checkpoint.finding import SHIPPED

        own = {"code": __file__, "prose": str(SHIPPED / "README.md"), "data": str(BUNDLED / "deepseek-v3.json")}
        texts = {title: prompts.text_of(prompt) for title, prompt in (asked or own).items()}
        show(*checks.forward(args.model, texts, args.prompt_tokens, tell))

    missing = dict.fromkeys(("fit", "one_sequence", "this_machine", "checkpoint", "forward"))
    document = table.sections(shown, options=vars(args), environment=table.environment(), **missing)
    if args.json:
        output.write_json(args.json, document)
    if args.plots or args.html:
        tell("drawing")
        from expert_parallel.report import page, plots

        title = f"{configuration.name} on {machine.name}"
        pictures = plots.of_analysis(document, title)
        if args.plots:
            plots.save_plots(args.plots, pictures)
        if args.html:
            page.save_page(args.html, title, shown, pictures, document)
    return 0 if whole else 1


def main():
    args = setup_arg_parser().parse_args()
    with output.exit_on_user_error(), output.progress_line(not args.quiet) as tell:
        status = run(args, tell)
    sys.exit(status)


if __name__ == "__main__":
    main()
