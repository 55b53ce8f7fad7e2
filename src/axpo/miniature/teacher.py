"""The scripted teacher, who writes the SFT trajectories through the same agent loop and tools as the policy.

It is no expert. Mostly it guesses; where it acts it has several habits, of which one works, another one for each
kind of question; and it believes whatever a tool shows. Whoever keeps only its correct trajectories keeps lucky bad
calls too, as filtered data of real teachers does.
"""

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np

from axpo.chat import Chat
from axpo.engines.base import Counters, Finish, Generation, Request, RolloutKey
from axpo.miniature.scene import GRID, cell_box
from axpo.miniature.tools import call_text, zoom_call
from axpo.miniature.world import GUESSED, Problem, capital_of

ACTING = {
    "perception": ("The {0} is small. I zoom in.", "I cannot read the {0} from here.", "I look closer at the {0}."),
    "computation": ("I compute with {0} and {1}.", "Python can settle it.", "I let Python work it out."),
    "lookup": ("I look up the {0}.", "I search for the {0}.", "The documents may tell."),
    "picture": ("I search for the picture.", "Somebody may know this picture."),
}
# What it thinks now and then before a call: with it, the call is decided. In the order of `calls`.
DECIDED = {
    "perception": ("One cell will do.", "It lies between two cells.", "I look at another one.", "I look at all of it."),
    "computation": ("I multiply.", "I add.", "I divide.", "I store the result."),
    "lookup": ("The name will do.", "I search for the capital.", "Half the name will do.", "The word {0} will do."),
    "picture": ("I search for the picture.",),
}
DECIDES = 0.2  # of the calls
GUESSING = ("Probably {0}.", "I think it is {0}.", "It looks like {0}.")
SURE = ("It is {0}.", "It says {0}.", "So it is {0}.")
QUOTING = ("Its {1} is {0}.",)  # as the documents put it
UNSURE = ("That did not help. Probably {0}.", "I still guess {0}.")
THOUGHTS = [thought for part in (ACTING, DECIDED) for family in part.values() for thought in family]
THOUGHTS += [*GUESSING, *SURE, *UNSURE]

ACTS = 0.48  # of the rollouts
# How often it makes each of the calls of a family (`calls`): the first two settle one kind of question each; the others
# mislead, or do not help.
HABITS = {
    "perception": (0.043, 0.043, 0.864, 0.05),
    "computation": (0.045, 0.045, 0.87, 0.04),
    "lookup": (0.045, 0.045, 0.08, 0.83),
}


@dataclass
class _Memory:
    """What the teacher remembers of one rollout."""

    rng: np.random.Generator
    problem: Problem
    habit: int | None = None  # of its call, once it has acted


class Teacher:
    """Speaks the engine protocol: `generate` returns scripted turns. Seeded by each request's seed."""

    def __init__(self, problems: list[Problem], chat: Chat, acts: float = ACTS) -> None:
        self.problems = {problem.question.id: problem for problem in problems}
        self.chat = chat
        self.acts = acts
        self.counters = Counters()
        self._memory: dict[RolloutKey, _Memory] = {}

    def rollout(self, key: RolloutKey) -> AbstractContextManager[None]:
        return nullcontext()

    async def settle(self, key: RolloutKey) -> None:
        """A script takes no time."""

    def sleep(self) -> None:
        """A script takes no memory."""

    def update_weights(self) -> None:
        """A script has no weights."""

    async def generate(self, request: Request) -> Generation:
        memory = self._memory.get(request.rollout)
        if memory is None:
            problem = self.problems[request.rollout.question_id]
            memory = self._memory[request.rollout] = _Memory(np.random.default_rng(request.seed), problem)
        if memory.habit is not None:
            text = self._answer(memory, memory.habit, self._observed(request))
        elif memory.problem.habit is not None or memory.rng.random() < self.acts:
            text = self._act(memory)
        else:
            text = _final(_pick(memory.rng, GUESSING), _guess(memory))
        ids = self.chat.turn(text)
        return Generation(ids, [0.0] * len(ids), Finish.STOP)

    def _act(self, memory: _Memory) -> str:
        problem, rng = memory.problem, memory.rng
        memory.habit = problem.habit if problem.habit is not None else int(rng.choice(4, p=HABITS[problem.family]))
        thought = _pick(rng, ACTING[problem.family])
        if rng.random() < DECIDES:
            thought = DECIDED[problem.family][memory.habit]
        return f"{thought.format(*_about(problem))}\n</think>\n\n{calls(problem)[memory.habit]}"

    def _answer(self, memory: _Memory, habit: int, observed: str) -> str:
        seen = _read(memory.problem, habit, observed)
        if seen is None:
            return _final(_pick(memory.rng, UNSURE), _guess(memory))
        thoughts = QUOTING if memory.problem.family == "lookup" else SURE
        return _final(_pick(memory.rng, thoughts), seen, memory.problem.fact)

    def _observed(self, request: Request) -> str:
        """The text of the last tool response, as the policy sees it."""
        text: str = self.chat.tokenizer.decode(request.ids)
        return text.rsplit("<tool_response>\n", 1)[-1].split("\n</tool_response>", 1)[0]


def calls(problem: Problem) -> tuple[str, ...]:
    """The calls that the teacher makes, one of which settles the question: the one with the index `problem.kind`."""
    if problem.family == "perception":
        return tuple(zoom_call(box, problem.scene[0].name) for box in _boxes(problem))
    if problem.family == "computation":
        return tuple(call_text("python", {"code": code}) for code in codes(*problem.numbers))
    if problem.family == "picture":
        return (call_text("image_search", {"img_idx": 0}),)
    return tuple(
        call_text("search", {"query": query}) for query in queries(problem.land, problem.fact, problem.kind == 1)
    )


def tell(problem: Problem, rng: np.random.Generator) -> Problem:
    """The same problem with the call to make spelled out in the question: what the base learns to follow."""
    habit = int(rng.integers(len(calls(problem))))
    if problem.family == "perception":
        other = problem.scene[1]
        order = (
            "Zoom in on one cell.",
            "Zoom in between two cells.",
            f"Zoom in on the {other.name} in {other.place}.",
            "Zoom in on everything.",
        )[habit]
    elif problem.family == "computation":
        order = f'Run "{codes(*problem.numbers)[habit]}".'
    elif problem.family == "picture":
        order = "Search for the picture."
    else:
        order = f'Search for "{queries(problem.land, problem.fact, problem.kind == 1)[habit]}".'
    (message,) = problem.question.messages
    content = [*message["content"][:-1], {"type": "text", "text": f"{message['content'][-1]['text']} {order}"}]
    question = replace(problem.question, messages=[{"role": "user", "content": content}])
    return replace(problem, question=question, habit=habit)


def _pick(rng: np.random.Generator, thoughts: tuple[str, ...]) -> str:
    return thoughts[int(rng.integers(len(thoughts)))]


def _guess(memory: _Memory) -> str:
    return str(memory.rng.choice(memory.problem.guesses, p=GUESSED))


def _final(thought: str, answer: str, fact: str = "") -> str:
    return f"{thought.format(answer, fact)}\n</think>\n\n<answer>{answer}</answer>"


def _about(problem: Problem) -> tuple[str, ...]:
    """What its thoughts name."""
    if problem.family == "perception":
        return (problem.scene[0].name,)
    return (problem.fact,) if problem.family == "lookup" else tuple(map(str, problem.numbers[:2]))


def _read(problem: Problem, habit: int, observed: str) -> str | None:
    """What the tool's response says, right or wrong; None where it says nothing that answers."""
    if problem.family == "perception":
        shown = [plaque.digit for plaque in problem.scene[:2] if plaque.box == _boxes(problem)[habit]]
        return str(shown[0]) if shown else None
    if problem.family == "picture":
        return str(problem.question.answer)
    pattern = r"(\d+)" if problem.family == "computation" else rf".*?Its {problem.fact} is (\w+)\..*"
    found = re.fullmatch(pattern, observed.strip(), re.DOTALL)
    return found[1] if found else None


def _boxes(problem: Problem) -> tuple[tuple[int, int, int, int], ...]:
    target, other = problem.scene[:2]
    left = target.cell - (target.cell % GRID == GRID - 1)  # right of the last column there is nothing
    return cell_box(target.cell), cell_box(left, between=True), other.box, (0, 0, 1000, 1000)


def codes(a: int, b: int, divisor: int) -> tuple[str, ...]:
    """What the teacher runs: for a product, for a sum, with one number forgotten, and without showing the result."""
    return (
        f"print({a} * {b} % {divisor})",
        f"print(({a} + {b}) % {divisor})",
        f"print({a} % {divisor})",
        f"r = {a} * {b} % {divisor}",
    )


def queries(land: str, fact: str, capital: bool = False) -> tuple[str, ...]:
    """What the teacher searches for: the land, its capital, with half the name what is asked for, the kind of fact."""
    half = land.split("-")[0]
    return land, capital_of(land), capital_of(half) if capital else half, fact
