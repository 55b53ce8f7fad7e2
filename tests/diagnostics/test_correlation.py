import pytest
from hypothesis import given
from hypothesis import strategies as st

from axpo.diagnostics.correlation import pearson, ranks, spearman

VALUES = st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=2, max_size=20)


def test_golden_pearson():
    # Deviations (−1.5, −0.5, 0.5, 1.5) and (−1.25, −0.25, −0.25, 1.75): 4.5 / √(5 · 4.75).
    assert pearson([1, 2, 3, 4], [0, 1, 1, 3]) == pytest.approx(4.5 / (5 * 4.75) ** 0.5)
    assert pearson([1, 2, 3], [6, 4, 2]) == pytest.approx(-1)


def test_golden_ranks_with_ties():
    assert ranks([30, 10, 20, 10, 20, 20]).tolist() == [6, 1.5, 4, 1.5, 4, 4]
    assert ranks([]).tolist() == []


def test_golden_spearman_with_ties():
    # Ranks (1, 2.5, 2.5, 4) and (2, 2, 2, 4): deviations (−1.5, 0, 0, 1.5) and (−0.5, −0.5, −0.5, 1.5).
    assert spearman([1, 5, 5, 90], [0, 0, 0, 7]) == pytest.approx(3 / (4.5 * 3) ** 0.5)
    assert spearman([1, 2, 3], [1, 10, 1000]) == pytest.approx(1)


def test_what_does_not_vary_correlates_with_nothing():
    for correlation in (pearson, spearman):
        assert correlation([1, 1, 1], [1, 2, 3]) is None
        assert correlation([1, 2, 3], [0.1, 0.1, 0.1]) is None
        assert correlation([1], [2]) is None
        assert correlation([], []) is None


@given(VALUES)
def test_correlation_lies_within_1_and_ignores_scale(pairs: list[tuple[int, int]]):
    x, y = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    for correlation in (pearson, spearman):
        found = correlation(x, y)
        if found is None:
            assert len(set(x)) == 1 or len(set(y)) == 1
            continue
        assert abs(found) <= 1 + 1e-12
        assert correlation(y, x) == pytest.approx(found)
        assert correlation([2 * a + 1 for a in x], [-3 * b for b in y]) == pytest.approx(-found)
