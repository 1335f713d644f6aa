"""Experts on disk answer as the whole model does, to the bit, whatever finds room; and fail aloud."""

import gc
import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import GRANITE, MIXTRAL, QWEN3, save
from conftest import SHIPPED
from mlx_lm.generate import generate_step

from expert_parallel import load_sharded, record_routing
from expert_parallel.checkpoint import rows
from expert_parallel.checkpoint.loading import load_whole
from expert_parallel.checkpoint.opened import Checkpoint
from expert_parallel.layers import expert_tensors, moe_layers
from expert_parallel.offload import POLICIES
from expert_parallel.offload import store as store_module
from expert_parallel.offload.replay import replay

OPEN_FILES = Path("/proc/self/fd")
PROMPT = mx.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]])


def stores_of(model):
    return [store for layer in moe_layers(model) for store in layer.experts.stores]


def load(folder, devices=1, **how):
    return load_sharded(folder, num_devices=devices, **how)[0]


def answers(model, count=12):
    """Logits of a prompt, and tokens and their logits after it."""
    steps = [(token, logits) for (token, logits), _ in zip(generate_step(PROMPT[0], model), range(count), strict=False)]
    return [model(PROMPT), mx.array([token for token, _ in steps]), mx.stack([logits for _, logits in steps])]


def same(found, expected):
    return all(mx.array_equal(a, b).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("layout", "quantised"), [("mlx", True), ("mlx", False), ("per-expert", False)])
@pytest.mark.parametrize("config", [QWEN3, MIXTRAL], ids=lambda config: config["model_type"])
def test_answers_are_those_of_the_whole_model(config, layout, quantised, tmp_path):
    folder = save(tmp_path / "model", config, quantised, mx.bfloat16, layout)
    expected = answers(load_whole(folder)[0])
    for devices, memory, policy in ((1, "13%", "lru"), (1, "50%", "lfu"), (2, "25%", "aging"), (3, "90%", "lru")):
        model = load(folder, devices, expert_memory=memory, cache_policy=policy)
        assert same(answers(model), expected), (devices, memory, policy)
        assert not any(store.all_here for store in stores_of(model))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_shipped_model_too_with_the_hits_that_the_replay_foretells(policy):
    whole = load(SHIPPED)
    with record_routing(whole) as before:
        expected = answers(whole)
    for memory in ("6%", "25%", "60%"):
        model = load(SHIPPED, expert_memory=memory, cache_policy=policy, cache_trace=before)
        with record_routing(model) as trace:
            assert same(answers(model), expected), memory
        rooms = [len(store.cache.held) for store in stores_of(model)]
        pinned = [np.flatnonzero(np.isinf(store.cache.claim)) for store in stores_of(model)]
        assert any(len(each) for each in pinned) == (policy == "pinned" and memory != "6%")
        hits, wanted = replay(trace, rooms, policy, pinned)
        assert [store.cache.hits for store in stores_of(model)] == hits.sum(axis=0).tolist()
        assert [store.cache.misses for store in stores_of(model)] == (wanted - hits).sum(axis=0).tolist()
        for store in stores_of(model):  # what is read is what was missed, in bytes of the files
            assert store.reads.experts == store.cache.misses
            assert store.reads.bytes == store.cache.misses * Checkpoint(SHIPPED).bytes_to_read(0, [0])


def test_one_place_a_layer_is_enough_and_less_is_refused(tmp_path):
    folder = save(tmp_path / "model", QWEN3, True)
    expected = answers(load_whole(folder)[0])
    model = load(folder, expert_memory="12.5%")
    assert [len(store.cache.held) for store in stores_of(model)] == [1, 1] and same(answers(model), expected)
    with pytest.raises(ValueError, match=r"too small: one expert in each of 2 layers takes .* 12.5% of the device's"):
        load(folder, expert_memory="12%")
    with pytest.raises(ValueError, match="expert memory is a size such as 4GB"):
        load(folder, expert_memory="much")


def test_where_everything_fits_all_are_in_memory(tmp_path):
    folder = save(tmp_path / "model", QWEN3, True)
    assert all(store.all_here for store in stores_of(load(folder, 2, expert_memory="1GB")))


def test_memory_is_that_of_the_places(tmp_path):
    folder = save(tmp_path / "model", QWEN3, True, mx.bfloat16)
    model = load(folder, expert_memory="50%", dtype="keep")
    answers(model)
    for store in stores_of(model):
        arrays = expert_tensors(store.experts)
        assert {len(array) for array in arrays.values()} == {4}
        assert sum(array.nbytes for array in arrays.values()) == 4 * 3 * (2048 + 256)


def test_other_activations_than_the_files(tmp_path):
    """bfloat16 files in float32, float16 and as they are; and cast once more while rows are here already."""
    folder = save(tmp_path / "model", QWEN3, True, mx.bfloat16)
    for dtype in ("float32", "float16", "keep"):
        whole, model = load_whole(folder, dtype)[0], load(folder, expert_memory="25%", dtype=dtype)
        assert same(answers(model), answers(whole)), dtype
        for other in (mx.float32, mx.bfloat16):
            whole.set_dtype(other), model.set_dtype(other)
            if dtype == "keep" and other == mx.float32:  # widened and narrowed again, nothing is lost
                assert same(answers(model), answers(whole)), (dtype, other)


def test_rows_that_mlx_puts_in_are_the_same(tmp_path, monkeypatch):
    """As on a GPU, where the host does not write into an array."""
    folder = save(tmp_path / "model", QWEN3, True, mx.bfloat16)
    expected = answers(load_whole(folder, "keep")[0])
    monkeypatch.setattr(store_module, "writable", lambda array: None)
    model = load(folder, 2, expert_memory="25%", dtype="keep")
    assert not stores_of(model)[0]._pool.in_place
    assert same(answers(model), expected)
    stores_of(model)[0].read_ahead(np.array([0, 1]))
    assert stores_of(model)[0].reads.experts_ahead == 0


def test_a_view_that_is_a_copy_is_found_out(monkeypatch):
    array = mx.ones((3, 2))
    view = store_module.writable(array)
    view[1] = 7
    assert array.tolist() == [[1, 1], [7, 7], [1, 1]]
    monkeypatch.setattr(np, "array", lambda array, copy: np.asarray(array).copy())
    assert store_module.writable(array) is None


def test_two_answers_may_wait_to_be_computed(tmp_path):
    """The second call writes over rows of the first, whose answer nobody has asked for yet."""
    folder = save(tmp_path / "model", QWEN3, True)
    whole, model = load_whole(folder)[0], load(folder, expert_memory="38%")
    texts = [mx.array([[n, n + 7]]) for n in range(20)]
    waiting = [model(text) for text in texts]
    assert all(mx.array_equal(one, whole(text)).item() for one, text in zip(waiting, texts, strict=True))


def test_an_expert_of_another_device_is_refused(tmp_path):
    store = stores_of(load(save(tmp_path / "model", QWEN3, True), 2, expert_memory="50%"))[0]
    assert store.ids.tolist() == [0, 1, 2, 3]
    with pytest.raises(IndexError, match="expert 5 is not here"):
        store(mx.zeros((1, 64)), np.zeros(2, int), np.array([1, 5]))


def test_experts_that_are_read_ahead_are_hits_and_right(tmp_path):
    folder = save(tmp_path / "model", QWEN3, True)
    expected = answers(load_whole(folder)[0])
    model = load(folder, expert_memory="75%")
    first, *_ = stores_of(model)
    first.read_ahead(np.array([6, 2, 2]))
    assert same(answers(model, 1)[:1], expected[:1])
    first.read_ahead(np.arange(8))  # no more than there is room for; what is here is not read again
    first._settle(())
    reads = first.reads
    assert 2 <= reads.experts_ahead <= 8 and reads.bytes_ahead == reads.experts_ahead * 3 * (2048 + 512)
    assert reads.useful <= 2 and len(set(first.cache.held)) == 6
    assert same(answers(model), expected)


def test_experts_change_devices_without_a_read(tmp_path):
    folder = save(tmp_path / "model", QWEN3, True)
    expected = answers(load_whole(folder)[0])
    model = load(folder, 2, expert_memory="50%")
    for layer in moe_layers(model):
        layer.experts.change(layer.experts.held[::-1])
    assert stores_of(model)[0].ids.tolist() == [4, 5, 6, 7] and stores_of(model)[0].reads.bytes == 0
    assert same(answers(model), expected)


# --- what goes wrong ----------------------------------------------------------------------------------------


def test_a_layout_that_holds_no_single_experts_is_refused(tmp_path):
    folder = save(tmp_path / "model", GRANITE, False, layout="fused")
    with pytest.raises(ValueError, match="cannot be read from disk one by one"):
        load(folder, expert_memory="50%")
    assert all(store.all_here for store in stores_of(load(folder, expert_memory="100%")))


def test_a_file_that_is_replaced_is_read_as_it_was(tmp_path):
    folder = save(tmp_path / "model", QWEN3, True)
    expected = answers(load_whole(folder)[0])
    model = load(folder, expert_memory="25%")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(b"another")
    assert same(answers(model), expected)


def test_a_file_that_is_written_over_ends_the_run(tmp_path):
    folder = save(tmp_path / "model", QWEN3, True)
    model, path = load(folder, expert_memory="25%"), folder / "model.safetensors"
    mx.eval(model(PROMPT))
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 4)
        file.write(b"\x01\x02\x03\x04")
    with pytest.raises(OSError, match=r"model.safetensors was changed while the model ran from it; start again"):
        mx.eval(model(PROMPT))


def test_a_file_that_is_cut_short_ends_the_run(tmp_path):
    folder = save(tmp_path / "model", QWEN3, True)
    model, path = load(folder, expert_memory="25%"), folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 3)
    with pytest.raises(OSError, match=r"ended \d+ bytes too early|was changed while"):
        mx.eval(model(PROMPT))


def test_after_a_read_that_failed_nothing_is_computed_from_half_of_it(tmp_path, monkeypatch):
    """The disk fails once, in the middle of a layer's reads; the next call reads what is lacking again."""
    folder = save(tmp_path / "model", QWEN3, True)
    expected = answers(load_whole(folder)[0])
    model, real, calls = load(folder, expert_memory="50%"), os.preadv, []

    def failing(number, buffers, offset):
        calls.append(offset)
        if len(calls) in (5, 40):
            raise OSError(5, "Input/output error")
        return real(number, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            mx.eval(model(PROMPT))
    assert len(calls) == 40
    assert same(answers(model), expected)


def test_after_a_read_that_failed_no_other_thread_writes_on(tmp_path, monkeypatch):
    """One part of a read fails at once while the others are slow: their rows are given away by the next call."""
    folder = save(tmp_path / "model", QWEN3, True)
    whole, model = load_whole(folder)[0], load(folder, expert_memory="38%")
    monkeypatch.setattr(rows, "WORTH_THREADS", 0)
    real, calls = os.preadv, count()

    def failing(number, buffers, offset):
        if next(calls) % 60 == 7:
            raise OSError(5, "Input/output error")
        time.sleep(0.001)
        return real(number, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    failed = right = 0
    for n in range(24):
        text = mx.array([[n, 3 * n + 1]])
        try:
            right += mx.array_equal(model(text), whole(text)).item()
        except OSError:
            failed += 1
    assert failed > 3 and right == 24 - failed


def test_threads_that_ask_at_once_are_answered_one_by_one(tmp_path):
    folder = save(tmp_path / "model", QWEN3, True)
    whole, model = load_whole(folder)[0], load(folder, 2, expert_memory="38%")
    texts = [mx.array([[n, n + 1, 2 * n]]) for n in range(40)]
    expected = [np.array(whole(text)) for text in texts]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda text: np.array(model(text)), texts))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_that_are_read_after_a_cast_are_as_those_from_before(tmp_path, dtype):
    """Narrowed when loaded and widened later: what is read then goes the same way."""
    folder = save(tmp_path / "model", QWEN3, True, mx.float32)
    whole, model = load_whole(folder, dtype)[0], load(folder, expert_memory="38%", dtype=dtype)
    mx.eval(model(PROMPT))
    whole.set_dtype(mx.float32), model.set_dtype(mx.float32)
    assert same(answers(model), answers(whole))


@pytest.mark.skipif(not OPEN_FILES.exists(), reason="only Linux lists a process's open files")
def test_files_are_closed_with_the_model(tmp_path):
    folder = save(tmp_path / "model", QWEN3, True)
    load(folder, expert_memory="38%")
    before = len(list(OPEN_FILES.iterdir()))
    for _ in range(8):
        load(folder, expert_memory="38%")
    gc.collect()
    assert len(list(OPEN_FILES.iterdir())) < before + 4
