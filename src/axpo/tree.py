"""The rollout tree: every token has one owner.

The root segment holds the prompt of a question, N rollouts branch from it, and a fork splits a policy
segment at a token and adds siblings after it. Whatever is shared (a prompt, a frozen thinking prefix) is
stored once, generated once and trained once.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

SYSTEM_FAULT = "system"  # what `ToolUse.fault` says of a call that the policy did nothing wrong in


class TreeError(ValueError):
    """A rollout tree was asked for something that would make it inconsistent."""


class Kind(StrEnum):
    """Who wrote a segment. Only `POLICY` tokens are ever trained."""

    PROMPT = "prompt"
    POLICY = "policy"
    OBSERVATION = "observation"


class StopReason(StrEnum):
    """Why a rollout ended."""

    ANSWER = "answer"  # the policy ended its turn without a tool call
    TURNS = "turns"  # it called a tool in its last turn, where none is run any more
    TOKENS = "tokens"  # a turn reached its token limit, or the context is full
    IMAGES = "images"  # an observation would have passed the limit on images
    VOID = "void"  # a system fault: no reward, no advantage


@dataclass(frozen=True)
class Image:
    """An image as the conversation holds it.

    `data` is the encoded file (PNG, JPEG, ...) at its original resolution; `grid` is the image
    processor's (t, h, w) in patches; `tokens` is the number of placeholder ids it takes.
    """

    data: bytes
    grid: tuple[int, int, int]
    tokens: int


@dataclass(frozen=True)
class CallSpan:
    """Where a tool call lies in the ids of a policy segment, as half-open token indices.

    `opened` is the index just past the opening tag: the fork point. It is None where a token merges the
    tag with following text, so that no prefix can end there. `end` is past the closing tag, or the
    segment's end for a call that never closes.
    """

    start: int
    opened: int | None
    end: int

    def shifted(self, by: int) -> "CallSpan":
        """The same call in a run of tokens that begins `by` tokens earlier."""
        return CallSpan(self.start + by, None if self.opened is None else self.opened + by, self.end + by)


@dataclass(frozen=True)
class ToolUse:
    """A call that was run: the tool, "" where it names none that is offered, and what went wrong, None for nothing.

    `fault` is one of `axpo.tools.base.Fault`, or `SYSTEM_FAULT`.
    """

    name: str
    fault: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a rollout ended. `reward` is None where it was not decided: such a rollout is void."""

    stop: StopReason
    reward: float | None = None
    answer: str = ""
    decided_by: str = ""  # the rule that decided, or the reason why the rollout is void
    critique: str = ""  # what a second attempt is told (rltf)
    uses: tuple[ToolUse, ...] = ()  # calls whose results no segment holds, as the rollout ended with them

    @property
    def void(self) -> bool:
        return self.reward is None


@dataclass(frozen=True)
class Credit:
    """A segment's share in one term of the loss: its advantage, and the trained tokens of its whole stream.

    A stream is what one term of eq. 5 averages over: a rollout, a source prefix or a continuation.
    """

    advantage: float
    stream_tokens: int


@dataclass(eq=False)
class Segment:
    """A run of tokens with one author.

    `logprobs` (policy only) are under the sampling distribution; NaN where the tokens were not sampled after this
    path. `entropies` (policy only, where they were asked for) are those of the distributions that the tokens were
    drawn from, in nats. `thought` is the index just past the thinking, None where it does not end in this segment.
    `uses` (observations only) are the calls that it answers, in order.
    """

    kind: Kind
    ids: Ids
    logprobs: Floats | None = None
    images: tuple[Image, ...] = ()
    calls: tuple[CallSpan, ...] = ()
    resampled: int = 0  # 1, 2, …: here begins a continuation of the tree's first, second, … resampling
    outcome: Outcome | None = None
    credits: tuple[Credit, ...] = ()  # one for each stream that holds the segment
    entropies: Floats | None = None
    thought: int | None = None
    uses: tuple[ToolUse, ...] = ()
    parent: "Segment | None" = field(default=None, repr=False)
    children: "list[Segment]" = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def path(self) -> "list[Segment]":
        """The segments from the root down to this one."""
        segments: list[Segment] = []
        segment: Segment | None = self
        while segment is not None:
            segments.append(segment)
            segment = segment.parent
        return segments[::-1]

    @property
    def in_continuation(self) -> bool:
        """Whether the path down to here runs through a continuation that was drawn after a fork."""
        return any(segment.resampled for segment in self.path())

    @property
    def is_forked(self) -> bool:
        """Whether continuations were drawn after this segment."""
        return any(child.resampled for child in self.children)

    @property
    def uses_tool(self) -> bool:
        """Whether the policy opened a tool call on the path down to here, well-formed or not."""
        return any(segment.calls for segment in self.path())


@dataclass(frozen=True)
class Row:
    """One rollout laid flat, T tokens: what an engine or another framework takes."""

    ids: Ids  # (T,)
    trained: npt.NDArray[np.bool_]  # (T,) True on policy tokens
    logprobs: Floats  # (T,) 0 outside policy tokens
    advantages: Floats  # (T,) 0 where a segment has no credit
    images: tuple[Image, ...]
    outcome: Outcome | None


class RolloutTree:
    """All rollouts of one question."""

    def __init__(self, question_id: str, prompt_ids: Sequence[int] | Ids, images: Sequence[Image] = ()) -> None:
        self.question_id = question_id
        self.root = Segment(Kind.PROMPT, np.asarray(prompt_ids, dtype=np.int64), images=tuple(images))

    def append(
        self,
        parent: Segment,
        kind: Kind,
        ids: Sequence[int] | Ids,
        logprobs: Sequence[float] | Floats | None = None,
        images: Sequence[Image] = (),
        calls: Sequence[CallSpan] = (),
        resampled: int = 0,
        entropies: Sequence[float] | Floats | None = None,
        thought: int | None = None,
        uses: Sequence[ToolUse] = (),
    ) -> Segment:
        """Add a segment below `parent` and return it.

        Raises TreeError if the parent has ended, if log-probs are missing, superfluous or of another length, for
        entropies of another length, and for `uses` of what is no observation.
        """
        if parent.outcome is not None:
            raise TreeError("cannot append to a rollout that has ended")
        if kind is Kind.PROMPT:
            raise TreeError("only the root is a prompt")
        if (logprobs is not None) != (kind is Kind.POLICY):
            raise TreeError(f"{kind} segments {'need' if kind is Kind.POLICY else 'take no'} log-probs")
        if logprobs is not None and len(logprobs) != len(ids):
            raise TreeError(f"{len(ids)} ids but {len(logprobs)} log-probs")
        if entropies is not None and len(entropies) != len(ids):
            raise TreeError(f"{len(ids)} ids but {len(entropies)} entropies")
        if uses and kind is not Kind.OBSERVATION:
            raise TreeError(f"{kind} segments answer no tool calls")
        segment = Segment(
            kind,
            np.asarray(ids, dtype=np.int64),
            None if logprobs is None else np.asarray(logprobs, dtype=np.float32),
            tuple(images),
            tuple(calls),
            resampled,
            entropies=None if entropies is None else np.asarray(entropies, dtype=np.float32),
            thought=thought,
            uses=tuple(uses),
            parent=parent,
        )
        parent.children.append(segment)
        return segment

    def fork(self, segment: Segment, token_index: int) -> Segment:
        """Split a policy segment so that new continuations can be appended after its first tokens.

        `segment` itself becomes the prefix `ids[:token_index]`; the rest becomes its first child, which
        takes over the outcome and everything below. Returns the prefix. At the segment's own end
        (`token_index == len(segment)`) nothing is left to split, so one prefix may be forked twice. A call
        that the fork cuts in two stays with the prefix, where it begins, and ends there.

        Raises TreeError for a segment of another kind, an index outside 1..len(segment), or an index at
        the end of a rollout, where nothing follows.
        """
        if segment.kind is not Kind.POLICY:
            raise TreeError(f"only policy segments can be forked, not {segment.kind} ones")
        if not 1 <= token_index <= len(segment):
            raise TreeError(f"token index {token_index} is outside 1..{len(segment)}")
        if token_index == len(segment):
            if not segment.children:
                raise TreeError("nothing follows the fork point")
            return segment
        assert segment.logprobs is not None
        later = segment.thought is not None and segment.thought > token_index
        rest = Segment(
            Kind.POLICY,
            segment.ids[token_index:],
            segment.logprobs[token_index:],
            calls=tuple(call.shifted(-token_index) for call in segment.calls if call.start >= token_index),
            outcome=segment.outcome,
            credits=segment.credits,
            entropies=None if segment.entropies is None else segment.entropies[token_index:],
            thought=segment.thought - token_index if segment.thought is not None and later else None,
            parent=segment,
            children=segment.children,
        )
        for child in rest.children:
            child.parent = rest
        segment.ids = segment.ids[:token_index]
        segment.logprobs = segment.logprobs[:token_index]
        segment.entropies = None if segment.entropies is None else segment.entropies[:token_index]
        segment.thought = None if later else segment.thought
        segment.calls = tuple(_cut(call, token_index) for call in segment.calls if call.start < token_index)
        segment.outcome = None
        segment.children = [rest]
        return segment

    def segments(self) -> Iterator[Segment]:
        """All segments, depth first, each before what lies below it."""
        stack = [self.root]
        while stack:
            segment = stack.pop()
            yield segment
            stack.extend(reversed(segment.children))

    def leaves(self) -> list[Segment]:
        """The ends of the rollouts, depth first; the prompt alone is not a rollout."""
        return [s for s in self.segments() if not s.children and s is not self.root]

    def base_leaves(self) -> list[Segment]:
        """The ends of the N rollouts sampled at first, in the order of `leaves`: the group of plain GRPO."""
        return [leaf for leaf in self.leaves() if not leaf.in_continuation]

    def continuations(self, prefix: Segment) -> list[Segment]:
        """The ends of the continuations drawn after `prefix`, in the order of `leaves`."""
        return [leaf for group in self.resamplings(prefix).values() for leaf in group]

    def resamplings(self, prefix: Segment) -> "dict[int, list[Segment]]":
        """The same, apart for each resampling that began at `prefix`, by its number, in order."""
        depth = len(prefix.path())
        groups: dict[int, list[Segment]] = {}
        for leaf in self.leaves():
            path = leaf.path()
            if len(path) > depth and path[depth - 1] is prefix and path[depth].resampled:
                groups.setdefault(path[depth].resampled, []).append(leaf)
        return dict(sorted(groups.items()))

    def rows(self) -> list[Row]:
        """Every rollout laid flat, in the order of `leaves`. Shared tokens are repeated in each row."""
        return [_row(leaf) for leaf in self.leaves()]


def scored(leaves: Iterable[Segment]) -> list[tuple[Segment, float]]:
    """The leaves that have a reward, each with it; void ones are left out.

    Raises TreeError for a rollout that has not ended.
    """
    pairs = []
    for leaf in leaves:
        if leaf.outcome is None:
            raise TreeError("a rollout has not ended: its last segment has no outcome")
        if leaf.outcome.reward is not None:
            pairs.append((leaf, leaf.outcome.reward))
    return pairs


def _cut(call: CallSpan, length: int) -> CallSpan:
    opened = None if call.opened is None or call.opened > length else call.opened
    return CallSpan(call.start, opened, min(call.end, length))


def _row(leaf: Segment) -> Row:
    path = leaf.path()

    def spread(values: "list[Floats]") -> Floats:
        return np.concatenate(values).astype(np.float32)

    return Row(
        ids=np.concatenate([s.ids for s in path]),
        trained=np.concatenate([np.full(len(s), s.kind is Kind.POLICY) for s in path]),
        logprobs=spread([np.zeros(len(s), np.float32) if s.logprobs is None else s.logprobs for s in path]),
        advantages=spread([np.full(len(s), s.credits[0].advantage if s.credits else 0.0, np.float32) for s in path]),
        images=tuple(image for s in path for image in s.images),
        outcome=leaf.outcome,
    )
