"""Who learns what: each stream of policy tokens gets one advantage (AXPO, arXiv 2605.28774, eqs. 2 to 5).

A stream is what one term of the loss averages over: a rollout, the prefix of a forked rollout, or a continuation.
Tokens that several streams hold learn in each of them. Void rollouts belong to no group and get no credit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from axpo.tree import Credit, Kind, RolloutTree, Segment, TreeError, scored

Deviation = Literal["sample", "population", "none"]

EPSILON = 1e-6  # added to the deviation, as verl does


@dataclass(frozen=True)
class Stream:
    """Policy segments that share one advantage, in the order of the path."""

    segments: tuple[Segment, ...]
    advantage: float

    @property
    def tokens(self) -> int:
        """The trained tokens: the denominator of the mean in eq. 6."""
        return sum(len(segment) for segment in self.segments)


def normalise(
    values: Sequence[float],
    deviation: Deviation = "sample",
    epsilon: float = EPSILON,
    within: Sequence[float] | None = None,
) -> npt.NDArray[np.float64]:
    """norm(v; V) = (v − mean V) / (std V + ε) for each of the values (n,), V being `within`, or the values themselves.

    Only v − mean V where `deviation` is "none" (Dr. GRPO, arXiv 2503.20783). 0 where all of V are equal, so for a group
    of one too.
    """
    members = np.asarray(values, dtype=np.float64)
    group = members if within is None else np.asarray(within, dtype=np.float64)
    if len(group) == 0 or np.all(group == group[0]):
        return np.zeros_like(members)
    scale: float = 1.0 if deviation == "none" else group.std(ddof=int(deviation == "sample")) + epsilon
    normalised: npt.NDArray[np.float64] = (members - group.mean()) / scale
    return normalised


def credit_grpo(
    tree: RolloutTree, deviation: Deviation = "sample", epsilon: float = EPSILON, tool_reward: float = 0.0
) -> list[Stream]:
    """Plain GRPO: every rollout is one stream, Â = norm(r; {r₁..r_N}).

    Of a forked tree it sees the N rollouts sampled at first. `tool_reward` is added to the reward of each that uses a
    tool (the tool bonus of AXPO's section 6; the penalty where it is negative). Sets the credits of every segment
    and returns the streams. Raises TreeError for a rollout that has not ended.
    """
    group = scored(tree.base_leaves())
    shaped = [reward + tool_reward * leaf.uses_tool for leaf, reward in group]
    advantages = normalise(shaped, deviation, epsilon)
    return _assign(tree, [_stream(leaf.path(), a) for (leaf, _), a in zip(group, advantages, strict=True)])


def credit_axpo(
    tree: RolloutTree,
    deviation: Deviation = "sample",
    epsilon: float = EPSILON,
    prefix_credit: bool = True,
    separate_groups: bool = True,
) -> list[Stream]:
    """AXPO: eq. 2 on continuations, eqs. 3 and 4 on source prefixes, plain GRPO on all other rollouts.

    The recovery reward of eq. 3 is the greatest of the continuations' rewards: 1 if any is right, if they are 0 or 1.
    The failed continuation of a source gets no credit. A source whose continuations are all void keeps its plain
    advantage over prefix and old continuation, and so does, without `prefix_credit`, every source. A rollout forked in
    several places has that many prefixes, each a stream of its own. Continuations that begin at the root (from
    scratch) have no source. Without `separate_groups`, each V is the rollouts and continuations of the whole tree.

    Sets the credits of every segment and returns the streams: rollout by rollout, a prefix before its continuations.
    Raises TreeError for a rollout that has not ended, and for a continuation that was forked again.
    """
    group = scored(tree.base_leaves())
    rewards = [reward for _, reward in group]
    if any(segment.is_forked and segment.in_continuation for segment in tree.segments()):
        raise TreeError("a continuation was forked: AXPO forks the rollouts sampled at first")
    resampled = {fork: _scored_groups(tree, fork) for fork in tree.segments() if fork.is_forked}
    others = [] if separate_groups else [r for groups in resampled.values() for each in groups for _, r in each]

    def continued(group: Sequence[tuple[Segment, float]], depth: int) -> list[Stream]:  # (2)
        values = [reward for _, reward in group]
        advantages = normalise(values, deviation, epsilon, values if separate_groups else [*rewards, *others])
        return [_stream(end.path()[depth:], a) for (end, _), a in zip(group, advantages, strict=True)]

    plain = normalise(rewards, deviation, epsilon, [*rewards, *others])
    streams: list[Stream] = []
    for i, (leaf, _) in enumerate(group):
        forks = [segment for segment in leaf.path()[1:] if resampled.get(segment)]
        if not forks or not prefix_credit:
            streams.append(_stream(leaf.path(), plain[i]))
        for prefix in forks:
            continuations = [pair for each in resampled[prefix] for pair in each]
            if prefix_credit:
                recovered = max(reward for _, reward in continuations)  # (3)
                replaced = [*rewards[:i], recovered, *rewards[i + 1 :], *others]
                streams.append(_stream(prefix.path(), normalise([recovered], deviation, epsilon, replaced)[0]))  # (4)
            for each in resampled[prefix]:
                streams += continued(each, len(prefix.path()))
    for each in resampled.get(tree.root, []):
        streams += continued(each, 1)
    return _assign(tree, streams)


def credit_rltf(tree: RolloutTree, deviation: Deviation = "sample", epsilon: float = EPSILON) -> list[Stream]:
    """RLTF by self-distillation (arXiv 2602.02482): first attempts learn by GRPO.

    Each second attempt, which begins at the root as a resampling, learns with the advantage r − mean of the first
    attempts' rewards. Sets the credits of every segment and returns the streams.
    Raises TreeError for a rollout that has not ended.
    """
    streams = credit_grpo(tree, deviation, epsilon)
    first = [reward for _, reward in scored(tree.base_leaves())]
    for each in _scored_groups(tree, tree.root):
        streams += [_stream(end.path(), reward - float(np.mean(first))) for end, reward in each if first]
    return _assign(tree, streams)


def one_outcome(tree: RolloutTree) -> bool:
    """Whether the rollouts sampled at first teach nothing, because all that were decided have the same reward."""
    return len({reward for _, reward in scored(tree.base_leaves())}) < 2


def _scored_groups(tree: RolloutTree, fork: Segment) -> list[list[tuple[Segment, float]]]:
    """The decided continuations of each resampling at `fork`; of those that have any."""
    groups = [scored(leaves) for leaves in tree.resamplings(fork).values()]
    return [group for group in groups if group]


def _stream(path: Sequence[Segment], advantage: float) -> Stream:
    return Stream(tuple(segment for segment in path if segment.kind is Kind.POLICY), float(advantage))


def _assign(tree: RolloutTree, streams: list[Stream]) -> list[Stream]:
    credits: dict[Segment, tuple[Credit, ...]] = {}
    for stream in streams:
        for segment in stream.segments:
            credits[segment] = (*credits.get(segment, ()), Credit(stream.advantage, stream.tokens))
    for segment in tree.segments():
        segment.credits = credits.get(segment, ())
    return streams
