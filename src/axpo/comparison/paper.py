"""What the paper reports of its methods (AXPO, arXiv 2605.28774), and which of a grid's methods are the same."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from axpo.config import Config
from axpo.methods import METHODS
from axpo.options import METHOD_DEFAULTS, MethodConfig


@dataclass(frozen=True, eq=False)
class Row:
    """A row of the paper's tables of ablations and recipes: Pass@1 and Pass@4 in %."""

    title: str
    method: str
    pass1: float
    pass4: float
    options: Mapping[str, Any] = field(default_factory=dict)  # where it differs from its method's defaults


AXPO = Row("AXPO", "axpo", 53.9, 70.2)
GRPO = Row("SFT+GRPO", "grpo", 51.9, 68.3)
ABLATIONS = (
    Row("no prefix fix (resample from scratch)", "axpo", 52.1, 69.1, {"prefix_fix": False}),
    Row("resample no-tool rollouts too", "axpo", 51.7, 65.9, {"resample_no_tool": True}),
    Row("no uncertainty rank (random)", "axpo", 51.0, 65.8, {"rank": "random"}),
    Row("no prefix credit", "axpo", 51.4, 67.7, {"prefix_credit": False}),
    Row("no separate advantage group", "axpo", 51.2, 67.0, {"separate_groups": False}),
)
RECIPES = (
    Row("tool penalty", "tool_penalty", 46.0, 59.1),
    Row("tool bonus", "tool_bonus", 50.8, 65.6),
    Row("2x rollouts", "grpo", 52.4, 68.2, {"num_rollouts": "2x"}),
    Row("RLTF", "rltf", 43.3, 56.0),
    Row("CISPO", "cispo", 47.8, 62.2),
    Row("ARPO", "arpo", 51.3, 65.6),
)
ROWS = (AXPO, GRPO, *ABLATIONS, *RECIPES)
# Pass@1 of the 2B model, average over its benchmarks.
SFT_2B, GRPO_2B, AXPO_2B = 46.2, 50.7, 51.8
TOOL_USE_GAIN = 28.0  # points that tool use rises by in training with AXPO
ALL_WRONG_GAIN = -17.0  # points, AXPO's all-wrong rate less GRPO's
RECOVERED = 12.0  # % of the resampled prefixes of a step
# Sizes, which a row may have as it likes.
_SIZES = {"name", "budget", "continuations", "tool_reward", "arpo_rule", "arpo_weight", "arpo_chance"}


def row_of(config: Config) -> Row | None:
    """The row of the paper that this method is, or None: every option that makes a method another one counts."""
    name = config.method.name
    counts = {"num_rollouts", "dynamic_sampling", *METHODS[name].options} - _SIZES
    default = MethodConfig.model_validate({"name": name, **METHOD_DEFAULTS.get(name, {})})
    given = {key: getattr(config.method, key) for key in counts if getattr(config.method, key) != getattr(default, key)}
    return next((row for row in ROWS if row.method == name and dict(row.options) == given), None)
