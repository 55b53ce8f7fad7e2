"""The named methods: each is a choice of where to fork, how to credit, and which loss."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from axpo.credit import Deviation, Stream, credit_axpo, credit_grpo
from axpo.fork import Candidate, candidates
from axpo.loss import policy_loss
from axpo.tree import RolloutTree


@dataclass(frozen=True)
class Method:
    """A recipe. `candidates` ranks the fork points of a tree, best first; None means that nothing is forked."""

    name: str
    summary: str
    source: str
    candidates: Callable[[RolloutTree], list[Candidate]] | None
    credit: Callable[[RolloutTree, Deviation], list[Stream]]
    loss: Callable[..., Tensor]  # takes what `policy_loss` takes


_ALL = (
    Method(
        "grpo",
        "every rollout learns from its reward against those of its group",
        "Shao et al., DeepSeekMath, arXiv 2402.03300",
        None,
        credit_grpo,
        policy_loss,
    ),
    Method(
        "axpo",
        "where all tool-using rollouts of a group fail, resample their calls and credit the prefix if one recovers",
        "Kang et al., Agent Explorative Policy Optimization, arXiv 2605.28774",
        candidates,
        credit_axpo,
        policy_loss,
    ),
)

METHODS = {method.name: method for method in _ALL}


def method(name: str) -> Method:
    """The method of that name. Raises ValueError, naming the known ones, for any other."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: known are {', '.join(METHODS)}")
    return METHODS[name]
