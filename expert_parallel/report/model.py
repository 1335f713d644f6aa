"""The report of `model_analysis.py`: what is in a model, and what it needs on N devices. Speed: projection.py.

Dimensions: L MoE layers, E experts, k chosen per token, D devices. Every function gives tables, whose sections make
up the JSON. Figures are modelled from the configuration unless a title says otherwise.
"""

from __future__ import annotations

from ..models.architecture import Architecture, Part, fewest_devices, fullest_device_bytes, hybrid_rest_bytes
from ..models.configurations import Configuration
from .table import Figure, Table, columns, size

DEVICES = (1, 2, 4, 8, 16, 32, 64)


def billions(count: float) -> str:
    """Parameters for people: 30.53 B, 4.72 M."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f}"


# --- what is in it ------------------------------------------------------------------------------------------


def architecture(described: Architecture, configuration: Configuration, context: int) -> list[Table]:
    """Layers (identical ones folded), parts, expert shapes, active parameters and bytes, caches."""
    weighed, published = described.bytes, configuration.published
    said = {key: f" (published: {billions(published[key])})" if published else "" for key in ("total", "active")}
    dense = len(described.layers) - described.num_moe_layers
    experts, chosen = described.num_experts, described.chosen
    one = f"{int(described.demand.expert_parameters[0]):,} parameters"
    at_context = described.cache_bytes_at(context)
    source = f"{published['repository']}: {published['source']}" if published else None
    facts = [
        Figure("model_type", "type", described.model_type, f"{{}}, {described.quantisation}"),
        Figure("num_layers", "layers", len(described.layers),
               f"{{}}, {described.num_moe_layers if dense else 'all'} of them MoE"),
        Figure("num_experts", "experts", experts, f"{{}} a layer, {chosen} chosen per token ({chosen / experts:.2%})"),
        Figure("parameters", "parameters", described.whole.parameters, f"{{:,}}{said['total']}"),
        Figure("active_parameters", "active per token", described.active.parameters, f"{{:,}}{said['active']}"),
        Figure("bytes", "bytes", weighed.total, "{:,} B"),
        Figure("expert_bytes", "experts, all", weighed.experts, "{:,} B"),
        Figure("rest_bytes", "all else", weighed.rest, "{:,} B"),
        Figure("bytes_of_one_expert", "one expert", int(weighed.expert_bytes[0]), f"{{:,}} B, {one}"),
        Figure("bytes_read_per_token", "read per token", described.read_per_token.bytes,
               "{:,} B (of the embedding table one row)"),
        Figure("cache_bytes_per_token", "keys and values", described.cache_per_token,
               f"{{:,}} B a token, {size(at_context)} at {context:,} tokens"),
        Figure(None, "note", published.get("note")),
        Figure(None, "published by", source),
    ]  # fmt: skip
    more = {
        "name": described.name, "quantisation": described.quantisation, "num_moe_layers": described.num_moe_layers,
        "hidden": described.hidden, "top_k": chosen, "published": published or None, "context": context,
        "cache_bytes_at_context": at_context, "active_bytes": described.active.bytes,
        "parameters_of_one_expert": int(described.demand.expert_parameters[0]),
        "expert_weights": {n: {"shape": s, "dtype": d} for n, (s, d) in described.expert_shapes.items()},
    }  # fmt: skip
    facts += [Figure(key, None, value) for key, value in more.items()]
    layers, parts = _folded(described.layers), _all_parts(described)
    shapes = [{"name": name, "shape": s, "dtype": d} for name, (s, d) in described.expert_shapes.items()]
    return [
        Table(described.name, facts, "architecture", "modelled: no weights were read", facts=True),
        Table(
            "Layers, one line for those alike",
            [Figure("layers", None, layers)]
            + columns(layers, ("layers", "numbers", numbers_text), ("kind", "kind", "{}"),
                      ("attention", "attention", "{}"), ("parameters", "parameters_each", billions),
                      ("bytes", "bytes_each", size),
                      ("experts", "expert_bytes_each", lambda value: size(value) if value else "")),
            "architecture",
        ),
        Table(
            "Parts over all layers",
            [Figure("parts", None, {row["name"]: {k: row[k] for k in ("parameters", "bytes")} for row in parts})]
            + columns(parts, ("part", "name", "{}"), ("parameters", "parameters", billions), ("bytes", "bytes", size),
                      ("share", "share", "{:.2%}")),
            "architecture",
        ),
        Table("Expert weights of a layer", columns(shapes, ("tensor", "name", "{}"), ("shape", "shape", "{}"),
                                                   ("type", "dtype", "{}"))),
    ]  # fmt: skip


def _folded(layers) -> list[dict]:
    """Identical layers as one row with their numbers, in the order in which each kind comes first."""
    alike: dict[tuple, list] = {}
    for layer in layers:
        alike.setdefault((layer.moe, layer.attention, tuple(sorted(layer.parts.items(), key=str))), []).append(layer)
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


def _all_parts(described) -> list[dict]:
    total: dict[str, Part] = {}
    for parts in (described.outside, *(layer.parts for layer in described.layers)):
        for name, part in parts.items():
            total[name] = total.get(name, Part()) + part
    rows = [{"name": n, "parameters": p.parameters, "bytes": p.bytes, "share": p.bytes / described.bytes.total}
            for n, p in total.items()]  # fmt: skip
    return sorted(rows, key=lambda row: -row["bytes"])


def numbers_text(numbers: list[int]) -> str:
    """[0, 1, 2] is "0-2"; [0, 2, 4, 6, 8] is "5: 0, 2, 4, ..."."""
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
    return f"{len(numbers)}: {', '.join(map(str, numbers[:3]))}{', ...' if len(numbers) > 3 else ''}"


# --- what it needs ------------------------------------------------------------------------------------------


def memory(described: Architecture, redundant: int = 0, devices=DEVICES) -> tuple[list[Table], list[dict]]:
    """Bytes of the fullest device for each number of devices, the rest replicated and sharded; and the rows."""
    weighed, rows, failed = described.bytes, [], {}
    for count in (count for count in devices if count <= weighed.num_experts):
        row = {
            "devices": count,
            "experts_per_layer": -(-weighed.num_experts // count),
            "expert_bytes": fullest_device_bytes(weighed, count, rest=0),
            "replicated_rest_bytes": fullest_device_bytes(weighed, count),
        }
        row["reduction"] = weighed.total / row["replicated_rest_bytes"]
        if redundant and count > 1:
            row["with_copies_bytes"] = fullest_device_bytes(weighed, count, redundant=redundant)
        rest = None
        if not any(count % other == 0 for other in failed):  # what does not divide over 8 does not over 16 either
            try:
                rest = hybrid_rest_bytes(described.model, count) if count > 1 else weighed.rest
            except ValueError as error:
                failed[count] = str(error)
        row["hybrid_bytes"] = None if rest is None else fullest_device_bytes(weighed, count, rest=rest)
        rows.append(row)
    reason = next((f"{count} devices: {why}" for count, why in failed.items()), None)
    wanted = [
        ("devices", "devices", "{}"),
        ("experts", "experts_per_layer", "{}"),
        ("experts only", "expert_bytes", size),
        ("+ rest on each", "replicated_rest_bytes", size),
        ("less", "reduction", "{:.2f}x"),
        ("hybrid", "hybrid_bytes", size),
    ]
    wanted += [(f"+{redundant} copies", "with_copies_bytes", size)] if redundant else []
    figures = {"devices": rows, "redundant_experts": redundant, "hybrid_not_possible": reason}
    data = [Figure(key, None, value) for key, value in figures.items()]
    tables = [Table("Memory of the fullest device", columns(rows, *wanted) + data, "memory", "modelled")]
    if reason:
        tables.append(Table("No hybrid", [Figure(None, "from here on", reason)], facts=True))
    return tables, rows


def fit(described: Architecture, device_bytes: float, context: int, devices=DEVICES) -> Table:
    """How many devices of a size hold weights and cache; what fewer of them lack."""
    weighed, cache = described.bytes, described.cache_bytes_at(context)
    needed = fewest_devices(weighed, device_bytes, besides=cache)
    least = fullest_device_bytes(weighed, weighed.num_experts) + cache
    lacking = [
        {"devices": count, "lacks_bytes": round(fullest_device_bytes(weighed, count) + cache - device_bytes)}
        for count in devices
        if count <= weighed.num_experts and (needed is None or count < needed)
    ]
    answer = f"{needed} hold the model" if needed else f"none: {size(least)} is the least"
    figures = [Figure(None, "fewest devices", answer)]
    figures += [
        Figure(None, f"{row['devices']} devices", row["lacks_bytes"], lambda v: f"{size(v)} short") for row in lacking
    ]
    data = {"device_bytes": device_bytes, "cache_bytes": cache, "context": context, "fewest_devices": needed,
            "lacking": lacking, "smallest_device_bytes": least}  # fmt: skip
    figures += [Figure(key, None, value) for key, value in data.items()]
    title = f"Devices of {size(device_bytes)}, with the cache of {context:,} tokens"
    return Table(title, figures, "fit", "modelled", facts=True)
