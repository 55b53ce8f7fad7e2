"""The Thinking-Acting Gap, measured on rollout trees alone (AXPO, arXiv 2605.28774, section 1)."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from axpo.tree import Kind, RolloutTree, Segment, StopReason, scored

Figures = dict[str, float | int | None]

_LIMITS = (StopReason.TURNS, StopReason.TOKENS, StopReason.IMAGES)
ROUNDING = 1e-9  # advantages that cancel out over several streams may leave so much


def mean(values: Iterable[float]) -> float | None:
    """The mean, or None of nothing: a share of no rollouts is not 0."""
    values = list(values)
    return sum(values) / len(values) if values else None


def measure(trees: Sequence[RolloutTree], threshold: float = 0.5) -> Figures:
    """The figures of one step; a rollout is right from the reward `threshold` on. None where nothing counts.

    Over the N rollouts of each group that were sampled at first, void ones left out:

    - `accuracy`, `tool_use`: shares of rollouts; `accuracy_tool`, `accuracy_no_tool`: of those with and without a call.
    - `all_wrong_tool`, `all_wrong_no_tool`: the share of groups in which that subgroup is entirely wrong, among those
      where it is not empty.
    - `one_outcome`: the share of groups with one reward for all, in which plain GRPO finds nothing to learn.
    - `call_tokens_positive`, `_zero`, `_negative`: shares of the tokens of calls by their advantage (`call_shares`).
    - `truncated`: the share of rollouts that a limit ended, on turns, tokens or images. Their reward is 0.
    - `turns_per_rollout`, `tokens_per_rollout`: means; a turn ends with an observation or the rollout, tokens are those
      of the policy.

    Over all that was drawn: `forked`, how many resamplings there were, and `recovered`, in how many of them a
    continuation is right (from scratch, only one that uses a tool); `second_attempts`, and how many are right (rltf);
    `resampled_call_tokens_positive`, `_zero`, `_negative`; `rollouts`, continuations included, and how many are `void`;
    `generated_tokens`; and what `tool_errors` counts.
    """
    groups = [scored(tree.base_leaves()) for tree in trees]
    tool = [[reward >= threshold for leaf, reward in group if leaf.uses_tool] for group in groups]
    none = [[reward >= threshold for leaf, reward in group if not leaf.uses_tool] for group in groups]
    ends = [leaf for group in groups for leaf, _ in group]
    paths = [leaf.path() for leaf in ends]
    later = [leaves for tree in trees for leaves in resamplings_of(tree)]
    second = [scored(leaves) for leaves in later if is_second_attempt(leaves[0])]
    resamplings = [scored(leaves) for leaves in later if not is_second_attempt(leaves[0])]
    base = {segment for path in paths for segment in path}
    drawn_later = {segment for leaves in later for leaf in leaves for segment in leaf.path()} - base
    return {
        "accuracy": mean(right for right in _flat(tool) + _flat(none)),
        "tool_use": mean([1.0] * len(_flat(tool)) + [0.0] * len(_flat(none))),
        "accuracy_tool": mean(_flat(tool)),
        "accuracy_no_tool": mean(_flat(none)),
        "all_wrong_tool": mean(not any(group) for group in tool if group),
        "all_wrong_no_tool": mean(not any(group) for group in none if group),
        "one_outcome": mean(len({reward for _, reward in group}) == 1 for group in groups if group),
        **call_shares("call_tokens", base),
        **call_shares("resampled_call_tokens", drawn_later),
        "truncated": mean(bool(leaf.outcome and leaf.outcome.stop in _LIMITS) for leaf in ends),
        "turns_per_rollout": mean(1 + sum(s.kind is Kind.OBSERVATION for s in path) for path in paths),
        "tokens_per_rollout": mean(sum(len(s) for s in path if s.kind is Kind.POLICY) for path in paths),
        "forked": len(resamplings),
        "recovered": sum(any(r >= threshold and _acted(leaf) for leaf, r in group) for group in resamplings),
        "second_attempts": sum(map(len, second)),
        "second_attempts_right": sum(reward >= threshold for group in second for _, reward in group),
        "rollouts": sum(len(tree.leaves()) for tree in trees),
        "void": sum(leaf.outcome is not None and leaf.outcome.void for tree in trees for leaf in tree.leaves()),
        "generated_tokens": sum(len(s) for tree in trees for s in tree.segments() if s.kind is Kind.POLICY),
        **tool_errors(trees),
    }


def _acted(leaf: Segment) -> bool:
    """Whether a continuation may count as a recovery: from the prompt it must come to a call by itself."""
    return leaf.uses_tool or not leaf.path()[1].resampled


def is_second_attempt(leaf: Segment) -> bool:
    """Whether nobody sampled this rollout after its prompt: it was written with a critique at hand (rltf)."""
    logprobs = leaf.path()[1].logprobs
    return logprobs is not None and bool(np.isnan(logprobs).any())


def call_shares(name: str, segments: Iterable[Segment]) -> dict[str, float | None]:
    """The shares of the tokens of tool calls that have a positive, no, or a negative advantage, named by their sign.

    Only trained tokens count: not the failed end of a source, for one. A token that several streams hold has the sum of
    its credits. None where there is no call.
    """
    tokens = {"positive": 0, "zero": 0, "negative": 0}
    for segment in (segment for segment in segments if segment.credits):
        advantage = sum(credit.advantage for credit in segment.credits)
        sign = "zero" if abs(advantage) < ROUNDING else "positive" if advantage > 0 else "negative"
        tokens[sign] += call_tokens(segment)
    total = sum(tokens.values())
    return {f"{name}_{sign}": count / total if total else None for sign, count in tokens.items()}


def call_tokens(segment: Segment) -> int:
    """How many tokens of a segment belong to tool calls, the tags included.

    What follows a fork at a call's opening tag begins inside the call. Where that call ends is not kept: it is taken to
    reach to the next call, or to the end of the turn, whose last token is the stop token.
    """
    tokens = sum(call.end - call.start for call in segment.calls)
    parent = segment.parent
    if segment.kind is Kind.POLICY and parent is not None and parent.calls and parent.calls[-1].end == len(parent):
        tokens += segment.calls[0].start if segment.calls else max(0, len(segment) - 1)
    return tokens


def tool_errors(trees: Sequence[RolloutTree]) -> dict[str, int]:
    """How often tools were called, continuations included, and what went wrong.

    `tool_calls`, `tool_errors`, and of the errors that occurred `errors_TOOL_FAULT`, or `errors_FAULT` where the call
    names no tool. FAULT is one of `axpo.tools.base.Fault`, or "system" where the tool could not be reached.
    """
    segments = [segment for tree in trees for segment in tree.segments()]
    uses = [use for segment in segments for use in segment.uses]
    uses += [use for segment in segments if segment.outcome for use in segment.outcome.uses]
    errors = Counter("_".join(filter(None, ("errors", use.name, use.fault))) for use in uses if use.fault)
    return {"tool_calls": len(uses), "tool_errors": errors.total(), **dict(sorted(errors.items()))}


def resamplings_of(tree: RolloutTree) -> list[list[Segment]]:
    """The ends of the continuations of each resampling in the tree."""
    return [leaves for segment in tree.segments() if segment.is_forked for leaves in tree.resamplings(segment).values()]


def _flat(groups: Sequence[Sequence[bool]]) -> list[bool]:
    return [right for group in groups for right in group]
