"""Compiled replays are kept on disk; what became of the files there stops nobody."""

import importlib.util

import pytest

from expert_parallel.offload.replay import compiled


@pytest.mark.parametrize("damage", [b"", b"not a cache", "half"])
@pytest.mark.parametrize("ending", ["nbi", "nbc"])
def test_a_damaged_file_of_numbas_is_as_none_and_written_anew(tmp_path, ending, damage):
    path = tmp_path / "small.py"
    path.write_text("def more(x):\n    return x + 1\n")

    def loaded():
        spec = importlib.util.spec_from_file_location("small", path)
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        return compiled(module.more)

    first = loaded()
    assert first(1) == 2 and sum(first.stats.cache_hits.values()) == 0
    again = loaded()
    assert again(1) == 2 and sum(again.stats.cache_hits.values()) == 1
    (file,) = tmp_path.rglob(f"*.{ending}")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage == "half" else damage)
    mended, after = loaded(), loaded()
    assert mended(1) == 2 and sum(mended.stats.cache_hits.values()) == 0
    assert after(1) == 2 and sum(after.stats.cache_hits.values()) == 1


def test_without_a_folder_to_keep_it_in_it_is_compiled_all_the_same():
    scope = {}
    exec("def more(x):\n    return x + 1", scope)  # of no file
    assert compiled(scope["more"])(1) == 2
