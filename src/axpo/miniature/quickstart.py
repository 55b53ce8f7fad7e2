"""The quickstart: a tiny model goes from its base through a short SFT to AXPO, with real tools."""

import asyncio
from typing import Any

from transformers import PreTrainedModel

from axpo import build
from axpo.agent import Agent, Limits
from axpo.chat import Chat
from axpo.config import Config
from axpo.engines.base import Sampling
from axpo.miniature.teacher import Teacher
from axpo.miniature.world import sample_problems
from axpo.run import Run
from axpo.sft import imitate
from axpo.tools.base import Toolbox
from axpo.tree import RolloutTree, scored
from axpo.workflow import Progress, run_evaluation, run_sft, run_training

TEACHER_PROBLEMS = 720
TEACHER_ROLLOUTS = 6
TEACHING = 2  # keeps its random numbers apart from those of training and evaluation


def quickstart(
    config: Config,
    run: Run,
    progress: Progress,
    model: PreTrainedModel,
    chat: Chat,
    toolbox: Toolbox,
    data: build.Data,
) -> dict[str, Any]:
    """Run all stages; returns, and writes as summary.json, the evaluations before and after AXPO."""
    summary: dict[str, Any] = {}
    engine = build.make_engine(config, model, chat)  # what stands in its way is told before anything is taught
    engine.sleep()

    async def learn() -> None:
        trees = await teach(chat, toolbox, progress, config.seed)
        run.save_trees("teacher", trees[:50], config.train.save_images)
        await run_sft(config, run, progress, model, chat, trees, "sft")
        assert data.eval is not None
        engine.update_weights()
        summary["sft"] = await run_evaluation(config, run, progress, engine, chat, toolbox, data.eval, "sft")
        run.save_summary(summary)
        name = config.method.name
        summary[name] = await run_training(config, run, progress, model, chat, toolbox, data, engine)
        run.save_summary(summary)

    asyncio.run(learn())
    return summary


async def teach(chat: Chat, toolbox: Toolbox, progress: Progress, seed: int) -> list[RolloutTree]:
    """The teacher's correct trajectories, written through the agent loop and the real tools.

    All of a question lie in one tree, so that its prompt is computed once in training too.
    """
    problems = sample_problems(TEACHER_PROBLEMS, seed, "teacher")
    agent = Agent(Teacher(problems, chat), chat, toolbox, Sampling(), Limits())
    progress.stage("teacher", len(problems))
    trees = []
    for index, problem in enumerate(problems):
        tree = agent.new_tree(problem.question)
        await agent.draw((tree, problem.question), tree.root, range(TEACHER_ROLLOUTS), (TEACHING, seed, index))
        progress.step({})
        right = [leaf for leaf, reward in scored(tree.leaves()) if reward > 0]
        if right:
            trees.append(imitate(tree, right))
    return trees
