"""Grid files: what runs they make, and what is wrong with them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from axpo.comparison.grid import cells_of, load_grid
from axpo.config import ConfigError, load_config, save_config

BASE: dict[str, Any] = {
    "data": {"train": "miniature", "eval": "miniature", "sft": "miniature"},
    "tools": ["zoom", "python", "my.py"],
    "model": "miniature",
}
GRID: dict[str, Any] = {
    "config": BASE,
    "output": "out",
    "seeds": [4, 5],
    "methods": {"axpo": ["method.budget=0.5"], "grpo": {"method": {"name": "grpo"}}, "cispo": ["method=cispo"]},
}


def write(folder: Path, **changes: Any) -> Path:
    (folder / "grid.yaml").write_text(yaml.safe_dump({**GRID, **changes}, sort_keys=False))
    return folder / "grid.yaml"


def wrong(path: Path) -> str:
    with pytest.raises(ConfigError) as raised:
        cells_of(load_grid(path))
    return str(raised.value)


def test_each_method_with_each_seed_and_the_start(tmp_path: Path) -> None:
    grid = load_grid(write(tmp_path))
    cells = cells_of(grid)
    names = ["sft", "axpo", "grpo", "cispo"]
    assert [cell.label for cell in cells] == [f"{name} seed {seed}" for seed in (4, 5) for name in names]
    start, axpo, grpo, cispo = (cell.config for cell in cells[:4])
    assert (start.train.steps, axpo.method.budget, grpo.method.name, cispo.method.kl) == (0, 0.5, "grpo", 0.0)
    assert axpo.output == tmp_path / "out" / "cells" / "axpo" / "seed_4"
    assert {config.seed for config in (start, axpo, grpo)} == {4}
    assert axpo.threads == 1
    assert axpo.tools.names[-1] == str(tmp_path / "my.py")
    assert grid.compared == [("axpo", "grpo"), ("axpo", "cispo")]
    assert load_grid(write(tmp_path, pairs=[["grpo", "sft"]])).compared == [("grpo", "sft")]


def test_a_config_in_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "base.yaml").write_text(yaml.safe_dump(BASE | {"threads": 2}))
    config = cells_of(load_grid(write(tmp_path, config="deep/base.yaml")))[1].config
    assert (config.threads, config.tools.names[-1]) == (2, str(tmp_path / "deep" / "my.py"))


def test_the_start_is_made_once_or_with_each_seed(tmp_path: Path) -> None:
    once = cells_of(load_grid(write(tmp_path, start={"sft": "once"}, config=BASE | {"seed": 7})))
    assert [(cell.command, cell.seed) for cell in once if cell.command == "sft"] == [("sft", 7)]
    assert {cell.needs for cell in once[1:]} == {once[0]}
    assert {cell.config.model for cell in once[1:]} == {str(tmp_path / "out" / "start" / "seed_7" / "checkpoint")}
    each = cells_of(load_grid(write(tmp_path, start={"sft": "per_seed"})))
    assert [cell.seed for cell in each if cell.command == "sft"] == [4, 5]
    assert all(cell.needs and cell.needs.seed == cell.seed for cell in each if cell.command == "train")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    given = cells_of(load_grid(write(tmp_path, start="model")))
    assert {cell.config.model for cell in given} == {str(tmp_path / "model")}


def test_a_method_may_have_fewer_seeds(tmp_path: Path) -> None:
    cells = cells_of(load_grid(write(tmp_path, seeds_of={"grpo": [5]})))
    assert [cell.seed for cell in cells if cell.name == "grpo"] == [5]
    assert [cell.seed for cell in cells if cell.name == "axpo"] == [4, 5]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seeds": [1, 1]}, "seeds: got [1, 1], must be different numbers from 0 on"),
        ({"seeds": []}, "seeds: got [], "),
        ({"seeds": ["x"]}, "seeds[0]: got 'x', must be a valid integer"),
        ({"seeds_of": {"axpo": [9]}}, "seeds_of.axpo: got [9], must be seeds of [4, 5], of a method of the grid"),
        ({"seeds_of": {"ppo": [4]}}, "seeds_of.ppo: got [4], must be"),
        ({"seed": [1]}, "seed: unknown key -> did you mean seeds?"),
        ({"methods": {"sft": []}}, "methods: got the name 'sft'"),
        ({"methods": {"a/b": []}}, "methods: got the name 'a/b', must be letters, digits, _, . and -"),
        ({"pairs": [["axpo", "ppo"]]}, "pairs: got 'ppo', must be one of axpo, grpo, cispo, sft"),
        ({"pairs": [["axpo", "axpo"]]}, "must be two different methods"),
        ({"jobs": 0}, "jobs: got 0, must be greater than or equal to 1"),
        ({"start": {"sft": "twice"}}, "must be the folder of a checkpoint, {sft: once} or {sft: per_seed}"),
        ({"start": "nowhere"}, "nowhere is not a checkpoint: it holds no config.json"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml: no such file; must be a YAML file"),
        ({"config": BASE | {"sed": 1}}, "config: sed: unknown key -> did you mean seed?"),
        ({"methods": {"x": ["method.rank=best"]}}, "methods.x: method.rank: got 'best', must be 'confidence'"),
        ({"methods": {"x": ["seed=3"]}}, "methods.x: seed: cannot be given here; the grid decides it"),
        ({"methods": {"x": {"output": "y"}}}, "methods.x: output: cannot be given here; the grid decides it"),
        ({"config": {"data": {"train": "miniature"}}}, "data.eval: got nothing, must be a file of questions"),
        ({"config": {"data": {"train": "no.jsonl", "eval": "miniature"}}}, "no.jsonl, must be a file of questions"),
        ({"config": {"data": BASE["data"] | {"sft": None}}, "start": {"sft": "once"}}, "the config has no data.sft"),
    ],
)
def test_mistakes_are_told_before_anything_runs(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    assert told in wrong(write(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_config_is_not_taken_for_that_of_the_grid(tmp_path: Path) -> None:
    cell = cells_of(load_grid(write(tmp_path)))[1]
    cell.folder.mkdir(parents=True)
    save_config(cell.config, cell.folder / "config.yaml")
    assert load_config(cell.folder / "config.yaml") == cell.config
    cells_of(load_grid(write(tmp_path, seeds=[4, 6])))  # more seeds, more methods: that is no other config
    told = wrong(write(tmp_path, config=BASE | {"train": {"steps": 7}}))
    assert told.startswith(f"{cell.folder}: was run with train.steps=200, but the grid says 7; must be the same")
