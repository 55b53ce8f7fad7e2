"""The named methods: each is a choice of what to draw and where to fork, how to credit, and which loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from axpo.credit import Stream, credit_axpo, credit_grpo, credit_rltf
from axpo.drawing import Drawing
from axpo.explore import explore_arpo, explore_axpo, explore_grpo, explore_rltf
from axpo.options import MethodConfig
from axpo.tree import RolloutTree

COMMON = ("num_rollouts", "deviation", "aggregation", "clip_low", "clip_high", "kl", "threshold")
# How much a run resamples may stay in a config whose method does not resample, so that changing its name is enough.
IGNORED_BY_OTHERS = ("budget", "continuations", "tool_reward")


@dataclass(frozen=True)
class Method:
    """A recipe. `explore` draws the rollouts of a step, `credit` says what they teach, `loss` how (loss.py); `options`
    are those of `MethodConfig` that it takes beside the common ones."""

    name: str
    summary: str
    source: str
    options: tuple[str, ...]
    explore: Callable[[Drawing, MethodConfig], None]
    credit: Callable[[RolloutTree, MethodConfig], list[Stream]]
    loss: Literal["clipped", "cispo"] = "clipped"


def _grpo(tree: RolloutTree, options: MethodConfig) -> list[Stream]:
    return credit_grpo(tree, options.deviation)


def _axpo(tree: RolloutTree, options: MethodConfig) -> list[Stream]:
    return credit_axpo(
        tree, options.deviation, prefix_credit=options.prefix_credit, separate_groups=options.separate_groups
    )


def _bonus(tree: RolloutTree, options: MethodConfig) -> list[Stream]:
    return credit_grpo(tree, options.deviation, tool_reward=options.tool_reward)


def _penalty(tree: RolloutTree, options: MethodConfig) -> list[Stream]:
    return credit_grpo(tree, options.deviation, tool_reward=-options.tool_reward)


def _rltf(tree: RolloutTree, options: MethodConfig) -> list[Stream]:
    return credit_rltf(tree, options.deviation)


_RESAMPLING = ("budget", "continuations", "adaptive_budget")
_AXPO_PAPER = "Kang et al., Agent Explorative Policy Optimization, arXiv 2605.28774"

_ALL = (
    Method(
        "grpo",
        "every rollout learns from its reward against those of its group",
        "Shao et al., DeepSeekMath, arXiv 2402.03300",
        ("dynamic_sampling",),
        explore_grpo,
        _grpo,
    ),
    Method(
        "axpo",
        "where all tool-using rollouts of a group fail, resample their calls and credit the prefix if one recovers",
        _AXPO_PAPER,
        (*_RESAMPLING, "prefix_fix", "resample_no_tool", "rank", "prefix_credit", "separate_groups", "fork_at"),
        explore_axpo,
        _axpo,
    ),
    Method(
        "tool_bonus",
        "GRPO with more reward for a rollout that uses a tool",
        _AXPO_PAPER + ", section 6",
        ("tool_reward",),
        explore_grpo,
        _bonus,
    ),
    Method(
        "tool_penalty",
        "GRPO with less reward for a rollout that uses a tool",
        _AXPO_PAPER + ", section 6",
        ("tool_reward",),
        explore_grpo,
        _penalty,
    ),
    Method(
        "cispo",
        "GRPO's credit; the probability ratio is clipped as a weight, and no token's gradient is dropped",
        "MiniMax-M1, arXiv 2506.13585",
        ("dynamic_sampling",),
        explore_grpo,
        _grpo,
        "cispo",
    ),
    Method(
        "arpo",
        "GRPO on rollouts of which some branch where a tool's answer makes the policy uncertain",
        "Dong et al., Agentic Reinforced Policy Optimization, arXiv 2507.19849",
        ("arpo_rule", "arpo_weight", "arpo_chance"),
        explore_arpo,
        _grpo,
    ),
    Method(
        "rltf",
        "GRPO on first attempts; second ones, which have read a critique, are learned as if written without it",
        "Reinforcement learning from text feedback, self-distillation, arXiv 2602.02482",
        (),
        explore_rltf,
        _rltf,
    ),
)

METHODS = {method.name: method for method in _ALL}


def needs_entropy(options: MethodConfig) -> bool:
    """Whether the engine has to say how uncertain each token was."""
    return options.name == "arpo" or options.rank == "entropy"
