"""Alarms: what must not happen to a run unseen, found from the figures of its steps."""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from axpo.diagnostics.gap import mean
from axpo.options import AlarmsConfig

SIGNIFICANT = 3.0  # standard deviations of the statistic of a trend: one in 700 by chance


class AlarmStop(Exception):  # noqa: N818 (not a mistake in the program)
    """Ends a run because of an alarm (`alarms.stop`)."""


@dataclass(frozen=True)
class Alarm:
    """`name` is that of the option that sets it; `begun` is False where it was on after the step before too."""

    name: str
    message: str
    begun: bool


class Alarms:
    """Takes the figures of one step after another (`axpo.diagnostics.gap.measure`) and says which alarms are on.

    Void rollouts are judged step by step, since a provider that is down spoils each step, and so is the mismatch of
    sampling and training, which is a mean over thousands of tokens. Tool use and groups of one
    outcome vary with the questions of a step, so they are means over the last n steps (`alarms.steps`), and no alarm
    before there were as many. Where the policy has no tools, its tool use is left alone.
    """

    def __init__(self, options: AlarmsConfig, tools: bool = True) -> None:
        self.options = options
        self.tools = tools
        self._on: set[str] = set()
        self._tool_use: deque[float] = deque(maxlen=options.steps)
        self._one_outcome: deque[float] = deque(maxlen=options.steps)
        self._mismatch = 0.0

    def step(self, figures: Mapping[str, Any]) -> list[Alarm]:
        """The alarms that are on after the next step. A figure that is None leaves its alarm as it was."""
        for figure, kept in (("tool_use", self._tool_use), ("one_outcome", self._one_outcome)):
            if figures[figure] is not None:
                kept.append(figures[figure])
        if figures["mismatch_mean"] is not None:
            self._mismatch = figures["mismatch_mean"]
        alarms = [Alarm(name, message, name not in self._on) for name, message in self._found(figures)]
        self._on = {alarm.name for alarm in alarms}
        return alarms

    def state(self) -> dict[str, Any]:
        """What the next steps are judged by."""
        return {
            "on": sorted(self._on),
            "tool_use": [*self._tool_use],
            "one_outcome": [*self._one_outcome],
            "mismatch": self._mismatch,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self._on = set(state["on"])
        self._mismatch = state["mismatch"]
        self._tool_use.extend(state["tool_use"])
        self._one_outcome.extend(state["one_outcome"])

    def _found(self, figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        limits, last = self.options, f"of the last {self.options.steps} steps"
        if self.tools and len(self._tool_use) == limits.steps:
            use = mean(self._tool_use) or 0.0
            if use < limits.tool_use:
                said = f"{use:.1%} of the rollouts {last} use a tool"
                yield "tool_use", f"{said}, less than alarms.tool_use = {limits.tool_use:.1%}"
            before, after = _halves(self._tool_use)
            if after < (1 - limits.tool_use_fall) * before and falls(self._tool_use):
                said = f"tool use falls, from {before:.1%} in the first half {last} to {after:.1%} in the second"
                yield "tool_use_fall", f"{said}, by more than alarms.tool_use_fall = {limits.tool_use_fall:.0%}"
        void = figures["void"] / figures["rollouts"] if figures["rollouts"] else 0.0
        if void > limits.void:
            yield "void", f"{void:.1%} of the rollouts of the step are void, more than alarms.void = {limits.void:.1%}"
        if len(self._one_outcome) == limits.steps:
            same = mean(self._one_outcome) or 0.0
            if same > limits.one_outcome:
                said = f"in {same:.1%} of the groups {last} all rollouts have the same reward"
                yield "one_outcome", f"{said}, more than alarms.one_outcome = {limits.one_outcome:.1%}"
        if limits.mismatch and not self._mismatch <= limits.mismatch:  # also where it is not a number
            said = f"the log-probs of sampling and training differ by {self._mismatch:.3g} a token on average"
            causes = "whether the engine has the trainer's weights, dtype and train.autocast, rollout.top_p and top_k"
            yield (
                "mismatch",
                f"{said}, more than alarms.mismatch = {limits.mismatch:g}: look at {causes}; "
                "train.importance_cap corrects for it",
            )


def falls(values: Sequence[float]) -> bool:
    """Whether n values have a falling trend, by the one-sided test of Mann and Kendall at 3 standard deviations.

    S is the number of pairs that rise less that of those that fall, of variance n(n−1)(2n+5)/18 without a trend. Seven
    values are the fewest that can show one.
    """
    n = len(values)
    rises = sum(int(later > earlier) - int(later < earlier) for earlier, later in combinations(values, 2))
    return -rises - 1 >= SIGNIFICANT * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)


def _halves(values: Sequence[float]) -> tuple[float, float]:
    """The means of the first and of the second half; a middle value belongs to neither."""
    values, half = list(values), len(values) // 2
    return sum(values[:half]) / half, sum(values[-half:]) / half
