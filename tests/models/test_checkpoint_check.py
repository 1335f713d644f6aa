"""Damaged checkpoints, one kind of damage each, and what is said of them."""

import json
import shutil

import mlx.core as mx
import pytest
from conftest import SHIPPED
from mlx.utils import tree_flatten

from expert_parallel.models.checkpoint_check import check_checkpoint
from expert_parallel.models.configurations import load_configuration

ROUTER = "model.layers.2.mlp.gate.weight"


@pytest.fixture
def checkpoint(tmp_path):
    """The shipped model split over two files, with an index."""
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(SHIPPED / "config.json", folder)
    write(folder, dict(mx.load(str(SHIPPED / "model.safetensors"))))
    return folder


def write(folder, tensors, index=True):
    names = sorted(tensors)
    files = {"model-1.safetensors": names[: len(names) // 2], "model-2.safetensors": names[len(names) // 2 :]}
    for file, inside in files.items():
        mx.save_safetensors(str(folder / file), {name: tensors[name] for name in inside})
    if index:
        document = {
            "metadata": {"total_size": sum(array.nbytes for array in tensors.values())},
            "weight_map": {name: file for file, inside in files.items() for name in inside},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    return files


def check(folder):
    return check_checkpoint(load_configuration(str(folder)))


def problems_of(folder):
    return check(folder)["problems"]


def load(folder):
    tensors = {}
    for path in folder.glob("model*.safetensors"):
        tensors |= mx.load(str(path))
    mx.eval(tensors)
    return tensors


def test_the_shipped_checkpoint_is_whole_and_as_predicted():
    report = check(SHIPPED)
    assert report["ok"], report["problems"]
    assert report["bytes_on_disk"] == report["bytes_loaded"] == report["bytes_predicted"] == 15_922_688
    assert (report["num_files"], report["num_tensors"]) == (1, 119)
    assert report["source"] == "measured on the files' headers"


def test_two_files_and_an_index_are_fine(checkpoint):
    report = check(checkpoint)
    assert report["ok"], report["problems"]
    assert (report["num_files"], report["num_tensors"]) == (2, 119)


def test_missing_tensor_and_file(checkpoint):
    tensors = load(checkpoint)
    del tensors[ROUTER]
    write(checkpoint, tensors)
    report = check(checkpoint)
    assert not report["ok"]
    assert report["bytes_loaded"] is None
    assert "Missing 1 parameters" in report["problems"][0]
    assert ROUTER in report["problems"][0]
    (checkpoint / "model-2.safetensors").unlink()
    assert "1 of the 2 weight files" in problems_of(checkpoint)[0]
    assert "the first is model-2.safetensors" in problems_of(checkpoint)[0]


def test_extra_tensor_and_file(checkpoint):
    tensors = load(checkpoint)
    write(checkpoint, tensors | {"model.layers.9.spare": mx.zeros(3)})
    assert "model.layers.9.spare" in problems_of(checkpoint)[0]
    write(checkpoint, tensors)
    mx.save_safetensors(str(checkpoint / "model-3.safetensors"), {ROUTER: tensors[ROUTER]})
    assert f"{ROUTER} is in model-2.safetensors and in model-3.safetensors" in problems_of(checkpoint)[0]


@pytest.mark.parametrize("cut", [1, 1000, 10**9])
def test_truncated_file(checkpoint, cut):
    path = checkpoint / "model-1.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: max(5, len(content) - cut)])
    problem, *more = problems_of(checkpoint)
    assert f"{path} is truncated" in problem
    assert not more  # not 60 tensors that are missing
    path.write_bytes(content + b"x")
    assert "corrupt" in problems_of(checkpoint)[0]


def header_of(path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def entry(first, field, value):
    """A damage: another value in the header's entry of the first or the second tensor."""

    def change(entries):
        names = sorted((n for n in entries if n != "__metadata__"), key=lambda n: entries[n]["data_offsets"])
        entries[names[not first]][field] = value if not callable(value) else value(entries[names[not first]][field])
        return json.dumps(entries).encode()

    return change


DAMAGED_HEADERS = {
    "no JSON": (lambda entries: b"oops", "corrupt"),
    "nested": (lambda entries: b'{"a":' + b"[" * 100_000, "corrupt"),
    "a list": (lambda entries: b"[]", "corrupt"),
    "overlapping": (entry(False, "data_offsets", lambda at: [at[0] - 2, at[1] - 2]), "corrupt"),
    "all in one place": (entry(False, "data_offsets", lambda at: [0, at[1] - at[0]]), "corrupt"),
    "a hole": (entry(True, "data_offsets", lambda at: [at[0] + 2, at[1] + 2]), "corrupt"),
    "backwards": (entry(True, "data_offsets", lambda at: [at[1], at[0]]), "corrupt"),
    "words for numbers": (entry(True, "shape", ["x", "y"]), "corrupt"),
    "another type": (entry(True, "dtype", "F64"), "corrupt"),
}


@pytest.mark.parametrize("damage", DAMAGED_HEADERS)
def test_damaged_header(checkpoint, damage):
    path = checkpoint / "model-1.safetensors"
    change, words = DAMAGED_HEADERS[damage]
    entries, data = header_of(path)
    text = change(entries)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    problem, *more = problems_of(checkpoint)
    assert str(path) in problem
    assert words in problem
    assert not more


def test_what_is_named_as_weights_and_is_no_file(checkpoint):
    path = checkpoint / "model-1.safetensors"
    path.unlink()
    path.mkdir()
    assert "is a folder" in problems_of(checkpoint)[0]
    path.rmdir()
    path.symlink_to(checkpoint / "nowhere")
    assert "is a link to nowhere" in problems_of(checkpoint)[0]


def test_wrong_shape_and_type(checkpoint):
    tensors = load(checkpoint)
    norm = "model.norm.weight"
    write(checkpoint, tensors | {norm: mx.zeros(255, dtype=tensors[norm].dtype)})
    (problem,) = problems_of(checkpoint)
    assert norm in problem
    assert "(255,)" in problem
    write(checkpoint, tensors | {norm: tensors[norm].astype(mx.uint32)})
    assert problems_of(checkpoint) == [f"{norm} is {mx.uint32}, the configuration makes it {tensors[norm].dtype}"]
    write(checkpoint, tensors | {norm: tensors[norm].astype(mx.float32)})  # mlx-lm takes it
    assert check(checkpoint)["ok"]


def test_configuration_that_does_not_match(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "num_experts": 64}))
    (problem,) = problems_of(checkpoint)
    assert "128" in problem
    assert "64" in problem


def test_index_that_lies(checkpoint):
    path = checkpoint / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["metadata"]["total_size"] += 7
    path.write_text(json.dumps(index))
    (problem,) = problems_of(checkpoint)
    assert "says total_size" in problem
    index["weight_map"][ROUTER] = next(f for f in ("model-1.safetensors", "model-2.safetensors")
                                       if f != index["weight_map"][ROUTER])  # fmt: skip
    path.write_text(json.dumps(index))
    (problem,) = problems_of(checkpoint)
    assert f"1 tensors are not where {path.name} says, the first is {ROUTER}" in problem
    for content in ("[]", "[" * 100_000, '{"weight_map": 3}'):
        path.write_text(content)
        assert f"{path} is corrupt" in problems_of(checkpoint)[0]


def test_experts_one_by_one_as_on_the_hub(tmp_path):
    """Unquantised files with every expert apart: mlx-lm's sanitize stacks them, and one missing is noticed."""
    from conftest import CONFIG, random_model

    model = random_model(num_hidden_layers=1, num_experts=3, num_experts_per_tok=2)
    config = {**CONFIG, "num_hidden_layers": 1, "num_experts": 3, "num_experts_per_tok": 2, "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, array in tree_flatten(model.parameters()):
        if "switch_mlp" in name:
            for expert in range(3):
                tensors[name.replace("switch_mlp", f"experts.{expert}")] = array[expert]
        else:
            tensors[name] = array
    write(tmp_path, tensors, index=False)
    assert check(tmp_path)["ok"]
    del tensors["model.layers.0.mlp.experts.1.up_proj.weight"]
    write(tmp_path, tensors, index=False)
    assert "experts.1.up_proj" in problems_of(tmp_path)[0]


def test_nothing_to_check(tmp_path):
    with pytest.raises(ValueError, match="no model"):
        check_checkpoint(load_configuration("qwen3-coder-30b"))
