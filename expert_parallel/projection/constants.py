"""Machine fit: the constants of the projection, measured on this machine with a loaded model.

Dimensions: T tokens, L MoE layers, E experts, k chosen, H hidden.

    experts        a token with all experts, less one whose experts answer nothing
    all the rest   the output head alone (its bytes are known), for the bandwidth
    fixed cost     what is left of a token, over its layers
    arithmetic     a prompt, less what was fitted so far

Other programs on a machine only ever add time, so of several rounds the shortest time counts; token
by token, because tokens differ in how many experts the fullest device has.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager, nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, make_prompt_cache

from ..layers import moe_layers
from ..trace import record_routing, replaced
from ..trials import Dummy
from .hardware import Machine
from .step import Demand, fit_arithmetic, fullest_device


@contextmanager
def without_experts(model):
    """The model with experts that answer zeros while the block runs."""
    with ExitStack() as stack:
        for layer in moe_layers(model):
            stack.enter_context(replaced(layer, {"experts": Dummy(layer.experts)}))
        yield


def tables(model) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Embedding | nn.QuantizedEmbedding)]


def random_tokens(model, count: int, seed: int = 0) -> list[int]:
    """Token ids that any rank draws alike, for timing where what is said does not matter."""
    return np.random.default_rng(seed).integers(0, max(len(m.weight) for m in tables(model)), count).tolist()


def seconds_of(work) -> float:
    """Of computing what `work` gives."""
    begin = time.perf_counter()
    mx.eval(work())
    return time.perf_counter() - begin


def seconds_per_token(model, tokens: list[int], context: int = 8, rounds: int = 3) -> np.ndarray:
    """[T]; decoding tokens given beforehand, after a context of the first of them; the shortest of the rounds."""
    seconds = []
    for _ in range(rounds):
        cache = make_prompt_cache(model)
        for ids in (tokens[:context], tokens[:1]):  # the second for what is built at the first single token
            mx.eval(model(mx.array([ids]), cache=cache))
        seconds.append([seconds_of(lambda id=id, cache=cache: model(mx.array([[id]]), cache=cache)) for id in tokens])
    return np.min(seconds, axis=0)


def seconds_of_prompt(model, tokens: list[int], rounds: int = 3, whole: bool = False) -> float:
    """Shortest time to fill a cache with a prompt, without the output head's logits, as generation does.

    whole  with all of the last layer, of which a cache needs keys and values alone: in a few layers much, in 48 little
    """
    kind, answers = type(model.layers[-1]), []
    answer = kind.__call__

    def kept(layer, *args, **more):
        answers[:] = [answer(layer, *args, **more)]
        return answers[0]

    def read():
        cache = make_prompt_cache(model)
        model(mx.array([tokens]), cache=cache)
        return [entry.state for entry in cache], answers

    with replaced(kind, {"__call__": kept}) if whole else nullcontext():
        return min(seconds_of(read) for _ in range(rounds))


def seconds_after(model, context: int) -> float:
    """Of a token after so many others; zeros in their place cost the same attention, and nothing needs to be read."""
    cache, token = make_prompt_cache(model), mx.array([random_tokens(model, 1)])
    mx.eval(model(token, cache=cache))
    for entry in cache:
        one = entry.keys, entry.values
        entry.update_and_fetch(*(mx.zeros((*a.shape[:2], context, a.shape[3]), a.dtype) for a in one))
    mx.eval(model(token, cache=cache))
    return seconds_of(lambda: model(token, cache=cache))


def cache_speed(model, demand: Demand, tokens: int = 16384, rounds: int = 3) -> float:
    """Bytes of keys and values a second that a token looks back on; 0 where the model keeps no plain ones."""
    if not all(type(entry) is KVCache for entry in make_prompt_cache(model)):
        return 0.0
    with without_experts(model):
        few, many = (min(seconds_after(model, n) for _ in range(rounds)) for n in (1, tokens))
    return demand.cache_per_token * tokens / (many - few) if many > few else 0.0


def head_seconds(model, hidden: int, rounds: int = 6) -> float:
    """Shortest time of the output head for one token."""
    head = getattr(model, "language_model", model).get("lm_head") or tables(model)[0].as_linear
    x = mx.random.normal((1, 1, hidden))
    mx.eval(x)
    return min(seconds_of(lambda: head(x)) for _ in range(rounds))


def measure_machine(
    model, demand: Demand, head_bytes: int, num_tokens: int = 8, prompt_tokens: int = 32, rounds: int = 3
) -> Machine:
    """Constants of this machine for models like this one; a model of a few layers will do.

    demand      of this very model, see `Architecture.demand`
    head_bytes  bytes of its output head
    Raises ValueError where other programs keep the machine too busy for that.
    """
    tokens, prompt = random_tokens(model, num_tokens), random_tokens(model, prompt_tokens, seed=1)
    whole = float(seconds_per_token(model, tokens, rounds=rounds).mean())
    with without_experts(model):
        rest = float(seconds_per_token(model, tokens, rounds=rounds).mean())
    if rest > 0.98 * whole:
        raise ValueError(
            f"this machine is too busy to be measured: a token took {1e3 * whole:.1f} ms, without its experts"
            f" {1e3 * rest:.1f} ms; stop other programs and try again"
        )
    of_head = head_bytes / head_seconds(model, demand.hidden)
    machine = Machine(
        "this machine",
        # Where the rest moves faster than the head alone did, it is the rest that decoding consists of.
        bytes_per_second=max(of_head, demand.rest_bytes / rest),
        expert_bytes_per_second=float(demand.expert_bytes.sum()) * demand.chosen / (whole - rest),
        operations_per_second=float("inf"),
        layer_seconds=max((rest - demand.rest_bytes / of_head) / demand.num_layers, 0.0),
        source=f"measured here with {demand.num_layers} layers, {demand.num_moe_layers} of them MoE",
        cache_bytes_per_second=cache_speed(model, demand, rounds=rounds),
        kind="CPU" if mx.default_device().type == mx.cpu else "Metal" if mx.metal.is_available() else "CUDA",
    )
    seconds = seconds_of_prompt(model, prompt, rounds, whole=True)
    with record_routing(model) as trace:
        seconds_of_prompt(model, prompt, rounds=1)
    everything = np.ones((demand.num_moe_layers, 1, demand.num_experts), bool)
    load, speed = fullest_device(trace.experts, everything, prompt_tokens), prompt_tokens / seconds
    return fit_arithmetic(machine, demand, prompt_tokens, speed, load)
