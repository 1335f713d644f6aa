"""Held out: what a placement is worth on tokens that it was not fitted on. Numpy only; simulated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..balance import balancedness
from ..placement import Placement
from ..trace import RoutingTrace


def fitted_on(trace: RoutingTrace, place: Callable[[RoutingTrace], Placement]) -> Placement:
    """`place(trace)`, whose metadata says what it learnt from, and what to expect of it elsewhere.

    fitted_tokens, fitted_top_k  of the trace
    balancedness_fitted          on the trace itself
    balancedness_unseen          of one fitted on the first half of the tokens, on the second half
    """
    half, fitted = len(trace) // 2, place(trace)
    about = {**fitted.metadata, "fitted_tokens": len(trace), "fitted_top_k": trace.experts.shape[2]}
    about["balancedness_fitted"] = balancedness(fitted.device_loads(trace.loads()))
    if half:
        on_half = place(trace[:half])
        about["balancedness_unseen"] = balancedness(on_half.device_loads(trace[half:].loads()))
    return replace(fitted, metadata=about)
