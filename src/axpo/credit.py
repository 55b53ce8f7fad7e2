"""Who learns what: each stream of policy tokens gets one advantage (AXPO, arXiv 2605.28774, eqs. 2 to 5).

A stream is what one term of eq. 5 averages over: a rollout, the prefix of a forked rollout, or a continuation.
Void rollouts belong to no group and get no credit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from axpo.tree import Credit, Kind, RolloutTree, Segment, TreeError, scored

Deviation = Literal["sample", "population"]

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
    values: Sequence[float], deviation: Deviation = "sample", epsilon: float = EPSILON
) -> npt.NDArray[np.float64]:
    """norm(v; V) = (v − mean V) / (std V + ε) for every member of the group V, shape (|V|,).

    0 for every member where all are equal, so for a group of one too.
    """
    group = np.asarray(values, dtype=np.float64)
    if len(group) == 0 or np.all(group == group[0]):
        return np.zeros_like(group)
    scale: np.float64 = group.std(ddof=1 if deviation == "sample" else 0) + epsilon
    normalised: npt.NDArray[np.float64] = (group - group.mean()) / scale
    return normalised


def credit_grpo(tree: RolloutTree, deviation: Deviation = "sample", epsilon: float = EPSILON) -> list[Stream]:
    """Plain GRPO: every rollout is one stream, Â = norm(r; {r₁..r_N}).

    Made for trees that were never forked; of a forked one it sees the N rollouts sampled at first. Sets the
    credit of every segment and returns the streams. Raises TreeError as `credit_axpo` does.
    """
    group = scored(tree.base_leaves())
    advantages = normalise([reward for _, reward in group], deviation, epsilon)
    return _assign(tree, [_stream(leaf.path(), a) for (leaf, _), a in zip(group, advantages, strict=True)])


def credit_axpo(tree: RolloutTree, deviation: Deviation = "sample", epsilon: float = EPSILON) -> list[Stream]:
    """AXPO: eq. 2 on continuations, eqs. 3 and 4 on source prefixes, plain GRPO on all other rollouts.

    The failed continuation of a source gets no credit. A source whose continuations are all void keeps its plain
    advantage over prefix and old continuation. Sets the credit of every segment (None outside the streams) and
    returns the streams: rollout by rollout, a prefix before its continuations.

    Raises TreeError for a rollout that has not ended, one forked in two places, or tokens claimed by two streams.
    """
    group = scored(tree.base_leaves())
    rewards = [reward for _, reward in group]
    plain = normalise(rewards, deviation, epsilon)
    streams: list[Stream] = []
    for i, (leaf, _) in enumerate(group):
        prefix = _fork_of(leaf)
        continuations = scored(tree.continuations(prefix)) if prefix is not None else []
        if prefix is None or not continuations:
            streams.append(_stream(leaf.path(), plain[i]))
            continue
        recovered = float(any(reward > 0 for _, reward in continuations))  # (3)
        replaced = [*rewards[:i], recovered, *rewards[i + 1 :]]
        streams.append(_stream(prefix.path(), normalise(replaced, deviation, epsilon)[i]))  # (4)
        own = normalise([reward for _, reward in continuations], deviation, epsilon)  # (2)
        shared = len(prefix.path())
        streams += [_stream(end.path()[shared:], a) for (end, _), a in zip(continuations, own, strict=True)]
    return _assign(tree, streams)


def _fork_of(leaf: Segment) -> Segment | None:
    """The segment on the path after which continuations were drawn."""
    forks = [segment for segment in leaf.path() if any(child.resampled for child in segment.children)]
    if len(forks) > 1:
        raise TreeError("a rollout was forked in two places: AXPO credits one prefix a rollout")
    return forks[0] if forks else None


def _stream(path: Sequence[Segment], advantage: float) -> Stream:
    return Stream(tuple(segment for segment in path if segment.kind is Kind.POLICY), float(advantage))


def _assign(tree: RolloutTree, streams: list[Stream]) -> list[Stream]:
    credits: dict[Segment, Credit] = {}
    for stream in streams:
        for segment in stream.segments:
            if segment in credits:
                raise TreeError("two streams claim the same tokens: rollouts may share tokens only before a fork")
            credits[segment] = Credit(stream.advantage, stream.tokens)
    for segment in tree.segments():
        segment.credit = credits.get(segment)
    return streams
