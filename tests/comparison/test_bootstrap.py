import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from axpo.comparison.bootstrap import estimate, interval

VALUES = st.lists(st.floats(-100, 100), min_size=3, max_size=12)


@given(st.floats(-1e3, 1e3), st.integers(3, 12))
def test_of_constant_data_the_interval_is_the_constant(value: float, n: int) -> None:
    found = estimate([value] * n)
    assert found["low"] <= found["mean"] <= found["high"]
    assert found["low"] == pytest.approx(value) == found["high"]


@given(VALUES)
def test_the_interval_holds_the_mean_and_lies_within_the_values(values: list[float]) -> None:
    found = estimate(values)
    assert found["mean"] == pytest.approx(np.mean(values), abs=1e-9)
    assert min(values) - 1e-9 <= found["low"] <= found["mean"] <= found["high"] <= max(values) + 1e-9
    assert estimate(values) == found  # the resamples are fixed


@given(VALUES, st.floats(-10, 10))
def test_it_moves_with_the_values(values: list[float], by: float) -> None:
    before, after = interval(values), interval([value + by for value in values])
    assert before is not None
    assert after is not None
    assert after[0] == pytest.approx(before[0] + by, abs=1e-6)
    assert after[1] == pytest.approx(before[1] + by, abs=1e-6)


def test_fewer_than_three_values_have_no_interval() -> None:
    assert estimate([]) == {"mean": None, "low": None, "high": None}
    assert estimate([None, 0.25, None, 0.75]) == {"mean": 0.5, "low": None, "high": None}
    assert interval([1.0, 2.0]) is None


def test_golden_normal_values() -> None:
    """Of eight normal values it is near the t-interval: mean ± 2.365·s/√8."""
    values = np.array([-1.2, -0.7, -0.4, -0.1, 0.1, 0.4, 0.7, 1.2])
    half = 2.365 * values.std(ddof=1) / np.sqrt(8)
    low, high = interval(values)
    assert (low, high) == (pytest.approx(-half, rel=0.08), pytest.approx(half, rel=0.08))


@pytest.mark.parametrize(("seeds", "share"), [(8, 0.95), (5, 0.92), (3, 0.75)])
def test_it_holds_the_true_mean_as_often_as_is_said(seeds: int, share: float) -> None:
    values = np.random.default_rng(1).normal(size=(seeds, 1500))
    low, high = interval(values)
    assert ((low <= 0) & (high >= 0)).mean() == pytest.approx(share, abs=0.02)
