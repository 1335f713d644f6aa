"""Which way a product goes, and from how many tokens on: measured here, and taken only where its bits are the same.

Dimensions: T tokens, K inputs, O outputs.
"""

from __future__ import annotations

import math
import timeit

import mlx.core as mx
import mlx.nn as nn

from ..experts import is_rank
from ..layers import activation_type, expert_tensors, moe_layers, projections, twin
from .lanes import Lanes, useful_lanes
from .masked import random_steps
from .products import (
    EXPERTS,
    HEAD,
    LINEAR,
    Plan,
    Product,
    ProductOfExperts,
    equal_parts,
    inputs,
    pieces,
    rows,
    split,
    together,
)

TOKENS = (1, 8, 16, 32, 64)
GAIN = 1.2  # how much quicker a way must be, for timings are noisy
GAIN_OF_SPLIT = 1.05  # of rows over cores, which cannot be much slower
BRIEF, LONG = 1e-4, 5e-3  # seconds of a product: no time to save; more tokens would not change what is quicker
MOST_TRIALS, MOST_SECONDS = 8, 0.03  # for telling which of two ways is quicker
SHAPES = ((1, (1, 3, 67)), (8, (2, 17)))  # pieces of rows and tokens whose bits are compared; the first are timed
_plans = {}  # by kind of product: a model's layers are a few kinds again and again


def quicken(model: nn.Module, streams: str = "auto", group=None) -> None:
    """Let the products of a sharded model go the quicker ways, and its devices side by side; on a GPU nothing changes.

    A collective of the ranks of `group`.

    streams  auto  what is found quicker by trial
             on    split whatever the size, and for the rest as auto
             off   nothing
    """
    if streams == "off" or mx.default_device().type != mx.cpu:
        return
    layers = moe_layers(model)
    lanes = Lanes(useful_lanes(len(layers[0].experts.stores)))
    quicken_products(model, lanes, streams == "on", group)
    if lanes.count > 1:
        slots = 0 if streams == "on" else slots_from(layers[0].experts, lanes)
        for layer in layers:
            layer.experts.lanes, layer.experts.side_by_side_from = lanes, slots


def quicken_products(model: nn.Module, lanes: Lanes, split_anyway: bool = False, group=None) -> None:
    """The same for linear layers and experts of any model of mlx-lm, whose memory does not change.

    Ranks take the least that any of them found: in which order mlx computes pending collectives depends on the graph
    behind them, and one that is another on another rank would never end, or be added to a wrong one.
    """
    modules = [module for module in model.modules() if not hasattr(module, "_product")]
    linear = [module for module in modules if type(module) in LINEAR]
    lengths = {len(module["weight"]) for module in linear}
    linear += [m for m in modules if type(m) in HEAD and len(m["weight"]) not in lengths]  # it is the head, too
    plans = plans_of_linear(linear, lanes, split_anyway)
    if plans and is_rank(group):
        tokens = mx.array([[plan.split_from, plan.together_from] for plan in plans])
        tokens = mx.distributed.all_max(tokens, group=group).tolist()
        plans = [Plan(*found, plan.dtype) for found, plan in zip(tokens, plans, strict=True)]
    for module, plan in zip(linear, plans, strict=True):
        _install(module, Product(plan, lanes))
    read_when_asked_for = {
        id(stack)
        for store in modules
        if not getattr(store, "all_here", True)
        for _, stack in projections(store.experts)
    }
    for stack in modules:
        if type(stack) in EXPERTS and id(stack) not in read_when_asked_for:
            _install(stack, ProductOfExperts(plan_of_experts(stack, lanes)))


def in_words(model: nn.Module) -> str | None:
    """What goes which way in a model; None where all is as mlx-lm has it."""
    modules, words = list(model.modules()), []
    for what, kinds in (("linear layers", {**LINEAR, **HEAD}), ("experts", EXPERTS)):
        quick = [module._product.plan for module in modules if isinstance(module, tuple(kinds.values()))]
        count = len(quick) + sum(type(m) in kinds and type(m) not in HEAD for m in modules)  # embeddings: no product
        for way, did in (("split_from", "split over streams"), ("together_from", "take a prompt's tokens at once")):
            tokens = [getattr(plan, way) for plan in quick if getattr(plan, way) < math.inf]
            which = what if kinds is EXPERTS else f"{len(tokens)} of {count} {what}"
            if tokens:
                words.append(f"{which} {did}, from {min(tokens):g} token{'s'[: min(tokens) > 1]} on")
    if any(layer.experts.side_by_side_from < math.inf for layer in moe_layers(model)):
        words.append("devices side by side")
    return "; ".join(words) or None


def _install(module, product):
    if min(product.plan.split_from, product.plan.together_from) < math.inf:
        module._product = product
        module.__class__ = {**LINEAR, **HEAD, **EXPERTS}[type(module)]


def plans_of_linear(modules: list[nn.Module], lanes: Lanes, split_anyway: bool = False) -> list[Plan]:
    """By trial with the first rows of one of each kind."""
    kinds = [(_kind(module), module["weight"].shape, lanes.count, split_anyway) for module in modules]
    new = {kind: module for kind, module in zip(kinds, modules, strict=True) if kind not in _plans}
    splits = dict.fromkeys(new, math.inf)
    for _ in range(2 if lanes.count > 1 else 0):  # once more: something else may have taken a core for the first time
        for kind in (kind for kind, tokens in splits.items() if tokens == math.inf):
            splits[kind] = split_from(new[kind], lanes, split_anyway)
    for kind, module in new.items():
        busy = lanes.count if splits[kind] < math.inf else 1
        _plans[kind] = Plan(splits[kind], together_from(module, lanes, busy), activation_type(module))
    return [_plans[kind] for kind in kinds]


def split_from(module: nn.Module, lanes: Lanes, split_anyway: bool) -> float:
    """The fewest tokens from which its rows, split over lanes, are quicker; inf: none, or not the same bits."""
    most = first_rows(module, 8 * lanes.count).stop
    plain, parts = rows(module, slice(0, most)), [rows(module, at) for at in equal_parts(most, lanes.count)]
    beside = lambda x: split(parts, lanes, x)  # noqa: E731
    if not _all_same(plain, beside, module, (1, 3, 17)):
        return math.inf
    return 1 if split_anyway else from_tokens(plain, beside, module, GAIN_OF_SPLIT, LONG)


def together_from(module: nn.Module, lanes: Lanes, busy: int) -> float:
    """The same of a prompt's tokens at once, in so many lanes side by side."""
    tried = [(first_rows(module, count), tokens) for count, tokens in SHAPES]
    if not all(_all_same(rows(module, at), _at_once(module, at), module, tokens) for at, tokens in tried):
        return math.inf
    few = tried[0][0]
    ways = [_in_lanes(way, lanes, busy) for way in (rows(module, few), _at_once(module, few))]
    return from_tokens(*ways, module)


def first_rows(module: nn.Module, count: int) -> slice:
    """Of a layer, or of each of its experts: as many as so many pieces have, or all."""
    return slice(0, pieces(module, slice(0, module["weight"].shape[-2]))[:count][-1].stop)


def plan_of_experts(stack: nn.Module, lanes: Lanes) -> Plan:
    """By trial with the first expert."""
    kind = (_kind(stack), stack["weight"].shape[1:], lanes.count)
    if kind not in _plans:
        shapes = [(first_rows(stack, count), tokens) for count, tokens in SHAPES]
        tried = [(*_expert_ways(stack, at), stack, tokens) for at, tokens in shapes]
        together_from = math.inf
        if all(_all_same(*each) for each in tried):
            ways = [_in_lanes(way, lanes, lanes.count) for way in tried[0][:2]]
            together_from = from_tokens(*ways, stack)
        _plans[kind] = Plan(math.inf, together_from, activation_type(stack))
    return _plans[kind]


def _expert_ways(stack: nn.Module, at: slice) -> tuple:
    """(as mlx-lm has it, at once) for slots [S, K] that all go to these rows of the first expert."""
    few = twin(stack)
    few.update({name: array[:1, at] for name, array in stack.items() if isinstance(array, mx.array)})
    in_order = lambda x: few(x[:, None], mx.zeros(len(x), mx.uint32), sorted_indices=True)[:, 0]  # noqa: E731
    return in_order, _at_once(stack, at, 0)


def _at_once(module, at, *expert):
    """`together` as a product of tokens [T, K]."""
    return lambda x: mx.concatenate(together(module, at, mx.contiguous(x.T), *expert)).T


def _in_lanes(way, lanes: Lanes, busy: int):
    """The same product in so many lanes at once, as a model has it: they share the machine's memory and caches."""

    def answer(x):
        outputs = []
        for n in range(busy):
            with lanes(n):
                outputs.append(way(x))
        return outputs

    return answer


def from_tokens(plain, quick, module: nn.Module, gain: float = GAIN, longest: float = math.inf) -> float:
    """The fewest tokens of TOKENS from which `quick` is quicker; inf: none, or none before `plain` takes `longest`."""
    for count in TOKENS:
        quicker, slow = _is_quicker(plain, quick, _random(module, count), gain)
        if quicker:
            return count
        if slow > longest:
            break
    return math.inf


def slots_from(sharded, lanes: Lanes) -> float:
    """The fewest slots of a step from which devices in lanes answer quicker than by turns; inf: none."""
    if not all(store.all_here for store in sharded.stores):
        return math.inf  # what is read as it is asked for is no measure
    tensors = [tensor for store in sharded.stores for tensor in expert_tensors(store.experts).items()]
    kind = (lanes.count, *((name, array.shape, array.dtype) for name, array in tensors))
    if kind in _plans:
        return _plans[kind]

    def answer(ids, side_by_side_from):
        def way(x):
            sharded.side_by_side_from = side_by_side_from
            return sharded.compact(x, ids)

        return way

    served, found, sharded.lanes = sharded.slots_served.copy(), math.inf, lanes
    for x, ids in random_steps(sharded, TOKENS):
        quicker, slow = _is_quicker(answer(ids, math.inf), answer(ids, 0), x)
        if quicker:
            found = ids.size
        if quicker or slow > LONG:
            break
    sharded.slots_served[:] = served
    _plans[kind] = found
    return found


def _all_same(plain, quick, module, counts) -> bool:
    """Whether every bit is, for random tokens; so is not where mlx has no such product of these types."""
    try:
        return all(mx.array_equal(plain(x), quick(x)).item() for x in (_random(module, n) for n in counts))
    except (ValueError, RuntimeError):
        return False


def _random(module, tokens) -> mx.array:
    x = mx.random.normal((tokens, inputs(module)), key=mx.random.key(tokens)).astype(activation_type(module))
    mx.eval(x)
    return x


def _is_quicker(plain, quick, x, gain: float = GAIN) -> tuple[bool, float]:
    """(whether `quick` is, twice in a row: what else runs on the machine can make it look so; seconds of `plain`)."""
    for _ in range(2):
        slow, fast = _seconds(plain, quick, x, gain)
        if slow <= BRIEF or slow <= gain * fast:
            return False, slow
    return True, slow


def _seconds(plain, quick, x, gain: float) -> tuple[float, float]:
    """The least of a few for each way, by turns; of more where the second does not look quicker by then.

    What else runs on the machine can make it look slow, and a model would go the other way for good.
    """
    slow, fast = [], []
    while len(slow) < MOST_TRIALS:
        slow.append(timeit.timeit(lambda: mx.eval(plain(x)), number=1))
        fast.append(timeit.timeit(lambda: mx.eval(quick(x)), number=1))
        clear = min(slow) <= BRIEF or min(slow) > gain * min(fast)
        if len(slow) >= 3 and (clear or sum(slow) + sum(fast) > MOST_SECONDS):
            break
    return min(slow), min(fast)


def _kind(module) -> tuple:
    types = tuple((name, array.dtype) for name, array in module.items() if isinstance(array, mx.array))
    return type(module), types, *(getattr(module, name, None) for name in ("group_size", "bits", "mode"))
