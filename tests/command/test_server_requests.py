"""Requests that mlx-lm's server cannot answer: each is refused by itself, and ranks leave one together."""

import importlib
from queue import Queue
from types import SimpleNamespace

import pytest
from checkpoints import Rank
from conftest import SHIPPED
from mlx_lm import load

from expert_parallel.command import server_requests

module = importlib.import_module("mlx_lm.server")


def arguments(stop=(), **logits):
    sampling = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "xtc_probability": 0.0, "xtc_threshold": 0}
    names = ("logit_bias", "repetition_penalty", "repetition_context_size", "presence_penalty",
             "presence_context_size", "frequency_penalty", "frequency_context_size")  # fmt: skip
    of_logits = {**dict.fromkeys(names, 0), "repetition_context_size": 20, "logit_bias": None}
    sampling |= {name: logits.pop(name) for name in [*logits] if name in sampling}
    return SimpleNamespace(
        stop_words=stop, sampling=SimpleNamespace(**sampling), logits=SimpleNamespace(**{**of_logits, **logits})
    )


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("", {}),
        (["a", "b"], {}),
        ("x", {"stop": [1]}),
        ("x", {"stop": 5}),
        ("x", {"logit_bias": {4096: 1.0}}),
        ("x", {"logit_bias": {-1: 1.0}}),
        ("x", {"temperature": 1.0, "top_k": 10**9}),
    ],
)
def test_what_would_end_the_thread_of_the_server_is_refused(prompt, asked):
    """As `_tokenize` refuses it, whose errors mlx-lm hands to the client."""
    _, tokenizer = load(str(SHIPPED), lazy=True)
    tried = server_requests.tried_first(module, module.ResponseGenerator, lambda tokenizer: 4096)
    generator = object.__new__(tried)
    generator.model_provider, generator._state_machine_cache = SimpleNamespace(model_key="x"), {}
    request = SimpleNamespace(request_type="text", prompt="x")
    ids = tokenizer.encode("x")
    assert generator._tokenize(tokenizer, request, arguments(stop=["\n"], logit_bias={4095: 1.0}))[0] == ids
    request.prompt = prompt
    with pytest.raises((ValueError, TypeError)):
        generator._tokenize(tokenizer, request, arguments(**asked))


def test_a_draw_that_fails_leaves_one_to_be_drawn_afterwards():
    _, tokenizer = load(str(SHIPPED), lazy=True)
    with pytest.raises(RuntimeError):
        server_requests.try_sampling(module, tokenizer, arguments(temperature=1.0, top_k=10**30), 4096)
    for asked in ({}, {"min_p": 1.0}, {"top_p": 0.5}):
        server_requests.try_sampling(module, tokenizer, arguments(temperature=1.0, **asked), 4096)


def test_ranks_leave_a_request_of_a_client_that_hangs_up_together(monkeypatch):
    monkeypatch.setattr("mlx.core.distributed.all_sum", lambda values, group=None: values)
    of_generator, of_stream = server_requests.leaving_together(module, Rank(0, 2))
    stream, context = of_stream(lambda: iter(range(1000))), object.__new__(module.GenerationContext)

    class Single:
        def _serve_single(self, request, _):
            request[0].put(context)
            for token in stream():
                if token == 20:
                    context.stop()
                seen.append(token)

    for hangs_up, expected in ((True, 2 * server_requests.ASK_EVERY), (False, 1000)):
        seen = []
        Single_ = of_generator(Single)
        if not hangs_up:
            context.stop()  # the last client's, late
            monkeypatch.setattr(module.GenerationContext, "stop", lambda this: None)
            stream = of_stream(lambda: iter([*range(20), *range(21, 1001)]))
        Single_()._serve_single((Queue(), None, None), None)
        assert len(seen) == expected and not context._should_stop
