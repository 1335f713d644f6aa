"""Lost devices in expert_parallel_poc.py: what goes with them under each placement, what is left, and the way back.

Dimensions: T tokens, L MoE layers, E experts, k chosen per token, D devices. Remedies that leave the output alone only.
"""

from __future__ import annotations

import numpy as np

from ..balance import balancedness
from ..failure.survival import arrivals, gone, living, protected, repair, survivors, without
from ..offload.budget import parse_budget
from ..serving import devices_of_trace
from ..study.chance import uniform_routing
from ..study.remedies import BATCH, Choices, device_slots, placements
from .table import Table, of_records, size


def of_placements(
    fit: Choices, test: Choices, num_devices: int, redundant: int, lost: list[int], expert_bytes: str, disk: float
) -> list[Table]:
    """The loss of some devices, and of any one or two, for placements fitted on `fit` and judged on `test`.

    redundant     copies of the hottest experts, of "replicated"
    lost          the devices, all at once
    expert_bytes  of one expert, such as "2.65MB";  disk  GB/s that survivors read what is gone with
    """
    loads = fit.loads()
    placed = placements(fit, num_devices, redundant)
    placed |= {f"{name}, each": protected(placed[name], loads) for name in ("contiguous", "balanced")}
    one, rate = parse_budget(expert_bytes)[0], disk * 1e9
    rows = [{"remedy": name, **_loss(each.held, test, loads, lost, one, rate)} for name, each in placed.items()]
    left = np.delete(placed["contiguous"].held[0], lost, axis=0)
    batch, k = min(BATCH, len(test.experts)), test.experts.shape[2]
    even = [uniform_routing(batch, k, held)["balancedness"] for held in (placed["contiguous"].held[0], left)]
    names, many = ", ".join(map(str, sorted(lost))), "s" * (len(lost) > 1)
    after = of_records(
        f"Device{many} {names} of {num_devices} lost (simulated; seconds modelled)",
        "placements",
        rows,
        ("remedy", "remedy"),
        ("gone_computed", "gone", "{:.1f}"),
        (_with_chance, "lost (chance)"),
        ("balancedness_before_simulated", "before", "{:.3f}"),
        ("balancedness_since_simulated", "since", "{:.3f}"),
        ("balancedness_mended_simulated", "mended", "{:.3f}"),
        ("repair_bytes", "to read", size),
        ("repair_seconds_modelled", "s", "{:.3f}"),
        section="failures",
        note=f"gone: of {fit.num_experts} experts, mean over layers (computed); lost: of all choices those of an"
        " expert that is gone, (chance) at random; balancedness before, since, and mended, when survivors hold what was"
        f" gone; if uniform, {even[0]:.3f} before and {even[1]:.3f} since; s: seconds, survivors read side by side,"
        f" experts of {size(one)} at {disk:g} GB/s (assumed)",
        also={"lost": sorted(lost), "expert_bytes": one, "bytes_per_second": rate,
              "balancedness_if_uniform_simulated": dict(zip(("before", "since"), even, strict=True))},
    )  # fmt: skip
    return [after, _any_losses(placed)]


def _loss(held, test: Choices, loads, lost, expert_bytes: int, rate: float) -> dict:
    """One placement, bool [L, D, E], without some devices, and mended by repair for loads [L, E]."""
    left, mended, steps = without(held, lost), repair(held, lost, loads), np.arange(len(test.experts)) // BATCH
    placed = {"before": held, "since": left, "mended": mended}
    device = {name: devices_of_trace(test.experts, each, steps) for name, each in placed.items()}
    slots = {name: device_slots(each, held.shape[1]) for name, each in device.items()}
    alive, read = living(left), arrivals(left, mended, expert_bytes, rate)
    return {
        "gone_computed": float(gone(left).sum(axis=1).mean()),
        "slots_lost_simulated": float((device["since"] == held.shape[1]).mean()),
        "slots_lost_by_chance": float(gone(left).mean()),
        "balancedness_before_simulated": balancedness(slots["before"], "aggregate"),
        "balancedness_since_simulated": balancedness(slots["since"][:, alive], "aggregate"),
        "balancedness_mended_simulated": balancedness(slots["mended"][:, alive], "aggregate"),
        "repair_experts": read.experts.tolist(),
        "repair_bytes": read.bytes,
        "repair_seconds_modelled": read.side_by_side,
        "repair_seconds_in_turn_modelled": read.in_turn,
    }


def _with_chance(row: dict) -> str:
    return f"{row['slots_lost_simulated']:.1%} ({row['slots_lost_by_chance']:.1%})"


def _any_losses(placed: dict) -> Table:
    rows = []
    for name, placement in placed.items():
        row = {"remedy": name, "held": float(placement.copies.mean())}
        for each in survivors(placement.held, 2):
            row[f"of_{each.lost}"] = vars(each) | {"experts": placement.copies.size}
        rows.append(row)

    def gone_of(row):
        two = row["of_2"]
        return f"{two['gone_mean'] / two['experts']:.1%} ({two['gone_worst'] / two['experts']:.1%})"

    return of_records(
        "Any one or two lost (computed over all sets of devices)",
        "survival",
        rows,
        ("remedy", "remedy"),
        ("held", "held", "{:.2f}x"),
        (lambda row: f"{row['of_1']['unhurt']:.0%}", "survives one"),
        (lambda row: f"{row['of_2']['unhurt']:.0%} ({row['of_2']['if_at_random']:.0%})", "two (at random)"),
        (lambda row: f"{row['of_2']['layers_unhurt']:.0%}", "a layer"),
        (gone_of, "gone (worst)"),
        section="failures",
        note="held: over the number of experts; survives: share of the sets after which no expert is gone, at random:"
        " had holders been drawn; a layer: two lost, of one layer; gone: experts, two lost, mean of the sets, which the"
        " number of copies alone decides",
    )
