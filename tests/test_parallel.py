"""Trainings in two real processes, which gloo connects: they come to what one process comes to."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import mistake
from processes import (
    assert_learnt_alike,
    make_project,
    numbers,
    start,
    train,
    train_interrupted,
    wait_for,
    weights,
)

from axpo.launch import LOST, TOLD, free_port
from axpo.storage import load_trees


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("parallel"))


@pytest.fixture(scope="module")
def two(project: Path) -> Path:
    return train(project, "two", "parallel.processes=2")


def test_two_processes_choose_the_prefixes_and_learn_the_weights_of_one(project: Path, two: Path) -> None:
    one = train(project, "one")
    trees = load_trees(one / "trees" / "step_00001.parquet")
    assert sum(s.is_forked for tree in trees for s in tree.segments()) == 4  # all of floor(0.5 · 6 · 3 / 2)
    assert sum(any(s.is_forked for s in tree.segments()) for tree in trees) > 1
    assert_learnt_alike(one, two)


def test_an_interrupted_run_of_two_processes_goes_on_where_it_was(project: Path, two: Path) -> None:
    run = train_interrupted(project, "interrupted", "parallel.processes=2", "train.save_every=0")
    assert numbers(run) == numbers(two)
    assert all(torch.equal(weight, weights(two)[name]) for name, weight in weights(run).items())


def test_a_process_that_is_killed_ends_the_others(project: Path) -> None:
    run = project / "killed"
    process = start("train", project / "config.yaml", f"output={run}", "parallel.processes=2")
    wait_for(run / "trees" / "step_00001.parquet", process)
    children = [int(number) for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(children[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == LOST
    assert errors.splitlines() == [
        "error: another process of the training has ended",
        "error: process 1 has ended with code -9",
    ]
    assert not any(Path(f"/proc/{child}").exists() for child in children)


FAILING = """
import sys
from axpo.config import load_config
from axpo.parallel import joined

with joined(load_config(None, ["parallel.processes=2"])) as ranks:
    assert ranks.all(ranks.rank) == [0, 1]
    assert ranks.sum([ranks.rank, 2.5]) == [1, 5.0]
    assert ranks.of_main(f"of {ranks.rank}") == "of 0"
    assert ranks.to_main(ranks.rank) == ([0, 1] if ranks.main else [])
    if not ranks.main:
        raise OSError("no space left")
    ranks.all("waits for the other")
"""


def test_an_error_of_one_process_is_told_by_the_others() -> None:
    port = str(free_port())
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", FAILING], stderr=subprocess.PIPE, text=True, env=os.environ | place | {"RANK": rank}
        )
        for rank in "01"
    ]
    first, second = (process.communicate(timeout=300)[1] for process in both)
    assert [process.returncode for process in both] == [1, TOLD]
    assert "RankError: process 1 of the training has failed: OSError: no space left" in first
    assert second == ""


@pytest.mark.parametrize("processes", [1, 3])
def test_another_number_of_processes_than_torchrun_has_started(
    project: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = mistake("train", project / "config.yaml", f"output={project}/refused", f"parallel.processes={processes}")
    assert said == (
        f"error: parallel.processes: got {processes}, but torchrun or accelerate has started 2; must be 2\n"
    )
    assert not (project / "refused").exists()
