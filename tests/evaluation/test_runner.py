import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from transformers import Qwen3VLForConditionalGeneration

from axpo.agent import Agent, Limits
from axpo.chat import Chat
from axpo.engines.base import Sampling
from axpo.engines.local import LocalEngine
from axpo.evaluation.runner import evaluate, summarise
from axpo.questions import Question
from axpo.tools.base import Toolbox
from axpo.tree import CallSpan, Kind, Outcome, RolloutTree, StopReason


def question(name: str, family: str = "") -> Question:
    return Question(name, [{"role": "user", "content": f"What is {name}?"}], (), "4", family=family)


def tree(rewards: list[float | None], tools: int = 0) -> RolloutTree:
    """One rollout for each reward, the first `tools` of them with a call."""
    grown = RolloutTree("q", [1])
    for index, reward in enumerate(rewards):
        calls = [CallSpan(0, 1, 2)] if index < tools else []
        leaf = grown.append(grown.root, Kind.POLICY, [5, 6], [-1.0, -1.0], calls=calls)
        leaf.outcome = Outcome(StopReason.VOID if reward is None else StopReason.ANSWER, reward)
    return grown


def test_golden_summary():
    trees = [
        tree([1.0, 0.0, 0.0, 0.0], tools=2),  # 1/4
        tree([1.0, 1.0, 0.0, 0.0], tools=1),  # 1/2
        tree([0.0, 0.0, 0.0, 0.0]),
        tree([1.0, None, 0.0, 0.0], tools=2),  # 1/3 of those decided, too few for Pass@4
        tree([None, None, None, None]),  # in no share
    ]
    families = ["a", "a", "b", "b", "b"]
    questions = [question(f"q{i}", family) for i, family in enumerate(families)]
    assert summarise(list(zip(trees, questions, strict=True)), 4) == {
        "questions": 5,
        "samples": 4,
        "pass1": pytest.approx((1 / 4 + 1 / 2 + 0 + 1 / 3) / 4),
        "pass4": pytest.approx(2 / 3),
        "tool_use": pytest.approx(4 / 15),
        "truncated": 0.0,
        "accuracy_tool": pytest.approx(3 / 4),
        "accuracy_no_tool": pytest.approx(1 / 11),
        "all_wrong_tool": 0.0,
        "all_wrong_no_tool": pytest.approx(3 / 4),
        "void": 5,
        "families": {"a": pytest.approx(3 / 8), "b": pytest.approx(1 / 6)},
    }


def test_questions_without_a_family_count_but_are_not_listed():
    summary = summarise([(tree([1.0]), question("p")), (tree([0.0]), question("q", "a"))], 1)
    assert summary["pass1"] == 0.5
    assert summary["families"] == {"a": 0.0}


def test_of_nothing_decided_every_share_is_none():
    summary = summarise([(tree([None, None]), question("q", "a"))], 2)
    assert [summary[key] for key in ("pass1", "pass2", "tool_use")] == [None, None, None]
    assert summary["families"] == {}


def sampled(trees: list[RolloutTree]) -> list[Any]:
    return [[leaf.ids.tolist() for leaf in grown.leaves()] for grown in trees]


@pytest.fixture
def run(chat: Chat, tiny_model: Qwen3VLForConditionalGeneration) -> Callable[..., list[RolloutTree]]:
    """Evaluates three questions with three rollouts each, by the real agent and a random model."""

    def run(seed: int, done: Callable[[], None] = lambda: None, temperature: float = 1.0) -> list[RolloutTree]:
        agent = Agent(
            LocalEngine(tiny_model, chat), chat, Toolbox([]), Sampling(temperature, max_tokens=4), Limits(context=400)
        )
        groups = asyncio.run(evaluate(agent, [question(name) for name in "pqr"], 3, seed, done))
        return [tree for tree, _ in groups.values()]

    return run


def test_every_question_gets_its_rollouts_and_reports_its_end(run: Callable[..., list[RolloutTree]]):
    ended: list[None] = []
    trees = run(0, lambda: ended.append(None))
    assert [grown.question_id for grown in trees] == ["p", "q", "r"]
    assert [len(grown.base_leaves()) for grown in trees] == [3, 3, 3]
    assert all(leaf.outcome is not None for grown in trees for leaf in grown.leaves())
    assert len(ended) == 3


def test_the_seed_decides_the_rollouts_and_each_has_numbers_of_its_own(run: Callable[..., list[RolloutTree]]):
    first = sampled(run(0))
    assert sampled(run(0)) == first
    assert sampled(run(1)) != first
    every = [ids for group in first for ids in group]
    assert len({tuple(ids) for ids in every}) == len(every)


def test_temperature_0_repeats_the_likeliest_rollout(run: Callable[..., list[RolloutTree]]):
    assert all(len({tuple(ids) for ids in group}) == 1 for group in sampled(run(0, temperature=0.0)))
