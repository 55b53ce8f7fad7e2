"""The Thinking-Acting Gap, measured on rollout trees alone (AXPO, arXiv 2605.28774, section 1)."""

from collections.abc import Iterable, Sequence

from axpo.tree import Kind, RolloutTree, Segment, scored


def mean(values: Iterable[float]) -> float | None:
    """The mean, or None of nothing: a share of no rollouts is not 0."""
    values = list(values)
    return sum(values) / len(values) if values else None


def measure(trees: Sequence[RolloutTree]) -> dict[str, float | int | None]:
    """The figures of one step, over the base rollouts of each group; void ones count in `void` alone.

    `accuracy`, `tool_use`: shares of rollouts. `accuracy_tool`, `accuracy_no_tool`: of those with and without a
    tool call. `all_wrong_tool`, `all_wrong_no_tool`: the share of groups, among those where that subgroup is not
    empty, in which it is entirely wrong. `forked` prefixes and how many were `recovered`. None where nothing
    counts.
    """
    groups = [scored(tree.base_leaves()) for tree in trees]
    tool = [[reward > 0 for leaf, reward in group if leaf.uses_tool] for group in groups]
    none = [[reward > 0 for leaf, reward in group if not leaf.uses_tool] for group in groups]
    prefixes = [(tree, s) for tree in trees for s in tree.segments() if is_forked(s)]
    resampled = [scored(tree.continuations(prefix)) for tree, prefix in prefixes]
    return {
        "accuracy": mean(right for right in _flat(tool) + _flat(none)),
        "tool_use": mean([1.0] * len(_flat(tool)) + [0.0] * len(_flat(none))),
        "accuracy_tool": mean(_flat(tool)),
        "accuracy_no_tool": mean(_flat(none)),
        "all_wrong_tool": mean(not any(group) for group in tool if group),
        "all_wrong_no_tool": mean(not any(group) for group in none if group),
        "forked": len(prefixes),
        "recovered": sum(any(reward > 0 for _, reward in group) for group in resampled),
        "rollouts": sum(len(tree.leaves()) for tree in trees),
        "void": sum(leaf.outcome is not None and leaf.outcome.void for tree in trees for leaf in tree.leaves()),
        "generated_tokens": sum(len(s) for tree in trees for s in tree.segments() if s.kind is Kind.POLICY),
    }


def is_forked(segment: Segment) -> bool:
    """Whether continuations were drawn after this segment."""
    return any(child.resampled for child in segment.children)


def _flat(groups: Sequence[Sequence[bool]]) -> list[bool]:
    return [right for group in groups for right in group]
