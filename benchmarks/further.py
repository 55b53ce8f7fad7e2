"""Evaluates the study's policies away from what they were trained on: far questions, and a tool that they never had.

    .venv/bin/python benchmarks/further.py runs/evidence docs/evidence/further.json

For each of the methods and seeds that have ended in a comparison of the miniature, Pass@1, Pass@4 and tool use on 90
far questions (smaller plaques, longer numbers, longer names) and on 90 questions about pictures that only an image
search settles; of these also the share of rollouts that call it. What has been evaluated is not evaluated again.
"""

import argparse
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import DEVNULL

from axpo.comparison.bootstrap import METHOD, estimate
from axpo.miniature import unseen
from axpo.storage import load_trees

METHODS = ("sft", "grpo", "grpo2x", "axpo")
SPLITS = ("far", "unseen")
Figures = dict[str, float]


def evaluate(cell: Path, split: str, questions: Path) -> Figures:
    """The figures of one policy on one split."""
    out = cell / split
    if not out.is_dir():
        overrides = [f"data.eval={questions / f'{split}.jsonl'}", "eval.questions=0", "threads=1"]
        if split == "unseen":
            overrides += [
                "eval.tools=[image_search]",
                f"tools.image_search={{table: {questions / 'table.jsonl'}}}",
            ]
        shutil.rmtree(cell / "eval", ignore_errors=True)  # of an evaluation that was cut short
        subprocess.run([sys.executable, "-m", "axpo", "eval", str(cell), *overrides], check=True, stdout=DEVNULL)
        (cell / "eval").rename(out)
    (summary,) = json.loads((out / "summary.json").read_text()).values()
    figures = {key: summary[key] for key in ("pass1", "pass4", "tool_use")}
    if split == "unseen":
        (trees,) = (out / "trees").iterdir()
        leaves = [leaf for tree in load_trees(trees) for leaf in tree.leaves()]
        called = [any(use.name == "image_search" for s in leaf.path() for use in s.uses) for leaf in leaves]
        figures["image_search"] = sum(called) / len(called)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("comparison", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    questions = arguments.comparison / "further" / "questions"
    unseen.write(questions)
    ended = [
        (method, cell)
        for method in METHODS
        for cell in sorted((arguments.comparison / "cells" / method).glob("seed_*"))
        if (cell / "summary.json").is_file()
    ]
    found: dict[str, dict[str, dict[str, Figures]]] = {split: {method: {} for method in METHODS} for split in SPLITS}
    with ThreadPoolExecutor(2) as pool:
        tasks = [(split, method, cell) for split in SPLITS for method, cell in ended]
        for (split, method, cell), figures in zip(
            tasks, pool.map(lambda task: evaluate(task[2], task[0], questions), tasks), strict=True
        ):
            found[split][method][cell.name] = figures
    arguments.out.write_text(json.dumps({"interval": METHOD, **{s: summarise(found[s]) for s in SPLITS}}, indent=1))


def summarise(found: dict[str, dict[str, Figures]]) -> dict[str, object]:
    """Means and intervals of each method, and of AXPO's differences on the same seeds."""
    keys = list(next(iter(found["axpo"].values())))
    return {
        "methods": {
            method: {"seeds": len(seeds), **{key: estimate([seeds[s][key] for s in sorted(seeds)]) for key in keys}}
            for method, seeds in found.items()
        },
        "pairs": {
            f"axpo_minus_{method}": {
                key: estimate(
                    [found["axpo"][s][key] - seeds[s][key] for s in sorted(seeds.keys() & found["axpo"].keys())]
                )
                for key in keys
            }
            for method, seeds in found.items()
            if method != "axpo"
        },
    }


if __name__ == "__main__":
    main()
