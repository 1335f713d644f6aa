"""The report of one run: parity, routing, balance, rebalancing; cost.py has what it takes.

Every function gives tables, whose sections together are the run's JSON.

Dimensions: T tokens, L MoE layers, E experts, k chosen per token, D devices, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from itertools import pairwise
from operator import getitem

import mlx.core as mx
import numpy as np

from .. import balance as metrics
from ..checkpoint.finding import cut
from ..device.trials import in_words
from ..layers import moe_layers
from ..models.memory import stored_as
from ..placement import Placement
from ..serving import devices_of_trace
from ..study.chance import expected_fan_out, uniform_routing
from ..trace import RoutingTrace
from .table import SHADES_MEAN, Figure, Table, facts, of_records, shades, size

MOST_OF_PROMPT = 120  # characters that are printed
PHASES = ("prefill", "decode")
BALANCEDNESSES = (
    "SGLang: mean load over the fullest device's in each layer, then the mean of layers; vLLM: both are summed over"
    " layers first."
)


def what_runs_where(name, model, prompt, placement: Placement, ranks: int, reading, versions, budget=None) -> Table:
    """Model, types, prompt, devices, placement, hardware, versions.

    reading  a ReadReport;  budget  what --expert-memory asked for
    """
    counts = placement.held.sum(axis=2)  # [L, D]
    held = " to ".join(map(str, sorted({int(counts.min()), int(counts.max())})))
    copies = int(placement.copies.sum()) // placement.num_layers - placement.num_experts
    more = f", {copies} copies a layer" if copies else ""
    spread = f"{ranks} ranks" if ranks > 1 else f"{placement.num_devices} simulated in one process"
    read = size(reading.bytes_read_experts + reading.bytes_read_rest)
    figures = [
        Figure(None, "model", name),
        Figure(None, "MoE layers", f"{placement.num_layers} x {placement.num_experts} experts"),
        Figure(None, "dtype", stored_as(model)),
        Figure(None, "prompt", f"{len(prompt.ids)} tokens: {cut(prompt.text, MOST_OF_PROMPT)}"),
        Figure(None, "devices", spread),
        Figure(
            "strategy",
            "placement",
            placement.strategy,
            lambda strategy: f"{strategy}, {held} of {placement.num_experts} experts on each device{more}",
        ),
        Figure(None, "expert memory", budget, lambda size: f"{size} a device: {_in_memory(model)}"),
        Figure(None, "running on", "{device}, {device_name}, {cores} cores, {system}".format(**versions)),
        Figure(None, "products", in_words(model)),
        Figure(None, "read", f"{read} of files in {reading.seconds:.1f} s"),
        Figure(None, "versions", "mlx {mlx}, mlx-lm {mlx_lm}, Python {python}".format(**versions)),
    ]
    also = {"source": "as asked for", "devices": placement.num_devices, "ranks": ranks, "experts_per_device": counts}
    also["notes"] = placement.metadata.get("notes", [])
    return Table("What runs where", figures, "placement", also=also, facts=True)


def _in_memory(model) -> str:
    on_disk = any(not store.all_here for layer in moe_layers(model) for store in layer.experts.stores)
    return "others are read when a token asks for them" if on_disk else "all experts fit"


def parity(logits: mx.array, tokens: list[int], stock_logits: mx.array, stock_tokens: list[int]) -> Table:
    """Whether stock mlx-lm says the same: tokens of the run, logits [T, V] over prompt and answer."""
    count = len(stock_tokens)
    difference = mx.abs(stock_logits.astype(mx.float32) - logits.astype(mx.float32)).max().item()

    agree = next((n for n, (a, b) in enumerate(zip(tokens, stock_tokens, strict=False)) if a != b), count)
    equal = (
        f"the same ({count} compared)" if tokens == stock_tokens else f"NOT the same (the first {agree} of {count} are)"
    )
    figures = [
        Figure(None, "tokens", equal if count else "none to compare"),
        Figure(
            "max_abs_logit_difference", "largest logit difference", difference, f"{{:.3g}} ({logits.size} compared)"
        ),
    ]
    also = {
        "tokens_equal": tokens == stock_tokens if count else None,
        "tokens_compared": count,
        "tokens_equal_at_first": agree,
        "logits_compared": logits.size,
    }
    return Table("Parity with stock mlx-lm", figures, "parity", "measured", also=also, facts=True)


def not_a_number(layer: int | None) -> Table:
    """What is said of a model whose answer is no number, from this layer on; None: its layers are sound."""
    where = "its output" if layer is None else f"layer {layer}"
    items = {"weights": f"the model answers not-a-number from {where} on: they are damaged, or overflow in this dtype"}
    return facts("Not a number", items, section="not_a_number", source="measured", also={"from_layer": layer})


# --- routing and balance --------------------------------------------------------------------------------------


def routing(trace: RoutingTrace, layer_numbers: list[int]) -> list[Table]:
    """Per layer hottest expert, entropy, unused experts; the same by phase as means over layers, beside chance."""
    per_layer, top_k = _routing_of(trace), trace.experts.shape[2]
    phases, rows, uniform = dict.fromkeys(PHASES), [], _by_chance(trace)
    for name in PHASES:
        if not len(part := trace.phase(name)):
            continue
        figures, chance = {figure.key: figure.value for figure in _routing_of(part)}, _by_chance(part)
        phases[name] = {"tokens": len(part), **figures, "uniform_simulated": chance}
        names = {"entropy": "entropy", "hottest_over_mean": "hottest_over_mean", "never_used": "unused_experts"}
        means = {key: np.mean(figures[f"{of_layers}_per_layer"]) for key, of_layers in names.items()}
        rows += [{"phase": name, "tokens": len(part), **means}, {"phase": "if uniform", **chance}]
    counts = {"num_experts": trace.num_experts, "top_k": top_k}
    counts["dropped_tokens"] = trace.metadata.get("dropped_tokens", 0)
    return [
        Table(
            f"Routing (measured, {len(trace)} tokens, top-{top_k} of {trace.num_experts})",
            [Figure(None, "layer", layer_numbers), *per_layer],
            "routing.all",
            "measured",
            "Uniform routing of as many tokens (simulated): {hottest_over_mean:.2f}x, {entropy:.3f}, {never_used:.0f}"
            " never used.".format(**uniform),
            also={"tokens": len(trace), "uniform_simulated": uniform},
            first=per_layer[2].value,
            order="the most skewed",
            detail=True,
        ),
        of_records(
            "Routing by phase (measured, means over layers; if uniform: simulated)",
            None,
            rows,
            ("phase", "phase"),
            ("tokens", "tokens"),
            ("entropy", "entropy", "{:.3f}"),
            ("hottest_over_mean", "hottest / mean", "{:.2f}x"),
            ("never_used", "never used", "{:.1f}"),
            section="routing",
            also={"source": "measured", **counts, **phases},
        ),
    ]


def _by_chance(part: RoutingTrace, held=None) -> dict:
    held = np.ones((1, part.num_experts), bool) if held is None else held
    return uniform_routing(len(part), part.experts.shape[2], held)


def _routing_of(part: RoutingTrace) -> list[Figure]:
    loads = part.loads()
    hottest = loads.max(axis=1) / np.maximum(loads.mean(axis=1), 1e-12)
    return [
        Figure("hottest_expert_per_layer", "hottest expert", loads.argmax(axis=1), "#{}"),
        Figure("hottest_over_mean_per_layer", "load / mean", hottest, "{:.2f}x"),
        Figure("entropy_per_layer", "entropy (1 = even)", metrics.routing_entropy(loads), "{:.3f}"),
        Figure("unused_experts_per_layer", "never used", (loads == 0).sum(axis=1)),
    ]


def balance(trace: RoutingTrace, changes: list, layer_numbers: list[int], first: Placement, model=None) -> list[Table]:
    """Load of each device over a trace, in slots that it answered.

    changes  [(tokens before, held bool [L, D, E])], the one from token 0 on is first; what nobody holds loads nobody
    first    the placement at the start
    model    that was run, where its copies may take turns
    """
    device = served(trace, changes, model)
    loads, nobody = device_loads(device, first.num_devices), (device == first.num_devices).any(axis=2)
    touched = metrics.fan_out(device) - nobody.mean(axis=0) if len(device) else metrics.fan_out(device)
    even = f"mean / max, 1 is even, 1/{first.num_devices} all on one device"
    per_layer = [
        Figure(None, "layer", layer_numbers),
        Figure("balancedness_per_layer", "balancedness", metrics.balancedness_per_layer(loads), "{:.3f}", means=even),
        Figure("imbalance_ratio_per_layer", "max/mean-1", metrics.imbalance_ratio(loads), "{:.3f}"),
        Figure("coefficient_of_variation_per_layer", "std/mean", metrics.coefficient_of_variation(loads), "{:.3f}"),
        Figure("min_max_ratio_per_layer", "min/max", metrics.min_max_ratio(loads), "{:.3f}"),
        Figure("fan_out_per_layer", "fan-out", touched, "{:.2f}", means="devices that a token goes to"),
    ]
    uniform = None
    if int(first.copies.max()) == 1:
        counts = first.held.sum(axis=2).tolist()  # [L, D]
        uniform = np.mean([expected_fan_out(row, trace.num_experts, trace.experts.shape[2]) for row in counts])
        uniform = Figure("fan_out_if_uniform_modelled", "uniform", uniform, "{:.2f}", "modelled")
    whole = [
        Figure("balancedness_layers", "balancedness, mean over layers (SGLang)", metrics.balancedness(loads), "{:.3f}",
               beside=_uniform_balance(trace, first)),
        Figure("balancedness_aggregate", "balancedness, aggregate (vLLM)", metrics.balancedness(loads, "aggregate"),
               "{:.3f}"),
        Figure("fan_out", "devices touched per token (fan-out)", np.mean(touched), "{:.2f}", beside=uniform),
    ]  # fmt: skip
    whole += _fitted(first.metadata, trace.experts.shape[2])
    phases = {}
    for name in PHASES:
        mine = trace.prefill == (name == "prefill")
        if count := int(mine.sum()):
            there = device_loads(device[mine], first.num_devices)
            both = {f"balancedness_{way}": metrics.balancedness(there, way) for way in ("layers", "aggregate")}
            chance = _uniform_balance(trace.phase(name), first)
            phases[name] = {"tokens": count, **both, chance.key: chance.value}
            label = f"balancedness in {name} ({count} tokens)"
            whole.append(Figure(None, label, both["balancedness_layers"], "{:.3f}", beside=replace(chance, key=None)))
    note = "A device's load: the slots, (token, chosen expert) pairs, that it answered."
    wide = "three characters" if len(shades(loads[0])) > first.num_devices else "a character"
    least_balanced = {"first": per_layer[1].value, "order": "the least balanced", "detail": True}
    tables = [
        Table("Balance over devices", per_layer, "balance", "measured", note, **least_balanced),
        Table("Balance over all layers", whole, "balance", "measured", BALANCEDNESSES, {"phases": phases}, facts=True),
        Table(
            "Load per device",
            [Figure(None, "layer", layer_numbers), Figure("device_loads", "devices", loads, shades)],
            "balance",
            "measured",
            f"{wide} a device; of the layer's mean {SHADES_MEAN}.",
            **least_balanced,
        ),
    ]
    if first.num_devices == 1:  # for programs alone: in print it says nothing
        return [replace(table, title="") for table in tables]
    lost = np.flatnonzero(changes[0][1].any(axis=(0, 2)) & ~changes[-1][1].any(axis=(0, 2))).tolist()
    of_whom = f"device{'s' * (len(lost) > 1)} {', '.join(map(str, lost))}"
    on_the_way = f" Lost on the way, and counted with the load from before: {of_whom}." if lost else ""
    return [replace(table, note=table.note + on_the_way) for table in tables]


def _fitted(metadata: dict, top_k: int) -> list[Figure]:
    """What a placement by load was fitted on, and what could be expected of it (`placing.held_out.fitted_on`)."""
    names = ("fitted_tokens", "fitted_top_k", "balancedness_fitted", "balancedness_unseen")
    tokens, its_k, there, unseen = (metadata.get(name) for name in names)
    if not all(isinstance(value, int | float) for value in (tokens, its_k, there)):
        return []
    other = "" if its_k == top_k else f" of top-{its_k}, not {top_k}"
    figures = [Figure("balancedness_fitted_simulated", f"placement fitted on {tokens} tokens{other}", there,
                      "{:.3f} on those (simulated, copies share equally)")]  # fmt: skip
    if isinstance(unseen, int | float):
        how = "{:.3f} (simulated: first half fits, second judges)"
        figures.append(Figure("balancedness_expected_simulated", "to expect on unseen tokens", unseen, how))
    return figures


def _uniform_balance(part: RoutingTrace, placement: Placement) -> Figure:
    """What so many tokens would give if every expert were as likely, on the first layer's devices."""
    value = _by_chance(part, placement.held[0])["balancedness"]
    return Figure("balancedness_if_uniform_simulated", "uniform", value, "{:.3f}", "simulated")


def served(trace: RoutingTrace, changes: list, model=None) -> np.ndarray:
    """[T, L, k]: who answers each slot, D for nobody, as the model's experts have it done; changes as in `balance`."""
    masked_up_to = moe_layers(model)[0].experts.masked_up_to if model is not None else 0
    ends = [*(start for start, _ in changes), len(trace)]
    parts = [(held, trace[a:b]) for (_, held), (a, b) in zip(changes, pairwise(ends), strict=True) if b > a or a == 0]
    return np.concatenate([devices_of_trace(part.experts, held, part.steps, masked_up_to) for held, part in parts])


def device_loads(device, num_devices: int) -> np.ndarray:
    """[L, D]; slots of each device, for the device of each slot [T, L, k]."""
    layers = np.moveaxis(device, 1, 0)
    return np.stack([np.bincount(each.reshape(-1), minlength=num_devices)[:num_devices] for each in layers])


def rebalancing(figures: dict, changes: list, trace: RoutingTrace, model=None) -> Table:
    """Looks, moves, pauses of `LiveRebalancing.figures`; what became of the tokens since, with the move and without."""
    ends = [tokens for tokens, _ in changes[2:]] + [len(trace)]
    moved = [look for look in figures["looks"] if look["moved"]]
    for look, ((_, before), (start, after)), end in zip(moved, pairwise(changes), ends, strict=False):
        dealt = (served(trace[start:end], [(0, each.held)], model) for each in (after, before))
        kept, unmoved = (metrics.balancedness(device_loads(device, after.num_devices)) for device in dealt)
        look["since"] = {"tokens": end - start, "balancedness": kept, "balancedness_unmoved": unmoved}

    def of_move(*keys):
        return lambda look: reduce(getitem, keys, look) if look["moved"] else None

    rest = {key: value for key, value in figures.items() if key != "looks"}
    side = "" if figures["costs"]["side_by_side"] else ", as if devices ran side by side"
    return of_records(
        "Rebalancing",
        "looks",
        figures["looks"],
        ("after_tokens", "after"),
        (lambda look: look["moves_of_all"] if look["moved"] else "stay", "moved"),
        (of_move("bytes_of_all"), "bytes", size),
        (of_move("pause_seconds"), "pause", "{:.2f} s"),
        (of_move("pause_seconds_modelled"), "predicted", "{:.2f} s"),
        (of_move("gain_seconds_modelled"), "gain", "{:.2f} s"),
        (of_move("since", "balancedness_unmoved"), "unmoved", "{:.3f}"),
        (of_move("since", "balancedness"), "as moved", "{:.3f}"),
        section="rebalancing",
        note="after so many tokens; experts moved, their bytes in memory and the pause are measured, predicted pause"
        f" and gain modelled{side}; last, balancedness of the tokens since (measured)",
        also={"source": "measured; names with modelled in them are not", **rest},
    )
