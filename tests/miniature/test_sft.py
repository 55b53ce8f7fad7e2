"""The gap at the shipped SFT checkpoint, in the ranges of the paper, as `axpo diagnose` measures it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from axpo import cli
from axpo.chat import Chat
from axpo.miniature.base import SFT
from axpo.miniature.teacher import calls
from axpo.miniature.world import FAMILIES, sample_problems
from axpo.storage import load_trees
from axpo.tree import RolloutTree, scored

QUESTIONS = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sft") / "diagnose"
    options = ["--questions", str(QUESTIONS), "--prefixes", "24", f"output={out}"]
    result = CliRunner().invoke(cli.app, ["diagnose", "miniature_sft", "miniature", *options])
    assert result.exit_code == 0, result.output
    assert "all wrong with" in result.output
    return out


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((folder / "diagnose.json").read_text())
    return figures


@pytest.fixture(scope="module")
def trees(folder: Path) -> list[RolloutTree]:
    return load_trees(folder / "trees" / "diagnose.parquet")


def test_tools_are_attempted_rarely(found: dict[str, Any]) -> None:
    assert 0.20 <= found["tool_use"] <= 0.35


def test_attempts_often_fail_together(found: dict[str, Any]) -> None:
    assert 0.35 <= found["all_wrong_tool"] <= 0.50
    assert 0.18 <= found["all_wrong_no_tool"] <= 0.32


def test_not_acting_tempts(found: dict[str, Any]) -> None:
    assert found["accuracy_tool"] < found["accuracy_no_tool"]


def test_every_family_contributes(found: dict[str, Any]) -> None:
    assert set(found["families"]) == set(FAMILIES)
    for shares in found["families"].values():
        assert 0.1 < shares["tool_use"] < 0.5
        assert 0.2 < shares["all_wrong_tool"] < 0.7
        assert shares["accuracy_tool"] > 0.1


def test_a_right_call_makes_the_answer_nearly_sure(trees: list[RolloutTree]) -> None:
    """A call is right if it is, letter by letter, the one that settles the question."""
    chat = Chat.from_pretrained(SFT)
    problems = {problem.question.id: problem for problem in sample_problems(QUESTIONS, 0, "tuning")}
    rewards = []
    for tree in trees:
        problem = problems[tree.question_id]
        for leaf, reward in scored(tree.base_leaves()):
            if calls(problem)[problem.kind] in chat.tokenizer.decode(leaf.path()[1].ids):
                rewards.append(reward)
    assert len(rewards) >= 30
    assert np.mean(rewards) >= 0.95


def test_one_prefix_leads_to_many_calls_and_some_have_collapsed(found: dict[str, Any]) -> None:
    assert 2.0 <= found["clusters"] <= 6.0
    assert 0.05 <= found["collapsed"] <= 0.5
    assert found["recovered"] > 0.05
