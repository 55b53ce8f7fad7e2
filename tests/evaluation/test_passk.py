from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axpo.evaluation.passk import pass_at_k


@pytest.mark.parametrize(
    ("samples", "right", "k", "expected"),
    [
        (4, 1, 1, 0.25),
        (4, 1, 4, 1.0),
        (4, 2, 2, 5 / 6),  # 1 of the 6 pairs holds both wrong ones
        (4, 0, 4, 0.0),
        (5, 2, 3, 0.9),  # 1 of the 10 triples is all wrong
        (8, 7, 2, 1.0),  # two cannot both be the one that is wrong
    ],
)
def test_golden(samples: int, right: int, k: int, expected: float):
    assert pass_at_k(samples, right, k) == pytest.approx(expected, abs=1e-15)


@given(st.data())
def test_it_is_the_share_of_draws_with_a_right_one(data: st.DataObject):
    samples = data.draw(st.integers(1, 8))
    right, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    draws = list(combinations([True] * right + [False] * (samples - right), k))
    assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


@pytest.mark.parametrize("k", [0, 5])
def test_more_draws_than_samples_are_refused(k: int):
    with pytest.raises(ValueError, match=f"k is {k}, but must be between 1 and the 4 samples"):
        pass_at_k(4, 2, k)
