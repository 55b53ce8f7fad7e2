"""A 95% interval of a mean over few seeds."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

LEVEL = 0.95
RESAMPLES = 20_000
SEED = 0
LEAST = 3  # with fewer seeds there is no interval
METHOD = (
    f"{LEVEL:.0%} intervals: bootstrap of the mean over seeds, {RESAMPLES} resamples, expanded percentiles "
    "(Hesterberg, arXiv 1411.5279); none with fewer than 3 seeds"
)


def interval(values: Sequence[float] | NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """The ends of the interval of the mean of (n,) values, or of each column of (n, T); None where n is below 3.

    Plain percentiles are too narrow for few seeds. So they are taken further out: at Φ(∓ t·√(n/(n−1))) instead of
    Φ(∓1.96), t being Student's with n−1 degrees of freedom (Hesterberg, "What Teachers Should Know About the
    Bootstrap", arXiv 1411.5279). Of normal values they then hold the true mean in 95% of cases with 8 seeds, in 92%
    with 5 and, since no resample lies outside the values, in 75% with 3; plain percentiles in 88%, 83% and 75%.
    The resamples follow from a fixed seed.
    """
    array = np.asarray(values, dtype=np.float64)
    n = len(array)
    if n < LEAST:
        return None
    drawn = np.random.default_rng(SEED).integers(n, size=(RESAMPLES, n))
    counts = (drawn[:, :, None] == np.arange(n)).sum(1)
    means = counts @ array / n
    reach = float(t.ppf((1 + LEVEL) / 2, n - 1)) * math.sqrt(n / (n - 1))
    below = NormalDist().cdf(-reach)
    low, high = np.quantile(means, [below, 1 - below], axis=0)
    return low, high


def estimate(values: Sequence[float | None]) -> dict[str, float | None]:
    """`mean`, `low` and `high` over the seeds that have a value; None for what there is not."""
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "low": None, "high": None}
    mean, ends = sum(known) / len(known), interval(known)
    if ends is None:
        return {"mean": mean, "low": None, "high": None}
    # of equal values the resampled means differ by rounding
    return {"mean": mean, "low": min(float(ends[0]), mean), "high": max(float(ends[1]), mean)}
