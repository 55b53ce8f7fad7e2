"""The real agent, template and tools with a policy that writes what it is told to: every figure is counted by hand."""

import asyncio
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import PIL.Image
import pytest
from transformers import Qwen3VLForConditionalGeneration

from axpo.agent import Agent, Limits
from axpo.chat import Chat
from axpo.diagnostics import divergence
from axpo.diagnostics.calls import Call
from axpo.diagnostics.divergence import Certainty, Continued, Draws, Effort, certainties, draw, figures
from axpo.engines.base import Finish, Generation, Request, RolloutKey, Sampling
from axpo.engines.local import LocalEngine
from axpo.fork import candidates
from axpo.questions import Question
from axpo.tools.base import SystemFault, Toolbox
from axpo.tools.python import make_python
from axpo.tools.sandbox import Sandbox
from axpo.tools.zoom import make_zoom
from axpo.tree import CallSpan, Kind, Outcome, RolloutTree, StopReason

THOUGHT = "I act.\n</think>\n\n"
Caller = Callable[[], Any]

RIGHT = "I know.\n</think>\n\n<answer>7</answer>"
WRONG = "I guess.\n</think>\n\n<answer>1</answer>"


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def zoom(*box: int) -> str:
    return call("image_zoom_in_tool", bbox_2d=list(box), img_idx=0, label="it")


def python(code: str) -> str:
    return call("python", code=code)


def after_tag(text: str) -> str:
    return text.removeprefix("<tool_call>")


def broken() -> str:
    """Is always down."""
    raise SystemFault("the provider is down")


class Script:
    """An engine that answers a rollout with the next of its texts, as certain as its number tells."""

    def __init__(self, chat: Chat, texts: dict[str, Sequence[Sequence[str]]]) -> None:
        self.chat = chat
        self.texts = {name: [list(turns) for turns in rollouts] for name, rollouts in texts.items()}
        self.open = self.most = 0  # rollouts at a time

    @contextmanager
    def rollout(self, key: RolloutKey) -> Iterator[None]:
        self.open += 1
        self.most = max(self.most, self.open)
        yield
        self.open -= 1

    def sleep(self) -> None:
        assert not self.open

    def update_weights(self) -> None: ...

    async def settle(self, key: RolloutKey) -> None: ...

    async def generate(self, request: Request) -> Generation:
        key = request.rollout
        ids = self.chat.turn(self.texts[key.question_id][key.index].pop(0))
        return Generation(ids, [-0.1 * (key.index + 1)] * len(ids), Finish.STOP, [0.5 * key.index] * len(ids))


class Shown:
    """What a progress display was told."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.steps: list[int] = []

    def stage(self, name: str, total: int) -> None:
        self.stages.append((name, total))
        self.steps.append(0)

    def step(self, figures: dict[str, Any]) -> None:
        self.steps[-1] += 1


def question(name: str) -> Question:
    file = io.BytesIO()
    PIL.Image.fromarray(np.zeros((128, 128, 3), dtype=np.uint8)).save(file, "PNG")
    content = [{"type": "image"}, {"type": "text", "text": f"Which digit, {name}?"}]
    return Question(name, [{"role": "user", "content": content}], (file.getvalue(),), "7")


@pytest.fixture
def measured(chat: Chat, plain_sandbox: Sandbox) -> Callable[..., tuple[Draws, Shown]]:
    def run(texts: dict[str, Sequence[Sequence[str]]], effort: Effort) -> tuple[Draws, Shown]:
        toolbox = Toolbox([make_zoom(64 * 64), make_python(plain_sandbox), broken])
        agent = Agent(Script(chat, texts), chat, toolbox, Sampling(max_tokens=500), Limits())
        shown = Shown()
        return asyncio.run(draw(agent, [question(name) for name in texts], effort, 0.5, 0, shown)), shown

    return run


ONE_FAILS: list[Sequence[str]] = [
    [THOUGHT + zoom(0, 0, 500, 500), WRONG],
    [RIGHT],
    [WRONG],
    # The continuations of the first one, from its opening tag on.
    [after_tag(zoom(0, 0, 500, 500)), WRONG],
    [after_tag(zoom(0, 0, 500, 400)), RIGHT],
    [after_tag(python("print(6 + 1)")), RIGHT],
    [after_tag(python("a = 7\nprint(a)")), WRONG],
    [after_tag(python("a = 7")), WRONG],
    [after_tag(python("a = 8")), WRONG],
    [after_tag(call("broken"))],  # void
]


def test_golden_figures_of_one_failed_prefix(measured: Callable[..., tuple[Draws, Shown]]):
    texts = {
        "fails": ONE_FAILS,
        "acts": [[THOUGHT + zoom(0, 0, 500, 500), RIGHT], [THOUGHT + zoom(0, 0, 10, 10), WRONG], [WRONG]],
        "never acts": [[RIGHT], [RIGHT], [WRONG]],
    }
    draws, shown = measured(texts, Effort(rollouts=3, continuations=7, prefixes=0))
    found = figures(draws, 0.5)
    assert {key: value for key, value in found.items() if not isinstance(value, list)} == {
        "questions": 3,
        "decided": 9,
        "void": 1,
        "accuracy": 4 / 9,
        "accuracy_tool": 1 / 3,
        "accuracy_no_tool": 3 / 6,
        "tool_use": 3 / 9,
        "all_wrong_tool": 1 / 2,  # of the first two
        "questions_tool": 2,
        "all_wrong_no_tool": 1 / 3,  # the second
        "questions_no_tool": 3,
        "failed": 1,
        "continued": 1,
        "measured": 1,
        "clusters": 4,
        "collapsed": 0,
        "recovered": 1,
        "questions_measured": 1,
        "recovered_questions": 1,
        "calls": 3,
        # Calls of rollouts 0, 0 and 1: confidence e^−0.1, e^−0.1, e^−0.2, entropy 0, 0, 0.5.
        "pearson": pytest.approx(1),
        "spearman": pytest.approx(1),
    }
    (prefix,) = found["prefixes"]
    # Boxes that overlap; programs that print 7; two that print nothing. The void one is left out.
    assert [each["cluster"] for each in prefix["continuations"]] == [0, 0, 1, 1, 2, 3]
    assert [each["reward"] for each in prefix["continuations"]] == [0, 1, 1, 0, 0, 0]
    assert json.loads(prefix["continuations"][4]["call"])["arguments"] == {"code": "a = 7"}
    assert (prefix["question"], prefix["clusters"], prefix["recovered"]) == ("fails", 4, True)
    assert found["certainties"][2] == {"confidence": pytest.approx(np.exp(-0.2)), "entropy": 0.5}
    assert (shown.stages, shown.steps) == ([("rollouts", 3), ("continuations", 1)], [3, 1])
    json.dumps(found)


def failing(rollouts: int, continuations: int) -> list[Sequence[str]]:
    """So many rollouts fail with a call; each has so many continuations with the same one, all wrong."""
    again: list[Sequence[str]] = [[after_tag(zoom(0, 0, 500, 500)), WRONG]] * (rollouts * continuations)
    return [[THOUGHT + zoom(0, 0, 500, 500), WRONG]] * rollouts + again


def test_a_limit_on_prefixes_takes_one_of_every_question_first(measured: Callable[..., tuple[Draws, Shown]]):
    texts = {name: failing(3, 2) for name in "pqr"}
    for limit, expected in ((4, {"p", "q", "r"}), (2, None), (0, {"p", "q", "r"})):
        draws, shown = measured(texts, Effort(3, 2, limit))
        names = [prefix.question for prefix in draws.prefixes]
        assert draws.failed == 9
        assert len(names) == (limit or 9)
        assert len(set(names[:3])) == min(limit or 9, 3)
        assert expected is None or set(names) == expected
        assert shown.stages[1] == ("continuations", limit or 9)
        assert shown.steps[1] == (limit or 9)
        found = figures(draws, 0.5)
        assert (found["clusters"], found["collapsed"], found["recovered"]) == (1, 1, 0)


def test_no_more_rollouts_than_a_wave_run_together(chat: Chat, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(divergence, "WAVE", 5)
    script = Script(chat, {name: failing(2, 3) for name in "pqr"})
    agent = Agent(script, chat, Toolbox([make_zoom(64 * 64)]), Sampling(max_tokens=500), Limits())
    draws = asyncio.run(draw(agent, [question(name) for name in "pqr"], Effort(2, 3, 0), 0.5, 0, Shown()))
    assert script.most == 4  # two questions; one prefix takes 3
    assert [len(prefix.calls) for prefix in draws.prefixes] == [3] * 6


def test_two_prefixes_of_a_question_recover_it_once(measured: Callable[..., tuple[Draws, Shown]]):
    rollouts = failing(2, 2)
    rollouts[-1] = [after_tag(zoom(0, 0, 500, 500)), RIGHT]
    draws, _ = measured({"p": rollouts, "q": failing(2, 2)}, Effort(2, 2, 0))
    found = figures(draws, 0.5)
    assert (found["measured"], found["recovered"]) == (4, 1 / 4)
    assert (found["questions_measured"], found["recovered_questions"]) == (2, 1 / 2)


def test_nothing_to_continue(measured: Callable[..., tuple[Draws, Shown]]):
    draws, shown = measured({"p": [[RIGHT], [WRONG]]}, Effort(2, 2, 0))
    found = figures(draws, 0.5)
    nothing = ("all_wrong_tool", "clusters", "collapsed", "recovered", "recovered_questions", "pearson", "spearman")
    assert {key: found[key] for key in nothing} == dict.fromkeys(nothing)
    assert (found["tool_use"], found["failed"], found["calls"]) == (0, 0, 0)
    assert shown.stages == [("rollouts", 1), ("continuations", 0)]


def test_a_prefix_of_which_a_single_continuation_counts_is_not_measured():
    one = Continued("p", (Call("{}"),), (1.0,))
    two = Continued("q", (Call("{}"), Call("[]")), (0.0, 0.4))
    found = figures(Draws([], [], 2, [one, two]), 0.5)
    assert (found["continued"], found["measured"], found["clusters"], found["recovered"]) == (2, 1, 2, 0)
    assert figures(Draws([], [], 2, [one, two]), 0.4)["recovered"] == 1  # graded rewards count from the threshold on


def hand_made() -> RolloutTree:
    """A first turn of 4 tokens whose call are the 2nd and 3rd, a second call later, and a rollout without a call."""
    tree = RolloutTree("q", [1, 2])
    logprobs = np.log([0.5, 0.8, 0.4, 0.9])
    first = tree.append(
        tree.root, Kind.POLICY, [3] * 4, logprobs, calls=[CallSpan(1, 2, 3)], entropies=[9.0, 1.0, 2.0, 9.0]
    )
    seen = tree.append(first, Kind.OBSERVATION, [4])
    last = tree.append(seen, Kind.POLICY, [5] * 2, [-3.0] * 2, calls=[CallSpan(0, 1, 2)], entropies=[7.0, 7.0])
    none = tree.append(tree.root, Kind.POLICY, [6], [-1.0], entropies=[8.0])
    for leaf in (last, none):
        leaf.outcome = Outcome(StopReason.ANSWER, 0.0)
    return tree


def test_certainty_is_that_of_the_tokens_of_the_first_call():
    tree = hand_made()
    (found,) = certainties(tree)
    assert found == Certainty(pytest.approx(0.6), pytest.approx(1.5))
    (candidate,) = candidates(tree)
    assert found.confidence == candidate.confidence


def test_the_seed_decides_all_that_a_real_model_draws(chat: Chat, make_caller: Caller):
    def drawn(seed: int) -> Any:
        agent = Agent(make_caller(), chat, Toolbox([make_zoom(64 * 64)]), Sampling(max_tokens=24), Limits(turns=1))
        return figures(
            asyncio.run(draw(agent, [question("p"), question("q")], Effort(3, 4, 2), 0.5, seed, Shown())), 0.5
        )

    first = drawn(0)
    assert first["measured"] == 2
    assert first["tool_use"] == 1
    assert len(first["certainties"]) == 6
    assert all(each["entropy"] > 0 for each in first["certainties"])
    assert all(len(prefix["continuations"]) == 4 for prefix in first["prefixes"])
    assert drawn(0) == first
    assert drawn(1) != first


class Opening:
    """The embedded engine, before whose first generation of a rollout a call is opened: a random model would not."""

    def __init__(self, engine: LocalEngine, chat: Chat) -> None:
        self.engine = engine
        self.head = chat.turn(THOUGHT + "<tool_call>")[:-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    async def generate(self, request: Request) -> Generation:
        if self.head[-1] in list(request.ids)[-1:]:
            return await self.engine.generate(request)
        found = await self.engine.generate(
            Request([*request.ids, *self.head], request.images, request.sampling, request.seed, request.rollout)
        )
        assert found.entropies is not None
        known = [0.0] * len(self.head)
        return Generation(self.head + found.ids, known + found.logprobs, found.finish, known + found.entropies)


@pytest.fixture
def make_caller(chat: Chat, tiny_model: Qwen3VLForConditionalGeneration) -> Caller:
    return lambda: Opening(LocalEngine(tiny_model, chat, entropies=True), chat)
