"""The teacher: its first habit settles every question, the others leave it at its guess, told or not."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from axpo.agent import Agent, Limits
from axpo.chat import Chat
from axpo.engines.base import Sampling
from axpo.miniature.base import BASE
from axpo.miniature.teacher import HABITS, Teacher, tell
from axpo.miniature.tools import tools
from axpo.miniature.world import Problem, sample_problems
from axpo.tools.base import Toolbox
from axpo.tree import Kind, Segment


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat.from_pretrained(BASE)


def rollouts(chat: Chat, problems: list[Problem], count: int = 1, **teacher: float) -> list[list[Segment]]:
    """For each problem the leaves of `count` rollouts of the teacher, with the real tools."""
    agent = Agent(Teacher(problems, chat, **teacher), chat, Toolbox(tools()), Sampling(), Limits())

    async def draw() -> list[list[Segment]]:
        trees = [agent.new_tree(problem.question) for problem in problems]
        for index, (tree, problem) in enumerate(zip(trees, problems, strict=True)):
            await agent.draw((tree, problem.question), tree.root, range(count), (0, index))
        return [tree.leaves() for tree in trees]

    return asyncio.run(draw())


def reward(leaf: Segment) -> float | None:
    assert leaf.outcome is not None
    return leaf.outcome.reward


def test_only_the_first_habit_settles_every_question(chat: Chat) -> None:
    problems = sample_problems(24, seed=5)
    for habit in range(len(HABITS)):
        leaves = rollouts(chat, [replace(problem, habit=habit) for problem in problems])
        for problem, (leaf,) in zip(problems, leaves, strict=True):
            assert any(segment.kind is Kind.OBSERVATION for segment in leaf.path())
            assert reward(leaf) == float(habit == 0 or problem.guess == problem.question.answer)


def test_it_acts_as_often_as_it_should_and_guesses_otherwise(chat: Chat) -> None:
    problems = sample_problems(9, seed=6)
    leaves = rollouts(chat, problems, count=30, acts=0.3)
    acted = [any(s.kind is Kind.OBSERVATION for s in leaf.path()) for group in leaves for leaf in group]
    assert np.mean(acted) == pytest.approx(0.3, abs=0.09)  # three standard errors
    for problem, group in zip(problems, leaves, strict=True):
        for leaf in group:
            if not any(s.kind is Kind.OBSERVATION for s in leaf.path()):
                assert reward(leaf) == float(problem.guess == problem.question.answer)


def test_a_told_problem_names_the_call_and_the_teacher_makes_it(chat: Chat) -> None:
    rng = np.random.default_rng(0)
    told = [tell(problem, rng) for problem in sample_problems(24, seed=7)]
    for problem, (leaf,) in zip(told, rollouts(chat, told, acts=0.0), strict=True):
        text = str(problem.question.messages[0]["content"][-1]["text"])
        call = chat.tokenizer.decode(leaf.path()[1].ids)
        if problem.family == "computation":
            assert text.rsplit("Run ", 1)[1].removesuffix(".") in call
        elif problem.family == "lookup":
            assert f'"query": "{text.rsplit("Search for ", 1)[1].removesuffix(".")}"' in call
        else:
            assert text.rsplit("? ", 1)[1].startswith("Zoom in on ")
            assert '"bbox_2d"' in call
