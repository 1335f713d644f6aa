"""What a run takes: memory, communication, time, and each rank's share of them.

Dimensions: L MoE layers, k chosen per token, D devices, H hidden. Tables as in run.py.
"""

from __future__ import annotations

import numpy as np

from ..layers import hidden_size, moe_layers
from ..models.memory import ModelBytes, array_bytes, live_expert_bytes
from ..placement import Placement
from ..projection.links import bytes_per_token, ring_traffic
from ..trace import RoutingTrace
from .measuring import Collectives, Seconds, resident_bytes
from .table import Figure, Table, size


def rank_figures(model, seconds: Seconds) -> dict:
    """Measured on this rank: bytes of its arrays, memory of the process, slots computed, seconds."""
    experts = live_expert_bytes(model)
    return {
        "expert_bytes_per_device": experts.tolist(),
        "expert_bytes": int(experts.sum()),
        "rest_bytes": array_bytes(model) - int(experts.sum()),
        "resident": resident_bytes(),
        "slots_computed_per_layer": [int(layer.experts.slots_served.sum()) for layer in moe_layers(model)],
        "seconds": vars(seconds),
    }


def memory(whole: ModelBytes, placement: Placement, key_values: int, per_rank: list[dict]) -> list[Table]:
    """Bytes per device, from live arrays, against the whole model on one; `key_values` of a device's cache."""
    ranks = len(per_rank)
    if ranks > 1:
        experts = np.array([figures["expert_bytes"] for figures in per_rank])
        rest = np.array([figures["rest_bytes"] for figures in per_rank])
    else:
        experts = np.array(per_rank[0]["expert_bytes_per_device"])
        rest = np.full(len(experts), whole.rest)
    together = experts + rest
    columns = [
        Figure(None, "device", list(range(len(experts)))),
        Figure("experts_per_device_bytes", "experts", experts.tolist(), size),
        Figure("rest_per_device_bytes", "the rest", rest.tolist(), size),
        Figure("per_device_bytes", "together", together.tolist(), size),
        Figure("experts_per_device_bytes_modelled", None, whole.per_device(placement).tolist()),
    ]
    fullest, of_experts = int(together.max()), whole.experts / max(1, int(experts.max()))
    facts = [
        Figure(
            "full_model_bytes",
            "whole model",
            whole.total,
            lambda v: f"{size(v)} in memory, {size(whole.experts)} of it experts",
        ),
        Figure("full_model_expert_bytes", None, whole.experts),
        Figure("reduction", "fullest device", whole.total / fullest, f"{size(fullest)}: {{:.2f}}x less than the whole"),
        Figure("reduction_of_experts", "experts alone", of_experts, "{:.2f}x less"),
        Figure("kv_cache_bytes", "key-value cache", key_values, lambda v: f"{size(v)} on each device besides"),
        Figure("peak_process_bytes", None, max(figures["resident"]["peak"] for figures in per_rank)),
    ]
    source = "measured" if ranks > 1 else "experts measured; the rest, here once, modelled on each"
    return [
        Table("Memory per device", columns, "memory", source),
        Table("Memory over all", facts, "memory", facts=True),
    ]


def communication(
    model, trace: RoutingTrace, value_bytes: int, counted: Collectives, combine: str, ranks: int
) -> Table:
    """Bytes per token of both ways to combine, by formula; with ranks also what was counted at the calls.

    value_bytes  of one value that the experts gave in this run
    combine      what was asked for; of ranks the way that was taken counts
    """
    layers = moe_layers(model)
    experts, top_k = layers[0].experts, trace.experts.shape[2]
    hidden = hidden_size(experts)
    both = {how: bytes_per_token(hidden, top_k, len(layers), value_bytes, how) for how in ("reduce", "gather")}
    used = "gather" if experts.gathers or combine == "gather" else "reduce"
    one = "" if ranks > 1 else "; in one process nothing is sent"
    figures = [
        Figure("bytes_per_token_by_combine", None, both),
        Figure(None, "reduce: weighted sums, all-summed", both["reduce"], lambda v: f"{size(v)} per token"),
        Figure(None, "gather: every slot's output, all-summed", both["gather"], lambda v: f"{size(v)} per token"),
        Figure("combine", None, used),
        Figure("value_bytes", None, value_bytes),
        Figure("bytes_per_token", None, both[used]),
        Figure(
            "ring_bytes_sent_per_token_and_rank",
            f"{used} by a ring, sent by each rank",
            round(ring_traffic(both[used], len(experts.held))),
            lambda v: f"{size(v)} per token",
        ),
    ]
    if ranks > 1:
        per_token = counted.bytes / max(1, len(trace))
        about = {"source": "measured at the calls, head and attention included where sharded", "tokens": len(trace),
                 "calls": counted.calls, "payload_bytes": counted.bytes, "by_kind": counted.by_kind,
                 "payload_bytes_per_token": per_token}  # fmt: skip
        text = f"{size(per_token)} per token, {counted.calls} calls in all"
        figures.append(Figure("counted", "counted at the calls (measured)", about, lambda _: text))
    return Table("Communication", figures, "communication", f"modelled, {value_bytes}-byte values{one}", facts=True)


def speed(text: str, tokens: list[int], prompt_tokens: int, last, seconds: Seconds, stock_speed=None) -> list[Table]:
    """Speed of the run, and where the time of one token goes; `last` is mlx-lm's last response."""
    spent = seconds.experts / max(seconds.total, 1e-12)
    figures = [
        Figure("prompt_tokens_per_second", "prompt", last.prompt_tps, f"{{:.1f}} tokens/s ({prompt_tokens} tokens)"),
        Figure("tokens_per_second", "generation", last.generation_tps, f"{{:.1f}} tokens/s ({len(tokens)} tokens)"),
        Figure(None, "generation by stock mlx-lm", stock_speed, "{:.1f} tokens/s"),
        Figure(None, "share of time in experts", spent, f"{{:.0%}} (measured on {seconds.tokens} tokens with stops)"),
        *(Figure(key, None, v) for key, v in (("prompt_tokens", prompt_tokens), ("text", text), ("tokens", tokens))),
    ]
    parts = [Figure(key, None, value) for key, value in vars(seconds).items()]
    return [
        Table("Speed", figures, "generation", "measured", facts=True),
        Table("", parts, "time", "measured with a stop after each part"),
    ]


def ranks_table(per_rank: list[dict]) -> Table:
    """What each rank held, computed and waited for."""
    seconds = [figures["seconds"] for figures in per_rank]
    columns = [
        Figure(None, "rank", list(range(len(per_rank)))),
        Figure(None, "experts", [figures["expert_bytes"] for figures in per_rank], size),
        Figure(None, "process", [figures["resident"]["now"] for figures in per_rank], size),
        Figure(None, "slots", [sum(figures["slots_computed_per_layer"]) for figures in per_rank]),
    ]
    for part in ("experts", "collectives", "waiting"):
        columns.append(Figure(None, f"{part} ms", [1e3 * each[part] / each["tokens"] for each in seconds], "{:.2f}"))
    return Table("Ranks", columns, "", f"measured; ms per token, on {seconds[0]['tokens']} tokens with stops")
