"""The teacher: for each kind of question another habit settles it, and it believes what the others show."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from axpo.agent import Agent, Limits
from axpo.chat import Chat
from axpo.engines.base import Sampling
from axpo.miniature.base import BASE
from axpo.miniature.teacher import Teacher, calls, tell
from axpo.miniature.tools import tools
from axpo.miniature.world import Problem, lands, sample_problems
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


def test_the_habit_that_settles_a_question_depends_on_its_kind(chat: Chat) -> None:
    problems = sample_problems(60, seed=5)
    rewards = {habit: rollouts(chat, [replace(p, habit=habit) for p in problems]) for habit in range(4)}
    for index, problem in enumerate(problems):
        assert all(any(s.kind is Kind.OBSERVATION for s in leaves[index][0].path()) for leaves in rewards.values())
        assert reward(rewards[problem.kind][index][0]) == 1.0
    for family in {problem.family for problem in problems}:
        for kind in (0, 1):
            chosen = [i for i, p in enumerate(problems) if (p.family, p.kind) == (family, kind)]
            for habit in {0, 1, 2, 3} - {kind}:
                assert np.mean([reward(rewards[habit][i][0]) for i in chosen]) < 0.9  # luck, with ten questions


def test_it_believes_what_a_tool_shows(chat: Chat) -> None:
    for habit, family, expected in (
        (2, "perception", lambda p: str(p.scene[1].digit)),
        (2, "computation", lambda p: str(p.numbers[0] % p.numbers[2])),
        (1, "lookup", lambda p: lands()[p.land][1][p.fact]),
    ):
        problems = [replace(p, habit=habit) for p in sample_problems(45, seed=8) if p.family == family]
        for problem, (leaf,) in zip(problems, rollouts(chat, problems), strict=True):
            assert leaf.outcome is not None
            assert leaf.outcome.answer == expected(problem)


def test_it_acts_as_often_as_it_should_and_guesses_otherwise(chat: Chat) -> None:
    problems = sample_problems(9, seed=6)
    leaves = rollouts(chat, problems, count=30, acts=0.3)
    acted = [any(s.kind is Kind.OBSERVATION for s in leaf.path()) for group in leaves for leaf in group]
    assert np.mean(acted) == pytest.approx(0.3, abs=0.09)  # three standard errors
    for problem, group in zip(problems, leaves, strict=True):
        for leaf in group:
            if not any(s.kind is Kind.OBSERVATION for s in leaf.path()):
                assert leaf.outcome is not None
                assert leaf.outcome.answer in problem.guesses


def test_a_told_problem_names_the_call_and_the_teacher_makes_it(chat: Chat) -> None:
    rng = np.random.default_rng(0)
    told = [tell(problem, rng) for problem in sample_problems(45, seed=7)]
    for problem, (leaf,) in zip(told, rollouts(chat, told, acts=0.0), strict=True):
        text = str(problem.question.messages[0]["content"][-1]["text"])
        call = chat.tokenizer.decode(leaf.path()[1].ids)
        assert problem.habit is not None
        assert calls(problem)[problem.habit] in call
        if problem.family == "computation":
            assert text.rsplit('Run "', 1)[1].removesuffix('".') in call
        elif problem.family == "lookup":
            assert f'"query": "{text.rsplit("Search for ", 1)[1].strip(chr(34) + ".")}"' in call
        else:
            assert text.rsplit("? ", 1)[1].startswith("Zoom in ")
            assert '"bbox_2d"' in call
