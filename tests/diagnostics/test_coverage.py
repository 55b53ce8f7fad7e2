import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from axpo.diagnostics.coverage import Visit, coverage, exact, run_coverage, simulated
from axpo.storage import save_trees
from axpo.tree import CallSpan, Kind, Outcome, RolloutTree, Segment, StopReason, TreeError

CHANCES = st.floats(0, 1)


# Proposition 1 ------------------------------------------------------------------------------------------------------


def test_golden_both_sides():
    """q 0.3, p_tool 0.2, so a fresh rollout succeeds with 0.06; a below-average prefix with 0.1 still wins."""
    both = exact(0.3, 0.2, 0.1, [1, 4])
    assert both.resampled.tolist() == pytest.approx([0.1, 1 - 0.9**4])  # 0.3439
    assert both.fresh.tolist() == pytest.approx([0.06, 1 - 0.94**4])  # 0.2193


@given(CHANCES, CHANCES, CHANCES, st.integers(0, 64))
def test_the_proposition(q: float, p_tool: float, p_prefix: float, draws: int):
    both = exact(q, p_tool, p_prefix, draws)
    more = both.resampled - both.fresh
    assert more >= -1e-12 if p_prefix >= q * p_tool else more <= 1e-12


def test_the_simulation_agrees_with_the_formula():
    trials = 4000
    grid = [np.array(axis) for axis in ([0, 0.3, 1], [0.05, 0.5], [0, 0.02, 0.3, 1], [1, 4, 16])]
    points = np.meshgrid(*grid, indexing="ij")
    said, seen = exact(*points), simulated(*points, trials=trials, seed=1)
    for chance, share in (said.resampled, seen.resampled), (said.fresh, seen.fresh):
        error = np.sqrt(chance * (1 - chance) / trials)
        # 72 points, two sides: beyond four standard errors one in 16,000 by chance; at 0 and 1 there is no error.
        assert np.all(np.abs(share - chance) <= 4 * error + 1e-12)
        assert np.abs(share - chance)[error > 0].max() > 0


# What a run shows ---------------------------------------------------------------------------------------------------


def end(segment: Segment, reward: float | None) -> None:
    segment.outcome = Outcome(StopReason.VOID if reward is None else StopReason.ANSWER, reward)


def grow(tool: list[float | None], none: list[float | None], *continued: list[float | None]) -> RolloutTree:
    """Rollouts with and without a tool; the first of those with one are forked for these continuations."""
    tree = RolloutTree("q", [1])
    sources = []
    for reward in tool:
        sources.append(tree.append(tree.root, Kind.POLICY, [7] * 4, [-1.0] * 4, calls=[CallSpan(1, 2, 4)]))
        end(sources[-1], reward)
    for reward in none:
        end(tree.append(tree.root, Kind.POLICY, [7], [-1.0]), reward)
    for source, rewards in zip(sources, continued, strict=False):
        prefix = tree.fork(source, 2)
        for reward in rewards:
            end(tree.append(prefix, Kind.POLICY, [7], [-1.0], resampled=1), reward)
    return tree


def test_a_visit_is_read_from_a_tree():
    tree = grow([0.0, 0.4, None], [1.0, 0.0], [0.0, 1.0, 0.5, None], [0.0, 0.4])
    # From scratch: of the right ones only the one that uses a tool counts. All void: nothing is known.
    for number, reward, calls in (2, 1.0, []), (2, 1.0, [CallSpan(0, None, 1)]), (3, None, []):
        end(tree.append(tree.root, Kind.POLICY, [7], [-1.0], calls=calls, resampled=number), reward)
    visit = Visit.of(tree, 3)
    assert visit == Visit("q", 3, 0, 2, 2, ((2, 1), (3, 2), (2, 0)))
    assert (visit.size, visit.triggered) == (4, True)
    assert not Visit.of(tree, 3, threshold=0.3).triggered
    assert not Visit("q", 0, 0, 0, 4).triggered


def test_golden_rollouts_held_back():
    assert Visit("q", 0, 1, 1, 2).held_out() == (1 / 4, 1 / 4)  # only where the right one is held back
    assert Visit("q", 0, 0, 1, 3).held_out() == (3 / 4, 0.0)  # not where the wrong one is: no tool is left
    assert Visit("q", 0, 0, 2, 2).held_out() == (1.0, 0.0)
    assert Visit("q", 0, 2, 2, 0).held_out() == (0.0, 0.0)  # a right one is left
    assert Visit("q", 0, 1, 0, 3).held_out() == (0.0, 0.0)


@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
def test_holding_back_is_counted_in_all_ways(right: int, wrong: int, none: int):
    rollouts = ["right"] * right + ["wrong"] * wrong + ["none"] * none
    others = [(held, rollouts[:place] + rollouts[place + 1 :]) for place, held in enumerate(rollouts)]
    triggering = [held for held, rest in others if "wrong" in rest and "right" not in rest]
    ways = max(1, len(rollouts))
    assert Visit("q", 0, right, wrong, none).held_out() == (len(triggering) / ways, triggering.count("right") / ways)


def test_golden_figures_of_a_run():
    visits = [
        Visit("a", 0, 2, 1, 1),  # before: two of four hold a right one with chance 1 − 1/6
        Visit("a", 1, 0, 1, 3, ((2, 1), (2, 0))),
        Visit("a", 2, 1, 0, 3),  # after: 1 − 3/6
        Visit("a", 3, 3, 0, 1),  # farther away, so it does not count
        Visit("b", 1, 0, 2, 2, ((2, 0),)),  # of another question there is no other visit
        Visit("c", 0, 1, 1, 2, ((2, 2),)),  # did not trigger, so what was resampled there does not count
    ]
    figures = coverage(visits)
    assert (figures["triggered"], figures["resamplings"], figures["matched"]) == (2, 3, 2)
    assert figures["resampled"] == pytest.approx(1 / 3)
    assert figures["resampled_matched"] == pytest.approx(1 / 2)
    assert figures["fresh_other_steps"] == pytest.approx((5 / 6 + 1 / 2) / 2)
    # One of four held back, in triggering ways: a 0, 3, 0, 0; b 4; c 1, where it is the right one. So h is 1/8.
    assert figures["fresh_held_out"] == pytest.approx(1 - (7 / 8) ** 2)
    # Questions move h by -3/8 (a), -4/8 (b) and 7/8 (c) of 1/8; 1 − (1−h)² rises by 2(1−h); n / (n − 1) = 3/2.
    moved = math.sqrt(1.5 * (3**2 + 4**2 + 7**2)) / 64
    assert figures["fresh_held_out_error"] == pytest.approx(2 * 7 / 8 * moved)
    # Question a moves the share by (1 − 2/3) / 3, b by (0 − 1/3) / 3; n / (n − 1) = 2.
    assert figures["resampled_error"] == pytest.approx(math.sqrt(2 * (1 / 81 + 1 / 81)))
    assert figures["fresh_other_steps_error"] is None  # a single question


def test_a_run_that_resamples_nothing_has_no_coverage():
    figures = coverage([Visit("a", 0, 0, 1, 3), Visit("a", 1, 1, 1, 2)])
    assert (figures["triggered"], figures["resamplings"]) == (1, 0)
    assert {figures[name] for name in ("resampled", "fresh_held_out", "fresh_other_steps")} == {None}


def test_the_estimates_are_those_of_the_process_that_made_the_run():
    """Questions of different difficulty, asked twice by one policy: what resampling finds is p(t), what a rollout held
    back finds the chance given a trigger at N − 1, what other steps find the chance itself, given a trigger at N."""
    rng, n, k, questions = np.random.default_rng(3), 8, 4, 3000
    q, p_tool = rng.uniform(0.1, 0.9, questions), rng.beta(0.5, 2, questions)
    p_prefix = rng.beta(0.5, 2, questions)
    visits = []
    for question, step in itertools.product(range(questions), range(2)):
        uses = int(rng.binomial(n, q[question]))
        right = int(rng.binomial(uses, p_tool[question]))
        visit = Visit(str(question), step, right, uses - right, n - uses)
        if visit.triggered:
            continued = int(rng.binomial(k, p_prefix[question]))
            visit = Visit(str(question), step, right, uses - right, n - uses, ((k, continued),))
        visits.append(visit)
    figures = coverage(visits)

    def given_a_trigger(size: int, chances: np.ndarray) -> float:
        triggers = (1 - q * p_tool) ** size - (1 - q) ** size
        return float((triggers * chances).sum() / triggers.sum())

    found = exact(q, p_tool, p_prefix, k)
    expected = {
        "resampled": given_a_trigger(n, found.resampled),
        "fresh_held_out": 1 - (1 - given_a_trigger(n - 1, q * p_tool)) ** k,
        "fresh_other_steps": given_a_trigger(n, found.fresh),
    }
    for name, value in expected.items():
        error = figures[f"{name}_error"]
        assert error is not None
        assert 0 < error < 0.02
        # The questions of this run are themselves a sample of what the errors speak of: four of them.
        assert figures[name] == pytest.approx(value, abs=4 * error)
    assert figures["fresh_held_out"] > figures["fresh_other_steps"]  # type: ignore[operator]


def test_a_run_folder_is_read_step_by_step(tmp_path: Path):
    (tmp_path / "trees").mkdir()
    first, second = grow([0.0], [1.0] * 3, [0.0, 1.0]), grow([1.0, 0.0], [0.0, 0.0])
    save_trees(tmp_path / "trees" / "step_00001.parquet", [first])
    save_trees(tmp_path / "trees" / "step_00002.parquet", [second])
    save_trees(tmp_path / "trees" / "eval_axpo.parquet", [first])
    expected = coverage([Visit("q", 0, 0, 1, 3, ((2, 1),)), Visit("q", 1, 1, 1, 2)])
    assert run_coverage(tmp_path) == expected
    assert expected["fresh_other_steps"] == pytest.approx(1 / 2)
    assert run_coverage(tmp_path, threshold=0.0)["triggered"] == 0


def test_a_folder_without_steps_is_named(tmp_path: Path):
    with pytest.raises(TreeError, match=r"no training steps; a run folder must hold trees/step_\*\.parquet"):
        run_coverage(tmp_path)
