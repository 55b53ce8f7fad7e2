"""What `axpo simulate` shows: learning curves and the phase diagram, in the terminal and as plots."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from axpo.simulation import Curves, Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BARS = "▁▂▃▄▅▆▇█"
BAR_POINTS = 12  # of a curve in the terminal
LEARNED = 0.25  # who has learned to act is so far on the way from the accuracy of never acting to 1
SOONER = 1.2  # by this factor a method must be sooner to be said to help
VERDICTS = {
    "needed": ("green", "AXPO learns to act, GRPO does not"),
    "helps": ("cyan", "both learn to act, AXPO so many times sooner"),
    "alike": ("yellow", "GRPO learns to act, and AXPO no sooner"),
    "nothing": ("red", "neither learns to act"),
}


@dataclass(frozen=True)
class Learned:
    """How a method learned in one setting."""

    name: str
    p_think: float
    speed: float
    curves: Curves

    @property
    def learned_at(self) -> int | None:
        """The first step at which the mean accuracy is `LEARNED` of the way from never acting to 1; None if at none."""
        least = self.p_think + LEARNED * (1 - self.p_think)
        there = np.flatnonzero(self.curves.accuracy.mean(axis=0) >= least)
        return int(self.curves.steps[there[0]]) if len(there) else None

    def figures(self) -> dict[str, Any]:
        """For the JSON: means over the seeds and, at the end, each seed's own."""
        found: dict[str, Any] = {"method": self.name, "p_think": self.p_think, "speed": self.speed}
        found |= {"learned_at": self.learned_at, "steps": self.curves.steps.tolist()}
        for key in ("tool_use", "accuracy_tool", "accuracy"):
            values: Floats = getattr(self.curves, key)
            found[key] = np.round(values.mean(axis=0), 5).tolist()
            found[f"{key}_of_seeds"] = np.round(values[:, -1], 5).tolist()
        return found


@dataclass(frozen=True)
class Cell:
    """One place of the phase diagram."""

    p_think: float
    speed: float
    grpo: Learned
    axpo: Learned

    @property
    def sooner(self) -> float:
        """How many times sooner AXPO has learned to act; NaN unless both do."""
        if self.grpo.learned_at is None or self.axpo.learned_at is None:
            return math.nan
        return self.grpo.learned_at / max(self.axpo.learned_at, 1)

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        if self.grpo.learned_at is None:
            return "nothing" if self.axpo.learned_at is None else "needed"
        return "helps" if self.sooner >= SOONER else "alike"

    @property
    def text(self) -> str:
        return f"{self.sooner:.1f}x" if self.verdict == "helps" else self.verdict

    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = {"p_think": self.p_think, "speed": self.speed, "verdict": self.verdict}
        for each in (self.grpo, self.axpo):
            curves = each.curves
            found[each.name] = {
                "learned_at": each.learned_at,
                "tool_use": round(float(curves.tool_use[:, -1].mean()), 5),
                "accuracy": round(float(curves.accuracy[:, -1].mean()), 5),
            }
        return found


def curves_tables(learned: Sequence[Learned], steps: int) -> Iterator[RenderableType]:
    """A table for each p_think: the curves as bars from 0 to 1, and their ends with standard errors over the seeds."""
    for p_think in dict.fromkeys(each.p_think for each in learned):
        title = f"Thinking is right in {100 * p_think:g}% of rollouts; step 0 to {steps}"
        table = Table(title=title, title_justify="left", box=SIMPLE, show_edge=False, pad_edge=False)
        table.add_column("method", no_wrap=True)
        for column in ("tool use", "end", "accuracy", "end", "learned"):
            table.add_column(column, justify="right" if column in ("end", "learned") else "left", no_wrap=True)
        for each in learned:
            if each.p_think == p_think:
                curves = each.curves
                cells = [
                    cell for values in (curves.tool_use, curves.accuracy) for cell in (bars(values), _percent(values))
                ]
                table.add_row(escape(each.name), *cells, str(each.learned_at or "–"))
        yield Group(table, "")
    yield (
        "end: mean ± standard error; learned: the first step at which accuracy is\n"
        f"{LEARNED:.0%} of the way from never acting to 1\n"
    )


def bars(values: Floats) -> str:
    """The mean over seeds (S, points) as a line of characters, from 0 to 1."""
    places = np.linspace(0, values.shape[1] - 1, BAR_POINTS).round().astype(int)
    mean = values.mean(axis=0)[places]
    return "".join(BARS[min(int(value * len(BARS)), len(BARS) - 1)] for value in mean)


def phase_table(cells: Sequence[Cell], steps: int) -> Table:
    """Rows: p_think; columns: how fast acting is learned."""
    speeds = list(dict.fromkeys(cell.speed for cell in cells))
    title = f"Learning to act in {steps} steps, by p_think and speed"
    table = Table(title=title, title_justify="left", box=SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("p_think")
    for speed in speeds:
        table.add_column(f"speed {speed:g}", justify="center", no_wrap=True)
    for p_think in sorted({cell.p_think for cell in cells}, reverse=True):
        row = [cell for cell in cells if cell.p_think == p_think]
        table.add_row(f"{p_think:g}", *(f"[{VERDICTS[cell.verdict][0]}]{cell.text}[/]" for cell in row))
    names = {**{name: name for name in VERDICTS}, "helps": "2.0x"}
    table.caption = "\n".join(f"{names[name]}: {meaning}" for name, (_, meaning) in VERDICTS.items())
    table.caption_justify = "left"
    return table


def plot_curves(learned: Sequence[Learned], path: Path) -> None:
    """Tool use and accuracy over the steps: the mean of the seeds, and a band of one standard error."""
    from matplotlib.figure import Figure

    p_thinks = list(dict.fromkeys(each.p_think for each in learned))
    names = list(dict.fromkeys(each.name for each in learned))
    figure = Figure(figsize=(4 * len(p_thinks) + 0.6, 6.4), layout="constrained")
    grid = figure.subplots(2, len(p_thinks), sharex=True, sharey=True, squeeze=False)
    for column, p_think in enumerate(p_thinks):
        shown = [each for each in learned if each.p_think == p_think]
        for axes, key in zip(grid[:, column], ("tool_use", "accuracy"), strict=True):
            for each in shown:
                _line(axes, each, getattr(each.curves, key), names.index(each.name))
            axes.set_ylim(-0.02, 1.02)
            axes.grid(alpha=0.3)
        grid[1, column].axhline(p_think, color="black", linewidth=0.8, linestyle=":")
        grid[1, column].text(shown[0].curves.steps[-1], p_think + 0.015, "never acting", ha="right", fontsize=8)
        grid[0, column].set_title(f"thinking is right in {100 * p_think:g}%", fontsize=10)
        grid[1, column].set_xlabel("training step")
    grid[0, 0].set_ylabel("tool use")
    grid[1, 0].set_ylabel("accuracy")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=100)


def plot_phase(cells: Sequence[Cell], path: Path) -> None:
    """The phase diagram; each cell holds the verdict, and the accuracies of GRPO and AXPO at the end."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = {"needed": "#5ab4ac", "helps": "#c7eae5", "alike": "#f6e8c3", "nothing": "#dddddd"}
    speeds = sorted({cell.speed for cell in cells})
    p_thinks = sorted({cell.p_think for cell in cells})
    figure = Figure(figsize=(7.2, 5.6), layout="constrained")
    axes = figure.subplots()
    for cell in cells:
        x, y = speeds.index(cell.speed), p_thinks.index(cell.p_think)
        axes.add_patch(_square(x, y, colours[cell.verdict]))
        grpo, axpo = (each.curves.accuracy[:, -1].mean() for each in (cell.grpo, cell.axpo))
        axes.text(x, y + 0.12, cell.text, ha="center", va="bottom", fontsize=10)
        axes.text(x, y - 0.12, f"{grpo:.2f} → {axpo:.2f}", ha="center", va="top", fontsize=8)
    axes.set_xticks(range(len(speeds)), [f"{speed:g}x" for speed in speeds])
    axes.set_yticks(range(len(p_thinks)), [f"{p_think:g}" for p_think in p_thinks])
    axes.set_xlim(-0.5, len(speeds) - 0.5)
    axes.set_ylim(-0.5, len(p_thinks) - 0.5)
    axes.set_xlabel("speed of learning to act")
    axes.set_ylabel("p_think: how often thinking is right")
    axes.set_title("Accuracy at the end, GRPO → AXPO", fontsize=10)
    handles = [Patch(color=colours[name], label=f"{name}: {meaning}") for name, (_, meaning) in VERDICTS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=100)


def _square(x: int, y: int, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, facecolor=colour)


def _line(axes: "Axes", learned: Learned, values: Floats, number: int) -> None:
    steps, mean = learned.curves.steps, values.mean(axis=0)
    style = ("-", "--", "-.", ":")[number // 10 % 4]
    axes.plot(steps, mean, style, color=f"C{number % 10}", label=learned.name)
    if len(values) > 1:
        error = _error(values)
        axes.fill_between(steps, mean - error, mean + error, color=f"C{number % 10}", alpha=0.2, linewidth=0)


def _percent(values: Floats) -> str:
    """The mean over seeds (S, points) at the end, and its standard error where there are several."""
    last = 100 * values[:, -1]
    return f"{last.mean():.0f}" + (f"±{_error(last):.0f}%" if len(last) > 1 else "%")


def _error(values: Floats) -> Floats:
    error: Floats = values.std(axis=0, ddof=1) / math.sqrt(len(values))
    return error
