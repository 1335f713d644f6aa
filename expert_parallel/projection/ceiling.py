"""Ceiling: the most that expert parallelism can give a single sequence, and when a link gives it away. All modelled.

Dimensions: D devices, E experts, k chosen per token. All but the experts is done by every device; one token's k experts
do not spread evenly over the devices, and all wait for the fullest.
"""

from __future__ import annotations

from math import comb

import numpy as np

from .hardware import Machine
from .links import Link
from .step import Demand, Fullest, estimate, even_load

FREE = Link(0.0, float("inf"))


def expected_fullest(experts_per_device, num_experts: int, top_k: int) -> float:
    """Mean of the experts of one token that the fullest device has, k different ones of E, all alike; exact.

    The sum over m of 1 - P(no device has more than m). Of the C(E, k) choices those count whose part on each device
    is at most m: coefficients of products of sum over j up to m of C(n_d, j) x^j.
    """
    mean, whole = 0.0, comb(num_experts, top_k)
    for most in range(top_k):
        ways = [1] + [0] * top_k
        for n in experts_per_device:
            parts = [comb(n, j) for j in range(min(most, n) + 1)]
            ways = [sum(parts[j] * ways[i - j] for j in range(min(i + 1, len(parts)))) for i in range(top_k + 1)]
        mean += 1 - ways[top_k] / whole
    return mean


def ceiling(demand: Demand, machine: Machine, devices: int, load: Fullest | None = None, context: int = 0) -> float:
    """Speed-up of decoding one sequence over one device, were collectives free.

    load  None: as even as whole experts allow; a token's fullest device has one of them at least
    """
    one, even = estimate(demand, machine, context=context), even_load(demand, devices)
    load = load or Fullest(np.maximum(even.experts, 1), np.maximum(even.slots, 1))
    return one.seconds / estimate(demand, machine, devices, FREE, load, context=context).seconds


def break_even(demand: Demand, machine: Machine, devices: int, load: Fullest, context: int) -> float:
    """Seconds of one all-sum at which D devices are no faster than one."""
    one = estimate(demand, machine, context=context)
    many = estimate(demand, machine, devices, FREE, load, context=context)
    return (one.seconds - many.seconds) / demand.num_moe_layers
