"""Two runs side by side, from what --json saved of them."""

from __future__ import annotations

import json
from pathlib import Path

from ..checkpoint.finding import cut
from .table import Table, facts, of_records

SCRIPTS = {"generation": "qwen3_expert_parallel.py", "results": "expert_parallel_poc.py"}
SCRIPTS["architecture"] = "model_analysis.py"
FIRST = {  # figures that stand before all others
    "parity.tokens_equal": "same tokens as stock",
    "parity.max_abs_logit_difference": "largest logit difference",
    "memory.per_device_bytes.most": "bytes of the fullest device",
    "memory.reduction": "times less than whole",
    "balance.balancedness_layers": "balancedness",
    "balance.balancedness_aggregate": "balancedness, aggregate",
    "balance.fan_out": "devices a token (fan-out)",
    "communication.bytes_per_token": "bytes sent a token",
    "generation.seconds_to_first_token": "seconds to first token",
    "generation.prompt_tokens_per_second": "prompt tokens/s",
    "generation.tokens_per_second": "tokens/s",
    "generation.stock_tokens_per_second": "stock's tokens/s",
}
NAMES = ("name", "devices", "remedy", "layer", "expert", "after_tokens", "tokens")  # what a row of a list goes by
MOST_TEXT = 24  # characters of a value in print


def read_report(path) -> dict:
    """What --json of one of the scripts saved. ValueError in one line for anything else."""
    try:
        document = json.loads(Path(path).read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(document, dict) or not SCRIPTS.keys() & document.keys() or "options" not in document:
        raise ValueError(f"{path} is no report: give what --json of {', '.join(SCRIPTS.values())} saved")
    return document


def script_of(document: dict) -> str:
    """Which script a report is of."""
    return next(script for key, script in SCRIPTS.items() if key in document)


def compare(a: dict, b: dict, names=("a", "b"), outputs=()) -> list[Table]:
    """Options and surroundings that differ, then figures with the ratio of b to a.

    a, b     reports of the same script (see `read_report`); ValueError where they are not
    names    of the two, for print
    outputs  options that say where something is written to, which are not compared
    """
    if script_of(a) != script_of(b):
        scripts = f"{names[0]} is of {script_of(a)}, {names[1]} of {script_of(b)}"
        raise ValueError(f"{scripts}: only reports of the same script can be compared")
    one, other = (dict(_figures_of(each)) for each in (a, b))

    def records(paths):
        for path in paths:
            (left, source), (right, of_right) = (each.get(path, (None, "")) for each in (one, other))
            numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (left, right))
            ratio = right / left if numbers and left else None
            known = next((word for word in ("simulated", "modelled") if word in path), source or of_right)
            known = "not comparable" if path in unlike else known
            yield {"name": path, "a": left, "b": right, "ratio": ratio, "source": known.partition(";")[0]}

    def table(title, key, paths, *more):
        columns = (
            (lambda row: FIRST.get(row["name"]) or row["name"].replace(".", " "), "figure"),  # breaks between words
            ("a", names[0], _shown),
            ("b", names[1], _shown),
            *more,
        )
        return of_records(title, key, list(records(paths)), *columns, section="")

    around = ("options", "environment", "model")
    apart = {f"options.{name}" for name in outputs if name != "trace" or "generation" in a}  # the others read a trace
    paths = [path for path in {**one, **other} if path not in apart and one.get(path) != other.get(path)]
    paths = [path for path in paths if any(each.get(path, (None,))[0] is not None for each in (one, other))]
    # Rows without a name go by their place, #0, #1, ...: of no use where there are more of them in one report.
    unlike = [path for path in paths if path.endswith("#length") and path in one and path in other]
    differ = [path for path in paths if path in unlike or not path.startswith(tuple(each[:-6] for each in unlike))]
    differ.sort(key=lambda path: (path not in one) + (path not in other))  # first what both have
    asked = [path for path in differ if path.partition(".")[0] in around]
    first = [path for path in FIRST if path in one or path in other]
    rest = [path for path in differ if path not in {*asked, *first}]
    about = {"report of": script_of(a)} | ({} if asked else {"options": "the same, and hardware and versions"})
    more = (("ratio", f"{names[1]} / {names[0]}", "{:.3g}x"), ("source", "known as", _shown))
    tables = [facts("Compared", about)] + ([table("What was asked, and where", "asked", asked)] if asked else [])
    tables += [table("Figures", "figures", first, *more)] if first else []
    return tables + [table("All other figures that differ", "others", rest, *more)] if rest else tables


def _figures_of(value, path: str = "", source: str = ""):
    """(path, (value, source)) of all that is no dictionary; of a list length and rows, or of numbers most and sum."""
    if isinstance(value, dict):
        source = value["source"] if isinstance(value.get("source"), str) else source
        for key, inner in value.items():
            if key != "source":
                yield from _figures_of(inner, f"{path}.{key}" if path else key, source)
    elif isinstance(value, list) and any(isinstance(each, dict | list) for each in value):
        key = _key_of(value)
        yield f"{path}.{'' if key else '#'}length", (len(value), source)
        for n, inner in enumerate(value):
            yield from _figures_of(inner, f"{path}.{inner[key] if key else f'#{n}'}", source)
    elif isinstance(value, list) and not path.startswith("options.") and all(isinstance(n, int | float) for n in value):
        yield f"{path}.length", (len(value), source)
        if value:
            yield from ((f"{path}.most", (max(value), source)), (f"{path}.sum", (sum(value), source)))
    else:
        yield path, (value, source)


def _key_of(rows: list) -> str | None:
    """The first of NAMES that every row has, each another value of it."""
    for key in NAMES if all(isinstance(row, dict) for row in rows) else ():
        values = [row.get(key) for row in rows]
        if all(isinstance(value, int | str) for value in values) and len(set(values)) == len(rows):
            return key
    return None


def _shown(value) -> str:
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        text = " ".join(value)
    elif isinstance(value, bool):
        text = "yes" if value else "no"
    else:
        text = f"{value:,}" if type(value) is int else f"{value:.4g}" if isinstance(value, float) else str(value)
    return cut(text, MOST_TEXT)
