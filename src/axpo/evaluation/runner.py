"""Evaluation: several rollouts of each held-out question, and what came of them."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence

from axpo.agent import Agent, Group
from axpo.diagnostics.gap import mean, measure
from axpo.evaluation.passk import pass_at_k
from axpo.questions import Question
from axpo.tree import scored

EVALUATION = 1  # keeps its random numbers apart from those of training


async def evaluate(
    agent: Agent,
    questions: Sequence[Question],
    samples: int,
    seed: int,
    done: Callable[[], None] = lambda: None,
    share: Callable[[int], range] = range,
) -> dict[int, Group]:
    """Draw `samples` rollouts of each question, or of the share of so many that is this process's.

    Returns the groups by their places; `done` is called as each question ends. Questions that cannot be asked are left
    out with a warning.
    """
    groups = agent.new_groups(questions)
    own = share(len(groups))

    async def one(place: int) -> None:
        await agent.draw(groups[place], groups[place][0].root, range(samples), (EVALUATION, seed, place))
        done()

    await asyncio.gather(*(one(place) for place in own))
    return {place: groups[place] for place in own}


def summarise(groups: Sequence[Group], samples: int, threshold: float = 0.5) -> dict[str, object]:
    """Pass@1, Pass@`samples`, the figures of `diagnostics.gap`, and Pass@1 of each family.

    A rollout is right from the reward `threshold` on. Pass@1 is the mean over questions of the share of right rollouts,
    void ones left out; Pass@k is over the questions with at least k rollouts that were decided.
    """
    rewards = [[reward >= threshold for _, reward in scored(tree.base_leaves())] for tree, _ in groups]
    families: dict[str, list[float]] = defaultdict(list)
    for (_, question), decided in zip(groups, rewards, strict=True):
        if decided:
            families[question.family].append(sum(decided) / len(decided))
    figures = measure([tree for tree, _ in groups], threshold)
    return {
        "questions": len(groups),
        "samples": samples,
        "pass1": mean(share for shares in families.values() for share in shares),
        f"pass{samples}": mean(pass_at_k(len(g), sum(g), samples) for g in rewards if len(g) >= samples),
        **{name: figures[name] for name in ("tool_use", "truncated", "accuracy_tool", "accuracy_no_tool")},
        **{name: figures[name] for name in ("all_wrong_tool", "all_wrong_no_tool", "void")},
        "families": {family: mean(shares) for family, shares in sorted(families.items()) if family},
    }
