"""One rank that reads prompts whole and in halves: python rank_overlap.py FOLDER

Each rank writes rank-R.json: {case: [[tokens, largest difference of a logit, of keys, whether read in halves], ...]}.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from conftest import random_model  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

from expert_parallel import place_experts, record_routing, shard_model  # noqa: E402
from expert_parallel.ranks.overlap import overlap_collectives  # noqa: E402

FROM, LENGTHS = 8, (1, 7, 8, 9, 31, 64)  # tokens
CASES = {
    "reduce": {},
    "gather": {"combine": "gather"},
    "unquantised": {},
    "copies": {},
    "sharded": {"attention": "sharded"},
}


def furthest(ours, theirs):
    return max(mx.abs(a - b).max().item() for a, b in zip(ours, theirs, strict=True))


def read(model, tokens):
    """(logits of a prompt and of a token after it, keys of every layer, trace)."""
    cache = make_prompt_cache(model)
    with record_routing(model) as trace:
        model(mx.array([tokens]), cache=cache)  # a part of the prompt that only fills the cache
        mx.eval([entry.state for entry in cache])
        logits = [model(mx.array([ids]), cache=cache) for ids in (tokens, tokens[:1])]
        mx.eval(logits)
    return logits, [entry.state[0] for entry in cache], trace


def main(folder: Path):
    group, found = mx.distributed.init(), {}
    for case, how in CASES.items():
        if how.get("attention") and group.size() != 2:
            continue
        strategy = {"strategy": "replicated", "redundant": 5} if case == "copies" else {}
        placement = place_experts(np.ones((3, 16)), group.size(), **strategy)
        whole, halved = (random_model(quantize=case != "unquantised") for _ in range(2))
        for model in (whole, halved):
            shard_model(model, placement, group, **how)
        overlap_collectives(halved, FROM)
        found[case] = []
        for length in LENGTHS:
            tokens = np.random.default_rng(length).integers(0, 97, length).tolist()
            (logits, keys, trace), (expected, expected_keys, expected_trace) = read(halved, tokens), read(whole, tokens)
            assert case == "copies" or group.size() > 2 or (trace.experts == expected_trace.experts).all()
            assert len(trace) == 2 * length + 1 == len(expected_trace)
            row = length, furthest(logits, expected), furthest(keys, expected_keys), trace.steps.tolist()
            found[case].append(row)
    (folder / f"rank-{group.rank()}.json").write_text(json.dumps(found))


main(Path(sys.argv[1]))
