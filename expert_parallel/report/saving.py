"""Saving: what a run of the main script leaves, as one document for programs and as files."""

from __future__ import annotations

from .table import sections

MAY_BE_MISSING = (
    "parity",
    "not_a_number",
    "rebalancing",
    "batch",
    "ranks",
    "cache",
    "journal",
    "failures",
)  # then null


def document_of(tables, about: dict, options: dict) -> dict:
    """The run's JSON: the tables' sections, the model's name, config and environment, and the options in effect."""
    missing = dict.fromkeys(MAY_BE_MISSING)
    return sections(tables, model=about, environment=about["environment"], options=options, **missing)


def write_files(args, tables, document: dict, trace, placement, layer_numbers, tell) -> None:
    """All that the options of the main script ask for but JSON: trace, placement, pictures, page.

    tables    those of the page;  document  the run's JSON;  placement  the one at its end
    tell      (what) -> None shows what is under way, () wipes it
    """
    if args.trace:
        trace.save(args.trace)
    if args.save_placement:
        placement.save(args.save_placement, args.placement_format, layer_numbers)
    if args.plots or args.html:
        tell("drawing")
        from . import page, plots  # matplotlib takes half a second

        pictures, title = plots.of_run(document, trace, placement), f"{document['model']['name']}, experts in parallel"
        if args.plots:
            plots.save_plots(args.plots, pictures)
        if args.html:
            page.save_page(args.html, title, tables, pictures, document, document["generation"]["text"])
    tell()
