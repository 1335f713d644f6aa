"""Router bias: what to add to a router's logits so that its choices spread. Numpy only.

Dimensions: L MoE layers, E experts, D devices. The bias picks experts, it never weighs them (router_control.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from .placement import Placement, check_loads
from .whole_files import written_whole

FORMAT = "router-bias/1"


def fit_bias(loads, strength: float = 1.0, placement: Placement | None = None, limit: float = 4.0) -> np.ndarray:
    """float [L, E]: bias on the router's logits that makes up for skewed loads [L, E] of a trace.

    -strength log(load / mean load), at most `limit` either way: where choices follow exp(logit), strength 1
    levels them out. With a placement the loads of its devices are levelled, not those of experts: experts of
    one device share one bias (copies: the mean of their devices), and less of the model's choice is changed.
    """
    loads = check_loads(loads)
    if placement is None:
        level = loads + 1  # an expert never seen is taken as seen once
        return np.clip(-strength * np.log(level / level.mean(axis=1, keepdims=True)), -limit, limit)
    level = placement.device_loads(loads) + 1
    of_device = np.clip(-strength * np.log(level / level.mean(axis=1, keepdims=True)), -limit, limit)
    return np.einsum("lde,ld->le", placement.held, of_device) / placement.copies


def save_bias(path, bias, model: str = "", metadata: dict | None = None) -> None:
    """Write a bias [L, E] as JSON, beside and renamed."""
    document = {"format": FORMAT, "model": model, "metadata": metadata or {}, "bias": np.round(bias, 5).tolist()}
    with written_whole(path) as file:
        file.write(json.dumps(document) + "\n")


def load_bias(path) -> np.ndarray:
    """float [L, E] that `save_bias` wrote; ValueError naming the file if it is not that."""
    try:
        document = json.loads(Path(path).read_text())
        if document.get("format") != FORMAT:
            raise ValueError(f"its format is {document.get('format')!r}, not {FORMAT!r}")
        bias = np.array(document["bias"], dtype=np.float64)
        if bias.ndim != 2 or not np.isfinite(bias).all():
            raise ValueError(f"it should be numbers [layers, experts], got {list(bias.shape)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot read router bias {path}: {error}") from None
    return bias
