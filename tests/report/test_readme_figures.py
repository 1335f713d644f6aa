"""The figures of model_analysis.py that the README states are those that the code gives."""

import importlib
import json
import re
import shlex

import pytest
from conftest import ROOT, SHIPPED
from transformers import AutoTokenizer

from expert_parallel import Placement, RoutingTrace, balancedness
from expert_parallel.command import options
from expert_parallel.formats.placements import WRITERS
from expert_parallel.models.architecture import describe, fullest_device_bytes
from expert_parallel.models.configurations import bundled_names, load_configuration
from expert_parallel.projection.hardware import LINKS, MACHINES
from expert_parallel.projection.step import estimate
from expert_parallel.report import projection

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def rows_under(heading):
    """Cells of the README's table that begins with this column."""
    text = TEXT.partition(f"\n| {heading} |" if heading else "\n| |")[2]
    lines = text.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_parameters_of_every_bundled_model():
    rows = {row[0]: row[1:] for row in rows_under("model")}
    assert sorted(rows) == bundled_names()
    for name, (parameters, published, source) in rows.items():
        configuration = load_configuration(name)
        assert parameters == f"{describe(configuration).whole.parameters:,}", name
        assert float(published.removesuffix(" B")) * 1e9 == configuration.published["total"], name
        assert source


def test_predictions_for_quantisations_on_the_m4_max():
    rows = rows_under("bits")
    assert [int(row[0]) for row in rows] == [3, 4, 5, 6, 8, 16]
    configuration = load_configuration("qwen3-coder-30b")
    for bits, said, _ in rows:
        demand = describe(configuration, bits=int(bits)).demand
        predicted = estimate(demand, MACHINES["m4-max"], context=2048 + 64).tokens_per_second
        assert said == f"{predicted:.1f}"


def test_memory_per_device():
    """9.03 GB on 2 devices (1.90x less), ..."""
    described = describe(load_configuration("qwen3-coder-30b"), bits=4)
    said = re.findall(r"([\d.]+) GB on (\d+)(?: devices)? \(([\d.]+)x", TEXT)
    assert [int(devices) for _, devices, _ in said] == [2, 4, 8, 16]
    for gigabytes, devices, less in said:
        bytes_there = fullest_device_bytes(described.bytes, int(devices))
        assert (gigabytes, less) == (f"{bytes_there / 1e9:.2f}", f"{described.bytes.total / bytes_there:.2f}")


def ratios(kind, variant):
    """(to stock, to tensor parallelism) in BENCHMARKS.md's first table of a kind."""
    text = (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8").partition("## Real ranks")[2]
    table = text.partition(f"\n    {kind} (measured")[2]
    line = next(line for line in table.splitlines() if f"  {variant}  " in line)
    return (*re.findall(r"(\d\.\d\d) \(", line), None)[:2]


def test_speeds_are_those_of_the_benchmarks():
    rows = {row[0]: row[1:] for row in rows_under("")}
    for name, variant in {
        "one process, two simulated devices: the same bits as stock": "2 simulated, quick",
        "two processes, attention and the output layer split, too (`--attention sharded`)": "rest split, quick",
        "two processes of mlx-lm's tensor parallelism": "tensor parallel",
        "the same, given our split of the output layer and our quicker products": "tensor, head, quick",
    }.items():
        assert rows[name] == [ratios(kind, variant)[0] for kind in ("decode", "prompt")]


def test_memory_of_the_first_screen():
    described = describe(load_configuration("qwen3-coder-30b"), bits=4)
    (row,) = rows_under("machines")
    there = [described.bytes.total, *(fullest_device_bytes(described.bytes, devices) for devices in (2, 4, 8))]
    assert [float(cell) for cell in row[1:]] == [17.2, *(round(each / 1e9, 2) for each in there[1:])]
    assert f"{there[0] / 1e9:.1f}" == "17.2"


def commands():
    """(script, words) of every line in the README's blocks that starts one of the scripts."""
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL):
        for line in block.splitlines():
            found = re.search(r"((?:tools/)?\w+)\.py\b(.*)", line.partition("#")[0].partition(" | ")[0])
            if found and not line.startswith("pip"):
                yield found[1].replace("/", "."), shlex.split(found[2])


@pytest.mark.parametrize(("script", "words"), commands())
def test_commands_are_understood(script, words):
    if script == "minimal_qwen3_example":
        return
    module = importlib.import_module(script)
    parser = module.setup_arg_parser() if hasattr(module, "setup_arg_parser") else options.parser_of("")
    args = parser.parse_args(words)
    if script == "qwen3_expert_parallel" and args.prompt and args.prompt.endswith(".py"):
        tokens = AutoTokenizer.from_pretrained(SHIPPED).encode((ROOT / args.prompt).read_text())
        context = json.loads((SHIPPED / "config.json").read_text())["max_position_embeddings"]
        assert len(tokens) + args.max_tokens <= context


def test_snippets_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    """As pasted into a notebook, from a folder that has the models beside it; of the text a quarter."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    names, blocks = {"__name__": "__main__"}, re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    whole, quarter = "[:2048]).reshape(2, 4, 256)", "[:512]).reshape(2, 1, 256)"
    assert sum(whole in block for block in blocks) == 1
    for block in blocks:
        exec(compile(block.replace(whole, quarter), "README.md", "exec"), names)
    assert len(names["tokenizer"].encode(names["text"], verbose=False)) >= 2048
    recorded, own = RoutingTrace.load("run.npz"), names["mine"]
    even = balancedness(names["placement"].device_loads(recorded.loads()))
    assert len(blocks) == 3 and f"\n{even}\n" in capsys.readouterr().out
    assert Placement.load("mine.json") == own and own.held.sum(axis=2).tolist() == [[16] * 8] * 4


def test_every_format_of_placements_is_named():
    row = next(line for line in TEXT.splitlines() if "--save-placement FILE" in line)
    assert set(WRITERS) <= set(re.findall(r"`([\w-]+)`", row)) and tuple(WRITERS) == options.PLACEMENT_FORMATS


def test_what_a_single_sequence_gains():
    described = describe(load_configuration("qwen3-coder-30b"))
    link, source = LINKS["thunderbolt-jaccl"]
    setting = projection.Setting(MACHINES["m4-max"], link, "thunderbolt-jaccl", source, 2048, (1, 2, 4, 8))
    lines = str(projection.one_sequence(described, setting)[0]).splitlines()
    assert "\n".join(lines[:5]) in TEXT
    assert "one sequence more than 1.27x" in " ".join(" ".join(lines).split())
