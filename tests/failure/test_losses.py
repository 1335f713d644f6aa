"""Devices that vanish from a running model: exact where it says so, and by hand where it does not."""

from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from blocks import DEEPSEEK, KINDS, small_model, softmax
from conftest import SHIPPED, random_model
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.generate import generate_step

from expert_parallel import load_sharded, place_experts, record_routing, shard_model
from expert_parallel.checkpoint.opened import Checkpoint
from expert_parallel.failure.losses import Losses, lose_devices, weights_of
from expert_parallel.failure.planned import ON_FAILURE, check_losses, parse_losses
from expert_parallel.failure.survival import protected
from expert_parallel.layers import moe_layers
from expert_parallel.models.memory import live_expert_bytes
from expert_parallel.stores import rows_of

L, E, D = 3, 16, 4  # of random_model
PROMPT = mx.array([5, 6, 7, 40, 90])
CHANGING = ON_FAILURE[2:]


def answer(model, losses=None, tokens=6):
    """(tokens, logits of each) as mlx-lm's loop gives them, greedily."""
    found, logits = [], []

    def sampler(logprobs):
        logits.append(logprobs)
        token = mx.argmax(logprobs, axis=-1)
        return losses.between_passes(token) if losses else token

    for token, _ in generate_step(PROMPT, model, max_tokens=tokens, sampler=sampler):
        found.append(int(token))
    return found, np.array(mx.concatenate(logits[:tokens]))


@pytest.fixture(scope="module")
def stock():
    return answer(random_model())


def sharded(placement=None, **changes):
    return shard_model(random_model(**changes), placement or place_experts(np.ones((L, E)), D))


def whole_rows(layer):
    """The experts of the model as it was, as a source; it stands for a checkpoint."""
    return rows_of(moe_layers(random_model())[layer].experts)


# --- the same answer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", range(D))
@pytest.mark.parametrize("at", [0, 1, 3, 5])
def test_with_a_copy_of_each_any_loss_at_any_token_changes_no_bit(device, at, stock):
    model = sharded(protected(place_experts(np.ones((L, E)), D)))
    losses = Losses(model, {at: [device]}, "failover")
    tokens, logits = answer(model, losses)
    assert tokens == stock[0] and np.array_equal(logits, stock[1])
    assert live_expert_bytes(model)[device] == 0 and [e["after_tokens"] for e in losses.events] == [at]
    assert all(device not in layer.experts.devices for layer in moe_layers(model))


@pytest.mark.parametrize("planned", [{0: [0]}, {2: [3, 1]}, {0: [1], 1: [0], 4: [3]}])
def test_what_nobody_holds_is_read_again_and_changes_no_bit(planned, stock):
    model, read = sharded(), []

    def rows(layer):
        return lambda ids: read.append((layer, ids.tolist())) or whole_rows(layer)(ids)

    losses = Losses(model, planned, "recover", rows, prompt_tokens=5)
    tokens, logits = answer(model, losses)
    assert tokens == stock[0] and np.array_equal(logits, stock[1])
    lost = [device for devices in planned.values() for device in devices]
    held = np.stack([layer.experts.held for layer in moe_layers(model)])
    assert held.any(axis=1).all() and not held[:, lost].any()
    assert np.ptp(held.sum(axis=2)[:, [d for d in range(D) if d not in lost]]) <= 1
    # Read were these experts, and what a survivor held was not.
    arrivals = [event["arrivals"] for event in losses.events]
    asked = sorted((l, e) for l, ids in read for e in ids)
    assert asked == sorted((int(l), int(e)) for each in arrivals for l, _, e in np.argwhere(each))
    assert all(event["pause_seconds"] > 0 for event in losses.events)
    # When tokens of the prompt and of the answer had gone through the model.
    assert [tokens for tokens, _ in losses.changes] == [0, *(5 + at - 1 if at else 0 for at in planned)]
    assert np.array_equal(losses.changes[-1][1], held)


def test_of_a_checkpoint_the_files_are_read_again():
    x = mx.array([[5, 6, 700, 3000, 9]])
    expected = np.array(load_sharded(SHIPPED, num_devices=1)[0](x))
    model, checkpoint = load_sharded(SHIPPED, num_devices=8)[0], Checkpoint(SHIPPED)
    for device in (3, 0, 7):
        losses = lose_devices(model, [device], "recover", partial(checkpoint.rows, dtype=mx.float32))
        assert np.array_equal(np.array(model(x)), expected)
    held = np.stack([layer.experts.held for layer in moe_layers(model)])
    assert losses.events[0]["gone"].any() and held.any(axis=1).all() and not held[:, [3, 0, 7]].any()


@pytest.mark.parametrize("how", ["reroute", "drop"])
def test_one_device_has_to_stay(how, stock):
    model = sharded(protected(place_experts(np.ones((L, E)), D)))
    with pytest.raises(ValueError, match="all 4 devices are lost: none is left to take their experts"):
        lose_devices(model, range(D), how)
    assert answer(model) == (stock[0], pytest.approx(stock[1], abs=0))  # refused before anything is lost


def test_devices_with_streams_of_their_own_go_with_them(stock):
    model = shard_model(random_model(), protected(place_experts(np.ones((L, E)), D)), streams="on")
    assert answer(model, Losses(model, {2: [1]}, "failover")) == (stock[0], pytest.approx(stock[1], abs=0))


def test_no_copy_takes_over_where_there_is_none():
    model = sharded()
    before = np.array(model(PROMPT[None]))
    with pytest.raises(ValueError, match=r"without \[1\] nobody holds 12 experts: no copy takes over"):
        lose_devices(model, [1], "failover")
    assert np.array_equal(np.array(model(PROMPT[None])), before)  # refused before anything is lost


# --- another answer, by hand ------------------------------------------------------------------------------------


def block_by_hand(model, kind, x, dead, how):
    """What layer 0's block answers, from its own gate and each expert by itself: [T, H]."""
    layer = moe_layers(model)[0]
    block, gate = layer.block, layer.block["router" if "router" in layer.block else "gate"]
    probabilities = softmax(np.array(gate(x), np.float64))[0]
    each = np.array(layer.experts(x, mx.array(np.tile(np.arange(8), (1, len(probabilities), 1)))))[0]
    shared = np.array(mx.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x))[0] if kind == "qwen2_moe" else 0
    order = probabilities.copy()
    if how == "reroute":
        order[:, dead] -= 10
    chosen = np.argsort(-order, axis=1, kind="stable")[:, :3]
    weights = np.take_along_axis(probabilities, chosen, axis=1)
    weights /= weights.sum(axis=1, keepdims=True) if KINDS[kind] else 1
    alive = ~np.isin(chosen, dead)
    if how == "renormalise":
        kept = (weights * alive).sum(axis=1, keepdims=True)
        weights = weights * weights.sum(axis=1, keepdims=True) / np.where(kept > 0, kept, 1)
    rows = np.take_along_axis(each, chosen[..., None], axis=1)
    return ((weights * alive)[..., None] * rows).sum(axis=1) + shared, chosen, alive


@pytest.mark.parametrize("lost", [[1], [0, 2, 3]])
@pytest.mark.parametrize("how", CHANGING)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_every_kind_without_some_experts(kind, how, lost):
    """Of 4 devices with 2 experts each: without three of them a token finds fewer experts than it chooses."""
    x = mx.random.normal((1, 40, 32), key=mx.random.key(1))
    dead = [expert for device in lost for expert in (2 * device, 2 * device + 1)]
    whole = small_model(kind, norm_topk_prob=KINDS[kind])
    expected, chosen, alive = block_by_hand(whole, kind, x, dead, how)
    model = shard_model(small_model(kind, norm_topk_prob=KINDS[kind]), place_experts(np.ones((2, 8)), 4))
    losses = lose_devices(model, lost, how)
    y = np.array(moe_layers(model)[0].block(x))[0]
    assert y == pytest.approx(expected, rel=2e-3, abs=2e-3)
    if how == "reroute":
        unforced = block_by_hand(whole, kind, x, [], how)[1]
        moved = sum(len(set(one) - set(other)) for one, other in zip(chosen.tolist(), unforced.tolist(), strict=True))
        assert losses.rerouted == moved > 0
    else:
        assert losses.rerouted == 0 and (~alive).any()
        assert len(lost) == 1 or (~alive).all(axis=1).any()  # some token lost every expert it chose


@pytest.mark.parametrize("how", ["drop", "renormalise"])
@pytest.mark.parametrize(("kind", "changes"), [("deepseek_v3", DEEPSEEK), ("minimax", {}), ("granitemoe", {})])
def test_blocks_that_choose_by_other_rules(kind, changes, how):
    """The block by itself, its experts answered by hand: the lost with zeros, the rest as they are or make up."""
    x = mx.random.normal((1, 40, 32), key=mx.random.key(1))
    layer = moe_layers(small_model(kind, **changes))[0]
    nothing, weights, chosen = map(np.array, weights_of(type(layer.owner), layer.owner, layer.name, x))
    each = np.array(layer.experts(x, mx.array(chosen)))[0]
    whole = np.array(layer.owner(x))[0]
    assert nothing[0] + np.einsum("tk,tkh->th", weights[0], each) == pytest.approx(whole, rel=2e-3, abs=2e-3)
    model = shard_model(small_model(kind, **changes), place_experts(np.ones((2, 8)), 4))
    lose_devices(model, [0, 2], how)
    alive = ~np.isin(chosen[0], [0, 1, 4, 5])
    scale = weights[0].sum(axis=1) / np.maximum((weights[0] * alive).sum(axis=1), 1e-9) if how == "renormalise" else 1
    kept = np.einsum("tk,tkh->th", weights[0] * alive, each) * np.reshape(scale, (-1, 1))
    assert np.array(moe_layers(model)[0].owner(x))[0] == pytest.approx(nothing[0] + kept, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("how", CHANGING)
def test_no_loss_changes_nothing_and_all_but_one_give_numbers(how, stock):
    """Before anything is lost the answer stays to the bit but where weights make up, which adds nothing to nothing."""
    model = sharded()
    tokens, logits = answer(model, losses := Losses(model, {5: [0]}, how))
    same = 5 if how != "renormalise" else 0
    assert tokens[:5] == stock[0][:5] and np.array_equal(logits[:same], stock[1][:same])
    assert logits[:5] == pytest.approx(stock[1][:5], abs=1e-3) and not np.array_equal(logits[5], stock[1][5])
    losses.lose([1, 2])
    assert np.isfinite(np.array(model(PROMPT[None]))).all()
    assert [event["gone"].sum() for event in losses.events] == [L * 4, L * 12]


@pytest.mark.parametrize("how", ["reroute", "drop"])
def test_recorded_are_the_experts_that_were_asked_in_the_end(how):
    model = sharded()
    with record_routing(model) as trace:
        losses = Losses(model, {2: [1]}, how)
        answer(model, losses)
    lost = np.isin(trace.experts, [4, 5, 6, 7])
    before = len(PROMPT) + 1
    assert lost[:before].any() and lost[before:].any() == (how == "drop")


def test_the_way_for_a_gpu_leaves_the_lost_out_too():
    """Masked, with static shapes: the same as what the host picks."""
    compact, masked = sharded(), sharded()
    for model in (compact, masked):
        lose_devices(model, [2], "drop")
    for layer in moe_layers(masked):
        layer.experts.masked_up_to = 1 << 20
    assert np.array(masked(PROMPT[None])) == pytest.approx(np.array(compact(PROMPT[None])), abs=1e-4)


def test_what_cannot_be_had_is_refused_before_anything_is_lost():
    model = shard_model(small_model("deepseek_v3", **DEEPSEEK), place_experts(np.ones((2, 8)), 4))
    with pytest.raises(ValueError, match="does not show how it chooses experts"):
        lose_devices(model, [1], "reroute")
    assert all(layer.experts.held.any(axis=1).all() for layer in moe_layers(model))
    with pytest.raises(ValueError, match=r"on_failure 'fly': needs failover, recover, reroute, drop, renormalise;"):
        lose_devices(sharded(), [1], "fly")
    with pytest.raises(ValueError, match="to recover, rows of a checkpoint's experts"):
        lose_devices(sharded(), [1], "recover")


def test_weights_make_up_only_where_a_block_weighs_and_sums():
    model = sharded()
    for layer in moe_layers(model):
        kind = type(layer.block)
        layer.block.__class__ = type(
            "Squared", (kind,), {"__call__": lambda self, x, kind=kind: kind.__call__(self, x) ** 2}
        )
    with pytest.raises(ValueError, match="Squared does more than weigh and sum: its weights cannot make up for a loss"):
        lose_devices(model, [1], "renormalise")


# --- what was asked for ------------------------------------------------------------------------------------------


@given(st.dictionaries(st.integers(0, 10**6), st.integers(0, 10**6), min_size=1))
def test_losses_as_they_are_written(at):
    texts = [f"{device}@{tokens}" if tokens else str(device) for device, tokens in at.items()]
    planned = parse_losses(texts)
    assert {device: tokens for tokens, devices in planned.items() for device in devices} == at
    assert list(planned) == sorted(planned)


@pytest.mark.parametrize("text", ["", "@3", "3@", "-1", "1.5", "x", "3@x", "3@-1", "3@1@2", "\u0663@\u00b2"])
def test_what_is_no_loss(text):
    with pytest.raises(ValueError, match=r"needs a device, or DEVICE@TOKENS such as 3@16"):
        parse_losses(["0@1", text])


def test_of_ranks_none_is_lost_by_an_option():
    asked = SimpleNamespace(fail_device=["1"], on_failure="recover")
    check_losses(asked, np.ones((1, 2, 4), bool), 8, 1)
    with pytest.raises(ValueError, match="--fail-device is for simulated devices: kill a rank"):
        check_losses(asked, np.ones((1, 2, 4), bool), 8, 2)


def test_a_device_is_lost_once():
    with pytest.raises(ValueError, match="--fail-device 2@8: device 2 is lost already"):
        parse_losses(["2", "1@4", "2@8"])
