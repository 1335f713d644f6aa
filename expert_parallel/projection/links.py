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

from ..serving import Serving


def bytes_per_token(hidden: int, top_k: int, num_layers: int, value_bytes: int = 2, combine: str = "gather") -> int:
    """Payload of one token over all L MoE layers: what their all-sums add up.

    value_bytes  2 for bfloat16, 4 for float32 (the CPU)
    """
    return num_layers * hidden * value_bytes * (top_k if combine == "gather" else 1)


def ring_traffic(payload: float, num_devices: int) -> float:
    """Bytes that each rank sends in a ring all-reduce of `payload` bytes: 2 (N - 1) / N of them.

    Least possible for an all-reduce; Patarasuk and Yuan, "Bandwidth optimal all-reduce
    algorithms for clusters of workstations", 2009, section 3.
    """
    return 2 * (num_devices - 1) / num_devices * payload


def traffic_matrix(experts, held, hidden: int, value_bytes: int = 2, home=None) -> np.ndarray:
    """Bytes sent from device i to device j to dispatch a trace's tokens, float [L, D, D]; modelled.

    experts  [T, L, k] expert ids;  held  bool [L, D, E];  home  [T], device a token lives on; t mod D where None
    A token goes once to a device, however many of its experts are there, and not away where its home has the expert;
    copies elsewhere take turns over the tokens. The way back is the transpose. The diagonal (what stays) is zero.
    """
    experts, held = np.asarray(experts, dtype=np.int64), np.asarray(held, dtype=bool)
    num_tokens, (num_layers, num_devices, _) = np.arange(len(experts)), held.shape
    home = num_tokens % num_devices if home is None else np.asarray(home)
    result = np.zeros((num_layers, num_devices, num_devices))
    for layer, chosen in enumerate(experts.transpose(1, 0, 2)):
        turns = Serving(held[layer]).turns
        away = turns[num_tokens[:, None] % len(turns), chosen]
        device = np.where(held[layer, home[:, None], chosen], home[:, None], away)
        visits = np.zeros((len(experts), num_devices), dtype=bool)
        np.put_along_axis(visits, device, True, axis=1)
        np.add.at(result[layer], home, visits * float(hidden * value_bytes))
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
    """The link whose all-sum times fit measured ones best: least squares of relative errors, no part below 0.

    payloads, seconds  [n] each, n at least 2 with different payloads
    """
    payloads, seconds = np.asarray(payloads, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    steps, _ = Link(1.0, 1.0, algorithm).all_sum_parts(0, num_devices)
    _, sent = Link(1.0, 1.0, algorithm).all_sum_parts(1, num_devices)
    columns = np.stack([np.full(len(payloads), steps), sent * payloads], axis=1) / seconds[:, None]
    scale = columns.max(axis=0)  # seconds and seconds a byte differ by ten orders
    columns, ones = columns / scale, np.ones(len(seconds))
    found = np.linalg.lstsq(columns, ones, rcond=None)[0]
    if (found < 0).any():  # one term drowns in the other's noise: the better of them alone
        alone = [np.eye(2)[n] * column.sum() / (column**2).sum() for n, column in enumerate(columns.T)]
        found = min(alone, key=lambda parts: ((columns @ parts - ones) ** 2).sum())
    latency, per_byte = found / scale
    return Link(float(latency), float(1 / max(per_byte, 1e-15)), algorithm)
