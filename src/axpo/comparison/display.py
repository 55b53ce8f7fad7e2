"""What the user sees of a comparison: a line for each run that ends, and in a terminal the running ones; 80 columns."""

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from axpo.comparison.cells import metrics
from axpo.comparison.grid import Cell
from axpo.progress import WIDTH, duration, percent


class TerminalDisplay:
    """Shows cells as they begin and end (`axpo.comparison.cells.Display`); a context manager."""

    def __init__(
        self,
        cells: Sequence[Cell],
        done: int,
        jobs: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`done` of the cells have ended before."""
        self._console = console or Console()
        self._clock = clock
        self._all, self._done, self._jobs = len(cells), done, jobs
        self._running: dict[Cell, float] = {}
        self._taken: list[float] = []
        self._live: Live | None = None

    def __enter__(self) -> "TerminalDisplay":
        self._print(f"{self._all} runs, {self._done} of them done; {self._jobs} at a time")
        if self._console.is_interactive:
            self._live = Live(get_renderable=self._shown, console=self._console, transient=True, refresh_per_second=1)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def begun(self, cell: Cell) -> None:
        self._running[cell] = self._clock()

    def ended(self, cell: Cell, seconds: float, error: str | None) -> None:
        del self._running[cell]
        if error:
            self._print(f"{'failed':>9}  {cell.label}: {error}")
            return
        self._done += 1
        self._taken.append(seconds)
        place, took = f"{self._done}/{self._all}", duration(seconds)
        self._print(f"{place:>9}  {cell.label[:30]:<30} {took:>8}  {_last(metrics(cell.folder))}".rstrip())

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)

    def _shown(self) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        table.add_column(width=24, no_wrap=True)
        table.add_column(width=12)
        table.add_column(width=9, justify="right", no_wrap=True)
        table.add_column(width=30, no_wrap=True)
        for cell in list(self._running):
            lines = metrics(cell.folder)
            total = cell.config.train.steps if cell.command == "train" else cell.config.sft.steps
            steps = sum(line["stage"] != "eval" for line in lines)
            bar = ProgressBar(total=max(total, 1), completed=steps, width=12)
            table.add_row(Text(cell.label), bar, f"{steps}/{total}", _last(lines))
        left = ""
        if self._taken:
            mean = sum(self._taken) / len(self._taken)
            left = f", about {duration(mean * (self._all - self._done) / self._jobs)} left"
        shown = Table.grid()
        shown.add_column(width=min(WIDTH, self._console.width))
        shown.add_row(Group(table, Text(f"{self._done}/{self._all} runs done{left}")))
        return shown


def _last(lines: Sequence[dict[str, Any]]) -> str:
    """What the last line of a run's metrics tells, in 30 characters."""
    if not lines:
        return ""
    line = lines[-1]
    if line["stage"] == "eval":
        return f"Pass@1 {percent(line['pass1']):>6}  tools {percent(line['tool_use']):>6}"
    if "accuracy" in line:
        return f"right {percent(line['accuracy']):>6}  tools {percent(line['tool_use']):>6}"
    return f"loss {line['loss']:.4f}"
