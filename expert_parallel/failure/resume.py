"""A run that keeps a journal, or goes on from one: the same loop, which is told the tokens that are known already.

The tokens of the journal go through the model one by one, as they did at first, so that key-value cache, routing trace
and random numbers are those of a run that nothing ended: to the bit where it is laid out as it was, else to rounding.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import deque

import mlx.core as mx

from .. import __version__
from ..placing.strategies import STRATEGIES
from ..ranks.group import all_or_none, checkpoint_mark, gather_objects
from .journal import Journal, Past
from .planned import DEFAULT, EXACT

# What decides the answer, beside the model, and is taken from the journal where the command line does not say it;
# not what only says where it is computed: devices, placement, memory, which may change between two parts of a run
# (unless devices are lost whose experts nobody stands in for).
DECIDING = ("max_tokens", "temp", "top_p", "top_k", "min_p", "seed", "system_prompt", "chat_template_config")
DECIDING += ("ignore_chat_template", "kv_bits", "dtype", "cold_bits", "cold_share", "fail_device", "on_failure")
PLACES = ("model", "adapter_path", "placement_trace")  # may have moved: what lies there is compared


def header_of(args, checkpoint, prompt, dtype, versions: dict, placement, cold_trace=None) -> dict:
    """All that decides the answer, for a journal's first line.

    dtype       of what is not packed, None: the checkpoint's
    versions    those of the report's environment
    placement   decides the answer where devices are lost whose experts nobody stands in for
    cold_trace  the RoutingTrace that says which experts are cold
    """
    names = {name: getattr(args, name) for name in DECIDING}
    names |= {"model": args.model or checkpoint.folder, "adapter_path": args.adapter_path}
    placed = bool(args.fail_device) and (args.on_failure or DEFAULT) not in EXACT
    names["placement_trace"] = args.placement_trace if args.cold_bits is not None or placed else None
    if placed:
        file = os.path.abspath(args.placement) if args.placement not in STRATEGIES else None  # noqa: PTH100
        names |= {"placement": file or args.placement, "devices": placement.num_devices}
        names["redundant_experts"] = args.redundant_experts
    for name in PLACES:  # from whatever folder the run is resumed
        if names[name] is not None:
            names[name] = os.path.abspath(names[name]) if os.path.exists(names[name]) else str(names[name])  # noqa: PTH100, PTH110
    adapter = checkpoint_mark(args.adapter_path, "adapters*") if args.adapter_path else None
    model = {"config": _mark(json.dumps(checkpoint.config, sort_keys=True, default=str).encode())}
    model |= {"weights": checkpoint_mark(checkpoint.folder), "adapter": adapter, "dtype": str(dtype)}
    model["cold experts"] = _mark(cold_trace.loads().tobytes()) if args.cold_bits is not None else None
    model["placement"] = _mark(placement.held.tobytes()) if placed else None
    return {
        "versions": {"mlx": versions["mlx"], "mlx-lm": versions["mlx_lm"], "expert-parallel": __version__},
        "model": model,
        "options": names,
        "prompt": {"ids": prompt.ids, "text": prompt.text, "max_tokens": prompt.max_tokens},
    }


def _mark(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def differences(past: dict, now: dict) -> list[str]:
    """In words, what decides the answer and is not as it was: none where the run can go on."""
    found = []
    for kind, name in (("versions", "{}"), ("model", "the model's {}")):
        for key in past[kind] | now[kind]:
            then, here = past[kind].get(key), now[kind].get(key)
            if then != here:
                found.append(f"{name.format(key)} ({_short(then)} there, {_short(here)} here)")
    for name in DECIDING:
        if past["options"].get(name) != now["options"][name]:
            found.append(f"--{name.replace('_', '-')} ({past['options'].get(name)} there, {now['options'][name]} here)")
    if past["prompt"]["ids"] != now["prompt"]["ids"]:
        found.append(f"the prompt ({len(past['prompt']['ids'])} tokens there, {len(now['prompt']['ids'])} here)")
    return found


def _short(value) -> str:
    return str(value)[:8] if isinstance(value, str) and len(value) == 32 else str(value)


class Kept:
    """What becomes of each token: it is taken from the journal while that has some, and written there from then on.

    `chosen` and `after_token` are those of the script's `generate`, on every rank; rank 0 alone has the file. Without
    a journal all of it does nothing.
    """

    def __init__(self, path: str | None, journal: Journal | None, past: Past):
        self.path, self.journal, self.past = path, journal, past
        self.begun = past.header is not None  # before
        self.replayed, self.differing, self.seconds = len(past.tokens), 0, 0.0
        self._asked = self._known = 0  # tokens
        self._own = deque()  # what the model says itself, of tokens that are known already
        self._known_before, self._began = list(past.tokens), None

    def begin(self, header: dict) -> None:
        """On rank 0, before the first token: ValueError where the journal is of another run, with what differs."""
        if self.journal is None:
            self.journal = Journal(self.path, resume=False)
        if self.begun and (other := differences(self.past.header, header)):
            raise ValueError(f"{self.path} is of another run, with other {', '.join(other)}")
        self.journal.begin(header)

    @property
    def prompt(self) -> dict | None:
        """{"ids", "text", "max_tokens"} of the run that goes on."""
        return self.past.header["prompt"] if self.begun else None

    def chosen(self, token: mx.array) -> mx.array:
        """The token [1] that the next pass reads: the journal's, or the model's own."""
        n, self._asked = self._asked, self._asked + 1
        if n >= self.replayed:
            return token
        self._began = self._began or time.perf_counter()
        self._own.append(token)
        # With its own as a dependency: that is computed too, and ranks carry out the same sums in the same order.
        return mx.depends(mx.array([self._known_before[n]], token.dtype), token)

    def after_token(self, token: int) -> None:
        """It is known, as every pass up to it is done."""
        n, self._known = self._known, self._known + 1
        if n < self.replayed:
            self.differing += self._own.popleft().item() != token
            self.seconds = time.perf_counter() - self._began
        elif self.journal:
            self.journal.add(token)

    def end(self, why: str) -> None:
        """The answer is complete: "stop" or "length"."""
        if self.journal and self.past.end is None:
            self.journal.end(why)
        if self.journal:
            self.journal.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, *about):
        if kind is KeyboardInterrupt and self.journal:
            raise KeyboardInterrupt(f"--resume {self.path} goes on") from None

    def unlike(self) -> str:
        """A line for the user where the model would have gone another way: rounding, on other devices."""
        if not self.differing:
            return ""
        return f"{self.differing} of {self.replayed} tokens of {self.path} would have been chosen otherwise here"

    def figures(self) -> dict | None:
        """Tokens and seconds of the replay, None without a journal."""
        if not self.path:
            return None
        figures = {"file": str(self.path), "tokens_replayed": self.replayed, "differing": self.differing}
        return figures | {"tokens_new": self._known - self.replayed, "seconds_replay": self.seconds}

    def notes(self) -> list[str]:
        """Lines for the user, on what is resumed."""
        if self.past.end and self.begun:
            return [f"{self.path} is complete: its {self.replayed} tokens go through the model again, for the report"]
        if self.begun:
            return [f"{self.path} is resumed after {self.replayed} tokens"]
        return [f"{self.path} was not begun: a new run"] if self.journal else []


def keep(args, group) -> Kept:
    """What --journal and --resume ask for. A collective: rank 0 reads the journal and tells the others."""
    journal = None
    with all_or_none(group):
        if args.resume and group.rank() == 0:
            journal = Journal(args.resume, resume=True)
    past = gather_objects(group, vars(journal.past) if journal else {})[0]
    return Kept(args.resume or args.journal, journal, Past(**past))
