"""The agent loop, with the real template, parser and tools, and a policy that writes what it is told to."""

import asyncio
import io
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image as PilImage

from axpo.agent import Agent, Limits
from axpo.chat import Chat, ChatError
from axpo.engines.base import Finish, Generation, Request, RolloutKey, Sampling
from axpo.fork import candidates, open_prefix
from axpo.questions import Question
from axpo.tools.base import SystemFault, Toolbox
from axpo.tools.zoom import make_zoom
from axpo.tree import Kind, RolloutTree, StopReason, ToolUse

THOUGHT = "I look.\n</think>\n\n"


def call(name: str = "image_zoom_in_tool", **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


ZOOM = call(bbox_2d=[0, 0, 500, 500], label="corner", img_idx=0)
ANSWER = "I see.\n</think>\n\n<answer>7</answer>"


class Script:
    """An engine that answers each rollout's requests with the next of its texts; `<cut>` ends without a stop."""

    def __init__(self, chat: Chat, texts: Sequence[Sequence[str]]) -> None:
        self.chat = chat
        self.texts = [list(t) for t in texts]
        self.requests: list[Request] = []
        self.open: set[RolloutKey] = set()

    def rollout(self, key: RolloutKey) -> AbstractContextManager[None]:
        return nullcontext()

    def sleep(self) -> None: ...

    def update_weights(self) -> None: ...

    async def settle(self, key: RolloutKey) -> None: ...

    async def generate(self, request: Request) -> Generation:
        self.requests.append(request)
        text = self.texts[request.rollout.index].pop(0)
        cut = text.endswith("<cut>")
        ids = self.chat.turn(text.removesuffix("<cut>"))
        ids = ids[:-1] if cut else ids
        return Generation(ids, [-0.5] * len(ids), Finish.LENGTH if cut else Finish.STOP)


@pytest.fixture(scope="module")
def question() -> Question:
    pixels = np.zeros((128, 128, 3), dtype=np.uint8)
    file = io.BytesIO()
    PilImage.fromarray(pixels).save(file, "PNG")
    content = [{"type": "image"}, {"type": "text", "text": "Which digit?"}]
    return Question("q", [{"role": "user", "content": content}], (file.getvalue(),), "7")


def broken() -> str:
    """Is always down."""
    raise SystemFault("the provider is down")


@pytest.fixture
def play(chat: Chat, question: Question) -> Callable[..., tuple[RolloutTree, Script, Agent]]:
    def run(*texts: Sequence[str], **limits: int) -> tuple[RolloutTree, Script, Agent]:
        script = Script(chat, texts)
        agent = Agent(script, chat, Toolbox([make_zoom(64 * 64), broken]), Sampling(max_tokens=500), Limits(**limits))
        tree = agent.new_tree(question)
        asyncio.run(agent.draw((tree, question), tree.root, range(len(texts)), (0,)))
        return tree, script, agent

    return run


def test_call_observation_answer(play: Callable, chat: Chat) -> None:
    tree, script, _ = play([THOUGHT + ZOOM, ANSWER])
    (leaf,) = tree.leaves()
    turn, seen, last = leaf.path()[1:]
    assert [s.kind for s in (turn, seen, last)] == [Kind.POLICY, Kind.OBSERVATION, Kind.POLICY]
    assert turn.ids.tolist() == chat.turn(THOUGHT + ZOOM)
    assert len(seen.images) == 1
    assert "<tool_response>" in chat.tokenizer.decode(seen.ids)
    assert leaf.outcome is not None
    assert (leaf.outcome.stop, leaf.outcome.reward, leaf.outcome.answer) == (StopReason.ANSWER, 1.0, "7")
    # The second request holds exactly the tokens of the first, its answer and the observation.
    first, second = script.requests
    assert list(second.ids) == [*first.ids, *turn.ids.tolist(), *seen.ids.tolist()]
    assert len(second.images) == 2


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("<tool_call>\n{nonsense\n</tool_call>", "not valid JSON"),
        ("<tool_call>\n{}", "the call has these keys: none"),
        (call("teleport", to="Mars"), "there is no tool 'teleport'"),
        (call(bbox_2d=[0, 0, 500, 500], label="corner"), "missing argument 'img_idx'"),
        (call(bbox_2d=[1200, 0, 1400, 500], label="out", img_idx=0), "outside"),
        (call(bbox_2d=[float("nan"), 0, 10, 10], label="nan", img_idx=0), "finite"),
        (call(bbox_2d=[0, 0, 500, 500], label="corner", img_idx=5), "img_idx 5"),
    ],
)
def test_the_policys_faults_become_observations(play: Callable, chat: Chat, written: str, said: str) -> None:
    tree, _, _ = play([THOUGHT + written, ANSWER])
    (leaf,) = tree.leaves()
    observation = leaf.path()[2]
    assert said in chat.tokenizer.decode(observation.ids)
    assert leaf.outcome is not None
    assert leaf.outcome.reward == 1.0
    assert leaf.uses_tool


def test_a_system_fault_makes_the_rollout_void(play: Callable) -> None:
    tree, _, _ = play([THOUGHT + call("broken")], [ANSWER])
    void, fine = (leaf.outcome for leaf in tree.leaves())
    assert void is not None
    assert fine is not None
    assert void.stop is StopReason.VOID
    assert void.void
    assert "the provider is down" in void.decided_by
    assert fine.reward == 1.0


@pytest.mark.parametrize(
    ("written", "use"),
    [
        (ZOOM, ToolUse("image_zoom_in_tool")),
        ("<tool_call>\n{nonsense\n</tool_call>", ToolUse("", "malformed")),
        (call("teleport", to="Mars"), ToolUse("", "unknown_tool")),
        (call(bbox_2d=[0, 0, 500, 500], label="corner"), ToolUse("image_zoom_in_tool", "bad_arguments")),
    ],
)
def test_an_observation_says_which_calls_it_answers(play: Callable, written: str, use: ToolUse) -> None:
    tree, _, _ = play([THOUGHT + written, ANSWER])
    assert [segment.uses for segment in tree.segments()] == [(), (), (use,), ()]
    tree, _, _ = play([THOUGHT + ZOOM + written, ANSWER])
    assert tree.leaves()[0].path()[2].uses == (ToolUse("image_zoom_in_tool"), use)


def test_calls_without_an_observation_stand_in_the_outcome(play: Callable) -> None:
    tree, _, _ = play([THOUGHT + ZOOM + call("broken") + ZOOM], [THOUGHT + ZOOM, ANSWER])
    outcomes = [leaf.outcome for leaf in tree.leaves()]
    zoom = ToolUse("image_zoom_in_tool")
    assert [outcome.uses for outcome in outcomes if outcome] == [(zoom, ToolUse("broken", "system")), ()]
    tree, _, _ = play([THOUGHT + ZOOM], images=1)
    assert [leaf.outcome.uses for leaf in tree.leaves() if leaf.outcome] == [(zoom,)]
    tree, _, _ = play([THOUGHT + ZOOM], turns=0)  # a call that is not run is no use
    assert [leaf.outcome.uses for leaf in tree.leaves() if leaf.outcome] == [()]


def test_a_call_in_the_last_turn_is_not_run(play: Callable) -> None:
    tree, script, _ = play([THOUGHT + ZOOM] * 3, turns=2)
    (leaf,) = tree.leaves()
    assert len(script.requests) == 3
    assert leaf.outcome is not None
    assert (leaf.outcome.stop, leaf.outcome.reward) == (StopReason.TURNS, 0.0)
    assert sum(s.kind is Kind.OBSERVATION for s in leaf.path()) == 2


def test_a_turn_that_is_cut_scores_nothing(play: Callable) -> None:
    tree, _, _ = play([ANSWER + "<cut>"])
    (leaf,) = tree.leaves()
    assert leaf.outcome is not None
    assert (leaf.outcome.stop, leaf.outcome.reward) == (StopReason.TOKENS, 0.0)


def test_the_image_limit_leaves_the_whole_observation_out(play: Callable) -> None:
    tree, _, _ = play([THOUGHT + ZOOM], images=1)
    (leaf,) = tree.leaves()
    assert leaf.kind is Kind.POLICY
    assert leaf.outcome is not None
    assert leaf.outcome.stop is StopReason.IMAGES


def test_the_context_limit_leaves_the_whole_observation_out(play: Callable) -> None:
    tree, _, _ = play([THOUGHT + ZOOM, ANSWER])
    room = sum(len(s) for s in tree.leaves()[0].path()[:3])
    tree, _, _ = play([THOUGHT + ZOOM], context=room)
    (leaf,) = tree.leaves()
    assert leaf.kind is Kind.POLICY
    assert leaf.outcome is not None
    assert leaf.outcome.stop is StopReason.TOKENS


def test_a_turn_is_never_asked_for_more_than_the_context_holds(play: Callable) -> None:
    tree, script, _ = play([ANSWER])
    prompt = len(tree.root)
    tree, script, _ = play([ANSWER], context=prompt + 9)
    assert script.requests[0].sampling.max_tokens == 9


def test_a_call_inside_the_thinking_is_none(play: Callable) -> None:
    tree, _, _ = play(["I could write " + ZOOM + " but no.\n</think>\n\n<answer>7</answer>"])
    (leaf,) = tree.leaves()
    assert not leaf.uses_tool
    assert leaf.outcome is not None
    assert leaf.outcome.reward == 1.0


def test_two_calls_in_a_turn_are_one_observation(play: Callable, chat: Chat) -> None:
    tree, _, _ = play([THOUGHT + ZOOM + "\n" + ZOOM, ANSWER])
    (leaf,) = tree.leaves()
    seen = leaf.path()[2]
    assert len(seen.images) == 2
    assert chat.tokenizer.decode(seen.ids).count("<|im_start|>user") == 1


def test_resampling_continues_the_frozen_turn(play: Callable, chat: Chat, question: Question) -> None:
    tree, script, agent = play([THOUGHT + ZOOM, "No.\n</think>\n\n<answer>3</answer>"])
    (candidate,) = candidates(tree)
    prefix = open_prefix(tree, candidate)
    assert chat.tokenizer.decode(prefix.ids).endswith("<tool_call>")
    rest = ZOOM.removeprefix("<tool_call>").replace("500, 500", "900, 900")
    script.texts = [[], [rest, ANSWER], ["\n{broken", ANSWER]]
    asyncio.run(agent.draw((tree, question), prefix, range(1, 3), (0, 1), resampling=1))
    assert [child.resampled for child in prefix.children] == [0, 1, 1]
    good, bad = tree.continuations(prefix)
    assert good.outcome is not None
    assert good.outcome.reward == 1.0
    assert len(good.path()[-2].images) == 1  # the resampled call was read together with its frozen tag, and run
    assert "not valid JSON" in chat.tokenizer.decode(bad.path()[-2].ids)
    request = next(r for r in script.requests if r.rollout.index == 1)
    assert list(request.ids) == [int(i) for s in prefix.path() for i in s.ids]
    assert request.sampling.max_tokens == 500 - len(prefix)


def test_siblings_stand_in_order_of_their_keys(chat: Chat, question: Question) -> None:
    class Uneven(Script):
        async def generate(self, request: Request) -> Generation:
            await asyncio.sleep(0.01 * (5 - request.rollout.index))
            return await super().generate(request)

    texts = [[f"It is {i}.\n</think>\n\n<answer>{i}</answer>"] for i in range(5)]
    agent = Agent(Uneven(chat, texts), chat, Toolbox([]), Sampling(), Limits())
    tree = agent.new_tree(question)
    asyncio.run(agent.draw((tree, question), tree.root, range(5), (0,)))
    assert [leaf.outcome.answer for leaf in tree.leaves() if leaf.outcome] == ["0", "1", "2", "3", "4"]


def test_every_generation_has_a_seed_of_its_own(play: Callable) -> None:
    _, script, _ = play([THOUGHT + ZOOM, ANSWER], [THOUGHT + ZOOM, ANSWER])
    assert len({request.seed for request in script.requests}) == 4


def test_a_prompt_that_cannot_be_rendered_names_the_question(chat: Chat) -> None:
    question = Question("q-17", [{"role": "user", "content": "?"}], (b"no image",), "7")
    agent = Agent(Script(chat, []), chat, Toolbox([]), Sampling(), Limits())
    with pytest.raises(ChatError, match="question q-17"):
        agent.new_tree(question)


def test_an_undecided_answer_is_void(chat: Chat) -> None:
    question = Question("q", [{"role": "user", "content": "?"}], (), "")
    agent = Agent(Script(chat, [[ANSWER]]), chat, Toolbox([]), Sampling(), Limits())
    tree = agent.new_tree(question)
    asyncio.run(agent.draw((tree, question), tree.root, range(1), (0,)))
    (leaf,) = tree.leaves()
    assert leaf.outcome is not None
    assert leaf.outcome.void


def test_a_question_that_cannot_be_asked_is_left_out_and_named(
    chat: Chat, question: Question, caplog: pytest.LogCaptureFixture
) -> None:
    thin = io.BytesIO()
    PilImage.new("RGB", (2010, 10)).save(thin, "PNG")
    odd = replace(question, id="q-odd", images=(thin.getvalue(),))
    long = Question("q-long", [{"role": "user", "content": "word " * 300}], (), "7")
    agent = Agent(Script(chat, []), chat, Toolbox([]), Sampling(), Limits(context=200))
    groups = agent.new_groups([odd, question, long])
    assert [kept.id for _, kept in groups] == ["q"]
    assert "question q-odd" in caplog.text
    assert "question q-long: its prompt takes" in caplog.text


def test_one_question_may_be_asked_twice_at_once(chat: Chat, question: Question) -> None:
    class Counting(Script):
        def rollout(self, key: RolloutKey) -> AbstractContextManager[None]:
            assert key not in self.open
            self.open.add(key)
            return nullcontext()

    agent = Agent(Counting(chat, [[ANSWER, ANSWER]]), chat, Toolbox([]), Sampling(), Limits())

    async def both() -> None:
        groups = agent.new_groups([question, question])
        await asyncio.gather(*(agent.draw(g, g[0].root, range(1), (0, i)) for i, g in enumerate(groups)))

    asyncio.run(both())
