"""Reading ahead: a layer's experts foretold from the layer before, and read while that one computes.

Dimensions: T tokens, L MoE layers, E experts, k chosen per token, H hidden.

    next-layer  the next layer's own router, asked with this layer's input: layers change what they hand on by little
    learned     from a routing trace: which experts of the next layer go with those that were chosen in this one
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..layers import MoELayer, StandIn, activation_type, expert_tensors, hidden_size
from ..trace import RoutingTrace, replaced

MOST_TOKENS = 4  # of a step that is foretold: a prompt asks for nearly all experts anyway


class Caught(Exception):
    """Carries the experts that a router chose out of its block, before anything is computed with them."""


class Catch(StandIn):
    def __call__(self, x, indices):
        raise Caught(indices)


def router_of(layer: MoELayer):
    """(x [..., H]) -> indices [..., k] as the layer's block would choose them; ValueError where it cannot be asked."""
    catch = Catch(layer.experts)

    def choose(x):
        try:
            with replaced(layer, {"experts": catch}):
                layer.block(x)
        except Caught as caught:
            return caught.args[0]
        raise ValueError("it hands its tokens to no experts")

    experts = layer.experts.replaced_module() if isinstance(layer.experts, StandIn) else layer.experts
    x = mx.zeros((1, 1, hidden_size(experts)), activation_type(expert_tensors(experts)))
    try:
        mx.eval(choose(x))
    except Exception as error:  # blocks that want more than their tokens
        raise ValueError(
            f"{layer.path}: its router cannot be asked by itself ({error}); use prefetch learned"
        ) from None
    return choose


def followers(trace: RoutingTrace) -> np.ndarray:
    """float32 [L - 1, E, E]: how much likelier expert j of the next layer is, by its logarithm, where i was chosen.

    Of the trace's tokens, each count one more than seen; [l, i].sum over the chosen i orders the j (naive Bayes).
    """
    T, L, k = trace.experts.shape
    E, chosen = trace.num_experts, np.zeros((L, T, trace.num_experts), np.float32)
    for l in range(L):
        np.put_along_axis(chosen[l], trace.experts[:, l].astype(np.int64), 1, axis=1)
    together = np.einsum("lti,ltj->lij", chosen[:-1], chosen[1:], optimize=True)
    before, after = chosen[:-1].sum(axis=1), chosen[1:].sum(axis=1)
    expected = before[:, :, None] * after[:, None, :] / max(1, T)
    # The prior of j counts once, not once for each of the k experts that vote.
    return (np.log((together + 1) / (expected + 1)) + np.log((after + 1) / (T + E))[:, None, :] / k).astype(np.float32)


def likeliest(follow: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """[T, k] experts of the next layer for each token's [T, k] of this one, by one layer [E, E] of `followers`."""
    score = follow[chosen].sum(axis=1)
    return np.argpartition(-score, chosen.shape[1] - 1, axis=1)[:, : chosen.shape[1]]


class Foreteller(StandIn):
    """Stands before the experts of a layer, and has those that it foretells read for the next layer.

    foretell  (x, indices) -> experts of the next layer; None in the last
    expect    of the Foreteller there: called with those experts
    """

    def __init__(self, experts, foretell=None, expect=None):
        super().__init__(experts)
        self._foretell, self._expect_next = foretell, expect
        stores = experts.stores  # in a function, or mlx would take them for this module's own
        self._read_ahead = lambda foretold: [store.read_ahead(foretold) for store in stores]
        self._expected, self.wanted, self.right = (), 0, 0  # right: of the wanted experts, foretold

    def __call__(self, x, indices):
        if len(self._expected):
            wanted = np.unique(np.array(indices))
            self.wanted += len(wanted)
            self.right += int(np.isin(wanted, self._expected).sum())
            self._expected = ()
        if self._foretell and indices.size <= MOST_TOKENS * indices.shape[-1]:
            self._expect_next(np.unique(self._foretell(x, indices)))
        return self.experts(x, indices)

    def expect(self, experts: np.ndarray) -> None:
        self._expected = experts
        self._read_ahead(experts)


def read_ahead(layers: list[MoELayer], how: str, trace: RoutingTrace | None = None) -> None:
    """From now on the experts of these layers, which lie on disk, are foretold and read ahead.

    how  "next-layer", or "learned" from a trace
    Raises ValueError where the routers cannot be asked by themselves.
    """
    if how == "learned":
        ways = [lambda x, ids, follow=follow: likeliest(follow, _rows(ids)) for follow in followers(trace)]
    else:
        routers = [router_of(layer) for layer in layers[1:]]
        ways = [lambda x, ids, choose=choose: np.array(choose(x.reshape(1, -1, x.shape[-1]))) for choose in routers]
    after = Foreteller(layers[-1].experts)
    tellers = [after]
    for layer, foretell in zip(layers[-2::-1], ways[::-1], strict=True):
        after = Foreteller(layer.experts, foretell, after.expect)
        tellers.append(after)
    for layer, teller in zip(layers, tellers[::-1], strict=True):
        layer.experts = teller


def _rows(indices) -> np.ndarray:
    return np.array(indices).reshape(-1, indices.shape[-1])
