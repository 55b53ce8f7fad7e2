"""Does resampling a call reach a right tool-using rollout where more rollouts would not? Proposition 1, and a run.

Proposition 1 (AXPO, arXiv 2605.28774): among n continuations of a prefix that succeeds with probability p(t), one is
right with probability 1−(1−p(t))^n, among n fresh rollouts one is right and uses a tool with 1−(1−q·p_tool)^n, q being
how often a tool is used and p_tool how often such a rollout is right; the first is no less where p(t) ≥ q·p_tool.

In a run p(t), q and p_tool belong to a question and a prefix and are not known. What its trees hold is measured:

- `resampled` is a plain frequency: in so many resamplings of triggered groups (some tool-using rollouts, all wrong) a
  continuation is right. It speaks of the prefixes that were chosen, which are the most uncertain ones.
- What k fresh rollouts of the same questions would have found cannot be read off a triggered group, as it was chosen
  for holding no right tool-using rollout. Two ways lead around that:
  `fresh_held_out` holds one rollout of each group back, every one in turn, and asks of the groups whose other N−1
  trigger how often it is right and uses a tool (Good and Turing's way to what was not seen). With that chance h, k more
  would find one with 1−(1−h)^k. As a rule this says too much for fresh rollouts: a group that triggers with N is harder
  than one with N−1, and with each further failure it is harder still. It weighs all groups that trigger, also where the
  budget resamples the most uncertain alone.
  `fresh_other_steps` takes the same questions, each from its nearest visits before and after (one of each, where there
  are both), in proportion to the resamplings. These were not chosen by what they hold, and the questions are the same;
  but the policy is another one, which a mean of before and after balances where it changes evenly. Where only earlier
  or only later visits exist it leans to a worse or a better policy. `matched` resamplings have such a visit.

Errors are standard errors over questions, those of one question in several steps being taken together.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from axpo.diagnostics.gap import Figures, resamplings_of
from axpo.evaluation.passk import pass_at_k
from axpo.storage import load_trees
from axpo.tree import RolloutTree, TreeError, scored

Real = npt.NDArray[np.float64]

# Proposition 1 --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coverage:
    """The chance that one of n draws is a right tool-using rollout: continuations of a prefix, and fresh rollouts."""

    resampled: Real
    fresh: Real


def exact(q: npt.ArrayLike, p_tool: npt.ArrayLike, p_prefix: npt.ArrayLike, draws: npt.ArrayLike) -> Coverage:
    """Both sides of Proposition 1, for numbers or for arrays of shapes that broadcast. Probabilities lie in 0..1."""
    q, p_tool, p_prefix = (np.asarray(p, dtype=np.float64) for p in (q, p_tool, p_prefix))
    draws = np.asarray(draws)
    return Coverage(*np.broadcast_arrays(1 - (1 - p_prefix) ** draws, 1 - (1 - q * p_tool) ** draws))


def simulated(
    q: npt.ArrayLike,
    p_tool: npt.ArrayLike,
    p_prefix: npt.ArrayLike,
    draws: npt.ArrayLike,
    trials: int,
    seed: int = 0,
) -> Coverage:
    """The same as shares of `trials`, in each of which the rollouts are drawn: whether it acts, and then succeeds.

    The standard error of a share c is sqrt(c(1−c) / trials).
    """
    rng = np.random.default_rng(seed)
    q, p_tool, p_prefix, draws = np.broadcast_arrays(q, p_tool, p_prefix, draws)
    resampled, fresh = np.zeros(q.shape), np.zeros(q.shape)
    for _ in range(trials):
        resampled += rng.binomial(draws, p_prefix) > 0
        fresh += rng.binomial(rng.binomial(draws, q), p_tool) > 0
    return Coverage(resampled / trials, fresh / trials)


# A run ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Visit:
    """What a step's rollouts of a question were: how many use a tool and are right, or wrong, and how many use none.

    `resamplings` are the decided continuations of each, and how many of them use a tool and are right.
    """

    question: str
    step: int
    right: int
    wrong: int
    none: int
    resamplings: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, tree: RolloutTree, step: int, threshold: float = 0.5) -> "Visit":
        """Void rollouts are left out. Raises TreeError for a rollout that has not ended."""
        group = scored(tree.base_leaves())
        tool = [reward >= threshold for leaf, reward in group if leaf.uses_tool]
        decided = [scored(leaves) for leaves in resamplings_of(tree)]
        resamplings = [(len(ends), sum(leaf.uses_tool and r >= threshold for leaf, r in ends)) for ends in decided]
        return cls(
            tree.question_id,
            step,
            sum(tool),
            len(tool) - sum(tool),
            len(group) - len(tool),
            tuple(each for each in resamplings if each[0]),
        )

    @property
    def size(self) -> int:
        return self.right + self.wrong + self.none

    @property
    def triggered(self) -> bool:
        return self.wrong > 0 and self.right == 0

    def held_out(self) -> tuple[float, float]:
        """Of the ways to hold one rollout back: the share in which the others trigger, and that in which they do and it
        is right and uses a tool."""
        if self.wrong == 0 or self.right > 1:
            return 0.0, 0.0
        if self.right == 1:
            return 1 / self.size, 1 / self.size
        return (self.none + (self.wrong if self.wrong > 1 else 0)) / self.size, 0.0


def run_coverage(folder: Path, threshold: float = 0.5) -> Figures:
    """`coverage` of the training steps of a run folder, from its trees/step_*.parquet, one file in memory at a time.

    Raises TreeError, naming the folder or the file, where there are none or one cannot be read.
    """
    files = sorted((folder / "trees").glob("step_*.parquet"))
    if not files:
        raise TreeError(f"{folder}: no training steps; a run folder must hold trees/step_*.parquet")
    steps = enumerate(files)
    return coverage([Visit.of(tree, step, threshold) for step, file in steps for tree in load_trees(file)])


def coverage(visits: Sequence[Visit]) -> Figures:
    """What resampling found in the groups that triggered, and what as many fresh rollouts would have (see above).

    `triggered` groups and their `resamplings`; the shares `resampled`, `fresh_held_out`, `fresh_other_steps` and, over
    the `matched` resamplings that the last one compares with, `resampled_matched`; each with its `_error`. None where
    there is nothing to measure it by, and for the error of what a single question shows.
    """
    drawn = [(visit, k, right) for visit in visits if visit.triggered for k, right in visit.resamplings]
    others = _Others(visits)
    pairs = [(visit, right, share) for visit, k, right in drawn if (share := others.share(visit, k)) is not None]
    ratios = {
        "resampled": _ratio((visit.question, float(right > 0), 1.0) for visit, _, right in drawn),
        "fresh_held_out": _held_out(visits, [k for _, k, _ in drawn]),
        "resampled_matched": _ratio((visit.question, float(right > 0), 1.0) for visit, right, _ in pairs),
        "fresh_other_steps": _ratio((visit.question, share, 1.0) for visit, _, share in pairs),
    }
    return {
        "triggered": sum(visit.triggered for visit in visits),
        "resamplings": len(drawn),
        "matched": len(pairs),
        **{name: ratio.value for name, ratio in ratios.items()},
        **{f"{name}_error": ratio.error for name, ratio in ratios.items()},
    }


@dataclass(frozen=True)
class _Ratio:
    """A mean, and how much each question moves it."""

    value: float | None
    influence: Mapping[str, float]

    @property
    def error(self) -> float | None:
        """By the delta method: the deviation of a sum of independent questions."""
        n = len(self.influence)
        return float(np.sqrt(n / (n - 1) * sum(v * v for v in self.influence.values()))) if n > 1 else None


def _ratio(parts: Iterable[tuple[str, float, float]]) -> _Ratio:
    """Σ found / Σ weight of (question, found, weight)."""
    found: dict[str, float] = defaultdict(float)
    weight: dict[str, float] = defaultdict(float)
    for question, x, w in parts:
        found[question] += x
        weight[question] += w
    total = sum(weight.values())
    if not total:
        return _Ratio(None, {})
    value = sum(found.values()) / total
    return _Ratio(value, {q: (found[q] - value * weight[q]) / total for q in weight if weight[q]})


def _held_out(visits: Sequence[Visit], numbers: Sequence[int]) -> _Ratio:
    """The mean of 1−(1−h)^k over the numbers k of continuations, h being the chance of a rollout that is held back."""
    held_out = ((visit.question, *visit.held_out()) for visit in visits)
    chance = _ratio((question, found, triggers) for question, triggers, found in held_out)
    if chance.value is None or not numbers:
        return _Ratio(None, {})
    k, missed = np.asarray(numbers), 1 - chance.value
    slope = float(np.mean(k * missed ** (k - 1)))
    return _Ratio(float(np.mean(1 - missed**k)), {q: slope * moved for q, moved in chance.influence.items()})


class _Others:
    """The visits of each question, to look up the nearest ones of other steps."""

    def __init__(self, visits: Sequence[Visit]) -> None:
        self._of: dict[str, list[Visit]] = defaultdict(list)
        for visit in visits:
            self._of[visit.question].append(visit)

    def share(self, visit: Visit, k: int) -> float | None:
        """The chance that k of a nearest visit's rollouts hold a right tool-using one, the mean of before and after."""
        enough = [other for other in self._of[visit.question] if other.size >= k]
        before = max((other for other in enough if other.step < visit.step), key=lambda v: v.step, default=None)
        after = min((other for other in enough if other.step > visit.step), key=lambda v: v.step, default=None)
        shares = [pass_at_k(other.size, other.right, k) for other in (before, after) if other is not None]
        return sum(shares) / len(shares) if shares else None
