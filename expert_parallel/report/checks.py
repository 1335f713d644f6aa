"""The report of `model_analysis.py`, concluded: its files, real text through its weights, and this machine."""

from __future__ import annotations

import logging
import os
from dataclasses import replace

from ..checkpoint.finding import context_of
from ..checkpoint.loading import activation_dtype, load_whole
from ..files import plain
from ..layers import moe_layers
from ..models.architecture import Architecture, describe
from ..models.configurations import Configuration
from ..models.forward import load_similarity, routing_figures, run_text, time_layers
from ..models.lazy import fill_randomly, shortened
from ..projection.constants import measure_machine
from ..projection.link_probe import measure_link
from .table import Figure, Table, facts, of_records, size


def checkpoint(figures: dict) -> list[Table]:
    """Of `check_checkpoint`; problems a line each."""
    problems = figures["problems"]
    found = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")

    def of_bytes(name, source=""):
        return "not known" if figures[name] is None else f"{figures[name]:,} B{source}"

    items = {
        "verdict": "whole, as mlx-lm's strict load wants it" if figures["ok"] else found,
        "files": f"{figures['num_files']}, {figures['num_tensors']} tensors, {of_bytes('bytes_on_disk')}",
        "as mlx-lm loads them": of_bytes("bytes_loaded"),
        "from the configuration": of_bytes("bytes_predicted", " (modelled)"),
    }
    verdict = facts("Checkpoint (measured on the files' headers)", items, section="checkpoint", also=figures)
    return [verdict, *([Table("Problems", [Figure(None, "what", problems)])] if problems else [])]


def forward(model: str, texts: dict[str, str], most: int, tell=lambda what: None) -> list[Table]:
    """Of a folder or hub id with weights: routing of each text, and where the first one's time goes.

    most  tokens of each text, which is cut to the model's context
    tell  hears what is under way
    """
    # 1. The model, and as many tokens as it can look at.
    logging.getLogger("transformers").setLevel(logging.ERROR)  # of texts longer than the context: they are cut here
    tell(f"reading {model}")
    model, tokenizer, config = load_whole(model)
    context, numbers = context_of(config) or most, [layer.number for layer in moe_layers(model)]
    tokens = {title: tokenizer.encode(text[: 20 * most])[:most] for title, text in texts.items()}
    # 2. Each text through it.
    traces, figures = {}, {}
    for title, ids in tokens.items():
        tell(f"running {title}, {len(ids[:context])} tokens")
        traces[title], scores = run_text(model, ids[:context], title)
        figures[title] = routing_figures(traces[title], scores, numbers) | {"tokens_cut": len(ids[context:])}
    tell("timing its layers")
    seconds = time_layers(model, next(iter(tokens.values()))[:context])
    return forward_tables(figures, load_similarity(traces), seconds)


def forward_tables(texts: dict[str, dict], similarity: dict, seconds: dict) -> list[Table]:
    """Of models/forward.py: `routing_figures` by text, `load_similarity`, and seconds of each decoder layer."""
    texts = plain(texts)  # what is no number shows as missing
    tables = [_routing_of(name, text) for name, text in texts.items()]
    if len(texts) > 1:
        columns = (("name", ""), *((name, name, "{:.2f}") for name in texts))
        tables.append(
            of_records("How alike texts use the experts (cosine of loads, measured)", None, similarity, *columns)
        )
    columns = [Figure(None, f"{name} ms", [1e3 * s for s in each], "{:.2f}") for name, each in seconds.items()]
    columns.insert(0, Figure(None, "layer", range(len(seconds["prompt"]))))
    also = {"texts": texts, "domains": {"source": "measured", "similarity": similarity}, "seconds": seconds}
    return [*tables, Table("Time of decoder layers", columns, "forward", "measured, with stops", also=also)]


def _routing_of(name: str, text: dict) -> Table:
    rows, chance, cut = text["layers"], text["overlap_by_chance"], text["tokens_cut"]
    by_use = Figure(None, "by use", [row["foretold_by_popularity"] for row in rows], "{:.2f}")
    foretold = [row["foretold_by_layer_before"] for row in rows]
    table = of_records(
        f"Routing of {name} (measured, {text['tokens']} tokens; by chance {chance:.2f} as before)",
        None,
        rows,
        ("layer", "layer"),
        ("entropy", "entropy", "{:.3f}"),
        ("margin_median", "margin", "{:.3f}"),
        ("margin_lowest_tenth", "lowest 10%", "{:.3f}"),
        ("overlap_with_token_before", "as before", "{:.2f}"),
        (
            lambda row: "#{} #{}".format(*row["strongest_pair"]) if row["strongest_pair"] else None,
            "strongest pair",
        ),
        note=f"cut to the model's context, {cut} tokens fewer than asked for" if cut else "",
    )
    table.figures.insert(-1, Figure(None, "foretold", foretold, "{:.2f}", beside=by_use))
    return table


def machine(
    configuration: Configuration, described: Architecture, quantisation: dict, most_bytes=2e9, tell=lambda what: None
):
    """(Machine, {backend: Link}, Table): this machine, fitted on first layers with random weights, and local links.

    tell  hears what is under way
    """
    tell("measuring this machine on layers with random weights")
    dense = next(layer.number for layer in described.layers if layer.moe)
    count = dense + max(1, min(4, int(most_bytes // described.layers[dense].whole.bytes)))
    few = replace(configuration, config=shortened(configuration.config, count), folder=None)  # no weights to look at
    small = describe(few, **quantisation)
    model = fill_randomly(small.model)
    if (dtype := activation_dtype()) is not None:
        model.set_dtype(dtype)
    head = small.outside.get("head") or small.outside["embeddings"]
    found = measure_machine(model, small.demand, head.bytes)
    found = replace(found, memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    links, rows, missing = {}, {}, {}
    for backend in ("ring", "mpi"):
        tell(f"measuring a link between two processes over {backend}")
        try:
            links[backend], rows[backend] = measure_link(backend)
        except ValueError as error:
            missing[backend] = str(error)
    cache = found.cache_bytes_per_second
    items = {
        "weights moved": f"{size(found.bytes_per_second)}/s, of experts {size(found.expert_bytes_per_second)}/s",
        "keys and values moved": f"{size(cache)}/s" if cache else None,
        "arithmetic": f"{found.operations_per_second / 1e9:.2f} GFLOP/s",
        "fixed cost of a layer": f"{1e6 * found.layer_seconds:.0f} us",
    }
    for name, link in links.items():
        words = f"{1e6 * link.latency_seconds:.0f} us a step, {size(link.bytes_per_second)}/s"
        items[f"link {name}, 2 processes"] = words
    items |= {f"link {name}": why for name, why in missing.items()}
    also = {"layers": count, "machine": {k: v for k, v in vars(found).items() if k != "memory_bytes"},
            "links": {name: {"latency_seconds": link.latency_seconds, "bytes_per_second": link.bytes_per_second,
                             "measured": rows[name]} for name, link in links.items()},
            "links_not_measured": missing}  # fmt: skip
    source = f"measured on {count} layers with random weights"
    return found, links, facts("This machine", items, section="this_machine", source=source, also=also)
