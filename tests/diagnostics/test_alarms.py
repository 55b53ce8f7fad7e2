import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from axpo.config import ConfigError, load_config
from axpo.diagnostics.alarms import Alarm, Alarms, falls
from axpo.options import AlarmsConfig

FINE: dict[str, Any] = {"tool_use": 0.4, "one_outcome": 0.5, "void": 0, "rollouts": 100, "mismatch_mean": 1e-6}


def play(series: list[dict[str, Any]], tools: bool = True, **options: Any) -> list[list[str]]:
    """The names of the alarms after each step."""
    alarms = Alarms(AlarmsConfig(**options), tools)
    return [[alarm.name for alarm in alarms.step({**FINE, **figures})] for figures in series]


def uses(*shares: float | None) -> list[dict[str, Any]]:
    return [{"tool_use": share} for share in shares]


def test_a_run_that_goes_well_is_left_in_peace():
    assert play([FINE] * 50) == [[]] * 50


def test_tool_use_under_the_floor_is_a_mean_over_n_steps():
    # (6 · 0.1 + 0.03) / 7 = 0.09, then 0.08, …, 0.05, 0.04: under 0.045 at the sixth low step.
    found = play(uses(*[0.1] * 6, *[0.03] * 8), steps=7, tool_use=0.045, tool_use_fall=1)
    assert found == [[]] * 11 + [["tool_use"]] * 3
    assert play(uses(*[0.0] * 6), steps=7) == [[]] * 6  # before n steps were seen, nothing is known
    assert play(uses(*[0.0] * 7), steps=7)[-1] == ["tool_use"]
    assert play(uses(*[0.0] * 30), steps=7, tool_use=0) == [[]] * 30


def test_without_tools_their_use_is_no_matter():
    assert play(uses(*[0.0] * 30), tools=False) == [[]] * 30


def test_steps_of_void_rollouts_alone_say_nothing_of_tool_use():
    found = play(uses(*[0.0] * 6, *[None] * 5, 0.0), steps=7)
    assert found == [[]] * 11 + [["tool_use"]]


def test_tool_use_that_falls_for_n_steps():
    falling = [0.6 - 0.04 * step for step in range(10)]
    found = play(uses(*falling), steps=7)
    assert found == [[]] * 6 + [["tool_use_fall"]] * 4
    assert play(uses(*falling[::-1]), steps=7) == [[]] * 10
    # From 0.58 (0.6, 0.58, 0.56) to 0.5 (0.52, 0.5, 0.48): 14% less.
    assert play(uses(*[0.6 - 0.02 * step for step in range(7)]), steps=7)[-1] == ["tool_use_fall"]
    assert play(uses(*[0.6 - 0.02 * step for step in range(7)]), steps=7, tool_use_fall=0.15)[-1] == []


def test_a_fall_shows_through_the_noise_of_a_batch_and_noise_alone_is_none():
    rng = np.random.default_rng(0)
    steady = rng.binomial(128, 0.3, (200, 20)) / 128
    dying = rng.binomial(128, np.linspace(0.35, 0.15, 20), (200, 20)) / 128
    fired = [sum(play(uses(*row))[-1] == ["tool_use_fall"] for row in rows) for rows in (steady, dying)]
    assert fired[0] <= 2
    assert fired[1] >= 190


@given(st.lists(st.floats(0, 1), min_size=7, max_size=30, unique=True))
def test_order_alone_decides_a_trend(values: list[float]):
    assert falls(sorted(values, reverse=True))
    assert not falls(sorted(values))
    assert not falls([values[0]] * len(values))
    assert falls([rank - 100.0 for rank in np.argsort(np.argsort(values))]) == falls(values)


def test_golden_trend():
    # n 7: variance 7·6·19/18 = 44.33, three deviations 19.97. All 21 pairs fall: 21 − 1 is more; one rises: 18 is not.
    assert falls([7, 6, 5, 4, 3, 2, 1])
    assert not falls([7, 6, 5, 4, 3, 1, 2])
    # n 8: 8·7·21/18 = 65.33, 24.25. All 28: 27 is more; one rises: 27 − 1 − 1 = 25 is; two: 23 is not.
    assert falls([8, 7, 6, 5, 4, 3, 1, 2])
    assert not falls([8, 7, 6, 5, 3, 4, 1, 2])


def test_void_rollouts_are_judged_step_by_step():
    found = play([{"void": 25}, {"void": 26}, {"void": 0}, {"void": 90}, {"void": 0, "rollouts": 0}])
    assert found == [[], ["void"], [], ["void"], []]
    assert play([{"void": 100}], void=1) == [[]]


def test_groups_of_one_outcome_are_a_mean_over_n_steps():
    series = [{"one_outcome": share} for share in [0.875] * 7 + [1.0, None, 0.5]]
    assert play(series, steps=7, one_outcome=0.88) == [[]] * 7 + [["one_outcome"], ["one_outcome"], []]
    assert play([{"one_outcome": 1.0}] * 9, steps=7, one_outcome=1)[-1] == []


def test_mismatch_is_judged_step_by_step_and_a_step_without_tokens_leaves_it_as_it_was():
    values = [0.05, 0.051, None, None, 0.01, None, math.nan, None, 0.0, math.inf]
    found = play([{"mismatch_mean": value} for value in values])
    assert [bool(names) for names in found] == [value in "xo" for value in ".xoo..xo.x"]
    assert {name for names in found for name in names} == {"mismatch"}
    assert play([{"mismatch_mean": None}]) == [[]]
    assert play([{"mismatch_mean": 9.0}, {"mismatch_mean": math.nan}], mismatch=0) == [[], []]


def test_an_alarm_begins_once_and_again_after_it_has_ended():
    alarms = Alarms(AlarmsConfig())
    begun = [[alarm.begun for alarm in alarms.step({**FINE, "void": void})] for void in (50, 60, 0, 50)]
    assert begun == [[True], [False], [], [True]]


def test_a_message_holds_the_figure_and_the_option():
    (void,) = Alarms(AlarmsConfig()).step({**FINE, "void": 50})
    assert void == Alarm("void", "50.0% of the rollouts of the step are void, more than alarms.void = 25.0%", True)
    (mismatch,) = Alarms(AlarmsConfig()).step({**FINE, "mismatch_mean": 0.1234})
    assert mismatch.message == (
        "the log-probs of sampling and training differ by 0.123 a token on average, more than alarms.mismatch = 0.05: "
        "look at whether the engine has the trainer's weights, dtype and train.autocast, rollout.top_p and top_k; "
        "train.importance_cap corrects for it"
    )
    alarms = Alarms(AlarmsConfig(steps=7))
    for share in (0.07, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01):
        found = alarms.step({**FINE, "tool_use": share, "one_outcome": 0.95})
    assert [alarm.message for alarm in found] == [
        "4.0% of the rollouts of the last 7 steps use a tool, less than alarms.tool_use = 5.0%",
        "tool use falls, from 6.0% in the first half of the last 7 steps to 2.0% in the second, "
        "by more than alarms.tool_use_fall = 10%",
        "in 95.0% of the groups of the last 7 steps all rollouts have the same reward, "
        "more than alarms.one_outcome = 90.0%",
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("alarms.steps=6", "alarms.steps: got 6, must be greater than or equal to 7"),
        ("alarms.void=1.5", "alarms.void: got 1.5, must be less than or equal to 1"),
        ("alarms.mismatch=-1", "alarms.mismatch: got -1, must be greater than or equal to 0"),
        ("alarms.stop=maybe", "alarms.stop: got 'maybe', must be a valid boolean"),
        ("alarms.tool_used=0", "alarms.tool_used: unknown key -> did you mean alarms.tool_use?"),
    ],
)
def test_mistakes(override: str, expected: str):
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    assert str(error.value).startswith(expected)


def test_restored_they_say_what_they_would_have_said():
    series = [FINE | figures for figures in uses(0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.01, 0.01, 0.01)]
    for figures, value in zip(series, (0.0, 0.2, None, None, 0.0), strict=False):
        figures["mismatch_mean"] = value
    whole = Alarms(AlarmsConfig(steps=7))
    first = [whole.step(figures) for figures in series]
    assert any(alarm.begun for alarms in first for alarm in alarms)
    for stop in range(len(series)):
        before, after = Alarms(AlarmsConfig(steps=7)), Alarms(AlarmsConfig(steps=7))
        for figures in series[:stop]:
            before.step(figures)
        after.restore(json.loads(json.dumps(before.state())))
        assert [after.step(figures) for figures in series[stop:]] == first[stop:]
