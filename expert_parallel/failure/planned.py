"""Losses that are asked for: which device, after how many tokens, and what is done about it. Numpy only.

failover     copies on other devices take over: the same answer
recover      the same, and what no living device holds is read from the checkpoint: the same answer, after a pause
reroute      lost experts are masked in the router, which takes the next best living ones
drop         slots of lost experts give nothing
renormalise  the same, and the weights of a token's other experts make up for it
"""

from __future__ import annotations

ON_FAILURE = ("failover", "recover", "reroute", "drop", "renormalise")
DEFAULT = "recover"
EXACT = ("failover", "recover")  # the answer stays


def parse_losses(texts) -> dict[int, list[int]]:
    """{tokens of the answer before it: devices} for "D" or "D@TOKENS" each, in order; "D": before the prompt is read.

    ValueError for what is not that, and for a device that is lost twice.
    """
    planned, seen = {}, set()
    for text in texts:
        device, at, tokens = text.partition("@")
        if not device.isdecimal() or not (tokens.isdecimal() if at else True):
            raise ValueError(f"--fail-device {text}: needs a device, or DEVICE@TOKENS such as 3@16, both from 0 up")
        if int(device) in seen:
            raise ValueError(f"--fail-device {text}: device {int(device)} is lost already")
        seen.add(int(device))
        planned.setdefault(int(tokens or 0), []).append(int(device))
    return dict(sorted(planned.items()))


def in_words(losses) -> str:
    """ "device 3 after 16 tokens" for the losses [{"devices", "after_tokens"}] of a run's JSON; "" for none."""
    names = [f"device{'s' * (len(row['devices']) > 1)} {' '.join(map(str, row['devices']))}" for row in losses or ()]
    after = [row["after_tokens"] for row in losses or ()]
    when = ["before the prompt" if not n else f"after {n} token{'s' * (n > 1)}" for n in after]
    return ", ".join(map(" ".join, zip(names, when, strict=True)))


def check_losses(args, held, max_tokens: int, ranks: int) -> None:
    """ValueError where devices that hold `held`, bool [L, D, E], cannot be lost as asked for, with the numbers."""
    from .survival import gone

    planned = parse_losses(args.fail_device)
    lost = [device for devices in planned.values() for device in devices]
    if ranks > 1:
        raise ValueError("--fail-device is for simulated devices: kill a rank, and see --journal for what comes then")
    if max(planned) >= max_tokens:
        raise ValueError(f"--fail-device {planned[max(planned)][0]}@{max(planned)}: the answer has {max_tokens} tokens")
    if max(lost) >= held.shape[1]:
        raise ValueError(f"--fail-device {max(lost)}: there are devices 0 to {held.shape[1] - 1}")
    if len(lost) == held.shape[1]:
        raise ValueError(f"--fail-device: all {len(lost)} devices are lost, and none is left to answer")
    if args.on_failure == "failover" and (missing := gone(held, lost)).any():
        raise ValueError(
            f"--on-failure failover: without device {', '.join(map(str, lost))} nobody holds {missing.sum()} experts;"
            " --redundant-experts each gives every one a copy, and recover, reroute, drop, renormalise need none"
        )
