"""Correlation of two measurements."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """The linear correlation of x (n,) and y (n,) in −1..1; None where one of them does not vary, or n < 2."""
    return _pearson(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64))


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """The correlation of the ranks of x (n,) and y (n,), equal values sharing the mean of theirs; None as `pearson`."""
    return _pearson(ranks(x), ranks(y))


def ranks(values: Sequence[float]) -> npt.NDArray[np.float64]:
    """The rank of each value (n,) from 1; equal ones get the mean of the ranks that they take up."""
    _, place, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    shared: npt.NDArray[np.float64] = (last - (counts - 1) / 2)[place]
    return shared


def _pearson(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float | None:
    if len(x) < 2 or np.all(x == x[0]) or np.all(y == y[0]):
        return None
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))
