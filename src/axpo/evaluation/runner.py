"""Evaluation: several rollouts of each held-out question, and what came of them."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence

from axpo.agent import Agent
from axpo.diagnostics.gap import mean, measure
from axpo.evaluation.passk import pass_at_k
from axpo.questions import Question
from axpo.tree import RolloutTree, scored

EVALUATION = 1  # keeps its random numbers apart from those of training


async def evaluate(
    agent: Agent, questions: Sequence[Question], samples: int, seed: int, done: Callable[[], None] = lambda: None
) -> list[RolloutTree]:
    """Draw `samples` rollouts of each question; `done` is called as each question ends."""
    trees = [agent.new_tree(question) for question in questions]

    async def one(index: int) -> None:
        await agent.group(trees[index], questions[index], samples, (EVALUATION, seed, index))
        done()

    await asyncio.gather(*(one(index) for index in range(len(trees))))
    return trees


def summarise(trees: Sequence[RolloutTree], questions: Sequence[Question], samples: int) -> dict[str, object]:
    """Pass@1, Pass@`samples`, the figures of `diagnostics.gap`, and Pass@1 of each family.

    Pass@1 is the mean over questions of the share of right rollouts, void ones left out; Pass@k is over the
    questions with at least k rollouts that were decided.
    """
    rewards = [[reward > 0 for _, reward in scored(tree.base_leaves())] for tree in trees]
    families: dict[str, list[float]] = defaultdict(list)
    for question, group in zip(questions, rewards, strict=True):
        if group:
            families[question.family].append(sum(group) / len(group))
    figures = measure(trees)
    return {
        "questions": len(questions),
        "samples": samples,
        "pass1": mean(share for shares in families.values() for share in shares),
        f"pass{samples}": mean(pass_at_k(len(g), sum(g), samples) for g in rewards if len(g) >= samples),
        **{name: figures[name] for name in ("tool_use", "accuracy_tool", "accuracy_no_tool")},
        **{name: figures[name] for name in ("all_wrong_tool", "all_wrong_no_tool", "void")},
        "families": {family: mean(shares) for family, shares in sorted(families.items()) if family},
    }
