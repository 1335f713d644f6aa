"""Hardware by name: constants of devices and links, each with its source or marked as assumed.

Only the M4 Max is fitted on published speeds of this kind of model. For other devices the vendor's
bandwidth is taken at the same efficiency, and the fixed cost per layer is taken over: assumptions
that `model_analysis.py --measure` replaces on hardware that you have.
"""

from __future__ import annotations

from .links import Link
from .step import Machine

# Fitted on the two Qwen3-30B-A3B rows of mlx-lm's BENCHMARKS.md (64 GB M4 Max, mlx_lm.benchmark
# -p 2048 -g 128): 4-bit 1753.9 prompt and 113.33 generated tokens/s, 8-bit 83.16 generated.
M4_MAX_BYTES = 473.1e9
M4_MAX_LAYER_SECONDS = 99.05e-6
M4_MAX_OPERATIONS = 11.04e12
EFFICIENCY = M4_MAX_BYTES / 546e9  # of the vendor's bandwidth: 87%
ARITHMETIC_EFFICIENCY = 0.4  # assumed, of NVIDIA's dense bf16 peak


# What the system leaves to weights and caches: of Apple's unified memory 3/4 (Metal's recommendedMaxWorkingSetSize
# was 74% of 16 GB in AlexsJones/llmfit 754, 84% of 128 GiB in antirez/ds4 890), of a GPU of its own 9/10 (vLLM's
# default gpu_memory_utilization).
APPLE, NVIDIA = 0.75, 0.9


def _apple(name, bandwidth, cores, memory, source):
    moved, operations = bandwidth * EFFICIENCY, M4_MAX_OPERATIONS * cores / 40
    words = f"{source}; efficiency and cost per layer assumed as on the M4 Max, arithmetic by GPU cores"
    return Machine(name, moved, moved, operations, M4_MAX_LAYER_SECONDS, memory, words, usable=APPLE)


def _nvidia(name, bandwidth, peak, source):
    moved, operations = bandwidth * EFFICIENCY, peak * ARITHMETIC_EFFICIENCY
    words = f"{source}; efficiency and cost per layer assumed as on the M4 Max, 40% of peak arithmetic assumed"
    return Machine(name, moved, moved, operations, M4_MAX_LAYER_SECONDS, 80e9, words, usable=NVIDIA)


MACHINES = {
    "m4-max": Machine(
        "Apple M4 Max",
        M4_MAX_BYTES,
        M4_MAX_BYTES,
        M4_MAX_OPERATIONS,
        M4_MAX_LAYER_SECONDS,
        128e9,
        "546 GB/s, 128 GB (Apple newsroom, 2024-10-30); fitted on mlx-lm's BENCHMARKS.md",
        usable=APPLE,
    ),
    "m2-ultra": _apple("Apple M2 Ultra", 800e9, 76, 192e9, "800 GB/s, 192 GB, 76 cores (Apple newsroom, 2023-06-05)"),
    "m3-ultra": _apple("Apple M3 Ultra", 819e9, 80, 512e9, "819 GB/s, 512 GB, 80 cores (Apple newsroom, 2025-03-05)"),
    "a100": _nvidia("NVIDIA A100 SXM 80 GB", 2039e9, 312e12, "2039 GB/s, 312 TFLOP/s (NVIDIA A100 datasheet)"),
    "h100": _nvidia("NVIDIA H100 SXM 80 GB", 3350e9, 989e12, "3350 GB/s, 989 TFLOP/s dense (NVIDIA H100 datasheet)"),
}

LINKS = {
    "ethernet-10g": (
        Link(300e-6, 1.25e9, "ring"),
        "10 Gbit/s line rate; about 300 us a message over TCP as users of Mac clusters report",
    ),
    "thunderbolt-jaccl": (
        Link(25.5e-6, 8.05e9, "auto"),
        "25.5 us for an all-sum of 4 kB, 8.05 GB/s at 64 MB between two M4 Pro"
        " (github.com/omar-karray/mlx-jaccl-cluster)",
    ),
    "nvlink-a100": (Link(6e-6, 246e9, "switch"), "300 GB/s a direction (A100 datasheet), share and latency as H100"),
    "nvlink-h100": (
        Link(6e-6, 370e9, "switch"),
        "370 GB/s a direction for applications (NVIDIA/nccl issue 1442), 6 us with 2 GPUs (issue 1259)",
    ),
    "infiniband-ndr": (Link(5e-6, 50e9, "tree"), "400 Gbit/s a GPU (NVIDIA NDR); 5 us a step assumed"),
}

USUAL_LINK = {
    "m4-max": "thunderbolt-jaccl",
    "m2-ultra": "ethernet-10g",  # Thunderbolt 4 has no RDMA
    "m3-ultra": "thunderbolt-jaccl",
    "a100": "nvlink-a100",
    "h100": "nvlink-h100",
}


def find(kind: str, name: str, table: dict):
    """An entry by name; ValueError that lists the names there are."""
    try:
        return table[name.lower()]
    except KeyError:
        raise ValueError(f"{kind} {name} is not known; there are: {', '.join(sorted(table))}") from None
