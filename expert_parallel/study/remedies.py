"""Remedies for skewed routing, against each other on the same tokens. Numpy only.

Dimensions: T tokens, L MoE layers, E experts, k chosen per token, D devices.

Everything is fitted on one part of the tokens and judged on another, batch by batch: a batch takes as
long as its fullest device, so loads are never averaged over batches before the maximum is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..balance import balancedness, fan_out
from ..formats.traces import notes_of, read_trace
from ..moving.plan import Costs, Rebalancer
from ..placement import Placement
from ..placing.affinity import coactivation
from ..placing.strategies import place_experts
from ..router.bias import fit_bias
from ..router.capacity import expert_capacity, limit_slots
from ..serving import devices_of_trace
from ..trace import RoutingTrace

BATCH = 256  # tokens that pass a layer together
CAPACITY = 1.25  # factor of the limit per expert and batch
LEAST_TRACED, MOST_TRACED = 64, 65_536  # tokens; longer traces are thinned, whole batches
MOST_LOOKS = 16  # of rebalancing, over all test tokens


@dataclass
class Choices:
    """What a router chose: experts [T, L, k]; where it is known also its gates [T, L, E]."""

    experts: np.ndarray
    num_experts: int
    gates: np.ndarray | None = None
    kept: np.ndarray | None = None  # bool [T, L, k]; None: no slot was dropped

    def part(self, tokens) -> Choices:
        cut = [None if a is None else a[tokens] for a in (self.experts, self.gates, self.kept)]
        return Choices(cut[0], self.num_experts, cut[1], cut[2])

    def batches(self) -> list[Choices]:
        return [self.part(slice(start, start + BATCH)) for start in range(0, len(self.experts), BATCH)]

    def loads(self) -> np.ndarray:
        """Slots [L, E]."""
        kept = np.ones(self.experts.shape, bool) if self.kept is None else self.kept
        layers = range(self.experts.shape[1])
        return np.stack([np.bincount(self.experts[:, l][kept[:, l]], minlength=self.num_experts) for l in layers])


@dataclass
class Outcome:
    """A remedy judged on tokens that it was not fitted on; simulated, but for what the caller measures."""

    remedy: str
    placement: Placement  # the last one, where it changes
    choices: Choices
    balancedness_fit: float
    balancedness_test: float  # sum of means over sum of maxima, of all batches and layers
    balancedness_fit_per_layer: np.ndarray  # [L]
    fan_out: float
    price: str
    figures: dict = field(default_factory=dict)


def recorded(paths, num_experts: int | None = None) -> tuple[Choices, Choices, list[str]]:
    """(fit, test, notes) of one recorded trace cut in two, or of two; warm-up rows left out, long ones thinned.

    num_experts  E, where the files do not say
    Raises ValueError naming the file for a trace that is too short, and for traces of different models.
    """
    parts, notes = [], []
    for path in map(Path, paths):
        trace = read_trace(path, num_experts)
        if trace.metadata.get("num_experts_guessed"):
            notes.append(f"{path.name}: taken for {trace.num_experts} experts, the highest that occurs (--experts)")
        notes += notes_of(trace, path.name)
        if len(trace) < LEAST_TRACED:
            left = "".join(f" ({note})" for note in notes_of(trace, "the file"))
            raise ValueError(f"{path}: {len(trace)} tokens, at least {LEAST_TRACED} are needed{left}")
        if len(trace) > MOST_TRACED:
            notes.append(
                f"{path.name}: every {len(trace) / MOST_TRACED:.1f}th batch of its {len(trace)} tokens is taken"
            )
            starts = np.linspace(0, len(trace) - BATCH, MOST_TRACED // BATCH).astype(int)
            trace = trace[(starts[:, None] + np.arange(BATCH)).ravel()]
        parts.append(trace)
    if len({(part.experts.shape[1:], part.num_experts) for part in parts}) > 1:
        raise ValueError(f"the traces are of different models: {parts[0]}, {parts[1]}")
    fit, test = parts if len(parts) == 2 else fit_and_test(parts[0])
    return *(Choices(part.experts.astype(np.int64), part.num_experts) for part in (fit, test)), notes


def fit_and_test(trace: RoutingTrace, fit_share: float = 0.5) -> tuple[RoutingTrace, RoutingTrace]:
    """(first part, rest): placements are fitted on the one and judged on the other, as time runs."""
    cut = round(len(trace) * fit_share)
    if not 0 < cut < len(trace):
        raise ValueError(f"a trace of {len(trace)} tokens cannot be parted at {fit_share:g}: both parts need tokens")
    return trace[:cut], trace[cut:]


def capacity_choices(choices: Choices, factor: float, reroute: bool) -> Choices:
    """The choices under a capacity per expert and batch; without gates those of earlier tokens stay."""
    experts, kept = choices.experts.astype(np.int64), np.ones(choices.experts.shape, bool)
    num_tokens, num_layers, top_k = experts.shape
    for start in range(0, num_tokens, BATCH):
        rows = slice(start, start + BATCH)
        for l in range(num_layers):
            some = experts[rows, l]
            gates = np.zeros((len(some), choices.num_experts)) if choices.gates is None else choices.gates[rows, l]
            capacity = expert_capacity(len(some), top_k, choices.num_experts, factor)
            drop = "position" if choices.gates is None else "score"
            experts[rows, l], kept[rows, l] = limit_slots(some, gates, capacity, drop, reroute)
    return Choices(experts, choices.num_experts, choices.gates, kept)


def biased_choices(choices: Choices, bias) -> Choices:
    """The k highest gates x exp(bias): as with a bias [L, E] on the logits."""
    top_k = choices.experts.shape[2]
    chosen = np.argpartition(choices.gates * np.exp(bias), -top_k, axis=2)[..., -top_k:]
    return Choices(chosen, choices.num_experts, choices.gates)


def learn_bias(choices: Choices, placement: Placement, steps: int = 12) -> np.ndarray:
    """float [L, E]: the bias that levels the placement's devices on these tokens, in damped steps."""
    bias = np.zeros((choices.experts.shape[1], choices.num_experts))
    for _ in range(steps):
        bias += fit_bias(biased_choices(choices, bias).loads(), 0.4, placement)
    return bias


def placements(fit: Choices, num_devices: int, redundant: int) -> dict[str, Placement]:
    """By every strategy, fitted on `fit`: the model's output stays."""
    loads, pairs = fit.loads(), coactivation(fit.experts, fit.num_experts)
    return {
        name: place_experts(loads, num_devices, name, redundant * (name == "replicated"), coactivation=pairs)
        for name in ("contiguous", "round-robin", "balanced", "replicated", "affinity")
    }


def compare(fit: Choices, test: Choices, num_devices: int, redundant: int, costs: Costs) -> list[Outcome]:
    """Every remedy, fitted on `fit` and judged on `test`; costs are those of moving experts."""
    placed = placements(fit, num_devices, redundant)
    first = placed["contiguous"]
    prices = {"replicated": f"+{redundant / fit.num_experts:.0%} experts held"}
    outcomes = []
    for name, placement in placed.items():
        outcomes.append(_judge(name, placement, fit, test, prices.get(name, "")))
        if name == "affinity":
            outcomes[-1].figures = _against_bound(placement, placed["balanced"], fit, test)
    for reroute in (False, True):
        if reroute and test.gates is None:
            continue
        name = "cap and re-route" if reroute else "cap and drop"
        under = [capacity_choices(part, CAPACITY, reroute) for part in (fit, test)]
        lost, moved = 1 - under[1].kept.mean(), (under[1].experts != test.experts)[under[1].kept].mean()
        outcomes.append(_judge(name, first, *under, f"{moved:.1%} re-routed" if reroute else f"{lost:.1%} dropped"))
    if test.gates is not None:
        bias = learn_bias(fit, first)
        under = [biased_choices(part, bias) for part in (fit, test)]
        same = (under[1].experts[..., None] == test.experts[..., None, :]).any(axis=3)
        outcomes.append(_judge("load-aware router", first, *under, f"{1 - same.mean():.1%} re-chosen"))
    outcomes.append(rebalanced(placed["balanced"], fit, test, costs))
    return outcomes


def rebalanced(placement: Placement, fit: Choices, test: Choices, costs: Costs) -> Outcome:
    """`placement` kept up to date while the test tokens come: moves that repay their pause, nothing else."""
    every = max(BATCH, len(test.experts) // MOST_LOOKS)
    watcher = Rebalancer(placement, costs, every, half_life=2 * every, horizon_tokens=2 * every)
    watcher.learn(fit.loads(), len(fit.experts))
    device_loads, devices, plans = [], [], []
    for batch in test.batches():
        device_loads.append(watcher.placement.device_loads(batch.loads()))
        devices.append(served(watcher.placement, batch))
        plan = watcher.observe(batch.loads(), len(batch.experts))
        plans += [plan] if plan else []
    moved = {"moves": sum(len(p.moves) for p in plans), "bytes": sum(p.bytes for p in plans),
             "pause_seconds_modelled": sum(p.pause_seconds for p in plans),
             "gain_seconds_modelled": sum(p.gain_seconds for p in plans)}  # fmt: skip
    price = f"{moved['moves']} moves, {moved['pause_seconds_modelled'] * 1e3:.1f} ms" if plans else "no move pays"
    fitted = np.concatenate([placement.device_loads(batch.loads()) for batch in fit.batches()])
    return _outcome("rebalancing", watcher.placement, test, fitted,
                    np.concatenate(device_loads), fan_out(np.concatenate(devices)).mean(), price, moved)  # fmt: skip


def _against_bound(placement, balanced, fit, test):
    """How much fuller than balanced's the fullest device is, in the layer where it is most: on both parts.

    The bound holds where the placement was fitted. On other tokens both are off, and not in the same way.
    """
    over = {}
    for part, loads in (("fit", fit.loads()), ("test", test.loads())):
        fullest = [p.device_loads(loads).max(axis=1) for p in (placement, balanced)]
        over[f"fullest_over_balanced_{part}"] = float((fullest[0] / fullest[1]).max() - 1)
    return {"balance_bound": placement.metadata["balance_bound"], **over}


def served(placement: Placement, choices: Choices) -> np.ndarray:
    """int [T, L, k]: the device of each slot, batch by batch; D for what a limit dropped."""
    steps = np.arange(len(choices.experts)) // BATCH
    device = devices_of_trace(choices.experts, placement.held, steps)
    return device if choices.kept is None else np.where(choices.kept, device, placement.num_devices)


def device_slots(device, num_devices: int) -> np.ndarray:
    """[batches L, D]; slots of each device, batch by batch, in them layer by layer, for what `served` says."""
    batches = (device[start : start + BATCH] for start in range(0, len(device), BATCH))
    return np.concatenate([(batch[..., None] == np.arange(num_devices)).sum(axis=(0, 2)) for batch in batches])


def _judge(remedy, placement, fit, test, price):
    before, device = (served(placement, part) for part in (fit, test))
    touched = fan_out(device).mean() - (device == placement.num_devices).any(axis=2).mean()  # nobody is no device
    fitted, judged = (device_slots(each, placement.num_devices) for each in (before, device))
    return _outcome(remedy, placement, test, fitted, judged, touched, price, {})


def _outcome(remedy, placement, choices, fitted, device_loads, touched, price, figures):
    layers = placement.num_layers  # loads come batch by batch, layer by layer
    return Outcome(
        remedy,
        placement,
        choices,
        balancedness_fit=balancedness(fitted, "aggregate"),
        balancedness_test=balancedness(device_loads, "aggregate"),
        balancedness_fit_per_layer=np.array([balancedness(fitted[l::layers], "aggregate") for l in range(layers)]),
        fan_out=float(touched),
        price=price,
        figures=figures,
    )
