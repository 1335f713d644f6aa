"""The table of hardware: what it says is what its sources say, and how much of a memory is usable."""

import re

import pytest

from expert_parallel.projection.hardware import LINKS, MACHINES, USUAL_LINK, Machine, find

# (GB/s, GB, TFLOP/s as the vendor says or None: by GPU cores, cores)
VENDORS = {
    "m1": (68.25, 16, None, 8), "m1-pro": (200, 32, None, 16), "m1-max": (400, 64, None, 32),
    "m1-ultra": (800, 128, None, 64), "m2": (100, 24, None, 10), "m2-pro": (200, 32, None, 19),
    "m2-max": (400, 96, None, 38), "m2-ultra": (800, 192, None, 76), "m3": (100, 24, None, 10),
    "m3-pro": (150, 36, None, 18), "m3-max": (400, 128, None, 40), "m3-ultra": (819, 512, None, 80),
    "m4": (120, 32, None, 10), "m4-pro": (273, 64, None, 20), "m5": (153, 32, None, 10),
    "a100": (2039, 80, 312, None), "h100": (3350, 80, 989, None), "h200": (4800, 141, 989, None),
    "l40s": (864, 48, 362, None), "rtx-4090": (1008, 24, 165, None),
}  # fmt: skip


def test_every_device_of_the_table_is_known_here():
    assert {*VENDORS, "m4-max"} == MACHINES.keys() == USUAL_LINK.keys()
    assert (MACHINES["m3-pro"].name, MACHINES["rtx-4090"].name) == ("Apple M3 Pro", "NVIDIA RTX 4090")


def test_a_bandwidth_of_ones_own():
    own = MACHINES["m4-pro"].with_bandwidth(300)
    assert (own.bytes_per_second, own.expert_bytes_per_second) == pytest.approx((300e9 * 473.1 / 546,) * 2)
    assert own.name == "Apple M4 Pro at 300 GB/s" and own.source.startswith(
        "300 GB/s as given, else as Apple M4 Pro: 273"
    )
    assert (own.memory_bytes, own.operations_per_second) == (64e9, MACHINES["m4-pro"].operations_per_second)


@pytest.mark.parametrize("name", VENDORS)
def test_a_device_is_its_vendors_figures_at_the_efficiency_of_the_m4_max(name):
    machine, (bandwidth, memory, peak, cores) = MACHINES[name], VENDORS[name]
    moved = bandwidth * 1e9 * 473.1 / 546
    assert (machine.bytes_per_second, machine.expert_bytes_per_second) == pytest.approx((moved, moved))
    assert machine.memory_bytes == memory * 1e9
    operations = 0.4 * peak * 1e12 if peak else 11.04e12 * cores / 40
    assert machine.operations_per_second == pytest.approx(operations)
    assert machine.layer_seconds == 99.05e-6 and machine.kind == ("CUDA" if peak else "Metal")
    for figure in (f"{bandwidth} GB/s", f"{memory} GB", "assumed as on the M4 Max"):
        assert figure in machine.source


def test_the_m4_max_is_what_was_fitted():
    machine = MACHINES["m4-max"]
    assert (machine.bytes_per_second, machine.expert_bytes_per_second) == (473.1e9, 473.1e9)
    assert (machine.operations_per_second, machine.layer_seconds, machine.memory_bytes) == (11.04e12, 99.05e-6, 128e9)
    assert "BENCHMARKS.md" in machine.source and machine.kind == "Metal"


def test_every_device_and_link_names_its_source():
    assert all(re.search(r"\d{4}-\d{2}-\d{2}|datasheet", machine.source) for machine in MACHINES.values())
    assert all(re.search(r"issue|github|NCCL|2025", source) for _, source in LINKS.values())
    usual = {link: {name for name in USUAL_LINK if USUAL_LINK[name] == link} for link in LINKS}
    assert usual["thunderbolt-jaccl"] == {"m4-pro", "m4-max", "m3-ultra"}  # those with Thunderbolt 5
    assert usual["nvlink-h100"] == {"h100", "h200"} and usual["infiniband-ndr"] == {"a100"}
    assert LINKS[USUAL_LINK["m2-ultra"]][0].algorithm == "ring" and len(set().union(*usual.values())) == len(MACHINES)
    assert find("link", "NVLink-H100", LINKS)[0].most_devices == 8
    with pytest.raises(ValueError, match="hardware abacus is not known; there are: m4-max, m1, .*h100"):
        find("hardware", "abacus", MACHINES)
    with pytest.raises(ValueError, match=r"M3-mx is not known, did you mean m3-max\?; there are"):
        find("hardware", "M3-mx", MACHINES)


def test_links_are_what_their_sources_say():
    found = {name: (link.latency_seconds, link.bytes_per_second, link.ports) for name, (link, _) in LINKS.items()}
    assert found == {
        "ethernet-10g": (300e-6, 10e9 / 8, float("inf")),
        "thunderbolt-jaccl": (25.5e-6, 8.05e9, 4),
        "nvlink-h100": (6e-6, 370e9, 7),
        "infiniband-ndr": (5e-6, 400e9 / 8, float("inf")),
    }


@pytest.mark.parametrize(
    ("kind", "gigabytes", "usable", "whose"),
    [
        ("Metal", 16, 16 * 2 / 3, "Metal"),
        ("Metal", 36, 24, "Metal"),
        ("Metal", 37, 27.75, "Metal"),
        ("Metal", 128, 96, "Metal"),
        ("CUDA", 80, 72, "vLLM"),
        ("CPU", 24, 21.6, "assumed"),
    ],
)
def test_what_is_usable_of_a_memory(kind, gigabytes, usable, whose):
    """Reported by Metal: 10,922.67 of 16,384 MiB, 21,845.34 of 32,768, 73,728 of 98,304."""
    found, words = Machine("x", 1, 1, 1, 0, gigabytes * 1e9, kind=kind).usable
    assert found == pytest.approx(usable * 1e9)
    assert whose in words


def test_activations_are_float32_on_the_cpu_alone():
    assert {kind: Machine("x", 1, 1, 1, 0, kind=kind).value_bytes for kind in ("Metal", "CUDA", "CPU")} == {
        "Metal": 2, "CUDA": 2, "CPU": 4,
    }  # fmt: skip
    assert {name: machine.kind for name, machine in MACHINES.items()} == {
        name: "Metal" if machine.name.startswith("Apple") else "CUDA" for name, machine in MACHINES.items()
    }
