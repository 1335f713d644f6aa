"""Monitor: what devices have to do while a model serves, in lines and as numbers for a dashboard; experts may move.

Dimensions: L MoE layers, E experts, D devices.
"""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from ..balance import balancedness
from ..layers import moe_layers
from ..placement import Placement
from ..trace import replaced
from .live import CHECK, Counting, LiveRebalancing


class Monitor:
    """Watches a sharded model from forward pass to forward pass; a context manager.

    live        a LiveRebalancing of the model, which may then move experts; or None
    every       tokens after which `tell` is given a line
    tell        (line) -> None

    Slots are counted as routers ask for them (measured, padding of batches included); copies share them equally.
    `metrics()` may be asked from another thread: it reads numbers alone.
    """

    def __init__(self, model, placement: Placement, group=None, live: LiveRebalancing | None = None, every=1024,
                 tell=lambda line: None):  # fmt: skip
        self.model, self.live, self.every, self.tell = model, live, every, tell
        self.counting = live or Counting(model, group)
        self.placement, self.tokens, self.passes = placement, 0, 0
        self.slots = np.zeros(placement.num_devices)
        self._line = np.zeros((placement.num_layers, placement.num_devices))  # since the last line
        self._line_tokens, self.balancedness = 0, float("nan")
        self._stack = ExitStack()

    def __enter__(self):
        self._stack.enter_context(self.counting)
        kind, model = type(self.model), self.model
        original = kind.__call__

        def call(this, *args, **kwargs):
            if this is model:
                self._between_passes()
            return original(this, *args, **kwargs)

        self._stack.enter_context(replaced(kind, {"__call__": call}))
        return self

    def __exit__(self, *problem):
        return self._stack.__exit__(*problem)

    def _between_passes(self) -> None:
        self.passes += 1
        if self.passes % CHECK and not (self.live and self.live.ahead):
            return
        # 1. Slots since the last time, by the placement that answered them.
        loads, tokens = self.counting.take()
        of_devices = self.placement.device_loads(loads)
        self.slots, self._line = self.slots + of_devices.sum(axis=0), self._line + of_devices
        self.tokens, self._line_tokens = self.tokens + tokens, self._line_tokens + tokens
        # 2. Experts may move.
        if self.live:
            self.live.look(loads, tokens)
            self.placement = self.live.changes[-1][1]
        # 3. A line.
        if self._line_tokens >= self.every:
            self.balancedness = balancedness(self._line)
            self.tell(self._text())
            self._line, self._line_tokens = np.zeros_like(self._line), 0

    def _text(self) -> str:
        shares = self._line.sum(axis=0) / self._line.sum()
        text = f"{self._line_tokens} tokens: balancedness {self.balancedness:.2f}, load by device "
        text += " ".join(f"{share:.0%}" for share in shares)
        hits, misses = self._cache()
        text += f", {hits / (hits + misses):.0%} of experts were in memory" if misses else ""
        moved = sum(look["moved"] for look in self.live.looks) if self.live else 0
        return text + (f", experts have moved {moved} times" if moved else "")

    def _cache(self) -> tuple[int, int]:
        """Hits and misses so far of experts on disk, on devices that are here."""
        caches = [getattr(s, "cache", None) for layer in moe_layers(self.model) for s in layer.experts.stores]
        return sum(cache.hits for cache in caches if cache), sum(cache.misses for cache in caches if cache)

    def metrics(self) -> str:
        """All of it in the text format of Prometheus."""
        hits, misses = self._cache()
        counted = f"tokens through the experts, padding included, when last counted: every {CHECK} forward passes"
        lines = [
            _of("tokens_total", "counter", counted, {"": self.tokens}),
            _of("device_slots_total", "counter", "(token, chosen expert) pairs of each device; copies share equally",
                {f'{{device="{device}"}}': slots for device, slots in enumerate(self.slots.tolist())}),
            _of("balancedness", "gauge", "mean load over the fullest device's, last report", {"": self.balancedness}),
            _of("cache_hits_total", "counter", "experts that were in memory when wanted", {"": hits}),
            _of("cache_misses_total", "counter", "experts that were read from disk when wanted", {"": misses}),
        ]  # fmt: skip
        if self.live:
            looks = self.live.looks
            pauses = [look["pause_seconds"] for look in looks]
            lines += [
                _of("moves_total", "counter", "times that experts moved", {"": sum(look["moved"] for look in looks)}),
                _of("pause_seconds_total", "counter", "for which moves held the model up", {"": sum(pauses)}),
                _of(
                    "longest_pause_seconds",
                    "gauge",
                    "for which a move or its planning did at once",
                    {"": self.live.longest_pause},
                ),
            ]
        return "".join(lines)


def _of(name: str, kind: str, meaning: str, values: dict) -> str:
    name = f"expert_parallel_{name}"
    rows = "".join(f"{name}{label} {value}\n" for label, value in values.items())
    return f"# HELP {name} {meaning}\n# TYPE {name} {kind}\n{rows}"
