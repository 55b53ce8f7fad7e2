"""The scripted teacher, who writes the SFT trajectories through the same agent loop and tools as the policy.

It is no expert. Mostly it guesses; and where it acts it has several habits, of which one works. Whoever
keeps only its correct trajectories keeps lucky bad calls too, as filtered data of real teachers does.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np

from axpo.chat import Chat
from axpo.engines.base import Finish, Generation, Request, RolloutKey
from axpo.miniature.scene import GRID, cell_box
from axpo.miniature.tools import call_text, zoom_call
from axpo.miniature.world import Problem

ACTING = {
    "perception": ("The {0} is small. I zoom in.", "I cannot read the {0} from here.", "I look closer at the {0}."),
    "computation": ("I compute {0} * {1}.", "Python can settle {0} * {1}.", "I let Python work it out."),
    "lookup": ("I look up {0}.", "I search for the {1} of {0}.", "The documents may tell."),
}
GUESSING = ("Probably {0}.", "I think it is {0}.", "It looks like {0}.")
SURE = ("It is {0}.", "It says {0}.", "So it is {0}.")
QUOTING = ("Its {1} is {0}.",)  # as the documents put it
UNSURE = ("That did not help. Probably {0}.", "I still guess {0}.")
THOUGHTS = [thought for family in ACTING.values() for thought in family] + [*GUESSING, *SURE, *UNSURE]

ACTS = 0.4  # of the rollouts
HABITS = (0.4, 0.2, 0.2, 0.2)  # the first one works


@dataclass
class _Memory:
    """What the teacher remembers of one rollout."""

    rng: np.random.Generator
    problem: Problem
    works: bool = False
    acted: bool = False


class Teacher:
    """Speaks the engine protocol: `generate` returns scripted turns. Seeded by each request's seed."""

    def __init__(self, problems: list[Problem], chat: Chat, acts: float = ACTS) -> None:
        self.problems = {problem.question.id: problem for problem in problems}
        self.chat = chat
        self.acts = acts
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
        if memory.acted:
            text = self._answer(memory, self._observed(request))
        elif memory.rng.random() < (self.acts if memory.problem.habit is None else 1.0):
            text = self._act(memory)
        else:
            text = _final(_pick(memory.rng, GUESSING), memory.problem.guess)
        ids = self.chat.turn(text)
        return Generation(ids, [0.0] * len(ids), Finish.STOP)

    def _act(self, memory: _Memory) -> str:
        problem, rng = memory.problem, memory.rng
        habit = int(rng.choice(len(HABITS), p=HABITS)) if problem.habit is None else problem.habit
        memory.acted, memory.works = True, habit == 0
        about: tuple[str, ...]
        if problem.plaque is not None:
            about, call = (problem.plaque.name,), _zoom(problem, habit, rng)
        elif problem.family == "computation":
            about, call = tuple(map(str, problem.factors[:2])), call_text("python", {"code": _codes(problem)[habit]})
        else:
            about, call = (problem.land, problem.fact), call_text("search", {"query": _queries(problem)[habit]})
        return f"{_pick(rng, ACTING[problem.family]).format(*about)}\n</think>\n\n{call}"

    def _answer(self, memory: _Memory, observed: str) -> str:
        problem = memory.problem
        if not memory.works:
            return _final(_pick(memory.rng, UNSURE), problem.guess)
        answer = str(problem.question.answer)
        if problem.family == "computation":
            answer = observed.strip()
        thoughts = QUOTING if problem.family == "lookup" else SURE
        return _final(_pick(memory.rng, thoughts), answer, problem.fact)

    def _observed(self, request: Request) -> str:
        """The text of the last tool response, as the policy sees it."""
        text: str = self.chat.tokenizer.decode(request.ids)
        return text.rsplit("<tool_response>\n", 1)[-1].split("\n</tool_response>", 1)[0]


def tell(problem: Problem, rng: np.random.Generator) -> Problem:
    """The same problem with the call to make spelled out in the question: what the base learns to follow."""
    habit = int(rng.integers(len(HABITS) - 1)) if problem.plaque is not None else int(rng.integers(len(HABITS)))
    if problem.plaque is not None:
        order = ("Zoom in on it.", "Zoom in on everything.", "Zoom in on it and what is beside it.")[habit]
    elif problem.family == "computation":
        order = f"Run {_codes(problem)[habit]}."
    else:
        order = f"Search for {_queries(problem)[habit]}."
    (message,) = problem.question.messages
    content = [*message["content"][:-1], {"type": "text", "text": f"{message['content'][-1]['text']} {order}"}]
    question = replace(problem.question, messages=[{"role": "user", "content": content}])
    return replace(problem, question=question, habit=habit)


def _pick(rng: np.random.Generator, thoughts: tuple[str, ...]) -> str:
    return thoughts[int(rng.integers(len(thoughts)))]


def _final(thought: str, answer: str, fact: str = "") -> str:
    return f"{thought.format(answer, fact)}\n</think>\n\n<answer>{answer}</answer>"


def _zoom(problem: Problem, habit: int, rng: np.random.Generator) -> str:
    assert problem.plaque is not None
    cell = problem.plaque.cell
    column, row = cell % GRID, cell // GRID
    if habit == 0:
        box = cell_box(cell)
    elif habit == 1:
        box = (0, 0, 1000, 1000)
    elif habit == 2:  # two by two cells: larger, but not large enough
        x, y = min(column, GRID - 2) * 250, min(row, GRID - 2) * 250
        box = (x, y, x + 500, y + 500)
    else:  # beside it
        column += 1 if column == 0 or (column < GRID - 1 and rng.random() < 0.5) else -1
        box = cell_box(row * GRID + column)
    return zoom_call(box, problem.plaque.name)


def _codes(problem: Problem) -> tuple[str, ...]:
    a, b, divisor = problem.factors
    return (
        f"print({a} * {b} % {divisor})",
        f"print({a} * {b})",
        f"print({a} + {b} % {divisor})",
        f"print({a} * {b} // {divisor})",
    )


def _queries(problem: Problem) -> tuple[str, ...]:
    return (problem.land, problem.fact, f"{problem.fact} of the land", problem.land[:3])
