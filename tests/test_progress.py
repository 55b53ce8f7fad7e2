import io
from typing import Any

import pytest
from rich.console import Console

from axpo.progress import TerminalProgress, summary_table

# 6,000 tokens in 10 s.
FIGURES: dict[str, Any] = {
    "accuracy": 0.416,
    "tool_use": 0.635,
    "all_wrong_tool": 0.25,
    "all_wrong_no_tool": None,
    "forked": 6,
    "recovered": 3,
    "call_tokens_positive": 0.125,
    "one_outcome": 0.5,
    "tool_calls": 48,
    "tool_errors": 5,
    "void": 0,
    "generated_tokens": 6000,
    "loss": 0.1,
    "seconds": 10.0,
}
EVALUATION: dict[str, Any] = {
    "samples": 4,
    "pass1": 0.4126,
    "pass4": 0.7,
    "tool_use": 0.3,
    "accuracy_tool": 0.5,
    "accuracy_no_tool": None,
    "families": {"lookup": 0.25, "perception": 1.0},
}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Screen:
    """A progress on a console of 80 columns that is read back."""

    def __init__(self, terminal: bool) -> None:
        self.clock = Clock()
        self.file = io.StringIO()
        self.console = Console(
            file=self.file, width=80, force_terminal=terminal, color_system=None, legacy_windows=False, _environ={}
        )
        self.progress = TerminalProgress(self.console, self.clock)

    def step(self, seconds: float, figures: dict[str, Any]) -> None:
        self.clock.now += seconds
        self.progress.step(figures)

    def lines(self) -> list[str]:
        return self.file.getvalue().splitlines()

    def shown(self) -> str:
        """What the live display holds now."""
        assert self.progress._live is not None
        reader = Console(file=io.StringIO(), width=80, color_system=None, _environ={})
        with reader.capture() as capture:
            reader.print(self.progress._live.get_renderable())
        return capture.get()


def test_without_a_terminal_reinforcement_learning_gets_one_line_a_step_under_a_header():
    screen = Screen(terminal=False)
    with screen.progress as progress:
        progress.stage("axpo", 3)
        screen.step(10, FIGURES)
        screen.step(10, {**FIGURES, "void": 2})
        screen.step(3600, {**FIGURES, "recovered": 0})
    begin, header, first, second, third, end = screen.lines()
    assert begin == "axpo: 0/3"
    assert header.split("  ")[-1].endswith("stage left")
    assert first.split() == ["1/3", "41.6%", "63.5%", "25.0%", "–", "3/6", "0", "600", "0:20"]
    assert second.split()[-3:] == ["2", "600", "0:10"]
    assert third.split()[-1] == "0:00"
    assert end == "axpo: 3/3 in 1:00:20"
    assert all(len(line) <= 80 for line in screen.lines())
    assert {len(header), len(first), len(second), len(third)} == {len(header)}


def test_without_a_terminal_fine_tuning_gets_every_tenth_step_and_the_rest_only_begin_and_end():
    screen = Screen(terminal=False)
    with screen.progress as progress:
        progress.stage("teacher", 2)
        screen.step(1, {})
        screen.step(1, {})
        progress.stage("sft", 20)
        for step in range(20):
            screen.step(1, {"loss": 20.0 - step, "seconds": 1.0})
        progress.stage("evaluation of sft", 90)
        screen.step(5, {})
    assert screen.lines() == [
        "teacher: 0/2",
        "teacher: 2/2 in 0:02",
        "sft: 0/20",
        "sft: 10/20  loss 11.0000  0:10 left in this stage",
        "sft: 20/20  loss 1.0000  0:00 left in this stage",
        "sft: 20/20 in 0:20",
        "evaluation of sft: 0/90",
        "evaluation of sft: 1/90 in 0:05",
    ]


def test_a_stage_without_steps_ends_at_once():
    screen = Screen(terminal=False)
    screen.progress.stage("sft", 0)
    assert screen.lines() == ["sft: 0/0", "sft: 0/0 in 0:00"]


def test_an_interrupted_stage_ends_where_it_is():
    screen = Screen(terminal=True)
    screen.progress.stage("axpo", 5)
    screen.step(61, FIGURES)
    with pytest.raises(KeyboardInterrupt), screen.progress:
        raise KeyboardInterrupt
    assert screen.lines()[-1].endswith("axpo: 1/5 in 1:01")


def test_a_terminal_shows_stage_step_time_left_and_the_figures_in_80_columns():
    screen = Screen(terminal=True)
    with screen.progress as progress:
        progress.stage("axpo", 50)
        assert "axpo" in screen.shown()
        assert "0/50" in screen.shown()
        assert "– left in this stage" in screen.shown()
        screen.step(20, {**FIGURES, "void": 2})
        screen.step(10, FIGURES)
        screen.clock.now += 15
        words = " ".join(screen.shown().split())
        assert max(map(len, screen.shown().splitlines())) <= 80
    assert "2/50 11:45 left in this stage" in words  # 15 s a step, 48 steps, less the 15 s since the last
    assert "accuracy 41.6% all wrong with tool 25.0% recovered prefixes 3/6" in words
    assert "tool use 63.5% all wrong without – tokens a second 600" in words
    assert "calls rewarded 12.5% groups of 1 outcome 50.0% tool errors 5/48" in words
    assert "void rollouts 2" in words  # of the stage, not only of the last step
    assert screen.lines()[-1].endswith("axpo: 2/50 in 0:45")


def test_void_rollouts_are_shown_only_where_there_are_any_and_other_stages_show_their_own():
    screen = Screen(terminal=True)
    with screen.progress as progress:
        progress.stage("axpo", 2)
        screen.step(1, FIGURES)
        assert "void" not in screen.shown()
        progress.stage("sft", 2)
        screen.step(1, {"loss": 1.25, "seconds": 1.0})
        assert "loss 1.2500" in screen.shown()
        progress.stage("evaluation of step_100", 2)
        screen.step(1, {})
        assert len(screen.shown().strip().splitlines()) == 1
        assert max(map(len, screen.shown().splitlines())) <= 80


def table(summary: dict[str, Any]) -> list[str]:
    console = Console(file=io.StringIO(), width=80, color_system=None, _environ={})
    with console.capture() as capture:
        console.print(summary_table(summary))
    return capture.get().splitlines()


def cells(lines: list[str], first: str) -> list[str]:
    (line,) = [line for line in lines if line.startswith(f"│ {first} ")]
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def test_the_table_has_a_row_for_each_evaluation_and_one_for_each_family():
    better = {**EVALUATION, "pass1": 0.5, "accuracy_no_tool": 0.125, "families": {"perception": 0.0}}
    lines = table({"sft": EVALUATION, "axpo": better})
    assert cells(lines, "SFT") == ["41.3%", "70.0%", "30.0%", "50.0%", "–"]
    assert cells(lines, "AXPO") == ["50.0%", "70.0%", "30.0%", "50.0%", "12.5%"]
    assert cells(lines, "lookup") == ["25.0%", "–"]
    assert cells(lines, "perception") == ["100.0%", "0.0%"]
    assert "Pass@1 ┃ Pass@4 ┃ tool use" in "\n".join(lines)
    assert max(map(len, lines)) <= 80


def test_one_sample_has_no_second_pass_and_no_families_no_second_table():
    one = {**EVALUATION, "samples": 1, "families": {}}
    lines = table({"[checkpoint]": one})
    assert "Pass@4" not in "\n".join(lines)
    assert cells(lines, "[CHECKPOINT]") == ["41.3%", "30.0%", "50.0%", "–"]
    assert "family" not in "\n".join(lines)
