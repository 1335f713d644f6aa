"""A prompt in two halves, one's collectives under the other's computation: the answers of the same ranks without it."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import SHIPPED, launch, random_model
from mlx_lm.models.cache import make_prompt_cache

from expert_parallel import place_experts, shard_model
from expert_parallel.layers import moe_layers
from expert_parallel.moving.live import Counting
from expert_parallel.ranks.overlap import _Overlap, overlap_collectives
from expert_parallel.trace import recorders

THREE = [pytest.param(backend, 3, marks=pytest.mark.slow) for backend in ("ring", "mpi")]
FROM, LENGTHS, SHARDED = 8, [1, 7, 8, 9, 31, 64], "sharded"  # as in rank_overlap.py


@pytest.mark.parametrize(("backend", "ranks"), [("ring", 2), ("mpi", 2), *THREE])
def test_ranks_answer_as_without_it(backend, ranks, tmp_path):
    """Two ranks to the bit, but for copies, which are dealt out for each half; three up to the order of a sum."""
    results = launch(backend, ranks, "tests/ranks/rank_overlap.py", tmp_path, tmp_path=tmp_path)
    assert all(status == 0 for status, _, _ in results), results
    of_rank = [json.loads((tmp_path / f"rank-{r}.json").read_text()) for r in range(ranks)]
    assert all(found == of_rank[0] for found in of_rank)
    assert (SHARDED in of_rank[0]) == (ranks == 2)
    for case, rows in of_rank[0].items():
        assert [row[0] for row in rows] == LENGTHS
        for length, logits, keys, steps in rows:
            exact = length < FROM or (ranks == 2 and case != "copies")
            assert (logits, keys) == (0, 0) if exact else logits < 1e-3 and keys < 1e-3, (case, length)
            assert steps == [0] * length + [1] * length + [2], (case, length)


@pytest.mark.parametrize("combine", ["reduce", "gather"])
def test_a_half_is_being_summed_while_the_other_is_computed(combine, monkeypatch):
    """Seen from one of two ranks, whose sums only note that they were begun."""

    class Pair:
        rank, size = lambda self: 0, lambda self: 2

    seen = []
    model = random_model()
    plain = mx.distributed.all_sum
    monkeypatch.setattr(mx.distributed, "all_sum", lambda x, group=None, stream=None: seen.append(stream) or x)
    monkeypatch.setattr(mx, "async_eval", lambda y: seen.append("begun"))
    shard_model(model, place_experts(np.ones((3, 16)), 2), Pair(), combine=combine)
    overlap_collectives(model, FROM)
    seen.clear()
    notes = [lambda ids, n=n: seen.append((n, ids.shape[1])) for n in range(3)]
    with recorders(moe_layers(model), notes):
        model(mx.array([list(range(9))]), cache=make_prompt_cache(model))
    sums = [each for each in seen if isinstance(each, mx.Stream)]
    assert len(sums) == 4 and len(set(map(str, sums))) == 1 and str(sums[0]) != str(mx.default_stream(mx.cpu))
    started = [(0, 4), sums[0], "begun", (0, 5), sums[0], "begun", (1, 4), sums[0], "begun", (1, 5), sums[0], "begun"]
    assert seen == [*started, (2, 9), None]
    assert mx.distributed.all_sum is not plain  # the stand-in of this test, as it was before the prompt
    seen.clear()
    model(mx.array([list(range(FROM - 1))]), cache=make_prompt_cache(model))
    model(mx.array([list(range(9))]))  # keeps nothing: a second half would not see the first
    model(mx.array([list(range(9))] * 2), cache=make_prompt_cache(model))
    assert seen == [None] * 9


def test_a_layer_is_read_in_halves_where_that_can_change_nothing():
    fits, x, cache = _Overlap().fits, mx.zeros((1, 8, 64)), make_prompt_cache(random_model())[0]
    assert fits(x, ("causal", cache)) and fits(x, (cache, None, "causal"))
    for arguments in ((None, cache), (cache,), ("causal", None), ("causal", cache, mx.zeros(8)), (mx.zeros(8), cache)):
        assert not fits(x, arguments)
    assert not fits(mx.zeros((2, 8, 64)), ("causal", cache)) and not fits(mx.zeros((8, 64)), ("causal", cache))
    assert not fits(mx.zeros((1, 1, 64)), ("causal", cache))


def test_slots_are_counted_whether_a_layer_had_them_in_halves_or_not():
    model, cache = random_model(), make_prompt_cache(random_model())
    overlap_collectives(model, FROM)
    with Counting(model) as counting:
        for tokens in (9, 1, 8):
            mx.eval(model(mx.array([list(range(tokens))]), cache=cache))
            loads, counted = counting.take()
            assert counted == tokens and loads.sum(axis=1).tolist() == [4 * tokens] * 3


def test_one_process_has_nothing_to_hide(run_here):
    result = run_here("qwen3_expert_parallel.py", "--model", SHIPPED, "--overlap", 64)
    assert (result.returncode, result.stdout) == (2, "")
    said = "error: --overlap 64: one process sends nothing; start several ranks, or leave it out\n"
    assert result.stderr.endswith(said) and result.stderr.count("\n") == 1
    result = run_here("qwen3_expert_parallel.py", "--overlap", 1)
    assert result.returncode == 2 and "--overlap must be at least 2, got 1" in result.stderr


def test_the_script_over_two_ranks(tmp_path):
    """Also in the order in which mlx-lm reads a prompt: all of it but its last token, whose logits alone count."""
    options = ("--prompt", "expert_parallel/__init__.py", "--max-tokens", 2, "--verify", "--trials", 0)
    script = ("qwen3_expert_parallel.py", "--model", SHIPPED, *options, "--overlap", 64, "--json", tmp_path / "o.json")
    results = launch("ring", 2, *script, tmp_path=tmp_path)
    assert all(status == 0 for status, _, _ in results), results
    figures = json.loads((tmp_path / "o.json").read_text())
    assert figures["parity"]["tokens_equal"] is True and figures["options"]["overlap"] == 64
