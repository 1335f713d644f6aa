"""The report of expert_parallel_poc.py: one MoE layer's routing, its bottleneck, and what helps."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..moving.plan import Costs
from ..placing.copies import lower_bound
from ..placing.strategies import place_experts
from ..projection.links import Link, traffic_matrix
from ..study.chance import uniform_routing
from ..study.learning import CLOSE, among_copies, enough_tokens, learning_curve, stability
from ..study.phases import MEASURED, PASSES, Phases, SmallLayer, given, interleaved, run_phases, slowest_device_work
from ..study.remedies import BATCH, Choices, compare
from ..study.scenarios import hot_experts, tokens_until_hot
from .table import Figure, Table, of_records

MEASURED_PARTS = ("compute", "straggler", "routing")  # of `layer_parts`
STEERED = ("cap and re-route", "load-aware router")  # by the router's scores
UNCHANGED = ("contiguous", "round-robin", "balanced", "replicated", "affinity")  # the model's output stays


def study(
    layer: SmallLayer, fit: Choices, test: Choices, x, preference, num_devices: int, redundant: int, link: Link
) -> list[Table]:
    """One scenario or trace: where the time goes, what limits it, and what helps.

    x           [512, H], tokens of the timed passes
    preference  [512, E], what is added to their logits; None: the choices of evenly spaced test tokens are used
    The timed layer is that with the least even contiguous devices; with a trace the last table is a learning curve.
    """
    # 1. One pass over contiguous devices, timed part by part.
    loads = test.loads()
    device_loads = place_experts(loads, num_devices).device_loads(loads)
    worst = int((device_loads.max(axis=1) / loads.sum(axis=1)).argmax())
    rows = np.linspace(0, len(test.experts) - 1, MEASURED).astype(int)
    experts = test.experts[rows, worst] if preference is None else None
    wish = mx.zeros((MEASURED, layer.num_experts)) if preference is None else mx.array(preference)
    placement = place_experts(loads[worst : worst + 1], num_devices)
    y, phases = run_phases(layer, x, wish, placement, experts)
    traffic = traffic_matrix(test.experts[rows, worst][:, None], placement.held, layer.hidden, x.dtype.size)[0]

    # 2. Every remedy, fitted on one part of the tokens and judged on the other; slowest devices are timed in turn.
    per_slot = sum(phases.device_seconds) / sum(phases.device_slots)
    costs = Costs(layer.expert_bytes, link.bytes_per_second, per_slot, link.latency_seconds, side_by_side=True)
    remedies, works, outcomes = [], [], compare(fit, test, num_devices, redundant, costs)
    for outcome in outcomes:
        mine, share = outcome.choices.part(rows), 1.0 if outcome.choices.kept is None else outcome.choices.kept.mean()
        kept = None if mine.kept is None else mine.kept[:, worst]
        slots = share * MEASURED * layer.top_k / num_devices / outcome.balancedness_fit_per_layer[worst]
        works.append(slowest_device_work(layer, x, outcome.placement.held[worst], mine.experts[:, worst], kept))
        names = ("remedy", "balancedness_fit", "balancedness_test", "fan_out", "price")
        modelled = {"slowest_device_seconds_modelled": slots * per_slot}
        remedies.append({**{name: getattr(outcome, name) for name in names}, **modelled, **outcome.figures})
    for remedy, seconds in zip(remedies, interleaved(works), strict=True):
        remedy["slowest_device_seconds_measured"] = float(np.median(seconds))
        remedy["slowest_device_seconds_spread"] = [seconds.min(), seconds.max()]

    # 3. What a placement learnt, and how slots are dealt among copies.
    curve = learning_curve(fit, test, num_devices, redundant)
    about = {"tokens_fit": len(fit.experts), "tokens_test": len(test.experts), "layer": worst, "passes": PASSES}
    about |= {"enough_tokens_simulated": enough_tokens(curve), "stability_simulated": stability(fit, test)}
    replicated = next(outcome for outcome in outcomes if outcome.remedy == "replicated").placement
    about["over_optimum_simulated"] = among_copies(replicated.held, test.batches()) if redundant else None

    # 4. All as tables. Without copies the hottest expert has company: other slots, at best of the coldest experts.
    company = np.sort(loads, axis=1)[:, : loads.shape[1] // num_devices - 1].sum(axis=1)
    least = np.maximum(lower_bound(loads, num_devices), loads.max(axis=1) + company)
    bound = (loads.sum(axis=1) / num_devices / least).mean()
    parts, hot = layer_parts(phases, link, traffic), hot_figures(fit, num_devices)
    off = differences(layer, x, wish, y, experts)
    batch = min(BATCH, len(test.experts))
    about["balancedness_if_uniform_simulated"] = uniform_routing(batch, layer.top_k, placement.held[0])["balancedness"]
    hot["uniform_simulated"] = uniform_routing(len(fit.experts), layer.top_k, placement.held[0])["hottest_over_mean"]
    tables = [_overview(device_loads, off, phases, parts, bound, hot, remedies, about), *_remedies(remedies)]
    return tables if preference is not None else [*tables, _learning(curve, bool(redundant))]


def _overview(device_loads, off, phases, parts, bound, hot, remedies, about) -> Table:
    def milliseconds(*names):
        return lambda seconds: ", ".join(f"{name} {1e3 * seconds[name]:.1f}" for name in names)

    share, slowest, plan = device_loads[about["layer"]], max(parts, key=parts.get), proposed(remedies)
    share = " ".join(f"{part:.0f}" for part in 100 * share / share.sum())
    apart = next(remedy for remedy in remedies if remedy["remedy"] == "affinity")
    hottest = next(iter(hot["hottest"]), None)
    figures = [
        Figure("device_loads_simulated", "load per device, %", device_loads, lambda _: f"{share} (simulated)"),
        Figure("parity", "off mlx-lm, off dense", off, "{0[whole_layer]:.1g}, {0[dense]:.1g} (measured)"),
        Figure("phases_seconds_measured", "one pass, ms", vars(phases),
               milliseconds("route", "dispatch", "compute", "combine"), "measured"),
        Figure("parts_seconds", "machines, ms", parts, lambda parts: milliseconds(*MEASURED_PARTS)(parts)
               + f" (measured); {milliseconds('communication')(parts)} (modelled)"),
        Figure("bottleneck", "bottleneck", slowest, f"{{}}, {parts[slowest] / sum(parts.values()):.0%} of the layer"),
        Figure("most_balancedness_without_copies", "balance without copies", bound, "at most {:.3f} (bound)"),
        Figure(None, "balance if uniform", about["balancedness_if_uniform_simulated"],
               f"{{:.3f}}, batches of {BATCH} tokens (simulated)"),
        Figure(None, "hottest expert", hottest and {**hottest, "layer": hot["layer"]}, hottest_text,
               beside=Figure(None, "uniform", hot["uniform_simulated"], "{:.2f}x", "simulated")),
        Figure(None, "seen after", hottest and hottest["tokens_until_seen"], f"{{}} tokens: {hot['rule']}"),
        Figure(None, "loads that last", about["stability_simulated"], "cosine {0[cosine]:.3f} of both parts;"
               " {0[cosine_if_shuffled]:.3f} if shuffled (simulated)"),
        Figure(None, "enough to fit on", about, enough_text),
        Figure(None, "among copies", about["over_optimum_simulated"], among_copies_text),
        Figure("proposed", "proposed", plan, proposed_text),
        Figure(None, "affinity's bound", apart, "+{0[balance_bound]:.0%}; {0[fullest_over_balanced_fit]:+.1%} where"
               " fitted, {0[fullest_over_balanced_test]:+.1%} on the test"),
    ]  # fmt: skip
    title = f"{device_loads.shape[1]} contiguous devices, {MEASURED} tokens, {PASSES} passes, layer {about['layer']}"
    sources = dict.fromkeys(parts, "modelled") | dict.fromkeys(MEASURED_PARTS, "measured")
    return Table(title, figures, "", also={**about, "parts_sources": sources, "hot_experts": hot}, facts=True)


def _remedies(remedies: list[dict]) -> list[Table]:
    def milliseconds(seconds):
        return f"{1e3 * seconds:.1f}"

    missing = [name for name in STEERED if name not in {remedy["remedy"] for remedy in remedies}]
    note = f"no {' and no '.join(missing)}: they need the router's scores, which a trace has not" if missing else ""
    balance = of_records(
        "Remedies (balancedness and fan-out simulated)",
        "remedies",
        remedies,
        ("remedy", "remedy"),
        ("balancedness_fit", "fit", "{:.2f}"),
        ("balancedness_test", "test", "{:.2f}"),
        ("fan_out", "fan-out", "{:.1f}"),
        ("price", "price"),
        section="",
        note=note,
    )
    times = of_records(
        "Remedies, ms of the slowest device",
        None,
        remedies,
        ("remedy", "remedy"),
        ("slowest_device_seconds_modelled", "modelled, fit", milliseconds),
        ("slowest_device_seconds_measured", "measured, test", milliseconds),
        (
            lambda remedy: "{:.1f} to {:.1f}".format(*(1e3 * s for s in remedy["slowest_device_seconds_spread"])),
            "range",
        ),
        note=f"measured: median of {PASSES} passes in turn with the others', and their range; not the load that is"
        " modelled",
    )
    return [balance, times]


def _learning(curve: list[dict], copies: bool) -> Table:
    return of_records(
        f"Tokens that a placement was fitted on ({'replicated' if copies else 'balanced'}; balancedness, simulated)",
        "learning_curve",
        curve,
        ("tokens", "tokens"),
        ("balancedness_fit", "fit", "{:.3f}"),
        ("balancedness_test", "test", "{:.3f}"),
        section="",
        note=f"fit: on these tokens, the first ones; test: on all of the others, batches of {BATCH}",
    )


def enough_text(about: dict) -> str:
    enough, all_of_them = about["enough_tokens_simulated"], about["tokens_fit"]
    if enough == all_of_them:
        return f"not seen: all {enough} tokens gain more than {CLOSE} over a part (simulated)"
    return f"{enough} tokens of {all_of_them}: more gain at most {CLOSE} (simulated)"


def among_copies_text(over: dict) -> str:
    rest = ", ".join(f"{name} {times:.2f}" for name, times in over.items())
    return f"fullest device over the optimum (taken): {rest} (simulated)"


def hottest_text(hot: dict) -> str:
    alone = ", too much for one device" if hot["alone_over_device_mean"] > 1 else ""
    return f"#{hot['expert']} of layer {hot['layer']}, {hot['over_mean']:.1f}x the mean{alone}"


def proposed_text(plan: dict) -> str:
    if plan["remedy"] == "contiguous":
        return "nothing: no placement is quicker by 2% or more (modelled, fit)"
    measured, modelled = ([1e3 * s for s in plan[f"seconds_{source}"]] for source in ("measured", "modelled"))
    change = "{:.1f} to {:.1f}"
    measured, modelled = change.format(*measured), change.format(*modelled)
    return f"{plan['remedy']}: {measured} ms (measured, test), {modelled} (modelled, fit)"


# --- figures --------------------------------------------------------------------------------------------------


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

    compute        mean of the devices' seconds, measured
    straggler      what the slowest takes longer, measured: all others wait for it
    communication  tokens sent to their experts' devices and back, traffic [D, D] bytes over `link` (modelled)
    routing        of all tokens, measured
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
    """The quickest by the model of the remedies that leave the output alone: seconds without and with it, by source."""
    sources = {source: f"slowest_device_seconds_{source}" for source in ("modelled", "measured")}
    best = min((r for r in remedies if r["remedy"] in UNCHANGED), key=lambda r: r[sources["modelled"]])
    if best[sources["modelled"]] > 0.98 * remedies[0][sources["modelled"]]:
        best = remedies[0]  # routing is even: nothing to repair
    change = {f"seconds_{source}": [remedies[0][key], best[key]] for source, key in sources.items()}
    return {"remedy": best["remedy"], **change}
