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
from .measuring import Seconds, resident_bytes
from .table import Figure, Table, of_records, size


def per_token(num_bytes: float) -> str:
    return f"{size(num_bytes)} per token"


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
    experts = np.array(per_rank[0]["expert_bytes_per_device"])
    rest, source = np.full(len(experts), whole.rest), "experts measured; the rest, here once, modelled on each"
    lost = np.zeros(len(experts), bool)
    if len(per_rank) == 1:
        lost = experts == 0  # every device of a placement was given some
        rest[lost] = 0
    else:
        experts, rest = (np.array([each[key] for each in per_rank]) for key in ("expert_bytes", "rest_bytes"))
        source = "measured"
    together = experts + rest
    columns = [
        Figure(None, "device", range(len(experts))),
        Figure("experts_per_device_bytes", "experts", experts, size),
        Figure("rest_per_device_bytes", "the rest", rest, size),
        Figure("per_device_bytes", "together", together, size),
    ]
    fullest, beside = int(together.max()), f"in memory, {size(whole.experts)} of it experts"
    peak = max(each["resident"]["peak"] for each in per_rank)
    note = f"device {', '.join(map(str, np.flatnonzero(lost)))} is lost, with all it held" if lost.any() else ""
    of_experts = whole.experts / max(1, int(experts.max()))
    overall = [
        Figure("full_model_bytes", "whole model", whole.total, lambda total: f"{size(total)} {beside}"),
        Figure("reduction", "fullest device", whole.total / fullest, f"{size(fullest)}: {{:.2f}}x less than the whole"),
        Figure("reduction_of_experts", "experts alone", of_experts, "{:.2f}x less"),
        Figure("kv_cache_bytes", "key-value cache", key_values, lambda cache: f"{size(cache)} on each device besides"),
        Figure("peak_process_bytes", "process at its peak", peak, lambda most: f"{size(most)}, with Python and MLX"),
    ]
    also = {"experts_per_device_bytes_modelled": whole.per_device(placement), "full_model_expert_bytes": whole.experts}
    return [
        Table("Memory per device", columns, "memory", source, note, first=-together, order="the fullest", detail=True),
        Table("Memory over all", overall, "memory", also=also, facts=True),
    ]


def communication(model, trace: RoutingTrace, value_bytes: int, counted: dict, ranks: int) -> Table:
    """Bytes per token of both ways to combine, by formula; with ranks also what was counted at the calls.

    value_bytes  of one value that the experts gave in this run
    """
    experts, top_k = [layer.experts for layer in moe_layers(model)], trace.experts.shape[2]
    shape = (hidden_size(experts[0]), top_k, 1, value_bytes)
    one = {how: bytes_per_token(*shape, how) for how in ("reduce", "gather")}  # of a layer
    both = {how: len(experts) * each for how, each in one.items()}
    used = " and ".join(how for how in both if how in {each.combine for each in experts})
    taken = sum(one[each.combine] for each in experts)  # some layers may add more than their experts' answers
    sent = round(ring_traffic(taken, len(experts[0].held)))
    figures = [
        Figure(None, "reduce: weighted sums, all-summed", both["reduce"], per_token),
        Figure(None, "gather: every slot's output, all-summed", both["gather"], per_token),
        Figure("ring_bytes_sent_per_token_and_rank", f"{used} by a ring, sent by each rank", sent, per_token),
    ]
    note = ""
    if ranks > 1:
        calls, payload = (sum(counts[n] for counts in counted.values()) for n in (0, 1))
        source = "measured at the calls, sharded head and attention included; an upper bound, for of a prompt MLX"
        about = {"source": f"{source} carries out only what its caches need", "tokens": len(trace),
                 "calls": calls, "payload_bytes": payload, "by_kind": counted,
                 "payload_bytes_per_token": payload / len(trace)}  # fmt: skip
        text = f"{per_token(about['payload_bytes_per_token'])} at most, {calls} calls"
        note = "at most: of a prompt MLX carries out only what its caches need; calls: of collectives, by each rank"
        figures.append(Figure("counted", "counted at the calls", about, lambda _: text, "measured"))
    alone = "" if ranks > 1 else "; in one process nothing is sent"
    title = f"Communication (modelled, {value_bytes}-byte values{alone})"
    also = {
        "combine": used,
        "value_bytes": value_bytes,
        "bytes_per_token": taken,
        "bytes_per_token_by_combine": both,
    }
    return Table(title, figures, "communication", "modelled", note, also=also, facts=True)


def speed(text: str, tokens: list[int], prompt_tokens: int, ours: list, stock: list, seconds: Seconds) -> list[Table]:
    """Speed of the run and of stock mlx-lm, and where the time of one token goes.

    ours, stock  mlx-lm's last response of each run, made in turns; of several the first was a warm-up and counts not
    An answer of one token has no speed: there is no time between two. mlx-lm counts the end token, too, which went
    through the model.
    """
    first, ours, stock = ours[0], ours[1:] or ours, stock[1:] or stock
    runs = {
        "prompt_tokens_per_second": [last.prompt_tps for last in ours],
        "tokens_per_second": [last.generation_tps for last in ours if last.generation_tokens > 1],
        "stock_tokens_per_second": [last.generation_tps for last in stock if last.generation_tokens > 1],
    }

    def speed_of(key, label, of=""):
        speeds = runs[key]
        behind = "; ".join(filter(None, (of, f"{min(speeds):.1f} to {max(speeds):.1f}" if len(speeds) > 1 else "")))
        shown = "{:.1f} tokens/s" + (f" ({behind})" if behind else "")
        return Figure(key, label, float(np.median(speeds)) if speeds else None, shown)

    count, share = first.generation_tokens, seconds.experts / max(seconds.total, 1e-12)
    of_answer = f"{count} tokens" + (", the end token among them" if count > len(tokens) else "")
    prompt = speed_of("prompt_tokens_per_second", "prompt", f"{prompt_tokens} tokens")
    began = None if hasattr(first, "answers") else prompt_tokens / prompt.value  # several do not begin at one time
    figures = [
        Figure("seconds_to_first_token", "time to first token", began, "{:.3f} s"),
        prompt,
        speed_of("tokens_per_second", "generation", of_answer),
        speed_of("stock_tokens_per_second", "generation by stock mlx-lm"),
        Figure(None, "share of time in experts", share, f"{{:.0%}} (measured on {seconds.tokens} tokens with stops)"),
    ]
    note = "with stops: extra tokens, with a wait after each part, which makes them slower"
    also = {"prompt_tokens": prompt_tokens, "generation_tokens": count, "text": text, "tokens": tokens, "runs": runs}
    how = f"medians of {len(ours)} runs after a warm-up, lowest and highest behind" if len(ours) > 1 else "one run"
    return [
        Table(f"Speed (measured, {how})", figures, "generation", "measured", note, also=also, facts=True),
        Table("", [], "time", "measured with a stop after each part", also=vars(seconds), facts=True),
    ]


def ranks_table(per_rank: list[dict]) -> Table:
    """What each rank held, computed and waited for."""

    def milliseconds(part):
        return lambda each: 1e3 * each["seconds"][part] / each["seconds"]["tokens"]

    table = of_records(
        f"Ranks (measured; milliseconds per token, on {per_rank[0]['seconds']['tokens']} tokens with stops)",
        "ranks",
        per_rank,
        ("expert_bytes", "experts", size),
        (lambda each: each["resident"]["now"], "process", size),
        (lambda each: sum(each["slots_computed_per_layer"]), "slots"),
        *((milliseconds(part), f"{part} ms", "{:.2f}") for part in ("experts", "collectives", "waiting")),
        section="",
        note="slots: (token, chosen expert) pairs that a rank computed, in all layers; waiting: for the slowest rank",
    )
    table.figures.insert(0, Figure(None, "rank", range(len(per_rank))))
    return table
