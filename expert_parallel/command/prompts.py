"""The prompt that was asked for: as text, a file or standard input, through the model's chat template if it has one."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FIRST_WORDS = 60  # characters of a prompt that stand above its answer
CHAT_PROMPT = "Write a Python function that returns the n-th Fibonacci number."
# No end of line at its end: that would be one token with the indent of the next line.
CODE_PROMPT = "class Parser:\n    def parse(self, text):\n        if not text:"


@dataclass(frozen=True)
class Prompt:
    """Token ids, the text they are of, and how many tokens may follow; of several prompts those of all in a row."""

    ids: list[int]
    text: str
    max_tokens: int
    note: str = ""
    several: tuple[Prompt, ...] = ()

    @property
    def begins(self) -> str:
        """Its first words, on a line."""
        from ..checkpoint.finding import cut

        return cut(" ".join(self.text.split()), FIRST_WORDS)

    def each_ids(self) -> list[list[int]]:
        """Of each prompt."""
        return [each.ids for each in self.several or (self,)]


def read_standard_input() -> str:
    """All of it; bytes that are no UTF-8 come as surrogates, which `read_prompt` refuses."""
    return sys.stdin.buffer.read().decode("utf-8", "surrogateescape") if sys.stdin else ""


def read_prompt(args, tokenizer, context: int | None, standard_input=None, before: dict | None = None) -> Prompt:
    """The prompt that was asked for; ValueError if it is empty, no text, or fills the context.

    context         tokens that the model can look at, where it says so
    standard_input  for --prompt -
    before          the prompt of the run that goes on, {"ids", "text", "max_tokens"}; none other is read
    """
    if before is not None:
        if args.prompt not in (None, "-") and text_of(args.prompt) != before["text"]:
            raise ValueError("--prompt is not that of the journal: leave it out to go on, or begin another journal")
        return Prompt(**before)
    if args.prompt is not None:
        text = text_of(args.prompt, standard_input)
    else:  # a base model's template, where it has one, hands a text over as it is
        plain = _token_ids(CODE_PROMPT, tokenizer, args) == list(tokenizer.encode(CODE_PROMPT, verbose=False))
        text = CODE_PROMPT if plain else CHAT_PROMPT
    return _prompt_of(text, args, tokenizer, context)


def read_prompts(args, tokenizer, context: int | None, *of_one) -> Prompt:
    """Those of --prompts FILE, one a line; ValueError as `read_prompt`, which names the line."""
    if not args.prompts.is_file():
        wrong = "not a file" if args.prompts.exists() else "no such file"
        raise ValueError(f"--prompts {args.prompts}: {wrong}; give a text file with one prompt a line")
    several, text = [], text_of(str(args.prompts), option="--prompts")
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            several += [_prompt_of(line.rstrip("\r"), args, tokenizer, context)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"--prompts {args.prompts}, line {number}: {error}") from None
    texts, ids = " | ".join(each.text for each in several), sum((each.ids for each in several), [])
    note = next((each.note for each in several if each.note), "")
    return Prompt(ids, f"{len(several)} together: {texts}", max(each.max_tokens for each in several), note, (*several,))


def _prompt_of(text: str, args, tokenizer, context: int | None) -> Prompt:
    ids = _token_ids(text, tokenizer, args)
    if context and len(ids) >= context:
        raise ValueError(f"the prompt has {len(ids)} tokens, the model's context is {context}")
    room = context - len(ids) if context else args.max_tokens
    note = ""
    if room < args.max_tokens:
        note = (
            f"--max-tokens {args.max_tokens} is cut to {room}: the prompt has {len(ids)} tokens, the context {context}"
        )
    return Prompt(ids, text, min(args.max_tokens, room), note)


def text_of(prompt: str, standard_input: str | None = None, option: str = "--prompt") -> str:
    """The text that a --prompt means: that of the file it names, of standard input (-), or itself."""
    text, which = prompt, "the prompt"
    if prompt == "-":
        text = standard_input or ""
    elif os.path.isfile(prompt):  # noqa: PTH113, pathlib's raises for a text too long for a file name
        text, which = Path(prompt).read_text("utf-8", "surrogateescape").removeprefix("\ufeff"), f"{option} {prompt}"
    elif os.path.isdir(prompt):  # noqa: PTH112
        raise ValueError(f"--prompt {prompt} is a folder: give a file in it, a text, or - for standard input")
    elif re.fullmatch(r"\S+\.(txt|md|py|json)", prompt):  # a model would answer the name of a file that is not there
        raise ValueError(f"--prompt {prompt}: no such file (where this is a text, hand it over by standard input)")
    if any("\ud800" <= letter <= "\udfff" or letter == "\0" for letter in text):
        raise ValueError(f"{which} is not UTF-8 text: give a text file, or convert it (iconv -t UTF-8)")
    if not text.strip():
        raise ValueError(f"{which} is empty")
    return text


def titled(prompts) -> dict[str, str]:
    """{title: prompt} of several, each with a title before it (code=a.py) or without; ValueError for one twice."""
    found = {}
    for number, prompt in enumerate(prompts, start=1):
        title, separator, value = prompt.partition("=")
        if not separator or not title.isidentifier() or len(title) > 12:
            title, value = f"text {number}", prompt
        if title in found:
            raise ValueError(f"--prompt: two texts are named {title}: give each a name of its own")
        found[title] = value
    return found


def _token_ids(text, tokenizer, args) -> list[int]:
    if args.ignore_chat_template or not tokenizer.has_chat_template:
        if args.system_prompt or args.chat_template_config:
            raise ValueError("--system-prompt and --chat-template-config are for a chat template, and there is none")
        return list(tokenizer.encode(text, verbose=False))  # too long a text is reported by the caller
    try:
        more = json.loads(args.chat_template_config or "{}")
        system = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
        messages = [*system, {"role": "user", "content": text}]
    except ValueError as error:
        raise ValueError(f"--chat-template-config is no JSON: {error}") from None
    try:
        with _no_warning():
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **more)
    except Exception as error:  # templates are programs: jinja2, json and they themselves raise what they like
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"the model's chat template fails: {reason}") from None
    if not ids:
        raise ValueError("the prompt is empty after the model's chat template")
    return list(ids)


@contextmanager
def _no_warning():
    """Without transformers' line on a text that is too long, which the caller reports; templates take no `verbose`."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
