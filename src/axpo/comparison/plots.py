"""Curves over training steps: what happens in training, as the paper's plots of its dynamics, and what is learnt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from axpo.comparison.aggregate import Result
from axpo.comparison.bootstrap import interval
from axpo.comparison.grid import START

WINDOW = 5  # steps of a running mean
# Of the grid's first methods; more bands cannot be told apart. Lines differ too, for those who see no colours.
STYLES = (("#d55e00", "--"), ("#cc79a7", ":"), ("#0072b2", "-"), ("#6b7280", "-."))
_DPI = 150

Curve = NDArray[np.float64]  # (seeds, steps), nan where there is no value


def plot_dynamics(results: Sequence[Result], methods: Sequence[str], path: Path) -> None:
    """Write a PNG of four figures of the training steps: means over seeds, smoothed, with 95% intervals."""
    panels = (
        ("tool_use", "rollouts that call a tool"),
        ("all_wrong_tool", "questions with calls whose calls are all wrong"),
        ("recovered", "resampled prefixes that were recovered"),
        ("accuracy", "rollouts that are right"),
    )
    figure = Figure(figsize=(9.6, 6.8), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        drawn = False
        for style, name in zip(STYLES, methods, strict=False):
            values = curve([dynamic(result, key) for result in results if result["method"] == name])
            if values.size and not np.isnan(values).all():
                drawn = True
                _draw(axes, np.arange(1, values.shape[1] + 1), smooth(values), name, style)
        _finish(axes, title, "training step", drawn)
    _legend(figure)
    figure.suptitle(
        f"Training: means over seeds and the last {WINDOW} steps; bands: 95% intervals, from 3 seeds on",
        fontsize="medium",
    )
    figure.savefig(path, dpi=_DPI)


def plot_learning(results: Sequence[Result], methods: Sequence[str], path: Path) -> None:
    """Write a PNG of Pass@1 and tool use on the held-out questions, from the start to the end."""
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    for axes, (key, title) in zip(
        figure.subplots(1, 2), (("pass1", "held-out Pass@1"), ("tool_use", "held-out tool use")), strict=True
    ):
        drawn = False
        for style, name in zip(STYLES, methods, strict=False):
            steps, values = evaluated(results, name, key)
            if values.size:
                drawn = True
                _draw(axes, steps, values, name, style, "o")
        _finish(axes, title, "training steps", drawn)
    _legend(figure)
    figure.savefig(path, dpi=_DPI)


def plot_differences(pairs: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write a PNG of the differences of all pairs, of a summary, in Pass@1 and Pass@k: means with 95% intervals."""
    keys = [key for key in next(iter(pairs.values()), {}) if key.startswith("pass")]
    if not keys:
        return
    names = [name.replace("_minus_", " − ") for name in pairs]
    figure = Figure(figsize=(9.6, 1.4 + 0.32 * len(pairs)), layout="constrained")
    for axes, key in zip(np.atleast_1d(figure.subplots(1, len(keys), sharey=True)), keys, strict=True):
        axes.axvline(0, color="#6b7280", linewidth=0.8)
        for place, entry in enumerate(pairs.values()):
            mean, low, high = (entry[key][part] for part in ("mean", "low", "high"))
            if mean is not None:
                axes.plot(100 * mean, place, "o", color=STYLES[2][0], markersize=5)
            if low is not None and high is not None:
                axes.hlines(place, 100 * low, 100 * high, color=STYLES[2][0], linewidth=1.5)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(f"Pass@{key.removeprefix('pass')}", fontsize="medium")
        axes.set_xlabel("points")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Held-out, paired on the same seeds: means and 95% intervals", fontsize="medium")
    figure.savefig(path, dpi=_DPI)


def dynamic(result: Result, key: str) -> list[float | None]:
    """A figure of each training step of a cell; `recovered` as the share of what was resampled."""
    values: list[float | None] = result["dynamics"][key]
    if key != "recovered":
        return values
    forked = result["dynamics"]["forked"]
    return [None if not tried else (found or 0) / tried for found, tried in zip(values, forked, strict=True)]


def evaluated(results: Sequence[Result], method: str, key: str) -> tuple[NDArray[np.int64], Curve]:
    """A figure of a method's evaluations, (seeds, steps), at the steps that all its seeds have: others mislead."""
    start = {result["seed"]: result["evaluation"][key] for result in results if result["method"] == START}
    found: list[dict[int, float | None]] = []
    for result in (result for result in results if result["method"] == method):
        found.append({int(step): figures[key] for step, figures in result["evaluations"].items()})
        found[-1][result["steps"]] = result["evaluation"][key]
        if result["seed"] in start:
            found[-1][0] = start[result["seed"]]
    steps = sorted(set.intersection(*map(set, found))) if found else []
    return np.array(steps, dtype=np.int64), np.array([[_number(each[step]) for step in steps] for each in found])


def curve(rows: Sequence[Sequence[float | None]]) -> Curve:
    """Rows of unequal length as one array."""
    values = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
    for place, row in enumerate(rows):
        values[place, : len(row)] = [_number(value) for value in row]
    return values


def smooth(values: Curve, window: int = WINDOW) -> Curve:
    """The mean over the last `window` steps, of those that have a value."""
    known, filled = ~np.isnan(values), np.nan_to_num(values)
    sums, counts = (np.cumsum(np.pad(each, ((0, 0), (1, 0))), 1) for each in (filled, known.astype(float)))
    first = np.maximum(np.arange(1, values.shape[1] + 1) - window, 0)
    total, count = sums[:, 1:] - sums[:, first], counts[:, 1:] - counts[:, first]
    means: Curve = np.divide(total, count, out=np.full_like(values, np.nan), where=count > 0)
    return means


def _draw(axes: Axes, steps: Any, values: Curve, name: str, style: tuple[str, str], marker: str = "") -> None:
    """The mean over the seeds that have a value at a step, and its interval where at least three have one."""
    count = (~np.isnan(values)).sum(0)
    mean = np.divide(np.nansum(values, 0), count, out=np.full(len(count), np.nan), where=count > 0)
    colour, line = style
    label = f"{name} ({len(values)} seeds)"
    axes.plot(steps, 100 * mean, color=colour, linestyle=line, label=label, marker=marker, markersize=4)
    low, high = np.full(len(count), np.nan), np.full(len(count), np.nan)
    for pattern in {tuple(column) for column in ~np.isnan(values).T}:  # the seeds that a step has, mostly all
        columns = (np.array(pattern) == ~np.isnan(values).T).all(1)
        ends = interval(values[list(pattern)][:, columns])
        if ends is not None:
            low[columns], high[columns] = ends
    axes.fill_between(steps, 100 * low, 100 * high, color=colour, alpha=0.15, linewidth=0)


def _finish(axes: Axes, title: str, below: str, drawn: bool) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(below)
    axes.set_ylabel("%")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    if not drawn:
        axes.text(0.5, 0.5, "no such figure yet", ha="center", va="center", transform=axes.transAxes)


def _legend(figure: Figure) -> None:
    """One below all panels: a method may be missing in some."""
    found = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if found:
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=len(found), frameon=False)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
