import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from axpo.tree import (
    CallSpan,
    Credit,
    Image,
    Kind,
    Outcome,
    RolloutTree,
    Segment,
    StopReason,
    ToolUse,
    TreeError,
    scored,
)

RIGHT = Outcome(StopReason.ANSWER, 1.0, "7", "exact")
WRONG = Outcome(StopReason.ANSWER, 0.0, "8", "exact")
VOID = Outcome(StopReason.VOID, None, "", "search is down")


def two_rollouts() -> tuple[RolloutTree, Segment, Segment]:
    """A prompt, a rollout with a tool call, and one without. Ids count up, so that the order shows."""
    tree = RolloutTree("q", [1, 2], [Image(b"prompt", (1, 2, 2), 1)])
    call = tree.append(tree.root, Kind.POLICY, [10, 11, 12, 13, 14], [-1, -2, -3, -4, -5], calls=[CallSpan(1, 2, 5)])
    seen = tree.append(call, Kind.OBSERVATION, [20, 21], images=[Image(b"crop", (1, 4, 2), 2)])
    answer = tree.append(seen, Kind.POLICY, [30], [-0.5])
    answer.outcome = RIGHT
    plain = tree.append(tree.root, Kind.POLICY, [40, 41], [-6, -7])
    plain.outcome = WRONG
    return tree, call, plain


def test_rows_lay_each_rollout_flat():
    tree, call, _ = two_rollouts()
    call.credits = (Credit(0.25, 6),)
    first, second = tree.rows()
    assert first.ids.tolist() == [1, 2, 10, 11, 12, 13, 14, 20, 21, 30]
    assert first.ids.dtype == np.int64
    assert first.trained.tolist() == [False] * 2 + [True] * 5 + [False] * 2 + [True]
    assert first.logprobs.tolist() == [0, 0, -1, -2, -3, -4, -5, 0, 0, -0.5]
    assert first.advantages.tolist() == [0, 0, 0.25, 0.25, 0.25, 0.25, 0.25, 0, 0, 0]
    assert [image.data for image in first.images] == [b"prompt", b"crop"]
    assert first.outcome == RIGHT
    assert second.ids.tolist() == [1, 2, 40, 41]
    assert [image.data for image in second.images] == [b"prompt"]
    assert second.outcome == WRONG


def test_a_prompt_alone_is_no_rollout():
    assert RolloutTree("q", [1]).leaves() == []


def test_fork_splits_a_segment_and_leaves_the_old_rollout_as_it_was():
    tree, call, plain = two_rollouts()
    call.credits = (Credit(0.25, 6),)
    before = [row.ids.tolist() for row in tree.rows()]
    prefix = tree.fork(call, 2)
    (rest,) = prefix.children
    assert prefix is call
    assert (prefix.ids.tolist(), rest.ids.tolist()) == ([10, 11], [12, 13, 14])
    assert prefix.logprobs is not None
    assert rest.logprobs is not None
    assert (prefix.logprobs.tolist(), rest.logprobs.tolist()) == ([-1, -2], [-3, -4, -5])
    assert (prefix.calls, rest.calls) == ((CallSpan(1, 2, 2),), ())
    assert rest.credits == prefix.credits == (Credit(0.25, 6),)
    assert rest.parent is prefix
    assert rest.children[0].parent is rest
    assert [row.ids.tolist() for row in tree.rows()] == before
    assert tree.leaves()[-1] is plain


def test_fork_moves_the_outcome_of_a_leaf_to_its_rest():
    tree, _, plain = two_rollouts()
    prefix = tree.fork(plain, 1)
    assert prefix.outcome is None
    assert prefix.children[0].outcome == WRONG


def test_fork_at_the_end_of_a_prefix_changes_nothing():
    tree, call, _ = two_rollouts()
    prefix = tree.fork(call, 2)
    children = list(prefix.children)
    assert tree.fork(prefix, 2) is prefix
    assert prefix.children == children


def test_fork_before_and_inside_the_opening_tag():
    tree, call, _ = two_rollouts()
    call.calls = (CallSpan(1, 3, 4), CallSpan(4, 5, 5))
    prefix = tree.fork(call, 2)  # inside the opening tag of the first call, which so has none
    assert prefix.calls == (CallSpan(1, None, 2),)
    assert prefix.children[0].calls == (CallSpan(2, 3, 3),)
    tree.fork(prefix, 1)
    assert prefix.calls == ()
    assert prefix.children[0].calls == (CallSpan(0, None, 1),)


@pytest.mark.parametrize("index", [0, -1, 6])
def test_fork_outside_a_segment(index: int):
    tree, call, _ = two_rollouts()
    with pytest.raises(TreeError, match=rf"token index {index} is outside 1\.\.5"):
        tree.fork(call, index)


def test_fork_needs_policy_tokens_and_something_after_it():
    tree, call, plain = two_rollouts()
    with pytest.raises(TreeError, match="only policy segments can be forked, not prompt ones"):
        tree.fork(tree.root, 1)
    with pytest.raises(TreeError, match="not observation ones"):
        tree.fork(call.children[0], 1)
    with pytest.raises(TreeError, match="nothing follows"):
        tree.fork(plain, 2)


def test_append_refuses_what_makes_no_rollout():
    tree, call, plain = two_rollouts()
    with pytest.raises(TreeError, match="has ended"):
        tree.append(plain, Kind.OBSERVATION, [1])
    with pytest.raises(TreeError, match="only the root is a prompt"):
        tree.append(call, Kind.PROMPT, [1])
    with pytest.raises(TreeError, match="2 ids but 1 log-probs"):
        tree.append(call, Kind.POLICY, [1, 2], [-1.0])
    with pytest.raises(TreeError, match="policy segments need log-probs"):
        tree.append(call, Kind.POLICY, [1])
    with pytest.raises(TreeError, match="observation segments take no log-probs"):
        tree.append(call, Kind.OBSERVATION, [1], [-1.0])
    with pytest.raises(TreeError, match="policy segments answer no tool calls"):
        tree.append(call, Kind.POLICY, [1], [-1.0], uses=[ToolUse("zoom")])
    assert len(list(tree.segments())) == 5


def test_base_leaves_and_continuations():
    tree, call, plain = two_rollouts()
    old = tree.leaves()[0]
    prefix = tree.fork(call, 2)
    new = [tree.append(prefix, Kind.POLICY, [i], [-1.0], resampled=1) for i in (50, 60)]
    seen = tree.append(new[1], Kind.OBSERVATION, [61])
    end = tree.append(seen, Kind.POLICY, [62], [-1.0])
    assert tree.base_leaves() == [old, plain]
    assert tree.continuations(prefix) == [new[0], end]
    assert tree.continuations(plain) == []
    assert [leaf.uses_tool for leaf in (old, new[0], end, plain)] == [True, True, True, False]


def test_scored_leaves_out_the_void_and_refuses_the_unfinished():
    tree, _, plain = two_rollouts()
    assert scored(tree.leaves()) == [(tree.leaves()[0], 1.0), (plain, 0.0)]
    plain.outcome = VOID
    assert scored(tree.leaves()) == [(tree.leaves()[0], 1.0)]
    plain.outcome = None
    with pytest.raises(TreeError, match="has not ended"):
        scored(tree.leaves())


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 9), st.booleans()), max_size=8))
def test_forks_keep_every_old_rollout_and_every_token_once(forks: list[tuple[int, int, bool]]):
    tree, _, _ = two_rollouts()
    old = tree.rows()
    owned = sum(map(len, tree.segments()))
    for which, index, resample in forks:
        policy = [s for s in tree.segments() if s.kind is Kind.POLICY and (len(s) > 1 or s.children)]
        segment = policy[which % len(policy)]
        index = 1 + index % (len(segment) - (not segment.children))
        prefix = tree.fork(segment, index)
        if resample:
            tree.append(prefix, Kind.POLICY, [90, 91], [-1, -2], resampled=1).outcome = VOID
            owned += 2
    base = tree.base_leaves()
    rows = [row for leaf, row in zip(tree.leaves(), tree.rows(), strict=True) if leaf in base]
    assert len(rows) == len(old)
    for before, after in zip(old, rows, strict=True):
        assert before.ids.tolist() == after.ids.tolist()
        assert before.logprobs.tolist() == after.logprobs.tolist()
        assert before.trained.tolist() == after.trained.tolist()
        assert (before.images, before.outcome) == (after.images, after.outcome)
    assert sum(map(len, tree.segments())) == owned
    assert all(child.parent is segment for segment in tree.segments() for child in segment.children)
    assert all(0 <= c.start < c.end <= len(s) for s in tree.segments() for c in s.calls)
    assert {c.opened for s in tree.segments() for c in s.calls} <= {None, *range(1, 6)}


def test_the_core_imports_without_transformers():
    """In a fresh interpreter; tree, fork and credit need no torch either. (A stand-in spares the loss two seconds.)"""
    script = (
        "import sys, types, axpo.tree, axpo.fork, axpo.credit; assert 'torch' not in sys.modules;"
        "sys.modules['torch'] = types.SimpleNamespace(Tensor=object);"
        "import axpo.loss, axpo.methods; assert 'transformers' not in sys.modules; print('pure')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("pure\n", "")
