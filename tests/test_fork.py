import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from axpo.fork import Allocation, Candidate, allocate, branch_points, candidates, open_prefix, prefix_budget
from axpo.tree import CallSpan, Kind, Outcome, RolloutTree, Segment, StopReason, TreeError

CALL = CallSpan(2, 3, 5)
PROBABILITIES = [0.5, 0.25, 0.9, 0.6, 0.3, 0.125]  # the call's own are 0.9, 0.6, 0.3


def rollout(
    tree: RolloutTree, reward: float | None, call: CallSpan | None = None, probabilities: list[float] = PROBABILITIES
) -> Segment:
    """One turn of six tokens; a tool call is answered and followed by a last turn. Returns the leaf."""
    logprobs = [math.log(p) for p in probabilities]
    end = tree.append(tree.root, Kind.POLICY, range(10, 16), logprobs, calls=[call] if call else [])
    if call:
        end = tree.append(tree.append(end, Kind.OBSERVATION, [20]), Kind.POLICY, [30], [-9.0])
    end.outcome = Outcome(StopReason.ANSWER if reward is not None else StopReason.VOID, reward)
    return end


def test_confidence_is_the_mean_probability_of_the_first_call_tags_included():
    tree = RolloutTree("q", [1])
    leaf = rollout(tree, 0.0, CALL)
    first = tree.root.children[0]
    first.calls = (CALL, CallSpan(5, None, 6))
    last = leaf
    last.calls = (CallSpan(0, 1, 1),)
    (candidate,) = candidates(tree)
    assert (candidate.leaf, candidate.segment, candidate.token_index) == (leaf, first, 3)
    assert candidate.confidence == pytest.approx((0.9 + 0.6 + 0.3) / 3, abs=1e-7)


@pytest.mark.parametrize(
    ("tool", "plain", "expected"),
    [
        ([], [0.0, 1.0], 0),  # no tool-using rollout
        ([0.0, 0.0], [0.0, 0.0], 2),
        ([0.0, 0.0], [1.0], 2),  # what the others did does not matter
        ([0.0, 1.0], [0.0], 0),  # one of the subgroup is right
        ([0.0, None], [0.0], 1),  # a void rollout is in no subgroup
        ([None], [0.0], 0),
        ([-0.5, 0.0], [], 2),
        ([0.0, 0.5], [], 0),
        ([0.0, 0.4], [], 2),
    ],
)
def test_trigger(tool: list[float | None], plain: list[float | None], expected: int):
    tree = RolloutTree("q", [1])
    for reward in tool:
        rollout(tree, reward, CALL)
    for reward in plain:
        rollout(tree, reward)
    assert len(candidates(tree)) == expected


def test_rank_is_least_confident_first_and_ties_keep_the_order_of_the_leaves():
    tree = RolloutTree("q", [1])
    leaves = [rollout(tree, 0.0, CALL, [0.5, 0.5, p, p, p, 0.5]) for p in (0.75, 0.25, 0.75, 0.5)]
    assert [c.leaf for c in candidates(tree)] == [leaves[i] for i in (1, 3, 0, 2)]
    assert [c.confidence for c in candidates(tree)] == pytest.approx([0.25, 0.5, 0.75, 0.75])


@pytest.mark.parametrize(
    "call", [CallSpan(2, None, 5), CallSpan(4, 6, 6)], ids=["merged opening tag", "nothing follows the tag"]
)
def test_a_rollout_without_a_fork_point_counts_in_the_trigger_but_is_no_candidate(call: CallSpan):
    tree = RolloutTree("q", [1])
    rollout(tree, 0.0, call)
    good = rollout(tree, 0.0, CALL)
    assert [c.leaf for c in candidates(tree)] == [good]
    tree.append(tree.root, Kind.POLICY, [1, 2], [-1, -1], calls=[call]).outcome = Outcome(StopReason.ANSWER, 1.0)
    assert candidates(tree) == []


def test_an_unfinished_rollout_is_refused():
    tree = RolloutTree("q", [1])
    rollout(tree, 0.0, CALL).outcome = None
    with pytest.raises(TreeError, match="has not ended"):
        candidates(tree)


def test_a_forked_rollout_is_no_candidate_again_and_its_continuations_are_not_of_the_group():
    tree = RolloutTree("q", [1])
    leaves = [rollout(tree, 0.0, CALL) for _ in range(2)]
    first = candidates(tree)[0]
    prefix = open_prefix(tree, first)
    tree.append(prefix, Kind.POLICY, [50], [-1.0], resampled=1).outcome = Outcome(StopReason.ANSWER, 1.0)
    assert prefix.ids.tolist() == [10, 11, 12]
    assert [c.leaf for c in candidates(tree)] == [leaves[1]]


def test_forking_one_candidate_leaves_the_others_valid():
    tree = RolloutTree("q", [1])
    for _ in range(3):
        rollout(tree, 0.0, CALL)
    before = [row.ids.tolist() for row in tree.rows()]
    prefixes = [open_prefix(tree, candidate) for candidate in candidates(tree)]
    assert [prefix.path()[-1].ids.tolist() for prefix in prefixes] == [[10, 11, 12]] * 3
    assert [row.ids.tolist() for row in tree.rows()] == before


@pytest.mark.parametrize(
    ("ratio", "questions", "rollouts", "continuations", "prefixes"),
    [
        (0.25, 16, 8, 4, 8),
        (0.25, 2, 8, 4, 1),
        (0.25, 1, 8, 4, 0),
        (0.25, 3, 5, 1, 3),  # 3.75
        (0.7, 1, 10, 7, 1),  # 0.7 is a hair less than 7/10 in binary
        (0.29, 100, 1, 1, 29),  # 28.999999999999996 in floating point
        (0.1, 3, 10, 1, 3),
        (0.0, 16, 8, 4, 0),
        (1, 4, 4, 3, 5),
    ],
)
def test_budget(ratio: float, questions: int, rollouts: int, continuations: int, prefixes: int):
    assert prefix_budget(ratio, questions, rollouts, continuations) == prefixes


def test_budget_refuses_nonsense():
    with pytest.raises(ValueError, match=r"ratio must not be negative, not -0\.5"):
        prefix_budget(-0.5, 1, 1, 1)
    with pytest.raises(ValueError, match="at least 1 continuation, not 0"):
        prefix_budget(0.5, 1, 1, 0)


@given(st.integers(0, 100), st.integers(1, 64), st.integers(1, 32), st.integers(1, 16))
def test_budget_is_never_exceeded_and_never_wasted(percent: int, questions: int, rollouts: int, k: int):
    prefixes = prefix_budget(percent / 100, questions, rollouts, k)
    assert 100 * prefixes * k <= percent * questions * rollouts < 100 * (prefixes + 1) * k


def ranked(*confidences: list[float]) -> list[list[Candidate]]:
    segment = RolloutTree("q", [1]).root
    return [[Candidate(segment, segment, 1, c, c) for c in group] for group in confidences]


def test_allocation_by_hand():
    per_tree = ranked([0.3, 0.4], [], [0.1, 0.9, 0.95], [0.3, 0.35])
    order = [(tree, candidate.confidence) for tree, candidate in allocate(per_tree, 99)]
    assert order == [(2, 0.1), (0, 0.3), (3, 0.3), (3, 0.35), (0, 0.4), (2, 0.9), (2, 0.95)]
    assert [tree for tree, _ in allocate(per_tree, 4)] == [2, 0, 3, 3]
    assert allocate(per_tree, 0) == allocate([], 3) == []


@given(
    st.lists(st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.7]), max_size=4).map(sorted), max_size=6), st.integers(0, 20)
)
def test_allocation_is_breadth_first_within_the_budget(confidences: list[list[float]], budget: int):
    per_tree = ranked(*confidences)
    chosen = allocate(per_tree, budget)
    assert len(chosen) == min(budget, sum(map(len, per_tree)))
    taken: Counter[int] = Counter()
    keys = []
    for tree, candidate in chosen:
        assert candidate is per_tree[tree][taken[tree]]  # each question's own order, nothing twice
        keys.append((taken[tree], candidate.confidence, tree))  # round, then confidence, then tree
        taken[tree] += 1
    assert keys == sorted(keys)
    for tree, group in enumerate(per_tree):  # whoever got less than another had no more to give, or the budget ended
        if taken[tree] < len(group):
            assert max(taken.values(), default=0) <= taken[tree] + 1


def test_a_pick_is_known_as_soon_as_nothing_can_take_its_place():
    first, second, third = ranked([0.5, 0.6], [0.9], [0.1])
    allocation = Allocation(3, budget=3, most=2)
    # Both others may still hold two, of which one each comes before the first round's and two before the second's.
    assert [(tree, number) for tree, number, _ in allocation.ended(0, first)] == [(0, 0)]
    assert [(tree, number) for tree, number, _ in allocation.ended(2, third)] == [(2, 0)]
    assert allocation.ended(1, second) == [(1, 0, second[0])]
    assert Allocation(2, budget=1, most=2).ended(0, first) == []


@given(
    st.lists(st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.7]), max_size=4).map(sorted), min_size=1, max_size=6),
    st.integers(0, 20),
    st.randoms(use_true_random=False),
)
def test_allocation_while_groups_run_is_the_sequential_one(confidences: list[list[float]], budget: int, order: Any):
    per_tree = ranked(*confidences)
    allocation = Allocation(len(per_tree), budget, most=4)
    trees = list(range(len(per_tree)))
    order.shuffle(trees)
    picks = [pick for tree in trees for pick in allocation.ended(tree, per_tree[tree])]
    assert all(per_tree[tree][number] is candidate for tree, number, candidate in picks)
    together = [(tree, id(candidate)) for tree, _, candidate in picks]
    assert sorted(together) == sorted((tree, id(candidate)) for tree, candidate in allocate(per_tree, budget))


def test_which_calls_may_be_forked():
    """Three turns that call, of confidence 0.9, 0.5 and 0.7; the second call of a turn is never forked."""
    tree = RolloutTree("q", [1])
    end = tree.root
    for confidence in (0.9, 0.5, 0.7):
        calls = [CallSpan(1, 2, 3), CallSpan(4, 5, 6)]
        end = tree.append(end, Kind.POLICY, range(6), np.log([0.1, confidence, confidence, *[0.1] * 3]), calls=calls)
        end = tree.append(end, Kind.OBSERVATION, [20])
    tree.append(end, Kind.POLICY, [30], [-1.0]).outcome = Outcome(StopReason.ANSWER, 0.0)
    confidences = {
        at: [round(c.confidence, 5) for c in candidates(tree, fork_at=at)]
        for at in ("first", "last", "most_uncertain", "every")
    }
    assert confidences == {"first": [0.9], "last": [0.7], "most_uncertain": [0.5], "every": [0.5, 0.7, 0.9]}
    prefixes = [open_prefix(tree, c) for c in candidates(tree, fork_at="every")]
    assert [sum(map(len, prefix.path())) for prefix in prefixes] == [1 + 7 + 2, 1 + 14 + 2, 1 + 2]


def test_rank_by_entropy_and_at_random():
    tree = RolloutTree("q", [1])
    for value in (0.25, 0.75, 0.5):
        leaf = tree.append(tree.root, Kind.POLICY, range(4), [-1.0] * 4, calls=[CALL], entropies=[9, 9, value, value])
        leaf.outcome = Outcome(StopReason.ANSWER, 0.0)
    leaves = tree.leaves()
    assert [c.leaf for c in candidates(tree, rank="entropy")] == [leaves[i] for i in (1, 2, 0)]
    assert [c.leaf for c in candidates(tree)] == leaves  # all as confident as another
    orders = set()
    for n in range(20):
        shuffled = RolloutTree("q", [1])
        for _ in range(3):
            shuffled.append(shuffled.root, Kind.POLICY, [n, 1, 2, 3], [-1.0] * 4, calls=[CALL]).outcome = leaf.outcome
        picked = [c.leaf for c in candidates(shuffled, rank="random")]
        assert picked == [c.leaf for c in candidates(shuffled, rank="random")]  # the tree alone decides
        orders.add(tuple(shuffled.leaves().index(leaf) for leaf in picked))
    assert len(orders) > 3
    tree.leaves()[0].entropies = None
    with pytest.raises(TreeError, match="no entropies"):
        candidates(tree, rank="entropy")


def test_rollouts_without_a_tool_have_a_trigger_of_their_own():
    tree = RolloutTree("q", [1])
    rollout(tree, 0.0, CALL)
    for reward in (0.0, 0.0):
        leaf = rollout(tree, reward)
        leaf.thought = 4
    assert len(candidates(tree)) == 1
    found = candidates(tree, resample_no_tool=True)
    assert [(c.leaf.uses_tool, c.token_index) for c in found] == [(False, 4), (False, 4), (True, 3)]
    assert [c.confidence for c in found] == pytest.approx([(0.3 + 0.125) / 2] * 2 + [0.6], abs=1e-7)
    rollout(tree, 1.0)
    assert len(candidates(tree, resample_no_tool=True)) == 1


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 1.0])), max_size=8), st.floats(0.001, 1.0))
def test_binary_rewards_fail_alike_under_every_threshold(rollouts: list[tuple[bool, float]], threshold: float):
    tree = RolloutTree("q", [1])
    for tool, reward in rollouts:
        rollout(tree, reward, CALL if tool else None)
    assert candidates(tree, threshold) == candidates(tree, 0.5)


def test_a_graded_reward_fails_below_the_threshold():
    tree = RolloutTree("q", [1])
    for reward in (0.2, 0.6):
        rollout(tree, reward, CALL)
    assert [len(candidates(tree, threshold)) for threshold in (0.1, 0.5, 0.6, 0.61, 1.0)] == [0, 0, 0, 2, 2]


def branching(*entropies: tuple[float, float]) -> RolloutTree:
    """Rollouts of two turns, with the entropy of each; only the first 20 tokens of a turn count."""
    tree = RolloutTree("q", [1])
    for n, (first, second) in enumerate(entropies):
        end = tree.append(tree.root, Kind.POLICY, [n] * 30, [-1.0] * 30, entropies=[first] * 20 + [99] * 10)
        end = tree.append(end, Kind.OBSERVATION, [20])
        end = tree.append(end, Kind.POLICY, [30, 31], [-1.0] * 2, entropies=[second] * 2)
        end.outcome = Outcome(StopReason.ANSWER, 0.0)
    return tree


def test_arpo_branches_where_entropy_has_risen_after_the_observation():
    """With |V| = e^2, a rise of 1 nat counts 1/2: 0.5 + 0.2 / 2 = 0.6."""
    tree = branching((1.0, 2.0), (1.0, 1.0), (2.0, 1.0))
    points = [leaf.path()[2] for leaf in tree.leaves()]
    vocabulary = math.exp(2)
    assert branch_points(tree, vocabulary) == points[:1]  # type: ignore[arg-type]
    assert branch_points(tree, vocabulary, chance=0.59) == points[:1]  # type: ignore[arg-type]
    assert branch_points(tree, vocabulary, chance=0.61) == []  # type: ignore[arg-type]
    assert branch_points(tree, vocabulary, weight=0.0) == []  # type: ignore[arg-type]
    assert branch_points(tree, vocabulary, chance=0.39) == points  # type: ignore[arg-type]


def test_arpos_code_branches_by_chance_and_the_segment_before():
    tree = branching(*[(1.0, 9.0)] * 400)
    shares = [len(branch_points(tree, 8, "code", chance=chance)) / 400 for chance in (0.0, 0.5, 1.0)]
    assert shares[0] == 0
    assert shares[1] == pytest.approx(0.5, abs=0.1)  # four standard errors; the rise after it does not count
    assert shares[2] == 1
    risen = branching(*[(1.0, 9.0)] * 50)
    for leaf in risen.leaves():  # a third turn, before whose observation the entropy has risen by 20 tokens · 2 nats
        outcome, leaf.outcome = leaf.outcome, None
        leaf.entropies = np.full(2, 30.0)
        seen = risen.append(leaf, Kind.OBSERVATION, [40])
        risen.append(seen, Kind.POLICY, [50], [-1.0], entropies=[0.0]).outcome = outcome
    # 60 - 20 nats over log 8 = 19.2 times 0.2 are above any random number: all branch there, whatever the chance.
    points = branch_points(risen, 8, "code", weight=0.2, chance=0.0)
    assert [len(point.path()) for point in points] == [5] * 50
    assert branch_points(risen, 8, "code", weight=0.0, chance=0.0) == []
    tree.leaves()[0].path()[1].entropies = None
    with pytest.raises(TreeError, match="no entropies"):
        branch_points(tree, 8)
