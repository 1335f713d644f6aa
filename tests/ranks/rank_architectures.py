"""One rank that spreads every tiny architecture in every way: python rank_architectures.py RESULTS.json

Written by rank 0: {architecture: {way: largest difference of a logit from stock's, or why it cannot be}}.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "models")]

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from tiny_architectures import SPREAD, WAYS, answers, built  # noqa: E402

from expert_parallel import place_experts, shard_model  # noqa: E402
from expert_parallel.layers import moe_shape, twin  # noqa: E402


def difference(model, expected, group, options):
    try:
        shard_model(model, place_experts(np.ones(moe_shape(model)), group.size()), group=group, **options)
    except ValueError as error:
        return str(error)
    return max(mx.abs(a - b).max().item() for a, b in zip(answers(model), expected, strict=True))


def main(results: Path):
    group, found = mx.distributed.init(), {}
    for name in sys.argv[2:] or SPREAD:
        model = built(name)
        expected = answers(model)
        found[name] = {way: difference(twin(model), expected, group, how) for way, how in WAYS.items()}
    if group.rank() == 0:
        results.write_text(json.dumps(found))


main(Path(sys.argv[1]))
