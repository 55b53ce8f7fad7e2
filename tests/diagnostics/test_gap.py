import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axpo.credit import credit_axpo, credit_grpo
from axpo.diagnostics.gap import call_tokens, mean, measure
from axpo.tree import CallSpan, Credit, Kind, Outcome, RolloutTree, Segment, StopReason, ToolUse, TreeError

CALL = CallSpan(1, 2, 4)  # of a first turn of 5 tokens, the last of which stops it
SIGNS = ("positive", "zero", "negative")


def end(segment: Segment, reward: float | None) -> Segment:
    segment.outcome = Outcome(StopReason.VOID if reward is None else StopReason.ANSWER, reward)
    return segment


def with_tool(tree: RolloutTree, reward: float | None, *uses: ToolUse) -> Segment:
    """5 policy tokens with a call, an observation, 2 policy tokens. Returns the first segment."""
    first = tree.append(tree.root, Kind.POLICY, [7] * 5, [-1.0] * 5, calls=[CALL])
    seen = tree.append(first, Kind.OBSERVATION, [8, 8, 8], uses=uses or [ToolUse("zoom")])
    end(tree.append(seen, Kind.POLICY, [9, 9], [-1.0] * 2), reward)
    return first


def without(tree: RolloutTree, reward: float | None) -> Segment:
    return end(tree.append(tree.root, Kind.POLICY, [7] * 3, [-1.0] * 3), reward)


def resample(tree: RolloutTree, source: Segment, rewards: list[float | None]) -> None:
    """Fork just past the opening tag, and draw continuations: two more tokens of the call, and the stop token."""
    prefix = tree.fork(source, 2)
    for reward in rewards:
        end(tree.append(prefix, Kind.POLICY, [5] * 3, [-1.0] * 3, resampled=1), reward)


def new_tree() -> RolloutTree:
    return RolloutTree("q", [1, 2, 3, 4])


def shares(trees: list[RolloutTree], name: str) -> list[object]:
    figures = measure(trees)
    return [figures[f"{name}_{sign}"] for sign in SIGNS]


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
        "one_outcome": 1 / 3,  # c
        "truncated": 0.0,
        "call_tokens_positive": None,  # nothing is credited
        "call_tokens_zero": None,
        "call_tokens_negative": None,
        "second_attempts": 0,
        "second_attempts_right": 0,
        "resampled_call_tokens_positive": None,
        "resampled_call_tokens_zero": None,
        "resampled_call_tokens_negative": None,
        "turns_per_rollout": (4 * 2 + 4 * 1) / 8,
        "tokens_per_rollout": (4 * 7 + 4 * 3) / 8,
        "forked": 2,
        "recovered": 1,
        "rollouts": 8 + 4 + 1,
        "void": 2,
        # a: three calls, a plain one, four continuations; b; c. Prompts and observations are not generated.
        "generated_tokens": (3 * 7 + 3 + 4 * 3) + (2 * 7 + 2 * 3) + 3,
        "tool_calls": 5,
        "tool_errors": 0,
    }


def test_truncated_are_the_rollouts_that_a_limit_ended():
    tree = new_tree()
    for stop in StopReason:
        reward = {StopReason.ANSWER: 1.0, StopReason.VOID: None}.get(stop, 0.0)
        without(tree, reward).outcome = Outcome(stop, reward)
    assert measure([tree])["truncated"] == 3 / 4  # of turns, tokens, images and an answer


def test_nothing_is_none_and_not_zero():
    tree = new_tree()
    with_tool(tree, None)
    figures = measure([tree])
    counts = ("forked", "recovered", "rollouts", "void", "generated_tokens", "tool_calls", "tool_errors")
    second = ("second_attempts", "second_attempts_right")
    assert {name for name, figure in figures.items() if figure is not None} == {*counts, *second}
    assert [figures[name] for name in (*counts, *second)] == [0, 0, 1, 1, 7, 1, 0, 0, 0]
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
    same = ("accuracy", "tool_use", "accuracy_tool", "all_wrong_tool", "turns_per_rollout", "tokens_per_rollout")
    assert [after[name] for name in same] == [before[name] for name in same]
    assert (after["forked"], after["recovered"], after["rollouts"]) == (1, 1, 3)


def test_the_threshold_divides_graded_rewards():
    tree = new_tree()
    resample(tree, with_tool(tree, 0.4), [0.3, 0.6])
    without(tree, 0.6)
    names = ("accuracy", "all_wrong_tool", "recovered", "one_outcome")
    assert [measure([tree])[name] for name in names] == [0.5, 1.0, 1, 0.0]
    assert [measure([tree], 0.4)[name] for name in names] == [1.0, 0.0, 1, 0.0]
    assert [measure([tree], 0.7)[name] for name in names] == [0.0, 1.0, 0, 0.0]


def test_every_resampling_counts_also_those_from_scratch():
    tree = new_tree()
    source = with_tool(tree, 0.0)
    for number, reward in (1, 0.0), (1, 1.0), (2, 0.0), (3, None), (5, 1.0):
        calls = [CallSpan(0, 1, 2)] if number == 5 else []
        end(tree.append(tree.root, Kind.POLICY, [5, 5], [-1.0] * 2, calls=calls, resampled=number), reward)
    prefix = tree.fork(source, 2)
    end(tree.append(prefix, Kind.POLICY, [5], [-1.0], resampled=4), 1.0)
    figures = measure([tree])
    # The first is right without a tool, which is no recovery of a call; the fourth and the fifth are.
    assert (figures["forked"], figures["recovered"], figures["void"]) == (5, 2, 1)
    assert (figures["accuracy"], figures["rollouts"]) == (0.0, 7)


def test_second_attempts_are_no_resamplings():
    tree = new_tree()
    without(tree, 0.0)
    for number, reward in (1, 1.0), (2, 0.0):
        end(tree.append(tree.root, Kind.POLICY, [5, 5], [math.nan] * 2, resampled=number), reward)
    figures = measure([tree])
    assert (figures["forked"], figures["recovered"]) == (0, 0)
    assert (figures["second_attempts"], figures["second_attempts_right"]) == (2, 1)


def test_a_group_of_one_outcome_has_one_reward_void_ones_aside():
    right, mixed, void = new_tree(), new_tree(), new_tree()
    without(right, 1.0), with_tool(right, 1.0), without(right, None)
    without(mixed, 1.0), with_tool(mixed, 0.0)
    without(void, None)
    assert measure([right, mixed, void])["one_outcome"] == 1 / 2


# The signal on tool calls -------------------------------------------------------------------------------------------


def test_golden_signs_of_the_paper_where_a_rollout_without_a_tool_is_right():
    """Rewards 0 with a tool, 1 and 0 without: GRPO pushes every token of the call down. AXPO, which finds a right
    continuation, reads 1, 1, 0: the opening tag goes up, and the rest of the failed call is not trained."""
    plain, forked = new_tree(), new_tree()
    for tree in plain, forked:
        source = with_tool(tree, 0.0)
        without(tree, 1.0), without(tree, 0.0)
    credit_grpo(plain)
    assert shares([plain], "call_tokens") == [0.0, 0.0, 1.0]
    assert shares([plain], "resampled_call_tokens") == [None] * 3
    resample(forked, source, [0.0, 1.0])
    credit_axpo(forked)
    assert shares([forked], "call_tokens") == [1.0, 0.0, 0.0]
    assert shares([forked], "resampled_call_tokens") == [0.5, 0.0, 0.5]


def test_a_group_that_fails_as_a_whole_gives_its_calls_no_advantage():
    tree = new_tree()
    with_tool(tree, 0.0), without(tree, 0.0)
    credit_grpo(tree)
    assert shares([tree], "call_tokens") == [0.0, 1.0, 0.0]


def test_a_token_of_several_streams_has_the_sum_of_its_credits():
    trees = []
    for advantages in (0.1, 0.2, -0.3), (1.0, -0.5), (-1.0, 0.5), ():  # 0.1 + 0.2 - 0.3 is not 0 in binary
        tree = new_tree()
        with_tool(tree, 0.0).credits = tuple(Credit(advantage, 7) for advantage in advantages)
        trees.append(tree)
    assert shares(trees, "call_tokens") == [1 / 3, 1 / 3, 1 / 3]  # what has no credit is not trained


def test_calls_of_void_rollouts_do_not_count():
    tree = new_tree()
    with_tool(tree, 1.0), with_tool(tree, None), without(tree, 0.0)
    credit_grpo(tree)
    assert shares([tree], "call_tokens") == [1.0, 0.0, 0.0]


@st.composite
def turns(draw: st.DrawFn) -> tuple[int, list[CallSpan]]:
    """The length of a turn, its stop token included, and its calls: an opening tag, at least one more token."""
    place, calls = draw(st.integers(1, 3)), []
    for _ in range(draw(st.integers(1, 3))):
        length = draw(st.integers(2, 4))
        calls.append(CallSpan(place, place + 1, place + length))
        place += length + draw(st.integers(0, 2))
    return calls[-1].end + 1, calls


@given(turns(), st.data())
def test_a_fork_hides_no_token_of_a_call(turn: tuple[int, list[CallSpan]], data: st.DataObject):
    """Exactly, where one call ends with the turn; of several, what lies between two counts with the one before."""
    length, calls = turn
    tree = new_tree()
    source = tree.append(tree.root, Kind.POLICY, [7] * length, [-1.0] * length, calls=calls)
    end(tree.append(tree.append(source, Kind.OBSERVATION, [8]), Kind.POLICY, [9], [-1.0]), 0.0)
    before = call_tokens(source)
    index = data.draw(st.integers(0, len(calls) - 1))
    tree.fork(source, calls[index].start + 1)
    between = calls[index + 1].start - calls[index].end if index + 1 < len(calls) else 0
    assert sum(map(call_tokens, tree.segments())) == before + between


# Tools --------------------------------------------------------------------------------------------------------------


def test_errors_are_told_apart_by_tool_and_kind():
    tree = new_tree()
    source = with_tool(tree, 0.0, ToolUse("python", "timeout"), ToolUse("zoom"))
    with_tool(tree, 0.0, ToolUse("python", "timeout"))
    with_tool(tree, 0.0, ToolUse("python", "raised"), ToolUse("", "unknown_tool"))
    lost = tree.append(tree.root, Kind.POLICY, [7] * 5, [-1.0] * 5, calls=[CALL])
    lost.outcome = Outcome(StopReason.VOID, uses=(ToolUse("zoom"), ToolUse("search", "system")))
    resample(tree, source, [0.0])
    (continued,) = tree.continuations(source)
    continued.outcome = Outcome(StopReason.IMAGES, 0.0, uses=(ToolUse("zoom"),))
    figures = measure([tree])
    assert {name: figure for name, figure in figures.items() if "error" in name or name == "tool_calls"} == {
        "tool_calls": 8,
        "tool_errors": 5,
        "errors_python_raised": 1,
        "errors_python_timeout": 2,
        "errors_search_system": 1,
        "errors_unknown_tool": 1,
    }


def test_a_prefix_is_forked_when_a_continuation_was_drawn():
    tree = new_tree()
    source = with_tool(tree, 0.0)
    assert not source.is_forked
    tree.fork(source, 2)
    assert not source.is_forked
    resample(tree, source, [0.0])
    assert [segment for segment in tree.segments() if segment.is_forked] == [source]


def test_a_rollout_that_has_not_ended_is_refused():
    tree = new_tree()
    tree.append(tree.root, Kind.POLICY, [1], [-1.0])
    with pytest.raises(TreeError, match="has not ended"):
        measure([tree])


def test_what_trees_alone_tell_is_told_without_torch():
    script = (
        "import sys, axpo.diagnostics.gap, axpo.diagnostics.alarms, axpo.diagnostics.coverage;"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("set()\n", "")
