import pytest

from axpo.diagnostics.gap import is_forked, mean, measure
from axpo.tree import CallSpan, Kind, Outcome, RolloutTree, Segment, StopReason, TreeError

CALL = CallSpan(1, 2, 4)  # of a first turn of 5 tokens


def end(segment: Segment, reward: float | None) -> Segment:
    segment.outcome = Outcome(StopReason.VOID if reward is None else StopReason.ANSWER, reward)
    return segment


def with_tool(tree: RolloutTree, reward: float | None) -> Segment:
    """5 policy tokens with a call, an observation, 2 policy tokens. Returns the first segment."""
    first = tree.append(tree.root, Kind.POLICY, [7] * 5, [-1.0] * 5, calls=[CALL])
    end(tree.append(tree.append(first, Kind.OBSERVATION, [8, 8, 8]), Kind.POLICY, [9, 9], [-1.0] * 2), reward)
    return first


def without(tree: RolloutTree, reward: float | None) -> Segment:
    return end(tree.append(tree.root, Kind.POLICY, [7] * 3, [-1.0] * 3), reward)


def resample(tree: RolloutTree, source: Segment, rewards: list[float | None]) -> None:
    """Fork just past the opening tag, and draw continuations of one token."""
    prefix = tree.fork(source, 2)
    for reward in rewards:
        end(tree.append(prefix, Kind.POLICY, [5], [-1.0], resampled=True), reward)


def new_tree() -> RolloutTree:
    return RolloutTree("q", [1, 2, 3, 4])


def test_golden_figures_of_a_step():
    a = new_tree()  # tool: wrong, wrong, void; no tool: right
    sources = [with_tool(a, 0.0), with_tool(a, 0.0)]
    with_tool(a, None)
    without(a, 1.0)
    resample(a, sources[0], [0.0, 1.0])
    resample(a, sources[1], [0.0, None])
    b = new_tree()  # tool: right, wrong; no tool: wrong, wrong
    with_tool(b, 1.0), with_tool(b, 0.0), without(b, 0.0), without(b, 0.0)
    c = new_tree()  # no tool: wrong
    without(c, 0.0)
    assert measure([a, b, c]) == {
        "accuracy": 2 / 8,
        "tool_use": 4 / 8,
        "accuracy_tool": 1 / 4,
        "accuracy_no_tool": 1 / 4,
        "all_wrong_tool": 1 / 2,  # of a and b, a
        "all_wrong_no_tool": 2 / 3,  # of a, b and c: b and c
        "forked": 2,
        "recovered": 1,
        "rollouts": 8 + 4 + 1,
        "void": 2,
        # a: three calls, a plain one, four continuations; b; c. Prompts and observations are not generated.
        "generated_tokens": (3 * 7 + 3 + 4) + (2 * 7 + 2 * 3) + 3,
    }


def test_nothing_is_none_and_not_zero():
    tree = new_tree()
    with_tool(tree, None)
    figures = measure([tree])
    shares = ("accuracy", "tool_use", "accuracy_tool", "accuracy_no_tool", "all_wrong_tool", "all_wrong_no_tool")
    assert {name: figures[name] for name in shares} == dict.fromkeys(shares)
    assert (figures["void"], figures["rollouts"], figures["forked"]) == (1, 1, 0)
    assert measure([])["accuracy"] is None
    assert mean([]) is None


def test_a_subgroup_is_all_wrong_only_if_it_is_not_empty():
    tree = new_tree()
    without(tree, 1.0), with_tool(tree, 0.0)
    figures = measure([tree])
    assert (figures["all_wrong_tool"], figures["all_wrong_no_tool"]) == (1.0, 0.0)
    alone = new_tree()
    without(alone, 0.0)
    assert measure([tree, alone])["all_wrong_tool"] == 1.0


def test_what_continuations_earn_is_not_accuracy():
    tree = new_tree()
    source = with_tool(tree, 0.0)
    before = measure([tree])
    resample(tree, source, [1.0, 1.0])
    after = measure([tree])
    same = ("accuracy", "tool_use", "accuracy_tool", "all_wrong_tool")
    assert [after[name] for name in same] == [before[name] for name in same]
    assert (after["forked"], after["recovered"], after["rollouts"]) == (1, 1, 3)


def test_a_prefix_is_forked_when_a_continuation_was_drawn():
    tree = new_tree()
    source = with_tool(tree, 0.0)
    assert not is_forked(source)
    tree.fork(source, 2)
    assert not is_forked(source)
    resample(tree, source, [0.0])
    assert [segment for segment in tree.segments() if is_forked(segment)] == [source]


def test_a_rollout_that_has_not_ended_is_refused():
    tree = new_tree()
    tree.append(tree.root, Kind.POLICY, [1], [-1.0])
    with pytest.raises(TreeError, match="has not ended"):
        measure([tree])
