"""What the user sees of a run: a live display in a terminal, plain lines elsewhere, and the table at the end."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

WIDTH = 80
NOTHING = "–"  # a share of nothing is not 0
SFT_LINES = 10  # steps for one plain line
# The plain lines of reinforcement learning: what heads each column, and its width.
COLUMNS = (
    ("step", 9),
    ("accuracy", 8),
    ("tool use", 8),
    ("wrong:tool", 10),
    ("no tool", 7),
    ("recovered", 9),
    ("void", 4),
    ("tok/s", 6),
    ("stage left", 10),
)


@dataclass
class _Stage:
    """A stage that is under way; times are in seconds."""

    name: str
    total: int
    started: float
    latest: float  # when the last step ended
    done: int = 0
    void: int = 0  # rollouts so far
    figures: Mapping[str, Any] = field(default_factory=dict)

    def left(self, now: float) -> float | None:
        """The time that the stage will still take, if its steps go on as they went so far."""
        if not self.done:
            return None
        pace = (self.latest - self.started) / self.done
        return max(0.0, pace * (self.total - self.done) - (now - self.latest))


class TerminalProgress:
    """Shows stages and steps on a console (`axpo.workflow.Progress`); as a context manager it ends the last stage.

    A terminal gets a display that is renewed in place, anything else plain lines; neither is wider than 80 columns.
    What is shown follows from the figures of a step: those of reinforcement learning have an `accuracy`, those of
    fine-tuning only a `loss`, and an evaluation has none. Figures that are None are shown as "–". Tokens a second
    are `generated_tokens` by `seconds`. The time left is that of the stage.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console()
        self._clock = clock
        self._stage: _Stage | None = None
        self._live: Live | None = None

    def __enter__(self) -> "TerminalProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._finish()

    def stage(self, name: str, total: int) -> None:
        """Begin a stage of `total` steps; one that was under way ends where it is."""
        self._finish()
        now = self._clock()
        self._stage = _Stage(name, total, now, now)
        if self._console.is_interactive:
            self._live = Live(get_renderable=self._display, console=self._console, transient=True, refresh_per_second=2)
            self._live.start()
        else:
            self._print(f"{name}: 0/{total}")
        if not total:
            self._finish()

    def step(self, figures: Mapping[str, Any]) -> None:
        """Count a step of the stage and show its figures; the last one ends the stage."""
        stage = self._stage
        if stage is None:
            return
        first = not stage.figures
        stage.done += 1
        stage.latest = self._clock()
        stage.figures = figures
        stage.void += figures.get("void") or 0
        if self._live is None:
            self._print_step(stage, first)
        if stage.done == stage.total:
            self._finish()

    def _finish(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._stage is not None:
            stage, self._stage = self._stage, None
            self._print(f"{stage.name}: {stage.done}/{stage.total} in {duration(self._clock() - stage.started)}")

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)

    # Plain lines

    def _print_step(self, stage: _Stage, first: bool) -> None:
        figures = stage.figures
        if "accuracy" in figures:
            if first:
                self._print(" ".join(title.rjust(width) for title, width in COLUMNS))
            cells = (
                f"{stage.done}/{stage.total}",
                *map(percent, _shares(figures)),
                f"{figures['recovered']}/{figures['forked']}",
                str(figures["void"]),
                _rate(figures),
                duration(stage.left(self._clock())),
            )
            self._print(" ".join(cell.rjust(width) for cell, (_, width) in zip(cells, COLUMNS, strict=True)))
        elif "loss" in figures and stage.done % SFT_LINES == 0:
            place, left = f"{stage.name}: {stage.done}/{stage.total}", duration(stage.left(self._clock()))
            self._print(f"{place}  loss {figures['loss']:.4f}  {left} left in this stage")

    # The live display

    def _display(self) -> RenderableType:
        stage = self._stage
        if stage is None:
            return ""
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_column(no_wrap=True)
        left = f"{duration(stage.left(self._clock()))} left in this stage"
        bar.add_row(
            Text(stage.name, style="bold"),
            ProgressBar(total=max(stage.total, 1), completed=stage.done),
            f"{stage.done}/{stage.total}",
            left,
        )
        shown = Table.grid()
        shown.add_column(width=min(WIDTH, self._console.width))
        shown.add_row(bar)
        if "accuracy" in stage.figures:
            shown.add_row(_reinforcement_figures(stage))
        elif "loss" in stage.figures:
            shown.add_row(f"loss {stage.figures['loss']:.4f}")
        return shown


def _reinforcement_figures(stage: _Stage) -> Table:
    figures = stage.figures
    accuracy, tool_use, wrong_tool, wrong_no_tool = map(percent, _shares(figures))
    table = Table.grid(padding=(0, 1))
    for _ in range(3):
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True, min_width=6)
    recovered = f"{figures['recovered']}/{figures['forked']}"
    table.add_row("accuracy", accuracy, "  all wrong with tool", wrong_tool, "  recovered prefixes", recovered)
    table.add_row("tool use", tool_use, "  all wrong without", wrong_no_tool, "  tokens a second", _rate(figures))
    rewarded, same = percent(figures["call_tokens_positive"]), percent(figures["one_outcome"])
    errors = f"{figures['tool_errors']}/{figures['tool_calls']}"
    table.add_row("calls rewarded", rewarded, "  groups of 1 outcome", same, "  tool errors", errors)
    if stage.void:
        table.add_row("", "", "", "", "  void rollouts", str(stage.void))
    return table


def summary_table(summary: Mapping[str, Mapping[str, Any]]) -> Group:
    """The last figures of a run, at most 80 columns wide: one row for each entry, and Pass@1 of each family.

    `summary` holds what `axpo.evaluation.runner.summarise` returns, by name.
    """
    samples = max((entry["samples"] for entry in summary.values()), default=1)
    passes = ["pass1"] if samples == 1 else ["pass1", f"pass{samples}"]
    keys = [*passes, "tool_use", "accuracy_tool", "accuracy_no_tool"]
    titles = [f"Pass@{key.removeprefix('pass')}" for key in passes]
    table = _table([*titles, "tool use", "accuracy\nwith tool", "accuracy\nwithout"])
    for name, entry in summary.items():
        table.add_row(escape(name.upper()), *(percent(entry.get(key)) for key in keys))
    families = sorted({family for entry in summary.values() for family in entry["families"]})
    if not families:
        return Group(table)
    by_family = _table([escape(name.upper()) for name in summary], "Pass@1 by family")
    for family in families:
        by_family.add_row(escape(family), *(percent(entry["families"].get(family)) for entry in summary.values()))
    return Group(table, "", by_family)


def _table(columns: list[str], first: str = "") -> Table:
    table = Table()
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _shares(figures: Mapping[str, Any]) -> list[float | None]:
    return [figures[name] for name in ("accuracy", "tool_use", "all_wrong_tool", "all_wrong_no_tool")]


def percent(share: float | None) -> str:
    """As 12.3%; "–" of nothing."""
    return NOTHING if share is None else f"{100 * share:.1f}%"


def _rate(figures: Mapping[str, Any]) -> str:
    return f"{figures['generated_tokens'] / figures['seconds']:.0f}" if figures["seconds"] else NOTHING


def duration(seconds: float | None) -> str:
    """As m:ss, or h:mm:ss from an hour on."""
    if seconds is None:
        return NOTHING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
