"""Hardware by name: constants of devices and links, each with its source or marked as assumed.

Only the M4 Max is fitted on published speeds of this kind of model. For other devices the vendor's
bandwidth is taken at the same efficiency, and the fixed cost per layer is taken over: assumptions
that `model_analysis.py --measure` replaces on hardware that you have.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..files import nearest
from .links import Link

# What weights and caches may take of a device's memory: (share, up to so many bytes, whose limit that is).
# Metal: recommendedMaxWorkingSetSize, past which allocations fail. 2/3 on 8, 16 and 32 GB (llama.cpp issue 5207,
# llama-cpp-python 687, ollama 434), 3/4 on 64 and 96 GB (llama.cpp 1870, 3213); newer systems grant more, e.g. 107.5 of
# 128 GiB (antirez/ds4 893), and `sudo sysctl iogpu.wired_limit_mb=N` sets it. CUDA: vLLM's default for
# gpu_memory_utilization. Without a GPU: assumed as CUDA's.
USABLE = {
    "Metal": ((2 / 3, 36e9, "Metal's limit for a GPU"), (3 / 4, float("inf"), "Metal's limit for a GPU")),
    "CUDA": ((0.9, float("inf"), "vLLM's share of a GPU"),),
    "CPU": ((0.9, float("inf"), "the rest for the system, assumed"),),
}


@dataclass(frozen=True)
class Machine:
    """Constants of one device; `source` says where they come from.

    bytes_per_second         of weights, one token at a time, for all but the experts
    expert_bytes_per_second  the same for experts (they are gathered, which may be slower)
    operations_per_second    of large matrix products, two per multiplication and addition
    layer_seconds            what a layer costs whatever its size: launches, synchronisation
    memory_bytes             that the device has, 1 GB as 1e9 B
    cache_bytes_per_second   of keys and values; 0: as weights (on a CPU they need no unpacking)
    kind                     Metal, CUDA or CPU, see `USABLE`
    """

    name: str
    bytes_per_second: float
    expert_bytes_per_second: float
    operations_per_second: float
    layer_seconds: float
    memory_bytes: float = float("inf")
    source: str = ""
    cache_bytes_per_second: float = 0.0
    kind: str = "CPU"

    @property
    def usable(self) -> tuple[float, str]:
        """(bytes for weights and caches, whose limit that is)."""
        share, _, whose = next(row for row in USABLE[self.kind] if self.memory_bytes <= row[1])
        return share * self.memory_bytes, whose

    def with_bandwidth(self, gigabytes: float) -> Machine:
        """The same with so many GB/s of memory by its vendor, at the efficiency of the M4 Max."""
        moved = gigabytes * 1e9 * EFFICIENCY
        source = f"{gigabytes:g} GB/s as given, else as {self.name}: {self.source}"
        named = f"{self.name} at {gigabytes:g} GB/s"
        return replace(self, name=named, bytes_per_second=moved, expert_bytes_per_second=moved, source=source)

    @property
    def value_bytes(self) -> int:
        """Of one activation that is sent: float32 on the CPU, 16 bits elsewhere."""
        return 4 if self.kind == "CPU" else 2


# Fitted on the two Qwen3-30B-A3B rows of mlx-lm's BENCHMARKS.md (64 GB M4 Max, mlx_lm.benchmark
# -p 2048 -g 128): 4-bit 1753.9 prompt and 113.33 generated tokens/s, 8-bit 83.16 generated.
M4_MAX_BYTES = 473.1e9
M4_MAX_LAYER_SECONDS = 99.05e-6
M4_MAX_OPERATIONS = 11.04e12
EFFICIENCY = M4_MAX_BYTES / 546e9  # of the vendor's bandwidth: 87%


def _like_m4_max(name, bandwidth, operations, memory, kind, source):
    source = f"{bandwidth:g} GB/s, {memory:g} GB, {source}; efficiency and cost per layer assumed as on the M4 Max"
    moved = bandwidth * 1e9 * EFFICIENCY
    return Machine(name, moved, moved, operations, M4_MAX_LAYER_SECONDS, memory * 1e9, source, kind=kind)


def _apple(name, bandwidth, memory, cores, date):
    name, operations = f"Apple {name.replace('-', ' ').title()}", M4_MAX_OPERATIONS * cores / 40
    source = f"{cores} GPU cores (Apple newsroom, {date}), arithmetic by cores"
    return _like_m4_max(name, bandwidth, operations, memory, "Metal", source)


def _nvidia(model, bandwidth, memory, peak):
    source = f"{peak} TFLOP/s dense (NVIDIA's datasheet), of which 40% assumed"
    return _like_m4_max(f"NVIDIA {model}", bandwidth, 0.4e12 * peak, memory, "CUDA", source)


# The largest of each: (GB/s, GB, GPU cores, Apple newsroom's announcement).
_APPLE = {
    "m1": (68.25, 16, 8, "2020-11-10"), "m1-pro": (200, 32, 16, "2021-10-18"), "m1-max": (400, 64, 32, "2021-10-18"),
    "m1-ultra": (800, 128, 64, "2022-03-08"), "m2": (100, 24, 10, "2022-06-06"), "m2-pro": (200, 32, 19, "2023-01-17"),
    "m2-max": (400, 96, 38, "2023-01-17"), "m2-ultra": (800, 192, 76, "2023-06-05"), "m3": (100, 24, 10, "2023-10-30"),
    "m3-pro": (150, 36, 18, "2023-10-30"), "m3-max": (400, 128, 40, "2023-10-30"),
    "m3-ultra": (819, 512, 80, "2025-03-05"), "m4": (120, 32, 10, "2024-05-07"), "m4-pro": (273, 64, 20, "2024-10-30"),
    "m5": (153, 32, 10, "2025-10-15"),
}  # fmt: skip
# (name, GB/s, GB, TFLOP/s of 16 bits without sparsity), by NVIDIA's datasheets.
_NVIDIA = {
    "a100": ("A100 SXM 80 GB", 2039, 80, 312), "h100": ("H100 SXM 80 GB", 3350, 80, 989),
    "h200": ("H200 SXM", 4800, 141, 989), "l40s": ("L40S", 864, 48, 362), "rtx-4090": ("RTX 4090", 1008, 24, 165),
}  # fmt: skip

_M4_MAX = "546 GB/s, 128 GB (Apple newsroom, 2024-10-30); fitted on mlx-lm's BENCHMARKS.md"

MACHINES = {
    "m4-max": Machine("Apple M4 Max", M4_MAX_BYTES, M4_MAX_BYTES, M4_MAX_OPERATIONS, M4_MAX_LAYER_SECONDS, 128e9,
                      _M4_MAX, kind="Metal"),
}  # fmt: skip
MACHINES |= {name: _apple(name, *row) for name, row in _APPLE.items()}
MACHINES |= {name: _nvidia(*row) for name, row in _NVIDIA.items()}

LINKS = {
    "ethernet-10g": (
        Link(300e-6, 1.25e9, "ring"),
        "10 Gbit/s line rate; 300 us a message over TCP (NetworkChuck's cluster of Mac Studios, 2025)",
    ),
    "thunderbolt-jaccl": (
        Link(25.5e-6, 8.05e9, "auto", ports=4),
        "25.5 us for an all-sum of 4 kB, 8.05 GB/s at 64 MB between two M4 Pro"
        " (github.com/omar-karray/mlx-jaccl-cluster); a mesh of up to 5 (a Mac Studio with M4 Max has 4 Thunderbolt 5"
        " ports), then a ring",
    ),
    "nvlink-h100": (
        Link(6e-6, 370e9, "switch", ports=7),
        "370 GB/s a direction for applications (NVIDIA/nccl issue 1442), 6 us with 2 GPUs (issue 1259); 8 GPUs of one"
        " machine at most",
    ),
    "infiniband-ndr": (
        Link(5e-6, 50e9, "tree"),
        "400 Gbit/s a GPU (NVIDIA NDR); 5 us a step of a tree over the network (NCCL's own model, tuning.cc)",
    ),
}

USUAL_LINK = dict.fromkeys(MACHINES, "ethernet-10g")  # Thunderbolt 4 has no RDMA
USUAL_LINK |= dict.fromkeys(("m4-pro", "m4-max", "m3-ultra"), "thunderbolt-jaccl")
USUAL_LINK |= {"h100": "nvlink-h100", "h200": "nvlink-h100", "a100": "infiniband-ndr"}


def find(kind: str, name: str, table: dict):
    """An entry by name; ValueError with the nearest one and all there are."""
    try:
        return table[name.lower()]
    except KeyError:
        raise ValueError(f"{kind} {name} is not known{nearest(name, table)}; there are: {', '.join(table)}") from None
