"""What a model is made of, from its configuration alone, against published and hand-made figures."""

import functools
import json

import mlx.core as mx
import numpy as np
import pytest
from blocks import DEEPSEEK, KINDS, small_model
from conftest import CONFIG, SHIPPED
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from expert_parallel.layers import moe_layers
from expert_parallel.models.architecture import (
    describe,
    describe_model,
    fewest_devices,
    fullest_device_bytes,
    hybrid_rest_bytes,
    layers_that_gather,
)
from expert_parallel.models.configurations import Configuration, bundled_names, hub_id, load_configuration
from expert_parallel.models.lazy import build_model, fill_randomly
from expert_parallel.models.parts import CacheEntry
from expert_parallel.trials import why_not_reduce

CODER = "qwen3-coder-30b"


@functools.cache
def at_4_bits(name):
    return describe(load_configuration(name), bits=4)


@pytest.fixture(scope="module")
def coder():
    return at_4_bits(CODER)


def test_qwen3_coder_to_the_byte(coder):
    assert coder.whole.parameters == 30_532_122_624
    assert coder.experts.parameters == 28_991_029_248
    assert coder.whole.parameters - coder.experts.parameters == 1_541_093_376
    assert coder.demand.expert_parameters.tolist() == [4_718_592] * 48
    assert coder.bytes.total == coder.whole.bytes == 17_180_913_664
    assert coder.bytes.experts == 16_307_453_952
    assert coder.bytes.expert_bytes.tolist() == [2_654_208] * 48
    assert coder.bytes.rest == 873_459_712
    assert (coder.num_experts, coder.chosen, coder.hidden, coder.num_moe_layers) == (128, 8, 2048, 48)
    assert coder.expert_shapes["gate_proj.weight"] == ("[128, 768, 256]", "uint32")
    assert coder.expert_shapes["down_proj.scales"] == ("[128, 2048, 12]", "bfloat16")
    per_device = [fullest_device_bytes(coder.bytes, n) / 1e9 for n in (2, 4, 8, 16)]
    assert [round(b, 2) for b in per_device] == [9.03, 4.95, 2.91, 1.89]
    assert [round(coder.bytes.total / 1e9 / b, 2) for b in per_device] == [1.90, 3.47, 5.90, 9.08]


def test_active_parameters_and_what_a_token_reads(coder):
    """8 of 128 experts and all else; the embedding table (151,936 x 2048 at 4.5 bits) gives one row only."""
    assert coder.active.parameters == 1_541_093_376 + 28_991_029_248 // 16
    assert coder.active.bytes == 873_459_712 + 16_307_453_952 // 16
    assert coder.active.bytes - coder.read_per_token.bytes == 151_936 * 2048 * 9 // 16
    assert coder.demand.rest_parameters == 1_541_093_376 - 151_936 * 2048
    assert coder.demand.head_parameters == 151_936 * 2048
    assert coder.demand.rest_bytes + 48 * 8 * 2_654_208 == coder.read_per_token.bytes
    assert coder.demand.attention == ((32 * 128, None),) * 48


def test_cache_by_hand(coder):
    """48 layers, keys and values, 4 heads of 128, bfloat16; mlx-lm's caches grow by 256 tokens."""
    assert coder.cache_per_token == 48 * 2 * 4 * 128 * 2
    assert coder.cache_bytes_at(257) == 512 * coder.cache_per_token
    assert CacheEntry(per_token=10, limit=300, fixed=7).bytes_at(10_000) == 3007


@pytest.mark.parametrize("name", bundled_names())
def test_parameter_totals_agree_with_the_published_ones(name):
    """To the rounding of what the makers say; what they count differently is in the file's note."""
    configuration = load_configuration(name)
    found = describe(configuration)
    published = configuration.published
    assert published["source"]
    tolerance = {"kimi-k2": 0.03, "llama-4-scout": 0.012}.get(name, 0.01)
    assert found.whole.parameters == pytest.approx(published["total"], rel=tolerance)
    assert found.whole.bytes == found.bytes.total
    table = found.outside["embeddings"].parameters
    counts = (found.active.parameters, found.active.parameters - table, found.active.parameters - 2 * table)
    assert min(abs(count / published["active"] - 1) for count in counts) < 0.09, counts


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("mixtral-8x7b", 46_702_792_704), ("olmoe-1b-7b", 6_919_161_856), ("qwen3-235b-a22b", 235_093_634_560)],
)
def test_exact_totals_of_the_hub(name, parameters):
    assert describe(load_configuration(name)).whole.parameters == parameters


@pytest.mark.parametrize(("name", "gibibytes"), [("gpt-oss-120b", 60.8), ("gpt-oss-20b", 12.8)])
def test_gpt_oss_checkpoints_have_the_size_of_its_model_card(name, gibibytes):
    """Experts in mxfp4, all else in bfloat16; model card, table 1."""
    configuration = load_configuration(name)
    found = describe(configuration)
    assert found.quantisation == "experts 4-bit mxfp4 in groups of 32, the rest bfloat16"
    assert round(found.bytes.total / 2**30, 1) == gibibytes


def test_layers_of_two_kinds():
    deepseek = at_4_bits("deepseek-v3")
    assert [layer.moe for layer in deepseek.layers] == [False] * 3 + [True] * 58
    assert deepseek.layers[0].parts["dense"].parameters == 3 * 7168 * 18432
    assert deepseek.layers[3].parts["shared experts"].parameters == 3 * 7168 * 2048
    assert deepseek.layers[3].parts["router"].parameters == 256 * 7168 + 256
    assert deepseek.cache_per_token == 61 * (512 + 64) * 2  # latents, not heads
    windows = describe(load_configuration("gpt-oss-20b")).layers
    assert windows[0].attention.startswith("window of 128")
    assert windows[1].attention.startswith("full")
    assert windows[0].cache[0].limit == 128
    scout = at_4_bits("llama-4-scout").layers
    assert scout[0].attention.startswith("chunks of 8192")
    assert [layer.cache[0].limit for layer in scout[:4]] == [8192, 8192, 8192, None]
    linear = at_4_bits("qwen3-next-80b")
    assert [layer.width for layer in linear.layers[:4]] == [0, 0, 0, 16 * 256]


def test_width_is_that_of_all_query_heads_side_by_side():
    """What scores are computed for; of projections in and out only the last one takes it in."""
    assert {layer.width for layer in at_4_bits(CODER).layers} == {32 * 128}
    assert {layer.width for layer in at_4_bits("deepseek-v3").layers} == {128 * 128}


@pytest.mark.parametrize(
    ("name", "layer", "words"),
    [
        (CODER, 0, "full, 32 heads (4 kv)"),
        ("deepseek-v3", 0, "full on latents, 128 heads"),
        ("gpt-oss-20b", 0, "window of 128, 64 heads (8 kv)"),
        ("qwen3-next-80b", 0, "linear or state space"),
        ("qwen3-next-80b", 3, "full, 16 heads (2 kv)"),
    ],
)
def test_attention_in_words(name, layer, words):
    assert at_4_bits(name).layers[layer].attention == words


def test_a_long_context_adds_to_layers_without_a_window_only():
    """gpt-oss-20b: 24 layers, keys and values, 8 heads of 64, bfloat16; every second layer keeps 128 tokens."""
    found, layer = describe(load_configuration("gpt-oss-20b")), 2 * 8 * 64 * 2
    assert found.demand.cache_bytes(100) == 24 * layer * 100
    assert found.demand.cache_bytes(131_072) == 12 * layer * (131_072 + 128) == found.cache_bytes_at(131_072)


@pytest.mark.parametrize(("bits", "per_weight"), [(3, 3.5), (4, 4.5), (6, 6.5), (8, 8.5)])
def test_bits_per_weight(bits, per_weight):
    """Groups of 64 with a scale and a bias of 16 bits: half a bit a weight more."""
    found = describe(load_configuration(CODER), bits=bits)
    assert found.bytes.expert_bytes[0] == 4_718_592 * per_weight / 8
    assert describe(load_configuration(CODER), bits=16).bytes.expert_bytes[0] == 4_718_592 * 2


@pytest.mark.parametrize("null", [False, True])
def test_modules_that_a_group_divides_are_packed(null):
    """96 wide experts: groups of 32 divide their last projection, the 64 that null means in affine mode do not."""
    quantization = {"group_size": None if null else 32, "bits": 4}
    config = {**CONFIG, "moe_intermediate_size": 96, "torch_dtype": "float16", "quantization": quantization}
    config["quantization_config"] = quantization
    experts = describe(Configuration("x", config)).expert_shapes
    assert experts["gate_proj.weight"] == ("[16, 96, 8]", "uint32")
    assert experts["down_proj.weight"] == (("[16, 64, 96]", "float16") if null else ("[16, 64, 12]", "uint32"))
    assert experts["gate_proj.scales"][0] == f"[16, 96, {1 if null else 2}]"


@pytest.mark.parametrize(("bits", "group_size", "mode"), [(4, 32, "affine"), (8, 64, "affine"), (4, 32, "mxfp4")])
def test_weights_that_mean_nothing_are_as_large_as_weights_are(bits, group_size, mode):
    """About nought, evenly over 1 / sqrt(inputs): no layer's answer vanishes or overflows in the timing."""
    model = fill_randomly(build_model(Configuration("x", CONFIG), bits, group_size, mode))
    experts = model.model.layers[0].mlp.switch_mlp
    how = {"group_size": group_size, "bits": bits, "mode": mode}
    for projection in (experts.gate_proj, experts.down_proj):
        values = mx.dequantize(projection.weight, projection.scales, projection.get("biases"), **how).astype(mx.float32)
        even = (12 * values.shape[-1]) ** -0.5  # spread evenly, its span 1 / sqrt(inputs)
        least, most = (0.95, 1.05) if mode == "affine" else (0.1, 1)
        assert abs(values.mean().item()) < 0.15 * even
        assert least < values.std().item() / even < most


def test_predicted_tensors_are_those_of_the_shipped_checkpoint():
    model = build_model(load_configuration(str(SHIPPED)))
    predicted = {name: (a.shape, a.dtype, a.nbytes) for name, a in tree_flatten(model.parameters())}
    shipped = mx.load(str(SHIPPED / "model.safetensors"))
    assert predicted == {name: (a.shape, a.dtype, a.nbytes) for name, a in shipped.items()}


def test_predicted_cache_is_what_mlx_lm_allocates():
    model, _ = load_model(SHIPPED)
    described = describe(load_configuration(str(SHIPPED)))
    for tokens in (3, 300):
        cache = make_prompt_cache(model)
        model(mx.zeros((1, tokens), dtype=mx.int32), cache=cache)
        assert described.cache_bytes_at(tokens) == sum(entry.nbytes for entry in cache)


def test_the_hybrid_shares_attention_and_head_but_not_embeddings_and_router(coder):
    """Attention of 9/16 byte a parameter and head are cut, the query and key norms and the rest are not."""
    attention = 48 * (2048 * 4096 * 2 + 2 * 2048 * 512) * 9 // 16
    head = 151_936 * 2048 * 9 // 16
    assert hybrid_rest_bytes(coder.model, 2) == 873_459_712 - (attention + head) // 2
    assert coder.bytes.rest == 873_459_712  # the model itself is as it was
    with pytest.raises(ValueError, match="4 heads .* 8 ranks"):
        hybrid_rest_bytes(coder.model, 8)


def test_fewest_devices(coder):
    assert fewest_devices(coder.bytes, 20e9) == fewest_devices(coder.bytes, coder.bytes.total) == 1
    assert fewest_devices(coder.bytes, coder.bytes.total - 1) == 2
    assert fewest_devices(coder.bytes, 9.1e9) == 2
    one_each = fullest_device_bytes(coder.bytes, 128)
    assert fewest_devices(coder.bytes, one_each) == 128 and fewest_devices(coder.bytes, one_each - 1) is None
    assert fewest_devices(coder.bytes, 9.0e9) == 3
    assert fewest_devices(coder.bytes, 9.1e9, besides=int(1e9)) == 3
    assert fewest_devices(coder.bytes, 0.9e9) is None
    assert fullest_device_bytes(coder.bytes, 8, redundant=8) == 17 * 48 * 2_654_208 + 873_459_712
    with pytest.raises(ValueError, match="128 experts .* 129 devices"):
        fullest_device_bytes(coder.bytes, 129)


# --- wrong input -------------------------------------------------------------------------------


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="qwen3-coder-30b"):
        load_configuration("no-such-model")
    with pytest.raises(OSError, match="no-one/nothing is no folder .*hub cannot be reached"):
        load_configuration("no-one/nothing")
    with pytest.raises(ValueError, match="has no config.json"):
        load_configuration(str(tmp_path))


def test_the_shipped_model_by_its_name_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = load_configuration(SHIPPED.name)
    assert (found.folder, found.has_weights, found.bundled) == (SHIPPED, True, False)
    (tmp_path / SHIPPED.name).mkdir()  # who has a folder of that name means it
    with pytest.raises(ValueError, match=f"{SHIPPED.name} has no config.json"):
        load_configuration(SHIPPED.name)


def test_bundled_names_lead_to_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("qwen3-coder-30b") == hub_id("Qwen3-Coder-30B") == "mlx-community/Qwen3-Coder-30B-A3B-Instruct-4bit"
    assert hub_id("mixtral-8x7b") == load_configuration("mixtral-8x7b").published["repository"]
    assert hub_id(SHIPPED.name) == hub_id(SHIPPED) == str(SHIPPED)
    assert hub_id("owner/mixtral-8x7b") == "owner/mixtral-8x7b" and hub_id("abacus") == "abacus"
    with pytest.raises(ValueError, match="mixtral-8x7 does not exist, did you mean mixtral-8x7b[?]"):
        hub_id("mixtral-8x7")
    with pytest.raises(ValueError, match="olmoe-1b-7 .*, did you mean olmoe-1b-7b[?]; bundled configurations: "):
        load_configuration("olmoe-1b-7")
    (tmp_path / "mixtral-8x7b").mkdir()  # a folder of one's own comes first
    assert hub_id("mixtral-8x7b") == "mixtral-8x7b"


def test_a_folder_is_called_by_its_own_name(monkeypatch):
    monkeypatch.chdir(SHIPPED)
    assert load_configuration(".").name == load_configuration(str(SHIPPED)).name == SHIPPED.name


def test_a_configuration_file_alone_is_enough(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for path in (tmp_path / "config.json", tmp_path):
        found = load_configuration(str(path))
        assert describe(found).num_experts == 16 and not found.has_weights
        assert found.file == tmp_path / "config.json"


@pytest.mark.parametrize("kind", [*KINDS, "granitemoe", "minimax", "qwen3_next", "deepseek_v3"])
def test_layers_that_gather_are_those_that_ranks_would_have_gather(kind):
    """A copy without weights says what the blocks themselves say with theirs, and leaves the model as it was."""
    more = DEEPSEEK if kind == "deepseek_v3" else {"num_hidden_layers": 4} if kind == "qwen3_next" else {}
    model = small_model(kind, **more)
    layers, text = moe_layers(model), mx.array([[1, 2, 3]])
    before = np.array(model(text))
    found = layers_that_gather(layers)
    assert found == sum(why_not_reduce(layer) is not None for layer in layers)
    assert found == describe_model(model).demand.gathers and np.array_equal(np.array(model(text)), before)
    assert (found == 0) == (kind in ("qwen3_moe", "mixtral", "olmoe", "gpt_oss", "minimax", "granitemoe"))
