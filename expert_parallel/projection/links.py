"""Links: bytes and time of the ways to bring expert outputs together. Numpy only.

Dimensions: T tokens, L MoE layers, E experts, k chosen, D devices, H hidden.

    gather   all-sum of the outputs of every slot         k H values a token and layer
    reduce   all-sum of the outputs weighted and summed     H values a token and layer
    dispatch each token goes to the devices of its experts and comes back (all-to-all):
             2 H values for every foreign device that it visits
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..serving import Serving


def bytes_per_token(hidden: int, top_k: int, num_layers: int, value_bytes: int = 2, combine: str = "gather") -> int:
    """Payload of one token over all L MoE layers: what the all-sums add up.

    value_bytes  2 for bfloat16, 4 for float32 (the CPU)
    """
    return num_layers * {"gather": top_k, "reduce": 1}[combine] * hidden * value_bytes


def ring_traffic(payload: float, num_devices: int) -> float:
    """Bytes that each rank sends in a ring all-reduce of `payload` bytes: 2 (N - 1) / N of them.

    Least possible for an all-reduce; Patarasuk and Yuan, "Bandwidth optimal all-reduce
    algorithms for clusters of workstations", 2009, section 3.
    """
    return 2 * (num_devices - 1) / num_devices * payload


def traffic_matrix(experts, held, hidden: int, value_bytes: int = 2, home=None) -> np.ndarray:
    """Bytes sent from device i to device j to dispatch a trace's tokens, float [L, D, D]; modelled.

    experts  [T, L, k] expert ids;  held  bool [L, D, E]
    home     [T], device a token lives on; token t on device t mod D where None
    A token goes once to a device, however many of its experts are there, and nowhere for an expert that its home has;
    replicas elsewhere take turns over the tokens. The way back is the transpose. The diagonal (what stays) is zero.
    """
    experts, held = np.asarray(experts), np.asarray(held, bool)
    num_layers, num_devices, _ = held.shape
    tokens = np.arange(len(experts))
    home = tokens % num_devices if home is None else np.asarray(home)
    result = np.zeros((num_layers, num_devices, num_devices))
    for layer, chosen in enumerate(experts.transpose(1, 0, 2)):
        turns = Serving(held[layer]).turns
        away = turns[tokens[:, None] % len(turns), chosen]
        visited = np.zeros((len(experts), num_devices), bool)
        visited[tokens[:, None], np.where(held[layer, home[:, None], chosen], home[:, None], away)] = True
        np.add.at(result[layer], home, visited * float(hidden * value_bytes))
        np.fill_diagonal(result[layer], 0)
    return result


# Of an all-sum over n devices: steps, and bytes that each device sends for every byte of the payload.
ALL_SUMS = {
    "ring": lambda n: (2 * (n - 1), ring_traffic(1, n)),  # reduce-scatter, then all-gather, from neighbour to neighbour
    "tree": lambda n: (2 * math.ceil(math.log2(n)), 2 * math.ceil(math.log2(n))),  # up and down, all of it at each step
    "mesh": lambda n: (1, n - 1),  # everybody sends everything to everybody at once
    "switch": lambda n: (1, ring_traffic(1, n)),  # a fabric that connects all with all, and adds
}


@dataclass(frozen=True)
class Link:
    """A connection between neighbours, and how an all-sum over it is done.

    latency_seconds   of one step, however small the message
    bytes_per_second  of one direction of one device's connection
    algorithm         a name in ALL_SUMS, or auto: mesh or ring, whichever takes less
    ports             others that a device can be connected to: a mesh and a switch end there, auto goes on as a ring
    """

    latency_seconds: float
    bytes_per_second: float
    algorithm: str = "ring"
    ports: float = math.inf

    @property
    def most_devices(self) -> float:
        return self.ports + 1 if self.algorithm in ("mesh", "switch") else math.inf

    def all_sum_parts(self, payload: float, num_devices: int) -> tuple[float, float]:
        """(seconds of latency, seconds of bandwidth) of an all-sum of `payload` bytes; 0 for one device."""
        if num_devices == 1:
            return 0.0, 0.0
        names = [self.algorithm]
        if self.algorithm == "auto":
            names = ["mesh", "ring"] if num_devices <= self.ports + 1 else ["ring"]
        ways = [ALL_SUMS[name](num_devices) for name in names]
        return min(((s * self.latency_seconds, b * payload / self.bytes_per_second) for s, b in ways), key=sum)

    def all_to_all_time(self, traffic) -> float:
        """Seconds of an all-to-all of `traffic` bytes [D, D]: the busiest device's in or out, and D - 1 steps."""
        busiest = max(*traffic.sum(axis=0), *traffic.sum(axis=1))
        return (len(traffic) - 1) * self.latency_seconds + busiest / self.bytes_per_second


def fit_link(payloads, seconds, num_devices: int, algorithm: str = "ring") -> Link:
    """The link whose all-sums of the smallest and the largest payload take as long as measured; at least 0 of latency.

    payloads, seconds  [n] each, growing payloads
    """
    steps, sent = ALL_SUMS[algorithm](num_devices)
    more = max(seconds[-1] - seconds[0], 1e-3 * seconds[-1])  # where noise has the larger one take less
    per_byte = more / (payloads[-1] - payloads[0]) / sent
    latency = max(seconds[0] - per_byte * sent * payloads[0], 0.0) / steps
    return Link(latency, 1 / per_byte, algorithm)
