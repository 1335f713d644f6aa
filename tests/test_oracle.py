"""An independent oracle: the same weights through transformers and PyTorch."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import CONFIG, random_model
from mlx.utils import tree_flatten

from expert_parallel import place_experts, shard_model
from expert_parallel.layers import moe_layers

torch = pytest.importorskip("torch", reason="PyTorch is not installed: the independent oracle is skipped")
transformers = pytest.importorskip("transformers")


def oracle_logits(model, config, tokens):
    """Logits by transformers' Qwen3MoeForCausalLM from the weights of an mlx-lm model."""
    names = transformers.Qwen3MoeConfig(**{k: v for k, v in config.items() if k != "model_type"})
    oracle = transformers.Qwen3MoeForCausalLM(names).eval()
    state = {}
    for name, array in tree_flatten(model.parameters()):
        array = torch.from_numpy(np.array(array))
        if ".switch_mlp." in name:
            head, projection = name.removesuffix(".weight").split(".switch_mlp.")
            for e in range(len(array)):
                state[f"{head}.experts.{e}.{projection}.weight"] = array[e]
        else:
            state[name] = array
    wanted = oracle.state_dict()
    for name in wanted:  # newer transformers keep the experts stacked, gate above up
        head = name.rpartition(".experts.")[0]
        experts = range(config["num_experts"])
        if name.endswith("experts.gate_up_proj"):
            pairs = [[state.pop(f"{head}.experts.{e}.{p}.weight") for p in ("gate_proj", "up_proj")] for e in experts]
            state[name] = torch.stack([torch.cat(pair) for pair in pairs])
        elif name.endswith("experts.down_proj"):
            state[name] = torch.stack([state.pop(f"{head}.experts.{e}.down_proj.weight") for e in experts])
    if config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    oracle.load_state_dict(state, strict=True)
    with torch.no_grad():
        return oracle(input_ids=torch.tensor(tokens)).logits.numpy()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts": 10, "num_experts_per_tok": 3},
        {"num_experts": 60, "num_experts_per_tok": 4},
        {"norm_topk_prob": False},
        {"decoder_sparse_step": 2},
        {"mlp_only_layers": [1]},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_sharded_logits_agree_with_transformers(changes):
    config = {**CONFIG, **changes}
    model = random_model(seed=3, **changes)
    tokens = np.random.default_rng(0).integers(0, config["vocab_size"], (2, 13)).tolist()
    expected = oracle_logits(model, config, tokens)
    shape = (len(moe_layers(model)), config["num_experts"])
    shard_model(model, place_experts(np.zeros(shape), 3))
    logits = np.array(model(mx.array(tokens)))
    assert np.abs(logits - expected).max() < 1e-3
    assert np.abs(expected).max() > 1  # logits that say something
