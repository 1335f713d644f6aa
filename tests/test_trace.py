"""Traces: what the router decided, recorded without touching the answer."""

import inspect
import json
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from conftest import CONFIG, random_model
from mlx_lm import batch_generate
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache

from expert_parallel import RoutingTrace, place_experts, record_routing, shard_model
from expert_parallel.layers import moe_layers
from expert_parallel.trace import _Notes


def router_choice(model, tokens):
    """The chosen experts of every layer by the block's own formula, [T, L, k] with sorted ids."""
    chosen = []
    for layer in moe_layers(model):
        block, seen = layer.block, []
        original = type(block).__call__

        def spy(self, x, block=block, seen=seen, original=original):
            if self is block:
                gates = mx.softmax(self.gate(x), axis=-1, precise=True)
                seen.append(mx.argsort(-gates, axis=-1)[..., : self.top_k])
            return original(self, x)

        type(block).__call__ = spy
        try:
            mx.eval(model(tokens), seen)
        finally:
            type(block).__call__ = original
        chosen.append(np.sort(np.array(seen[0]).reshape(-1, block.top_k), axis=-1))
    return np.stack(chosen, axis=1)


@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_recorder_notes_the_routers_own_choice(top_k):
    model = random_model(num_experts_per_tok=top_k)
    tokens = mx.array([[5, 6, 7, 8, 9, 10]])
    expected = router_choice(model, tokens)
    plain = model(tokens)
    with record_routing(model, "random") as trace:
        assert mx.array_equal(model(tokens), plain)
    assert trace.experts.dtype == np.uint16
    assert np.array_equal(np.sort(trace.experts, axis=-1), expected)
    assert trace.loads().sum() == 6 * 3 * top_k
    assert trace.model == "random"


def test_recording_a_sharded_model_sees_the_same_and_leaves_nothing_behind():
    model = random_model()
    tokens = mx.array([[5, 6, 7, 8]])
    with record_routing(model) as stock:
        mx.eval(model(tokens))
    shard_model(model, place_experts(np.zeros((3, 16)), 5))
    before = [layer.experts for layer in moe_layers(model)]
    with record_routing(model) as sharded:
        mx.eval(model(tokens))
    assert np.array_equal(stock.experts, sharded.experts)
    assert all(a.experts is b for a, b in zip(moe_layers(model), before, strict=True))


def test_prefill_and_decode_are_told_apart_over_many_passes():
    model = random_model()
    cache = make_prompt_cache(model)
    with record_routing(model) as trace:
        mx.eval(model(mx.array([[1, 2, 3]]), cache=cache))
        for token in range(70):  # more than one batch of notes
            mx.eval(model(mx.array([[token]]), cache=cache))
    assert trace.prefill.tolist() == [True] * 3 + [False] * 70
    assert len(trace.phase("prefill")) == 3
    assert len(trace.phase("decode")) == 70
    assert trace.steps.tolist() == [0] * 3 + list(range(1, 71))


def test_a_batch_of_single_tokens_is_decode_where_blocks_flatten_their_tokens_too():
    """OLMoE's blocks hand on [B T, H]: four sequences of one token were taken for a prompt of four."""
    from mlx_lm.models.olmoe import Model, ModelArgs

    config = {name: CONFIG[name] for name in inspect.signature(ModelArgs).parameters if name in CONFIG}
    model, original = Model(ModelArgs(**config | {"model_type": "olmoe"})), Model.__call__
    cache = make_prompt_cache(model)
    with record_routing(model) as trace:
        mx.eval(model(mx.array([[1, 2]] * 4), cache=cache))
        mx.eval(model(mx.array([[3]] * 4), cache=cache))
    assert trace.prefill.tolist() == [True] * 8 + [False] * 4
    assert Model.__call__ is original


def test_a_batch_is_said():
    """Rows that somebody pads by hand cannot be told from tokens."""
    model = random_model()
    with record_routing(model) as trace:
        mx.eval(model(mx.array([[1, 2, 0], [1, 2, 3]])))
    assert (len(trace), trace.metadata) == (6, {"sequences": 2})
    with record_routing(model) as trace:
        mx.eval(model(mx.array([[1, 2, 3]])))
    assert trace.metadata == {}


class PlainTokenizer:
    """As much of a tokenizer as a batch needs."""

    eos_token_ids, has_thinking = {3}, False
    decode = staticmethod(str)


BATCH = [[5, 6, 7, 22], [40], [8, 9, 1, 2, 60, 61, 62, 63, 64], [33, 4], list(range(11, 17))]


def by_themselves(model, sequences):
    """How often each choice [L, k] comes where every sequence is read alone."""
    counts = Counter()
    for sequence in sequences:
        with record_routing(model) as alone:
            mx.eval(model(mx.array([sequence])))
        counts.update(choice.tobytes() for choice in np.sort(alone.experts))
    return counts


@pytest.mark.parametrize("step", [2048, 3])
def test_a_batch_of_mlx_lm_is_recorded_without_its_padding(step):
    """Prompts of other lengths, read whole or in parts; each token of each sequence once, and nothing else."""
    model, most = random_model(), [5, 9, 3, 1, 7]
    with record_routing(model) as trace:
        answer = batch_generate(
            model, PlainTokenizer(), BATCH, max_tokens=most, prefill_step_size=step, return_token_ids=True
        )
    sequences = [prompt + tokens for prompt, tokens in zip(BATCH, answer.token_ids, strict=True)]
    assert [len(tokens) for tokens in answer.token_ids] == most  # nobody came to an end before
    assert Counter(choice.tobytes() for choice in np.sort(trace.experts)) == by_themselves(model, sequences)
    assert trace.prefill.sum() == sum(map(len, BATCH)) - len(BATCH)  # the last of each begins its answer
    assert trace.metadata["padding"] > 0 and trace.metadata["sequences"] in (4, 5)


def test_sequences_that_join_and_leave_are_recorded_token_by_token():
    model, said = random_model(), {}
    generator = BatchGenerator(model, stop_tokens=[[3]], prefill_batch_size=3, completion_batch_size=3)
    with record_routing(model) as trace:
        generator.insert(BATCH[:3], [6, 4, 5])

        def until(no_more):
            while not no_more() and (responses := generator.next_generated()):
                for response in responses:
                    said.setdefault(response.uid, []).append(response.token)

        until(lambda: len(said.get(0, [])) == 3)
        generator.insert(BATCH[3:], [3, 8])
        until(lambda: False)
    sequences = [prompt + said[uid] for uid, prompt in enumerate(BATCH)]
    assert Counter(choice.tobytes() for choice in np.sort(trace.experts)) == by_themselves(model, sequences)
    assert trace.metadata["padding"] > 0


def test_layers_that_choose_different_numbers_are_refused_as_they_come():
    notes = _Notes(2, 100)
    notes.taker(0)(mx.zeros((1, 1, 8), dtype=mx.uint32))
    with pytest.raises(ValueError, match="8 and 4 experts a token"):
        notes.taker(1)(mx.zeros((1, 1, 4), dtype=mx.uint32))


def test_passes_that_end_in_the_middle_are_no_tokens():
    notes = _Notes(2, 100)
    for layer in (1, 0, 0, 1, 1):  # a block by itself, a pass that failed, a whole one, a block by itself
        notes.taker(layer)(mx.full((1, 1, 8), layer, dtype=mx.uint32))
    experts, prefill, steps = notes.finish()
    assert experts[:, :, 0].tolist() == [[0, 1]]
    assert (prefill.tolist(), steps.tolist()) == ([False], [0])


def test_memory_is_bounded_and_what_was_left_out_is_said():
    model = random_model()
    with record_routing(model) as whole, record_routing(model, max_tokens=6) as trace:
        mx.eval(model(mx.array([[1, 2, 3, 4]])))
        mx.eval(model(mx.array([[5, 6, 7, 8]])))
    assert np.array_equal(trace.experts, whole.experts[:6]) and trace.steps.tolist() == [0] * 4 + [1] * 2
    assert trace.metadata["dropped_tokens"] == 2


def test_a_block_by_itself_says_what_is_prefill():
    """No model is called that would say it: many positions at a time are a prompt, also where they come flat."""
    model = random_model(num_hidden_layers=1)
    block = model.layers[0].mlp
    with record_routing(model, "alone") as trace:
        for shape in ((1, 6, 64), (1, 1, 64), (3, 1, 64), (5, 64), (1, 64)):
            mx.eval(block(mx.random.normal(shape)))
        assert len(trace) == 0  # filled when the block ends
    assert trace.prefill.tolist() == [True] * 6 + [False] * 4 + [True] * 5 + [False]
    assert repr(trace) == "RoutingTrace(alone: 16 tokens x 1 layers, top-4 of 16)"
    with record_routing(model) as nothing:
        pass
    assert (nothing.experts.shape, nothing.prefill.shape, nothing.steps.shape) == ((0, 1, 0), (0,), (0,))
    assert repr(nothing) == "RoutingTrace(unnamed: 0 tokens x 1 layers, top-0 of 16)"


def test_a_prompt_has_as_many_tokens_as_is_said():
    """Where it is read in several passes, or one token at a time."""
    model = random_model()
    with record_routing(model, prompt_tokens=3) as trace:
        for tokens in ([[1, 2]], [[3]], [[4]], [[5, 6]]):
            mx.eval(model(mx.array(tokens)))
    assert trace.prefill.tolist() == [True] * 3 + [False] * 3


def test_passes_after_the_limit_keep_nothing_alive():
    """Empty slices held on to every later pass: 320 kB for one token after 400 passes of 50."""
    notes = _Notes(2, 1)
    takers = [notes.taker(l) for l in range(2)]
    for _ in range(200):
        for take in takers:
            take(mx.zeros((1, 50, 8), dtype=mx.uint32))
    experts, prefill, steps = notes.finish()
    assert experts.shape == (1, 2, 8)
    assert len(prefill) == len(steps) == 1
    assert notes.dropped == 200 * 50 - 1
    assert [len(rows) for rows in notes.experts] == [1]
    assert len(notes.prefill) == 1


def test_an_exception_in_the_block_restores_the_model():
    model = random_model()
    with pytest.raises(KeyError), record_routing(model):
        raise KeyError
    assert all(type(layer.experts).__name__ == "SwitchGLU" for layer in moe_layers(model))


def test_save_load_and_cut(tmp_path):
    rng = np.random.default_rng(0)
    trace = RoutingTrace(rng.integers(0, 9, (20, 2, 3)), 9, rng.random(20) < 0.5, "m", {"text": "häh"})
    trace.save(tmp_path / "t.npz")
    loaded = RoutingTrace.load(tmp_path / "t.npz")
    assert np.array_equal(loaded.experts, trace.experts)
    assert np.array_equal(loaded.prefill, trace.prefill)
    assert np.array_equal(loaded.steps, trace.steps)
    assert (loaded.num_experts, loaded.model, loaded.metadata) == (9, "m", {"text": "häh"})
    assert np.array_equal(np.concatenate([trace[:7].experts, trace[7:].experts]), trace.experts)
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]


@pytest.mark.parametrize("width", [np.uint16, np.uint8])
def test_experts_are_read_from_two_bytes_as_from_one(width, tmp_path):
    """Early files took two for each; a byte in memory would wrap around in the first sum."""
    experts = np.arange(240, 256).reshape(4, 2, 2)
    about = {"format": "routing-trace/1", "num_experts": 256, "model": "", "metadata": {}}
    np.savez_compressed(
        tmp_path / "t.npz", experts=experts.astype(width), prefill=np.ones(4, bool), about=json.dumps(about)
    )
    trace = RoutingTrace.load(tmp_path / "t.npz")
    assert trace.experts.dtype == np.uint16 and (trace.experts == experts).all()


def test_steps_that_are_not_said():
    """Of a prompt one pass, of all others one each; as told where they are told, and cut with the tokens."""
    marks = np.array([True, True, False, False, True, True])
    assert RoutingTrace(np.zeros((6, 1, 2)), 4, marks).steps.tolist() == [1, 1, 2, 3, 4, 4]
    told = RoutingTrace(np.zeros((6, 1, 2)), 4, marks, steps=[0, 1, 1, 1, 2, 2])
    assert told[2:5].steps.tolist() == [1, 1, 2]
    for wrong in ([0, 1], [0, 1, 0, 1, 2, 2]):
        with pytest.raises(ValueError, match="forward passes"):
            RoutingTrace(np.zeros((6, 1, 2)), 4, marks, steps=wrong)


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ValueError, match="bad.npz"):
        RoutingTrace.load(tmp_path / "bad.npz")
    with pytest.raises(ValueError, match="none.npz"):
        RoutingTrace.load(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="other.npz"):
        RoutingTrace.load(tmp_path / "other.npz")


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({"metadata": [1]}, r"its metadata is \[1\], not as in 'routing-trace/1'"),
        ({"metadata": None}, "its metadata is None"),
        ({"num_experts": 128.0}, "its num_experts is 128.0"),
        ({"num_experts": True}, "its num_experts is True"),
        ({"num_experts": "128"}, "its num_experts is '128'"),
        ({"model": 5}, "its model is 5"),
        ({"format": "routing-trace/9"}, "its format is 'routing-trace/9', not as in 'routing-trace/1'"),
        (None, "it is no routing trace"),
        ([1], "it is no routing trace"),
    ],
)
def test_what_a_file_says_of_itself_is_checked(lie, message, tmp_path):
    about = {"format": "routing-trace/1", "num_experts": 128, "model": "", "metadata": {}}
    about = {**about, **lie} if isinstance(lie, dict) else lie
    np.savez(tmp_path / "own.npz", experts=np.zeros((3, 1, 2), int), prefill=np.zeros(3, bool), about=json.dumps(about))
    with pytest.raises(ValueError, match=message) as error:
        RoutingTrace.load(tmp_path / "own.npz")
    assert "own.npz" in str(error.value)


def test_impossible_traces_are_refused():
    with pytest.raises(ValueError, match="expert 9 does not exist"):
        RoutingTrace(np.array([[[3, 9]]]), 9)
    with pytest.raises(ValueError, match="expert -1 does not exist: the trace is of 9 experts"):
        RoutingTrace(np.array([[[3, -1]]]), 9)
    with pytest.raises(ValueError, match="tokens, layers, chosen"):
        RoutingTrace(np.zeros((4, 4)), 9)


def test_sharding_while_recording_stays():
    model = random_model()
    tokens = mx.array([[5, 6, 7]])
    expected = model(tokens)
    layers = moe_layers(model)
    placement = place_experts(np.zeros((len(layers), layers[0].experts.gate_proj.weight.shape[0])), 3, "contiguous")
    with record_routing(model) as outer, record_routing(model) as inner:
        shard_model(model, placement)
        assert mx.array_equal(model(tokens), expected)
    assert len(outer) == len(inner) == 3
    assert [len(layer.experts.stores) for layer in moe_layers(model)] == [3] * len(layers)


@pytest.mark.parametrize(
    ("experts", "count", "word"),
    [
        (np.full((1, 1, 1), 1.5), 4, "not whole"),
        (np.full((1, 1, 1), np.nan), 4, "not whole"),
        (np.full((1, 1, 1), 69999), 70000, "65536"),
    ],
)
def test_a_trace_refuses_what_its_integers_cannot_hold(experts, count, word):
    with pytest.raises(ValueError, match=word):
        RoutingTrace(experts, count)
