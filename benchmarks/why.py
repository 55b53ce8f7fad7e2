"""Tests, on the trees of a comparison, why some ablations of AXPO change nothing in the miniature.

    .venv/bin/python benchmarks/why.py runs/evidence docs/evidence/why.json

- Ranking: does a call's confidence tell whether its prefix will be recovered? From the runs with random ranking, where
  no choice was made by it: the chance that a recovered prefix had the less confident call than one that was not (0.5:
  it tells nothing), over all pairs of a run and over those of one question in one step; and how many failed calls
  there were, on the questions that trigger, for each prefix that was chosen.
- One group: how alike are the advantages of prefixes and continuations under both rules, on the same trees?
- Resampling without a tool: of what is resampled, how much is of rollouts without one, and how often is each recovered?

Intervals are over seeds.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from axpo.comparison.aggregate import as_text
from axpo.comparison.bootstrap import METHOD, estimate
from axpo.credit import credit_axpo
from axpo.fork import confidence
from axpo.run import run_status
from axpo.storage import load_trees
from axpo.tree import RolloutTree, Segment, scored

Figures = dict[str, float]


def forks(tree: RolloutTree) -> Iterator[tuple[Segment, Segment, bool]]:
    """The prefixes that were resampled, with what followed them at first, and whether they were recovered."""
    for prefix in tree.segments():
        if prefix.is_forked and prefix is not tree.root:
            (failed,) = (child for child in prefix.children if not child.resampled)
            yield prefix, failed, any(reward > 0.5 for _, reward in scored(tree.continuations(prefix)))


def ranking(trees: list[RolloutTree]) -> Figures:
    found = [
        (of, confidence(failed, slice(None)), recovered)  # from the opening tag to the turn's end
        for of, tree in enumerate(trees)
        for _, failed, recovered in forks(tree)
    ]
    asked, confidences, recovered = map(np.array, zip(*found, strict=True))
    yes, no = confidences[recovered][:, None], confidences[~recovered][None]
    less = (yes < no) + 0.5 * (yes == no)
    same = asked[recovered][:, None] == asked[~recovered][None]
    return {
        "recovered_less_confident": float(less.mean()),
        "recovered_less_confident_of_one_question": float(less[same].mean()),
        "candidates_per_prefix": sum(map(failed_calls, trees)) / len(found),
    }


def failed_calls(tree: RolloutTree) -> int:
    """The rollouts of a question that might be resampled: those with a tool, where all of these are wrong."""
    rewards = [reward for leaf, reward in scored(tree.base_leaves()) if leaf.uses_tool]
    return 0 if any(reward > 0.5 for reward in rewards) else len(rewards)


def one_group(trees: list[RolloutTree]) -> Figures:
    found: dict[bool, list[float]] = {True: [], False: []}
    for tree in trees:
        if any(True for _ in forks(tree)):
            for separate, advantages in found.items():
                streams = credit_axpo(tree, separate_groups=separate)
                new = (s for s in streams if any(part.in_continuation or part.is_forked for part in s.segments))
                advantages += [stream.advantage for stream in new]
    apart, together = (np.array(found[separate]) for separate in (True, False))
    return {
        "correlation": float(np.corrcoef(apart, together)[0, 1]),
        "size_apart": _size(apart),
        "size_together": _size(together),
        "nothing_apart": float((apart == 0).mean()),
        "nothing_together": float((together == 0).mean()),
    }


def _size(advantages: NDArray[np.float64]) -> float:
    return float(np.sqrt((advantages**2).mean()))


def without_tool(trees: list[RolloutTree]) -> Figures:
    recovered: dict[bool, list[bool]] = {True: [], False: []}
    for tree in trees:
        for prefix, _, found in forks(tree):
            recovered[bool(prefix.calls)].append(found)
    return {
        "share_without_tool": len(recovered[False]) / (len(recovered[True]) + len(recovered[False])),
        "recovered_with_tool": float(np.mean(recovered[True])),
        "recovered_without_tool": float(np.mean(recovered[False])),
    }


QUESTIONS = {
    "random_rank": {"ranking": ranking, "one_group": one_group},
    "resample_no_tool": {"resample_no_tool": without_tool},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("output", type=Path, metavar="COMPARISON")
    parser.add_argument("results", type=Path, metavar="RESULTS.json")
    given = parser.parse_args()
    figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for method, measures in QUESTIONS.items():
        for run in sorted((given.output / "cells" / method).iterdir()):
            if run_status(run)["ended"]:
                files = sorted((run / "trees").glob("step_*.parquet"))
                trees = [tree for file in files for tree in load_trees(file)]
                for name, measure in measures.items():
                    for key, value in measure(trees).items():
                        figures[name][key].append(value)
    found = {name: {key: estimate(each) for key, each in of.items()} for name, of in figures.items()}
    seeds = {name: len(next(iter(of.values()))) for name, of in figures.items()}
    given.results.write_text(as_text({"seeds": seeds, "intervals": METHOD, **found}, 3), encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
