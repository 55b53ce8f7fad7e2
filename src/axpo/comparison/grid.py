"""The grid of a comparison: methods × seeds, from a YAML file. All that can be wrong is found before anything runs.

config: base.yaml                # what all runs have in common, or the keys themselves
output: runs/compare
start: {sft: once}               # or per_seed, or the folder of a checkpoint; default: the config's model
seeds: [1, 2, 3, 4, 5, 6, 7, 8]
methods:
  axpo: [method=axpo]
  grpo: [method=grpo]
  grpo2x: {method: {name: grpo, num_rollouts: 2x}}
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from axpo.config import MINIATURE, Config, ConfigError, keys_of_file, load_config, make_config, read_yaml
from axpo.config_errors import describe
from axpo.options import AbsolutePath, Integer, Section

START = "sft"  # the row of the checkpoint that all begin from


def _start(given: Any) -> Any:
    if isinstance(given, dict) and set(given) == {"sft"} and given["sft"] in ("once", "per_seed"):
        return given["sft"]
    if given is None or isinstance(given, Path):
        return given
    raise ValueError("must be the folder of a checkpoint, {sft: once} or {sft: per_seed}")


class Grid(Section):
    """What a grid file holds. Its relative paths are relative to the file."""

    config: AbsolutePath | dict[str, Any]
    """The config of all runs: a file, or its keys."""
    methods: dict[str, list[str] | dict[str, Any]] = Field(min_length=1)
    """What is compared: for each name the overrides of the config, as KEY=VALUE or as keys."""
    seeds: list[Integer] = Field(min_length=1)
    """The seeds that every method is run with."""
    seeds_of: dict[str, list[Integer]] = Field(default_factory=dict)
    """For methods that are run with some of these only, which. Default: none."""
    output: AbsolutePath
    """The folder of the comparison."""
    start: Annotated[Literal["once", "per_seed"] | AbsolutePath | None, BeforeValidator(_start)] = None
    """The policy that all begin from: the folder of a checkpoint, {sft: once}, the config's model fine-tuned on its
    data.sft, or {sft: per_seed}, fine-tuned with each seed. Default: the config's model as it is."""
    pairs: list[tuple[str, str]] | None = None
    """Methods whose difference on the same seeds is told. Default: axpo against each other method."""
    jobs: Integer | None = Field(default=None, ge=1)
    """Runs at the same time. Default: cores by threads of a run."""

    @property
    def compared(self) -> list[tuple[str, str]]:
        """The pairs, or those that are taken where none are given."""
        if self.pairs is not None:
            return self.pairs
        return [("axpo", name) for name in self.methods if name != "axpo"] if "axpo" in self.methods else []


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a comparison. `needs` is the run that makes the checkpoint which this one begins from."""

    name: str  # of its method
    seed: int
    config: Config
    command: Literal["train", "sft"] = "train"
    needs: "Cell | None" = None

    @property
    def folder(self) -> Path:
        return self.config.output

    @property
    def label(self) -> str:
        return f"{self.name} seed {self.seed}" if self.command == "train" else f"fine-tuning seed {self.seed}"

    @property
    def file(self) -> str:
        """What its config and its log are called, without the ending."""
        return self.label.replace(" ", "-")


def load_grid(path: Path) -> Grid:
    """Read a grid file. Raises ConfigError with one line for each problem."""
    given = read_yaml(path)
    folder = Path(os.path.abspath(path)).parent
    for key in ("config", "output", "start"):
        if isinstance(given.get(key), str):
            given[key] = folder / os.path.expanduser(given[key])
    try:
        grid = Grid.model_validate(given)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in describe(error, Grid))) from error
    if isinstance(grid.config, dict):
        grid = grid.model_copy(update={"config": keys_of_file(grid.config, folder)})
    if found := [*_problems(grid)]:
        raise ConfigError("\n".join(f"{path}: {line}" for line in found))
    return grid


def _problems(grid: Grid) -> list[str]:
    found = []
    for name in grid.methods:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name == START:
            found.append(f"methods: got the name {name!r}, must be letters, digits, _, . and -, and not {START!r}")
    if len(set(grid.seeds)) < len(grid.seeds) or min(grid.seeds) < 0:
        found.append(f"seeds: got {grid.seeds}, must be different numbers from 0 on")
    for name, seeds in grid.seeds_of.items():
        if name not in grid.methods or not seeds or not set(seeds) <= set(grid.seeds):
            found.append(f"seeds_of.{name}: got {seeds}, must be seeds of {grid.seeds}, of a method of the grid")
    known = [*grid.methods, START]
    for pair in grid.pairs or []:
        found += [f"pairs: got {name!r}, must be one of {', '.join(known)}" for name in pair if name not in known]
        if pair[0] == pair[1]:
            found.append(f"pairs: got {list(pair)}, must be two different methods")
    if isinstance(grid.start, Path) and not (grid.start / "config.json").is_file():
        found.append(f"start: {grid.start} is not a checkpoint: it holds no config.json")
    return found


def cells_of(grid: Grid) -> list[Cell]:
    """The runs, in the order in which they are begun: all methods of a seed before the next seed.

    Raises ConfigError where a config does not hold, and where the output holds a run of another config.
    """
    base = _config(grid, "config", {}, {})  # it must hold by itself: the start is evaluated with it
    made: dict[int, Cell] = {}
    cells: list[Cell] = []
    for seed in grid.seeds:
        start = str(grid.start) if isinstance(grid.start, Path) else None
        teacher = None
        if grid.start in ("once", "per_seed"):
            taught = seed if grid.start == "per_seed" else base.seed
            if taught not in made:
                made[taught] = _sft_cell(grid, taught)
                cells.append(made[taught])
            teacher = made[taught]
            start = str(teacher.folder / "checkpoint")
        ours = {"seed": seed} | ({"model": start} if start else {})
        for name, overrides in ((START, {"train": {"steps": 0}}), *grid.methods.items()):
            if seed not in grid.seeds_of.get(name, grid.seeds):
                continue
            folder = grid.output / "cells" / name / f"seed_{seed}"
            config = _config(grid, f"methods.{name}", overrides, ours | {"output": str(folder)})
            cells.append(Cell(name, seed, config, needs=teacher))
    for cell in cells:
        _check(cell)
    return cells


def _sft_cell(grid: Grid, seed: int) -> Cell:
    config = _config(grid, "config", {}, {"seed": seed, "output": str(grid.output / "start" / f"seed_{seed}")})
    if config.data.sft is None:
        raise ConfigError("start: got an SFT, but the config has no data.sft; must be trajectories or 'miniature'")
    return Cell(START, seed, config, "sft")


def _config(grid: Grid, where: str, overrides: list[str] | Mapping[str, Any], ours: Mapping[str, Any]) -> Config:
    """The config with the overrides of a method and what the grid itself decides."""
    given = overrides if isinstance(overrides, list) else _as_overrides(overrides)
    for key in (override.partition("=")[0].strip() for override in given):
        if key in ours:
            raise ConfigError(f"{where}: {key}: cannot be given here; the grid decides it")
    decided = [*given, *_as_overrides(ours)]
    try:
        if isinstance(grid.config, Path):
            config = load_config(grid.config, decided)
        else:
            config = make_config(grid.config, Path(), decided)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{where}: {line}" for line in str(error).splitlines())) from error
    return config if config.threads else config.model_copy(update={"threads": 1})


def _as_overrides(given: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in given.items()]


def _check(cell: Cell) -> None:
    """Raise ConfigError for a run without questions, and for one that lies there already with another config."""
    for key in ("train", "eval"):
        source = getattr(cell.config.data, key)
        if source is None or (source != MINIATURE and not Path(source).is_file()):
            raise ConfigError(f"data.{key}: got {source or 'nothing'}, must be a file of questions or {MINIATURE!r}")
    if not (cell.folder / "config.yaml").is_file():
        return
    known, wanted = (_flat(c.model_dump(mode="json")) for c in (load_config(cell.folder / "config.yaml"), cell.config))
    for key in sorted(known.keys() | wanted.keys()):
        if known.get(key) != wanted.get(key) and key != "tools.cache":
            raise ConfigError(
                f"{cell.folder}: was run with {key}={known.get(key)}, but the grid says {wanted.get(key)}; "
                "must be the same, or the grid needs another output"
            )


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
