"""Hot experts by hand: more than four times the mean and more than chance scatters; seen after so many tokens."""

import numpy as np
import pytest

from expert_parallel.study.scenarios import hot_experts, tokens_until_hot


def test_more_than_the_factor_over_the_mean():
    """Of five experts with 100 slots a mean of 20: 80 is four times that, 81 is more; in each layer by itself."""
    loads = [[80, 20, 0, 0, 0], [81, 19, 0, 0, 0], [1, 1, 1, 1, 96]]
    assert hot_experts(loads, sigmas=0).tolist() == [[False] * 5, [True] + [False] * 4, [False] * 4 + [True]]
    assert hot_experts([[80, 20, 0, 0, 0]], factor=3.9, sigmas=0).tolist() == [[True] + [False] * 4]


def test_and_more_than_a_count_is_uncertain():
    """A count of n is by sqrt(n): of 100 experts with a mean of 16, 93 - 3 x 9.64 is over 64 and 92 - 3 x 9.59 is not;
    nor is what is exactly there, 100 - 3.6 x 10."""
    loads = np.full((1, 100), 0.0)
    for count, hot in ((100, True), (93, True), (92, False)):
        loads[0, 0], loads[0, 1:] = count, (1600 - count) / 99
        assert hot_experts(loads)[0, 0] == hot, count
    loads[0, 0], loads[0, 1:] = 100, 1500 / 99
    assert not hot_experts(loads, sigmas=3.6)[0, 0] and hot_experts(loads, sigmas=3.5)[0, 0]


@pytest.mark.parametrize(("factor", "sigmas", "tokens"), [(4, 0, 1), (4, 1, 5), (8, 0, None), (7.9, 0, 1)])
def test_an_expert_that_every_token_chooses(factor, sigmas, tokens):
    """Top-1 of 8: after n tokens it has n slots, the mean is n / 8; n - sqrt(n) is more than n / 2 from 5 on."""
    assert tokens_until_hot(np.zeros((12, 1), int), 0, 8, factor, sigmas) == tokens


def test_it_is_seen_when_it_first_holds():
    """Top-2 of 8, without doubt: at token 4 it has two of a mean of 1, at 5 three of 1.25, more than double."""
    experts = np.array([[1, 2], [1, 2], [0, 1], [3, 0], [0, 4], [5, 6], [5, 6], [5, 6]])
    assert tokens_until_hot(experts, 0, 8, factor=2, sigmas=0) == 5
    assert tokens_until_hot(experts, 0, 8, factor=2.4, sigmas=0) is None  # 3 of 1.25 is 2.4 times, and no more
    assert tokens_until_hot(experts, 7, 8, factor=2, sigmas=0) is None
    assert tokens_until_hot(np.concatenate([experts, experts[:2]]), 1, 8, factor=2, sigmas=0) == 1
