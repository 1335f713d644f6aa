"""Requests to mlx-lm's server: each is answered, none ends the server, and on ranks all of them leave one together.

mlx-lm looks after what it reads of a request, not after what it makes of it: an empty prompt, a stop word that is no
text, more of `top_k` than there are tokens fail in the thread that answers everybody.
"""

from __future__ import annotations

import json
from numbers import Integral

ASK_EVERY = 16  # tokens of a request that is answered alone, after which ranks ask whether its client is there


def handling(handler, metrics) -> dict:
    """Methods of mlx-lm's APIHandler: GET /metrics, and 400 with the reason where mlx-lm says nothing.

    metrics  () -> text in Prometheus' format
    """
    get, post, validate, send = (
        handler.do_GET,
        handler.do_POST,
        handler.validate_model_parameters,
        handler.send_response,
    )

    def do_GET(self):
        if self.path.partition("?")[0] != "/metrics":
            get(self)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        _send(self, metrics())

    def do_POST(self):
        self.answers = False
        try:
            post(self)
        except ConnectionError:  # nobody is there any more
            raise
        except Exception as error:
            if self.answers:  # half-way
                raise
            self._set_completion_headers(400)  # as mlx-lm's own answers: a page of another server may read it, too
            _send(self, json.dumps({"error": f"{type(error).__name__}: {error}"}))

    def validate_model_parameters(self):
        import mlx.core as mx

        validate(self)
        try:
            mx.random.key(self.seed or 0)
        except TypeError:
            raise ValueError(f"seed must be a number from 0 to 2**64 - 1, not {self.seed}") from None

    def send_response(self, *args):
        self.answers = True
        send(self, *args)

    return {each.__name__: each for each in (do_GET, do_POST, validate_model_parameters, send_response)}


def _send(handler, text: str) -> None:
    body = text.encode()
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def tried_first(module, generator, width_of):
    """mlx-lm's ResponseGenerator that refuses a request by itself where it cannot be answered.

    module    mlx_lm.server
    width_of  (tokenizer) -> number of logits of the model that is loaded
    """

    class Tried(generator):
        def _tokenize(self, tokenizer, request, args):  # where mlx-lm hands an error to the client
            found = super()._tokenize(tokenizer, request, args)
            _check_prompt(found[0])
            self._make_state_machine(self.model_provider.model_key, tokenizer, args.stop_words)
            try_sampling(module, tokenizer, args, width_of(tokenizer))
            return found

    return Tried


def _check_prompt(ids) -> None:
    if len(ids) == 0:
        raise ValueError("the prompt is empty")
    if not all(isinstance(token, Integral) for token in ids):  # of several texts, for example
        raise ValueError("the prompt must be one text")


def try_sampling(module, tokenizer, args, width: int) -> None:
    """One step with logits that say nothing; an error, where the request's numbers do not go with this model's."""
    import mlx.core as mx

    wrong = [token for token in args.logits.logit_bias or () if not 0 <= token < width]
    if wrong:  # MLX writes where that is
        raise ValueError(f"logit_bias: there is no token {wrong[0]}, they go from 0 to {width - 1}")
    anew = mx.random.randint(0, 2**31 - 1).item()  # some draws more; who wants his own has a seed, which is set later
    try:
        logits = mx.zeros((1, width))
        for process in module._make_logits_processors(args):
            logits = process(mx.array([0, 0]), logits)
        sampler = module._make_sampler(args, tokenizer)
        mx.eval(getattr(sampler, "alone", sampler)(logits))
    except BaseException:
        mx.random.seed(anew)  # a compiled sampler that fails leaves a state of which nothing can be drawn any more
        raise


def leaving_together(module, group) -> tuple:
    """(class from class of mlx-lm's ResponseGenerator, stream_generate from stream_generate) for ranks.

    A request with a seed is answered alone. Where its client hangs up mlx-lm ends it on rank 0, and the others wait:
    here all end it at the same token.
    """
    import mlx.core as mx

    left = []  # not empty: the client of the request that is answered alone has gone

    class Queue:
        def __init__(self, queue, left):
            self._queue, self._left = queue, left

        def put(self, item):
            if isinstance(item, module.GenerationContext):
                item.stop = lambda: self._left.append(True)
            self._queue.put(item)

    def of_generator(generator):
        class Together(generator):
            def _serve_single(self, request, stream):
                nonlocal left
                left = []  # another one: the last client's end may be told late
                queue, *rest = request
                super()._serve_single((Queue(queue, left), *rest), stream)

        return Together

    def of_stream(stream):
        def stream_generate(*args, **how):
            for count, response in enumerate(stream(*args, **how), start=1):
                yield response
                if count % ASK_EVERY == 0 and mx.distributed.all_sum(mx.array(len(left)), group=group).item():
                    return

        return stream_generate

    return of_generator, of_stream
