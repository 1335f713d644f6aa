"""How many experts of each layer find room in so much memory.

Dimensions: L MoE layers, E experts.
"""

from __future__ import annotations

import math
import re

UNITS = {"": 1, "B": 1}
for power, letter in enumerate("KMGT", 1):
    UNITS |= {letter: 1000**power, f"{letter}B": 1000**power, f"{letter}IB": 1024**power}


def parse_budget(text) -> tuple[float, bool]:
    """(number of bytes or share, whether it is a share) of "4GB", "500 MB", "25%" or a number of bytes. ValueError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%|[A-Za-z]*)\s*", str(text))
    unit = found and found[2].upper()
    if not found or not (unit == "%" or unit in UNITS) or not float(found[1]):
        raise ValueError(
            f"expert memory is a size such as 4GB or 500MB, or a share of the experts such as 25%: {text!r}"
        )
    if unit == "%" and float(found[1]) > 100:
        raise ValueError(f"expert memory {text} is more than all experts: 100% holds them all")
    return (float(found[1]) / 100, True) if unit == "%" else (float(found[1]) * UNITS[unit], False)


def rooms(budget, expert_bytes, held):
    """Places for experts in each layer, int [L], as equal a share of the budget as whole experts allow.

    budget        as `parse_budget` reads it, for one device
    expert_bytes  np [L] of one expert in memory
    held          np [L] experts that the device answers for; no layer gets more places
    Raises ValueError for less than one expert a layer, with the least that works.
    """
    import numpy as np  # the rest is asked before numpy is needed

    amount, is_share = parse_budget(budget)
    whole, least = int(expert_bytes @ held), int(expert_bytes @ (held > 0))
    amount = round(amount * whole) if is_share else amount  # 35% of 100 experts are 35
    if amount < least:
        raise ValueError(
            f"expert memory {budget} means {amount:,.0f} bytes, which is too small: one expert in each of {len(held)}"
            f" layers takes {least:,} bytes, {math.ceil(1e4 * least / max(1, whole)) / 100:g}% of the device's experts"
        )
    places = np.minimum(held, 1)
    while len(fits := np.flatnonzero((places < held) & (expert_bytes <= amount - places @ expert_bytes))):
        places[fits[(places * expert_bytes)[fits].argmin()]] += 1  # the first of those with least
    return places
