"""What each method draws, by the real agent loop and tools; a policy that writes what a function says."""

import asyncio
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest

from axpo.agent import Agent, Limits, by_rules
from axpo.chat import Chat
from axpo.drawing import Drawing
from axpo.engines.base import Finish, Generation, Request, RolloutKey, Sampling
from axpo.methods import METHODS
from axpo.options import JudgeConfig, MethodConfig
from axpo.questions import Question
from axpo.rewards.critique import critic
from axpo.tools.base import Conversation, Toolbox
from axpo.tree import Kind, RolloutTree, Segment

THOUGHT = "I look.\n</think>\n\n"
CALL = THOUGHT + '<tool_call>\n{"name": "note", "arguments": {"text": "x"}}\n</tool_call>'
OTHER = THOUGHT + '<tool_call>\n{"name": "note", "arguments": {"text": "y"}}\n</tool_call>'
RIGHT, WRONG = THOUGHT + "<answer>7</answer>", THOUGHT + "<answer>8</answer>"

Write = Callable[[str, int, int], tuple[str, float]]  # question, key, turn -> what is written, its entropy


def note(text: str, conversation: Conversation) -> str:
    """Keep a text, and say all that was kept.

    Args:
        text: The text.
    """
    kept: list[str] = conversation.state.setdefault("notes", [])
    kept.append(text)
    return " ".join(kept)


class Policy:
    """An engine that writes whole turns; of a turn that is begun already, the rest."""

    def __init__(self, chat: Chat, write: Write) -> None:
        self.chat, self.write = chat, write
        self.requests: list[Request] = []

    def rollout(self, key: RolloutKey) -> AbstractContextManager[None]:
        return nullcontext()

    async def settle(self, key: RolloutKey) -> None: ...

    def sleep(self) -> None: ...

    def update_weights(self) -> None: ...

    async def generate(self, request: Request) -> Generation:
        self.requests.append(request)
        said = self.chat.tokenizer.decode(request.ids)
        turn = said.count("<tool_response>") + said.count("Try again")
        text, entropy = self.write(request.rollout.question_id, request.rollout.index, turn)
        begun = said.rpartition("assistant\n<think>\n")[2]
        ids = self.chat.turn(text)[len(self.chat.turn(begun)) - 1 if begun else 0 :]
        ids, finish = ids[: request.sampling.max_tokens], Finish.STOP
        if ids[-1] != self.chat.stop_id:
            finish = Finish.LENGTH
        return Generation(ids, [-0.5] * len(ids), finish, [entropy] * len(ids))


def draw(chat: Chat, write: Write, options: dict[str, Any], questions: int = 1, size: int = 4, **more: Any) -> Drawing:
    """A step of a method: its drawing, ended."""
    chosen = MethodConfig.model_validate(options)
    limits, criticise = Limits(context=more.pop("context", 16384)), critic(JudgeConfig())
    agent = Agent(Policy(chat, write), chat, Toolbox([note]), Sampling(max_tokens=200), limits, by_rules, criticise)
    asked = [Question(f"q{i}", [{"role": "user", "content": f"Question {i}?"}], (), "7") for i in range(questions)]
    drawing = Drawing(agent, asked, size, (0,), **more)

    async def run() -> None:
        METHODS[chosen.name].explore(drawing, chosen)
        await drawing.ended()

    asyncio.run(run())
    return drawing


def texts(chat: Chat, leaves: Sequence[Segment]) -> list[str]:
    """What the policy wrote in each rollout: R or W for an answer, x or y for a call."""
    found = []
    for leaf in leaves:
        said = chat.tokenizer.decode(np.concatenate([s.ids for s in leaf.path() if s.kind is Kind.POLICY]))
        parts = re.findall(r'"text": "(.)"|<answer>(.)</answer>', said)
        found.append("".join(call or {"7": "R", "8": "W"}[answer] for call, answer in parts))
    return found


def failing(question: str, key: int, turn: int) -> tuple[str, float]:
    """Rollouts 0 and 1 call in vain, 2 is right at once, 3 is wrong; continuations call otherwise and are right."""
    if turn:
        return (RIGHT, 0.5) if key >= 4 else (WRONG, 0.5)
    return (CALL if key < 2 else OTHER if key >= 4 else (RIGHT, WRONG)[key - 2]), 0.5


def test_grpo_draws_its_rollouts_and_no_more(chat: Chat) -> None:
    (tree,) = draw(chat, failing, {"name": "grpo"}).trees
    assert texts(chat, tree.leaves()) == ["xW", "xW", "R", "W"]


def test_axpo_resamples_within_its_budget(chat: Chat) -> None:
    (tree,) = draw(chat, failing, {"budget": 0.5, "continuations": 2}).trees
    assert texts(chat, tree.base_leaves()) == ["xW", "xW", "R", "W"]
    (prefix,) = [s for s in tree.segments() if any(c.resampled for c in s.children)]
    assert texts(chat, tree.continuations(prefix)) == ["yR", "yR"]
    assert chat.tokenizer.decode(prefix.ids).endswith("<tool_call>")
    (tree,) = draw(chat, failing, {"budget": 1, "continuations": 2}).trees
    assert [len(tree.resamplings(s)) for s in tree.segments() if tree.resamplings(s)] == [1, 1]


def test_without_the_prefix_fix_continuations_begin_at_the_prompt(chat: Chat) -> None:
    (tree,) = draw(chat, failing, {"budget": 1, "continuations": 2, "prefix_fix": False}).trees
    groups = {number: texts(chat, leaves) for number, leaves in tree.resamplings(tree.root).items()}
    assert groups == {1: ["yR", "yR"], 2: ["yR", "yR"]}
    assert [child.resampled for child in tree.root.children] == [0, 0, 0, 0, 1, 1, 2, 2]


def test_rollouts_without_a_tool_are_resampled_where_that_is_asked_for(chat: Chat) -> None:
    def write(question: str, key: int, turn: int) -> tuple[str, float]:
        return (RIGHT, 0.5) if key >= 4 else (WRONG, 0.5)

    options = {"budget": 0.5, "continuations": 2}
    (tree,) = draw(chat, write, options).trees
    assert len(tree.leaves()) == 4
    (tree,) = draw(chat, write, {**options, "resample_no_tool": True}).trees
    (prefix,) = [s for s in tree.segments() if any(c.resampled for c in s.children)]
    assert chat.tokenizer.decode(prefix.ids).endswith("</think>")
    assert texts(chat, tree.continuations(prefix)) == ["R", "R"]


def test_a_later_call_is_forked_with_the_state_of_its_tools(chat: Chat) -> None:
    """Two calls in vain; the fork is at the second, and the tool still knows the first."""

    def write(question: str, key: int, turn: int) -> tuple[str, float]:
        if turn == 2:
            return (RIGHT, 0.5) if key >= 4 else (WRONG, 0.5)
        return (CALL if turn == 0 or key < 4 else OTHER), 0.5

    options = {"budget": 0.5, "continuations": 2, "fork_at": "last"}
    (tree,) = draw(chat, write, options).trees
    (prefix,) = [s for s in tree.segments() if any(c.resampled for c in s.children)]
    assert texts(chat, tree.continuations(prefix)) == ["xyR", "xyR"]
    assert sum(s.kind is Kind.OBSERVATION for s in prefix.path()) == 1
    seen = [s for s in tree.continuations(prefix)[0].path() if s.kind is Kind.OBSERVATION]
    assert "x y" in chat.tokenizer.decode(seen[1].ids)


def test_every_call_may_be_forked(chat: Chat) -> None:
    def write(question: str, key: int, turn: int) -> tuple[str, float]:
        return (WRONG if turn == 2 else CALL), 0.5

    (tree,) = draw(chat, write, {"budget": 4, "continuations": 2, "fork_at": "every"}).trees
    forks = [s for s in tree.segments() if any(c.resampled for c in s.children)]
    assert len(forks) == 8  # two calls of each of four rollouts
    METHODS["axpo"].credit(tree, MethodConfig())  # two prefixes a rollout


def test_an_adaptive_budget_hands_on_what_a_collapsed_prefix_saves(chat: Chat) -> None:
    """Both continuations of a prefix make the same call: of K = 4, two are saved each time, and buy another prefix."""
    options = {"budget": 1, "continuations": 4}
    calling: Write = lambda question, key, turn: ((WRONG if turn else CALL), 0.5)  # noqa: E731
    fixed = draw(chat, calling, options)
    adaptive = draw(chat, calling, {**options, "adaptive_budget": 1.5})
    sizes = {
        name: [len(g) for tree in d.trees for s in tree.segments() for g in tree.resamplings(s).values()]
        for name, d in (("fixed", fixed), ("adaptive", adaptive))
    }
    # 4 rollouts extra: one prefix of 4. Adaptive: 4 - 4 + 2 = 2 are too few for another.
    assert sizes == {"fixed": [4], "adaptive": [2]}
    assert adaptive.kept == 2
    again = draw(chat, calling, {**options, "adaptive_budget": 1.5}, kept=adaptive.kept)
    # 2 + 4 = 6: a prefix (6 - 4 + 2 = 4), another (4 - 4 + 2 = 2).
    assert [len(g) for tree in again.trees for s in tree.segments() for g in tree.resamplings(s).values()] == [2, 2]
    none = draw(chat, calling, {**options, "adaptive_budget": 0.25}, kept=99)
    assert none.kept == 4 + 1 - 4 + 2  # of 99, a quarter of 4 was kept


def test_prefixes_that_act_differently_get_all_their_continuations(chat: Chat) -> None:
    def write(question: str, key: int, turn: int) -> tuple[str, float]:
        return (WRONG if turn else (CALL, OTHER)[key % 2]), 0.5

    drawing = draw(chat, write, {"budget": 1, "continuations": 4, "adaptive_budget": 1})
    (tree,) = drawing.trees
    assert [len(g) for s in tree.segments() for g in tree.resamplings(s).values()] == [4]
    assert drawing.kept == 0


def test_dynamic_sampling_replaces_groups_of_one_outcome(chat: Chat) -> None:
    """q0 teaches; q1 is all wrong and is replaced by s0, also all wrong, and that by s1, which teaches."""

    def write(question: str, key: int, turn: int) -> tuple[str, float]:
        return (RIGHT if question in ("q0", "s1") and key == 0 else WRONG), 0.5

    spare = [Question(f"s{i}", [{"role": "user", "content": "?"}], (), "7") for i in range(3)]
    asked = {
        limit: [
            tree.question_id
            for tree in draw(chat, write, {"name": "grpo", "dynamic_sampling": limit}, 2, spare=spare).trees
        ]
        for limit in (0, 1, 5)
    }
    assert asked == {0: ["q0", "q1"], 1: ["q0", "q1", "s0"], 5: ["q0", "q1", "s0", "s1"]}


def test_rltf_lays_second_attempts_at_the_root(chat: Chat) -> None:
    def write(question: str, key: int, turn: int) -> tuple[str, float]:
        return (RIGHT if turn else WRONG), 0.5

    drawing = draw(chat, write, {"name": "rltf"}, size=2)
    (tree,) = drawing.trees
    assert texts(chat, tree.base_leaves()) == ["W", "W"]
    assert texts(chat, tree.continuations(tree.root)) == ["R", "R"]
    second = tree.continuations(tree.root)[0]
    assert second.logprobs is not None
    assert np.isnan(second.logprobs).all()
    policy: Any = drawing.agent.engine
    told = chat.tokenizer.decode(policy.requests[-1].ids)
    assert "Your answer '8' is wrong. Try again." in told
    assert told.endswith("assistant\n<think>\n")


def test_second_attempts_that_pass_a_limit_are_left_out(chat: Chat) -> None:
    """Whether the critique passes the context, or what is written after it does."""

    def write(question: str, key: int, turn: int) -> tuple[str, float]:
        return (RIGHT if turn else WRONG), 0.5

    whole = draw(chat, write, {"name": "rltf"}, size=1)
    policy: Any = whole.agent.engine
    first, second = (len(request.ids) for request in policy.requests)
    assert len(whole.trees[0].leaves()) == 2
    for context in (second, second + 1):
        drawing = draw(chat, write, {"name": "rltf"}, size=1, context=context)
        assert texts(chat, drawing.trees[0].leaves()) == ["W"]
    assert first < second


def test_arpo_branches_after_observations_and_fills_up_from_the_prompt(chat: Chat) -> None:
    """Of 4 rollouts 2 are drawn at first. The first grows uncertain after its observation: one branches from there."""

    def write(question: str, key: int, turn: int) -> tuple[str, float]:
        return (WRONG if turn else CALL), (2.0 if turn and key == 0 else 0.5)

    (tree,) = draw(chat, write, {"name": "arpo"}).trees
    assert len(tree.base_leaves()) == 4
    shared = [s for s in tree.segments() if s.kind is Kind.OBSERVATION and len(s.children) == 2]
    assert len(shared) == 1
    assert len(tree.root.children) == 3  # the branch did not grow uncertain, so the last one began at the prompt
    (tree,) = draw(chat, write, {"name": "arpo", "arpo_weight": 0}).trees
    assert len(tree.root.children) == 4
    (tree,) = draw(chat, write, {"name": "arpo", "arpo_chance": 0.9}).trees
    assert len(tree.root.children) == 4
    (tree,) = draw(chat, write, {"name": "arpo", "arpo_rule": "code", "arpo_chance": 1}).trees
    assert len(tree.root.children) == 2  # whatever the entropies are


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_draws_credits_and_repeats_itself(chat: Chat, name: str) -> None:
    def step() -> list[RolloutTree]:
        options = MethodConfig.model_validate({"name": name, "budget": 0.5, "continuations": 2})
        trees = draw(chat, failing, options.model_dump(exclude_unset=True), 2).trees
        for tree in trees:
            METHODS[name].credit(tree, options)
        return trees

    one, other = step(), step()
    assert any(segment.credits for tree in one for segment in tree.segments())
    assert [[s.ids.tolist() for s in t.segments()] for t in one] == [
        [s.ids.tolist() for s in t.segments()] for t in other
    ]
