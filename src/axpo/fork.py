"""Where AXPO forks: trigger, rank, budget, fork point (AXPO, arXiv 2605.28774, steps 2 to 5 of a training step).

Pure functions on trees.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from typing import Literal, Protocol, TypeVar

import numpy as np

from axpo.tree import Ids, Kind, RolloutTree, Segment, TreeError, scored

ForkAt = Literal["first", "last", "most_uncertain", "every"]
Rank = Literal["confidence", "random", "entropy"]
BranchRule = Literal["published", "code"]
BRANCH_TOKENS = 20  # of a segment, by whose entropy ARPO branches


@dataclass(frozen=True)
class Candidate:
    """A rollout that may be forked: `segment` after its first `token_index` ids.

    `confidence` in 0..1 is the mean probability of the tokens of the call (or of the answer of a rollout without one)
    when they were sampled. Who has the least `order` is resampled first.
    """

    leaf: Segment
    segment: Segment
    token_index: int
    confidence: float
    order: float


def candidates(
    tree: RolloutTree,
    threshold: float = 0.5,
    fork_at: ForkAt = "first",
    rank: Rank = "confidence",
    resample_no_tool: bool = False,
) -> list[Candidate]:
    """The fork points of a group that are worth another try, the most uncertain first (ties: order of the leaves).

    Trigger: the tool-using rollouts of the group, void ones left out, are some and all wrong (their rewards below
    `threshold`); else the list is empty. Of each, the turns that `fork_at` names among those that call are candidates,
    at the opening tag of their first call, unless no prefix of tokens ends there or nothing follows. With
    `resample_no_tool` the rollouts without a tool are, by the same trigger of their own, candidates at the end of their
    thinking (an ablation of AXPO, section 6).

    Raises TreeError for a rollout that has not ended, and where `rank` is "entropy" for one without entropies.
    """
    group = scored(tree.base_leaves())
    found: list[Candidate] = []
    for tool in (True, False) if resample_no_tool else (True,):
        subgroup = [(leaf, reward) for leaf, reward in group if leaf.uses_tool == tool]
        if all(reward < threshold for _, reward in subgroup):
            for leaf, _ in subgroup:
                found += _calls(leaf, rank, fork_at) if tool else _answer(leaf, rank)
    if rank == "random" and found:
        orders = _generator(np.concatenate([leaf.ids for leaf, _ in group])).random(len(found))
        found = [replace(c, order=float(order)) for c, order in zip(found, orders, strict=True)]
    return sorted(found, key=lambda c: c.order)


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
    def order(self) -> float: ...


_R = TypeVar("_R", bound=_Ranked)


def allocate(per_tree: Sequence[Sequence[_R]], budget: int) -> list[tuple[int, _R]]:
    """Spend `budget` prefixes breadth first: (index of the tree, candidate), in order of selection.

    `per_tree` holds each question's candidates in their order of preference. Round j gives every question its
    j-th before any gets its (j+1)-th; within a round the least `order` comes first (ties: order of the trees).
    """
    order: list[tuple[int, _R]] = []
    for j in range(max(map(len, per_tree), default=0)):
        turn = [(index, ranked[j]) for index, ranked in enumerate(per_tree) if j < len(ranked)]
        order += sorted(turn, key=lambda pair: pair[1].order)
    return list(islice(order, budget))


class Allocation:
    """`allocate` while groups are still running: a candidate is picked as soon as nothing can take its place.

    All picks together are those of `allocate` once every group is known, whatever the order in which they end.
    """

    def __init__(self, trees: int, budget: int, most: int) -> None:
        """`most` candidates at the most come from one tree."""
        self._budget = budget
        # A group that is still running may hold that many candidates, all of which go before those that are known.
        self._per_tree: list[Sequence[Candidate | Claim]] = [[Claim()] * most for _ in range(trees)]
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
class Claim:
    """What `allocate` has to know of a candidate; of one that a running group may turn out to hold, the default."""

    order: float = -math.inf


def open_prefix(tree: RolloutTree, candidate: Candidate) -> Segment:
    """Fork the candidate's rollout and return the prefix, to which continuations are appended as `resampled`."""
    return tree.fork(candidate.segment, candidate.token_index)


def confidence(segment: Segment, tokens: slice) -> float:
    """The mean probability of these tokens of a policy segment when they were sampled."""
    assert segment.logprobs is not None
    return float(np.exp(segment.logprobs[tokens].astype(np.float64)).mean())


def mean_entropy(segment: Segment, tokens: slice) -> float:
    """The mean entropy (nats) of the distributions that these tokens were drawn from. Raises TreeError without any."""
    if segment.entropies is None:
        raise TreeError("a rollout has no entropies")
    return float(segment.entropies[tokens].astype(np.float64).mean())


def branch_points(
    tree: RolloutTree, vocabulary: int, rule: BranchRule = "published", weight: float = 0.2, chance: float = 0.5
) -> list[Segment]:
    """The observations after which ARPO branches, those of earlier turns first (arXiv 2507.19849, section 3.2).

    ΔH is how much a segment's entropy exceeds that of its rollout's first segment, over log |V|, each over its first 20
    tokens. "published" takes the mean over these of the segment right after the observation, and branches where
    0.5 + weight·ΔH is above `chance`. "code" is what the authors' program does: it takes the sum, of the segment that
    wrote the call, before the observation, and branches where a random number U(0, 1) − weight·ΔH, clipped to 0..1, is
    at most `chance` (its entropies are of the ten likeliest tokens; these are of all).

    Raises TreeError for rollouts without entropies.
    """
    found: dict[Segment, int] = {}
    first = slice(BRANCH_TOKENS)

    def measured(segment: Segment) -> float:
        return mean_entropy(segment, first) * (min(len(segment), BRANCH_TOKENS) if rule == "code" else 1)

    for leaf in tree.base_leaves():
        path = leaf.path()
        for depth in range(2, len(path) - 1):
            point = path[depth]
            if point.kind is not Kind.OBSERVATION or point in found:
                continue
            looked_at = path[depth - 1 if rule == "code" else depth + 1]
            rise = (measured(looked_at) - measured(path[1])) / math.log(vocabulary)
            ids = np.concatenate([segment.ids for segment in path[: depth + 1]])
            if rule == "code":
                branches = min(max(_generator(ids).random() - weight * rise, 0.0), 1.0) <= chance
            else:
                branches = 0.5 + weight * rise > chance
            if branches:
                found[point] = depth
    return sorted(found, key=lambda point: found[point])


def _generator(ids: Ids) -> np.random.Generator:
    """Random numbers that these ids decide: a tree alone decides what is made of it."""
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "big"))


def _calls(leaf: Segment, rank: Rank, fork_at: ForkAt) -> list[Candidate]:
    calls = [(segment, segment.calls[0]) for segment in leaf.path() if segment.calls]
    if fork_at in ("first", "last"):
        calls = calls[:1] if fork_at == "first" else calls[-1:]
    found = [
        _candidate(leaf, segment, call.opened, slice(call.start, call.end), rank)
        for segment, call in calls
        if call.opened is not None and call.opened < len(segment)
    ]
    return sorted(found, key=lambda c: c.order)[:1] if fork_at == "most_uncertain" else found


def _answer(leaf: Segment, rank: Rank) -> list[Candidate]:
    segment = leaf.path()[1]
    if segment.thought is None or not 0 < segment.thought < len(segment):
        return []
    return [_candidate(leaf, segment, segment.thought, slice(segment.thought, None), rank)]


def _candidate(leaf: Segment, segment: Segment, index: int, tokens: slice, rank: Rank) -> Candidate:
    sure = confidence(segment, tokens)
    return Candidate(leaf, segment, index, sure, -mean_entropy(segment, tokens) if rank == "entropy" else sure)
