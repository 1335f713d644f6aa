"""The report of `model_analysis.py`: what is in a model, and what it needs on N devices; projection.py goes on.

Dimensions: L MoE layers, E experts, k chosen per token, D devices. Every function gives tables, whose sections make
up the JSON. All figures are modelled from the configuration.
"""

from __future__ import annotations

from ..models.architecture import Architecture, Part, fewest_devices, fullest_device_bytes, hybrid_rest_bytes
from ..models.configurations import Configuration
from .table import Figure, Table, facts, of_records, size

KV = "kv: heads of keys and values"
HYBRID = "hybrid: all but the experts split over devices (--attention sharded)"


def billions(count: float) -> str:
    """Parameters for people: 30.53 B, 4.72 M."""
    unit, name = next(((u, n) for u, n in ((1e9, " B"), (1e6, " M"), (1e3, " k")) if count >= u), (None, ""))
    return f"{count / unit:.2f}{name}" if name else f"{count:.0f}"


def numbers_text(numbers: list[int]) -> str:
    """[0, 1, 2] is "0-2"; [0, 2, 4, 6, 8] is "5: 0, 2, 4, ..."."""
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
    return f"{len(numbers)}: {', '.join(map(str, numbers[:3]))}{', ...' if len(numbers) > 3 else ''}"


# --- what is in it ------------------------------------------------------------------------------------------


def architecture(described: Architecture, configuration: Configuration, context: int) -> list[Table]:
    """Layers (identical ones folded), parts, expert shapes, active parameters and bytes, caches."""
    return [
        _overview(described, configuration, context),
        of_records(
            "Layers, one line for those alike",
            "layers",
            _folded(described.layers),
            ("numbers", "layers", numbers_text),
            ("kind", "kind"),
            ("attention", "attention"),
            ("parameters_each", "parameters", billions),
            ("bytes_each", "bytes", size),
            (lambda row: size(row["expert_bytes_each"]) if row["expert_bytes_each"] else "", "expert bytes"),
            section="architecture",
            note=KV if any("kv)" in layer.attention for layer in described.layers) else "",
        ),
        of_records(
            "Parts over all layers",
            "parts",
            _all_parts(described),
            ("name", "part"),
            ("parameters", "parameters", billions),
            ("bytes", "bytes", size),
            (lambda part: part["bytes"] / described.bytes.total, "share", "{:.2%}"),
            section="architecture",
        ),
        of_records(
            "Expert weights of a layer",
            "expert_weights",
            {name: {"shape": shape, "dtype": dtype} for name, (shape, dtype) in described.expert_shapes.items()},
            ("name", "tensor"),
            ("shape", "shape"),
            ("dtype", "type"),
            section="architecture",
        ),
    ]


def _overview(described, configuration, context) -> Table:
    weighed, published, demand = described.bytes, configuration.published, described.demand
    experts, chosen, layers = described.num_experts, described.chosen, len(described.layers)
    moe = "all" if described.num_moe_layers == layers else described.num_moe_layers
    total, active = (f" (published: {billions(published[key])})" if published else "" for key in ("total", "active"))
    parameters, at_context = int(demand.expert_parameters[0]), described.cache_bytes_at(context)
    makers = f"{published['repository']}: {published['source']}" if published else None
    figures = [
        Figure("model_type", "type", described.model_type, lambda kind: f"{kind}, {described.quantisation}"),
        Figure("num_layers", "layers", layers, f"{{}}, {moe} of them MoE"),
        Figure("num_experts", "experts", experts, f"{{}} a layer, {chosen} chosen per token ({chosen / experts:.2%})"),
        Figure("parameters", "parameters", described.whole.parameters, f"{{:,}}{total}"),
        Figure("active_parameters", "active per token", described.active.parameters, f"{{:,}}{active}"),
        Figure("bytes", "bytes", weighed.total, "{:,} B"),
        Figure("expert_bytes", "experts, all", weighed.experts, "{:,} B"),
        Figure("rest_bytes", "all else", weighed.rest, "{:,} B"),
        Figure("bytes_of_one_expert", "one expert", int(weighed.expert_bytes[0]),
               f"{{:,}} B, {parameters:,} parameters"),
        Figure("bytes_read_per_token", "read per token", described.read_per_token.bytes,
               "{:,} B (of the embedding table one row)"),
        Figure("cache_bytes_per_token", "keys and values", described.cache_per_token,
               f"{{:,}} B a token, {size(at_context)} at {context:,} tokens"),
        Figure(None, "note", published.get("note")),
        Figure(None, "published by", makers),
    ]  # fmt: skip
    also = {
        "name": described.name, "quantisation": described.quantisation, "num_moe_layers": described.num_moe_layers,
        "hidden": described.hidden, "top_k": chosen, "published": published or None, "context": context,
        "cache_bytes_at_context": at_context, "active_bytes": described.active.bytes,
        "parameters_of_one_expert": parameters,
    }  # fmt: skip
    title = f"{described.name} (modelled: no weights were read)"
    return Table(title, figures, "architecture", "modelled: no weights were read", also=also, facts=True)


def _folded(layers) -> list[dict]:
    """Identical layers as one row with their numbers, in the order in which each kind comes first."""
    alike: dict[tuple, list] = {}
    for layer in layers:
        alike.setdefault((layer.moe, layer.attention, frozenset(layer.parts.items())), []).append(layer)
    return [
        {
            "numbers": [layer.number for layer in same],
            "kind": "MoE" if same[0].moe else "dense",
            "attention": same[0].attention,
            "parameters_each": same[0].whole.parameters,
            "bytes_each": same[0].whole.bytes,
            "expert_bytes_each": same[0].parts.get("experts", Part()).bytes,
        }
        for same in alike.values()
    ]


def _all_parts(described) -> dict[str, dict]:
    """{name: {"parameters", "bytes"}} over all layers and what is outside them, the largest first."""
    total: dict[str, Part] = {}
    for parts in (described.outside, *(layer.parts for layer in described.layers)):
        for name, part in parts.items():
            total[name] = total.get(name, Part()) + part
    return {name: vars(part) for name, part in sorted(total.items(), key=lambda entry: -entry[1].bytes)}


# --- what it needs ------------------------------------------------------------------------------------------


def memory(described: Architecture, devices: list[int], redundant: int = 0) -> list[Table]:
    """Bytes of the fullest device for each number of devices, the rest replicated, and sharded by mlx-lm (hybrid)."""
    weighed, rows, failed = described.bytes, [], {}
    for count in devices:
        rest = weighed.rest if count == 1 else None
        if count > 1 and not any(count % other == 0 for other in failed):  # does not divide over 8, nor then over 16
            try:
                rest = hybrid_rest_bytes(described.model, count)
            except ValueError as error:
                failed[count] = str(error)
        row = {
            "devices": count,
            "experts_per_layer": -(-weighed.num_experts // count),
            "expert_bytes": fullest_device_bytes(weighed, count, rest=0),
            "replicated_rest_bytes": fullest_device_bytes(weighed, count),
            "hybrid_bytes": None if rest is None else fullest_device_bytes(weighed, count, rest=rest),
        }
        row["reduction"] = weighed.total / row["replicated_rest_bytes"]
        if redundant and count > 1:
            row["with_copies_bytes"] = fullest_device_bytes(weighed, count, redundant=redundant)
        rows.append(row)
    why, without = next(iter(failed.values()), None), [row["devices"] for row in rows if row["hybrid_bytes"] is None]
    table = of_records(
        "Memory of the fullest device",
        "devices",
        rows,
        ("devices", "devices"),
        ("experts_per_layer", "per layer"),
        ("expert_bytes", "experts only", size),
        ("replicated_rest_bytes", "+ rest on each", size),
        ("reduction", "less", "{:.2f}x"),
        ("hybrid_bytes", "hybrid", size),
        *([("with_copies_bytes", f"+{redundant} copies", size)] if redundant else []),
        section="memory",
        source="modelled",
        note=f"per layer: experts; less: than the whole model, with the rest on each device; {HYBRID}",
        also={"redundant_experts": redundant, "hybrid_not_possible": why},
    )
    on = f"on {', '.join(map(str, without))}"
    return [table, facts("No hybrid (--attention sharded)", {on: why})] if why else [table]


def fit(described: Architecture, devices: list[int], device_bytes: float, context: int) -> Table:
    """How many devices with so much for weights and cache hold them; what fewer of them lack."""
    weighed, cache = described.bytes, described.cache_bytes_at(context)
    needed = fewest_devices(weighed, device_bytes, besides=cache)
    least = fullest_device_bytes(weighed, weighed.num_experts) + cache
    lacking = {
        n: round(fullest_device_bytes(weighed, n) + cache - device_bytes) for n in devices if n < (needed or n + 1)
    }
    items = {"fewest devices": f"{needed} hold the model" if needed else f"none: {size(least)} is the least"}
    items |= {f"{n} devices": f"{size(lacks)} short" for n, lacks in lacking.items()}
    also = {"fewest_devices": needed, "device_bytes": device_bytes, "cache_bytes": cache, "context": context,
            "smallest_device_bytes": least,
            "lacking": [{"devices": n, "lacks_bytes": lacks} for n, lacks in lacking.items()]}  # fmt: skip
    title = f"Devices of {size(device_bytes)}, with the cache of {context:,} tokens"
    return facts(title, items, section="fit", source="modelled", also=also)
