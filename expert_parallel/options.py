"""Options of the main script: what can be asked for, and whether what was asked can be done.

Everything is checked before weights are read; each ValueError is one line for the user.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from math import inf
from pathlib import Path

from .moe import moe_layers, num_experts
from .output import check_writable
from .placement import STRATEGIES, Placement, place_experts
from .routing import RoutingTrace

CHAT_PROMPT = "Write a Python function that returns the n-th Fibonacci number."
# No end of line at its end: that would be one token with the indent of the next line.
CODE_PROMPT = "class Parser:\n    def parse(self, text):\n        if not text:"


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line too."""

    def error(self, message):
        self.exit(2, f"error: {message} (--help explains)\n")


def parser_of(description: str) -> argparse.ArgumentParser:
    """All options; `description` stands above them."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder or hub id (default: Qwen3-Coder-30B if it is in the hub cache, else the shipped model)")
    add("--prompt", help="a text, a file, or - for standard input (default: one that fits the model)")
    add("--max-tokens", type=int, default=64, help="tokens to generate (default: 64)")
    add("--temp", type=float, default=0.0, help="sampling temperature, 0 takes the likeliest token (default: 0)")
    add(
        "--top-p",
        type=float,
        default=1.0,
        help="sample from the likeliest tokens of this total probability (default: 1)",
    )
    add("--seed", type=int, default=0, help="of sampling (default: 0)")
    add(
        "--devices",
        type=int,
        help="simulated devices (default: 8, or as many as a placement file has); of several ranks each is one",
    )
    add(
        "--placement",
        default="contiguous",
        metavar="STRATEGY_OR_FILE",
        help="contiguous: neighbours together; round-robin: dealt in turn; by a trace balanced: even loads,"
        " replicated: with copies, affinity: few devices a token; or a placement file (default: contiguous)",
    )
    add(
        "--placement-trace",
        type=Path,
        metavar="FILE",
        help="what --trace saved: balanced, replicated and affinity place experts by its loads",
    )
    add(
        "--redundant-experts",
        type=int,
        default=0,
        metavar="R",
        help="copies of hot experts in each layer, with --placement replicated (default: 0)",
    )
    add(
        "--rebalance-every",
        type=int,
        metavar="TOKENS",
        help="every so many tokens look at the loads since, and move experts between devices where the time that is"
        " predicted to save is more than the pause it takes; the answer stays the same (default: never)",
    )
    add(
        "--rebalance-threshold",
        type=float,
        metavar="B",
        help="with --rebalance-every: look at once when balancedness (mean load / fullest device's) falls under B,"
        " 0 to 1 (default: wait)",
    )
    add(
        "--rebalance-horizon",
        type=int,
        metavar="TOKENS",
        help="with --rebalance-every: tokens over which a move must repay its pause (default: those until the"
        " next look)",
    )
    add(
        "--combine",
        choices=("auto", "reduce", "gather"),
        default="auto",
        help="how ranks bring outputs together: reduce sums weighted outputs, gather sums every chosen expert's, top-k"
        " times the bytes; auto takes reduce where the model allows it (default: auto)",
    )
    add(
        "--attention",
        choices=("replicated", "sharded"),
        default="replicated",
        help="with several ranks: all but the experts whole on each, or sharded by mlx-lm (default: replicated)",
    )
    add(
        "--dtype",
        choices=("float32", "float16", "bfloat16", "keep"),
        help="of activations and scales (default: float32 on the CPU, the checkpoint's own on a GPU)",
    )
    add("--streams", action="store_true", help="give each simulated device a stream, so that they run side by side")
    add(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="run stock mlx-lm beside it and compare (default: with the shipped model)",
    )
    add(
        "--timeout",
        type=float,
        default=300,
        help="with several ranks: seconds until one that waits for others gives up (default: 300)",
    )
    add("--trace", type=Path, metavar="FILE", help="save the routing trace, .npz")
    add("--save-placement", type=Path, metavar="FILE", help="save the placement as JSON")
    add("--plots", type=Path, metavar="DIR", help="save pictures of the loads, two .png")
    add("--json", type=Path, metavar="FILE", help="save all figures")
    add("--quiet", action="store_true", help="print the answer alone")
    return parser


def check_numbers(args):
    """What no file and no rank is needed for, the timeout of the first meeting included."""
    limits = {"max_tokens": (1, inf), "redundant_experts": (0, inf), "temp": (0, 1e6), "top_p": (1e-6, 1)}
    limits |= {"seed": (0, 2**64 - 1), "timeout": (0.1, 1e9)}
    for name, (low, high) in limits.items():
        value, option = getattr(args, name), f"--{name.replace('_', '-')}"
        if not low <= value <= high:  # not a number fails too
            limit = f"at least {low}" if high == inf else f"between {low} and {high}"
            raise ValueError(f"{option} must be {limit}, got {value}")
    for name in ("devices", "rebalance_every", "rebalance_horizon"):
        value, option = getattr(args, name), f"--{name.replace('_', '-')}"
        if value is not None and value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    for option, value in (("threshold", args.rebalance_threshold), ("horizon", args.rebalance_horizon)):
        if value is not None and args.rebalance_every is None:
            raise ValueError(f"--rebalance-{option} is of no use without --rebalance-every TOKENS")
    if args.rebalance_threshold is not None and not 0 < args.rebalance_threshold <= 1:
        raise ValueError(f"--rebalance-threshold must be above 0 and at most 1, got {args.rebalance_threshold}")


def check_files(args):
    """That every output can be written, each into a file of its own."""
    taken = {}
    for option in ("trace", "save_placement", "json"):
        path, option = getattr(args, option), f"--{option.replace('_', '-')}"
        if path:
            check_writable(path)
            if taken.setdefault(path.resolve(), option) != option:
                raise ValueError(f"{taken[path.resolve()]} and {option} both name {path}: give each a file of its own")
    if args.plots:
        if args.plots.exists() and not args.plots.is_dir():
            raise ValueError(f"cannot write {args.plots}: it is a file, --plots takes a folder")
        check_writable(args.plots / "expert_loads.png" if args.plots.is_dir() else args.plots)


def read_standard_input() -> str:
    """All of it; bytes that are no UTF-8 come as surrogates, which `read_prompt` refuses."""
    return sys.stdin.buffer.read().decode("utf-8", "surrogateescape") if sys.stdin else ""


def read_prompt(args, tokenizer, context):
    """Prompt as token ids; ValueError if it is empty, no text, or fills the context."""
    text = args.prompt
    if text is None:
        text = CHAT_PROMPT if tokenizer.has_chat_template else CODE_PROMPT
    elif text == "-":
        text = args.standard_input
    elif os.path.isfile(text):  # noqa: PTH113, pathlib's raises for a text too long for a file name
        text = Path(text).read_text(encoding="utf-8", errors="surrogateescape")
    elif os.path.isdir(text):  # noqa: PTH112
        raise ValueError(f"--prompt {text} is a folder: give a file in it, a text, or - for standard input")
    elif re.fullmatch(r"\S+\.(txt|md|py|json)", text):  # a model would answer the name of a file that is not there
        raise ValueError(f"--prompt {text}: no such file (where this is a text, hand it over by standard input)")
    if any("\ud800" <= letter <= "\udfff" or letter == "\0" for letter in text):
        raise ValueError("the prompt is not UTF-8 text: give a text file, or convert it (iconv -t UTF-8)")
    if not text.strip():
        raise ValueError("the prompt is empty")
    if tokenizer.has_chat_template:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    else:
        ids = tokenizer.encode(text, verbose=False)  # too long a text is reported below
    if context and len(ids) >= context:
        raise ValueError(f"the prompt has {len(ids)} tokens, the model's context is {context}")
    return list(ids), text


def make_placement(args, model, num_devices):
    """The placement that was asked for: by strategy, or from a file; `num_devices` None takes the file's, or 8."""
    layers = moe_layers(model)
    if not layers:
        raise ValueError("this model has no Mixture-of-Experts layers: there is nothing to spread")
    shape = (len(layers), num_experts(layers[0].experts))
    by_trace = args.placement in ("balanced", "replicated", "affinity")
    if args.placement_trace and not by_trace:
        raise ValueError(f"--placement-trace is of no use with --placement {args.placement}, which looks at no loads")
    if args.placement not in STRATEGIES:
        if not Path(args.placement).is_file():
            raise ValueError(f"--placement {args.placement}: neither {', '.join(STRATEGIES)} nor a file")
        if args.redundant_experts:
            raise ValueError(f"--redundant-experts is of no use with {args.placement}, which names the copies itself")
        placement = Placement.load(args.placement, *shape)
        if num_devices not in (None, placement.num_devices):
            raise ValueError(f"{args.placement} places {placement.num_devices} devices, this run has {num_devices}")
        return placement
    loads, coactivation = [[1] * shape[1]] * shape[0], None
    if by_trace:
        if args.placement_trace is None:
            raise ValueError(f"--placement {args.placement} needs --placement-trace; record one with --trace FILE")
        trace = RoutingTrace.load(args.placement_trace)
        loads = trace.loads()
        if loads.shape != shape:
            raise ValueError(
                f"{args.placement_trace} is of {list(loads.shape)} [layers, experts], the model {list(shape)}"
            )
        coactivation = trace.experts if args.placement == "affinity" else None
    return place_experts(loads, num_devices or 8, args.placement, args.redundant_experts, coactivation=coactivation)
