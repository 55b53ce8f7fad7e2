"""Asks the study's policies more: other held-out questions, far ones, and ones for a tool that they never had.

    .venv/bin/python benchmarks/further.py runs/longer docs/evidence/further.json

For each of the methods and seeds that have ended in a comparison of the miniature, Pass@1, Pass@4 and tool use on 300
held-out questions of another seed, on 90 far ones (smaller plaques, longer numbers, longer names) and on 90 about
pictures that only an image search settles; of these also the share of rollouts that call it. What has been evaluated
is not evaluated again. Beside them, what a guess is worth there and on the held-out questions of the comparison: how
often the usual value is right, and either of the two common ones.
"""

import argparse
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

from evidence_rows import METHODS, PAIRS

from axpo.build import HELD_OUT_SEED
from axpo.comparison.aggregate import as_text, difference, over_seeds
from axpo.comparison.bootstrap import METHOD
from axpo.comparison.report import points
from axpo.miniature import unseen
from axpo.miniature.world import Problem, sample_problems
from axpo.run import run_status
from axpo.storage import load_trees

MORE, MORE_SEED = 300, 2  # held-out questions
SPLITS = {"more": "300 held-out", "far": "far", "unseen": "unseen tool"}
TITLES = {"pass1": "Pass@1", "pass4": "Pass@4", "tool_use": "tool use", "image_search": "image search"}
Figures = dict[str, float]


def evaluate(cell: Path, questions: Path) -> dict[str, Figures]:
    """The figures of one policy on each split."""
    return {split: _evaluate(cell, split, questions) for split in SPLITS}


def _evaluate(cell: Path, split: str, questions: Path) -> Figures:
    out = cell / split
    if not out.is_dir():
        overrides = [f"data.eval={questions / f'{split}.jsonl'}", "eval.questions=0", "threads=1"]
        if split == "unseen":
            overrides += ["eval.tools=[image_search]", f"tools.image_search={{table: {questions / 'table.jsonl'}}}"]
        shutil.rmtree(cell / "eval", ignore_errors=True)  # of an evaluation that was cut short
        command = [sys.executable, "-m", "axpo", "eval", str(cell), *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (cell / "eval").rename(out)
    (summary,) = json.loads((out / "summary.json").read_text()).values()
    figures = {key: summary[key] for key in ("pass1", "pass4", "tool_use")}
    if split == "unseen":
        (trees,) = (out / "trees").iterdir()
        leaves = [leaf for tree in load_trees(trees) for leaf in tree.leaves()]
        called = [any(use.name == "image_search" for s in leaf.path() for use in s.uses) for leaf in leaves]
        figures["image_search"] = sum(called) / len(called)
    return figures


def guesses(problems: list[Problem]) -> Figures:
    """How often the usual value is the answer, and how often one of the two common ones."""
    answers = [(problem.guesses, str(problem.question.answer)) for problem in problems]
    ranks = [common.index(answer) if answer in common else 2 for common, answer in answers]
    return {"usual": ranks.count(0) / len(ranks), "common": 1 - ranks.count(2) / len(ranks)}


def summarise(found: dict[str, dict[int, Figures]]) -> dict[str, object]:
    """Means and intervals of each method, of figures by seed, and of AXPO's differences on the same seeds."""
    axpo = found["axpo"]
    keys = [*next(iter(axpo.values()))] if axpo else []
    return {
        "methods": {
            method: {"seeds": len(seeds), **{key: over_seeds(seeds, itemgetter(key)) for key in keys}}
            for method, seeds in found.items()
        },
        "pairs": {
            f"axpo_minus_{method}": {key: difference(axpo, seeds, itemgetter(key)) for key in keys}
            for method, seeds in found.items()
            if method != "axpo"
        },
    }


def rows(found: dict[str, Any]) -> list[str]:
    """Markdown: the figures of each split for each method, and AXPO's differences, in points."""
    table = []
    for split, title in SPLITS.items():
        methods, pairs = found[split]["methods"], found[split]["pairs"]
        asked = [method for method in METHODS if methods[method]["seeds"]]
        for key in (key for key in methods["axpo"] if key != "seeds"):
            shares = [f"{methods[method][key]['mean']:.1%}" for method in asked]
            differences = [points(pairs[pair][key]) for pair in PAIRS if pair in pairs]
            table.append(f"| {title}, {TITLES[key]} | {' | '.join((*shares, *differences))} |")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("comparison", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    questions = arguments.comparison / "questions"
    unseen.write(questions)
    more = sample_problems(MORE, MORE_SEED, "held_out")
    (questions / "more.jsonl").write_text("".join(json.dumps(unseen.row(p.question)) + "\n" for p in more))
    cells = [
        cell
        for method in METHODS
        for cell in sorted((arguments.comparison / "cells" / method).glob("seed_*"))
        if run_status(cell)["ended"]
    ]
    with ThreadPoolExecutor(2) as pool:
        figures = dict(zip(cells, pool.map(evaluate, cells, [questions] * len(cells)), strict=True))
    found: dict[str, dict[str, dict[int, Figures]]] = {split: {method: {} for method in METHODS} for split in SPLITS}
    for cell, split in product(cells, SPLITS):
        found[split][cell.parent.name][int(cell.name.removeprefix("seed_"))] = figures[cell][split]
    problems = {
        "held_out": sample_problems(150, HELD_OUT_SEED, "held_out"),
        "more": more,
        "far": sample_problems(unseen.COUNT, unseen.FAR_SEED, "far"),
        "unseen": unseen.sample_pictures(unseen.COUNT, 0),
    }
    result = {
        "interval": METHOD,
        "guesses": {name: guesses(asked) for name, asked in problems.items()},
        **{split: summarise(found[split]) for split in SPLITS},
    }
    arguments.out.write_text(as_text(result, 4))
    print("\n".join(rows(result)))


if __name__ == "__main__":
    main()
