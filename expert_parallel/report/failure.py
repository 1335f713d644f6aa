"""Lost devices in a run: what went with them, what that does to balance and slots, what mending it takes.

Dimensions: T tokens, L MoE layers, E experts, k chosen per token, D devices.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from ..balance import balancedness
from ..failure.planned import EXACT
from ..models.memory import ModelBytes
from ..study.chance import uniform_routing
from ..trace import RoutingTrace
from .run import device_loads, served
from .table import Figure, Table, facts, of_records, size


def lost(losses, trace: RoutingTrace, layer_numbers: list[int], whole: ModelBytes, reading) -> list[Table]:
    """The devices that a run lost.

    losses   a failure.losses.Losses, when the answer was there
    whole    bytes of the model;  reading  the ReadReport of its loading, whose rate stands for that of a repair
    """
    num_devices, top_k = losses.changes[0][1].shape[1], trace.experts.shape[2]
    device, ends = served(trace, losses.changes, losses.model), [*(start for start, _ in losses.changes), len(trace)]
    rate, rows = reading.bytes_read_experts / max(reading.seconds, 1e-9), []
    spans = zip(ends, ends[1:], ends[2:], strict=False)
    changes = pairwise(held for _, held in losses.changes)
    for event, (before, after), (begin, start, end) in zip(losses.events, changes, spans, strict=True):
        there = device[start:end]
        num_bytes = int(np.einsum("lde,l->", event["arrivals"], whole.expert_bytes))
        uniform = uniform_routing(len(there), top_k, after[0][after[0].any(axis=1)]) if there.size else {}
        rows.append(
            {
                "devices": event["devices"],
                "after_tokens": event["after_tokens"],
                "experts_held_by_them": int(event["before"][:, event["devices"]].sum()),
                "experts_gone": int(event["gone"].sum()),
                "gone_by_layer": dict(zip(layer_numbers, map(np.flatnonzero, event["gone"]), strict=True)),
                "repair_experts": int(event["arrivals"].sum()),
                "repair_bytes": num_bytes,
                "repair_seconds_modelled": num_bytes / rate if rate else None,
                "pause_seconds_measured": event["pause_seconds"],
                "tokens_since": len(there),
                "slots_unserved_share": float((there == num_devices).mean()) if there.size else None,
                "experts_unserved_share": float((~after.any(axis=1)).mean()),
                "balancedness_before": _evenness(device[begin:start], before),
                "balancedness_since": _evenness(there, after),
                "balancedness_since_if_uniform_simulated": uniform.get("balancedness"),
            }
        )
    slots = len(trace) * trace.experts.shape[1] * top_k
    also = {
        "on_failure": losses.on_failure,
        "answer_stays": losses.on_failure in EXACT,
        "slots_rerouted_share": losses.rerouted / slots if losses.on_failure == "reroute" and slots else None,
        "did_not_happen": [[tokens, devices] for tokens, devices in losses.planned.items()],
    }
    if not rows:  # the answer had ended before
        return [
            facts("Lost devices", {"none": "the answer ended before"}, section="failures", also={**also, "losses": []})
        ]
    also["answer_stays"] |= not any(row["experts_gone"] for row in rows)
    also["source"] = "measured; names with modelled or simulated in them are not"
    share = also["slots_rerouted_share"]
    rerouted = "" if share is None else f"; {share:.1%} of all choices were not the router's first"
    recovers = losses.on_failure == "recover"
    to_read = "read" if recovers else "would read"
    took = "the pause, measured" if recovers else f"if recovered: modelled, at the {size(rate)}/s of loading"
    went = of_records(
        f"Lost devices ({losses.on_failure}: {'the same answer' if also['answer_stays'] else 'another answer'})",
        "losses",
        rows,
        (lambda row: " ".join(map(str, row["devices"])), "device"),
        ("after_tokens", "after tokens"),
        ("experts_gone", "experts gone", f"{{}} of {losses.changes[0][1][:, 0].size}"),
        ("repair_experts", to_read),
        ("repair_bytes", "bytes", size),
        ("pause_seconds_measured" if recovers else "repair_seconds_modelled", "seconds", "{:.3f}"),
        section="failures",
        note=f"gone: no living device holds them; {to_read}: experts that survivors {to_read} to hold them ({took})",
        also=also,
    )
    since = of_records(
        "Since each loss, until the next (measured; uniform: simulated)",
        None,
        rows,
        (lambda row: " ".join(map(str, row["devices"])), "device"),
        ("tokens_since", "tokens"),
        ("slots_unserved_share", "unserved", "{:.1%}"),
        ("experts_unserved_share", "still gone", "{:.1%}"),
        ("balancedness_before", "balance before", "{:.3f}"),
        ("balancedness_since", "since", "{:.3f}"),
        ("balancedness_since_if_uniform_simulated", "uniform", "{:.3f}"),
        note="tokens: that went through the model since then, the last one known among them; unserved: choices of"
        " an expert that nobody answered; still gone: experts that nobody holds; balance: balancedness over the living"
        " devices, uniform: of a router that chooses at random" + rerouted,
    )
    return [went, since]


def _evenness(device, held) -> float | None:
    """Balancedness over living devices, for the device of each slot [T, L, k] and held [L, D, E]; None of no token."""
    living = held[0].any(axis=1)
    loads = device_loads(device, len(living))[:, living]
    return balancedness(loads) if loads.any() else None


def journal(figures: dict) -> Table:
    """Tokens that were replayed and new ones; `Kept.figures`."""
    replayed, seconds = figures["tokens_replayed"], figures["seconds_replay"]
    rows = [
        Figure("file", "journal", figures["file"]),
        Figure(None, "tokens from it", replayed or None, f"{{}}, gone through in {seconds:.2f} s"),
        Figure("tokens_new", "new tokens", figures["tokens_new"]),
        Figure(None, "chosen otherwise", figures["differing"] or None, "{} of them, by the model as it is here"),
    ]
    also = {key: figures[key] for key in ("tokens_replayed", "differing", "seconds_replay")}
    return Table("Journal", rows, "journal", "measured", also=also, facts=True)
