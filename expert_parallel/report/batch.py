"""Several sequences decoded together: what each answered, and what their number meant for balance.

Dimensions: T tokens, L MoE layers, k chosen per token, D devices, S forward passes, R sequences.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..balance import balancedness_per_layer
from ..placement import Placement
from ..trace import RoutingTrace
from .run import served
from .table import Figure, Table, of_records


def of_run(prompt, last, stock, trace: RoutingTrace, placement: Placement, model) -> list[Table]:
    """Tables of a run with --prompts.

    last, stock  what `answering.together` gave of the run, and of stock mlx-lm's: [] where nothing was compared
    """
    expected = stock[0].answers if stock else [None] * len(last.answers)
    rows = [
        {
            "n": n,
            "prompt": each.text,
            "begins": each.begins,
            "prompt_tokens": len(each.ids),
            "text": text,
            "tokens": tokens,
            "as_stock": None if theirs is None else tokens == theirs,
        }
        for n, (each, text, tokens, theirs) in enumerate(
            zip(prompt.several, last.texts, last.answers, expected, strict=True), 1
        )
    ]
    compared = {None: "not compared", True: "the same", False: "NOT the same"}
    sequences = of_records(
        "Sequences (measured)",
        "sequences",
        rows,
        ("n", "of"),
        ("prompt_tokens", "prompt"),
        (lambda row: len(row["tokens"]), "answer"),
        (lambda row: compared[row["as_stock"]], "tokens of stock"),
        section="batch",
        note="tokens of each prompt and answer; stock: mlx-lm's batch_generate with the same prompts",
    )
    return [sequences, balance_of_steps(trace, placement, model)]


def balance_of_steps(trace: RoutingTrace, placement: Placement, model=None) -> Table:
    """How even a step of decoding is with the tokens of all sequences in it, and with each by itself."""
    decode, devices = trace.phase("decode"), placement.num_devices
    together = of_steps(decode, placement, model)
    alone = of_steps(replace(decode, steps=np.arange(len(decode))), placement, model)
    steps = len(np.unique(decode.steps))
    figures = [
        Figure("decode_steps", "steps of decoding", steps),
        Figure("tokens_per_step", "tokens in a step", len(decode) / max(1, steps), "{:.2f} (mean)"),
        Figure("padding_tokens", "padding of shorter prompts", trace.metadata.get("padding", 0),
               "{} tokens, computed but not counted"),
        Figure("balancedness_of_a_step", "balancedness of a step", together[0], "{:.3f}",
               beside=Figure("balancedness_one_by_one_simulated", "one by one", alone[0], "{:.3f}", "simulated")),
        Figure("devices_of_a_step", f"of {devices} devices at work in a layer", together[1], "{:.2f}",
               beside=Figure("devices_one_by_one_simulated", "one by one", alone[1], "{:.2f}", "simulated")),
    ]  # fmt: skip
    note = (
        "Means over steps and layers: a step waits for the fullest device, whose load counts tokens of all sequences."
        " The first step takes the last token of each prompt."
    )
    return Table("Balance of steps (measured)", figures, "batch", "measured", note, facts=True)


def of_steps(part: RoutingTrace, placement: Placement, model=None) -> tuple[float, float]:
    """`evenness_of_steps` of a run's tokens."""
    return evenness_of_steps(served(part, [(0, placement.held)], model), part.steps, placement.num_devices)


def evenness_of_steps(device, steps, num_devices: int) -> tuple[float, float]:
    """Balancedness (mean over the fullest) and devices with any work, both means over steps and layers.

    device [T, L, k], num_devices where nobody; steps [T] may be any numbers, equal where tokens share a forward pass
    """
    step = np.unique(steps, return_inverse=True)[1]
    loads = np.zeros((step.max(initial=-1) + 1, device.shape[1], num_devices + 1))  # [S, L, D and nobody]
    np.add.at(loads, (step[:, None, None], np.arange(device.shape[1])[:, None], device), 1)
    loads = loads[..., :-1].reshape(-1, num_devices)
    if not len(loads):
        return float("nan"), float("nan")
    return float(balancedness_per_layer(loads).mean()), float((loads > 0).sum(axis=1).mean())
