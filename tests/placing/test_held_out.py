"""What a placement by load was fitted on, and what it is worth elsewhere: against loads counted here."""

import numpy as np
import pytest

from expert_parallel import Placement, RoutingTrace, place_experts
from expert_parallel.placing.held_out import fitted_on


def evenness(placement, experts):
    """Mean over layers of mean / max device load, one slot after the other."""
    each = []
    for l in range(placement.num_layers):
        loads = [0] * placement.num_devices
        for expert in experts[:, l].reshape(-1).tolist():
            loads[placement.devices_of(l, expert)[0]] += 1
        each.append(sum(loads) / len(loads) / max(loads))
    return sum(each) / len(each)


def test_the_second_half_judges_what_the_first_half_fits():
    """The second half prefers other experts than the first: what was even there is not here."""
    wish = np.random.default_rng(0).gumbel(size=(120, 2, 16))
    wish[:60, :, :4] += 3
    wish[60:, :, 12:] += 3
    trace = RoutingTrace(np.argsort(-wish, axis=2)[..., :3], 16)
    parts = []

    def place(part):
        parts.append(len(part))
        return place_experts(part.loads(), 4, "balanced")

    found = fitted_on(trace, place)
    about = found.metadata
    assert sorted(parts) == [60, 120] and found == place_experts(trace.loads(), 4, "balanced")
    assert (about["fitted_tokens"], about["fitted_top_k"]) == (120, 3)
    on_half = place_experts(trace[:60].loads(), 4, "balanced")
    assert about["balancedness_fitted"] == pytest.approx(evenness(found, trace.experts), rel=1e-4)
    assert about["balancedness_unseen"] == pytest.approx(evenness(on_half, trace.experts[60:]), rel=1e-4)
    assert about["balancedness_unseen"] < 0.8 < about["balancedness_fitted"]


def test_one_token_has_no_half_to_judge_on():
    trace = RoutingTrace(np.arange(4).reshape(1, 1, 4), 4)
    placement = Placement(np.array([[[1, 1, 0, 0], [0, 0, 1, 1]]], dtype=bool), "by hand", {"note": 1})
    about = fitted_on(trace, lambda part: placement).metadata
    assert about == {"note": 1, "fitted_tokens": 1, "fitted_top_k": 4, "balancedness_fitted": pytest.approx(1)}


def test_copies_stay_in_their_nodes_as_long_as_there_is_room():
    """Two nodes of two devices, two experts each: two copies a node have room, three have not."""
    for copies, scope in ((4, "hierarchical over 2 nodes"), (6, "global")):
        placement = place_experts(np.array([[4, 3, 2, 1]]), 4, "replicated", copies, num_nodes=2, num_groups=2)
        assert placement.metadata["scope"] == scope and placement.held.sum() == 4 + copies
