"""Rollouts, tokens and images of a step, by hand."""

import pytest
from plan.published import CONFIGS
from transformers import AutoConfig

from axpo.config import Config, load_config
from axpo.plan.activations import Batch
from axpo.plan.shapes import Shape, shape_of
from axpo.plan.tokens import largest_pack, training_step, tuning_step

PIXELS = 1048576  # 1,024 tokens of 32 × 32
OPTIONS = [
    "rollout.questions=16",
    "rollout.rollouts=8",
    "rollout.max_tokens=1000",
    "rollout.max_turns=2",
    "rollout.max_context=12000",
    "tools.names=[zoom]",
]


def config(*overrides: str) -> Config:
    return load_config(None, [*OPTIONS, *overrides])


@pytest.fixture(scope="module")
def shape() -> Shape:
    given = CONFIGS["qwen3_vl_2b"]
    return shape_of(AutoConfig.for_model(**given))


def test_a_step_of_grpo(shape: Shape):
    step = training_step(config("method=grpo"), shape, PIXELS)
    assert (step.questions, step.rollouts, step.extra) == (16, 128, 0)
    assert (step.image_tokens, step.image_patches) == (1024, 4096)
    assert step.prompt == 1024 + 1024
    assert step.rollout == 3 * 1000 + 2 * 1024  # three turns, two crops
    assert step.tree == 2048 + 8 * 5048
    assert (step.tree_trained, step.tree_images) == (8 * 3000, 1 + 8 * 2)


def test_axpo_adds_its_budget(shape: Shape):
    step = training_step(config(), shape, PIXELS)
    assert (step.rollouts, step.extra) == (128, 32)
    assert step.extra_tokens == (0.125, 0.25)
    # All of the M = 8 prefixes may be of one question, each of whose rollouts then leaves out its failed end and has 4
    # continuations.
    assert step.tree == 2048 + (8 + 8 * 3) * 5048
    assert training_step(config("method.budget=0.1"), shape, PIXELS).tree == 2048 + (8 + 3 * 3) * 5048  # M = 3
    assert training_step(config("rollout.questions=64"), shape, PIXELS).tree == step.tree  # M = 32, of 8 rollouts
    # Three calls a rollout, whose own turns are trained up to the last of them; and what was left over is spent too.
    every = training_step(config("method.fork_at=every", "rollout.questions=64"), shape, PIXELS)
    assert every.tree == 2048 + (8 + 8 * 3 * 4) * 5048
    adaptive = training_step(config("method.adaptive_budget=0.5", "method.budget=0.1"), shape, PIXELS)
    assert (adaptive.extra, adaptive.tree) == (12 + 6, 2048 + (8 + 18 - 4) * 5048)
    assert training_step(config("method.budget=0.25", "method.continuations=8"), shape, PIXELS).extra == 32


def test_what_other_methods_draw(shape: Shape):
    assert training_step(config("method=grpo", "method.num_rollouts=2x"), shape, PIXELS).rollouts == 256
    rltf = training_step(config("method=rltf"), shape, PIXELS)
    assert (rltf.rollouts, rltf.extra, rltf.tree) == (128, 128, 2048 + 16 * 5048)


def test_limits_of_context_images_and_tools(shape: Shape):
    short = training_step(config("rollout.max_context=3000", "method=grpo"), shape, PIXELS)
    assert (short.prompt, short.rollout, short.tree_images) == (2048, 952, 1)  # no crop fits
    few = training_step(config("rollout.max_images=2", "method=grpo"), shape, PIXELS)
    assert few.tree_images == 1 + 8
    without = training_step(config("tools.names=[]", "method=grpo"), shape, PIXELS)
    assert (without.rollout, without.tree_images) == (1000, 1)
    text = training_step(config("method=grpo"), shape, 0)
    assert (text.prompt, text.rollout, text.tree_images) == (1024, 3000 + 2 * 1024, 0)


def test_the_largest_forward(shape: Shape):
    def largest(*overrides: str) -> Batch:
        given = config("method=grpo", *overrides)
        return largest_pack(given, training_step(given, shape, PIXELS))

    tree = 2048 + 8 * 5048
    path = 2048 + 5048
    assert largest("train.pack_tokens=1000") == Batch(path, int(24000 * path / tree), 3 * 4096)  # which is never cut
    assert largest(f"train.pack_tokens={tree // 2}") == Batch(tree // 2, 12000, 8 * 4096)
    assert largest(f"train.pack_tokens={2 * tree}") == Batch(2 * tree, 48000, 34 * 4096)
    # Two processes have eight of the 16 questions each.
    assert largest("train.pack_tokens=10000000", "parallel.processes=2").tokens == 8 * tree


def test_a_step_of_supervised_fine_tuning(shape: Shape):
    step = tuning_step(config("sft.batch=5"), shape, PIXELS)
    assert (step.rollouts, step.extra, step.tree) == (5, 0, 2048 + 5048)
