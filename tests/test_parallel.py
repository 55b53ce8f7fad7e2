"""Trainings in two real processes, which gloo connects: they come to what one process comes to."""

from pathlib import Path

import pytest
from processes import assert_learnt_alike, make_project, train

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
    assert sum(s.is_forked for tree in trees for s in tree.segments()) == 4  # all of floor(0.5 · 4 · 4 / 2)
    assert sum(any(s.is_forked for s in tree.segments()) for tree in trees) > 1
    assert_learnt_alike(one, two)


def test_shared_weights_learn_what_whole_ones_learn(project: Path, two: Path) -> None:
    assert_learnt_alike(two, train(project, "shared", "parallel.processes=2", "parallel.sharding=full"), 1e-5)
