"""Tells, for a comparison in the miniature, how each method answers each kind of held-out question.

    .venv/bin/python benchmarks/kinds.py docs/evidence/longer.yaml docs/evidence/longer/kinds.json

Each family has two kinds, which different calls settle (`axpo.miniature.world`). Of every evaluation amid training and
of the last one: Pass@1, Pass@k and the share of rollouts that call a tool, all seeds pooled; and how often the usual
value would be right, and either of the two common ones. Prints it as rows of Pass@1 / Pass@k / tool use.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

from further import Figures, guesses

from axpo.agent import Group
from axpo.build import HELD_OUT_SEED, MINIATURE_HELD_OUT
from axpo.comparison.aggregate import as_text
from axpo.comparison.cells import has_ended
from axpo.comparison.grid import START, Cell, cells_of, load_grid
from axpo.evaluation.runner import summarise
from axpo.miniature.world import FAMILIES, Problem, sample_problems
from axpo.storage import load_trees

NAMES = {
    "perception": ("plaque in a cell", "plaque between cells"),
    "computation": ("product", "sum"),
    "lookup": ("land", "capital"),
}
KINDS = [kind for family in FAMILIES for kind in NAMES[family]]


def name(problem: Problem) -> str:
    return NAMES[problem.family][problem.kind]


def evaluations(cell: Cell) -> dict[str, Path]:
    """The trees of a run's evaluations, by the number of steps before them."""
    last = cell.folder / "trees" / f"eval_{cell.config.method.name}.parquet"
    if cell.name == START:
        return {"0": last}
    amid = {file.stem.removeprefix("eval_step_"): file for file in last.parent.glob("eval_step_*.parquet")}
    return {**amid, str(cell.config.train.steps): last}


def rows(found: dict[str, Any]) -> list[str]:
    """Markdown: what a guess is worth, and each method's Pass@1 / Pass@k / tool use after so many steps, by kind."""
    guessed, methods = found["guesses"], found["methods"]
    keys = [*methods["sft, 0 steps"][KINDS[0]]]
    table = [
        f"| Pass@1 / Pass@{keys[1].removeprefix('pass')} / tool use | {' | '.join(KINDS)} |",
        f"|---|{'---:|' * len(KINDS)}",
    ]
    for guess, key in (("always the usual value", "usual"), ("either common value", "common")):
        table.append(f"| {guess} | {' | '.join(f'{guessed[kind][key]:.0%}' for kind in KINDS)} |")
    for method, of in methods.items():
        table.append(
            f"| {method} | {' | '.join(' / '.join(f'{of[kind][key]:.0%}' for key in keys) for kind in KINDS)} |"
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("grid", type=Path, metavar="GRID")
    parser.add_argument("results", type=Path, metavar="KINDS.json")
    given = parser.parse_args()
    problems = {p.question.id: p for p in sample_problems(MINIATURE_HELD_OUT, HELD_OUT_SEED, "held_out")}
    pooled: dict[tuple[str, str], dict[str, list[Group]]] = defaultdict(lambda: defaultdict(list))
    ended = [cell for cell in cells_of(load_grid(given.grid)) if cell.command == "train" and has_ended(cell)]
    asked: dict[str, dict[str, Problem]] = defaultdict(dict)
    for cell in ended:
        for steps, file in evaluations(cell).items():
            for tree in load_trees(file):
                problem = problems[tree.question_id]
                asked[name(problem)][tree.question_id] = problem
                pooled[cell.name, steps][name(problem)].append((tree, problem.question))
    samples = ended[0].config.eval.samples

    def figures(groups: list[Group]) -> Figures:
        found = summarise(groups, samples)
        return {key: found[key] for key in ("pass1", f"pass{samples}", "tool_use")}

    methods = {
        f"{method}, {steps} steps": {kind: figures(groups[kind]) for kind in KINDS}
        for (method, steps), groups in sorted(pooled.items(), key=lambda each: int(each[0][1]))
    }
    result = {
        "seeds": sorted({cell.seed for cell in ended}),
        "guesses": {kind: guesses([*asked[kind].values()]) for kind in KINDS},
        "methods": methods,
    }
    given.results.write_text(as_text(result, 3), "utf-8")
    print("\n".join(rows(result)))


if __name__ == "__main__":
    main()
