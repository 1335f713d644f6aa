"""The rest of `model_analysis.py`'s report: its files, real text through its weights, and this machine."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np

from ..checkpoint.loading import activation_dtype
from ..models.architecture import Architecture, describe
from ..models.configurations import Configuration
from ..models.lazy import fill_randomly, shortened
from ..projection.constants import measure_machine
from ..projection.link_probe import measure_link
from .table import MOST_ROWS, Figure, Table, columns, size


def checkpoint(figures: dict) -> list[Table]:
    """Of `CheckpointReport.figures`."""
    problems = figures["problems"]
    found = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
    tensors = f"{figures['num_files']}, {figures['num_tensors']} tensors, {figures['bytes_on_disk']:,} B"
    facts = [Figure(None, "verdict", "as the configuration says, whole" if figures["ok"] else found)]
    facts += [Figure(None, "files", tensors), *(Figure(key, None, value) for key, value in figures.items())]
    if (predicted := figures["bytes_predicted"]) is not None:
        facts.append(Figure(None, "predicted", f"{predicted:,} B; {figures['tensors_equal']} tensors equal"))
    tables = [Table("Checkpoint", facts, "checkpoint", "measured on the files' headers", facts=True)]
    if problems:
        note = f"{len(problems) - MOST_ROWS} more, see --json" if len(problems) > MOST_ROWS else ""
        shown = columns(problems, ("kind", "kind", "{}"), ("name", "name", "{}"), ("what", "words", "{}"))
        tables.append(Table("Problems", shown, note=note))
    return tables


def forward(texts: dict[str, dict], similarity: dict, seconds: dict) -> list[Table]:
    """Of models/forward.py: pass_figures by text, similarity_of_loads, and seconds of each decoder layer."""
    tables = []
    for name, text in texts.items():
        rows = [
            {
                **row,
                "foretold": "-" if row["foretold_by_layer_before"] is None
                else f"{row['foretold_by_layer_before']:.2f} ({row['foretold_by_popularity']:.2f})",
                "pair": "-" if np.isnan(row["strongest_pair_lift"]) else "#{} #{}".format(*row["strongest_pair"]),
            }
            for row in text["layers"]
        ]  # fmt: skip
        shown = columns(rows, ("layer", "layer", "{}"), ("entropy", "entropy", "{:.3f}"),
                        ("margin", "margin_median", "{:.3f}"), ("lowest 10%", "margin_lowest_tenth", "{:.3f}"),
                        ("as before", "overlap_with_token_before", "{:.2f}"),
                        ("foretold (by use)", "foretold", "{}"), ("strongest pair", "pair", "{}"))  # fmt: skip
        about = f"measured, {text['tokens']} tokens; by chance {text['overlap_by_chance']:.2f} as before"
        tables.append(Table(f"Routing of {name}", shown, "", about))
    if len(texts) > 1:
        shown = [Figure(None, "", list(texts))]
        shown += [Figure(None, name, [similarity[other][name] for other in texts], "{:.2f}") for name in texts]
        tables.append(Table("How alike texts use the experts", shown, "", "cosine of loads, measured"))
    shown = [Figure(None, "layer", list(range(len(seconds["prompt"]))))]
    shown += [Figure(None, f"{name} ms", [1e3 * s for s in values], "{:.2f}") for name, values in seconds.items()]
    data = {"texts": texts, "domains": {"source": "measured", "similarity": similarity}, "seconds": seconds}
    shown += [Figure(key, None, value) for key, value in data.items()]
    return [*tables, Table("Time of decoder layers", shown, "forward", "measured, with stops")]


def machine(configuration: Configuration, described: Architecture, quantisation: dict, most_bytes=2e9):
    """(Machine, {backend: Link}, Table): this machine, fitted on first layers with random weights, and local links."""
    dense = next(layer.number for layer in described.layers if layer.moe)
    count = dense + max(1, min(4, int(most_bytes // described.layers[dense].whole.bytes)))
    small = describe(replace(configuration, config=shortened(configuration.config, count)), **quantisation)
    model = fill_randomly(small.model)
    if (dtype := activation_dtype()) is not None:
        model.set_dtype(dtype)
    head = small.outside.get("head") or small.outside["embeddings"]
    found = measure_machine(model, small.demand, head.bytes)
    found = replace(found, memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    links, measured, missing = {}, {}, {}
    for backend in ("ring", "mpi"):
        try:
            links[backend], measured[backend] = measure_link(backend)
        except ValueError as error:
            missing[backend] = str(error)
    constants = {name: value for name, value in vars(found).items() if name != "memory_bytes"}
    moved = f"{size(found.bytes_per_second)}/s, of experts {size(found.expert_bytes_per_second)}/s"
    facts = {"weights moved": moved, "keys and values moved": None,
             "arithmetic": f"{found.operations_per_second / 1e9:.2f} GFLOP/s",
             "fixed cost of a layer": f"{1e6 * found.layer_seconds:.0f} us"}  # fmt: skip
    if found.cache_bytes_per_second:
        facts["keys and values moved"] = f"{size(found.cache_bytes_per_second)}/s"
    for name, link in links.items():
        text = f"{1e6 * link.latency_seconds:.0f} us a step, {size(link.bytes_per_second)}/s"
        facts[f"link {name}, 2 processes"] = text
    facts |= {f"link {name}": why for name, why in missing.items()}
    data = {"layers": count, "machine": constants, "links_not_measured": missing}
    data["links"] = {name: {"latency_seconds": link.latency_seconds, "bytes_per_second": link.bytes_per_second,
                            "measured": measured[name]} for name, link in links.items()}  # fmt: skip
    figures = [Figure(None, label, text) for label, text in facts.items()]
    figures += [Figure(key, None, value) for key, value in data.items()]
    source = f"measured on {count} layers with random weights"
    return found, links, Table("This machine", figures, "this_machine", source, facts=True)
