"""Stub."""

import numpy as np


def without(held, lost):
    held = held.copy()
    held[:, list(lost)] = False
    return held


def gone(held, lost):
    return ~without(held, lost).any(axis=1)


def repair(held, lost, loads=None):
    held = without(held, lost)
    held, living = held.copy(), np.flatnonzero(held.any(axis=(0, 2)))
    for of_layer in held:
        for expert in np.flatnonzero(~of_layer.any(axis=0)):
            of_layer[living[of_layer[living].sum(axis=1).argmin()], expert] = True
    return held
