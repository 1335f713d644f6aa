"""Loading: the logits of mlx-lm's own load, bytes counted by the system, one clear line for every damaged folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from checkpoints import EXPERT_BYTES, GRANITE, LAYOUTS, QWEN3, Rank, save
from conftest import ROOT, SHIPPED, of_a_user
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from expert_parallel import Placement, place_experts
from expert_parallel.checkpoint import finding, opened, tensors
from expert_parallel.checkpoint.finding import find_cached, resolve_model
from expert_parallel.checkpoint.loading import activation_dtype, load_sharded, load_whole
from expert_parallel.checkpoint.opened import Checkpoint
from expert_parallel.checkpoint.tensors import StoredTensor, read_rows
from expert_parallel.layers import moe_layers
from tools.random_weights import plan, write_weights


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: save(root / name, **how) for name, how in LAYOUTS.items()}


@pytest.fixture
def copy(checkpoints, tmp_path):
    """A checkpoint to damage."""
    return Path(shutil.copytree(checkpoints["mlx-4bit-3-files"], tmp_path / "copy"))


def stock(folder):
    model, _ = mlx_lm.load(str(folder))
    model.set_dtype(mx.float32)
    return model


PROMPT = mx.array([[5, 90, 17, 4, 33], [1, 2, 3, 95, 60]])


# --- the same model ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_mlx_lm_bit_for_bit(checkpoints, layout):
    """Whatever is found quicker here."""
    expected = stock(checkpoints[layout])(PROMPT)
    whole, tokenizer, config = load_whole(checkpoints[layout])
    assert mx.array_equal(whole(PROMPT), expected)
    assert config["num_hidden_layers"] == 2 and tokenizer.encode("w5 w90")[-2:] == [5, 90]
    for num_devices in (1, 2, 3, 8):
        model, tokenizer = load_sharded(checkpoints[layout], num_devices)
        assert mx.array_equal(model(PROMPT), expected), num_devices
        held = [store.ids.tolist() for store in moe_layers(model)[0].experts.stores]
        assert sorted(sum(held, [])) == list(range(8)) and len(held) == num_devices


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_and_scattered_experts_load_too(checkpoints, layout, tmp_path):
    held = place_experts(np.zeros((2, 8)), 3, "round-robin").held.copy()
    held[0, 1, [0, 5, 6]] = held[1, 2, [0, 7]] = True
    Placement(held).save(tmp_path / "placement.json")
    model, _, report = load_sharded(checkpoints[layout], placement=tmp_path / "placement.json", return_report=True)
    assert mx.array_equal(model(PROMPT), stock(checkpoints[layout])(PROMPT))
    if layout == "mlx-4bit":  # copies are read once
        assert report.bytes_read_experts == 2 * 8 * EXPERT_BYTES


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_holds_the_rows_of_its_experts_and_nothing_else(checkpoints, layout):
    whole = moe_layers(stock(checkpoints[layout]))
    x, indices = mx.random.normal((4, 64)), mx.array([[0, 1, 7], [3, 2, 6], [5, 4, 0], [7, 6, 1]])
    answers, placement = 0, place_experts(np.zeros((2, 8)), 3, "round-robin")
    for rank in range(3):
        model, _ = load_sharded(checkpoints[layout], placement=placement, group=Rank(rank, 3), combine="gather")
        layer = moe_layers(model)[1]
        (store,) = layer.experts.stores
        assert layer.experts.devices == (rank,)
        assert store.ids.tolist() == list(range(8))[rank::3]
        answers = answers + layer.experts.compact(x, indices)  # its own answer, before the sum over ranks
        for name, array in tree_flatten(store.experts.parameters()):
            expected = dict(tree_flatten(whole[1].experts.parameters()))[name][rank::3]
            assert array.dtype == expected.dtype and mx.array_equal(array, expected), name
    assert mx.array_equal(answers, whole[1].experts(x, indices))


def test_packed_weights_stay_and_the_rest_takes_the_dtype(checkpoints):
    folder = checkpoints["mlx-4bit"]
    kinds = {None: {mx.uint32, mx.float32}, "keep": {mx.uint32, mx.bfloat16}, mx.float16: {mx.uint32, mx.float16}}
    for dtype, expected in kinds.items():
        model, _ = load_sharded(folder, 2, dtype=dtype)
        assert {a.dtype for _, a in tree_flatten(model.parameters())} == expected
        model, _, _ = load_whole(folder, dtype=dtype)
        assert {a.dtype for _, a in tree_flatten(model.parameters())} == expected
    assert activation_dtype("bfloat16") == mx.bfloat16
    with pytest.raises(ValueError, match="got 'float8'"):
        activation_dtype("float8")


@pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="a limit of the CPU")
def test_unquantised_experts_in_half_precision_are_refused_on_the_cpu(checkpoints):
    with pytest.raises(ValueError, match="experts of mlx.core.bfloat16 cannot be computed here"):
        load_sharded(checkpoints["hf-bf16-2-files"], 2, dtype="keep")


# --- bytes and memory -----------------------------------------------------------------------------


def test_a_rank_reads_its_share(checkpoints):
    rest = sum(t.nbytes for t in tensors.checkpoint_tensors(checkpoints["mlx-4bit"]).values())
    rest -= 2 * 8 * EXPERT_BYTES
    calls = []
    _, _, report = load_sharded(
        checkpoints["mlx-4bit"],
        group=Rank(1, 2),
        progress=lambda done, total: calls.append((done, total)),
        return_report=True,
    )
    assert report.bytes_read_experts == 2 * 4 * EXPERT_BYTES == 55_296
    assert report.bytes_read_rest == rest
    assert calls == sorted(calls) and calls[-1] == (55_296 + rest, 55_296 + rest) and len(calls) > 10


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """8 experts of 1.77 MB in each of 2 layers, so that headers and tokenizer hardly count; by layout."""
    config = {**QWEN3, "hidden_size": 1024, "moe_intermediate_size": 1024, "head_dim": 128}
    root = tmp_path_factory.mktemp("wide")
    return {
        "mlx": save(root / "mlx", config, quantised=True, dtype=mx.bfloat16),
        "per-expert": save(root / "hf", config, False, mx.bfloat16, "per-expert", num_files=2),
    }


def counters():
    return {line.split(":")[0]: int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines()}


@pytest.mark.skipif(not os.access("/proc/self/io", os.R_OK), reason="the system counts no bytes per process")
@pytest.mark.parametrize("layout", ["mlx", "per-expert"])
@pytest.mark.parametrize("strategy", ["contiguous", "round-robin"])
def test_the_system_counts_at_most_five_percent_more_than_the_share(wide, layout, strategy):
    load_sharded(wide[layout], 4)  # modules that are imported on first use
    before = counters()["rchar"]
    placement = place_experts(np.zeros((2, 8)), 4, strategy)
    _, _, report = load_sharded(wide[layout], placement=placement, group=Rank(1, 4), return_report=True)
    read = counters()["rchar"] - before
    share = sum(t.nbytes for t in tensors.checkpoint_tensors(wide[layout]).values()) - report.bytes_read_rest
    assert report.bytes_read_experts == share // 4
    assert read <= 1.05 * (share // 4 + report.bytes_read_rest)


def test_memory_never_holds_the_whole_model(wide):
    whole = sum(t.nbytes for t in tensors.checkpoint_tensors(wide["mlx"]).values())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model, _ = load_sharded(wide["mlx"], group=Rank(0, 8), dtype="keep", streams="off")  # trials take some MB
    held = sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    assert held < whole / 3
    assert mx.get_peak_memory() - before < held + 1_500_000  # one matrix of one expert twice


def test_another_layout_costs_one_layer_of_memory_and_no_more(checkpoints, tmp_path):
    config = {**GRANITE, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6}
    folder = save(tmp_path / "granite", config, quantised=False, layout="fused")
    layer = 8 * 3 * 256 * 512 * 4
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model, _, report = load_sharded(folder, group=Rank(0, 8), combine="gather", return_report=True)
    held = sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    assert report.bytes_read_experts == 6 * layer
    # A fused tensor and its two halves are there together: 2/3 + 2/3 of a layer, and 1/3 for the third matrix.
    assert mx.get_peak_memory() - before < held + 2 * layer


MEASURE = """
import sys
from pathlib import Path
import mlx.core as mx
from mlx_lm.utils import load_tokenizer
from expert_parallel.checkpoint.loading import load_sharded
sys.path.insert(0, 'tests')
from checkpoints import Rank
def status(field):
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
load_tokenizer(Path(sys.argv[1]))
before = status("VmRSS")
load_sharded(sys.argv[1], group=Rank(3, 8), dtype="keep", streams="off")
print((status("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system tells no highest memory of a process")
def test_the_process_never_grows_to_the_whole_model(tmp_path):
    config = {**QWEN3, "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 32, "head_dim": 128}
    folder = save(tmp_path / "wide", QWEN3, quantised=True)  # for its tokenizer
    tensors, config = plan(config, bits=4, group_size=64)
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder, tensors, 10**10, seed=0)
    whole = (folder / "model.safetensors").stat().st_size
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)], cwd=ROOT, env=of_a_user(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert whole > 170_000_000
    assert int(result.stdout) < 0.3 * whole  # an eighth of the experts, the rest, and buffers


@given(st.sets(st.integers(0, 19), min_size=1))
def test_any_rows_are_the_rows_of_the_file(tmp_path_factory, rows):
    file = tmp_path_factory.getbasetemp() / "rows.bin"
    values = np.arange(20 * 6, dtype=np.uint16).reshape(20, 6)
    file.write_bytes(b"header" + values.tobytes() + b"others")
    data = read_rows([StoredTensor(file, "U16", (20, 6), 6, values.nbytes)], sorted(rows))
    assert np.array_equal(data.view(np.uint16), values[sorted(rows)])


# --- mistakes ----------------------------------------------------------------------------------------


def cut_file(folder):
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def edit_config(**changes):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return damage


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


FILE = "model-00002-of-00003.safetensors"
DAMAGE = {
    "truncated": (cut_file, r"00002-of-00003.safetensors is truncated or corrupt \(\d+ bytes"),
    "empty": (write(FILE, b""), r"truncated or corrupt \(0 bytes"),
    "zeros": (write(FILE, bytes(100)), r"corrupt \(100 bytes"),
    "garbage": (write(FILE, (60).to_bytes(8, "little") + b"?" * 60), r"corrupt \(68 bytes"),
    "pointer": (write(FILE, b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer of 43 bytes"),
    "longer": (lambda f: (f / FILE).open("ab").write(b"12345"), "is (truncated or )?corrupt"),
    "missing file": (lambda f: (f / FILE).unlink(), f"1 of the 3 weight files .* missing, the first is {FILE}"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], "has no model\\*.safetensors"),
    "twice": (lambda f: shutil.copy(f / FILE, f / "model.safetensors"), "is in model-00002.* and in model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config no JSON": (write("config.json", b"{,"), "config.json cannot be read"),
    "config a list": (write("config.json", b"[]"), "config.json is no model's configuration"),
    "no type": (edit_config(model_type=None), "names no model_type"),
    "other type": (edit_config(model_type="qwen99"), "config.json: mlx-lm cannot build this model: .*qwen99"),
    "lacking fields": (
        edit_config(rope_theta=None, head_dim=None),
        "config.json: mlx-lm cannot build this model: .*rope_theta",
    ),
    "other sizes": (edit_config(hidden_size=128), "mlx-lm cannot build this model: .*shape"),
    "other layers": (edit_config(num_hidden_layers=3), "Missing \\d+ parameters"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "has no tokenizer"),
    "bad tokenizer": (write("tokenizer.json", b"{}"), "has no tokenizer that can be read"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_one_clear_line(copy, case):
    damage, message = DAMAGE[case]
    damage(copy)
    for load in (load_whole, lambda folder: load_sharded(folder, 2)):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            load(copy)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_dense_model_has_nothing_to_spread(tmp_path):
    config = {**QWEN3, "mlp_only_layers": [0, 1]}
    with pytest.raises(ValueError, match="no Mixture-of-Experts layers"):
        load_sharded(save(tmp_path / "dense", config, quantised=False), 2)


def test_placements_that_do_not_fit_are_refused_with_their_numbers(checkpoints):
    folder = checkpoints["mlx-4bit"]
    for devices in (9, 0, -1):
        with pytest.raises(ValueError, match=f"{devices} devices: needs 1 to 8"):
            load_sharded(folder, devices)
    with pytest.raises(ValueError, match="needed to spread"):
        load_sharded(folder)
    with pytest.raises(ValueError, match="9 devices: needs 1 to 8"):
        load_sharded(folder, group=Rank(0, 9))
    for wrong in ({"combine": "sum"}, {"attention": "split"}):
        with pytest.raises(ValueError, match="is (auto, reduce or gather|replicated or sharded), got .(sum|split)"):
            load_sharded(folder, 2, **wrong)
    placement = place_experts(np.zeros((2, 8)), 3)
    with pytest.raises(ValueError, match="placement is for 3 devices, there are 2 ranks"):
        load_sharded(folder, placement=placement, group=Rank(0, 2))
    with pytest.raises(ValueError, match="placement is for 3 devices, 4 devices are asked for"):
        load_sharded(folder, 4, placement=placement)
    with pytest.raises(ValueError, match="3 layers of 8 experts, the model has 2 of 8"):
        load_sharded(folder, placement=place_experts(np.zeros((3, 8)), 2))


def test_paths_and_hub_ids_are_told_apart(tmp_path, monkeypatch, checkpoints):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    asked = []

    def unreachable(self, repo, timeout):
        asked.append(repo)
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr(finding.HfApi, "model_info", unreachable)
    for path in ("models/typo", "./typo", "/no/such/folder", "typo", "~/no/such/folder"):
        with pytest.raises(FileNotFoundError, match=f"{path} does not exist"):
            resolve_model(path)
    with pytest.raises(ValueError, match="name is empty"):
        resolve_model("")
    assert asked == []
    with pytest.raises(OSError, match="hub cannot be reached: ConnectionError: Name or service not known"):
        resolve_model("nobody/nothing-4bit")
    assert asked == ["nobody/nothing-4bit"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        resolve_model("file")
    assert resolve_model(str(checkpoints["mlx-4bit"])) == checkpoints["mlx-4bit"]


def test_only_a_whole_snapshot_counts_as_cached(tmp_path, monkeypatch, copy):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert find_cached("owner/name") is None
    repo = tmp_path / "hub" / "models--owner--name"
    (repo / "refs").mkdir(parents=True)
    commit = "0" * 40
    (repo / "refs" / "main").write_text(commit)
    snapshot = repo / "snapshots" / commit
    snapshot.parent.mkdir()
    shutil.copytree(copy, snapshot)
    assert find_cached("owner/name") == snapshot == resolve_model("owner/name")
    (snapshot / FILE).unlink()
    assert find_cached("owner/name") is None
    assert find_cached("not a hub id") is None


def test_a_stack_that_was_changed_on_the_way_is_not_read_as_rows(checkpoints, monkeypatch):
    """A sanitizer that scales what it stacks: reading the files' rows would be silently wrong."""
    from mlx_lm.models import qwen3_moe

    sanitize = qwen3_moe.Model.sanitize

    def scaled(self, weights):
        return {k: v * 2 if "switch_mlp" in k else v for k, v in sanitize(self, weights).items()}

    monkeypatch.setattr(qwen3_moe.Model, "sanitize", scaled)
    folder = checkpoints["hf-bf16-2-files"]
    assert not Checkpoint(folder).reads_rows
    model, _ = load_sharded(folder, 2)
    assert mx.array_equal(model(PROMPT), stock(folder)(PROMPT))
    assert isinstance(model, nn.Module)


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_the_folder_is_trusted_where_that_was_asked_for(copy, monkeypatch, trusted):
    """Whatever mlx-lm is told is handed on by it: the model's classes and the tokenizer's alike."""
    told, folder = [], copy
    monkeypatch.setattr(opened, "load_tokenizer", lambda folder, extra, **_: told.append((folder, extra)))
    (folder / "tokenizer.json").touch()
    Checkpoint(folder, trust_remote_code=trusted).tokenizer({"use_fast": True})
    assert told == [(folder, {"use_fast": True} | ({"trust_remote_code": True} if trusted else {}))]


def test_an_error_on_one_line_is_cut_to_200_characters():
    assert finding.in_a_line(KeyError("a\n b")) == "KeyError: 'a\\n b'"
    assert finding.in_a_line(ValueError("a\n  b")) == "ValueError: a b"
    exactly = "x" * (200 - len("ValueError: "))
    assert finding.in_a_line(ValueError(exactly)) == f"ValueError: {exactly}"
    assert finding.in_a_line(ValueError(exactly + "y")) == f"ValueError: {exactly[:-3]}..."


def test_a_copy_of_the_shipped_model_is_as_small(tmp_path, checkpoints):
    (tmp_path / "config.json").write_text((finding.SHIPPED / "config.json").read_text())
    assert finding.is_shipped(finding.SHIPPED) and finding.is_shipped(tmp_path)
    assert not finding.is_shipped(checkpoints["mlx-4bit"])


def test_an_answer_ends_where_the_configuration_says():
    checkpoint = Checkpoint(SHIPPED)
    checkpoint.config["eos_token_id"] = [7, 9]
    assert checkpoint.tokenizer().eos_token_ids >= {7, 9}
