"""What a second attempt is told about the first (rltf): by the verifier, or by a judge behind an HTTP endpoint."""

import os
import time
from collections.abc import Callable
from functools import partial

import httpx

from axpo.options import JudgeConfig
from axpo.questions import Question
from axpo.rewards.verify import Verdict

_ASK = (
    "A student was asked:\n{question}\n\nThe right answer is: {gold}\nThe student answered: {answer}\n\nIn one or two "
    "sentences, tell the student what is wrong or right, without giving the right answer away."
)

TIMEOUT = 60.0  # seconds for one critique

RETRY_AFTER = (1.0, 4.0)  # seconds


def critic(judge: JudgeConfig) -> Callable[[Verdict, Question], str]:
    """Says what is wrong or right about a decided answer: the judge where one is configured, else the verifier.

    What it returns raises RuntimeError where the judge cannot be reached, or does not answer in words, three times.
    """
    if judge.url is None:
        return lambda verdict, question: by_verifier(verdict)
    return partial(_by_judge, judge)


def by_verifier(verdict: Verdict) -> str:
    """What the rules can say without giving the answer away."""
    if verdict.score >= 0.5:
        return f"Your answer {verdict.answer!r} is right."
    if not verdict.answer:
        return "You gave no answer. Try again."
    fault = {"too long": ": it is too long", "nested tags": ": it holds tags"}.get(verdict.by, "")
    return f"Your answer {verdict.answer!r} is wrong{fault}. Try again."


def _by_judge(judge: JudgeConfig, verdict: Verdict, question: Question) -> str:
    asked = "\n".join(_words(message["content"]) for message in question.messages)
    gold = question.answer if isinstance(question.answer, str) else " or ".join(question.answer)
    prompt = _ASK.format(question=asked, gold=gold, answer=verdict.answer or "nothing")
    for pause in RETRY_AFTER:
        try:
            return _answer(judge, prompt)
        except RuntimeError:
            time.sleep(pause)
    return _answer(judge, prompt)


def _answer(judge: JudgeConfig, prompt: str) -> str:
    try:
        response = httpx.post(
            f"{judge.url}/chat/completions",
            json={"model": judge.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0},
            headers={"Authorization": f"Bearer {os.environ[judge.key]}"} if judge.key else {},
            timeout=TIMEOUT,
        )
        response.raise_for_status()
        words = response.json()["choices"][0]["message"]["content"]
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise RuntimeError(f"the judge at {judge.url} gave no critique: {error!r}") from error
    if not isinstance(words, str) or not words.strip():
        raise RuntimeError(f"the judge at {judge.url} gave no critique: its message is empty")
    return words.strip()


def _words(content: object) -> str:
    if isinstance(content, str):
        return content
    assert isinstance(content, list)
    return "".join(part.get("text", "<image>") for part in content)
