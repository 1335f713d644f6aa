"""Options of the main script: what can be asked for, and the placement that was; limits.py says what cannot be done."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..failure.planned import DEFAULT, ON_FAILURE
from ..files import nearest
from ..offload import POLICIES, PREFETCH
from .output import Parser

BY_TRACE = ("balanced", "replicated", "affinity")
CACHE_POLICY, COLD_SHARE = "aging", 0.5  # unless asked for
STRATEGIES = ("contiguous", "round-robin", *BY_TRACE)
PLACEMENT_FORMATS = ("vllm", "vllm-ranks", "vllm-ascend", "sglang", "tensorrt-llm")  # besides this project's own
MOST = 10**12  # of a whole number: far beyond all use, and no arithmetic here overflows
PICTURES = ("expert_loads", "device_loads", "memory", "time", "coactivation")
CACHE_PICTURES = ("hit_rate",)  # besides, with --expert-memory
ANALYSIS_PICTURES = ("speed",)  # of model_analysis.py
PATHS = ("adapter_path", "placement_trace")  # of what a journal keeps
MAY_MOVE = ("model", "placement", *PATHS)  # named anew where a run goes on: what lies there is compared
OUTPUTS = ("trace", "save_placement", "json", "html")  # files, each with an option of its own


def parser_of(description: str, only=()) -> argparse.ArgumentParser:
    """All options; `description` stands above them. only: these alone, without --help and shorter forms of them."""
    how = {"add_help": False, "allow_abbrev": False, "usage": argparse.SUPPRESS} if only else {}
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **how)

    def add(name, **about):
        if not only or name in only:
            parser.add_argument(name, **about)

    # fmt: off
    add("--model", help="folder or hub id (default: Qwen3-Coder-30B if it is in the hub cache, else the shipped model)")
    add("--prompt", help="a text, a file, or - for standard input (default: one that fits the model)")
    add("--prompts", type=Path, metavar="FILE",
        help="several prompts, one a line, blank lines skipped, decoded together by mlx-lm's batch_generate")
    add("--max-tokens", type=int, default=64, help="tokens to generate, of each prompt (default: 64)")
    add("--temp", type=float, default=0.0, help="sampling temperature, 0 takes the likeliest token (default: 0)")
    add("--top-p", type=float, default=1.0, metavar="P",
        help="sample from the likeliest tokens of this total probability (default: 1)")
    add("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens (default: 0, from all)")
    add("--min-p", type=float, default=0.0, metavar="P",
        help="sample from tokens at least P times as likely as the likeliest (default: 0)")
    add("--seed", type=int, default=0, help="of sampling (default: 0)")
    add("--system-prompt", metavar="TEXT", help="for models with a chat template")
    add("--chat-template-config", metavar="JSON", help='for the chat template, such as \'{"enable_thinking": false}\'')
    add("--ignore-chat-template", action="store_true", help="hand the prompt over as it is")
    add("--adapter-path", type=Path, metavar="DIR", help="LoRA adapter of mlx_lm.lora, on experts too")
    add("--kv-bits", type=int, choices=(2, 3, 4, 6, 8), help="quantise keys and values to so many bits (default: not)")
    add("--trust-remote-code", action="store_true", help="let the model's folder bring Python code of its own")
    add("--devices", type=int,
        help="simulated devices (default: 8, or as many as a placement file has); each of several ranks is one")
    add("--placement", default="contiguous", metavar="STRATEGY_OR_FILE",
        help="contiguous: neighbours together; round-robin: dealt in turn; by a trace balanced: even loads,"
        " replicated: with copies, affinity: few devices a token; or a placement file (default: contiguous)")
    add("--placement-trace", type=Path, metavar="FILE",
        help="what --trace saved: balanced, replicated and affinity place experts by its loads, pinned and learned keep"
        " and read ahead by it")
    add("--redundant-experts", type=copies, default=0, metavar="R",
        help="copies of hot experts in each layer, with --placement replicated; each: with any, one copy of each expert"
        " on another device, so that any one can be lost (default: 0)")
    add("--rebalance-every", type=int, metavar="TOKENS",
        help="every so many tokens look at the loads since, and move experts between devices where the time that is"
        " predicted to save is more than the pause it takes; the answer stays the same (default: never)")
    add("--rebalance-threshold", type=float, metavar="B",
        help="with --rebalance-every: look at once when balancedness (mean load / fullest device's) falls under B,"
        " 0 to 1 (default: wait)")
    add("--rebalance-horizon", type=int, metavar="TOKENS",
        help="with --rebalance-every: tokens over which a move must repay its pause (default: those until the"
        " next look)")
    add("--expert-memory", metavar="SIZE",
        help="at most so much memory for the experts of a device, such as 4GB or 25%% of them; the others stay on disk"
        " and are read when a token asks for them (default: all are in memory)")
    add("--cache-policy", choices=POLICIES,
        help="with --expert-memory, who makes room: lru: used longest ago; lfu: used least; aging: lfu whose counts"
        " halve every 64 tokens; pinned: lru, but the hottest of --placement-trace stay (default: aging)")
    add("--prefetch", choices=PREFETCH,
        help="with --expert-memory, read ahead what the next layer is foretold to want: next-layer: by its router and"
        " this layer's input; learned: from --placement-trace (default: none)")
    add("--cold-bits", type=int, choices=(2, 3, 4, 5, 6, 8), metavar="BITS",
        help="fewer bits (2, 3, 4, 5, 6, 8) for the experts that --placement-trace used least: another answer in less"
        " memory (default: all as they are)")
    add("--cold-share", type=share, metavar="SHARE",
        help="of each layer's experts, with --cold-bits, such as 0.5 or 50%% (default: 0.5)")
    add("--fail-device", action="append", metavar="D[@TOKENS]",
        help="a simulated device that is lost with all it holds, after so many tokens of the answer (without TOKENS:"
        " before the prompt); may be given several times")
    add("--on-failure", choices=ON_FAILURE,
        help="with --fail-device: failover: copies take over, which all experts need; recover: copies, and what nobody"
        " holds is read again; reroute: the router takes the next best living experts; drop: lost experts give nothing;"
        " renormalise: the same, and the others' weights make up for it; the last three change the answer"
        " (default: recover)")
    add("--combine", choices=("auto", "reduce", "gather"), default="auto",
        help="how ranks bring outputs together: reduce sums weighted outputs, gather sums every chosen expert's, top-k"
        " times the bytes; auto takes reduce where the model allows it (default: auto)")
    add("--attention", choices=("replicated", "sharded"), default="replicated",
        help="with several ranks: all but the experts whole on each, or sharded by mlx-lm (default: replicated)")
    add("--overlap", type=int, metavar="TOKENS",
        help="with several ranks: read a prompt of so many tokens or more in two halves, the collectives of one under"
        " the computation of the other; pays over a slow link (default: never)")
    add("--dtype", choices=("float32", "float16", "bfloat16", "keep"),
        help="of activations and scales (default: float32 on the CPU, the checkpoint's own on a GPU)")
    add("--streams", nargs="?", default="auto", const="on", choices=("auto", "on", "off"),
        help="on the CPU, to the same bits: parts of every product on streams of their own, and many tokens of a prompt"
             " at once; auto: what a trial finds quicker (default); on, or --streams alone: split it all; off: as"
             " mlx-lm computes")
    add("--verify", action=argparse.BooleanOptionalAction, default=None,
        help="run stock mlx-lm beside it and compare (default: with the shipped model)")
    add("--trials", type=int, metavar="N",
        help="runs after the first that speeds are medians of, stock's in turn (default: 3 with the shipped model)")
    add("--timeout", type=float, default=300, metavar="SECONDS",
        help="with several ranks: seconds until one that waits for others gives up (default: 300)")
    add("--journal", type=Path, metavar="FILE",
        help="keep the run in FILE, every token as it is produced, so that it can go on after it was killed")
    add("--resume", type=Path, metavar="FILE",
        help="go on from such a FILE, on as many devices or ranks as there are now, and write on in it; the prompt and"
        " all that decides the answer come from there")
    add("--trace", type=Path, metavar="FILE", help="save the routing trace, .npz")
    add("--save-placement", type=Path, metavar="FILE", help="save the placement")
    add("--placement-format", choices=PLACEMENT_FORMATS, metavar="FORMAT",
        help=f"of --save-placement: {', '.join(PLACEMENT_FORMATS)} (default: JSON of this project)")
    add("--plots", type=Path, metavar="DIR",
        help=f"save pictures, .png: {', '.join(PICTURES)}; with --expert-memory also {CACHE_PICTURES[0]}")
    add("--html", type=Path, metavar="FILE", help="save a page with everything in it, to read in a browser")
    add("--json", type=Path, metavar="FILE", help="save all figures; - for standard output, and then nothing else")
    add("--full", action="store_true", help="print every table (default: what fits on a screen; --json has all)")
    add("--quiet", action="store_true", help="print the answer alone")
    # fmt: on
    return parser


def copies(text: str) -> int | str:
    """What --redundant-experts takes: a whole number, or "each"; ArgumentTypeError for anything else."""
    try:
        return text if text == "each" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of copies nor each") from None


def share(text: str) -> float:
    """What --cold-share takes, 0.5 or 50%; ArgumentTypeError for anything else."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: needs one such as 0.5 or 50%") from None


def in_effect(args, **decided) -> dict:
    """Every option with the value that it had, also where it was not given, for JSON; `decided`: by the run itself."""
    how = vars(args) | decided
    if args.expert_memory is not None:
        how |= {"cache_policy": args.cache_policy or CACHE_POLICY, "prefetch": args.prefetch or "none"}
    if args.cold_bits is not None:
        how["cold_share"] = COLD_SHARE if args.cold_share is None else args.cold_share
    if args.fail_device:
        how["on_failure"] = args.on_failure or DEFAULT
    return how


def resumed(args, header: dict | None):
    """Options of a run that goes on: what decides its answer is the journal's where the command line does not say it.

    header  of the journal, None where there is none: `args` itself
    Raises ValueError where the command line says something else than the journal.
    """
    if header is None:
        return args
    parser, unsaid = parser_of(""), object()
    # Losses are gathered in a list, which has to begin with none.
    nothing = argparse.Namespace(**{**dict.fromkeys(vars(args), unsaid), "fail_device": None})
    said = parser.parse_args(sys.argv[1:], nothing)
    before = {name: Path(value) if name in PATHS and value else value for name, value in header["options"].items()}
    for name, value in before.items():
        if getattr(said, name) not in (unsaid, None, value) and name not in MAY_MOVE:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} {getattr(said, name)}: {args.resume} has {value}; leave {option} out to go on")
    parser.set_defaults(**before)
    here = vars(parser.parse_args(sys.argv[1:]))
    return argparse.Namespace(**here | {name: value for name, value in before.items() if name not in MAY_MOVE})


# --- placement ------------------------------------------------------------------------------------------------


def check_placement(args) -> None:
    """What can be said of --placement and what goes with it before a model is there."""
    if args.placement_trace and args.placement not in BY_TRACE and not _cached_by_trace(args):
        what = f"--placement {args.placement}, which looks at no loads"
        raise ValueError(f"--placement-trace is of no use with {what}, nor for what else is asked")
    if args.placement in BY_TRACE and args.placement_trace is None:
        raise ValueError(f"--placement {args.placement} needs --placement-trace; record one with --trace FILE")
    if args.placement not in STRATEGIES:
        if not Path(args.placement).is_file():
            like = nearest(args.placement, STRATEGIES)
            raise ValueError(f"--placement {args.placement}: neither {', '.join(STRATEGIES)} nor a file{like}")
        if args.redundant_experts not in (0, "each"):
            what = f"{args.placement}, which names the copies itself; each adds those that are missing"
            raise ValueError(f"--redundant-experts {args.redundant_experts} is of no use with {what}")
    if args.placement_format and not args.save_placement:
        raise ValueError("--placement-format needs --save-placement FILE")


def _cached_by_trace(args) -> bool:
    return args.cache_policy == "pinned" or args.prefetch == "learned" or args.cold_bits is not None


def cache_options(args, num_experts: int) -> dict:
    """What `load_sharded` is to be told of experts on disk; ValueError where the trace cannot be read."""
    from ..formats.traces import read_trace

    trace = read_trace(args.placement_trace, num_experts) if _cached_by_trace(args) else None
    how = {"cache_policy": args.cache_policy or CACHE_POLICY, "prefetch": args.prefetch or "none"}
    how |= {"cold_bits": args.cold_bits, "cold_share": COLD_SHARE if args.cold_share is None else args.cold_share}
    return {"expert_memory": args.expert_memory, "cache_trace": trace, **how}


def make_placement(args, shape: tuple[int, int], layer_numbers=None, ranks: int = 1, trace=None):
    """The Placement that was asked for, by strategy or from a file, for a model of (L, E).

    One process has as many devices as are asked for, as the file says, else 8, or as many as there are experts.
    Metadata "notes" has lines for the user about the file.
    layer_numbers  [L] of the MoE layers, for files that count all layers
    trace          --placement-trace, where it is read already
    Raises ValueError, also where --placement-format cannot say what it is.
    """
    from ..formats.placements import text_of

    placement = _placement(args, shape, layer_numbers, ranks, trace)
    text_of(placement, args.placement_format, layer_numbers)
    return placement


def _placement(args, shape, layer_numbers, ranks, trace):
    import numpy as np

    from ..failure.survival import protected
    from ..formats.placements import read_placement
    from ..formats.traces import notes_of, read_loads, read_trace
    from ..placing.held_out import fitted_on
    from ..placing.strategies import place_experts

    if ranks > 1 and args.devices not in (None, ranks):
        raise ValueError(f"--devices {args.devices}, but there are {ranks} ranks: each rank is a device")
    num_devices, each = ranks if ranks > 1 else args.devices, args.redundant_experts == "each"
    check_placement(args)
    if args.placement not in STRATEGIES:
        placement = read_placement(args.placement, *shape, num_devices, layer_numbers)
        if num_devices not in (None, placement.num_devices):
            raise ValueError(f"{args.placement} places {placement.num_devices} devices, this run has {num_devices}")
        return protected(placement) if each else placement
    how = (num_devices or min(8, shape[1]), args.placement, 0 if each else args.redundant_experts)

    def place(loads, chosen=None):
        placement = place_experts(loads, *how, coactivation=chosen)
        return protected(placement, loads) if each else placement

    if args.placement not in BY_TRACE:
        return place(np.ones(shape))
    try:
        trace = trace or read_trace(args.placement_trace, shape[1])
    except ValueError:  # counts, or tokens that no layer has whole: enough for all but affinity
        if args.placement == "affinity":
            raise
        trace = None
    loads = read_loads(args.placement_trace, shape[1]) if trace is None else trace.loads()
    if loads.shape != shape:
        raise ValueError(f"{args.placement_trace} is of {list(loads.shape)} [layers, experts], the model {list(shape)}")
    if trace is None:
        return place(loads)
    placement = fitted_on(trace, lambda part: place(part.loads(), part.experts))
    if notes := notes_of(trace, args.placement_trace.name):
        placement.metadata["notes"] = notes
    return placement
