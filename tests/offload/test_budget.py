"""How many experts so much memory holds."""

import re

import numpy as np
import pytest

from expert_parallel.offload.budget import parse_budget, rooms
from expert_parallel.offload.policies import make_caches
from expert_parallel.trace import RoutingTrace


@pytest.mark.parametrize(
    ("text", "meaning"),
    [("25%", (0.25, True)), ("4GB", (4e9, False)), ("1.5 MB", (1.5e6, False)), ("2GiB", (2**31, False)),
     ("300", (300, False)), (300, (300, False)), (".5gb", (5e8, False)), ("100%", (1, True)), ("1TB", (1e12, False)),
     ("2G", (2e9, False)), ("3kib", (3072, False))],
)  # fmt: skip
def test_budgets_are_sizes_or_shares(text, meaning):
    assert parse_budget(text) == meaning


@pytest.mark.parametrize("text", ["", "GB", "4 apples", "-1GB", "0", "0%", "1e9", "nan", "4GB%", "101%"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="expert memory is a size|is more than all experts"):
        parse_budget(text)


def test_every_layer_gets_an_equal_share_in_whole_experts():
    assert rooms("1000", np.array([100, 100, 100]), np.array([8, 8, 8])).tolist() == [4, 3, 3]
    assert rooms("50%", np.array([100, 100]), np.array([8, 8])).tolist() == [4, 4]
    assert rooms(1000, np.array([100, 300]), np.array([8, 8])).tolist() == [4, 2]  # 400 and 600 bytes
    assert rooms(10**9, np.array([100, 300]), np.array([8, 3])).tolist() == [8, 3]
    assert rooms(1000, np.array([100, 100]), np.array([2, 8])).tolist() == [2, 8]  # what one cannot use, another can
    assert rooms("10%", np.array([100]), np.array([0])).tolist() == [0]
    assert rooms("35%", np.array([2654208] * 4), np.array([100] * 4)).tolist() == [35] * 4  # 0.35 is not a float


def test_the_least_that_is_named_works():
    for size, held in ((13_824, 16), (27_648, 128), (7, 3)):
        with pytest.raises(ValueError, match="too small") as refused:
            rooms("0.1%", np.array([size] * 4), np.array([held] * 4))
        *_, number, share = re.findall(r"[\d,.]+(?= bytes|%)", str(refused.value))
        assert rooms(number.replace(",", ""), np.array([size] * 4), np.array([held] * 4)).tolist() == [1] * 4
        assert rooms(f"{share}%", np.array([size] * 4), np.array([held] * 4)).tolist() == [1] * 4


def test_less_than_an_expert_a_layer_is_refused_with_the_least_that_works():
    size, held = np.array([2_000_000] * 3), np.array([8] * 3)
    assert rooms("6MB", size, held).tolist() == [1, 1, 1]
    with pytest.raises(
        ValueError, match=r"5MB means 5,000,000 bytes, .* in each of 3 layers takes 6,000,000 bytes, 12.5% of"
    ):
        rooms("5MB", size, held)


def held_by(devices, layers=2, experts=8):
    return np.broadcast_to(np.arange(experts) % devices == np.arange(devices)[:, None], (layers, devices, experts))


def test_caches_are_made_for_the_devices_that_are_here():
    caches = make_caches(held_by(2), [1], np.array([10, 10]), "50%", "lfu")
    assert [list(layer) for layer in caches] == [[1], [1]]
    assert [len(layer[1].held) for layer in caches] == [2, 2] and caches[0][1].policy == "lfu"
    assert make_caches(held_by(2), [0, 1], np.array([10, 10]), "100%") is None
    assert make_caches(held_by(2), [0, 1], np.array([10, 10]), "1GB") is None


def test_what_is_pinned_is_hot_and_of_this_device():
    trace = RoutingTrace(np.array([[[7, 6], [0, 1]]] * 3 + [[[5, 4], [2, 3]]]), 8)
    caches = make_caches(held_by(2), [0, 1], np.array([10, 10]), "75%", "pinned", trace)
    pinned = [[np.flatnonzero(cache.claim).tolist() for cache in layer.values()] for layer in caches]
    assert pinned == [[[6], [7]], [[0], [1]]]  # of 3 places 2 stay free, for what a token wants besides
    with pytest.raises(ValueError, match="needs a routing trace"):
        make_caches(held_by(2), [0], np.array([10, 10]), "75%", "pinned")
    with pytest.raises(ValueError, match="the trace is of 2 layers of 9 experts, the model has 2 of 8"):
        make_caches(held_by(2), [0], np.array([10, 10]), "75%", "lru", RoutingTrace(trace.experts, 9))
    with pytest.raises(ValueError, match="the trace has no tokens"):
        make_caches(held_by(2), [0], np.array([10, 10]), "75%", "pinned", trace[:0])
    with pytest.raises(ValueError, match="cache policy is lru, lfu, aging, pinned, got 'fifo'"):
        make_caches(held_by(2), [0], np.array([10, 10]), "75%", "fifo")


def test_all_ranks_decide_alike():
    """Three experts over two devices: the fuller one does not fit, so both keep them on disk."""
    held = np.array([[[True, True, False], [False, False, True]]])
    for rank in (0, 1):
        assert make_caches(held, [rank], np.array([10]), "10") is not None
        assert make_caches(held, [rank], np.array([10]), "20") is None
