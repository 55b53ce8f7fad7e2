"""Lets the runs of a comparison go on for more steps, as those of another comparison.

    .venv/bin/python benchmarks/longer.py docs/evidence/grid.yaml docs/evidence/longer.yaml
    .venv/bin/axpo compare docs/evidence/longer.yaml

Copies each run that has ended to where the second grid wants the same method and seed, as if it had been interrupted
there. That is the longer run itself: the learning rate does not depend on train.steps, nor do questions or seeds.
"""

import argparse
import json
import shutil
from pathlib import Path

from axpo.comparison.cells import GRID_COPY, has_ended
from axpo.comparison.grid import START, Cell, cells_of, load_grid
from axpo.config import Config, save_config

DIFFERENT = {"output": ..., "train": {"steps", "save_every"}, "eval": {"every"}}


def same_but_longer(short: Config, long: Config) -> bool:
    """Whether the one is the beginning of the other."""
    shared, wanted = (config.model_dump(mode="json", exclude=DIFFERENT) for config in (short, long))
    return shared == wanted and short.train.steps <= long.train.steps


def lengthen(short: Cell, long: Cell) -> None:
    """Copy a run that has ended to where it goes on. Its last evaluation becomes one amid training."""
    steps, name = short.config.train.steps, short.config.method.name
    copy = long.folder.with_name(long.folder.name + ".tmp")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(short.folder, copy)
    save_config(long.config, copy / "config.yaml")
    if long.config.train.steps > steps:
        lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            if line["stage"] == "eval" and line["of"] == name:
                line["of"] = f"step_{steps}"
        (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (copy / "trees" / f"eval_{name}.parquet").rename(copy / "trees" / f"eval_step_{steps}.parquet")
        (copy / "run.json").write_text(json.dumps({"command": "train", "ended": False}))
        (copy / "summary.json").unlink()
    copy.rename(long.folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("short", type=Path, metavar="GRID")
    parser.add_argument("long", type=Path, metavar="LONGER_GRID")
    given = parser.parse_args()
    grid = load_grid(given.long)
    known = {(cell.name, cell.seed): cell for cell in cells_of(load_grid(given.short)) if has_ended(cell)}
    copied = 0
    for cell in cells_of(grid):
        short = known.get((cell.name, cell.seed))
        if short is None or cell.folder.exists():
            continue
        if cell.name != START and not same_but_longer(short.config, cell.config):
            raise SystemExit(f"{cell.label}: the grids differ in more than train.steps and eval.every")
        cell.folder.parent.mkdir(parents=True, exist_ok=True)
        lengthen(short, cell)
        copied += 1
    if copied:
        shutil.copyfile(given.long, grid.output / GRID_COPY)
    print(f"{copied} runs copied to {grid.output}")


if __name__ == "__main__":
    main()
