"""Router control: bias by hand, mlx-lm's blocks of several kinds, untouched when it is off."""

import mlx.core as mx
import numpy as np
import pytest
from blocks import DEEPSEEK, KINDS, small_model, softmax
from conftest import random_model
from mlx_lm.models.qwen3_moe import Qwen3MoeSparseMoeBlock

from expert_parallel import Placement, balancedness, place_experts
from expert_parallel.experts import shard_model
from expert_parallel.layers import moe_layers
from expert_parallel.router.bias import fit_bias
from expert_parallel.router.capacity import Capacity, limit_slots
from expert_parallel.router.choice import by_logits
from expert_parallel.router.control import control_router
from expert_parallel.trace import record_routing

# --- bias -----------------------------------------------------------------------------------------


def test_fitted_bias_by_hand():
    # Loads + 1 are 4, 2, 1, 1: mean 2, ratios 2, 1, 1/2, 1/2.
    assert fit_bias([[3, 1, 0, 0]])[0] == pytest.approx(-np.log([2, 1, 0.5, 0.5]))
    assert fit_bias([[3, 1, 0, 0]], strength=0.5)[0] == pytest.approx(-0.5 * np.log([2, 1, 0.5, 0.5]))
    assert fit_bias([[3, 1, 0, 0]], limit=0.1)[0].tolist() == [-0.1, 0, 0.1, 0.1]
    # Devices 0-1 and 2-3: loads + 1 are 6 and 2, mean 4.
    placement = place_experts(np.ones((1, 4)), 2)
    bias = fit_bias([[4, 1, 1, 0]], placement=placement)[0]
    assert bias == pytest.approx(-np.log([1.5, 1.5, 0.5, 0.5]))
    # Expert 1 on both devices: its 2 are 1 for each, loads + 1 are 6 and 2 again; its bias is the mean of theirs.
    copied = Placement(np.array([[[1, 1, 0, 0], [0, 1, 1, 1]]], dtype=bool))
    bias = fit_bias([[4, 2, 0, 0]], placement=copied)[0]
    assert bias == pytest.approx(-np.log([1.5, np.sqrt(1.5 * 0.5), 0.5, 0.5]))
    # Each layer by its own mean.
    assert fit_bias([[3, 1, 0, 0], [7, 7, 7, 7]])[1].tolist() == [0, 0, 0, 0]


# --- in the model -----------------------------------------------------------------------------------

PROMPT = mx.array([list(range(40)), list(range(50, 90))])


def test_off_changes_nothing():
    model = random_model(quantize=True)
    before = model(PROMPT)
    with control_router(model) as control:
        assert mx.array_equal(model(PROMPT), before)
    assert control.loads.sum() == 3 * 80 * 4
    with control_router(model, bias=np.zeros((3, 16))):
        assert mx.array_equal(model(PROMPT), before)
    with control_router(model, capacity=Capacity(factor=None)) as control:  # adaptive without loss
        assert mx.array_equal(model(PROMPT), before)
    assert control.shares() == {"dropped": 0, "rerouted": 0, "changed": 0}
    assert type(model.model.layers[0].mlp).__name__ == "Qwen3MoeSparseMoeBlock"
    assert mx.array_equal(model(PROMPT), before)


def test_random_numbers_that_come_after_are_the_same():
    """The trial of a block draws from keys of its own: an answer that is sampled stays what it was."""
    model = random_model()
    mx.random.seed(7)
    expected = mx.random.uniform(shape=(4,))
    mx.random.seed(7)
    with control_router(model, update_rate=0.1):
        assert mx.array_equal(mx.random.uniform(shape=(4,)), expected)


def test_bias_steers_the_choice_and_leaves_the_weights():
    """An expert that the bias forces into every choice, in the block computed by hand."""
    model = random_model()
    block = model.model.layers[0].mlp
    bias = np.zeros((3, 16))
    bias[:, 5] = 50
    x = mx.random.normal((1, 6, 64))
    gates = np.array(mx.softmax(block.gate(x), axis=-1))[0]
    with control_router(model, bias=bias) as control:
        y = np.array(block(x))[0]
    assert control.loads[0, 5] == 6
    others = np.where(np.arange(16) == 5, -1, gates)
    for t in range(6):
        chosen = [5, *np.argsort(-others[t])[:3]]
        weights = gates[t, chosen] / gates[t, chosen].sum()
        outputs = block.switch_mlp(x[:, t], mx.array(np.array([chosen])))[0]
        assert y[t] == pytest.approx(weights @ np.array(outputs), rel=1e-4, abs=1e-4)
    unforced = np.sort(np.argsort(-gates, axis=1)[:, :4], axis=1)
    assert control.shares()["changed"] * 6 * 4 == sum(5 not in row for row in unforced)


def test_capacity_in_the_block():
    model = random_model()
    before = model(PROMPT)
    with control_router(model, capacity=Capacity(factor=1.0)) as control:
        dropped = model(PROMPT)
    assert control.loads.max() <= 20  # 80 tokens x 4 / 16
    shares = control.shares()
    assert 0 < shares["dropped"] < 1 and shares["rerouted"] == 0
    assert control.loads.sum() == round((1 - shares["dropped"]) * 3 * 80 * 4)
    assert not mx.array_equal(dropped, before)
    with control_router(model, capacity=Capacity(factor=1.0, reroute=True)) as control:
        model(PROMPT)
    shares = control.shares()
    assert control.loads.max() <= 20 and shares["rerouted"] > 0.05 and shares["dropped"] < 0.05
    for rule in ("megatron", "tutel"):  # which would leave an expert no place at all
        with control_router(model, capacity=Capacity(factor=0.5, rule=rule)) as control:
            model(PROMPT[:1, :1])  # one token never meets a limit
        assert control.shares()["dropped"] == 0


def test_sign_rule_by_hand_and_until_balance():
    model = random_model()
    with control_router(model) as control:
        model(PROMPT)
    loads = control.loads
    with control_router(model, update_rate=0.25, update_every=80) as control:
        model(PROMPT)
    assert np.array_equal(control.bias[0], 0.25 * np.sign(loads[0].mean() - loads[0]))
    placement = place_experts(loads, 4)
    for options, least in [({}, 0.93), ({"placement": placement}, 0.93)]:
        with control_router(model, update_rate=0.1, update_every=80, **options) as control:
            for _ in range(30):
                mx.eval(model(PROMPT))
        with control_router(model, bias=control.bias) as judged:
            model(PROMPT)
        assert balancedness(placement.device_loads(loads)) < 0.86
        assert balancedness(placement.device_loads(judged.loads)) > least


def test_updates_come_after_so_many_tokens():
    """80 tokens a pass: after 100 means after the second and the fourth. Each adds or takes the rate once."""
    model, seen = random_model(), []
    with control_router(model, update_rate=0.25, update_every=100) as control:
        for _ in range(5):
            mx.eval(model(PROMPT))
            seen.append(np.abs(control.bias).max())
    assert seen == [0, 0.25, 0.25, 0.5, 0.5]
    with control_router(model, bias=np.full((3, 16), 2.0), update_rate=0.25, update_every=81) as control:
        mx.eval(model(PROMPT))
    assert (control.bias == 2).all()
    with control_router(model, update_rate=0.25) as control:  # after 64, where nothing is said
        mx.eval(model(PROMPT[:, :32]))
    assert np.abs(control.bias).max() == 0.25


def test_an_online_update_follows_the_devices():
    """Expert 7 is on two of three devices, half of its load on each; it moves by the mean of what they do."""
    model, held = random_model(), np.zeros((3, 3, 16), dtype=bool)
    held[:, 0, [0, 1, 2, 3, 7]] = held[:, 1, [4, 5, 6, 7]] = held[:, 2, 8:] = True
    with control_router(model, update_rate=0.25, update_every=80, placement=Placement(held)) as control:
        model(PROMPT)
    for loads, bias in zip(control.loads, control.bias, strict=True):
        devices = [loads[:4].sum() + loads[7] / 2, loads[4:7].sum() + loads[7] / 2, loads[8:].sum()]
        up = [0.25 * np.sign(80 * 4 / 3 - load) for load in devices]
        assert bias.tolist() == [up[0]] * 4 + [up[1]] * 3 + [(up[0] + up[1]) / 2] + [up[2]] * 8
    assert (control.bias[:, 8:] < 0).all()  # half of all experts on one device


def test_probabilities_that_vanish_are_no_logits():
    """A router that is sure of its choice gives others exactly nothing, and nothing below."""
    model = random_model()
    block = model.model.layers[0].mlp
    block.gate.weight = block.gate.weight * 1000
    assert not mx.softmax(block.gate(mx.random.normal((16, 64))), axis=-1).min().item()
    assert not by_logits(block, "switch_mlp")


def test_a_limit_counts_from_two_tokens_on():
    """The same token twice: each of its four experts has room for one of the two."""
    model = random_model()
    x = mx.broadcast_to(mx.random.normal((1, 1, 64)), (1, 2, 64))
    with control_router(model, capacity=Capacity(factor=1.0)) as control:
        y = model.model.layers[0].mlp(x)
    assert control.shares() == {"dropped": 0.5, "rerouted": 0, "changed": 0}
    assert control.loads[0].sum() == 4 and not np.array(y[0, 1]).any() and np.array(y[0, 0]).all()


def test_control_of_sharded_devices():
    bias = fit_bias(np.random.default_rng(3).integers(1, 99, (3, 16)))
    capacity = Capacity(factor=1.1, drop="position", reroute=True)
    with control_router(model := random_model(quantize=True), bias=bias, capacity=capacity):
        expected = model(PROMPT)
    sharded = shard_model(random_model(quantize=True), place_experts(np.ones((3, 16)), 5))
    with control_router(sharded, bias=bias, capacity=capacity):
        assert mx.array_equal(sharded(PROMPT), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": np.zeros((3, 8))}, r"the model is \(3, 16\) \[layers, experts\], bias \(3, 8\)"),
        ({"placement": place_experts(np.ones((2, 16)), 2)}, r"placement \(2, 16\)"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message), control_router(random_model(), **options):
        pass


# --- blocks of other architectures ------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_other_blocks_weigh_what_they_were_made_to_choose(kind, top_k):
    """mlx-lm's rule for the weights, by hand: probabilities as they are, or over the chosen ones alone."""
    model = small_model(kind, norm_topk_prob=KINDS[kind], num_experts_per_tok=top_k)
    layer = moe_layers(model)[0]
    block, gate = layer.block, layer.block["router" if "router" in layer.block else "gate"]
    bias = np.random.default_rng(top_k).normal(size=(2, 8))
    bias[:, 2] = -50
    if top_k > 1:
        bias[:, 5] = 50
    x = mx.random.normal((1, 6, 32))
    probabilities = softmax(np.array(gate(x))[0])
    ids = mx.array(np.tile(np.arange(8), (1, 6, 1)))
    each = np.array(layer.experts(x, ids))[0]  # [T, E, H]
    shared = np.array(mx.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x))[0] if kind == "qwen2_moe" else 0
    with control_router(model, bias=bias) as control:
        y = np.array(block(x))[0]
    assert control.loads[0, 2] == 0 and control.loads[0].sum() == 6 * top_k
    assert top_k == 1 or control.loads[0, 5] == 6
    steered = np.argsort(-(np.log(probabilities) + bias[0]))[:, :top_k]
    unforced = np.argsort(-probabilities)[:, :top_k]
    changed = sum(len(set(one) - set(other)) for one, other in zip(steered.tolist(), unforced.tolist(), strict=True))
    assert control.shares() == {"dropped": 0, "rerouted": 0, "changed": changed / steered.size} and changed
    for t, order in enumerate(steered):
        weights = probabilities[t, order] / (probabilities[t, order].sum() if KINDS[kind] else 1)
        expected = weights @ each[t, order] + (shared[t] if kind == "qwen2_moe" else 0)
        assert y[t] == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("reroute", "spread"), [(False, 0), (True, 0), (False, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_limits_go_by_probabilities_in_blocks_of_every_kind(kind, reroute, spread):
    """Kept are the slots of the highest probability; a dropped one's weight is lost, a re-routed one's is its own.

    A bias says who is asked first, and nothing else.
    """
    bias = spread * np.random.default_rng(0).normal(size=(2, 8))
    model = small_model(kind, norm_topk_prob=KINDS[kind])
    layer = moe_layers(model)[0]
    block, gate = layer.block, layer.block["router" if "router" in layer.block else "gate"]
    x = mx.random.normal((1, 24, 32))
    probabilities = softmax(np.array(gate(x), dtype=np.float64))[0]
    chosen = np.argsort(-(np.log(probabilities) + bias[0]), axis=1)[:, :3]
    experts, kept = limit_slots(chosen, probabilities, 9, reroute=reroute)  # 24 x 3 / 8
    each = np.array(layer.experts(x, mx.array(np.tile(np.arange(8), (1, 24, 1)))))[0]
    shared = np.array(mx.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x))[0] if kind == "qwen2_moe" else 0
    weights = np.take_along_axis(probabilities, experts, axis=1)
    weights = weights / (weights.sum(axis=1, keepdims=True) if KINDS[kind] else 1)
    rows = np.take_along_axis(each, experts[..., None], axis=1)
    with control_router(model, bias if spread else None, capacity=Capacity(factor=1.0, reroute=reroute)) as control:
        y = np.array(block(x))[0]
    assert y == pytest.approx(((weights * kept)[..., None] * rows).sum(axis=1) + shared, rel=1e-3, abs=1e-3)
    assert control.loads[0].tolist() == np.bincount(experts[kept], minlength=8).tolist()
    shares = {"dropped": (~kept).mean(), "rerouted": (kept & (experts != chosen)).mean()}
    assert max(shares.values()) > 0.05
    unforced = np.argsort(-probabilities, axis=1)[:, :3]
    shares["changed"] = (chosen[..., None] != unforced[:, None]).all(axis=2).mean()
    assert control.shares() == pytest.approx(shares) and bool(shares["changed"]) == bool(spread)


@pytest.mark.parametrize("kind", [*KINDS, "qwen3_next", "minimax", "granitemoe"])
def test_off_changes_nothing_in_other_blocks(kind):
    model = small_model(kind, num_hidden_layers=4 if kind == "qwen3_next" else 2)
    text = mx.array([list(range(30))])
    before = model(text)
    layers = moe_layers(model)
    with control_router(model) as control:
        assert mx.array_equal(model(text), before)
    with control_router(model, bias=control.bias, capacity=Capacity(None)) as again:
        assert mx.allclose(model(text), before, 1e-4, 1e-4)
    assert (control.loads == again.loads).all() and control.loads.sum() % (len(layers) * 30) == 0
    assert mx.array_equal(model(text), before)


def test_a_compiled_choice_is_refused_and_stays_what_it_was():
    """deepseek_v3 chooses in a function that mx.compile traces once: an answer of ours would stay in it."""
    model = small_model("deepseek_v3", **DEEPSEEK)
    for text in (mx.array([list(range(30))]), mx.array([list(range(16))])):
        with pytest.raises(ValueError, match="DeepseekV3MoE does not show"), control_router(model):
            pass
        before = model(text)
        for other in (mx.array([[1, 2]]), text):
            mx.eval(model(other))
        assert mx.array_equal(model(text), before)


class ChoosesElsewhere(Qwen3MoeSparseMoeBlock):
    """Asks for a choice and makes another one itself."""

    def __call__(self, x):
        gates = mx.softmax(self.gate(x), axis=-1)
        mx.argpartition(gates, kth=-self.top_k, axis=-1)
        ids = mx.argsort(-gates, axis=-1)[..., : self.top_k]
        return (self.switch_mlp(x, ids) * mx.take_along_axis(gates, ids, axis=-1)[..., None]).sum(axis=-2)


class WeighsByPlace(Qwen3MoeSparseMoeBlock):
    """Gives the first expert of a choice the most weight, whichever it is."""

    def __call__(self, x):
        ids = mx.argpartition(self.gate(x), kth=-self.top_k, axis=-1)[..., -self.top_k :]
        return (self.switch_mlp(x, ids) * mx.array([0.4, 0.3, 0.2, 0.1])[:, None]).sum(axis=-2)


@pytest.mark.parametrize("kind", [ChoosesElsewhere, WeighsByPlace])
def test_a_choice_that_would_not_be_followed_or_be_weighed_otherwise_is_refused(kind):
    model = random_model()
    model.model.layers[1].mlp.__class__ = kind
    with pytest.raises(ValueError, match=f"{kind.__name__} does not show how"), control_router(model):
        pass


def test_recorders_see_the_steered_choice_inside_and_outside():
    model = random_model()
    bias = np.zeros((3, 16))
    bias[:, 5] = 50
    with record_routing(model) as outside, control_router(model, bias=bias), record_routing(model) as inside:
        mx.eval(model(PROMPT))
    assert outside.loads()[:, 5].tolist() == inside.loads()[:, 5].tolist() == [80, 80, 80]
    assert type(model.model.layers[0].mlp.switch_mlp).__name__ == "SwitchGLU"


def test_device_bias_evens_the_shipped_model_and_keeps_its_perplexity(shipped):
    """Fitted on one part of a held-out file and judged on the next; benchmarks/quality_against_balance.py has more."""
    import mlx.nn as nn
    from mlx_lm import load

    model, tokenizer = load(str(shipped))
    model.set_dtype(mx.float32)
    ids = tokenizer.encode((shipped / "held-out" / "python.txt").read_text(), verbose=False)
    fit, test = (mx.array([ids[start : start + 385]]) for start in (0, 385))

    def read(text, **options):
        with control_router(model, **options) as control:
            loss = nn.losses.cross_entropy(model(text[:, :-1]), text[:, 1:], reduction="mean").item()
        return loss, control

    placement = place_experts(np.ones((4, 128)), 8)
    bias = fit_bias(read(fit)[1].loads, 1.0, placement)
    before, stock = read(test)
    after, steered = read(test, bias=bias)
    missing_before, missing_after = (1 - balancedness(placement.device_loads(c.loads)) for c in (stock, steered))
    assert missing_after < 0.9 * missing_before  # a fit on 384 tokens closes a tenth of what is missing at least
    assert after - before < 0.03  # 3% of perplexity
    dropped, limited = read(test, capacity=Capacity(1.0))
    assert dropped - before > 0.1 and limited.shares()["dropped"] > 0.2  # what a hard limit costs instead
