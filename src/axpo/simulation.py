"""The Thinking-Acting Gap without a model: a policy-gradient bandit (AXPO, arXiv 2605.28774, sections 1 and 3).

A question asks for one of 64 cells. A rollout either thinks and answers, which is right with a probability that
nothing changes, or acts and names a cell, which is right if it is the question's. The policy is one logit, which
decides to act, and one matrix of weights, shared by all questions, whose row for the question's cell holds the logits
of the cell to name. It knows the coarse place: four cells are likely from the start. So acting is worse than thinking
at first, and far better once it is learned.

Each rollout is two tokens of a `RolloutTree`: the decision, which opens a call where it is to act, and the cell or the
answer. Where to fork and whom to credit is left to the methods' own code; the gradient is that of the loss at ratio 1.
"""

import math
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt

from axpo.explore import ranked
from axpo.fork import allocate, open_prefix, prefix_budget
from axpo.methods import METHODS
from axpo.options import MethodConfig
from axpo.tree import CallSpan, Kind, Outcome, RolloutTree, Segment, StopReason

CELLS = 64
LIKELY = 4  # cells of one coarse place
TOOL_USE = 0.3  # the share of rollouts that act at first (q): the paper's 20-35%
PRIOR = 4.5  # by how much the logits of the likely cells exceed the others at first: 21% of calls are right
RATE = 3.0  # learning rate of logit and matrix, at speed 1
POINTS = 80  # of a learning curve, beside its start

# The ids of tokens: the cells come first.
ACT, THINK, RIGHT, WRONG = range(CELLS, CELLS + 4)
_CALL = CallSpan(0, 1, 2)
_TINY = 1e-38  # for the logarithm of tokens that are never drawn
_ENDS = (Outcome(StopReason.ANSWER, 0.0), Outcome(StopReason.ANSWER, 1.0))

Floats = npt.NDArray[np.float64]
Logprobs = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Setting:
    """What is simulated: a method, how good thinking is, and how fast acting is learned, once for each seed."""

    options: MethodConfig
    p_think: float = 0.3
    speed: float = 1.0  # multiplies the learning rate of the matrix
    steps: int = 400
    questions: int = 8  # B
    rollouts: int = 8  # N, before `options.num_rollouts`
    seeds: tuple[tuple[int, ...], ...] = ((0,),)

    @property
    def size(self) -> int:
        """Rollouts of each question before any is forked."""
        return self.rollouts * int(self.options.num_rollouts.removesuffix("x"))

    @property
    def budget(self) -> int:
        """Prefixes that a step may resample; 0 for a method that does not resample."""
        if "budget" not in METHODS[self.options.name].options:
            return 0
        return prefix_budget(self.options.budget, self.questions, self.size, self.options.continuations)


@dataclass(frozen=True)
class Curves:
    """How S policies learned, (S, points) at the steps `steps` (points,): true probabilities, not sampled ones."""

    steps: Ints
    tool_use: Floats
    accuracy_tool: Floats
    accuracy: Floats


def simulate(setting: Setting) -> Curves:
    """Train one policy for each seed, side by side. A seed's policy does not depend on the others."""
    bandit = Bandit(setting)
    points = np.unique(np.linspace(0, setting.steps, POINTS + 1).astype(np.int64))
    curves: list[tuple[Floats, Floats]] = []
    for step in range(setting.steps + 1):
        if step:
            bandit.step()
        if step == points[len(curves)]:
            curves.append((bandit.tool_use(), bandit.accuracy_tool()))
    tool_use, accuracy_tool = (np.stack(values, axis=1) for values in zip(*curves, strict=True))
    return Curves(points, tool_use, accuracy_tool, tool_use * accuracy_tool + (1 - tool_use) * setting.p_think)


@dataclass(frozen=True)
class Draws:
    """The rollouts of one step in S runs, for B questions of each, N of each, before any is forked."""

    targets: Ints  # (S, B)
    likelihood: Floats  # (S, B, 68) the probability of each token where it can stand
    ids: Ints  # (S, B, N, 2) the tokens of each rollout; those of a kind lie together, as their order says nothing
    right: Bools  # (S, B, N)

    @property
    def tool_use(self) -> Floats:
        """(S,)"""
        return self.likelihood[:, 0, ACT]

    @property
    def cells(self) -> Floats:
        """The probability (S, B, 64) that a call names each cell."""
        return self.likelihood[..., :CELLS]

    @property
    def kinds(self) -> Ints:
        """(S, B, N)"""
        return _kinds(self.ids[..., 0], self.right)

    @cached_property
    def logprobs(self) -> Logprobs:
        """(S, B, 68)"""
        return np.log(np.maximum(self.likelihood, _TINY)).astype(np.float32)

    @cached_property
    def entropies(self) -> Logprobs:
        """The entropy (S, B, 68) of the distribution that each token is drawn from."""
        surprise = np.add.reduceat(-self.likelihood * self.logprobs, (0, ACT, RIGHT), axis=-1)
        return np.repeat(surprise, (CELLS, 2, 2), axis=-1).astype(np.float32)


@dataclass(frozen=True)
class Tokens:
    """The n trained tokens of a step, flat."""

    run: Ints
    question: Ints
    id: Ints
    weight: Floats  # advantage over trained tokens, summed over the streams that hold the token, over B·N


class Bandit:
    """S policies, which draw, fork, credit and learn side by side, each from random numbers of its own."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._budget = setting.budget
        runs, place = len(setting.seeds), np.arange(CELLS) // LIKELY
        self.logit = np.full(runs, math.log(TOOL_USE / (1 - TOOL_USE)))  # (S,)
        self.weights = np.tile(np.where(place[:, None] == place, PRIOR, 0.0), (runs, 1, 1))  # (S, 64, 64)
        self._at_first = [np.random.default_rng([*seed, 0]) for seed in setting.seeds]
        self._again = [np.random.default_rng([*seed, 1]) for seed in setting.seeds]
        self._places = np.arange(runs)[:, None, None], np.arange(setting.questions)[:, None]  # of groups in (S, B, N)
        self._credit, self._unforked = _shared(setting.options, setting.size)

    def tool_use(self) -> Floats:
        """The probability (S,) to act."""
        use: Floats = 1 / (1 + np.exp(-self.logit))
        return use

    def accuracy_tool(self) -> Floats:
        """The probability (S,) that a call is right, over all questions."""
        accuracy: Floats = np.diagonal(_softmax(self.weights), axis1=1, axis2=2).mean(axis=1)
        return accuracy

    def step(self) -> None:
        """One training step of each policy (AXPO, section 3)."""
        draws = self.draw()
        forked = self.resample(draws) if self._budget else {}
        self.learn(draws, self.tokens(draws, forked))

    def draw(self) -> Draws:
        """N rollouts of B questions, in every run."""
        setting = self.setting
        targets = np.stack([each.integers(CELLS, size=setting.questions) for each in self._at_first])
        uniform = np.stack([each.random((setting.questions, setting.size, 2)) for each in self._at_first])
        likelihood = np.empty((*targets.shape, CELLS + 4))
        likelihood[..., :CELLS] = _softmax(self.weights[self._places[0][..., 0], targets])
        likelihood[..., ACT] = self.tool_use()[:, None]
        likelihood[..., RIGHT] = setting.p_think
        likelihood[..., [THINK, WRONG]] = 1 - likelihood[..., [ACT, RIGHT]]
        first = np.where(uniform[..., 0] < likelihood[..., ACT, None], ACT, THINK)
        second = _second(first, likelihood, uniform[..., 1])
        right = _is_right(second, targets[..., None])
        ordered = *self._places, np.argsort(_kinds(first, right), axis=-1, kind="stable")
        ids = np.stack([first[ordered], second[ordered]], axis=-1)
        return Draws(targets, likelihood, ids, right[ordered])

    def resample(self, draws: Draws) -> dict[tuple[int, int], RolloutTree]:
        """The forked groups of every run, by run and question: the budget spent, the continuations ended."""
        triggered = self._unforked.triggered(draws.kinds)
        forked: dict[tuple[int, int], RolloutTree] = {}
        for run, row in enumerate(triggered):
            places = [(run, question) for question in np.flatnonzero(row).tolist()]
            trees = [self.tree(draws, place) for place in places]
            per_tree = [ranked(tree, self.setting.options) for tree in trees]
            for index, candidate in allocate(per_tree, self._budget):
                tree, place = trees[index], places[index]
                start = open_prefix(tree, candidate) if self.setting.options.prefix_fix else tree.root
                self._continue(draws, place, tree, start)
                forked[place] = tree
        return forked

    def tree(self, draws: Draws, place: tuple[int, int]) -> RolloutTree:
        """The N rollouts of a question, as a tree; `place` is its run and its number there."""
        tree = RolloutTree(str(place), draws.targets[place][None])
        self._lay_out(draws, place, tree, tree.root, draws.ids[place], draws.right[place])
        return tree

    def _continue(self, draws: Draws, place: tuple[int, int], tree: RolloutTree, start: Segment) -> None:
        """K continuations of a prefix, or from scratch where `start` is the root."""
        uniform = self._again[place[0]].random((self.setting.options.continuations, 2))
        if start is tree.root:
            first = np.where(uniform[:, 0] < draws.likelihood[place][ACT], ACT, THINK)
        else:
            first = np.full(len(uniform), start.ids[-1])
        second = _second(first, draws.likelihood[place], uniform[:, 1])
        right = _is_right(second, draws.targets[place])
        order = np.argsort(_kinds(first, right), kind="stable")
        ids = np.stack([first, second], axis=1) if start is tree.root else second[:, None]
        number = 1 + max(segment.resampled for segment in tree.segments())
        self._lay_out(draws, place, tree, start, ids[order], right[order], number)

    def _lay_out(
        self,
        draws: Draws,
        place: tuple[int, int],
        tree: RolloutTree,
        start: Segment,
        ids: Ints,
        right: Bools,
        number: int = 0,
    ) -> None:
        """Append rollouts (n, 2), or their last tokens (n, 1)."""
        logprobs = draws.logprobs[place][ids]
        entropies = draws.entropies[place][ids] if self.setting.options.rank == "entropy" else [None] * len(ids)
        for each in zip(ids, right.tolist(), logprobs, entropies, strict=True):
            _append(tree, start, *each, number)

    def tokens(self, draws: Draws, forked: dict[tuple[int, int], RolloutTree]) -> Tokens:
        """The trained tokens of all groups, credited by the method."""
        weights = self._unforked.weights(draws.kinds)
        again: list[tuple[int, int, int]] = []
        weights_again: list[float] = []
        for place, tree in forked.items():
            weights[place] = 0
            for segment, weight in self._credit.weights(tree):
                again += [(*place, token) for token in segment.ids.tolist()]
                weights_again += [weight] * len(segment)
        places = np.stack(np.broadcast_arrays(*(each[..., None] for each in self._places), draws.ids)).reshape(3, -1)
        places = np.concatenate([places, np.array(again, dtype=np.int64).reshape(-1, 3).T], axis=1)
        all_weights = np.concatenate([np.repeat(weights, 2), weights_again])
        return Tokens(places[0], places[1], places[2], all_weights / (self.setting.questions * self.setting.size))

    def gradient(self, draws: Draws, tokens: Tokens) -> tuple[Floats, Floats]:
        """Of Σ weight · log π(token): for the logit (S,), and for the row of each question's cell (S, B, 64)."""
        runs, questions = draws.targets.shape
        acts, decides = tokens.id == ACT, (tokens.id == ACT) | (tokens.id == THINK)
        pull = tokens.weight * (acts - draws.tool_use[tokens.run]) * decides
        logit = np.bincount(tokens.run, pull, runs).astype(np.float64)
        names = tokens.id < CELLS
        place = (tokens.run * questions + tokens.question) * CELLS + tokens.id
        counts = np.bincount(place[names], tokens.weight[names], draws.cells.size).astype(np.float64)
        counts = counts.reshape(draws.cells.shape)
        return logit, counts - draws.cells * counts.sum(axis=-1, keepdims=True)

    def learn(self, draws: Draws, tokens: Tokens) -> None:
        """One step of gradient ascent."""
        logit, rows = self.gradient(draws, tokens)
        self.logit += RATE * logit
        np.add.at(self.weights, (self._places[0][..., 0], draws.targets), RATE * self.setting.speed * rows)


class Credit:
    """What each token of a tree weighs, by the method's own credit.

    That depends only on the shape of the tree: on lengths, calls, forks and rewards. So each shape is credited once.
    """

    def __init__(self, options: MethodConfig) -> None:
        self._options = options
        self._known: dict[tuple[tuple[int, bool, int, int, float | None], ...], list[float]] = {}

    def weights(self, tree: RolloutTree) -> list[tuple[Segment, float]]:
        """The segments of a tree and what each token of theirs weighs: its advantage over the trained tokens of its
        stream, summed over the streams that hold it (eq. 5)."""
        segments = list(tree.segments())
        shape = tuple(
            (len(s), bool(s.calls), s.resampled, len(s.children), s.outcome.reward if s.outcome else None)
            for s in segments
        )
        if shape not in self._known:
            METHODS[self._options.name].credit(tree, self._options)
            self._known[shape] = [sum(c.advantage / c.stream_tokens for c in s.credits) for s in segments]
        return list(zip(segments, self._known[shape], strict=True))


class Unforked:
    """What a method makes of a group that is not forked.

    That depends only on how many of its rollouts act and how many are right. So such groups are looked up, all at once;
    the first of a sort is laid out as a tree, ranked and credited.
    """

    def __init__(self, credit: Credit, options: MethodConfig, size: int) -> None:
        self._credit = credit
        self._options = options
        self._base = size + 1
        self._known = np.zeros(self._base**3, dtype=np.bool_)
        self._weights = np.zeros((self._base**3, 4))
        self._triggered = np.zeros(self._base**3, dtype=np.bool_)

    def weights(self, kinds: Ints) -> Floats:
        """The weight (…, N) of the tokens of each rollout in groups of rollouts of such `kinds` (…, N)."""
        return self._weights[self._keys(kinds)[..., None], kinds]

    def triggered(self, kinds: Ints) -> Bools:
        """Whether the groups (…) have rollouts that may be forked."""
        return self._triggered[self._keys(kinds)]

    def _keys(self, kinds: Ints) -> Ints:
        keys: Ints = ((kinds[..., None] == (1, 2, 3)).sum(axis=-2) * self._base ** np.arange(3)).sum(axis=-1)
        unknown = keys[~self._known[keys]]
        for key in set(unknown.tolist()):
            self._meet(key, kinds[keys == key][0])
        return keys

    def _meet(self, key: int, kinds: Ints) -> None:
        tree = RolloutTree(str(key), [0])
        even = np.full(2, math.log(0.5), dtype=np.float32)
        for kind in kinds:
            ids = np.array([ACT, 0] if kind >= 2 else [THINK, RIGHT if kind % 2 else WRONG])
            _append(tree, tree.root, ids, kind % 2, even, even)
        self._triggered[key] = bool(ranked(tree, self._options))
        _, *leaves = self._credit.weights(tree)
        self._weights[key, kinds] = [weight for _, weight in leaves]
        self._known[key] = True


@cache
def _shared(options: MethodConfig, size: int) -> tuple[Credit, Unforked]:
    """What is known of credit in this process, for all bandits alike: the same trees come up again and again."""
    credit = Credit(options)
    return credit, Unforked(credit, options, size)


def _append(
    tree: RolloutTree,
    start: Segment,
    ids: Ints,
    right: int,
    logprobs: Logprobs,
    entropies: Logprobs | None,
    number: int = 0,
) -> None:
    """Append a rollout, or its last token. Thinking ends with the decision not to act, and the answer follows."""
    first = ids[0]
    calls, thought = ((_CALL,) if first == ACT else ()), (1 if first == THINK else None)
    segment = tree.append(start, Kind.POLICY, ids, logprobs, (), calls, number, entropies, thought)
    segment.outcome = _ENDS[right]


def _second(first: Ints, likelihood: Floats, uniform: Floats) -> Ints:
    """The token (…, N) that follows each first one: a cell, or an answer, by the probabilities (…, 68)."""
    edges = likelihood[..., : CELLS - 1].cumsum(axis=-1)
    named = (edges[..., None, :] <= uniform[..., None]).sum(axis=-1)
    return np.where(first == ACT, named, np.where(uniform < likelihood[..., RIGHT, None], RIGHT, WRONG))


def _is_right(second: Ints, target: Ints) -> Bools:
    right: Bools = (second == target) | (second == RIGHT)
    return right


def _kinds(first: Ints, right: Bools) -> Ints:
    """2 for a rollout that acts, and 1 more for one that is right."""
    kinds: Ints = 2 * (first == ACT) + right
    return kinds


def _softmax(logits: Floats) -> Floats:
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
    softmax: Floats = exponents / exponents.sum(axis=-1, keepdims=True)
    return softmax
