"""The Thinking-Acting Gap of any policy, by the paper's three measurements (AXPO, arXiv 2605.28774, section 1).

*Under-attempt*: how many rollouts call a tool. *All-wrong*: on how many questions every rollout that does is wrong.
*Divergence*: what the policy does when it continues one failed prefix many times, and whether that repairs it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from axpo.agent import Agent
from axpo.diagnostics.calls import Call, cluster
from axpo.diagnostics.correlation import pearson, spearman
from axpo.diagnostics.gap import mean, measure
from axpo.drawing import Drawing
from axpo.fork import allocate, candidates, confidence, mean_entropy, open_prefix
from axpo.questions import Question
from axpo.tools.sandbox import NO_OUTPUT
from axpo.tree import Kind, RolloutTree, Segment, scored

if TYPE_CHECKING:
    from axpo.workflow import Progress

DIAGNOSIS = 3  # keeps its random numbers apart from those of training, evaluation and teaching
SHARES = ("accuracy", "tool_use", "accuracy_tool", "accuracy_no_tool", "all_wrong_tool", "all_wrong_no_tool")
WAVE = 512  # rollouts drawn at once: the engine holds their keys and values until all have ended


@dataclass(frozen=True)
class Effort:
    """How much is drawn: rollouts of each question, continuations of each failed prefix, and for how many prefixes at
    the most (0: all)."""

    rollouts: int = 8
    continuations: int = 16
    prefixes: int = 64


@dataclass(frozen=True)
class Certainty:
    """Of the tokens of one call when they were sampled: their mean probability, and the mean entropy (nats) of the
    distributions that they were drawn from."""

    confidence: float
    entropy: float


@dataclass(frozen=True)
class Continued:
    """A failed prefix, and the call and the reward of each of its continuations that is not void."""

    question: str
    calls: tuple[Call, ...]
    rewards: tuple[float, ...]


@dataclass
class Draws:
    """All that was drawn: a tree a question, what was certain about the first call of each rollout that has one, how
    many failed prefixes there were, and those that were continued."""

    trees: list[RolloutTree]
    certainties: list[Certainty] = field(default_factory=list)
    failed: int = 0
    prefixes: list[Continued] = field(default_factory=list)


async def draw(
    agent: Agent, questions: Sequence[Question], effort: Effort, threshold: float, seed: int, progress: "Progress"
) -> Draws:
    """Draw rollouts of every question, then continuations of the failed prefixes.

    A prefix has failed by the rule of AXPO's trigger: every tool-using rollout of its question has a reward below
    `threshold`. If there are more than `effort.prefixes`, every question's first comes before any second; which is a
    question's first is random. The agent's engine must keep entropies.
    """
    drawing = Drawing(agent, questions, effort.rollouts, (DIAGNOSIS, seed))
    ended = partial(progress.step, {})
    progress.stage("rollouts", len(drawing.groups))
    groups = range(len(drawing.groups))
    await _waves(drawing, [partial(drawing.draw, g, effort.rollouts, then=ended) for g in groups], effort.rollouts)
    draws = Draws(drawing.trees, [certainty for tree in drawing.trees for certainty in certainties(tree)])
    failed = [candidates(tree, threshold, rank="random") for tree in drawing.trees]
    draws.failed = sum(map(len, failed))
    starts: list[tuple[RolloutTree, Segment, int]] = []
    begin: list[Callable[[], None]] = []
    progress.stage("continuations", min(effort.prefixes or draws.failed, draws.failed))
    for number, (group, candidate) in enumerate(allocate(failed, effort.prefixes or draws.failed), 1):
        start = open_prefix(drawing.trees[group], candidate)
        begin.append(partial(drawing.draw, group, effort.continuations, start, number, ended))
        starts.append((drawing.trees[group], start, number))
    await _waves(drawing, begin, effort.continuations)
    draws.prefixes = [continued(agent, *start) for start in starts]
    return draws


async def _waves(drawing: Drawing, begin: Sequence[Callable[[], None]], rollouts: int) -> None:
    """Begin one after the other what draws so many rollouts each, as many at once as a wave takes."""
    size = max(1, WAVE // rollouts)
    for first in range(0, len(begin), size):
        for draw_some in begin[first : first + size]:
            draw_some()
        await drawing.ended()
        drawing.agent.engine.sleep()


def certainties(tree: RolloutTree) -> list[Certainty]:
    """Of the first call of each rollout that has one, in the order of the leaves. The tree must not be forked yet."""
    found = []
    for leaf in tree.base_leaves():
        calls = [(segment, call) for segment in leaf.path() for call in segment.calls]
        if calls:
            segment, call = calls[0]
            tokens = slice(call.start, call.end)
            found.append(Certainty(confidence(segment, tokens), mean_entropy(segment, tokens)))
    return found


def continued(agent: Agent, tree: RolloutTree, prefix: Segment, number: int) -> Continued:
    """What was drawn after `prefix` as the tree's resampling `number`."""
    silent, _ = agent.chat.observation([(NO_OUTPUT, ())])
    depth = len(prefix.path())
    calls, rewards = [], []
    for leaf, reward in scored(tree.resamplings(prefix)[number]):
        first, *later = leaf.path()[depth:]
        seen = [segment for segment in later if segment.kind is Kind.OBSERVATION][:1]
        output = "".join(agent.chat.tokenizer.decode(s.ids) for s in seen if s.ids.tolist() != silent)
        calls.append(Call(agent.written_after(prefix, first), output))
        rewards.append(reward)
    return Continued(tree.question_id, tuple(calls), tuple(rewards))


def figures(draws: Draws, threshold: float) -> dict[str, Any]:
    """All that is measured; a share of nothing is None.

    - `tool_use`: share of the `decided` rollouts (not void) that call a tool; `accuracy_tool`, `accuracy_no_tool`:
      shares of those with, without a call that are right.
    - `all_wrong_tool`, `all_wrong_no_tool`: share of the questions whose rollouts with, without a call are all wrong,
      of the `questions_tool`, `questions_no_tool` that have any.
    - `clusters`: mean number of clusters of calls after one prefix, `collapsed`: share of prefixes with one cluster,
      `recovered`: share with a right continuation; of the `measured` prefixes, those with at least two continuations
      that are not void. `recovered_questions`: share of their `questions_measured` questions with such a prefix.
    - `pearson`, `spearman`: correlation of uncertainty, 1 − mean probability of a call's tokens, and their mean
      entropy, over the first call of each of `calls` rollouts.
    - `prefixes`, `certainties`: what these follow from.
    """
    gap = measure(draws.trees, threshold)
    groups = [scored(tree.base_leaves()) for tree in draws.trees]
    tool, no_tool = (sum(any(leaf.uses_tool is used for leaf, _ in g) for g in groups) for used in (True, False))
    prefixes = [_prefix_figures(prefix, threshold) for prefix in draws.prefixes if len(prefix.rewards) > 1]
    counts = [prefix["clusters"] for prefix in prefixes]
    questions = {prefix["question"] for prefix in prefixes}
    repaired = {prefix["question"] for prefix in prefixes if prefix["recovered"]}
    uncertainty, entropy = [1 - c.confidence for c in draws.certainties], [c.entropy for c in draws.certainties]
    return {
        "questions": len(draws.trees),
        "decided": sum(map(len, groups)),
        "void": gap["void"],
        **{name: gap[name] for name in SHARES},
        "questions_tool": tool,
        "questions_no_tool": no_tool,
        "failed": draws.failed,
        "continued": len(draws.prefixes),
        "measured": len(prefixes),
        "clusters": mean(counts),
        "collapsed": mean(count == 1 for count in counts),
        "recovered": mean(prefix["recovered"] for prefix in prefixes),
        "questions_measured": len(questions),
        "recovered_questions": mean(question in repaired for question in questions),
        "calls": len(draws.certainties),
        "pearson": pearson(uncertainty, entropy),
        "spearman": spearman(uncertainty, entropy),
        "prefixes": prefixes,
        "certainties": [{"confidence": c.confidence, "entropy": c.entropy} for c in draws.certainties],
    }


def family_figures(
    trees: Sequence[RolloutTree], families: Mapping[str, str], threshold: float
) -> dict[str, dict[str, Any]]:
    """The shares of each family's rollouts; `families` has the family of each question, by its id."""
    of = {name: [t for t in trees if families[t.question_id] == name] for name in sorted(set(families.values()))}
    gaps = {name: measure(found, threshold) for name, found in of.items()}
    return {name: {share: gap[share] for share in SHARES} for name, gap in gaps.items()}


def _prefix_figures(prefix: Continued, threshold: float) -> dict[str, Any]:
    numbers = cluster(prefix.calls)
    calls = zip(prefix.calls, numbers, prefix.rewards, strict=True)
    return {
        "question": prefix.question,
        "clusters": max(numbers) + 1,
        "recovered": any(reward >= threshold for reward in prefix.rewards),
        "continuations": [{"call": call.text, "cluster": number, "reward": reward} for call, number, reward in calls],
    }
