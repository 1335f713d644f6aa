"""Routing traces: the router's decisions. Record, save, load, cut.

Dimensions: T tokens, L MoE layers, E experts, k chosen per token.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import PromptProcessingBatch as Prompts

from .files import written_whole
from .layers import MoELayer, StandIn, moe_layers, num_experts

FORMAT, KINDS = "routing-trace/1", {"num_experts": int, "model": str, "metadata": dict}


@dataclass(eq=False)
class RoutingTrace:
    """Which experts were chosen for which token.

    experts      uint16 [T, L, k]
    num_experts  E
    prefill      bool [T]; a token of a prompt, read many at a time, or one of decoding
    model        name of the model
    metadata     anything that goes into JSON
    steps        int32 [T]; the forward pass that read a token, growing; where None is given, a prompt's tokens in a row
                 count as one pass and every other token as one of its own
    """

    experts: np.ndarray
    num_experts: int
    prefill: np.ndarray | None = None
    model: str = ""
    metadata: dict = field(default_factory=dict)
    steps: np.ndarray | None = None

    def __post_init__(self):
        experts = np.asarray(self.experts)
        if experts.ndim != 3:
            raise ValueError(f"a trace is [tokens, layers, chosen], got {list(experts.shape)}")
        if experts.size and (experts.min() < 0 or experts.max() >= self.num_experts):
            bad = experts.max() if experts.max() >= self.num_experts else experts.min()
            raise ValueError(f"expert {bad} does not exist: the trace is of {self.num_experts} experts")
        if experts.dtype.kind not in "iu" and not np.array_equal(experts, np.rint(experts)):  # nan is not nan
            raise ValueError("a trace holds expert numbers, got some that are not whole")
        if self.num_experts > 1 << 16:
            raise ValueError(f"a trace holds at most {1 << 16} experts, got {self.num_experts}")
        self.experts = np.asarray(experts, np.uint16)
        self.prefill = np.asarray(np.zeros(len(experts)) if self.prefill is None else self.prefill, bool)
        if self.prefill.shape != (len(experts),):
            raise ValueError(f"prefill marks {list(self.prefill.shape)} do not fit {len(experts)} tokens")
        if self.steps is None:
            self.steps = np.append(True, ~(self.prefill[1:] & self.prefill[:-1]))[: len(experts)].cumsum()
        self.steps = np.asarray(self.steps, np.int32)
        if self.steps.shape != (len(experts),) or (np.diff(self.steps) < 0).any():
            raise ValueError(f"forward passes {list(self.steps.shape)} do not fit {len(experts)} tokens, or go back")

    def __len__(self):
        return len(self.experts)

    def __repr__(self):
        t, l, k = self.experts.shape
        return f"RoutingTrace({self.model or 'unnamed'}: {t} tokens x {l} layers, top-{k} of {self.num_experts})"

    def __getitem__(self, tokens) -> RoutingTrace:
        """The same trace for a slice or mask of tokens."""
        return replace(self, experts=self.experts[tokens], prefill=self.prefill[tokens], steps=self.steps[tokens])

    def phase(self, name: str) -> RoutingTrace:
        """The tokens of `prefill` or of `decode`."""
        return self[{"prefill": self.prefill, "decode": ~self.prefill}[name]]

    def loads(self) -> np.ndarray:
        """Slots sent to each expert, int64 [L, E]."""
        layers = self.experts.swapaxes(0, 1)
        return np.stack([np.bincount(ids.ravel(), minlength=self.num_experts) for ids in layers]).astype(np.int64)

    def save(self, path) -> None:
        """One .npz file: the arrays, and the rest as JSON in it. Small numbers take a byte: 7 times as fast."""
        small = self.experts.astype(np.uint8) if self.num_experts <= 256 else self.experts
        about = {"format": FORMAT, "num_experts": self.num_experts, "model": self.model, "metadata": self.metadata}
        with written_whole(path, "wb") as file:
            arrays = {"experts": small, "prefill": self.prefill, "steps": self.steps}
            np.savez_compressed(file, **arrays, about=json.dumps(about))

    @staticmethod
    def load(path) -> RoutingTrace:
        """Read what `save` wrote. ValueError naming the file if it is not that."""
        try:
            with np.load(path) as file:
                about = json.loads(str(file["about"]))
                lies = [name for name, kind in KINDS.items() if type(about[name]) is not kind]
                if lies or about["format"] != FORMAT:
                    raise ValueError(f"its {(name := [*lies, 'format'][0])} is {about[name]!r}, not as in {FORMAT!r}")
                experts, prefill, steps = file["experts"], file["prefill"], file.get("steps")  # early ones have none
            return RoutingTrace(experts, about["num_experts"], prefill, about["model"], about["metadata"], steps)
        except Exception as error:  # zipfile, numpy, json and os each have their own
            words = "it is no routing trace, which --trace and RoutingTrace.save write"
            why = words if "pickle" in str(error) or isinstance(error, KeyError | TypeError) else error
            raise ValueError(f"cannot read routing trace {path}: {why}") from None


class Recorder(StandIn):
    """Stands before the experts of one layer and notes what the router asked for."""

    def __init__(self, experts: nn.Module, note):
        super().__init__(experts)
        self._note = note

    def __call__(self, x, indices):
        self._note(indices)
        return self.experts(x, indices)


@contextmanager
def recorders(layers: list[MoELayer], notes: list):
    """A Recorder before the experts of each layer while the block runs; notes [L] are called with the indices."""
    standing = [Recorder(layer.experts, note) for layer, note in zip(layers, notes, strict=True)]
    for layer, recorder in zip(layers, standing, strict=True):
        layer.experts = recorder
    try:
        yield
    finally:
        for layer, recorder in zip(layers, standing, strict=True):
            layer.experts = recorder.experts  # other ones than before if the block sharded the model or moved experts


@contextmanager
def replaced(owner, attributes: dict):
    """Other attributes of a class or module while the block runs."""
    originals = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in originals.items():
            setattr(owner, name, value)


@contextmanager
def record_routing(model: nn.Module, name: str = "", prompt_tokens: int | None = None, max_tokens: int = 1_000_000):
    """Record every router decision of `model` while the block runs.

        with record_routing(model) as trace:
            generate(model, tokenizer, prompt)
        trace.loads()          # filled when the block ends

    prompt_tokens  so many positions are the prompt; where None, a forward pass over several
                   positions is prefill and one over a single position is decode
    max_tokens     recording stops there (metadata "dropped_tokens" says how many came after)

    Of a batch (metadata "sequences": the most in one pass) mlx-lm's padding of shorter prompts is left out (metadata
    "padding": so many tokens, which routers route as well); a prompt's last token, which it reads by itself, is one of
    decoding; and what a block hands on is recorded: longcat_flash's zero experts, which it adds itself, as expert 0.
    ValueError where layers choose different numbers of experts. The host reads indices now and then: no wait per layer.
    """
    layers = moe_layers(model)
    notes = _Notes(len(layers), max_tokens)
    trace = RoutingTrace(notes.finish()[0], num_experts(layers[0].experts), model=name)
    try:
        with (
            recorders(layers, [notes.taker(l) for l in range(len(layers))]),
            replaced(type(model), {"__call__": notes.watching(model)}),
            replaced(Prompts, {"prompt": notes.reading(Prompts.prompt)}),
        ):
            yield trace
    finally:
        trace.experts, trace.prefill, trace.steps = notes.finish()
        if prompt_tokens is not None:
            trace.prefill = np.arange(len(trace)) < prompt_tokens
        seen = {"dropped_tokens": notes.dropped, "sequences": notes.sequences, "padding": notes.padding}
        trace.metadata |= {name: count for name, count in seen.items() if count > (name == "sequences")}


class _Notes:
    """Indices as they come, pass by pass; every so many passes they move to numpy.

    Whether a pass is prefill the model's input [B, T] says: some blocks hand on their tokens flat, and
    8 sequences of one token then look like one of 8. Where a block is run by itself, its indices say it.
    """

    EVERY = 64  # forward passes

    def __init__(self, num_layers, max_tokens):
        self.num_layers, self.room = num_layers, max_tokens
        self.passes = []  # that are not collected: (prefill, which are no padding, [indices of layer 0, ...])
        self.experts, self.prefill = [], []  # of each pass: [T, L, k], and whether it is one
        self.input_shape, self.sequences, self.dropped = None, 1, 0  # [B, T] of the pass under way, most B
        self.left, self.padding = None, 0  # tokens [B, 1] of prompts under way, that are still to come
        self.begun = False  # whether its first layer was here

    def taker(self, layer):
        def take(indices):
            whole = self.input_shape[-1] if self.input_shape else 0
            if layer == 0 and not (whole and self.begun):
                self.begun = True
                if len(self.passes) >= self.EVERY:
                    self.collect()
                shape = self.input_shape or indices.shape[:-1]
                prefill, real = bool(shape) and shape[-1] > 1, None
                if self.left is not None:
                    real, self.left = (np.arange(shape[-1]) < self.left).ravel(), self.left - shape[-1]
                self.passes.append((prefill or real is not None, real, []))
            so_far = self.passes[-1][-1] if self.passes else []
            if so_far and indices.shape[-1] != so_far[0].shape[-1]:
                counts = f"{so_far[0].shape[-1]} and {indices.shape[-1]}"
                raise ValueError(f"layers that choose {counts} experts a token cannot be recorded: a trace has one k")
            if len(so_far) == layer:
                so_far.append(indices)
            elif len(so_far) == layer + 1 and so_far[layer].shape[-2] < whole:  # the other half, ranks/overlap.py
                so_far[layer] = mx.concatenate([so_far[layer], indices], axis=-2)

        return take

    def watching(self, model):
        """A __call__ for the model's class that notes what shape the model is called with."""
        original = type(model).__call__

        def call(this, *args, **kwargs):
            if this is not model:
                return original(this, *args, **kwargs)
            self.begun, self.input_shape = False, getattr(args[0] if args else kwargs.get("inputs"), "shape", None)
            self.sequences = max(self.sequences, (self.input_shape or (1,))[0])
            try:
                return original(this, *args, **kwargs)
            finally:
                self.input_shape = None

        return call

    def reading(self, original):
        """A `prompt` for mlx-lm's batches of prompts [B], which pads the shorter ones at their ends."""

        def prompt(this, tokens):
            self.left = np.array([[len(each)] for each in tokens])
            original(this, tokens)
            self.left = None

        return prompt

    def collect(self):
        whole = [of_pass for of_pass in self.passes if len(of_pass[-1]) == self.num_layers]
        self.passes.clear()
        mx.eval([ids for *_, ids in whole])
        for prefill, real, ids in whole:
            rows = np.stack([np.array(i).reshape(-1, i.shape[-1]).astype(np.uint16) for i in ids], axis=1)
            if real is not None:
                rows, self.padding = rows[real], self.padding + int((~real).sum())
            if room := min(len(rows), self.room):  # an empty slice would keep the whole pass in memory
                self.experts.append(rows[:room].copy() if room < len(rows) else rows)
                self.prefill.append(prefill)
            self.room, self.dropped = self.room - room, self.dropped + len(rows) - room

    def finish(self):
        """(experts [T, L, k], prefill [T], steps [T])."""
        self.collect()
        lengths = list(map(len, self.experts))
        steps = np.repeat(np.arange(len(lengths)), lengths)
        if not self.experts:
            return np.zeros((0, self.num_layers, 0), np.uint16), np.zeros(0, bool), steps
        return np.concatenate(self.experts), np.repeat(self.prefill, lengths), steps
