"""Writes what a comparison found: summary.json, results.json, table.md, plots, and the page beside the paper."""

import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from axpo.comparison import paper
from axpo.comparison.aggregate import (
    SPENT,
    Elsewhere,
    Estimate,
    Result,
    as_text,
    difference,
    getter,
    over_seeds,
    results_of,
    summarise,
)
from axpo.comparison.grid import START, Cell, Grid
from axpo.comparison.page import Block, Heading, Paragraph, Picture, Table, to_html, to_markdown
from axpo.comparison.paper import Row, row_of
from axpo.comparison.plots import dynamic, plot_differences, plot_dynamics, plot_learning
from axpo.progress import NOTHING

TITLES = {
    "tool_use": "tool use",
    "all_wrong_tool": "all wrong, with tool",
    "all_wrong_no_tool": "all wrong, without",
    "accuracy_tool": "right with tool",
    "accuracy_no_tool": "right without",
    "generated_tokens": "generated tokens",
    "trained_tokens": "trained tokens",
}
LEVEL = 0.5  # points; smaller differences of the paper, which gives no intervals, are none
TAIL = 0.1  # the share of the training steps that counts as its beginning, and as its end


def write_report(grid: Grid, cells: Sequence[Cell], elsewhere: Elsewhere) -> dict[str, Any]:
    """Write everything of the cells that have ended, here or elsewhere, into the grid's output; returns the summary."""
    results = results_of(cells, elsewhere)
    summary = summarise(grid, cells, results)
    names = [START, *grid.methods]
    plot_dynamics(results, list(grid.methods), grid.output / "dynamics.png")
    plot_learning(results, list(grid.methods), grid.output / "learning.png")
    plot_differences(summary["pairs"], grid.output / "differences.png")
    tables = _tables(summary, names)
    blocks = [
        Heading("Comparison of methods"),
        Paragraph(_told(summary)),
        *tables,
        *([Picture("differences.png", "Differences on the same seeds with their intervals")] if grid.compared else []),
        Heading("Training"),
        Picture("dynamics.png", "Tool use, all-wrong rate, recovered prefixes and accuracy over training steps"),
        Picture("learning.png", "Held-out Pass@1 and tool use over training steps"),
        *beside_paper(cells, results),
    ]
    for name, text in (
        ("summary.json", as_text(summary, 3)),
        ("results.json", as_text({"versions": _versions(), "cells": results}, 2)),
        ("table.md", to_markdown([Heading("Methods"), Paragraph(_told(summary)), *tables])),
        ("page.md", to_markdown(blocks)),
        ("page.html", to_html(blocks)),
    ):
        _write(grid.output / name, text)
    return summary


def _write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _versions() -> dict[str, str]:
    """Of the machine that reports."""
    packages = {name: version(name) for name in ("axpo", "torch", "transformers", "numpy")}
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.M) if cpuinfo.is_file() else []
    machine = f"{platform.platform()}, {names[0] if names else platform.machine()}, {os.cpu_count()} cores"
    return {"python": platform.python_version(), "machine": machine, **packages}


def _told(summary: Mapping[str, Any]) -> str:
    found, wanted = summary["cells"]["finished"], summary["cells"]["all"]
    unfinished = "" if found == wanted else f"Not finished: {found} of {wanted} runs are done. "
    few = [name for name, entry in summary["methods"].items() if entry["seeds"] < 3]
    lacking = f" Too few seeds for an interval: {', '.join(few)}." if few else ""
    return f"{unfinished}Means over seeds; in brackets {summary['interval']}.{lacking}"


def _tables(summary: Mapping[str, Any], names: Sequence[str]) -> list[Block]:
    methods, pairs, families = summary["methods"], summary["pairs"], summary["families"]
    keys = [key for key in methods[START] if key != "seeds"]
    shares, spent = [key for key in keys if key not in SPENT], [key for key in keys if key in SPENT]
    blocks: list[Block] = [
        Heading("On the held-out questions"),
        Table(
            ["method", "seeds", *map(_title, shares)],
            [[n, str(methods[n]["seeds"]), *(_share(methods[n][key]) for key in shares)] for n in names],
        ),
        Heading("What training took"),
        Table(["method", *map(_title, spent)], [[n, *(_amount(methods[n][key]) for key in spent)] for n in names]),
    ]
    if pairs:
        rows = [
            [_pair(name), str(entry["seeds"]), *(points(entry[key]) for key in shares)] for name, entry in pairs.items()
        ]
        blocks += [
            Heading("Differences on the same seeds, in points"),
            Table(["pair", "seeds", *map(_title, shares)], rows),
        ]
    if families:
        rows = [[name, *(_share(families[f]["methods"][name]["pass1"]) for f in families)] for name in names]
        rows += [[_pair(name), *(points(families[f]["pairs"][name]["pass1"]) for f in families)] for name in pairs]
        blocks += [Heading("Pass@1 by family"), Table(["method or pair", *families], rows)]
    return blocks


def beside_paper(cells: Sequence[Cell], results: Sequence[Result]) -> list[Block]:
    """Our rows beside the paper's: whether each stands on the same side of AXPO, and of GRPO, as there."""
    names: dict[Row, str] = {}
    for cell in cells:
        row = row_of(cell.config) if cell.command == "train" and cell.name != START else None
        if row is not None:
            names.setdefault(row, cell.name)
    found = {row: {r["seed"]: r for r in results if r["method"] == name} for row, name in names.items()}
    start = {result["seed"]: result for result in results if result["method"] == START}
    blocks: list[Block] = [
        Heading("Beside the paper"),
        Paragraph(
            "The paper trains models of 2 to 8 billion parameters on other questions, so sizes cannot agree; the order "
            "can. An order is told where our interval is clear of 0; where it holds 0, or there is none, the order is "
            "open, and the sign of our mean is told."
        ),
    ]
    axpo, grpo = found.get(paper.AXPO), found.get(paper.GRPO)
    rows = []
    for trained, theirs, title in (
        (grpo, paper.GRPO_2B - paper.SFT_2B, "SFT+GRPO − SFT (2B)"),
        (axpo, paper.AXPO_2B - paper.SFT_2B, "SFT+AXPO − SFT (2B)"),
    ):
        if trained is not None:
            rows.append([title, *_compared(trained, start, "pass1", theirs)])
    for title, reference, base in (("SFT+AXPO", paper.AXPO, axpo), ("SFT+GRPO", paper.GRPO, grpo)):
        against = paper.ROWS if reference is paper.AXPO else paper.RECIPES
        for row in against:
            if base is None or row not in found or row is reference:
                continue
            for key, label in (("pass1", "Pass@1"), ("pass4", "Pass@4")):
                theirs = getattr(reference, key) - getattr(row, key)
                rows.append([f"{title} − {row.title}, {label}", *_compared(base, found[row], key, theirs)])
    if rows:
        blocks.append(Table(["difference in points", "paper", "here", "order"], rows))
    missing = [row.title for row in paper.ROWS if row not in found]
    if missing:
        blocks.append(Paragraph(f"Rows of the paper that this grid does not have: {', '.join(missing)}."))
    blocks += [
        Heading("Training dynamics beside the paper"),
        Table(["", "paper", "here", "order"], _dynamics(axpo, grpo)),
    ]
    return blocks


def _compared(first: Mapping[int, Result], second: Mapping[int, Result], key: str, theirs: float) -> list[str]:
    ours = difference(first, second, getter(key))
    return [f"{theirs:+.1f}", points(ours), verdict(ours, theirs)]


def verdict(ours: Estimate, theirs: float) -> str:
    """Whether a difference has the sign of the paper's (in points), in words."""
    mean, low, high = ours["mean"], ours["low"], ours["high"]
    if mean is None:
        return "no figures yet"
    if abs(theirs) < LEVEL:
        return f"paper: level; here {_direction(ours, 'open', 'below', 'above')}"
    sign = "same sign" if mean * theirs > 0 else "no difference" if mean == 0 else "other sign"
    if low is None or high is None:
        return f"open, too few seeds ({sign})"
    if low <= 0 <= high:
        return f"open ({sign})"
    return "same order" if mean * theirs > 0 else "OTHER ORDER"


def _direction(ours: Estimate, level: str, below: str, above: str) -> str:
    """Where the interval stands to 0, in the words given."""
    low, high = ours["low"], ours["high"]
    if low is None or high is None or low <= 0 <= high:
        return level
    return below if high < 0 else above


def _dynamics(axpo: Mapping[int, Result] | None, grpo: Mapping[int, Result] | None) -> list[list[str]]:
    def of(key: str, part: Callable[[Sequence[float | None]], Sequence[float | None]]) -> Any:
        return lambda result: _mean(part(dynamic(result, key)))

    def rise(result: Result) -> float | None:
        before, after = of("tool_use", _first)(result), of("tool_use", _last)(result)
        return None if before is None or after is None else after - before

    rows = []
    for name, found, theirs in (("AXPO", axpo, paper.TOOL_USE_GAIN), ("GRPO", grpo, None)):
        if found:
            ours = over_seeds(found, rise)
            told = _direction(ours, "stagnates", "falls", "rises") if theirs is None else verdict(ours, theirs)
            there = "stagnates" if theirs is None else f"{theirs:+.0f}"
            rows.append([f"tool use, last less first tenth of {name}'s steps", there, points(ours), told])
    if axpo and grpo:
        ours = difference(axpo, grpo, of("all_wrong_tool", _last))
        theirs = paper.ALL_WRONG_GAIN
        label = "all wrong with a tool, AXPO − GRPO, last tenth"
        rows.append([label, f"{theirs:+.0f}", points(ours), verdict(ours, theirs)])
    if axpo:
        ours = over_seeds(axpo, of("recovered", lambda values: values))
        rows.append(
            ["resampled prefixes that are recovered", f"{paper.RECOVERED:.0f}%", _share(ours), "a size, no order"]
        )
    return rows


def _first(values: Sequence[float | None]) -> Sequence[float | None]:
    return values[: max(1, round(TAIL * len(values)))]


def _last(values: Sequence[float | None]) -> Sequence[float | None]:
    return values[-max(1, round(TAIL * len(values))) :]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _title(key: str) -> str:
    return f"Pass@{key.removeprefix('pass')}" if key.startswith("pass") else TITLES.get(key, key)


def _pair(name: str) -> str:
    return name.replace("_minus_", " − ")


def _share(found: Estimate) -> str:
    return _written(found, lambda value: f"{100 * value:.1f}", "%")


def points(found: Estimate) -> str:
    """A difference of shares, in points, with its interval."""
    return _written(found, lambda value: f"{100 * value:+.1f}", "")


def _amount(found: Estimate) -> str:
    return _written(found, lambda value: f"{value:,.0f}", "")


def _written(found: Estimate, write: Callable[[float], str], unit: str) -> str:
    mean, low, high = found["mean"], found["low"], found["high"]
    if mean is None:
        return NOTHING
    ends = "" if low is None or high is None else f" [{write(low)}, {write(high)}]"
    return f"{write(mean)}{unit}{ends}"
