"""Tables of `model_analysis.py` from its figures."""

from __future__ import annotations

from rich.console import Group

from .report import facts, size, table


def billions(count: float) -> str:
    """Parameters for people: 30.53 B, 4.72 M."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f}"


def speed(tokens_per_second: float) -> str:
    """1754, 65.8 or 0.0123: as many digits as say something."""
    return (
        f"{tokens_per_second:.{1 if tokens_per_second >= 10 else 3}f}"
        if tokens_per_second < 1000
        else f"{tokens_per_second:.0f}"
    )


def model_tables(figures: dict) -> list:
    """Of `architecture_figures`."""
    published = figures["published"]
    said = f" (published: {billions(published['total'])})" if published else ""
    said_active = f" (published: {billions(published['active'])})" if published else ""
    dense = figures["num_layers"] - figures["num_moe_layers"]
    items = {
        "type": f"{figures['model_type']}, {figures['quantisation']}",
        "layers": f"{figures['num_layers']}, {figures['num_moe_layers'] if dense else 'all'} of them MoE",
        "experts": f"{figures['num_experts']} a layer, {figures['top_k']} chosen per token"
        f" ({figures['top_k'] / figures['num_experts']:.2%})",
        "parameters": f"{figures['parameters']:,}{said}",
        "active per token": f"{figures['active_parameters']:,}{said_active}",
        "bytes": f"{figures['bytes']:,} B",
        "experts, all": f"{figures['expert_bytes']:,} B",
        "all else": f"{figures['rest_bytes']:,} B",
        "one expert": f"{figures['bytes_of_one_expert']:,} B, {figures['parameters_of_one_expert']:,} parameters",
        "read per token": f"{figures['bytes_read_per_token']:,} B (of the embedding table one row)",
        "keys and values": f"{figures['cache_bytes_per_token']:,} B a token,"
        f" {size(figures['cache_bytes_at_context'])} at {figures['context']:,} tokens",
        "note": published.get("note") if published else None,
        "published by": f"{published['repository']}: {published['source']}" if published else None,
    }
    layers = [
        (
            numbers_text(row["numbers"]),
            row["kind"],
            row["attention"],
            billions(row["parameters_each"]),
            size(row["bytes_each"]),
            size(row["expert_bytes_each"]) if row["expert_bytes_each"] else "",
        )
        for row in figures["layers"]
    ]
    parts = [
        (name, billions(part["parameters"]), size(part["bytes"]), f"{part['bytes'] / figures['bytes']:.2%}")
        for name, part in figures["parts"].items()
    ]
    shapes = [(name, weight["shape"], weight["dtype"]) for name, weight in figures["expert_weights"].items()]
    return [
        facts(f"{figures['name']} (modelled: no weights were read)", items),
        table(
            "Layers, one line for those alike",
            "layers",
            "kind",
            "attention",
            "parameters",
            "bytes",
            "experts",
            rows=layers,
        ),
        table("Parts over all layers", "part", "parameters", "bytes", "share", rows=parts),
        table("Expert weights of a layer", "tensor", "shape", "type", rows=shapes),
    ]


def numbers_text(numbers: list[int]) -> str:
    """[0, 1, 2] is "0-2"; [0, 2, 4, 6, 8] is "5: 0, 2, 4, ..."."""
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
    return f"{len(numbers)}: {', '.join(map(str, numbers[:3]))}{', ...' if len(numbers) > 3 else ''}"


def memory_tables(figures: dict, fit: dict | None) -> list:
    """Of `memory_figures` and `fit_figures`."""
    copies = figures["redundant_experts"]
    rows = [
        (
            row["devices"],
            row["experts_per_layer"],
            size(row["expert_bytes"]),
            size(row["replicated_rest_bytes"]),
            f"{row['reduction']:.2f}x",
            size(row["hybrid_bytes"]) if row["hybrid_bytes"] else "-",
            *([size(row["with_copies_bytes"]) if "with_copies_bytes" in row else ""] if copies else []),
        )
        for row in figures["devices"]
    ]
    columns = ["devices", "experts", "experts only", "+ rest on each", "less", "hybrid"]
    columns += [f"+{copies} copies"] if copies else []
    result = [table("Memory of the fullest device (modelled)", *columns, rows=rows)]
    if figures["hybrid_not_possible"]:
        result.append(facts("No hybrid", {"from here on": figures["hybrid_not_possible"]}))
    if fit:
        needed, device = fit["fewest_devices"], size(fit["device_bytes"])
        items = {f"{row['devices']} devices": f"{size(row['lacks_bytes'])} short" for row in fit["lacking"]}
        answer = f"{needed} hold the model" if needed else f"none: {size(fit['smallest_device_bytes'])} is the least"
        title = f"Devices of {device}, with the cache of {fit['context']:,} tokens (modelled)"
        result.append(facts(title, {"fewest devices": answer, **items}))
    return result


def projection_tables(figures: dict, cases: dict | None) -> list:
    """Of `projection_figures` and `original_cases`."""
    rows = [
        (
            f"{row['devices']}{'' if row['fits'] else ' *'}",
            speed(row["tokens_per_second"]),
            f"{row['speed_up']:.2f}x",
            speed(row["tokens_per_second_if_even"]),
            speed(row["hybrid_tokens_per_second"]) if "hybrid_tokens_per_second" in row else "-",
            speed(row["prompt_tokens_per_second"]),
            row["bottleneck"],
        )
        for row in figures["devices"]
    ]
    columns = ("devices", "tokens/s", "speed-up", "if even", "hybrid", "prompt/s", "most time goes to")
    title = f"Projection (modelled): {figures['hardware']}, {figures['link']}, {figures['routing']} routing"
    items = {
        "context": f"{figures['context']:,} tokens before the one that is decoded (--context)",
        "best number": f"{figures['best_devices']}; more devices do not speed decoding up",
        "device": figures["hardware_source"],
        "link": figures["link_source"],
        "*": "does not fit into memory" if not all(row["fits"] for row in figures["devices"]) else None,
    }
    result: list[Group] = [table(title, *columns, rows=rows), facts("What it rests on", items)]
    if cases:
        rows = [
            (case["case"], case["claim"], *(f"{times:.2f}x" for times in case["speed_up"].values()))
            for case in cases["cases"]
        ]
        columns = ("", "claim", *(cases["cases"][0]["speed_up"] if cases["cases"] else ()))
        title = f"The original write-up's projections, on {cases['hardware']} (modelled)"
        result.append(table(title, *columns, rows=rows))
    return result


def checkpoint_tables(figures: dict, most: int = 20) -> list:
    """Of `checkpoint_check.CheckpointReport`."""
    problems = figures["problems"]
    found = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
    items = {
        "verdict": "as the configuration says, whole" if figures["ok"] else found,
        "files": f"{figures['num_files']}, {figures['num_tensors']} tensors, {figures['bytes_on_disk']:,} B",
    }
    if figures["bytes_predicted"] is not None:
        items["predicted"] = f"{figures['bytes_predicted']:,} B; {figures['tensors_equal']} tensors equal"
    result = [facts("Checkpoint (measured on the files' headers)", items)]
    if problems:
        rows = [(problem["kind"], f"{problem['name']}: {problem['words']}") for problem in problems[:most]]
        rows += [("...", f"{len(problems) - most} more, see --json")] if len(problems) > most else []
        result.append(table("Problems", "", "", rows=rows, names=True))
    return result


def forward_tables(figures: dict) -> list:
    """Of `forward_pass`: {"texts": {name: pass_figures}, "domains", "experts", "seconds"}."""

    def shown(value, form):
        return "-" if value is None else format(value, form)

    result = []
    for name, text in figures["texts"].items():
        rows = [
            (
                row["layer"],
                f"{row['entropy']:.3f}",
                shown(row["margin_median"], ".3f"),
                shown(row["margin_lowest_tenth"], ".3f"),
                shown(row["overlap_with_token_before"], ".2f"),
                f"{shown(row['foretold_by_layer_before'], '.2f')} ({shown(row['foretold_by_popularity'], '.2f')})",
                "-" if row["strongest_pair_lift"] is None else "#{} #{}".format(*row["strongest_pair"]),
            )
            for row in text["layers"]
        ]
        columns = ("layer", "entropy", "margin", "lowest 10%", "as before", "foretold (by use)", "strongest pair")
        chance = f"by chance {text['overlap_by_chance']:.2f} as before"
        title = f"Routing of {name} (measured, {text['tokens']} tokens; {chance})"
        result.append(table(title, *columns, rows=rows))
    if len(figures["texts"]) > 1:
        names = list(figures["texts"])
        alike = figures["domains"]["similarity"]
        rows = [(a, *(f"{alike[a][b]:.2f}" for b in names)) for a in names]
        result.append(table("How alike texts use the experts (cosine of loads, measured)", "", *names, rows=rows))
    first = next(iter(figures["texts"].values()))
    by_number = {row["layer"]: row for row in first["layers"]}
    alike = {row["layer"]: row for row in figures["experts"]}
    rows = []
    for number, (prompt, token) in enumerate(zip(*figures["seconds"].values(), strict=True)):
        row, experts = by_number.get(number), alike.get(number)
        sizes = ["-"] * 4
        if row:
            sizes = [f"{row[k]:.3g}" for k in ("input_rms", "input_max", "output_rms", "output_max")]
        cosine = f"{experts['mean_cosine']:.3f} ({experts['most_alike_cosine']:.2f})" if experts else "-"
        rows.append((number, *sizes, cosine, f"{1e3 * prompt:.1f}", f"{1e3 * token:.2f}"))
    columns = ("layer", "input", "largest", "output", "largest", "experts alike", "prompt ms", "token ms")
    result.append(table("Activations, experts and time (measured)", *columns, rows=rows))
    return result


def machine_tables(figures: dict) -> list:
    """Of `measure_here`."""
    machine = figures["machine"]
    rest, experts = size(machine["bytes_per_second"]), size(machine["expert_bytes_per_second"])
    items = {
        "weights moved": f"{rest}/s, of experts {experts}/s",
        "keys and values moved": f"{size(machine['cache_bytes_per_second'])}/s"
        if machine["cache_bytes_per_second"]
        else None,
        "arithmetic": f"{machine['operations_per_second'] / 1e9:.2f} GFLOP/s",
        "fixed cost of a layer": f"{1e6 * machine['layer_seconds']:.0f} us",
    }
    for name, link in figures["links"].items():
        latency, bandwidth = 1e6 * link["latency_seconds"], size(link["bytes_per_second"])
        items[f"link {name}, 2 processes"] = f"{latency:.0f} us a step, {bandwidth}/s"
    items |= {f"link {name}": why for name, why in figures["links_not_measured"].items()}
    return [facts(f"This machine (measured on {figures['layers']} layers with random weights)", items)]
