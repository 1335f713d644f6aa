"""Failures: what a run that was killed took from its journal."""

from __future__ import annotations

from .table import Figure, Table


def journal(figures: dict) -> Table:
    """Tokens that were replayed and new ones; `Kept.figures`."""
    replayed, seconds = figures["tokens_replayed"], figures["seconds_replay"]
    rows = [
        Figure("file", "journal", figures["file"]),
        Figure(None, "tokens from it", replayed or None, f"{{}}, gone through in {seconds:.2f} s"),
        Figure("tokens_new", "new tokens", figures["tokens_new"]),
        Figure(None, "chosen otherwise", figures["differing"] or None, "{} of them, by the model as it is here"),
    ]
    also = {key: figures[key] for key in ("tokens_replayed", "differing", "seconds_replay")}
    return Table("Journal", rows, "journal", "measured", also=also, facts=True)
