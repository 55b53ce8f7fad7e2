"""The plots of a diagnosis, after Figures 3 and 4 of the paper (AXPO, arXiv 2605.28774). Each is written as a PNG."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

TOOL, NO_TOOL, MARKED, PAPER = "#3b6ea8", "#9aa5b1", "#c8553d", "#222222"
# What the paper reports of GRPO's training: shares of rollouts, and of questions.
PAPER_GAP = {"tool_use": 0.30, "all_wrong_tool": 0.40, "all_wrong_no_tool": 0.25}
_DPI = 150


def plot_gap(figures: Mapping[str, Any], path: Path) -> None:
    """Bars of the tool-use rate, and of the all-wrong rates with and without a tool; what has no value has no bar.

    `figures` are those of `axpo.diagnostics.divergence.figures`.
    """
    bars = (
        ("tool_use", "rollouts that\ncall a tool", f"{figures['decided']} rollouts", TOOL),
        ("all_wrong_tool", "all wrong,\nwith a tool", f"{figures['questions_tool']} questions", TOOL),
        ("all_wrong_no_tool", "all wrong,\nwithout", f"{figures['questions_no_tool']} questions", NO_TOOL),
    )
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for place, (key, _, _, colour) in enumerate(bars):
        share = figures[key]
        axes.bar(place, 100 * (share or 0.0), width=0.6, color=colour)
        label = "nothing to count" if share is None else f"{100 * share:.0f}%"
        axes.annotate(label, (place, 100 * (share or 0.0)), (0, 3), textcoords="offset points", ha="center")
        line = "paper, GRPO training" if place == 0 else "_"  # one line in the legend is enough
        axes.hlines(100 * PAPER_GAP[key], place - 0.4, place + 0.4, PAPER, "dashed", label=line, linewidth=1)
    axes.set_xticks(range(len(bars)), [f"{name}\n({count})" for _, name, count, _ in bars])
    axes.set_ylim(0, 122)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("share in %")
    axes.set_title("The Thinking-Acting Gap")
    axes.legend(frameon=False, loc="upper right")
    _plain(axes)
    figure.savefig(path, dpi=_DPI)


def plot_divergence(figures: Mapping[str, Any], path: Path) -> None:
    """Left the clusters of calls after each failed prefix, right the uncertainty of each call against its entropy."""
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _clusters(left, figures)
    _proxy(right, figures)
    for axes in (left, right):
        _plain(axes)
    figure.savefig(path, dpi=_DPI)


def _clusters(axes: Axes, figures: Mapping[str, Any]) -> None:
    counts = [prefix["clusters"] for prefix in figures["prefixes"]]
    axes.set_xlabel("clusters of calls after one failed prefix")
    axes.set_ylabel("prefixes")
    if not counts:
        _say(axes, "no failed prefix was continued")
        return
    values, heights = np.unique(counts, return_counts=True)
    axes.bar(values, heights, color=[MARKED if value == 1 else TOOL for value in values])
    axes.set_xticks(range(1, max(counts) + 1))
    axes.set_xlim(0.4, max(max(counts), 4) + 0.6)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(
        f"mean {figures['clusters']:.1f}; {100 * figures['collapsed']:.0f}% collapsed into one; "
        f"{100 * figures['recovered']:.0f}% recovered",
        fontsize="medium",
    )


def _proxy(axes: Axes, figures: Mapping[str, Any]) -> None:
    axes.set_xlabel("1 − mean probability of the call's tokens")
    axes.set_ylabel("mean entropy of the call's tokens (nats)")
    points = figures["certainties"]
    if not points:
        _say(axes, "no rollout called a tool")
        return
    axes.scatter([1 - p["confidence"] for p in points], [p["entropy"] for p in points], s=12, alpha=0.5, color=TOOL)
    if figures["pearson"] is not None:
        title = f"Pearson {figures['pearson']:.3f}, Spearman {figures['spearman']:.3f}, {figures['calls']} calls"
        axes.set_title(title, fontsize="medium")


def _say(axes: Axes, text: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
