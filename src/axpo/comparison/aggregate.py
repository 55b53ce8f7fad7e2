"""From the run folders of a comparison to its figures: each cell's, and each method's with intervals over seeds."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from axpo.comparison.bootstrap import METHOD, estimate
from axpo.comparison.cells import has_ended, metrics
from axpo.comparison.grid import START, Cell, Grid
from axpo.config import ConfigError

DYNAMICS = ("accuracy", "tool_use", "all_wrong_tool", "one_outcome", "forked", "recovered")
SPENT = ("rollouts", "generated_tokens", "trained_tokens", "seconds")
SHARES = ("tool_use", "all_wrong_tool", "all_wrong_no_tool", "accuracy_tool", "accuracy_no_tool")

Result = dict[str, Any]
Estimate = dict[str, float | None]
Elsewhere = Mapping[tuple[str, int], Result]  # by method and seed


def read_results(paths: Sequence[Path], cells: Sequence[Cell]) -> Elsewhere:
    """What came of these cells elsewhere: the results.json of other outputs. Raises ConfigError for anything else."""
    wanted = {(cell.name, cell.seed) for cell in cells}
    found: dict[tuple[str, int], Result] = {}
    for path in paths:
        try:
            read = {(result["method"], result["seed"]): result for result in json.loads(path.read_bytes())["cells"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--results: {path} is no results.json that axpo compare has written: {error}") from error
        if not wanted & read.keys():
            raise ConfigError(f"--results: {path} has no result of the grid's methods and seeds")
        found |= {key: result for key, result in read.items() if key in wanted}
    return found


def results_of(cells: Sequence[Cell], elsewhere: Elsewhere) -> list[Result]:
    """What came of each cell that has ended, here or elsewhere (fine-tuning apart).

    `evaluation`: its last one; `evaluations`: those amid training, by the number of steps; `spent`: sums over its
    steps; `dynamics`: lists over its steps, None where a step has no such figure.
    """
    trainings = [cell for cell in cells if cell.command == "train"]
    known = [_result(cell) if has_ended(cell) else elsewhere.get((cell.name, cell.seed)) for cell in trainings]
    return [result for result in known if result is not None]


def _result(cell: Cell) -> Result:
    lines, method = metrics(cell.folder), cell.config.method.name
    steps = [line for line in lines if line["stage"] == method]
    evaluations = {line["of"]: line for line in lines if line["stage"] == "eval"}
    return {
        "method": cell.name,
        "seed": cell.seed,
        "evaluation": _figures(evaluations[method]),
        "evaluations": {
            name.removeprefix("step_"): _figures(line) for name, line in evaluations.items() if name.startswith("step_")
        },
        "steps": len(steps),
        "spent": {key: sum(step[key] for step in steps) for key in SPENT},
        "dynamics": {key: [step[key] for step in steps] for key in DYNAMICS},
    }


def _figures(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in ("stage", "of", "seconds")}


def summarise(grid: Grid, cells: Sequence[Cell], results: Sequence[Result]) -> dict[str, Any]:
    """The figures of methods, pairs and families, each with `mean`, `low` and `high` (None: no interval, or no value).

    Pairs are differences on the seeds that both have; their name is FIRST_minus_SECOND.
    """
    by_seed = {name: _by_seed(results, name) for name in (START, *grid.methods)}
    keys = metric_names(cells)
    families = sorted({family for result in results for family in result["evaluation"]["families"]})

    def of_family(family: str) -> dict[str, Any]:
        def pass1(result: Result) -> float | None:
            share: float | None = result["evaluation"]["families"].get(family)
            return share

        return {
            "methods": {name: {"pass1": over_seeds(found, pass1)} for name, found in by_seed.items()},
            "pairs": {f"{a}_minus_{b}": {"pass1": difference(by_seed[a], by_seed[b], pass1)} for a, b in grid.compared},
        }

    wanted = [cell for cell in cells if cell.command == "train"]
    return {
        "cells": {"finished": len(results), "all": len(wanted)},
        "interval": METHOD,
        "methods": {
            name: {"seeds": len(found), **{key: over_seeds(found, getter(key)) for key in keys}}
            for name, found in by_seed.items()
        },
        "pairs": {
            f"{a}_minus_{b}": {
                "seeds": len(by_seed[a].keys() & by_seed[b].keys()),
                **{key: difference(by_seed[a], by_seed[b], getter(key)) for key in keys},
            }
            for a, b in grid.compared
        },
        "families": {family: of_family(family) for family in families},
    }


def metric_names(cells: Sequence[Cell]) -> list[str]:
    """pass1, pass4 (by the samples of evaluation), the shares, and what was spent."""
    passes = sorted({1, *(cell.config.eval.samples for cell in cells)})
    return [*(f"pass{k}" for k in passes), *SHARES, *SPENT]


def over_seeds(found: Mapping[int, Result], get: Callable[[Result], float | None]) -> Estimate:
    """The estimate of a figure from the results of one method, by seed."""
    return estimate([get(found[seed]) for seed in sorted(found)])


def difference(
    first: Mapping[int, Result], second: Mapping[int, Result], get: Callable[[Result], float | None]
) -> Estimate:
    """The estimate of the difference between two methods on the same seeds."""
    differences = []
    for seed in sorted(first.keys() & second.keys()):
        a, b = get(first[seed]), get(second[seed])
        differences.append(None if a is None or b is None else a - b)
    return estimate(differences)


def getter(key: str) -> Callable[[Result], float | None]:
    """Takes a figure of the last evaluation, or what was spent, from a result."""

    def get(result: Result) -> float | None:
        found: float | None = result["spent" if key in SPENT else "evaluation"].get(key)
        return found

    return get


def _by_seed(results: Sequence[Result], name: str) -> dict[int, Result]:
    return {result["seed"]: result for result in results if result["method"] == name}


def as_text(data: Any, levels: int) -> str:
    """JSON in which so many outer levels have a line for each entry, and what lies deeper stands on one line."""
    return _lines(data, levels, "") + "\n"


def _lines(data: Any, levels: int, margin: str) -> str:
    if not levels or not data or not isinstance(data, dict | list):
        return json.dumps(data, ensure_ascii=False)
    inner = margin + " "
    if isinstance(data, dict):
        entries = [f"{json.dumps(key)}: {_lines(value, levels - 1, inner)}" for key, value in data.items()]
        first, last = "{}"
    else:
        entries = [_lines(value, levels - 1, inner) for value in data]
        first, last = "[]"
    return f"{first}\n{inner}" + f",\n{inner}".join(entries) + f"\n{margin}{last}"
