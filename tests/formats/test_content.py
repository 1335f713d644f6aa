"""What torch.save has written, put together here by hand: only numbers come out of it, of every type, and no more."""

import pickle
import zipfile

import numpy as np
import pytest

from expert_parallel.formats.content import content_of

TENSOR = """ctorch._utils
_rebuild_tensor_v2
((S'storage'
c{module}
{storage}
S'0'
S'cpu'
I{count}
tQI{offset}
(I{rows}
I{columns}
t(I{down}
I{right}
ttR."""
TENSOR_OF_NO_DIMENSION = TENSOR.replace("I{rows}\nI{columns}\n", "").replace("I{down}\nI{right}\n", "")
TYPES = {
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
}


def write(path, numbers, shape=(2, 3), strides=(3, 1), offset=0, module="torch", storage="LongStorage", text=TENSOR):
    about = {"module": module, "storage": storage, "count": len(numbers), "offset": offset}
    about |= dict(zip(("rows", "columns", "down", "right"), (*shape, *strides), strict=True))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", text.format(**about))
        archive.writestr("a/data/0", numbers.tobytes())
    return path


@pytest.mark.parametrize(("storage", "kind"), TYPES.items())
def test_numbers_of_every_type(storage, kind, tmp_path):
    found = content_of(write(tmp_path / "a.pt", np.arange(6, dtype=kind), storage=storage))
    assert found.dtype == kind and found.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "numbers"),
    [
        ((3, 2), (1, 3), 0, [[0, 3], [1, 4], [2, 5]]),  # transposed
        ((2, 2), (3, 1), 1, [[1, 2], [4, 5]]),
        ((2, 2), (3, 1), 2, None),  # 2 + 3 + 1 is one number too many, though 2 + 3 is not
        ((3, 2), (2, 1), 0, [[0, 1], [2, 3], [4, 5]]),
        ((3, 3), (2, 1), 0, None),
    ],
)
def test_both_dimensions_count_for_what_is_stored(shape, strides, offset, numbers, tmp_path):
    path = write(tmp_path / "a.pt", np.arange(6), shape, strides, offset)
    if numbers is None:
        with pytest.raises(ValueError, match=rf"a tensor of \[{shape[0]}, {shape[1]}\] is larger than what is stored"):
            content_of(path)
    else:
        assert content_of(path).tolist() == numbers


@pytest.mark.parametrize(("offset", "refused"), [(0, False), (5, False), (6, True), (-1, True)])
def test_a_tensor_of_no_dimension_is_one_number(offset, refused, tmp_path):
    path = write(tmp_path / "a.pt", np.arange(6), offset=offset, text=TENSOR_OF_NO_DIMENSION)
    if refused:
        with pytest.raises(ValueError, match=r"a tensor of \[\] is larger than what is stored"):
            content_of(path)
    else:
        assert content_of(path) == offset


@pytest.mark.parametrize(("module", "name"), [("torch", "Size"), ("evil", "LongStorage"), ("collections", "Counter")])
def test_nothing_else_is_known_by_name(module, name, tmp_path):
    """A known name of another module is as unknown as an unknown one of torch's."""
    path = write(tmp_path / "a.pt", np.arange(6), module=module, storage=name)
    with pytest.raises(ValueError, match=f"it holds {module}.{name}, which is no tensor of numbers"):
        content_of(path)


def test_an_ordered_dictionary_is_a_dictionary(tmp_path):
    import collections

    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(collections.OrderedDict(a=1, b=2)))
    assert content_of(tmp_path / "a.pt") == {"a": 1, "b": 2}


def test_text_is_told_by_its_first_lines(tmp_path):
    """JSON lines have their numbers, blank ones counted; a table its comments; what has a colon or a blank is YAML."""
    read = {}
    for name, text in {
        "lines": '\n{"a": 1}\n\n{"a": 2}\n',
        "table": '# one\n\n# two\na,b\n1,2,3\n"x, y",4\n',
        "yaml": "a: 1, 2\n",
        "prose": "Once, there was\n",
        "nothing": "",
    }.items():
        (tmp_path / name).write_text(text)
        read[name] = content_of(tmp_path / name)
    assert read["lines"] == [{"a": 1}, {"a": 2}]
    about = {"#": "# one # two"}
    assert read["table"] == [{"a": "1", "b": "2", **about, "#line": 5}, {"a": "x, y", "b": "4", **about, "#line": 6}]
    assert read["yaml"] == {"a": "1, 2"} and read["prose"] == "Once, there was" and read["nothing"] is None
    (tmp_path / "cut").write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(ValueError, match="line 3, column 7: Expecting value"):
        content_of(tmp_path / "cut")
