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
    laid_out,
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


EXCHANGING = """
import sys, torch, torch.distributed
from axpo.config import load_config
from axpo.parallel import joined

def fail():
    raise OSError("no space left")

with joined(load_config(None, ["parallel.processes=2"])) as ranks:
    assert ranks.all(ranks.rank) == [0, 1]
    assert ranks.sum([ranks.rank, 2.5]) == [1, 5.0]
    assert ranks.of_main(f"of {ranks.rank}") == "of 0"
    assert ranks.to_main(ranks.rank) == ([0, 1] if ranks.main else [])
    if sys.argv[1] == "before an exchange":
        ranks.all("waits for the other") if ranks.main else fail()
    elif sys.argv[1] == "before gradients are added up":
        ranks.sum_gradients([torch.zeros(3)], torch.device("cpu")) if ranks.main else fail()
    elif sys.argv[1] == "as it is sent":
        ranks.all(1 if ranks.main else sys.stdin)
    elif sys.argv[1] == "amid what both compute":
        with ranks.bound():
            torch.distributed.all_reduce(torch.zeros(3)) if ranks.main else fail()
    elif sys.argv[1] == "after what both compute":
        with ranks.bound():
            ranks.main or fail()
        ranks.all("waits for the other")
    elif sys.argv[1] == "in saving after an error":
        try:
            with ranks.together():
                raise ValueError("of both")
        finally:
            ranks.all("waits until it is written") if ranks.main else fail()
"""


@pytest.mark.parametrize("where", ["before an exchange", "before gradients are added up", "as it is sent"])
def test_an_error_of_one_process_is_told_by_the_others(where: str) -> None:
    first, second = run_both(where)
    assert first[0] == 1
    error = "TypeError: cannot pickle" if where == "as it is sent" else "OSError: no space left"
    assert f"RankError: process 1 of the training has failed: {error}" in first[1]
    assert second == (TOLD, "")


@pytest.mark.parametrize("where", ["amid what both compute", "after what both compute"])
def test_an_error_of_one_process_amid_what_both_compute_is_told_by_both(where: str) -> None:
    """On GPUs the first may hang there, and the other's word be all there is."""
    first, second = run_both(where)
    assert first[0] == second[0] == 1
    assert "RankError: process 1 of the training has failed: OSError: no space left" in first[1]
    assert "OSError: no space left" in second[1]


def test_an_error_in_saving_after_an_error_ends_both() -> None:
    first, second = run_both("in saving after an error")
    assert first[0] == 1
    assert "ValueError: of both" in first[1]
    assert second == (TOLD, "")


def run_both(where: str) -> list[tuple[int, str]]:
    """Exit code and stderr of two processes, the second of which fails."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", EXCHANGING, where],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | place | {"RANK": rank},
        )
        for rank in "01"
    ]
    said = [process.communicate(timeout=300)[1] for process in both]
    return [(process.returncode, errors) for process, errors in zip(both, said, strict=True)]


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node=2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2"],
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_torchrun_and_accelerate_start_the_same_training(project: Path, two: Path, name: str) -> None:
    run = project / name
    command = [sys.executable, "-m", *LAUNCHERS[name], "-m", "axpo", "train", str(project / "config.yaml")]

    def launched(*overrides: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*command, f"output={run}", *overrides],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
        )

    refused = launched("parallel.processes=3")  # the processes are the launcher's, not axpo's own
    assert "parallel.processes: got 3, but torchrun or accelerate has started 2; must be 2" in refused.stderr
    started = launched("parallel.processes=2", "train.steps=1", "data.eval=null")
    assert started.returncode == 0, started.stderr
    ours, theirs = (load_trees(each / "trees" / "step_00001.parquet") for each in (run, two))
    assert laid_out(ours) == laid_out(theirs)


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


def test_a_process_of_several_ends_with_its_code_and_all_written() -> None:
    """Without taking the interpreter apart, amid which it may be aborted."""
    code = (
        "import atexit; from axpo.launch import end_rank; atexit.register(print, 'written'); end_rank({}); print('on')"
    )
    for given, rank, expected in (("3", {"RANK": "1"}, (3, "written\n")), ("None", {}, (0, "on\nwritten\n"))):
        ended = subprocess.run(
            [sys.executable, "-c", code.format(given)], capture_output=True, text=True, env=os.environ | rank
        )
        assert (ended.returncode, ended.stdout) == expected
