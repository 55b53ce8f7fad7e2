"""A training step end to end: real engine, real tools, the miniature's base, which zooms when it is told to."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from axpo import build
from axpo.chat import Chat
from axpo.config import Config, load_config
from axpo.credit import credit_axpo
from axpo.diagnostics.gap import is_forked
from axpo.miniature.scene import draw_scene
from axpo.miniature.world import sample_scene
from axpo.packing import pack_logprobs, pack_trees
from axpo.policy import banned_tokens
from axpo.questions import Question
from axpo.trainer import Trainer
from axpo.tree import Kind, RolloutTree

OPTIONS = [
    "tools.names=[zoom, python]",
    "tools.zoom_pixels=16384",
    "rollout.questions=2",
    "rollout.rollouts=4",
    "rollout.max_tokens=80",
    "rollout.max_context=1500",
    "method.budget=1",
    "method.continuations=2",
    "train.learning_rate=1e-4",
    "train.pack_tokens=2000",
    "threads=1",
]


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    """The base is told to zoom, so it does; the answer is one that it cannot give, so its calls all fail."""
    found = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng)
        content = [{"type": "image"}, {"type": "text", "text": f"Zoom in on the {scene[0].name}."}]
        images = (draw_scene(scene, rng),)
        found.append(Question(f"q{seed}", [{"role": "user", "content": content}], images, "nothing"))
    return found


def make_trainer(questions: Sequence[Question], *overrides: str) -> tuple[Trainer, Config, PreTrainedModel, Chat]:
    config = load_config(None, [*OPTIONS, *overrides])
    chat, toolbox, model = build.load_chat(config), build.load_toolbox(config), build.load_model(config)
    agent = build.training_agent(config, build.make_engine(config, model, chat), chat, toolbox)
    return Trainer(config, agent, model, questions), config, model, chat


def policy_logprobs_of(trees: Sequence[RolloutTree]) -> list[float]:
    """The engine's log-probs of the credited tokens, in the order in which the trees are laid out."""
    return [
        float(p)
        for t in trees
        for s in t.segments()
        if s.credit is not None and s.logprobs is not None
        for p in s.logprobs
    ]


def test_sampling_logprobs_equal_a_fresh_forward_over_the_packed_tree(questions: list[Question]) -> None:
    trainer, _, model, chat = make_trainer(questions)

    async def roll() -> list[RolloutTree]:
        batch = trainer.batch(0)
        trees = await trainer.roll_out(batch, 0)
        await trainer.resample(trees, batch, 0)
        return trees

    trees = asyncio.run(roll())
    segments = [s for tree in trees for s in tree.segments()]
    assert any(s.images for s in segments if s.kind is Kind.OBSERVATION)  # tool images
    assert any(is_forked(s) for s in segments)
    banned = banned_tokens(chat, model)
    for tree in trees:
        credit_axpo(tree)
        (pack,) = pack_trees([tree], chat, 10_000)
        with torch.no_grad():
            fresh = pack_logprobs(model, pack, chat, banned)
        torch.testing.assert_close(pack.old_logprobs.float(), fresh, atol=1e-4, rtol=0)
        assert pack.old_logprobs.tolist() == policy_logprobs_of([tree])


def test_a_step_forks_within_its_budget_and_learns(questions: list[Question]) -> None:
    trainer, _, model, _ = make_trainer(questions, "rollout.temperature=1.2")
    before = {name: p.clone() for name, p in model.named_parameters()}
    trees, figures = asyncio.run(trainer.step(0))
    assert figures["forked"] == 4  # floor(1 · 2 · 4 / 2)
    assert figures["rollouts"] == 2 * 4 + 4 * 2
    assert figures["all_wrong_tool"] == 1.0
    assert figures["trained_tokens"] == len(policy_logprobs_of(trees))
    assert all(leaf.outcome is not None for tree in trees for leaf in tree.leaves())
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == []  # every reward was 0 and the reference is the policy itself: nothing to learn yet


def test_a_reward_moves_the_policy_towards_what_earned_it(questions: list[Question]) -> None:
    trainer, _, _, chat = make_trainer(questions, "train.warmup_steps=0", "method.kl=0")
    trees, _ = asyncio.run(trainer.step(0))
    tree = trees[0]
    right = tree.base_leaves()[0]
        for leaf in tree.leaves():
        assert leaf.outcome is not None
        leaf.outcome = replace(leaf.outcome, reward=float(leaf is right))
    credit_axpo(tree)

    def likelihood() -> tuple[float, float]:
        (pack,) = pack_trees([tree], chat, 10_000)
        with torch.no_grad():
            logprobs = trainer.logprobs(pack)
        positive = pack.advantages > 0
        return logprobs[positive].mean().item(), logprobs[~positive].mean().item()

    good, bad = likelihood()
    trainer.update([tree, trees[1]])
    better, worse = likelihood()
    assert better > good
    assert worse < bad


def test_the_same_seed_gives_the_same_figures(questions: list[Question]) -> None:
    def figures(*overrides: str) -> list[str]:
        trainer, *_ = make_trainer(questions, *overrides)

        async def steps() -> list[str]:
            lines = []
            for number in range(2):
                _, found = await trainer.step(number)
                lines.append(json.dumps({k: v for k, v in found.items() if not k.endswith("seconds")}))
            return lines

        return asyncio.run(steps())

    first = figures()
    assert first == figures()
    assert first != figures("seed=1")


def test_minibatches_take_a_step_each(questions: list[Question]) -> None:
    trainer, *_ = make_trainer(questions, "train.minibatches=2")
    asyncio.run(trainer.step(0))
    assert trainer.optimizer.schedule.last_epoch == 2


def test_every_epoch_asks_every_question_once(questions: list[Question]) -> None:
    trainer, *_ = make_trainer(questions)
    epochs = [[q.id for number in (2 * e, 2 * e + 1) for q in trainer.batch(number)] for e in range(4)]
    assert all(sorted(epoch) == ["q0", "q1", "q2", "q3"] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_truncated_sampling_recomputes_the_old_logprobs(questions: list[Question]) -> None:
    trainer, *_ = make_trainer(questions, "rollout.top_k=2", "method.kl=0")
    trees, _ = asyncio.run(trainer.step(0))
    (pack, *_) = pack_trees(trees, trainer.agent.chat, 100_000)
    old, reference = trainer.before(pack)
    assert reference is None
    assert not torch.allclose(old, pack.old_logprobs.float(), atol=1e-3)
    torch.testing.assert_close(old, trainer.logprobs(pack).detach())


def test_grpo_never_forks(questions: list[Question]) -> None:
    trainer, *_ = make_trainer(questions, "method.name=grpo")
    trees, figures = asyncio.run(trainer.step(0))
    assert figures["forked"] == 0
    assert len(trees[0].leaves()) == 4


def test_a_broken_gradient_is_dropped(questions: list[Question]) -> None:
    trainer, *_ = make_trainer(questions)
    parameter = trainer.optimizer.parameters[0]
    before = parameter.clone()
    parameter.grad = torch.full_like(parameter, float("nan"))
    assert np.isnan(trainer.optimizer.step())
    assert torch.equal(parameter, before)
    assert parameter.grad is None
