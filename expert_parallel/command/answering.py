"""Answers of a model to one prompt, token by token, or to several together; ranks follow rank 0.

Dimensions: R sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass


def generate(model, tokenizer, prompt, args, group, heard, out=False, chosen=lambda token: token, after_token=None):
    """Stream the answer: (token ids, text, last response, prompt cache). `heard` is called after each token.

    chosen       asked for the token of each forward pass, sampled [1], before the next one begins
    after_token  called with each token, in order, when it is known; the next pass may have begun
    Of several prompts: see `together`.
    """
    import mlx.core as mx
    from mlx_lm.generate import stream_generate
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.sample_utils import make_sampler

    from ..experts import is_rank
    from ..ranks.group import Agreed

    mx.random.seed(args.seed)
    sample = make_sampler(temp=args.temp, top_p=args.top_p, min_p=args.min_p, top_k=args.top_k)
    agreed = Agreed(group) if is_rank(group) else None
    # mlx-lm's own stream would run on while the next collective starts elsewhere: one stream keeps them in order.
    sampler = lambda logprobs: chosen(agreed(sample(logprobs)) if agreed else sample(logprobs))  # noqa: E731
    how = {"sampler": sampler, "stream": mx.default_stream(mx.default_device())}
    if prompt.several:
        return together(model, tokenizer, prompt.several, how, agreed, heard, out)
    cache, tokens, text, last = make_prompt_cache(model), [], "", None
    how |= {"prompt_cache": cache}
    how |= {"kv_bits": args.kv_bits, "quantized_kv_start": 0} if args.kv_bits else {}
    for last in stream_generate(model, tokenizer, prompt.ids, prompt.max_tokens, **how):
        heard()
        if agreed:
            agreed.check()
        if out:
            print(last.text, end="", flush=True)
        text += last.text
        if last.finish_reason != "stop":
            tokens.append(last.token)
        if after_token:
            after_token(last.token)
    if out:
        print()
    return tokens, text, last, cache


@dataclass
class Together:
    """What mlx-lm says of R sequences that it decoded together: what its last response says of one, and the answers."""

    answers: list[list[int]]  # [R]
    texts: list[str]
    prompt_tokens: int  # that were read many at a time: all but the last of each prompt
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    logprobs: object  # a number that is NaN where one of any step was
    finish_reason: str | None = None


def together(model, tokenizer, prompts, how: dict, agreed, heard, out: bool):
    """As `generate`, of R prompts by mlx-lm's batch_generate: tokens of all in a row, texts under their first words.

    how  the sampler and the stream that mlx-lm is told
    """
    import mlx.core as mx
    from mlx_lm.generate import batch_generate

    broken, sample = [mx.array(False)], how["sampler"]

    def sampler(logprobs):  # which is asked once a step, for all sequences
        heard()
        broken[0] = broken[0] | mx.isnan(logprobs).any()  # of a sequence that ends sooner, too
        return sample(logprobs)

    ids, most = [each.ids for each in prompts], [each.max_tokens for each in prompts]
    more = {"return_token_ids": True, "return_prompt_caches": True, **how, "sampler": sampler}
    answer = batch_generate(model, tokenizer, ids, max_tokens=most, **more)
    if agreed:
        agreed.check(agreed.unchecked)
    cache = [entries[0].merge(entries) for entries in zip(*answer.caches, strict=True)]
    said = zip(prompts, answer.texts, strict=True)
    text = "\n".join(f"[{n}] {each.begins}\n{text}\n" for n, (each, text) in enumerate(said, start=1))
    if out:
        print(text)
    stats, tokens = answer.stats, answer.token_ids
    speeds = (stats.prompt_tokens, stats.prompt_tps, stats.generation_tokens, stats.generation_tps)
    last = Together(tokens, answer.texts, *speeds, mx.where(broken[0], mx.nan, 0.0))
    return sum(tokens, []), text, last, cache


def sequences(prompt, tokens: list[int], last) -> list[list[int]]:
    """[R]; each prompt with its answer behind it."""
    if not prompt.several:
        return [prompt.ids + tokens]
    return [each.ids + answer for each, answer in zip(prompt.several, last.answers, strict=True)]


def logits_of(model, rows: list[list[int]]):
    """[T, V] of all tokens of R sequences, which go through the model in one pass; shorter ones are padded."""
    import mlx.core as mx

    longest = max(map(len, rows))
    logits = model(mx.array([row + [0] * (longest - len(row)) for row in rows]))
    return mx.concatenate([of_row[: len(row)] for of_row, row in zip(logits, rows, strict=True)])
