"""Prints, for a comparison in the miniature, Pass@1 and Pass@k of each kind of held-out question.

    .venv/bin/python benchmarks/kinds.py docs/evidence/grid.yaml

Each family has two kinds, which different calls settle (`axpo.miniature.world`). All seeds are pooled.
"""

import argparse
from collections import defaultdict
from pathlib import Path

from axpo.agent import Group
from axpo.build import HELD_OUT_SEED, MINIATURE_HELD_OUT
from axpo.comparison.cells import has_ended
from axpo.comparison.grid import START, cells_of, load_grid
from axpo.evaluation.runner import summarise
from axpo.miniature.world import FAMILIES, sample_problems
from axpo.storage import load_trees

KINDS = [(family, kind) for family in FAMILIES for kind in (0, 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("grid", type=Path, metavar="GRID")
    problems = {p.question.id: p for p in sample_problems(MINIATURE_HELD_OUT, HELD_OUT_SEED, "held_out")}
    pooled: dict[str, dict[tuple[str, int], list[Group]]] = defaultdict(lambda: defaultdict(list))
    ended = [c for c in cells_of(load_grid(parser.parse_args().grid)) if c.name != START and has_ended(c)]
    for cell in ended:
        for tree in load_trees(cell.folder / "trees" / f"eval_{cell.config.method.name}.parquet"):
            problem = problems[tree.question_id]
            pooled[cell.name][problem.family, problem.kind].append((tree, problem.question))
    print(f"| Pass@1 / Pass@k | {' | '.join(f'{family} {kind + 1}' for family, kind in KINDS)} |")
    print(f"|---|{'---:|' * len(KINDS)}")
    samples = ended[0].config.eval.samples if ended else 0
    for name, groups in pooled.items():
        found = [summarise(groups[kind], samples) for kind in KINDS]
        cells = [f"{each['pass1']:.0%} / {each[f'pass{samples}']:.0%}" for each in found]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
