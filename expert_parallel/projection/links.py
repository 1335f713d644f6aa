"""Communication: bytes and time of the ways to bring expert outputs together. Numpy only.

Dimensions: T tokens, L MoE layers, E experts, k chosen, D devices, H hidden.

    gather   all-sum of the outputs of every slot         k H values a token and layer
    reduce   all-sum of the outputs weighted and summed     H values a token and layer
    dispatch each token goes to the devices of its experts and comes back (all-to-all):
             2 H values for every foreign device that it visits
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np


def combine_bytes(hidden: int, top_k: int, value_bytes: int = 2, combine: str = "gather") -> int:
    """Payload of one token in one MoE layer: what one all-sum adds up.

    value_bytes  2 for bfloat16, 4 for float32 (the CPU)
    """
    if combine == "gather":
        return top_k * hidden * value_bytes
    if combine == "reduce":
        return hidden * value_bytes
    raise ValueError(f'combine is "gather" or "reduce", got {combine!r}')


def bytes_per_token(hidden: int, top_k: int, num_layers: int, value_bytes: int = 2, combine: str = "gather") -> int:
    """Payload of one token over all L MoE layers."""
    return num_layers * combine_bytes(hidden, top_k, value_bytes, combine)


def ring_traffic(payload: float, num_devices: int) -> float:
    """Bytes that each rank sends in a ring all-reduce of `payload` bytes: 2 (N - 1) / N of them.

    Least possible for an all-reduce; Patarasuk and Yuan, "Bandwidth optimal all-reduce
    algorithms for clusters of workstations", 2009, section 3.
    """
    return 2 * (num_devices - 1) / num_devices * payload


def dispatch_bytes(foreign_devices: float, hidden: int, value_bytes: int = 2) -> float:
    """Bytes of one token in one MoE layer by dispatch and return, `foreign_devices` visited (mean allowed)."""
    return 2 * foreign_devices * hidden * value_bytes


def serving_devices(experts, held, home) -> np.ndarray:
    """Device that serves each slot of one layer, [T, k], when tokens live on devices.

    experts [T, k];  held bool [D, E];  home [T], the device a token lives on
    A copy at home serves; else the copies of an expert take turns over the tokens.
    """
    experts, home = np.asarray(experts, dtype=np.int64), np.asarray(home)
    holders = [np.flatnonzero(column) for column in held.T]
    turns = np.stack([np.resize(h, held.sum(axis=0).max()) for h in holders])  # [E, most copies]
    away = turns[experts, np.arange(len(experts))[:, None] % turns.shape[1]]
    return np.where(held[home[:, None], experts], home[:, None], away)


def traffic_matrix(experts, held, hidden: int, value_bytes: int = 2, home=None, send: str = "tokens") -> np.ndarray:
    """Bytes sent from device i to device j to dispatch a trace's tokens, float [L, D, D]; modelled.

    experts  [T, L, k] expert ids;  held  bool [L, D, E]
    home     [T], device a token lives on; token t on device t mod D where None
    send     tokens  a token goes once to a device, however many of its experts are there
             slots   once for every expert
    The way back is the transpose. The diagonal (what stays) is zero.
    """
    experts, held = np.asarray(experts), np.asarray(held, dtype=bool)
    if send not in ("tokens", "slots"):
        raise ValueError(f'send is "tokens" or "slots", got {send!r}')
    if experts.ndim != 3 or held.ndim != 3 or experts.shape[1] != held.shape[0]:
        raise ValueError(f"trace [tokens, layers, chosen] {experts.shape} does not fit holders {held.shape}")
    if experts.size and experts.max() >= held.shape[2]:
        raise ValueError(f"expert {experts.max()} does not exist: holders are given for {held.shape[2]}")
    num_layers, num_devices, _ = held.shape
    home = np.arange(len(experts)) % num_devices if home is None else np.asarray(home)
    result = np.zeros((num_layers, num_devices, num_devices))
    for layer in range(num_layers):
        device = serving_devices(experts[:, layer], held[layer], home)  # [T, k]
        visits = np.zeros((len(experts), num_devices))  # how often a token goes to a device
        np.add.at(visits, (np.arange(len(experts))[:, None], device), 1)
        if send == "tokens":
            visits = np.minimum(visits, 1)
        np.add.at(result[layer], home, visits * hidden * value_bytes)
        np.fill_diagonal(result[layer], 0)
    return result


@dataclass(frozen=True)
class Link:
    """A connection between neighbours, and how an all-sum over it is done.

    latency_seconds   of one step, however small the message
    bytes_per_second  of one direction of one device's connection
    algorithm         ring   2 (N - 1) steps, 2 (N - 1) / N of the payload
                      tree   2 ceil(log2 N) steps of the whole payload each
                      mesh   everybody sends everything to everybody at once: 1 step, N - 1 payloads
                      switch a fabric that connects all with all: 1 step, 2 (N - 1) / N of the payload
                      auto   mesh or ring, whichever takes less
    """

    latency_seconds: float
    bytes_per_second: float
    algorithm: str = "ring"

    def __post_init__(self):
        if self.latency_seconds < 0 or not self.bytes_per_second > 0:
            raise ValueError(f"a link has latency >= 0 and bandwidth > 0, got {self}")
        if self.algorithm not in ("ring", "tree", "mesh", "switch", "auto"):
            raise ValueError(f"a link's algorithm is ring, tree, mesh, switch or auto, got {self.algorithm!r}")

    def send_time(self, num_bytes: float) -> float:
        """Seconds to send one message to a neighbour."""
        return self.latency_seconds + num_bytes / self.bytes_per_second

    def all_sum_parts(self, payload: float, num_devices: int) -> tuple[float, float]:
        """(seconds of latency, seconds of bandwidth) of an all-sum of `payload` bytes; 0 for one device."""
        if num_devices == 1:
            return 0.0, 0.0
        if self.algorithm == "auto":
            both = [replace(self, algorithm=name).all_sum_parts(payload, num_devices) for name in ("mesh", "ring")]
            return min(both, key=sum)
        levels = math.ceil(math.log2(num_devices))
        steps, sent = {
            "ring": (2 * (num_devices - 1), ring_traffic(payload, num_devices)),
            "tree": (2 * levels, 2 * levels * payload),
            "mesh": (1, (num_devices - 1) * payload),
            "switch": (1, ring_traffic(payload, num_devices)),
        }[self.algorithm]
        return steps * self.latency_seconds, sent / self.bytes_per_second

    def all_sum_time(self, payload: float, num_devices: int) -> float:
        """Seconds of an all-sum of `payload` bytes over so many devices."""
        return sum(self.all_sum_parts(payload, num_devices))

    def all_to_all_time(self, traffic) -> float:
        """Seconds of an all-to-all of `traffic` bytes [D, D]: the busiest device's in or out, and D - 1 steps."""
        traffic = np.asarray(traffic, dtype=np.float64)
        busiest = max(traffic.sum(axis=0).max(), traffic.sum(axis=1).max())
        return (len(traffic) - 1) * self.latency_seconds + busiest / self.bytes_per_second


def fit_link(payloads, seconds, num_devices: int, algorithm: str = "ring") -> Link:
    """The link whose all-sum times fit measured ones best (least squares of relative errors).

    payloads, seconds  [n] each, n at least 2 with different payloads
    """
    payloads, seconds = np.asarray(payloads, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    if len(np.unique(payloads)) < 2 or num_devices < 2 or (seconds <= 0).any():
        raise ValueError("to fit a link needs two payloads of different size, positive times and 2 devices or more")
    steps, _ = Link(1.0, 1.0, algorithm).all_sum_parts(0, num_devices)
    _, sent = Link(1.0, 1.0, algorithm).all_sum_parts(1, num_devices)
    columns = np.stack([np.full(len(payloads), steps), sent * payloads], axis=1) / seconds[:, None]
    scale = columns.max(axis=0)  # seconds and seconds a byte differ by ten orders
    latency, per_byte = np.linalg.lstsq(columns / scale, np.ones(len(seconds)), rcond=None)[0] / scale
    if latency < 0 or per_byte <= 0:
        # One term drowns in the other's noise: keep the line through the two ends.
        order = np.argsort(payloads)
        (small, large), (early, late) = payloads[order[[0, -1]]], seconds[order[[0, -1]]]
        per_byte = max(late - early, 1e-3 * late) / (large - small) / sent
        latency = max(early / steps - small * per_byte * sent / steps, 0.0)
    return Link(float(latency), float(1 / per_byte), algorithm)
