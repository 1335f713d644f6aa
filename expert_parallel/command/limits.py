"""Limits: what the scripts refuse to be asked, said before weights are read.

Each ValueError is one line for the user.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..failure.journal import check_new
from ..failure.planned import parse_losses
from ..files import nearest
from ..offload.budget import parse_budget
from .options import CACHE_PICTURES, MOST, OUTPUTS, PICTURES
from .output import check_outputs


def check_numbers(args) -> None:
    """What no file and no rank is needed for, the timeout of the first meeting included."""
    limits = {"max_tokens": (1, MOST), "temp": (0, 1e6), "top_p": (1e-6, 1)}
    limits |= {} if args.redundant_experts == "each" else {"redundant_experts": (0, MOST)}
    limits |= {"seed": (0, 2**64 - 1), "top_k": (0, MOST), "min_p": (0, 1), "timeout": (0.1, 1e9), "devices": (1, MOST)}
    limits |= {"trials": (0, 1000), "cold_share": (0, 1), "overlap": (2, MOST)}
    limits |= {"rebalance_every": (1, MOST), "rebalance_horizon": (1, MOST), "rebalance_threshold": (1e-9, 1)}
    check_limits(args, limits)
    if args.journal and args.resume:
        raise ValueError("--resume FILE writes on in FILE: leave --journal out")
    for name in ("rebalance_threshold", "rebalance_horizon"):
        if getattr(args, name) is not None and args.rebalance_every is None:
            raise ValueError(f"{option(name)} is of no use without --rebalance-every TOKENS")
    for name in ("prompt", "journal", "resume", "fail_device", "rebalance_every", "kv_bits"):
        if args.prompts is not None and getattr(args, name) is not None:
            raise ValueError(f"--prompts decodes several sequences together: it does not go with {option(name)}")
    if args.cold_share is not None and args.cold_bits is None:
        raise ValueError("--cold-share is of no use without --cold-bits BITS")
    if args.cold_bits is not None and args.placement_trace is None:
        raise ValueError("--cold-bits needs --placement-trace, which says what is cold; record one with --trace FILE")
    for name in ("expert_memory", "rebalance_every"):
        if args.cold_bits is not None and getattr(args, name) is not None:
            raise ValueError(f"--cold-bits compresses experts that stay in memory: it does not go with {option(name)}")
    for name in ("cache_policy", "prefetch"):
        if getattr(args, name) is not None and args.expert_memory is None:
            raise ValueError(f"{option(name)} is of no use without --expert-memory SIZE")
        if getattr(args, name) in ("pinned", "learned") and args.placement_trace is None:
            raise ValueError(
                f"{option(name)} {getattr(args, name)} needs --placement-trace; record one with --trace FILE"
            )
    if args.expert_memory is not None:
        parse_budget(args.expert_memory)
        if args.rebalance_every is not None:
            raise ValueError("--rebalance-every moves experts in memory: it does not go with --expert-memory")
    if args.on_failure is not None and args.fail_device is None:
        raise ValueError("--on-failure is of no use without --fail-device D[@TOKENS]")
    for name in ("expert_memory", "rebalance_every", "cold_bits"):
        if args.fail_device and getattr(args, name) is not None:
            raise ValueError(f"--fail-device is for experts in memory, as they are: it does not go with {option(name)}")
    parse_losses(args.fail_device or ())


def check_limits(args, limits: dict) -> None:
    """ValueError for an option outside its limits, {name: (lowest, highest)}."""
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:  # not a number fails too
            limit = f"at least {low}" if value < low and high == MOST else f"between {low} and {high}"
            raise ValueError(f"{option(name)} must be {limit}, got {value}")


def check_study(args, scenarios: tuple) -> list[str]:
    """Names of the scenarios that expert_parallel_poc.py is asked for; ValueError for what cannot be."""
    limits = dict.fromkeys(("experts", "top_k", "hidden", "expert_width"), (1, 1 << 16)) | {"tokens": (1024, 1 << 30)}
    check_limits(args, limits)
    if args.trace and args.top_k:
        raise ValueError(f"--top-k {args.top_k} does not go with --trace, which has its own")
    if args.trace and args.tokens and args.scenarios is None:
        raise ValueError(f"--tokens {args.tokens} is for scenarios and --trace has none: add --scenarios LIST")
    args.tokens, args.top_k = args.tokens or 8192, args.top_k or (None if args.trace else 8)
    if args.top_k and args.top_k > (args.experts or 128):
        raise ValueError(f"--top-k {args.top_k}: there are {args.experts or 128} experts to choose from")
    for name in ("expert_bytes", "disk"):
        if getattr(args, name) is not None and not args.expert_memory and not args.fail_device:
            raise ValueError(f"{option(name)} is of no use without --expert-memory or --fail-device")
    lost = args.fail_device or []
    for n, device in enumerate(lost):
        if not 0 <= device < args.devices:
            raise ValueError(f"--fail-device {device}: there are devices 0 to {args.devices - 1} (--devices)")
        if device in lost[:n]:
            raise ValueError(f"--fail-device {device}: it is named twice")
    if lost and len(lost) == args.devices:
        raise ValueError(f"--fail-device: with all {len(lost)} devices lost none is left")
    args.expert_bytes, args.disk = args.expert_bytes or "2.65MB", 3.0 if args.disk is None else args.disk
    for size in args.expert_memory.split(",") if args.expert_memory else ():
        parse_budget(size)
    if parse_budget(args.expert_bytes)[1]:
        raise ValueError(f"--expert-bytes {args.expert_bytes} is a share: needs a size such as 2.65MB")
    if args.expert_memory and not args.trace:
        raise ValueError("--expert-memory needs --trace: a cache remembers what came before, and scenarios are random")
    if not 0 < args.disk < float("inf"):
        raise ValueError(f"--disk {args.disk}: needs more than 0 GB/s")
    if not (args.bandwidth > 0 and 0 <= args.latency < float("inf")):
        raise ValueError(f"--bandwidth {args.bandwidth}, --latency {args.latency}: needs more than 0, and 0 or more")
    if not 0 <= args.seed < 1 << 63:
        raise ValueError(f"--seed {args.seed}: needs a whole number from 0 up to 2^63 - 1")
    if args.test_trace and not args.trace:
        raise ValueError("--test-trace needs --trace, the trace to fit on")
    read = {"--trace": args.trace, "--test-trace": args.test_trace}
    check_outputs({"--json": args.json, "--html": args.html}, {option: path for option, path in read.items() if path})
    names = [] if args.trace and args.scenarios is None else (args.scenarios or ",".join(scenarios)).split(",")
    names = [name.strip() for name in names]
    unknown = [name for name in names if name not in scenarios]
    if unknown:
        like = nearest(unknown[0], scenarios)
        raise ValueError(f"unknown scenario {unknown[0]!r}{like}: choose {', '.join(scenarios)}")
    return names


def check_files(args, model_folder) -> None:
    """That every output can be written, each into a file of its own, and none over what is read."""
    outputs = {option(name): getattr(args, name) for name in (*OUTPUTS, "journal", "resume")}
    outputs |= picture_files(args.plots, PICTURES + CACHE_PICTURES)
    inputs = {"the model": model_folder} | ({"the adapter": args.adapter_path} if args.adapter_path else {})
    named = {
        "the prompt": args.prompt,
        "the prompts": args.prompts,
        "the placement": args.placement,
        "the trace": args.placement_trace,
    }
    inputs |= {what: path for what, path in named.items() if path and os.path.isfile(path)}  # noqa: PTH113
    check_outputs(outputs, inputs)
    if args.journal:
        check_new(args.journal)
    if args.trace and args.trace.is_char_device():
        raise ValueError(f"cannot write {args.trace}: a trace needs a file, a device such as this cannot hold one")


def picture_files(folder: Path | None, names) -> dict:
    """{option: path} of what --plots writes, for `output.check_outputs`; ValueError where it names a file."""
    if folder and folder.exists() and not folder.is_dir():
        raise ValueError(f"cannot write {folder}: it is a file, --plots takes a folder")
    paths = [folder / f"{name}.png" for name in names] if folder and folder.is_dir() else filter(None, [folder])
    return {f"--plots ({path.name})": path for path in paths}


def option(name: str) -> str:
    """max_tokens as it is written: --max-tokens."""
    return f"--{name.replace('_', '-')}"
