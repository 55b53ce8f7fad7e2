"""Prints the rows of a comparison that docs/evidence/README.md shows: the main methods, then ablations and rivals.

.venv/bin/python benchmarks/evidence_rows.py docs/evidence/summary.json
.venv/bin/python benchmarks/evidence_rows.py docs/evidence/longer/summary.json
.venv/bin/python benchmarks/evidence_rows.py docs/evidence/longer_ablations/summary.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from axpo.comparison import paper
from axpo.comparison.aggregate import Estimate
from axpo.comparison.grid import cells_of, load_grid
from axpo.comparison.report import points
from axpo.miniature.world import FAMILIES

METHODS = ("sft", "grpo", "grpo2x", "axpo")
PAIRS = ("axpo_minus_grpo", "axpo_minus_grpo2x")
GRID = Path(__file__).parents[1] / "docs" / "evidence" / "grid.yaml"
SPENT = (("rollouts", "rollouts"), ("generated tokens", "generated_tokens"), ("seconds, one core", "seconds"))


def rows(summary: dict[str, Any]) -> list[str]:
    """Markdown: the four methods and the two differences that were to be compared."""
    methods, pairs, families = summary["methods"], summary["pairs"], summary["families"]
    found = [
        _row(name, [methods[m][key] for m in METHODS], [pairs[p][key] for p in PAIRS])
        for name, key in (
            ("Pass@1", "pass1"),
            ("Pass@4", "pass4"),
            ("rollouts that call a tool", "tool_use"),
            ("tool-using subgroup all wrong", "all_wrong_tool"),
        )
    ]
    for family in FAMILIES:
        of = families[family]
        found.append(
            _row(
                f"Pass@1, {family}",
                [of["methods"][m]["pass1"] for m in METHODS],
                [of["pairs"][p]["pass1"] for p in PAIRS],
            )
        )
    for name, key in SPENT:
        spent = [methods[method][key]["mean"] for method in METHODS]
        ratios = [spent[-1] / methods[pair.removeprefix("axpo_minus_")][key]["mean"] for pair in PAIRS]
        found.append(
            f"| {name} | {' | '.join(f'{each:,.0f}' for each in spent)} | ×{ratios[0]:.2f} | ×{ratios[1]:.2f} |"
        )
    return found


def others(summary: dict[str, Any]) -> list[str]:
    """Markdown: what the ablations and rivals that have run came to, and by how much AXPO is above each, in points.

    Behind each difference in Pass@1 and Pass@4 stands the paper's.
    """
    found = []
    trained = {cell.name: cell.config for cell in cells_of(load_grid(GRID)) if cell.command == "train"}
    for name, config in trained.items():
        of, pair, row = summary["methods"].get(name), summary["pairs"].get(f"axpo_minus_{name}"), paper.row_of(config)
        if name in METHODS or row is None or of is None or not of["seeds"]:
            continue
        values = " | ".join(f"{of[key]['mean']:.1%}" for key in ("pass1", "pass4", "tool_use"))
        differences = [
            f"{points(pair[key])} ({getattr(paper.AXPO, key) - getattr(row, key):+.1f})" for key in ("pass1", "pass4")
        ]
        found.append(f"| {row.title} | {values} | {' | '.join((*differences, points(pair['tool_use'])))} |")
    return found


def _row(name: str, values: list[Estimate], differences: list[Estimate]) -> str:
    cells = [*(f"{value['mean']:.1%}" for value in values), *map(points, differences)]
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    read = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    known = rows(read) if set(METHODS) <= read["methods"].keys() else []
    print("\n".join([*known, "", *others(read)]))
