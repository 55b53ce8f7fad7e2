"""Trainings in two real processes, which gloo connects: they come to what one process comes to."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from axpo.miniature.base import SFT
from axpo.storage import load_trees
from axpo.tree import RolloutTree

LANDS = ("Bel-nia", "Kar-dor", "Mot-via", "Tis-mar")
QUESTIONS = [{"question": f'What is the crop of "{land}"?', "answer": "rye", "id": land} for land in LANDS]
CONFIG: dict[str, Any] = {
    "model": "miniature_sft",
    "output": "run",
    "threads": 1,
    "data": {"train": "questions.jsonl", "eval": "questions.jsonl"},
    "tools": {  # those that this policy knows
        "names": ["zoom", "python", "search"],
        "sandbox": "none_i_trust_the_policy",
        "zoom_pixels": 16384,
        "corpus": "miniature",
        "search_results": 1,
    },
    "rollout": {"questions": 4, "rollouts": 4, "max_tokens": 40, "max_turns": 1, "max_context": 800},
    "method": {"budget": 0.5, "continuations": 2},  # fewer prefixes than there are candidates
    "train": {"steps": 2, "warmup_steps": 0, "learning_rate": 5e-6, "minibatches": 2, "save_every": 1},
    "eval": {"samples": 1},
}


def start(*arguments: object, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "axpo", *(str(argument) for argument in arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def succeed(*arguments: object) -> str:
    process = start(*arguments)
    said, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return said


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


@pytest.fixture(scope="module")
def one(project: Path) -> Path:
    succeed("train", project / "config.yaml", f"output={project}/one")
    return project / "one"


@pytest.fixture(scope="module")
def two(project: Path) -> Path:
    succeed("train", project / "config.yaml", f"output={project}/two", "parallel.processes=2")
    return project / "two"


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoint" / "model.safetensors")


def laid_out(trees: list[RolloutTree]) -> list[Any]:
    return [
        (tree.question_id, [(s.kind, s.ids.tolist(), s.resampled, s.outcome, s.credits) for s in tree.segments()])
        for tree in trees
    ]


def assert_learnt_alike(one: Path, two: Path, moved: float = 1e-5) -> None:
    """The weights are the same but for a thousandth of what has been learnt, and nowhere by more than 1e-6."""
    before, after, other = load_file(Path(str(SFT)) / "model.safetensors"), weights(one), weights(two)
    steps = torch.cat([(after[name] - before[name]).flatten() for name in before])
    errors = torch.cat([(other[name] - after[name]).flatten() for name in before])
    assert steps.abs().max() > moved
    assert errors.norm() < 1e-3 * steps.norm()
    assert errors.abs().max() < 1e-6


def test_two_processes_choose_the_prefixes_and_learn_the_weights_of_one(one: Path, two: Path) -> None:
    first, second = (load_trees(one / "trees" / f"step_0000{step}.parquet") for step in (1, 2))
    forked = [s for tree in first for s in tree.segments() if s.is_forked]
    assert len({tree.question_id for tree in first if any(s.is_forked for s in tree.segments())}) > 1
    assert len(forked) == 4  # the whole budget: floor(0.5 · 4 · 4 / 2)
    for step, trees in enumerate((first, second), 1):
        assert laid_out(load_trees(two / "trees" / f"step_0000{step}.parquet")) == laid_out(trees)
    assert_learnt_alike(one, two)
    for ours, theirs in zip(lines(one), lines(two), strict=True):
        for figure, value in ours.items():
            if isinstance(value, float) and "seconds" not in figure:
                assert theirs[figure] == pytest.approx(value, rel=1e-4, abs=1e-7), figure
            elif "seconds" not in figure and figure != "packed_tokens":
                assert theirs[figure] == value, figure
