"""Router control: capacity by hand, bias by hand, and mlx-lm's blocks untouched when it is off."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_parallel import balancedness, place_experts, shard_model
from expert_parallel.router.bias import fit_bias
from expert_parallel.router.capacity import adaptive_capacity, limit_slots
from expert_parallel.router.control import Capacity, control_router

# --- capacity -----------------------------------------------------------------------------------

GATES = np.array([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.4, 0.35, 0.25]])


def test_drop_by_score_and_by_position():
    """Three tokens want expert 0, which has two places."""
    experts = [[0], [0], [0]]
    assert limit_slots(experts, GATES, 2)[1].ravel().tolist() == [True, True, False]  # 0.4 is the lowest gate
    assert limit_slots(experts, GATES, 1)[1].ravel().tolist() == [False, True, False]
    assert limit_slots(experts, GATES, 1, drop="position")[1].ravel().tolist() == [True, False, False]
    assert not limit_slots(experts, GATES, 0)[1].any()


def test_reroute_to_the_next_best_with_room():
    experts, kept = limit_slots([[0], [0], [0]], GATES, 1, reroute=True)
    # Token 1 keeps expert 0; token 2 wants expert 1 more (0.35) than token 0 (0.3), which goes to 2.
    assert experts.ravel().tolist() == [2, 0, 1] and kept.all()
    experts, kept = limit_slots([[0, 1], [0, 1], [0, 1]], GATES, 2, reroute=True)
    assert kept.sum() == 6 and (np.bincount(experts.ravel()) == 2).all()


@st.composite
def batches(draw):
    num_tokens, num_experts = draw(st.integers(1, 30)), draw(st.integers(2, 12))
    k = draw(st.integers(1, num_experts))
    random = np.random.default_rng(draw(st.integers(0, 9999)))
    gates = random.dirichlet(np.full(num_experts, 0.3), num_tokens)
    return np.argsort(-gates, axis=1)[:, :k], gates, draw(st.integers(0, num_tokens))


@given(batches(), st.sampled_from(["score", "position"]))
@settings(max_examples=150, deadline=None)
def test_limits_hold_and_no_place_is_wasted(batch, drop):
    experts, gates, capacity = batch
    num_experts = gates.shape[1]
    wanted = np.bincount(experts.ravel(), minlength=num_experts)
    same, kept = limit_slots(experts, gates, capacity, drop)
    assert np.array_equal(same, experts)
    assert np.bincount(experts[kept], minlength=num_experts).tolist() == np.minimum(wanted, capacity).tolist()
    new, still = limit_slots(experts, gates, capacity, drop, reroute=True)
    counts = np.bincount(new[still], minlength=num_experts)
    assert (counts <= capacity).all()
    assert (still >= kept).all() and np.array_equal(new[kept], experts[kept])
    for row, ok in zip(new, still, strict=True):
        assert len(set(row[ok])) == ok.sum()  # no expert twice for a token
        if not ok.all():  # dropped in the end: every expert with room is one the token has or had asked for
            tried = set(row.tolist()) | set(experts[(new == row).all(axis=1).argmax()].tolist())
            assert all(counts[e] >= capacity or e in tried for e in range(num_experts))


def test_adaptive_capacity_by_hand():
    assert adaptive_capacity([10, 4, 2, 0]) == 10
    # 16 slots, an eighth may go: 2 of the 10.
    assert adaptive_capacity([10, 4, 2, 0], tolerance=0.125) == 8
    assert adaptive_capacity([10, 4, 2, 0], tolerance=0.5) == 3  # drops 7 and 1
    assert adaptive_capacity([0, 0]) == 0


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


# --- in the model -----------------------------------------------------------------------------------

PROMPT = mx.array([list(range(40)), list(range(50, 90))])


def test_off_changes_nothing():
    model = random_model(quantize=True)
    before = model(PROMPT)
    with control_router(model) as control:
        assert mx.array_equal(model(PROMPT), before)
    assert control.loads.sum() == 3 * 80 * 4
    with control_router(model, bias=np.zeros((3, 16))), control_router_is_active(model):
        assert mx.array_equal(model(PROMPT), before)
    with control_router(model, capacity=Capacity(factor=None)) as control:  # adaptive without loss
        assert mx.array_equal(model(PROMPT), before)
    assert control.shares() == {"dropped": 0, "rerouted": 0, "changed": 0}
    assert type(model.model.layers[0].mlp).__name__ == "Qwen3MoeSparseMoeBlock"
    assert mx.array_equal(model(PROMPT), before)


def control_router_is_active(model):
    from contextlib import nullcontext

    assert type(model.model.layers[0].mlp).__name__ == "SteeredBlock"
    return nullcontext()


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
    with control_router(model, capacity=Capacity(factor=0.5)) as control:
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
        ({"bias": np.zeros((3, 8))}, r"\[3, 8\] \[layers, experts\], the model \[3, 16\]"),
        ({"placement": place_experts(np.ones((2, 16)), 2)}, r"\[2, 16\], the model is \[3, 16\]"),
        ({"update_rate": -1}, "update rate -1"),
        ({"update_every": 0}, "every 0 tokens"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message), control_router(random_model(), **options):
        pass


def test_capacity_mistakes():
    for options, message in [
        ({"factor": 0}, "positive"),
        ({"rule": "mine"}, "megatron, deepspeed or tutel"),
        ({"drop": "random"}, "score or position"),
        ({"tolerance": 1.5}, "tolerance"),
    ]:
        with pytest.raises(ValueError, match=message):
            Capacity(**options)


def test_models_whose_routers_are_others():
    from mlx_lm.models.olmoe import Model, ModelArgs

    olmoe = Model(
        ModelArgs(
            model_type="olmoe",
            hidden_size=32,
            num_hidden_layers=1,
            intermediate_size=32,
            num_attention_heads=2,
            rms_norm_eps=1e-6,
            vocab_size=32,
            num_experts=4,
            num_experts_per_tok=2,
        )
    )
    with pytest.raises(ValueError, match="OlmoeSparseMoeBlock is no qwen3_moe block"), control_router(olmoe):
        pass


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
