"""Every MoE architecture of the installed mlx-lm, tiny and random: spread, recorded, loaded and analysed."""

import json
import shutil
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import Rank
from conftest import ROOT, SHIPPED, launch
from mlx.utils import tree_flatten
from mlx_lm.models.olmoe import OlmoeSparseMoeBlock
from mlx_lm.utils import quantize_model
from tiny_architectures import LISTED, SPREAD, WAYS, answers, built, small

from expert_parallel import load_sharded, place_experts, record_routing, shard_model
from expert_parallel.layers import moe_layers, moe_shape, twin
from expert_parallel.models.architecture import describe
from expert_parallel.models.configurations import Configuration
from expert_parallel.ranks.overlap import overlap_collectives

SCRIPT = "tests/ranks/rank_architectures.py"
IN_HALVES = (
    "deepseek_v2",
    "glm4_moe",
    "gpt_oss",
    "minimax",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
)


@dataclass
class Stock:
    """What mlx-lm itself builds, and answers."""

    name: str
    config: dict
    model: nn.Module
    answers: list
    parameters: int
    folder: object

    @property
    def arrays(self):
        return dict(tree_flatten(self.model.parameters()))


def count(model) -> int:
    """Parameters; of a packed matrix those that it stands for."""
    packed = [module for module in model.modules() if "scales" in module]
    stored = sum(array.size for _, array in tree_flatten(model.parameters()))
    stored -= sum(array.size for module in packed for array in module.parameters().values())
    return stored + sum(module.weight.size * 32 // module.bits for module in packed)


@pytest.fixture(scope="module", params=[f"{name}-{kind}" for name in SPREAD for kind in ("float32", "4-bit")])
def stock(request, tmp_path_factory):
    name, _, kind = request.param.partition("-")
    config = small(name) | {"torch_dtype": "float32"}
    model = built(name)
    parameters = count(model)
    if kind == "4-bit":
        if "quantization" in config:
            pytest.skip("packed already")
        model, config = quantize_model(model, config, 32, 4)
    folder = tmp_path_factory.mktemp(name)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(SHIPPED / "tokenizer.json", folder)
    about = json.loads((SHIPPED / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"chat_template": ""}))  # muse_spark wants one
    yield Stock(name, config, model, answers(model), parameters, folder)
    shutil.rmtree(folder)


def assert_same(got, expected):
    assert all(mx.array_equal(a, b, equal_nan=True) for a, b in zip(got, expected, strict=True))


def test_spread_over_devices_it_answers_the_same_bits(stock):
    model = twin(stock.model)
    shard_model(model, place_experts(np.ones(moe_shape(model)), 3))
    for masked_up_to in (0, 10**6):
        for layer in moe_layers(model):
            layer.experts.masked_up_to = masked_up_to
        assert_same(answers(model), stock.answers)


def test_in_two_halves_it_reads_the_same_bits_or_is_refused(stock):
    model = twin(stock.model)
    try:
        overlap_collectives(model, 2)
    except ValueError as error:
        assert str(error).startswith("this architecture cannot read a prompt in two halves (")
        assert stock.name not in IN_HALVES
    with record_routing(model) as trace:
        assert_same(answers(model), stock.answers)
    assert trace.steps.tolist() == [0] * 7 + [1]


def test_the_recorder_sees_every_token(stock):
    with record_routing(stock.model) as trace:
        assert_same(answers(stock.model), stock.answers)
    chosen = 1 if stock.name == "llama4" else 2
    assert trace.experts.shape == (8, moe_shape(stock.model)[0], chosen)
    assert trace.prefill.tolist() == [True] * 7 + [False]


def test_loaded_from_its_files_it_answers_the_same_bits(stock):
    model, _ = load_sharded(stock.folder, 3)
    assert_same(answers(model), stock.answers)


def test_the_analysis_counts_what_is_loaded(stock):
    found = describe(Configuration(stock.name, stock.config, folder=stock.folder))
    assert found.whole.parameters == stock.parameters
    assert found.whole.bytes == sum(array.nbytes for array in stock.arrays.values())


# --- over ranks ------------------------------------------------------------------------------------------------------

WHY_NOT = {  # how the README says what the package says
    "adds something that every rank has whole": "adds more",
    "cannot be asked without": "not asked",
    "cannot shard the attention of this architecture": "no shard()",
    "cannot shard the attention over 2 ranks": "not its packs",
}


def ways(name) -> list[str]:
    """What `shard_model` says to gather, reduce and hybrid on one of two ranks; no collective is called."""
    model, said = built(name), []
    for how in WAYS.values():
        spread = twin(model)
        try:
            shard_model(spread, place_experts(np.ones(moe_shape(spread)), 2), group=Rank(0, 2), streams="off", **how)
            said.append("yes")
        except ValueError as error:
            said.append(next(short for words, short in WHY_NOT.items() if words in str(error)))
    return said


@pytest.fixture(scope="module")
def offered():
    return {name: ways(name) for name in SPREAD}


def test_on_two_ranks_every_way_that_is_offered_answers_as_stock(offered, tmp_path):
    """step3p5's shared expert was once summed once per rank; muse_spark's ranks waited for another's gather."""
    results = launch("ring", 2, SCRIPT, tmp_path / "results.json", tmp_path=tmp_path, timeout=240)
    assert all(status == 0 for status, _, _ in results), results
    for name, found in json.loads((tmp_path / "results.json").read_text()).items():
        assert [isinstance(difference, float) for difference in found.values()] == [w == "yes" for w in offered[name]]
        assert all(difference < 1e-5 for difference in found.values() if isinstance(difference, float)), (name, found)
        assert found["gather"] == 0, name  # all but one rank add zeros


class Capped(OlmoeSparseMoeBlock):
    """Adds nothing, and yet the sum of its answers is not its answer to the sum."""

    def __call__(self, x):
        return 10 * mx.tanh(super().__call__(x) / 10)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_what_does_more_than_weigh_and_sum_is_gathered(dtype):
    model, placement = built("olmoe"), place_experts([[1] * 8] * 3, 2)
    nn.quantize(model, 32, 4)  # mlx multiplies no other experts than float32 and packed ones on the CPU
    model.set_dtype(dtype)
    model.layers[1].mlp.__class__ = Capped
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.switch_mlp: .* it does more than weigh and sum; use"):
        shard_model(twin(model), placement, group=Rank(0, 2), combine="reduce")
    model = shard_model(twin(model), placement, group=Rank(0, 2))
    assert [layer.experts.group is None for layer in moe_layers(model)] == [True, False, True]
    assert [hasattr(layer.block, "sharding_group") for layer in moe_layers(model)] == [True, False, True]


def table(offered) -> str:
    """For the README."""
    rows = [["architecture", "in one process", *WAYS], ["---"] * 5]
    rows += [[name, "same bits", *said] for name, said in offered.items()]
    rows += [[name, "refused", "", "", ""] for name in LISTED]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def test_the_table_of_the_readme(offered):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table(offered) in readme, f"the README should have this table:\n{table(offered)}"


@pytest.mark.parametrize("name", LISTED)
def test_experts_in_a_list_are_refused_for_what_they_are(name):
    model = built(name)
    answers(model)
    for ask in (
        lambda: shard_model(model, place_experts([[1] * 8] * 2, 2)),
        lambda: describe(Configuration(name, small(name))),
    ):
        with pytest.raises(ValueError, match=r"experts in a list \(transformer.blocks.0.ffn.experts.0, ...\)"):
            ask()
