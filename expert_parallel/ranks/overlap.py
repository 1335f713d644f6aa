"""Overlap: the collectives of one half of a prompt under the computation of the other.

Dimensions: T tokens, H hidden.

    rank   | A0 | B0 | A1 | B1 | A2 ...     halves A and B of the tokens, layer by layer
    link        | A0 | B0 | A1 | B1 ...     what each waits for, on a stream of its own

Two-batch overlap, as SGLang and DeepSeek read prompts: a layer computes the first half, starts its all-sums, and goes
on with the second, whose all-sums run under the first half of the next layer. The second half looks back on the keys
and values that the first has left in the cache, as where mlx-lm reads a prompt in two steps.

Two ranks add the same pairs of numbers, whatever the halves: no bit changes. From three on MLX's ring adds each part of
a message in another order of ranks, and the parts are others; copies of experts are dealt out for each half by itself
(reports that follow a trace deal them out for the prompt as a whole). Then answers are equal up to rounding.
"""

from __future__ import annotations

from contextlib import ExitStack

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..layers import moe_layers
from ..trace import replaced
from ..trials import FAR_FROM_A_SUM, Dummy


class _Overlap:
    """What the layers of one model share. `halves` of the last one's answer, for the next one as they are."""

    def __init__(self):
        self.tokens, self.stream = 2, mx.new_stream(mx.cpu)  # where ring, MPI and JACCL compute
        self.whole, self.halves, self.used = None, None, 0  # used: so often was a layer read in two steps

    def fits(self, x: mx.array, arguments) -> bool:
        """Whether a layer may read x [1, T, H] in two steps: one long prompt, causal, and kept in a cache.

        Arrays among its other arguments, a mask or positions, would have to be cut as well, so then it may not.
        """
        kept = any(hasattr(argument, "update_and_fetch") for argument in arguments)
        causal = any(isinstance(argument, str) and argument == "causal" for argument in arguments)
        arrays = any(isinstance(argument, mx.array) for argument in arguments)
        return kept and causal and not arrays and x.ndim == 3 and len(x) == 1 and x.shape[1] >= self.tokens

    def started(self, all_sum):
        """An all-sum that begins as it is called, on one stream: in the same order on every rank, as it must be."""

        def start(x, **how):
            y = all_sum(x, **{**how, "stream": self.stream})
            mx.async_eval(y)
            return y

        return start

    def in_halves(self, call, last: bool):
        """A layer's __call__ that goes through a prompt in two steps; `last` of all layers."""

        def answer(layer, x, *args, **kwargs):
            fits = self.fits(x, (*args, *kwargs.values()))
            halves, before = self.halves, self.whole
            self.whole, self.halves, self.used = None, None, self.used + fits
            if last or not fits:  # the last one's sums nobody asks for where a prompt only fills the cache
                if before is not None:
                    mx.eval(halves)  # no sum elsewhere may begin before those on the stream here have ended
                return call(layer, x, *args, **kwargs)
            if x is not before:
                halves = mx.split(x, [x.shape[1] // 2], axis=1)
            with replaced(mx.distributed, {"all_sum": self.started(mx.distributed.all_sum)}):
                self.halves = [call(layer, half, *args, **kwargs) for half in halves]
            self.whole = mx.concatenate(self.halves, axis=1)  # computed only where something else than a layer asks
            return self.whole

        return answer


def overlap_collectives(model: nn.Module, tokens: int) -> _Overlap:
    """From now on passes over so many tokens of one prompt, or more, hide their all-sums. A collective of all ranks.

    Returns what holds that number, `.tokens`, to be changed between two passes and on all ranks alike. ValueError where
    a trial, with experts that answer nothing, says that this architecture cannot be read like that.
    """
    overlap, kinds = _Overlap(), [type(layer) for layer in model.layers]
    with ExitStack() as stack:
        for layer in moe_layers(model):
            stack.enter_context(replaced(layer, {"experts": Dummy(layer.experts)}))
        logits = lambda: model(mx.array([[0, 1, 2, 3]]), cache=make_prompt_cache(model))  # noqa: E731
        expected = logits()
        mx.eval(expected)
        for n, (layer, kind) in enumerate(zip(model.layers, kinds, strict=True)):
            call = overlap.in_halves(kind.__call__, last=n == len(kinds) - 1)
            layer.__class__ = type(kind.__name__, (kind,), {"__call__": call})
        try:
            off = mx.abs(logits() - expected).max() / mx.abs(expected).max()
            why = None if off.item() < FAR_FROM_A_SUM else f"its answers moved by {off.item():.0%}"
            why = why if overlap.used else "its layers take masks as arrays, or keep no keys and values"
        except (TypeError, ValueError, RuntimeError) as error:
            why = str(error).splitlines()[0]
    if why:
        for layer, kind in zip(model.layers, kinds, strict=True):
            layer.__class__ = kind
        raise ValueError(f"this architecture cannot read a prompt in two halves ({why}): leave overlap out")
    overlap.tokens = tokens
    return overlap
