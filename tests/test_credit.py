import json
from pathlib import Path
from statistics import mean, pstdev, stdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axpo.credit import credit_axpo, credit_grpo, normalise
from axpo.tree import Credit, Kind, Outcome, RolloutTree, Segment, StopReason, TreeError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "credit.json").read_text())
PREFIX, OLD, CONTINUATION, LAST = 3, 2, 4, 1  # policy tokens of each piece
REWARDS = st.sampled_from([0.0, 0.0, 1.0, None])


def end(segment: Segment, reward: float | None) -> None:
    segment.outcome = Outcome(StopReason.VOID if reward is None else StopReason.ANSWER, reward)


def two_turns(tree: RolloutTree, parent: Segment, tokens: int, reward: float | None, resampled: int = 0) -> Segment:
    """`tokens` policy tokens, an observation, LAST policy tokens. Returns the first segment."""
    first = tree.append(parent, Kind.POLICY, [5] * tokens, [-1.0] * tokens, resampled=resampled)
    seen = tree.append(first, Kind.OBSERVATION, [6, 6])
    end(tree.append(seen, Kind.POLICY, [7] * LAST, [-1.0] * LAST), reward)
    return first


def grow(rollouts: list[dict[str, Any]]) -> tuple[RolloutTree, list[Segment]]:
    """The tree of a golden case and the first segment of each rollout, which after a fork is the prefix."""
    tree = RolloutTree("q", [1, 2])
    firsts = [two_turns(tree, tree.root, PREFIX + OLD, rollout["reward"]) for rollout in rollouts]
    for first, rollout in zip(firsts, rollouts, strict=True):
        if "continuations" in rollout:
            tree.fork(first, PREFIX)
            for reward in rollout["continuations"]:
                two_turns(tree, first, CONTINUATION, reward, resampled=1)
    return tree, firsts


def turns(first: Segment) -> list[Credit | None]:
    """The one credit of a segment and of the last turn below it; the observation between them has none."""
    (seen,) = first.children
    (last,) = seen.children
    assert not seen.credits
    assert all(len(segment.credits) <= 1 for segment in (first, last))
    return [next(iter(segment.credits), None) for segment in (first, last)]


def both(advantage: float | None, tokens: int) -> list[Any]:
    credit = None if advantage is None else Credit(pytest.approx(advantage, abs=1e-11), tokens)
    return [credit, credit]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_golden(case: dict[str, Any]):
    tree, firsts = grow(case["rollouts"])
    streams = credit_axpo(tree, case.get("deviation", "sample"), epsilon=0.0)
    expected_streams = 0
    for first, expected in zip(firsts, case["advantages"], strict=True):
        if not isinstance(expected, dict):
            assert turns(first) == both(expected, PREFIX + OLD + LAST)
            expected_streams += expected is not None
            continue
        old, *continuations = first.children
        plain = "old" in expected
        length = PREFIX + OLD + LAST if plain else PREFIX
        assert first.credits == (both(expected["prefix"], length)[0],)
        assert turns(old) == both(expected.get("old"), length)
        for continuation, advantage in zip(continuations, expected["continuations"], strict=True):
            assert turns(continuation) == both(advantage, CONTINUATION + LAST)
        expected_streams += 1 + sum(a is not None for a in expected["continuations"])
    assert not tree.root.credits
    assert len(streams) == expected_streams


def test_streams_come_rollout_by_rollout_a_prefix_before_its_continuations():
    tree, firsts = grow([{"reward": 1}, {"reward": 0, "continuations": [0, 1]}])
    streams = credit_axpo(tree, epsilon=0.0)
    assert [stream.tokens for stream in streams] == [6, 3, 5, 5]
    assert [stream.segments[0] for stream in streams] == [firsts[0], firsts[1], *firsts[1].children[1:]]
    # the source's copy of the group reads (1, 1); of the continuations (0, 1)
    assert [stream.advantage for stream in streams] == pytest.approx([0.5**0.5, 0, -(0.5**0.5), 0.5**0.5])


def test_the_usual_epsilon_is_a_millionth():
    tree, firsts = grow([{"reward": 0}, {"reward": 1}])
    credit_grpo(tree)
    assert firsts[1].credits
    assert firsts[1].credits[0].advantage == pytest.approx(0.5 / (0.5**0.5 + 1e-6), rel=1e-14)


def test_grpo_credits_whole_rollouts_and_clears_what_was_there():
    tree, firsts = grow([{"reward": 0}, {"reward": 0}, {"reward": 1}, {"reward": None}])
    for segment in tree.segments():
        segment.credits = (Credit(9.0, 9),)
    streams = credit_grpo(tree, epsilon=0.0)
    assert [turns(first) for first in firsts] == [
        both(-(3**-0.5), 6),
        both(-(3**-0.5), 6),
        both(2 * 3**-0.5, 6),
        both(None, 6),
    ]
    assert [stream.tokens for stream in streams] == [6, 6, 6]
    assert not tree.root.credits


def test_rows_carry_the_advantages():
    tree, _ = grow([{"reward": 0, "continuations": [1]}, {"reward": 0}])
    credit_axpo(tree, epsilon=0.0)
    old, continuation, other = (row.advantages.tolist() for row in tree.rows())
    half = pytest.approx(0.5**0.5)
    assert old == [0, 0, half, half, half, 0, 0, 0, 0, 0]
    assert continuation == [0, 0, half, half, half, 0, 0, 0, 0, 0, 0, 0]
    assert other == [0] * 10


def test_an_unfinished_rollout_is_refused_and_nothing_is_credited():
    tree, _ = grow([{"reward": 0}, {"reward": 1}])
    tree.leaves()[0].outcome = None
    for credit in (credit_grpo, credit_axpo):
        with pytest.raises(TreeError, match="has not ended"):
            credit(tree)
    assert not any(segment.credits for segment in tree.segments())


def test_a_rollout_forked_in_two_places_has_two_prefixes_one_of_which_holds_the_other():
    tree, (first, _) = grow([{"reward": 0, "continuations": [1, 0]}, {"reward": 0}])
    old = first.children[0]
    for reward in (0, 0):
        two_turns(tree, tree.fork(old, 1), CONTINUATION, reward, resampled=2)
    streams = credit_axpo(tree, epsilon=0.0)
    half = 0.5**0.5
    assert [(s.tokens, s.advantage) for s in streams] == [
        (PREFIX, pytest.approx(half)),  # recovered: the group reads (1, 0)
        (CONTINUATION + LAST, pytest.approx(half)),
        (CONTINUATION + LAST, pytest.approx(-half)),
        (PREFIX + 1, 0),  # not recovered: (0, 0)
        (CONTINUATION + LAST, 0),
        (CONTINUATION + LAST, 0),
        (PREFIX + OLD + LAST, 0),
    ]
    assert first.credits == (Credit(pytest.approx(half), PREFIX), Credit(0, PREFIX + 1))
    assert old.credits == (Credit(0, PREFIX + 1),)


def test_graded_rewards_recover_with_the_best_continuation():
    """The source's copy of the group reads (0.6, 0.5), of the continuations (0.2, 0.6)."""
    tree, (first, other) = grow([{"reward": 0.1, "continuations": [0.2, 0.6]}, {"reward": 0.5}])
    credit_axpo(tree, "none")
    assert [credit.advantage for credit in first.credits] == [pytest.approx(0.05)]
    assert [s.credits[0].advantage for s in first.children if s.resampled] == [pytest.approx(-0.2), pytest.approx(0.2)]
    assert [credit.advantage for credit in other.credits] == [pytest.approx(0.2)]  # plain: (0.1, 0.5)


def test_a_forked_continuation_is_refused():
    tree, (first, _) = grow([{"reward": 0, "continuations": [1]}, {"reward": 0}])
    two_turns(tree, tree.fork(first.children[1], 1), CONTINUATION, 1, resampled=2)
    with pytest.raises(TreeError, match="a continuation was forked"):
        credit_axpo(tree)
    assert not any(segment.credits for segment in tree.segments())


@pytest.mark.parametrize("deviation", ["sample", "population"])
@pytest.mark.parametrize("values", [[], [3.0], [0.1] * 3, [0.0] * 8, [-1e9] * 7])
def test_no_spread_no_advantage(values: list[float], deviation: Any):
    assert normalise(values, deviation, epsilon=0.0).tolist() == [0.0] * len(values)


@given(st.lists(st.integers(-4, 4), min_size=2, max_size=16).filter(lambda v: len(set(v)) > 1))
def test_normalise_against_the_standard_library(values: list[int]):
    for deviation, spread in (("sample", stdev), ("population", pstdev)):
        expected = [(v - mean(values)) / (spread(values) + 0.01) for v in values]
        assert normalise(values, deviation, 0.01).tolist() == pytest.approx(expected, abs=1e-12)  # type: ignore[arg-type]


@given(
    st.lists(
        st.fixed_dictionaries({"reward": REWARDS}, optional={"continuations": st.lists(REWARDS, max_size=5)}),
        max_size=8,
    )
)
def test_every_policy_token_is_credited_at_most_once(rollouts: list[dict[str, Any]]):
    tree, firsts = grow(rollouts)
    streams = credit_axpo(tree)
    owned = [segment for stream in streams for segment in stream.segments]
    assert len(owned) == len(set(owned))
    assert {s for s in tree.segments() if s.credits} == set(owned)
    assert all(segment.kind is Kind.POLICY for segment in owned)
    for stream in streams:
        length = sum(len(s.ids) for s in stream.segments)
        assert all(s.credits == (Credit(stream.advantage, length),) for s in stream.segments)
    # what has a reward and is not a failed continuation is in a stream; void ends and failed continuations are not
    for first, rollout in zip(firsts, rollouts, strict=True):
        drawn = rollout.get("continuations", [])
        forked = rollout["reward"] is not None and any(r is not None for r in drawn)
        assert (first in owned) == (rollout["reward"] is not None)
        ends = [leaf for leaf in tree.leaves() if first in leaf.path()]
        expected = [rollout["reward"] is not None and not forked, *[forked and r is not None for r in drawn]]
        assert [leaf in owned for leaf in ends] == expected
    plain = [s.advantage for s in streams if not s.segments[0].in_continuation]
    if not any("continuations" in rollout for rollout in rollouts):
        assert sum(plain) == pytest.approx(0, abs=1e-9)
        assert [s.advantage for s in credit_grpo(tree)] == plain
