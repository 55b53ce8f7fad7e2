"""Pass@k without bias."""

from math import comb


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that at least one of k rollouts, drawn without replacement from `samples`, is right.

    1 − C(n−c, k) / C(n, k), Chen et al., arXiv 2107.03374. Raises ValueError for k outside 1..samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}, but must be between 1 and the {samples} samples")
    return 1 - comb(samples - right, k) / comb(samples, k)
