import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from axpo.engines.base import Sampling
from axpo.engines.sampling import check_sampling, entropy, sample

NONE = torch.tensor([], dtype=torch.long)
# Probabilities 0.1, 0.4, 0.2, 0.3 for the ids 0, 1, 2, 3.
LOGITS = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()


@pytest.mark.parametrize(
    ("rules", "distribution"),
    [
        (Sampling(), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),  # the squares, normalised
        (Sampling(top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(top_k=9), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(top_p=0.6), [0, 4 / 7, 0, 3 / 7]),  # 0.4 is less than 0.6, so the next one is needed
        (Sampling(top_p=0.39), [0, 1, 0, 0]),
        (Sampling(top_p=0.1), [0, 1, 0, 0]),
        (Sampling(top_k=3, top_p=0.5), [0, 4 / 7, 0, 3 / 7]),  # of 4/9, 3/9 and 2/9 the first is not enough
        (Sampling(temperature=0), [0, 1, 0, 0]),
    ],
)
def test_distribution_golden(rules: Sampling, distribution: list[float]) -> None:
    """Uniform numbers spread evenly over [0, 1) hit each id as often as it is probable, in id order."""
    points = [(n + 0.5) / 3000 for n in range(3000)]
    ids, logprobs, _ = sample(LOGITS.expand(3000, 4), [rules] * 3000, points, NONE)
    assert ids.tolist() == sorted(ids.tolist())
    for i, probability in enumerate(distribution):
        assert (ids == i).float().mean().item() == pytest.approx(probability, abs=1 / 1500)
        assert logprobs[ids == i].tolist() == pytest.approx(
            [math.log(probability or 1)] * int((ids == i).sum()), abs=1e-6
        )


def test_banned_ids_are_never_drawn() -> None:
    logits = torch.tensor([[5.0, 0.0, 5.0, 0.0, 5.0]])
    banned = torch.tensor([0, 2, 4])
    for rules in (Sampling(), Sampling(top_k=4), Sampling(top_p=0.99), Sampling(temperature=0)):
        ids, logprobs, _ = sample(logits.expand(4, 5), [rules] * 4, [0.0, 0.49, 0.51, 1 - 2**-53], banned)
        assert set(ids.tolist()) <= {1, 3}
        assert logprobs.isfinite().all()


rows = st.tuples(
    st.lists(st.floats(-8, 8, width=32), min_size=6, max_size=6),
    st.builds(Sampling, st.sampled_from([0.0, 0.7, 1.0, 1.5]), st.floats(0.05, 1), st.integers(0, 8)),
    st.floats(0, 1, exclude_max=True),
)


@given(st.lists(rows, min_size=2, max_size=5))
def test_a_row_does_not_depend_on_the_others(batch: list[tuple[list[float], Sampling, float]]) -> None:
    def draw(some: list[tuple[list[float], Sampling, float]]) -> tuple[list[int], list[float]]:
        logits, rules, points = zip(*some, strict=True)
        ids, logprobs, _ = sample(torch.tensor(logits), rules, points, torch.tensor([5]))
        return ids.tolist(), logprobs.tolist()

    alone = [draw([row]) for row in batch]
    assert draw(batch) == ([ids[0] for ids, _ in alone], [logprobs[0] for _, logprobs in alone])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (Sampling(temperature=-1), "temperature is -1"),
        (Sampling(temperature=math.nan), "temperature is nan"),
        (Sampling(top_p=0), "top_p is 0"),
        (Sampling(top_p=1.1), r"top_p is 1\.1"),
        (Sampling(top_k=-1), "top_k is -1"),
        (Sampling(max_tokens=0), "max_tokens is 0"),
    ],
)
def test_impossible_rules(rules: Sampling, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sampling(rules)


def test_entropy_by_hand():
    logprobs = torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]]).log()
    assert entropy(logprobs).tolist() == pytest.approx([1.5 * math.log(2), 0.0])
