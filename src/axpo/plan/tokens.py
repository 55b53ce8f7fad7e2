"""The rollouts, tokens and images of a step, and the longest forward that an update can meet."""

import math
from dataclasses import dataclass

from axpo.config import Config
from axpo.fork import prefix_budget
from axpo.plan.activations import Batch
from axpo.plan.shapes import Shape

# What a config does not say, and the plan assumes; docs/plan.md names both.
PROMPT_TEXT = 1024  # tokens of a prompt's text, the tools' schemas included
OBSERVATION_TEXT = 1024  # tokens of a tool's text


@dataclass(frozen=True)
class Step:
    """One step of one machine, at the longest that its limits allow. Tokens of images are those of the largest."""

    questions: int
    rollouts: int
    extra: int  # rollouts that the method adds, at most
    extra_tokens: tuple[float, float]  # the share that they add to the sampled tokens, expected at least and at most
    image_tokens: int
    image_patches: int
    prompt: int  # tokens
    rollout: int  # tokens, without the prompt
    tree: int  # tokens of the largest tree
    tree_trained: int
    tree_images: int
    path_images: int  # of one rollout, those of its prompt included

    @property
    def path(self) -> int:
        """Tokens of a rollout with its prompt."""
        return self.prompt + self.rollout


def training_step(config: Config, shape: Shape, pixels: int) -> Step:
    """The step of reinforcement learning; `pixels` are those of the largest image (0 for a model without images)."""
    questions, group = config.rollout.questions, config.group_size
    branches, extra, tokens = group, 0, (0.0, 0.0)
    if config.method.name == "axpo":
        extra = _budget(config)
        # A continuation begins at the call of its source: of a call and an answer, at least the answer is new.
        tokens = (extra / (questions * group) / 2, extra / (questions * group))
        branches += _continuations(config, extra)
    elif config.method.name == "rltf":
        extra, branches, tokens = questions * group, 2 * group, (1.0, 1.0)
    return _step(config, shape, pixels, questions, group, branches, extra, tokens)


def _budget(config: Config) -> int:
    """The rollouts that AXPO may add in a step: what earlier ones have left over is spent too."""
    method, all_of = config.method, (config.rollout.questions, config.group_size)
    if not method.adaptive_budget:
        return prefix_budget(method.budget, *all_of, method.continuations) * method.continuations
    each = prefix_budget(method.budget, *all_of, 1)
    return each + int(method.adaptive_budget * each)


def _continuations(config: Config, extra: int) -> int:
    """By how many trained branches one group can grow. Where no other has anything to resample it gets all that its
    own failed calls can take (`fork.allocate`)."""
    method, group = config.method, config.group_size
    prefixes = group * (config.rollout.max_turns + 1 if method.fork_at == "every" else 1)
    most = min(extra, prefixes * method.continuations)
    # The failed end of a source is not trained.
    replaced = min(group, most // method.continuations) if method.prefix_fix and method.fork_at != "every" else 0
    return most - replaced


def tuning_step(config: Config, shape: Shape, pixels: int) -> Step:
    """The step of supervised fine-tuning: one trajectory for each question."""
    return _step(config, shape, pixels, config.sft.batch, 1, 1, 0, (0.0, 0.0))


def _step(
    config: Config,
    shape: Shape,
    pixels: int,
    questions: int,
    group: int,
    branches: int,
    extra: int,
    extra_tokens: tuple[float, float],
) -> Step:
    options, vision = config.rollout, shape.vision
    side = vision.patch * vision.merge if vision else 1
    tokens = pixels // side**2
    prompt = min(PROMPT_TEXT, options.max_context // 2)
    prompt += min(tokens, options.max_context - prompt - 1)
    turns = options.max_turns if config.tools.names else 0
    search = config.tools.search_tokens if "search" in config.tools.names else 0
    observation = max(tokens, search, OBSERVATION_TEXT)
    written = (turns + 1) * options.max_tokens
    rollout = min(options.max_context - prompt, written + turns * observation)
    shown = min(turns, max(0, options.max_images - 1), rollout // tokens) if tokens else 0
    return Step(
        questions=questions,
        rollouts=questions * group,
        extra=extra,
        extra_tokens=extra_tokens,
        image_tokens=tokens,
        image_patches=tokens * vision.merge**2 if vision else 0,
        prompt=prompt,
        rollout=rollout,
        tree=prompt + branches * rollout,
        tree_trained=branches * min(rollout, written),
        tree_images=(1 + branches * shown) if tokens else 0,
        path_images=(1 + shown) if tokens else 0,
    )


def largest_pack(config: Config, step: Step) -> Batch:
    """The largest forward: packs are filled up to `train.pack_tokens`, and a longer rollout is packed alone."""
    trees = math.ceil(step.questions / config.parallel.processes)
    tokens = max(step.path, min(config.train.pack_tokens, trees * step.tree))
    share = tokens / step.tree
    images = max(step.path_images, int(share * step.tree_images))
    return Batch(tokens, int(share * step.tree_trained), images * step.image_patches)
