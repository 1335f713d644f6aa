"""Choice: the top-k of mlx-lm's own block, answered by somebody else. What it does with it stays mlx-lm's.

Dimensions: E experts, k chosen per token, H hidden.

    mlx-lm's block:   scores [..., E] -> argpartition -> indices [..., k] -> switch_mlp -> weigh, sum
    answered here:                       ^^^^^^^^^^^^                        ^^^^^^^^^^
A chooser has `num_experts`, ranked(scores) -> [..., E] to choose by, settled(scores, indices [..., k]) -> the
indices asked for in the end, and answer(experts, x, indices) -> [..., k, H].
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from ..layers import StandIn, hidden_size, num_experts
from ..trace import replaced


def choosing_block(modules: dict, layer) -> tuple:
    """(block that chooses for a MoE layer, name of its attribute for the experts), of a model's named modules."""
    path, _, name = layer.path.rpartition(".")
    while isinstance(modules[path], StandIn):  # a recorder between the block and its experts
        path, _, name = path.rpartition(".")
    return modules[path], name


def choosing_by(block_class, name: str, chooser):
    """The block's class again, in which `chooser` answers for the choice and for the experts, attribute `name`."""
    argpartition = mx.argpartition

    def choose(a, kth, *along, **named):  # the best come last, or, of negated scores, first
        if a.shape[-1] != chooser.num_experts:
            return argpartition(a, kth, *along, **named)
        sign = 1 if kth < 0 else -1
        order = argpartition(sign * chooser.ranked(sign * a), kth)
        chosen = order[..., kth:] if kth < 0 else order[..., : kth + 1]  # those that are not nobody looks at
        return chooser.settled(sign * a, chosen)

    def call(self, *args, **kwargs):
        answer = partial(chooser.answer, getattr(self, name))
        with replaced(mx, {"argpartition": choose}), replaced(self, {name: answer}):
            return block_class.__call__(self, *args, **kwargs)

    return type(block_class.__name__, (block_class,), {"__call__": call})


def by_logits(block, name: str) -> bool:
    """Whether the block chooses by logits; by probabilities otherwise. Found by a trial with random tokens.

    ValueError unless the choice can be answered: the same experts in the other order must reach the experts so,
    and give the same sum. A choice that is compiled or made outside of the block fails.
    """
    experts = getattr(block, name)
    trial = _Trial(num_experts(experts), hidden_size(experts))
    x = mx.random.normal((1, 16, hidden_size(experts)), key=mx.random.key(1))
    try:
        with replaced(block, {name: partial(trial.answer, experts)}):
            plain = block(x)  # a compiled choice is traced here, as it is: later it would keep our answer for good
        with replaced(block, {"__class__": choosing_by(type(block), name, trial)}):
            turned = block(x)
        (wanted,) = trial.wanted
        seen = mx.array_equal(wanted, trial.asked) and mx.allclose(plain, turned, 1e-2, 1e-2)
    except Exception:  # whatever a block of another kind makes of it
        seen = False
    if not seen:
        raise ValueError(f"{type(block).__name__} does not show how it chooses experts: its router cannot be steered")
    return trial.logits


class _Trial:
    """Takes the same experts in the other order; each answers with a row of its own."""

    def __init__(self, num_experts, hidden):
        self.num_experts, self.wanted = num_experts, []
        self.rows = mx.random.normal((num_experts, hidden), key=mx.random.key(0))

    def ranked(self, scores):
        return scores

    def settled(self, scores, indices):
        self.logits = scores.min().item() < 0
        self.wanted.append(indices[..., ::-1])
        return self.wanted[-1]

    def answer(self, experts, x, indices):
        self.asked = indices
        return self.rows[indices]
