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
from contextlib import ExitStack, contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, make_prompt_cache

from ..layers import activation_type, expert_tensors, moe_layers
from ..trace import record_routing, replaced
from ..trials import Dummy
from .step import Demand, Machine, fit_arithmetic, fullest_device


@contextmanager
def without_experts(model):
    """The model with experts that answer zeros while the block runs."""
    with ExitStack() as stack:
        for layer in moe_layers(model):
            stack.enter_context(replaced(layer, {"experts": Dummy(layer.experts)}))
        yield


def shortest(run, rounds: int) -> float:
    """Seconds of the quickest of so many calls; what is built at the first is not counted where there are more."""
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        mx.eval(run())
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def random_tokens(model, count: int, seed: int = 0) -> list[int]:
    """Token ids that any rank draws alike, for timing where what is said does not matter."""
    vocabulary = max(m.weight.shape[0] for m in model.modules() if isinstance(m, nn.Embedding | nn.QuantizedEmbedding))
    return np.random.default_rng(seed).integers(0, vocabulary, count).tolist()


def seconds_per_token(model, tokens: list[int], context: int = 8, rounds: int = 3) -> np.ndarray:
    """[T]; decoding tokens given beforehand, after a context of the first of them; the shortest of the rounds."""
    seconds = np.full((rounds, len(tokens)), np.inf)
    for row in seconds:
        cache = make_prompt_cache(model)
        mx.eval(model(mx.array([tokens[:context]]), cache=cache))
        mx.eval(model(mx.array([tokens[:1]]), cache=cache))  # what is built at the first single token
        for n, token in enumerate(tokens):
            begin = time.perf_counter()
            mx.eval(model(mx.array([[token]]), cache=cache))
            row[n] = time.perf_counter() - begin
    return seconds.min(axis=0)


def seconds_of_prompt(model, tokens: list[int], rounds: int = 3) -> float:
    """Shortest time to fill a cache with a prompt, without the output head's logits, as generation does."""

    def fill():
        cache = make_prompt_cache(model)
        model(mx.array([tokens]), cache=cache)
        return [entry.state for entry in cache]

    return shortest(fill, rounds)


def cache_speed(model, demand: Demand, tokens: int = 16384, rounds: int = 3) -> float:
    """Bytes of keys and values a second that a token looks back on; 0 where the model keeps no plain ones.

    The cache is filled with zeros: attention costs the same, and no prompt needs to be read.
    """
    if not all(type(entry) is KVCache for entry in make_prompt_cache(model)):
        return 0.0

    def seconds(context):
        cache = make_prompt_cache(model)
        mx.eval(model(mx.array([[1]]), cache=cache))
        for entry in cache:
            more = [mx.zeros((1, a.shape[1], context, a.shape[3]), a.dtype) for a in (entry.keys, entry.values)]
            entry.update_and_fetch(*more)
        mx.eval([entry.state for entry in cache])
        return shortest(lambda: model(mx.array([[1]]), cache=cache), rounds + 1)

    with without_experts(model):
        longer = seconds(tokens) - seconds(1)
    return demand.cache_per_token * tokens / longer if longer > 0 else 0.0


def head_seconds(model, hidden: int, rounds: int = 6) -> float:
    """Shortest time of the output head for one token."""
    head = getattr(model, "language_model", model).get("lm_head")
    if head is None:
        head = next(m for m in model.modules() if isinstance(m, nn.Embedding | nn.QuantizedEmbedding)).as_linear
    x = mx.random.normal((1, 1, hidden))
    return shortest(lambda: head(x), rounds)


def measure_machine(
    model,
    demand: Demand,
    head_bytes: int,
    num_tokens: int = 8,
    prompt_tokens: int = 32,
    rounds: int = 3,
) -> Machine:
    """Constants of this machine for models like this one; a model of a few layers will do.

    demand      of this very model, see `Architecture.demand`
    head_bytes  bytes of its output head
    Raises ValueError where other programs keep the machine too busy for that.
    """
    tokens = random_tokens(model, num_tokens)
    whole = float(seconds_per_token(model, tokens, rounds=rounds).mean())
    with without_experts(model):
        rest = float(seconds_per_token(model, tokens, rounds=rounds).mean())
    if rest > 0.98 * whole:
        raise ValueError(
            f"this machine is too busy to be measured: a token took {1e3 * whole:.1f} ms, without its experts"
            f" {1e3 * rest:.1f} ms; stop other programs and try again"
        )
    bandwidth = head_bytes / head_seconds(model, demand.hidden)
    expert_bytes = float(demand.expert_bytes.sum()) * demand.chosen
    per_layer = max((rest - demand.rest_bytes / bandwidth) / demand.num_layers, 0.0)
    # Where the rest moves faster than the head alone did, it is the rest that decoding consists of.
    bandwidth = max(bandwidth, demand.rest_bytes / rest)
    machine = Machine(
        "this machine",
        bandwidth,
        expert_bytes / (whole - rest),
        1e30,
        per_layer,
        source=f"measured here with {demand.num_layers} layers, {demand.num_moe_layers} of them MoE",
        cache_bytes_per_second=cache_speed(model, demand, rounds=rounds),
        value_bytes=activation_type(expert_tensors(moe_layers(model)[0].experts)).size,
    )
    prompt = random_tokens(model, prompt_tokens, seed=1)
    seconds = seconds_of_prompt(model, prompt, rounds)
    with record_routing(model) as trace:
        seconds_of_prompt(model, prompt, rounds=1)
    everything = np.ones((demand.num_moe_layers, 1, demand.num_experts), dtype=bool)
    load = fullest_device(trace.experts, everything, prompt_tokens)
    return fit_arithmetic(machine, demand, prompt_tokens, prompt_tokens / seconds, load)
