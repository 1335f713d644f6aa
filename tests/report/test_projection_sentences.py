"""The projection's sentence about the best number of devices: it follows from the curve, and from what fits."""

import pytest

from expert_parallel.report import projection
from expert_parallel.report.projection import best_number


def curve(*speeds, fits=()):
    """Rows for 1, 2, 4, ... devices; all fit where nothing is said."""
    fits = fits or (True,) * len(speeds)
    return [
        {"devices": 2**n, "tokens_per_second": speed, "fits": fit, "bytes": 8e9 / 2**n}
        for n, (speed, fit) in enumerate(zip(speeds, fits, strict=True))
    ]


@pytest.mark.parametrize(
    ("rows", "best", "words"),
    [
        (curve(10, 20, 30), 4, "4 with 30.0 tokens/s; the most considered, and speed still rises: 2 give 20.0"),
        (curve(10, 30, 20), 2, "2 with 30.0 tokens/s; more are no faster, 4 give 20.0"),
        (curve(10, 30, 20, 25), 2, "2 with 30.0 tokens/s; more are no faster, 8 give 25.0"),
        (curve(30, 20), 1, "1 with 30.0 tokens/s; more are no faster, 2 give 20.0"),
        (curve(30, 30), 1, "1 with 30.0 tokens/s; more are no faster, 2 give 30.0"),
        (curve(20, 10, 30), 4, "4 with 30.0 tokens/s; the most considered, and speed still rises: 2 give 10.0"),
        (curve(10), 1, "1 with 10.0 tokens/s; no other that holds the model was considered"),
        (
            curve(50, 40, 30, 20, fits=(False, False, True, True)),
            4,
            "4 with 30.0 tokens/s; more are no faster, 8 give 20.0;"
            " fewer do not hold it: 4.00 GB on the fullest of 2, 3.00 GB are there",
        ),
        (
            curve(50, 40, 60, 30, 20, 40, fits=(False,) * 3 + (True,) * 3),
            32,
            "32 with 40.0 tokens/s; the most considered, and speed still rises: 16 give 20.0;"
            " fewer do not hold it: 2.00 GB on the fullest of 4, 3.00 GB are there",
        ),
        (
            curve(50, 40, fits=(False, False)),
            None,
            "none of those considered holds the model: 4.00 GB on the fullest of 2, 3.00 GB are there",
        ),
    ],
)
def test_the_sentence_follows_from_the_curve(rows, best, words):
    assert best_number(rows, 3e9) == (best, words)


def test_numbers_considered_where_none_are_asked_for():
    assert projection.DEVICES == (1, 2, 4, 8, 16, 32, 64)
