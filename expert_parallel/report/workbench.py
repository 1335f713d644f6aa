"""Figures and tables of expert_parallel_poc.py: one MoE layer's routing, its bottleneck, and what helps."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..moving.plan import Costs
from ..placing.copies import lower_bound
from ..placing.strategies import place_experts
from ..projection.links import Link, traffic_matrix
from ..study.phases import MEASURED, Phases, SmallLayer, given, run_phases, slowest_device_seconds
from ..study.remedies import Choices, compare
from ..study.scenarios import hot_experts, tokens_until_hot
from .table import Figure, Table, columns

UNCHANGED = ("contiguous", "round-robin", "balanced", "replicated", "affinity")  # the model's output stays


def study(
    layer: SmallLayer,
    fit: Choices,
    test: Choices,
    x,
    preference,
    num_devices: int,
    redundant: int,
    link: Link,
) -> dict:
    """All figures of one scenario or trace.

    x           [512, H], tokens of the timed passes
    preference  [512, E], what is added to their logits; None: the choices of evenly spaced test tokens are used
    The timed layer is that with the least even contiguous devices.
    """
    loads = test.loads()
    contiguous = place_experts(loads, num_devices)
    worst = int((contiguous.device_loads(loads).max(axis=1) / loads.sum(axis=1)).argmax())
    rows = np.linspace(0, len(test.experts) - 1, MEASURED).astype(int)
    experts = test.experts[rows, worst] if preference is None else None
    wish = mx.zeros((MEASURED, layer.num_experts)) if preference is None else mx.array(preference)
    placement = place_experts(loads[worst : worst + 1], num_devices)
    y, phases = run_phases(layer, x, wish, placement, experts)
    traffic = traffic_matrix(test.experts[rows, worst][:, None], placement.held, layer.hidden)[0]
    parts = layer_parts(phases, link, traffic)
    per_slot = sum(phases.device_seconds) / sum(phases.device_slots)
    costs = Costs(layer.expert_bytes, link.bytes_per_second, per_slot, link.latency_seconds, side_by_side=True)
    remedies = []
    for outcome in compare(fit, test, num_devices, redundant, costs):
        mine, share = outcome.choices.part(rows), 1.0
        if mine.kept is not None:
            share = float(outcome.choices.kept.mean())
        measured = slowest_device_seconds(
            layer,
            x,
            outcome.placement.held[worst],
            mine.experts[:, worst],
            None if mine.kept is None else mine.kept[:, worst],
        )
        predicted = share * MEASURED * layer.top_k / num_devices * per_slot / outcome.balancedness_fit_per_layer[worst]
        remedies.append(
            {"remedy": outcome.remedy, "balancedness_fit": outcome.balancedness_fit,
             "balancedness_test": outcome.balancedness_test, "fan_out": outcome.fan_out, "price": outcome.price,
             "slowest_device_seconds_predicted": predicted, "slowest_device_seconds_measured": measured,
             **outcome.figures}
        )  # fmt: skip
    # Without copies the hottest expert has company: its device's other slots, at best the coldest experts.
    company = np.sort(loads, axis=1)[:, : loads.shape[1] // num_devices - 1].sum(axis=1)
    least = np.maximum(lower_bound(loads, num_devices), loads.max(axis=1) + company)
    return {
        "tokens_fit": len(fit.experts), "tokens_test": len(test.experts), "layer": worst,
        "parity": differences(layer, x, wish, y, experts),
        "device_loads_simulated": contiguous.device_loads(loads).tolist(),
        "most_balancedness_without_copies": float((loads.sum(axis=1) / num_devices / least).mean()),
        "phases_seconds_measured": vars(phases), "parts_seconds_modelled": parts,
        "bottleneck": max(parts, key=parts.get), "hot_experts": hot_figures(fit, num_devices),
        "remedies": remedies, "proposed": proposed(remedies),
    }  # fmt: skip


def differences(layer, x, preference, y, chosen=None) -> dict:
    """Largest differences of the devices' y from mlx-lm's whole layer, and from a dense one on 32 tokens; measured."""
    _, experts, weights = layer.route(x, preference) if chosen is None else given(chosen)
    some = slice(0, 32)
    dense = layer.dense(x[some], experts[some], weights[some])
    whole = layer.whole(x, experts, weights)
    pairs = {"whole_layer": (whole, y), "dense": (dense, y[some]), "dense_largest_value": (dense, 0)}
    return {name: float(mx.abs(a - b).max()) for name, (a, b) in pairs.items()}


def layer_parts(phases: Phases, link: Link, traffic) -> dict:
    """Seconds of a layer's parts if each device were a machine of its own; the largest is the bottleneck.

    compute        mean of the devices' measured seconds
    straggler      what the slowest takes longer: all others wait for it
    communication  tokens sent to their experts' devices and back, traffic [D, D] bytes over `link` (modelled)
    """
    seconds = np.array(phases.device_seconds)
    parts = {
        "compute": seconds.mean(),
        "straggler": seconds.max() - seconds.mean(),
        "communication": link.all_to_all_time(traffic) + link.all_to_all_time(traffic.T),
        "routing": phases.route,
    }
    return {name: float(value) for name, value in parts.items()}


def hot_figures(choices: Choices, num_devices: int) -> dict:
    """Hot experts of the layer with the hottest: how hot, and after how many tokens the rule first said so."""
    loads = choices.loads()
    layer = int((loads.max(axis=1) / loads.sum(axis=1)).argmax())
    share = loads[layer] / loads[layer].sum()
    hot = np.flatnonzero(hot_experts(loads)[layer])
    hot = hot[np.argsort(-share[hot])]
    figures = [
        {"expert": int(e), "over_mean": float(share[e] * len(share)),
         "alone_over_device_mean": float(share[e] * num_devices),
         "tokens_until_seen": tokens_until_hot(choices.experts[:, layer], e, len(share))} for e in hot[:4]
    ]  # fmt: skip
    return {"layer": layer, "rule": "n - 3 sqrt(n) > 4 x mean n", "count": len(hot), "hottest": figures}


def proposed(remedies: list[dict]) -> dict:
    """The quickest by prediction of the remedies that leave the output alone, and what came of it."""
    best = min((r for r in remedies if r["remedy"] in UNCHANGED), key=lambda r: r["slowest_device_seconds_predicted"])
    if best["slowest_device_seconds_predicted"] > 0.98 * remedies[0]["slowest_device_seconds_predicted"]:
        best = remedies[0]  # routing is even: nothing to repair
    return {"remedy": best["remedy"], "seconds_before_measured": remedies[0]["slowest_device_seconds_measured"],
            "seconds_predicted": best["slowest_device_seconds_predicted"],
            "seconds_measured": best["slowest_device_seconds_measured"]}  # fmt: skip


def tables(figures: dict) -> list[Table]:
    """Of `study`, 80 columns wide."""
    phases, parts, plan = (figures[n] for n in ("phases_seconds_measured", "parts_seconds_modelled", "proposed"))
    loads = np.array(figures["device_loads_simulated"])[figures["layer"]]
    items = {"load per device, %": " ".join(f"{s:.0f}" for s in 100 * loads / loads.sum()) + " (simulated)"}
    items["off mlx-lm, off dense"] = "{whole_layer:.1g}, {dense:.1g} (measured)".format(**figures["parity"])
    items |= {
        f"{label}, ms ({source})": ", ".join(f"{name} {1e3 * seconds[name]:.1f}" for name in names)
        for label, source, seconds, names in (
            ("one pass", "measured", phases, ("route", "dispatch", "compute", "combine")),
            ("machines", "modelled", parts, ("compute", "straggler", "communication")),
        )
    }
    bottleneck = figures["bottleneck"]
    items["bottleneck"] = f"{bottleneck}, {parts[bottleneck] / sum(parts.values()):.0%} of the layer"
    items["balance without copies"] = f"at most {figures['most_balancedness_without_copies']:.3f} (bound)"
    for hot in figures["hot_experts"]["hottest"][:1]:
        alone = ", too much for one device" if hot["alone_over_device_mean"] > 1 else ""
        items["hottest expert"] = f"#{hot['expert']}, {hot['over_mean']:.1f}x the mean{alone}"
        items["seen after"] = f"{hot['tokens_until_seen']} tokens: {figures['hot_experts']['rule']}"
    before, predicted, measured = (1e3 * plan[f"seconds_{n}"] for n in ("before_measured", "predicted", "measured"))
    items["proposed"] = f"{plan['remedy']}: {before:.1f} to {measured:.1f} ms measured, {predicted:.1f} modelled"
    if plan["remedy"] == "contiguous":
        items["proposed"] = "nothing: no placement is quicker by 2% or more (modelled)"
    apart = next(r for r in figures["remedies"] if r["remedy"] == "affinity")
    fitted, tested = apart["fullest_over_balanced_fit"], apart["fullest_over_balanced_test"]
    bound = apart["balance_bound"]
    items["affinity's bound"] = f"+{bound:.0%}; {fitted:+.1%} where fitted, {tested:+.1%} on the test"
    shown = columns(
        figures["remedies"], ("remedy", "remedy", "{}"), ("fit", "balancedness_fit", "{:.2f}"),
        ("test", "balancedness_test", "{:.2f}"), ("fan-out", "fan_out", "{:.1f}"),
        ("modelled", "slowest_device_seconds_predicted", milliseconds),
        ("measured", "slowest_device_seconds_measured", milliseconds), ("price", "price", "{}"),
    )  # fmt: skip
    title = f"{len(loads)} contiguous devices, {MEASURED} tokens, layer {figures['layer']}"
    return [
        Table(title, [Figure(None, label, text) for label, text in items.items()], facts=True),
        Table("Remedies", shown, "", "balancedness and fan-out simulated; ms of the slowest device"),
    ]


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"
