"""What is in a Mixture-of-Experts model, what it needs, and what it would do on your hardware.

    python model_analysis.py                                       Qwen3-Coder-30B, without its weights
    python model_analysis.py --model deepseek-v3 --device-memory 512 --hardware m3-ultra
    python model_analysis.py --model path/or/hub-id --bits 8 --context 131072
    python model_analysis.py --model models/tiny-qwen3-moe --forward --prompt "def main():"

--model takes a bundled name, a folder, a config.json or a hub id. Every figure says whether it is
measured, simulated or modelled.
"""

import argparse
import logging
import sys
from pathlib import Path

# transformers imports torch where it is installed, 180 MB that nothing here needs.
sys.modules.setdefault("torch", None)

from expert_parallel import analysis_figures, analysis_tables, forward_pass, output  # noqa: E402
from expert_parallel.architecture import describe  # noqa: E402
from expert_parallel.checkpoint_check import check_checkpoint  # noqa: E402
from expert_parallel.hardware import LINKS, MACHINES, USUAL_LINK, find  # noqa: E402
from expert_parallel.lazy_model import BUNDLED, bundled_names, load_configuration, quantization_of  # noqa: E402
from expert_parallel.loading import load_whole  # noqa: E402
from expert_parallel.moe import moe_layers  # noqa: E402
from expert_parallel.routing import RoutingTrace  # noqa: E402


def setup_arg_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="qwen3-coder-30b", help=f"folder, config.json, hub id, or: {', '.join(bundled_names())}")
    add("--bits", type=int, choices=(2, 3, 4, 5, 6, 8, 16), help="quantise to so many bits; 16: not at all")
    add("--group-size", type=int, help="of the quantisation (default: 64)")
    add("--mode", default="affine", choices=("affine", "mxfp4", "nvfp4", "mxfp8"), help="of the quantisation")
    add("--context", type=int, default=2048, help="tokens in the cache (default: 2048)")
    add("--devices", type=int, nargs="+", metavar="N", help="numbers of devices to consider (default: 1 2 4 ... 64)")
    add("--device-memory", type=float, metavar="GB", help="how many devices of this size hold the model?")
    add("--redundant-experts", type=int, default=0, metavar="R", help="extra copies per layer")
    add("--hardware", default="m4-max", help=f"project onto: {', '.join(MACHINES)} (default: m4-max)")
    add("--link", help=f"between devices: {', '.join(LINKS)}")
    add("--trace", type=Path, metavar="FILE", help="routing of the projection (default: uniform)")
    add("--forward", action="store_true", help="run texts through the model (needs its weights)")
    add("--prompt", nargs="+", metavar="[NAME=]TEXT", help="texts or files for --forward, e.g. code=a.py prose=b.txt")
    add("--prompt-tokens", type=int, default=256, help="at most so many tokens of each text (default: 256)")
    add("--measure", action="store_true", help="fit the projection's constants on this machine, a few minutes")
    add("--json", type=Path, metavar="FILE", help="save all figures")
    add("--quiet", action="store_true", help="print nothing")
    return parser


def check_arguments(args):
    for name, low in (("context", 1), ("redundant_experts", 0), ("prompt_tokens", 1), ("group_size", 1)):
        if getattr(args, name) is not None and getattr(args, name) < low:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(args, name)}")
    if args.device_memory is not None and not 0 < args.device_memory < float("inf"):
        raise ValueError(f"--device-memory must be above 0 and finite, got {args.device_memory:g}")
    find("hardware", args.hardware, MACHINES)
    if args.link:
        find("link", args.link, LINKS)
    if (args.forward or args.prompt) and args.model.lower() in bundled_names():
        raise ValueError(f"--forward needs weights: {args.model} is a configuration alone, give a folder or a hub id")
    if args.json:
        output.check_writable(args.json)


def read_trace(path, described):
    """The trace to project with; ValueError if it is of another shape of model."""
    if path is None:
        return None
    trace = RoutingTrace.load(path)
    found = (trace.experts.shape[1], trace.num_experts, trace.experts.shape[2])
    wanted = (described.num_moe_layers, described.num_experts, described.chosen)
    if found != wanted:
        raise ValueError(
            f"{path} is of {found[0]} layers, top-{found[2]} of {found[1]}; the model has {wanted[0]}, top-{wanted[2]}"
            f" of {wanted[1]}"
        )
    return trace


def run(args):
    check_arguments(args)
    console = output.console(args.quiet)

    def show(tables):
        for part in tables:
            console.print(part)
            console.print()

    # 1. What is in it
    configuration = load_configuration(args.model)
    bits = args.bits
    if bits is None and configuration.bundled and quantization_of(configuration.config) is None:
        bits = 4
    if bits is None and (args.group_size or args.mode != "affine"):
        raise ValueError("--group-size and --mode say how --bits are stored: give --bits too")
    quantisation = {"bits": bits, "group_size": args.group_size, "mode": args.mode}
    described = describe(configuration, **quantisation)
    usual = [count for count in analysis_figures.DEVICES if count <= described.num_experts]
    args.devices = sorted(set(args.devices or usual))
    for count in args.devices:
        if not 1 <= count <= described.num_experts:
            raise ValueError(f"--devices {count}: needs 1 to {described.num_experts}, the experts of a layer")
    figures = {"architecture": analysis_figures.architecture_figures(described, configuration, args.context)}
    show(analysis_tables.model_tables(figures["architecture"]))

    # 2. Memory per device
    figures["memory"] = analysis_figures.memory_figures(described, args.redundant_experts, args.devices)
    figures["fit"] = None
    if args.device_memory:
        figures["fit"] = analysis_figures.fit_figures(described, args.device_memory * 1e9, args.context, args.devices)
    show(analysis_tables.memory_tables(figures["memory"], figures["fit"]))

    # 3. What it would do
    machine = find("hardware", args.hardware, MACHINES)
    link = args.link or USUAL_LINK[args.hardware.lower()]
    wire, link_source = find("link", link, LINKS)
    trace = read_trace(args.trace, described)
    figures["projection"] = analysis_figures.projection_figures(
        described, machine, wire, args.context, trace, args.redundant_experts, figures["memory"], args.devices
    ) | {"link": link, "link_source": link_source}
    figures["original_claims"] = analysis_figures.original_cases(described.demand)
    show(analysis_tables.projection_tables(figures["projection"], figures["original_claims"]))

    figures["this_machine"] = None
    if args.measure:
        here = analysis_figures.measure_here(configuration, described, quantisation)
        figures["this_machine"] = here["figures"]
        show(analysis_tables.machine_tables(here["figures"]))
        for name, local in here["links"].items():
            projected = analysis_figures.projection_figures(
                described, here["machine"], local, args.context, trace, devices=args.devices
            )
            here["figures"]["links"][name]["projection"] = projected
            shown = projected | {"link": name, "link_source": "all-sums of 2 processes on this machine"}
            show(analysis_tables.projection_tables(shown, None))

    # 4. The files, where there are any
    figures["checkpoint"] = None
    if configuration.folder and any(configuration.folder.glob("model*.safetensors")):
        figures["checkpoint"] = check_checkpoint(configuration).figures()
        show(analysis_tables.checkpoint_tables(figures["checkpoint"]))

    # 5. Real text through the real weights
    figures["forward"] = None
    if args.forward or args.prompt:
        figures["forward"] = forward_figures(args.model, texts_of(args.prompt), args.prompt_tokens)
        show(analysis_tables.forward_tables(figures["forward"]))

    if args.json:
        output.write_json(args.json, figures)
    return 0 if figures["checkpoint"] is None or figures["checkpoint"]["ok"] else 1


def texts_of(prompts):
    """{name: text}; without prompts code, prose and data that come with the project."""
    if not prompts:
        here = Path(__file__).resolve().parent
        files = {"code": here / "model_analysis.py", "prose": here / "README.md", "data": BUNDLED / "deepseek-v3.json"}
        return {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
    texts = {}
    for number, prompt in enumerate(prompts, start=1):
        name, separator, value = prompt.partition("=")
        if not separator or not name.isidentifier() or len(name) > 12:
            name, value = f"text {number}", prompt
        if len(value) < 1000 and Path(value).is_file():
            try:
                value = Path(value).read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise ValueError(f"--prompt {value} is not UTF-8 text") from None
        if not value.strip():
            raise ValueError(f"--prompt {prompt!r} is empty")
        texts[name] = value
    return texts


def forward_figures(name, texts, most):
    """Everything of forward_pass on each text; the first text is timed."""
    logging.getLogger("transformers").setLevel(logging.ERROR)  # of texts longer than the context: they are cut below
    model, tokenizer, _ = load_whole(name)
    numbers = [layer.number for layer in moe_layers(model)]
    tokens = {title: tokenizer.encode(text[: 20 * most])[:most] for title, text in texts.items()}
    passes = {title: forward_pass.run_text(model, ids, title) for title, ids in tokens.items()}
    return {
        "texts": {title: forward_pass.pass_figures(one, numbers) for title, one in passes.items()},
        "domains": forward_pass.domain_figures(passes),
        "experts": forward_pass.expert_similarity(model),
        "seconds": vars(forward_pass.time_layers(model, next(iter(tokens.values())))),
    }


def main():
    args = setup_arg_parser().parse_args()
    with output.exit_on_user_error():
        status = run(args)
    sys.exit(status)


if __name__ == "__main__":
    main()
