"""Requests to mlx-lm's server: none ends its thread, and so the server, and on ranks all of them leave one together.

mlx-lm looks after what it reads of a request, not after what it makes of it: an empty prompt, a stop word that is no
text, more of `top_k` than there are tokens fail in the thread that answers everybody.
"""

from __future__ import annotations

from numbers import Integral

ASK_EVERY = 16  # tokens of a request that is answered alone, after which ranks ask whether its client is there


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
