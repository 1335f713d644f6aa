"""Router bias: what to add to a router's logits so that its choices spread. Numpy only.

Dimensions: L MoE layers, E experts, D devices. The bias picks experts, it never weighs them (control.py).
"""

from __future__ import annotations

import numpy as np

from ..placement import Placement, check_loads


def fit_bias(loads, strength: float = 1.0, placement: Placement | None = None, limit: float = 4.0) -> np.ndarray:
    """float [L, E]: bias on the router's logits that makes up for skewed loads [L, E] of a trace.

    -strength log(load / mean load), at most `limit` either way: where choices follow exp(logit), strength 1
    levels them out. With a placement the loads of its devices are levelled, not those of experts: experts of
    one device share one bias (replicas: the mean of their devices), and less of the model's choice is changed.
    """
    loads = check_loads(loads)
    level = 1 + (loads if placement is None else placement.device_loads(loads))  # never seen is taken as seen once
    bias = np.clip(-strength * np.log(level / level.mean(axis=1, keepdims=True)), -limit, limit)
    return bias if placement is None else np.einsum("lde,ld->le", placement.held, bias) / placement.copies
