"""An independent witness: every figure of a run's report again, by plain loops over its trace, files and placement.

Nothing is imported from the package. Experts of a placement are `held[layer][device]`, sets of numbers; routing is
`chosen[token][layer]`, lists of numbers.
"""

import functools
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

WIDTH_OF = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "U8": 1}


@dataclass
class Run:
    """What one run of the main script left.

    text        printed on standard output
    document    of --json
    chosen      of --trace, and whether a token is of the prompt
    history     [(first token, held)]: where experts were when; the last one is of --save-placement
    wall        seconds from start to end
    asked       options, as JSON has them
    ranks       how many processes
    responses   mlx-lm's last one of our run, then of stock's, where they could be overheard
    peak        bytes of this process, before and after
    dealt       [token][layer][slot] device that answered, overheard where experts have copies
    """

    text: str
    document: dict
    chosen: list
    prefill: list
    history: list
    wall: float
    asked: dict
    ranks: int = 1
    responses: list = field(default_factory=list)
    peak: tuple = (0, math.inf)
    dealt: list | None = None


# --- files --------------------------------------------------------------------------------------------------------


def read_trace(path):
    """(chosen, prefill) of an .npz file."""
    with np.load(path) as file:
        return file["experts"].tolist(), file["prefill"].tolist()


def read_placement(path):
    """held of a placement file."""
    document = json.loads(Path(path).read_text())
    layers = document.get("layers") or [document["every_layer"]] * document["num_layers"]
    return [[numbers(entry) for entry in layer] for layer in layers]


def numbers(entry):
    """{0, 1, 2, 7} of "0-2,7" or of a list of numbers."""
    found = set()
    for part in entry if isinstance(entry, list) else filter(None, entry.split(",")):
        first, _, last = str(part).partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def contiguous(layers, devices, experts):
    """held with neighbours together; the first devices have one more where it does not come out even."""
    row, start = [], 0
    for device in range(devices):
        count = experts // devices + (device < experts % devices)
        row.append(set(range(start, start + count)))
        start += count
    return [row] * layers


def weights_of(folder):
    """{name: (dtype, shape)} by the headers of the safetensors files in a folder."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        found |= {name: (about["dtype"], about["shape"]) for name, about in header.items() if name != "__metadata__"}
    return found


def weigh(folder, float_width=4):
    """Bytes {"one": of an expert, "experts", "rest", "split": of the rest what --attention sharded splits, "files"}.

    float_width  of floats: 4 in memory, as on a CPU; 2 as in these files
    """
    one, experts, rest, split, files = 0, 0, 0, 0, 0
    for name, (dtype, shape) in weights_of(folder).items():
        size = math.prod(shape)
        width = float_width if dtype in ("BF16", "F16", "F32") else WIDTH_OF[dtype]
        files += size * WIDTH_OF[dtype]
        if ".switch_mlp." in name:
            experts += size * width
            one += size * width // shape[0] if ".layers.0." in name else 0
        else:
            rest += size * width
            split += size * width if "_proj." in name or name.startswith("lm_head.") else 0
    return {"one": one, "experts": experts, "rest": rest, "split": split, "files": files}


# --- routing and balance ------------------------------------------------------------------------------------------


def counts_of(chosen, layer, experts):
    """How often each expert of a layer was chosen."""
    counts = [0] * experts
    for token in chosen:
        for expert in token[layer]:
            counts[expert] += 1
    return counts


@functools.cache
def by_chance(tokens, top_k, devices, experts, rounds=100):
    """Means over draws in which every expert is as likely; devices: a tuple of tuples of the experts they hold.

    {"hottest_over_mean", "entropy", "never_used", "balancedness"}: a function each, whether a value can be that
    """
    draw, sums = random.Random(7), [0.0] * 4
    holders = [[d for d, mine in enumerate(devices) if expert in mine] for expert in range(experts)]
    for _ in range(rounds):
        chosen = [[draw.sample(range(experts), top_k)] for _ in range(tokens)]
        counts, loads = counts_of(chosen, 0, experts), [0.0] * len(devices)
        for count, those in zip(counts, holders, strict=True):
            for d in those:
                loads[d] += count / len(those)
        total = sum(counts)
        entropy = sum(n / total * math.log(total / n) for n in counts if n) / math.log(experts)
        found = (max(counts) * experts / total, entropy, counts.count(0), total / len(loads) / max(loads))
        sums = [a + b for a, b in zip(sums, found, strict=True)]
    names = ("hottest_over_mean", "entropy", "never_used", "balancedness")
    return {name: near(value / rounds) for name, value in zip(names, sums, strict=True)}


def near(wanted):
    return lambda found: math.isclose(found, wanted, rel_tol=0.06, abs_tol=0.3 if wanted < 3 else 0)


def routing(chosen, layers, experts):
    """Figures of each layer over some tokens."""
    counts = [counts_of(chosen, l, experts) for l in range(layers)]
    entropy, everywhere = [], (tuple(range(experts)),)
    for row in counts:
        total = sum(row)
        entropy.append(sum(n / total * math.log(total / n) for n in row if n) / math.log(experts))
    return {
        "tokens": len(chosen),
        "hottest_expert_per_layer": [row.index(max(row)) for row in counts],
        "hottest_over_mean_per_layer": [max(row) / (sum(row) / experts) for row in counts],
        "entropy_per_layer": entropy,
        "unused_experts_per_layer": [sum(1 for n in row if n == 0) for row in counts],
        "uniform_simulated": by_chance(len(chosen), len(chosen[0][0]), everywhere, experts),
    }


def loads_of(chosen, history, which=lambda token: True, dealt=None):
    """[L][D] slots of devices as they were dealt, else copies share them alike. history: [(first token, held)]."""
    layers, devices = len(history[0][1]), len(history[0][1][0])
    loads = [[0.0] * devices for _ in range(layers)]
    for token, of_layers in enumerate(chosen):
        held = [each for start, each in history if start <= token][-1]
        for l, experts in enumerate(of_layers if which(token) else []):
            for slot, expert in enumerate(experts):
                holders = [d for d in range(devices) if expert in held[l][d]]
                if dealt:
                    assert dealt[token][l][slot] in holders
                    holders = [dealt[token][l][slot]]
                for d in holders:
                    loads[l][d] += 1 / len(holders)
    return loads


def evenness(loads):
    """(SGLang's balancedness of each layer, its mean, vLLM's over all layers)."""
    means = [sum(row) / len(row) for row in loads]
    each = [(mean + 1e-5) / (max(row) + 1e-5) for mean, row in zip(means, loads, strict=True)]
    return each, sum(each) / len(each), sum(means) / sum(max(row) for row in loads)


def devices_touched(chosen, history, dealt=None):
    """[L] mean number of devices of a token, as its slots were dealt, else by its experts' only holders."""
    touched = []
    for l in range(len(history[0][1])):
        visits = 0
        for token, of_layers in enumerate(chosen):
            row = [each for start, each in history if start <= token][-1][l]
            home = dealt[token][l] if dealt else [min(d for d in range(len(row)) if e in row[d]) for e in of_layers[l]]
            visits += len(set(home))
        touched.append(visits / len(chosen))
    return touched


def uniform_fan_out(row, experts, top_k):
    """Devices that k different experts drawn blindly are on: those not missed by each draw in turn."""
    total = 0.0
    for mine in row:
        missed = 1.0
        for drawn in range(top_k):
            missed *= (experts - len(mine) - drawn) / (experts - drawn)
        total += 1 - missed
    return total


def balance(chosen, prefill, history, experts, dealt=None):
    """The whole section."""
    loads, first = loads_of(chosen, history, dealt=dealt), history[0][1]
    each, layers, aggregate = evenness(loads)
    touched = devices_touched(chosen, history, dealt)
    means = [sum(row) / len(row) for row in loads]
    squares = [
        sum((x - mean) ** 2 for x in row) / len(row) for row, mean in zip(loads, means, strict=True)
    ]  # variance, of all devices
    devices = tuple(tuple(sorted(mine)) for mine in first[0])

    def even(count):
        return by_chance(count, len(chosen[0][0]), devices, experts)["balancedness"]

    phases = {}
    for name, wanted in (("prefill", True), ("decode", False)):
        part = loads_of(chosen, history, lambda token, wanted=wanted: prefill[token] == wanted, dealt)
        phases[name] = {
            "tokens": prefill.count(wanted),
            "balancedness_if_uniform_simulated": even(prefill.count(wanted)),
        }
        phases[name] |= dict(zip(("balancedness_layers", "balancedness_aggregate"), evenness(part)[1:], strict=True))
    section = {
        "source": "measured",
        "balancedness_per_layer": each,
        "imbalance_ratio_per_layer": [max(row) / mean - 1 for row, mean in zip(loads, means, strict=True)],
        "coefficient_of_variation_per_layer": [
            math.sqrt(square) / mean for square, mean in zip(squares, means, strict=True)
        ],
        "min_max_ratio_per_layer": [min(row) / max(row) for row in loads],
        "fan_out_per_layer": touched,
        "balancedness_layers": layers,
        "balancedness_if_uniform_simulated": even(len(chosen)),
        "balancedness_aggregate": aggregate,
        "fan_out": sum(touched) / len(touched),
        "phases": phases,
        "device_loads": loads,
    }
    if sum(map(len, first[0])) == experts:  # no copies
        section["fan_out_if_uniform_modelled"] = uniform_fan_out(first[0], experts, len(chosen[0][0]))
    return section


# --- print --------------------------------------------------------------------------------------------------------


def human(count):
    """Bytes as the report writes them."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= power:
            return f"{count / power:.2f} {unit}"
    return f"{count:.0f} B"


def blocks_of(text):
    """{title: lines} of the report before and after the answer, and the answer itself under "answer"."""
    before, _, rest = re.split(r"(?m)^(answer ─+)$", text)
    answer, after = re.split(r"(?m)^─+$", rest, maxsplit=1)
    found = {"answer": answer.strip("\n")}
    for block in re.split(r"\n\s*\n", f"{before.strip()}\n\n{after.strip()}"):
        title, *lines = block.splitlines()
        assert title not in found, title
        found[title] = lines
    return found


def columns(lines, rows):
    """(header, rows of cells, note below) of a table; columns stand two blanks apart, no cell is empty."""
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines[: rows + 1]]
    return cells[0], cells[1:], " ".join(lines[rows + 1 :])


def facts(lines):
    """{name: value} of a table with a line each; lines that go on are joined, the note below has the name "note"."""
    found, name = {}, None
    for line in lines:
        start, *value = re.split(r"\s{2,}", line, maxsplit=1)
        name, value = (start or name, value) if value else ("note", [line])
        found[name] = " ".join(filter(None, (found.get(name), *value)))
    return found


def shades(loads):
    """Lines of the map of loads: five shades by quarters of the mean, None where a load stands on a border."""
    lines = []
    for layer, row in enumerate(loads):
        mean, line = sum(row) / len(row), f"{layer:<5d}  " + " " * max(0, len("devices") - 3 * len(row))
        for load in row:
            over = load / mean * 4
            if min(abs(over - border) for border in (1, 3, 5, 7)) < 1e-9:
                line = None
                break
            line += " ░▒▓█"[sum(over > border for border in (1, 3, 5, 7))] * 3
        lines.append(line and line.rstrip())
    return lines


# --- comparison ---------------------------------------------------------------------------------------------------


def differences(found, expected, path=""):
    """Lines that say where a document is not what was worked out, what nobody worked out among them.

    expected holds values, and for what cannot be known beforehand functions that say whether a value can be.
    """
    if callable(expected):
        return [] if expected(found) else [f"{path}: {found!r} cannot be"]
    if isinstance(expected, dict) and isinstance(found, dict):
        lines = [f"{path}.{key}: has no witness" for key in found.keys() - expected.keys()]
        lines += [f"{path}.{key}: is missing" for key in expected.keys() - found.keys()]
        for key in expected.keys() & found.keys():
            lines += differences(found[key], expected[key], f"{path}.{key}")
        return sorted(lines)
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(found, expected, strict=True))
        return [line for n, (a, b) in pairs for line in differences(a, b, f"{path}[{n}]")]
    number = isinstance(expected, float) and isinstance(found, int | float)
    if found == expected or number and math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-12):
        return []
    return [f"{path}: {found!r}, worked out {expected!r}"]


def positive(value):
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def environment():
    """Versions by the installed packages themselves."""
    versions = {name: importlib.metadata.version(package) for name, package in PACKAGES.items()}
    system = f"{platform.system()} {platform.machine()}"
    here = {"cores": os.cpu_count(), "system": system, "python": platform.python_version()}
    return {**versions, **here, "device": lambda name: name in ("CPU", "GPU"), "device_name": bool}


PACKAGES = {"mlx": "mlx", "mlx_lm": "mlx-lm", "numpy": "numpy"}


def peak_of_process():
    """The most memory that this process has had, bytes; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
