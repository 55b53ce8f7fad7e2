"""Where AXPO forks: trigger, rank, budget, fork point (AXPO, arXiv 2605.28774, steps 2 to 5 of a training step).

Pure functions on trees. A reward above 0 is right, all else is wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np

from axpo.tree import RolloutTree, Segment, scored


@dataclass(frozen=True)
class Candidate:
    """A rollout that may be forked: `segment` after its first `token_index` ids.

    `confidence` in 0..1 is the mean probability of the tokens of its first tool call when they were sampled.
    """

    leaf: Segment
    segment: Segment
    token_index: int
    confidence: float


def candidates(tree: RolloutTree) -> list[Candidate]:
    """The rollouts of a group that are worth another try, the least confident first (ties: order of the leaves).

    Trigger: the tool-using rollouts of the group, void ones left out, are some and all wrong; else the list
    is empty. Each of them is a candidate at the opening tag of its first call, unless no prefix of tokens ends
    there or nothing follows.

    Raises TreeError for a rollout that has not ended.
    """
    subgroup = [(leaf, reward) for leaf, reward in scored(tree.base_leaves()) if leaf.uses_tool]
    if any(reward > 0 for _, reward in subgroup):
        return []
    found = [_first_call(leaf) for leaf, _ in subgroup]
    return sorted((c for c in found if c is not None), key=lambda c: c.confidence)


def prefix_budget(ratio: float, questions: int, rollouts: int, continuations: int) -> int:
    """M = floor(r·B·N / K): how many prefixes a step may fork, never rounded up.

    `ratio` r is taken as the decimal it is written as, so that 0.7 · 10 is 7 and not a hair less.

    Raises ValueError for a negative ratio or fewer than one continuation.
    """
    if ratio < 0:
        raise ValueError(f"the budget ratio must not be negative, not {ratio}")
    if continuations < 1:
        raise ValueError(f"a prefix needs at least 1 continuation, not {continuations}")
    return Fraction(repr(float(ratio))) * questions * rollouts // continuations


class _Ranked(Protocol):
    @property
    def confidence(self) -> float: ...


_R = TypeVar("_R", bound=_Ranked)


def allocate(per_tree: Sequence[Sequence[_R]], budget: int) -> list[tuple[int, _R]]:
    """Spend `budget` prefixes breadth first: (index of the tree, candidate), in order of selection.

    `per_tree` holds each question's candidates in their order of preference. Round j gives every question its
    j-th before any gets its (j+1)-th; within a round the least confident comes first (ties: order of the trees).
    """
    order: list[tuple[int, _R]] = []
    for j in range(max(map(len, per_tree), default=0)):
        turn = [(index, ranked[j]) for index, ranked in enumerate(per_tree) if j < len(ranked)]
        order += sorted(turn, key=lambda pair: pair[1].confidence)
    return list(islice(order, budget))


class Allocation:
    """`allocate` while groups are still running: a candidate is picked as soon as nothing can take its place.

    All picks together are those of `allocate` once every group is known, whatever the order in which they end.
    """

    def __init__(self, trees: int, budget: int, most: int) -> None:
        """`most` candidates at the most come from one tree."""
        self._budget = budget
        # A group that is still running may hold that many candidates, all of which go before those that are known.
        self._per_tree: list[Sequence[Candidate | _Unknown]] = [[_Unknown()] * most for _ in range(trees)]
        self._picked = [0] * trees

    def ended(self, tree: int, ranked: Sequence[Candidate]) -> list[tuple[int, int, Candidate]]:
        """The candidates of a tree are known. Returns what is picked now: (tree, its candidate's number, candidate)."""
        self._per_tree[tree] = ranked
        picks: list[tuple[int, int, Candidate]] = []
        seen = [0] * len(self._per_tree)
        for index, candidate in allocate(self._per_tree, self._budget):
            if isinstance(candidate, Candidate) and seen[index] == self._picked[index]:
                picks.append((index, seen[index], candidate))
                self._picked[index] += 1
            seen[index] += 1
        return picks


@dataclass(frozen=True)
class _Unknown:
    """What a group that is still running may turn out to hold."""

    confidence: float = -1.0


def open_prefix(tree: RolloutTree, candidate: Candidate) -> Segment:
    """Fork the candidate's rollout and return the prefix, to which continuations are appended as `resampled`."""
    return tree.fork(candidate.segment, candidate.token_index)


def _first_call(leaf: Segment) -> Candidate | None:
    segment = next(segment for segment in leaf.path() if segment.calls)
    call = segment.calls[0]
    if call.opened is None or call.opened >= len(segment):
        return None
    assert segment.logprobs is not None
    probabilities = np.exp(segment.logprobs[call.start : call.end].astype(np.float64))
    return Candidate(leaf, segment, call.opened, float(probabilities.mean()))
