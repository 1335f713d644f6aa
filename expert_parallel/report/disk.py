"""Experts on disk: what a run hit and read, and what other budgets and policies would have.

Dimensions: T tokens, L MoE layers, E experts, k chosen per token, D devices.
"""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from ..formats.traces import read_trace
from ..layers import moe_layers
from ..offload.budget import parse_budget
from ..offload.prefetch import Foreteller, followers, likeliest
from ..offload.store import OnDisk
from ..serving import devices_of_trace
from ..trace import RoutingTrace
from .table import Figure, Table, of_records, size

SHARES = (0.1, 0.25, 0.4, 0.6, 0.8)  # of the experts, in memory
ALL_POLICIES = ("lru", "lfu", "aging", "belady")
WORDS = (
    "A hit: an expert that a step wants and that is in memory; a step: a token in decoding, a pass over a prompt in"
    " prefill. belady: the bound, who knows the future. Caches start empty, so that first uses miss; at random leaves"
    " that out."
)


def counts(model) -> list[dict] | None:
    """What the caches of this process counted so far, for each of its devices; None where all experts are in memory."""
    layers = moe_layers(model)
    if not isinstance(layers[0].experts.stores[0], OnDisk):
        return None
    tellers = [module for module in model.modules() if isinstance(module, Foreteller)]
    foretold = {"foretold": sum(each.wanted for each in tellers), "foretold_right": sum(each.right for each in tellers)}
    found = []
    for n, device in enumerate(layers[0].experts.devices.tolist()):
        stores = [layer.experts.stores[n] for layer in layers]
        found.append(
            {
                "device": device,
                "policy": stores[0].cache.policy,
                "prefetch": bool(tellers),
                "process_bytes_from_device": stores[0].from_device,
                "places": [len(store.cache.held) for store in stores],
                "experts": [len(store.ids) for store in stores],
                "hits": [store.cache.hits for store in stores],
                "misses": [store.cache.misses for store in stores],
                "pinned": [np.flatnonzero(np.isinf(store.cache.claim)).tolist() for store in stores],
                "reads": [asdict(store.reads) for store in stores],
                **foretold,
            }
        )
    return found


def of_run(
    trace: RoutingTrace, held: np.ndarray, devices: list[dict], layer_numbers, seconds, ranks=False
) -> list[Table]:
    """Hits, reads and waiting of a run whose experts lay on disk.

    held     bool [L, D, E]
    devices  `counts` of all devices, taken when the answer was there
    seconds  that the answer took
    ranks    whether each device is a process of its own
    """
    # 1. The same run again without tensors, by the cache's own policy and by the optimum; by phase.
    served = devices_of_trace(trace.experts, held, trace.steps)
    own, best = (
        sum(_replayed(trace, served, each, policy) for each in devices) for policy in (devices[0]["policy"], "belady")
    )
    prefill = trace.prefill[np.flatnonzero(np.diff(trace.steps, prepend=-1))]
    phases = {"prefill": prefill, "decode": ~prefill}
    rows = [
        {
            "phase": name,
            "tokens": len(trace.phase(name)),
            "wanted": own[1, steps].sum() / max(1, len(trace.phase(name)) * trace.experts.shape[1]),
            "hit_rate": _rate(own[:, steps]),
            "belady": _rate(best[:, steps]),
        }
        for name, steps in phases.items()
        if steps.any()
    ]
    # 2. What was counted while it ran.
    hits, misses, places, experts = (
        np.sum([each[key] for each in devices], axis=0) for key in ("hits", "misses", "places", "experts")
    )
    reads = {key: sum(read[key] for each in devices for read in each["reads"]) for key in devices[0]["reads"][0]}
    total, tokens = reads["bytes"] + reads["bytes_ahead"], max(1, len(trace))
    rate = hits.sum() / max(1, hits.sum() + misses.sum())
    chance = Figure("hit_rate_if_kept_at_random_modelled", "kept at random", places.sum() / experts.sum(), "{:.3f}")
    asked = devices[0]["foretold"]
    processes = {each["device"] if ranks else 0: each["process_bytes_from_device"] for each in devices}
    from_device = None if None in processes.values() else sum(processes.values())
    recall = devices[0]["foretold_right"] / asked if asked else None
    guess = Figure(
        "prefetch_recall_by_chance_modelled", "guessed", trace.experts.shape[2] / trace.num_experts, "{:.3f}"
    )
    speed = f", for {size(reads['bytes'])}" if reads["bytes"] and not asked else ""
    overall = [
        Figure("policy", "policy", devices[0]["policy"]),
        Figure("places", "in memory", int(places.sum()), lambda n: f"{n:,} of {experts.sum():,} experts of all layers"),
        Figure("hit_rate", "hit rate", rate, "{:.3f}", beside=chance),
        Figure("bytes_read_per_token", "read per token", total / tokens, size),
        Figure("bytes_from_device", "had from disks, by Linux", from_device, size),
        Figure("seconds_waited", "computing waited for reads", reads["seconds_waited"],
               lambda waited: f"{waited:.2f} of {seconds:.2f} s{speed}"),
        Figure("prefetch_recall", "foretold of what was wanted", recall, "{:.3f}", beside=guess),
        Figure("experts_read_ahead", "read ahead", reads["experts_ahead"] or None,
               lambda n: f"{n:,} experts, of which the next step wanted {reads['useful']:,}"),
    ]  # fmt: skip
    also = {"hits": int(hits.sum()), "misses": int(misses.sum()), "bytes_read": total, "reads": reads, "tokens": tokens}
    also |= {"seconds": seconds, "by_device": devices}
    # 3. By layer, and what other budgets and policies would hit on the same tokens.
    per_layer = [
        Figure(None, "layer", layer_numbers),
        Figure("places_per_layer", "in memory", places),
        Figure("hit_rate_per_layer", "hit rate", hits / np.maximum(1, hits + misses), "{:.3f}"),
        Figure("belady_per_layer_simulated", "belady (simulated)", _rate(best, axis=1), "{:.3f}"),
        Figure("misses_per_layer", "misses", misses),
    ]
    how = "replayed" if not devices[0]["prefetch"] else "replayed without reading ahead"
    return [
        Table("Experts on disk (measured)", overall, "cache", "measured", also=also, facts=True),
        of_records(
            f"Hit rate by phase ({how}, simulated)",
            "phases",
            rows,
            ("phase", "phase"),
            ("tokens", "tokens"),
            ("wanted", "distinct experts a token and layer", "{:.1f}"),
            ("hit_rate", "hit rate", "{:.3f}"),
            ("belady", "belady", "{:.3f}"),
            section="cache",
            note=WORDS,
        ),
        Table("Hit rate by layer (measured)", per_layer, "cache.layers", "measured", first=hits - misses, detail=True,
              order="fewest hits"),
        budgets(trace, detail=True),
    ]  # fmt: skip


def of_trace(paths, num_experts: int | None, asked: str, expert_bytes: str, disk: float) -> list[Table]:
    """What recorded tokens say of experts on disk, without a model; of two traces the second is judged on.

    num_experts  E, where the files do not say
    asked        "10%,25%,4GB", for experts of `expert_bytes` ("2.65MB") in all layers
    disk         GB/s that they are read with
    """
    traces = [read_trace(path, num_experts) for path in paths]  # whole: a cache remembers what came before
    one, judged = parse_budget(expert_bytes)[0], traces[-1]
    whole = one * judged.experts.shape[1] * judged.num_experts
    shares = [n if is_share else n / whole for n, is_share in map(parse_budget, asked.split(","))]
    tables = [budgets(judged, shares, expert_bytes=one, disk=disk * 1e9), _reuse(judged)]
    return tables + ([_foretold(*traces)] if len(traces) > 1 and judged.experts.shape[1] > 1 else [])


def budgets(trace: RoutingTrace, shares=SHARES, detail: bool = False, expert_bytes=None, disk=None) -> Table:
    """Hit rate over the budget by policy, a cache a layer on one device, simulated on a trace's tokens.

    shares        of the experts that are in memory
    expert_bytes  of one expert;  disk  bytes per second: what the best policy's reads take a token
    """
    from ..offload.replay import replay

    T, L, k = trace.experts.shape
    rows = []
    for share in shares:
        places = min(max(1, int(share * trace.num_experts)), trace.num_experts)
        found = {policy: replay(trace, places, policy) for policy in ALL_POLICIES}
        row = {"places": places, "chance": places / trace.num_experts}
        row |= {policy: float(_rate(each)) for policy, each in found.items()}
        if expert_bytes:
            best = max(ALL_POLICIES[:-1], key=row.get)
            read = expert_bytes * float((found[best][1] - found[best][0]).sum()) / max(1, T)
            row |= {"bytes": places * L * expert_bytes, "best": best, "read": read, "milliseconds": 1e3 * read / disk}
        rows.append(row)
    cost = [("bytes", "memory", size), ("read", "read/token", size), ("milliseconds", "ms/token", "{:.1f}")]
    more = (
        f" read/token and ms/token: of the best but belady, at {disk / 1e9:g} GB/s (assumed)." if expert_bytes else ""
    )
    return of_records(
        f"Hit rate over budget (simulated, {T} tokens, one device)",
        "budgets",
        rows,
        ("places", f"of {trace.num_experts}"),
        ("chance", "at random", "{:.3f}"),
        *((policy, policy, "{:.3f}") for policy in ALL_POLICIES),
        *(cost if expert_bytes else ()),
        section="cache",
        note=f"{WORDS}{more}",
        detail=detail,
    )


def _reuse(trace: RoutingTrace) -> Table:
    """How many steps lie between two uses of an expert."""
    gaps = reuse(trace)
    most, far = (float(np.quantile(gaps, share)) if len(gaps) else None for share in (0.5, 0.9))
    even = trace.num_experts / trace.experts.shape[2]
    figures = [
        Figure("median_steps", "half within", most, "{:.0f} steps"),
        Figure("ninth_tenth_steps", "nine in ten within", far, "{:.0f} steps"),
        Figure("mean_steps_if_in_turn", "if experts came in turn (modelled)", even, "{:.0f} steps"),
    ]
    return Table("Steps between two uses of an expert (measured)", figures, "cache.reuse", "measured", facts=True)


def reuse(trace: RoutingTrace) -> np.ndarray:
    """Steps between two uses of the same expert of a layer, of all such pairs."""
    gaps = []
    step = np.searchsorted(np.unique(trace.steps), trace.steps)
    for l in range(trace.experts.shape[1]):
        uses = np.unique(trace.experts[:, l].astype(np.int64) * (len(step) + 1) + step[:, None])  # by expert, then step
        expert, at = np.divmod(uses, len(step) + 1)
        gaps.append(np.diff(at)[np.diff(expert) == 0])
    return np.concatenate(gaps)


def _foretold(fit: RoutingTrace, test: RoutingTrace) -> Table:
    T, L, k = test.experts.shape
    right = 0
    for l, follow in enumerate(followers(fit)):
        told = likeliest(follow, test.experts[:, l].astype(np.int64))
        right += int((told[:, :, None] == test.experts[:, l + 1, None]).any(axis=1).sum())
    chance = Figure("recall_by_chance_modelled", "guessed", k / test.num_experts, "{:.3f}")
    recall = Figure("recall", "of the next layer's experts", right / max(1, T * (L - 1) * k), "{:.3f}", beside=chance)
    title = "Foretold by the other trace's pairs (simulated, on the test trace)"
    return Table(title, [recall], "cache.foretold", "simulated", facts=True)


def _replayed(trace, served, device, policy) -> np.ndarray:
    """Hits and wanted experts [2, S, L] of one device's caches."""
    from ..offload.replay import replay

    pinned = device["pinned"] if policy == "pinned" else None
    return replay(trace, device["places"], policy, pinned, served == device["device"])


def _rate(found, axis=None):
    hits, wanted = (each.sum(axis=0) if axis else each.sum() for each in found)
    return hits / np.maximum(1, wanted)
