"""One training step whose texts are written beforehand, so that every contender does the same work.

Each group holds rollouts that answer at once and rollouts that call a tool, read what it says, and then answer. What
is sampled is overridden by the script; sampling itself is paid for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from axpo.agent import Agent, Limits
from axpo.build import load_chat, load_model
from axpo.chat import Chat
from axpo.config import Config
from axpo.engines.base import Sampling
from axpo.engines.jobs import Job
from axpo.engines.local import LocalEngine
from axpo.miniature.world import sample_problems
from axpo.questions import Question
from axpo.rewards.verify import Verdict
from axpo.tools.base import Toolbox
from axpo.trainer import Trainer

FOUND = "Three documents mention it: the first is about iron, the second about copper, the third about tin and zinc."


def search(query: str) -> str:
    """Search an encyclopedia and return what its best documents say about the query.

    Args:
        query: What to look for, a name or a few words.
    """
    return FOUND


def calculate(expression: str) -> str:
    """Evaluate an arithmetic expression and return its value as a decimal number.

    Args:
        expression: Such as (3 + 4) * 5, without names or functions.
    """
    return FOUND


@dataclass(frozen=True)
class Shape:
    """The size of the step. `callers` of the `rollouts` of each group call a tool; `tokens` is a rollout's first turn,
    and twice what a caller thinks before its call; `prompt` is the length that prompts are filled up to."""

    questions: int = 4
    rollouts: int = 8
    callers: int = 3
    tokens: int = 48
    prompt: int = 691


def encode(chat: Chat, text: str) -> list[int]:
    """Text to ids, special tokens included."""
    ids: list[int] = chat.tokenizer.encode(text, add_special_tokens=False)
    return ids


class Script:
    """What each rollout writes: ids, by whether it calls and whether it has been answered."""

    def __init__(self, chat: Chat, shape: Shape) -> None:
        call = 'mm\n</think>\n\n<tool_call>\n{"name": "search", "arguments": {"query": "land"}}\n</tool_call><|im_end|>'
        self._chat = chat
        self._shape = shape
        (self.started,), (self.replied,) = encode(chat, "<|im_start|>"), encode(chat, "<tool_response>")
        self.header = len(encode(chat, "<|im_start|>assistant\n<think>\n"))
        self._thinking = encode(chat, " the answer is not to be seen and so it must be looked up")
        self.calling = self._written(shape.tokens // 2, encode(chat, call))
        self.answering = {reward: self._answer(shape.tokens, reward) for reward in (0, 1)}
        self.answered = {reward: self._answer(shape.tokens // 2, reward) for reward in (0, 1)}

    def turn(self, rollout: int, replied: bool) -> list[int]:
        """The turn of rollout i of its group: callers fail, of the others every second one is right."""
        if rollout < self._shape.callers:
            return self.answered[0] if replied else self.calling
        if rollout < self._shape.rollouts:
            return self.answering[rollout % 2]
        return self.answered[rollout % 2] if replied else self.calling  # a continuation

    def sampled(self, rollout: int) -> int:
        """How many tokens rollout i of a group samples."""
        return sum(len(self.turn(rollout, replied)) for replied in (False, True)[: 1 + (rollout < self._shape.callers)])

    def _answer(self, tokens: int, reward: int) -> list[int]:
        end = encode(self._chat, f"\n</think>\n\n{'right' if reward else 'wrong'}<|im_end|>")
        return self._written(tokens - len(end), end)

    def _written(self, thinking: int, end: Sequence[int]) -> list[int]:
        return [*np.resize(self._thinking, thinking).tolist(), *end]


def questions(chat: Chat, shape: Shape) -> list[Question]:
    """The miniature's questions about images, with words before each until its prompt has `shape.prompt` tokens."""
    seen = [p.question for p in sample_problems(60, 5, "tuning") if p.question.images][: shape.questions]
    return [_filled(question, chat, shape) for question in seen]


def _filled(question: Question, chat: Chat, shape: Shape) -> Question:
    schemas = Toolbox([search, calculate]).schemas
    (message,) = question.messages
    for words in range(1, shape.prompt):
        content = [*message["content"], {"type": "text", "text": " and" * words}]
        messages = [{**message, "content": content}]
        if len(chat.prompt(messages, question.images, schemas)[0]) >= shape.prompt:
            break
    return Question(question.id, messages, question.images, question.answer)


def score(text: str, question: Question) -> Verdict:
    """What the script says."""
    return Verdict(float("right" in text), True, "script", text)


class ScriptedEngine(LocalEngine):
    """The local engine; what it samples is overridden by the script (the log-prob is still that of the sample)."""

    script: Script

    def _finish(self, row: int) -> None:
        job: Job = self._jobs[row]
        job.new_ids[-1] = self._scripted(job)
        super()._finish(row)

    def _scripted(self, job: Job) -> int:
        begun = int(np.flatnonzero(job.ids == self.script.started)[-1]) + self.script.header
        replied = bool((job.ids[:begun] == self.script.replied).any())
        return self.script.turn(job.request.rollout.index, replied)[len(job.ids) - begun + len(job.new_ids) - 1]


def trainer(options: dict[str, Any], shape: Shape) -> Trainer:
    """Our trainer for this work."""
    config = Config.model_validate(
        {
            "rollout": {
                "questions": shape.questions,
                "rollouts": shape.rollouts,
                "max_tokens": 4 * shape.tokens,
                "max_context": 16384,
            },
            "train": {"warmup_steps": 0, "learning_rate": 1e-6},
            **options,
        }
    )
    chat, model = load_chat(config), load_model(config)
    engine = ScriptedEngine(model, chat, config.engine.max_batch, config.engine.overlap)
    engine.script = Script(chat, shape)
    sampling = Sampling(1.0, 1.0, 0, config.rollout.max_tokens)
    agent = Agent(engine, chat, Toolbox([search, calculate]), sampling, Limits(), score)
    return Trainer(config, agent, model, questions(chat, shape))
