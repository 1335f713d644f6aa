"""Files: whole or not at all (links and pipes: command/test_output.py); what JSON cannot hold is made plain."""

import json

import mlx.core as mx
import numpy as np
import pytest

from expert_parallel.files import nearest, plain, written_whole


def test_a_reader_never_sees_half(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with written_whole(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(KeyError), written_whole(path) as file:
        file.write("half")
        raise KeyError
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    with written_whole(path, "wb") as file:
        file.write(b"\xff")
    assert path.read_bytes() == b"\xff"


def test_where_nothing_can_be_written_is_said_in_a_line(tmp_path):
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "absent" / "a", "No such file or directory")):
        with pytest.raises(OSError) as error, written_whole(path):
            pass
        assert str(error.value) == f"cannot write {path}: {why}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "as_json"),
    [
        ({1: np.float32(0.5), "a": None}, {"1": 0.5, "a": None}),
        ((np.arange(3), mx.array([True, False])), [[0, 1, 2], [True, False]]),
        ([float("nan"), float("-inf"), np.array([1.5, np.nan])], [None, None, [1.5, None]]),
        (range(2), [0, 1]),
        ([True, 7, "text", 2.5], [True, 7, "text", 2.5]),
        ({"dtype": mx.float32}, {"dtype": "mlx.core.float32"}),
    ],
)
def test_what_json_knows(value, as_json):
    assert plain(value) == as_json and json.loads(json.dumps(plain(value), allow_nan=False)) == as_json


def test_a_name_that_is_nearly_right():
    assert nearest("Balancd", ("contiguous", "balanced")) == ", did you mean balanced?"
    assert nearest("abacus", ("contiguous", "balanced")) == nearest("x", ()) == ""
