"""Rows in files, by hand: which bytes are asked for and in how many reads; what is said on one line."""

from pathlib import Path

import pytest
from conftest import CONFIG, random_model, save_model

from expert_parallel.checkpoint import finding, tensors
from expert_parallel.checkpoint.finding import cut, in_a_line
from expert_parallel.checkpoint.opened import Checkpoint
from expert_parallel.checkpoint.tensors import StoredTensor, read_rows


@pytest.mark.parametrize(
    ("rows", "reads"),
    [
        ([0, 1, 2, 3], [(2, 12)]),
        ([1, 2], [(5, 6)]),
        ([0, 1, 3], [(2, 6), (11, 3)]),
        ([0, 2, 3], [(2, 3), (8, 6)]),
        ([3], [(11, 3)]),
    ],
)
def test_neighbours_are_read_in_one_go(rows, reads, tmp_path, monkeypatch):
    """Four rows of three bytes that begin at the third byte: as one tensor, and as one each in the same places."""
    path, asked, read = tmp_path / "w", [], tensors._read
    path.write_bytes(bytes(range(20)))
    monkeypatch.setattr(tensors, "_read", lambda file, at, data: asked.append((at, data.size)) or read(file, at, data))
    whole = [StoredTensor(path, "U8", (4, 3), 2, 12)]
    each = [StoredTensor(path, "U8", (3,), 2 + 3 * row, 3) for row in range(4)]
    for stored in (whole, each):
        asked.clear()
        assert read_rows(stored, rows).tolist() == [[2 + 3 * row + n for n in range(3)] for row in rows]
        assert asked == reads


def test_neighbours_in_different_files_are_not(tmp_path):
    for name, first in (("a", 0), ("b", 10)):
        (tmp_path / name).write_bytes(bytes(range(first, first + 6)))
    stored = [StoredTensor(tmp_path / name, "U8", (3,), at, 3) for name, at in (("a", 0), ("b", 3), ("a", 3))]
    assert read_rows(stored, [0, 1, 2]).tolist() == [[0, 1, 2], [13, 14, 15], [3, 4, 5]]
    with pytest.raises(OSError, match="ended 2 bytes too early"):
        read_rows([StoredTensor(tmp_path / "a", "U8", (2, 4), 0, 8)], [0, 1])


@pytest.mark.parametrize("layers", [1, 3])
def test_a_checkpoint_knows_its_shape_and_what_an_expert_weighs(layers, tmp_path):
    folder = save_model(random_model(num_hidden_layers=layers), tmp_path / "model", num_hidden_layers=layers)
    checkpoint, one = Checkpoint(folder), 3 * CONFIG["moe_intermediate_size"] * CONFIG["hidden_size"] * 4
    assert checkpoint.shape == (layers, 16) and checkpoint.reads_rows
    assert checkpoint.bytes_to_read(layers - 1, [0, 5, 6]) == 3 * one
    checkpoint._stored[0] = None  # a layout without single rows: a whole layer is read
    assert checkpoint.bytes_to_read(0, [5]) == 16 * one and not checkpoint.reads_rows


def test_long_texts_are_cut_to_what_fits():
    assert [cut(text, 6) for text in ("abcdef", "abcdefg", "")] == ["abcdef", "abc...", ""]
    line = in_a_line(ValueError("two\n  lines of " + 300 * "x"))
    assert line.startswith("ValueError: two lines of xxx") and line.endswith("x...") and len(line) == 200
    assert in_a_line(OSError("short")) == "OSError: short"


def test_the_hub_is_asked_before_a_download_and_not_for_ever(monkeypatch, tmp_path):
    asked = []

    class Hub:
        def model_info(self, repo, timeout=None):
            asked.append((repo, timeout))

    monkeypatch.setattr(finding, "HfApi", Hub)
    (tmp_path / "config.json").write_text("{}")
    assert finding.resolve_model("nobody/nothing", lambda repo: asked.append(repo) or tmp_path) == Path(tmp_path)
    assert asked == [("nobody/nothing", 10), "nobody/nothing"]


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"max_position_embeddings": 7, "text_config": {"max_position_embeddings": 9}}, 7),
        ({"text_config": {"max_position_embeddings": 9}}, 9),
        ({"max_position_embeddings": None, "text_config": None}, None),
    ],
)
def test_how_far_a_model_looks(config, context):
    assert finding.context_of(config) == context
