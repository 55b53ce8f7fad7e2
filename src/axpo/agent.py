"""One rollout's story: think, call a tool, read what it says, until the answer.

Tokens are only ever appended. A limit never cuts inside a turn: an observation is added whole or not at all.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from axpo.chat import Chat, ChatError
from axpo.engines.base import Engine, Finish, Request, RolloutKey, Sampling
from axpo.questions import Question
from axpo.rewards.verify import Verdict, verify
from axpo.tools.base import Conversation, SystemFault, Toolbox
from axpo.tree import SYSTEM_FAULT, Kind, Outcome, RolloutTree, Segment, StopReason, ToolUse

logger = logging.getLogger(__name__)

Group = tuple[RolloutTree, Question]


@dataclass(frozen=True)
class Limits:
    """`turns` may call a tool, one more is left for the answer; `context` tokens and `images` count the prompt's."""

    turns: int = 3
    context: int = 16384
    images: int = 8


def by_rules(text: str, question: Question) -> Verdict:
    """The default reward: the question's gold answer, checked by rules."""
    return verify(text, question.answer, question.options)


@dataclass(frozen=True)
class Agent:
    """What every rollout of a run shares. `score` may block: it runs in a thread, and so does `criticise`, which says
    what a second attempt is told about a first (rltf)."""

    engine: Engine
    chat: Chat
    toolbox: Toolbox
    sampling: Sampling
    limits: Limits
    score: Callable[[str, Question], Verdict] = by_rules
    criticise: Callable[[Verdict, Question], str] | None = None

    def new_tree(self, question: Question) -> RolloutTree:
        """A tree that holds the question's prompt.

        Raises ChatError, naming the question, where it cannot be rendered or passes the limits by itself.
        """
        try:
            ids, images = self.chat.prompt(question.messages, question.images, self.toolbox.schemas)
        except ChatError as error:
            raise ChatError(f"question {question.id}: {error}") from error
        if len(ids) >= self.limits.context or len(images) > self.limits.images:
            limits = f"{self.limits.context} tokens and {self.limits.images} images"
            raise ChatError(
                f"question {question.id}: its prompt takes {len(ids)} tokens and {len(images)} images of {limits}"
            )
        return RolloutTree(question.id, ids, images)

    def new_groups(self, questions: Sequence[Question]) -> list[Group]:
        """A tree for each question. One that cannot be asked is left out with a warning that names it."""
        groups = []
        for question in questions:
            try:
                groups.append((self.new_tree(question), question))
            except ChatError as error:
                logger.warning("%s; it is left out", error)
        return groups

    async def draw(self, group: Group, start: Segment, keys: range, seed: Sequence[int], resampling: int = 0) -> None:
        """Draw a rollout from `start` (the root, a forked prefix, an observation) for each key, all at once.

        A key is unique in its tree. `seed` ends with the group's place among those drawn together; `resampling` is 0
        for a rollout of the group, else what the first segments of continuations bear as `resampled`.
        """
        await self.begin(group, start, keys, seed, resampling)

    def begin(
        self,
        group: Group,
        start: Segment,
        keys: range,
        seed: Sequence[int],
        resampling: int = 0,
        then: Callable[[], None] | None = None,
    ) -> "asyncio.Future[list[None]]":
        """Begin to draw; the rollouts have ended when what it returns is done.

        Arguments as for `draw`. `then` is called when all of them are scored. What it begins joins the run in a way
        that can be repeated.
        """
        drawn: dict[int, Segment] = {}

        async def one(key: int, name: RolloutKey, opened: ExitStack) -> None:
            drawn[key] = await self._rollout(group, start, name, seed, resampling, opened if then is None else None)
            if len(drawn) == len(keys):
                # Siblings in order of their keys, not of their arrival, so that a run can be repeated.
                mine = [drawn[key] for key in keys]
                others = [child for child in start.children if child not in mine]
                start.children = sorted(others + mine, key=lambda child: child.resampled)
                if then is not None:
                    then()

        tasks = []
        for key in keys:
            name, opened = RolloutKey(group[0].question_id, key, seed[-1]), ExitStack()
            opened.enter_context(self.engine.rollout(name))
            task = asyncio.ensure_future(one(key, name, opened))
            task.add_done_callback(partial(_close, opened))
            tasks.append(task)
        return asyncio.gather(*tasks)

    async def _rollout(
        self,
        group: Group,
        start: Segment,
        key: RolloutKey,
        seed: Sequence[int],
        resampling: int,
        opened: ExitStack | None,
    ) -> Segment:
        """One rollout from `start` to its outcome; returns its first segment.

        With `opened` it closes that before it is scored, so that nobody waits for its score. Else it settles last.
        """
        tree, question = group
        segment, text = start, ""
        first: Segment | None = None
        outcome: Outcome | None = None
        async with Conversation([image.data for image in tree.root.images]) as conversation:
            fault = await self._repeat(start, conversation)
            while outcome is None:
                turn_seed = _seed(*seed, key.index, _depth(segment))
                number = resampling if segment is start else 0
                segment, text, calls, outcome = await self._turn(tree, segment, key, turn_seed, number)
                first = first or segment
                if fault is not None:
                    outcome = Outcome(StopReason.VOID, None, decided_by=fault)
                elif outcome is None:
                    segment, outcome = await self._act(tree, segment, calls, conversation)
        if opened is not None:
            opened.close()
        if outcome.stop is StopReason.ANSWER:
            outcome = await self._judge(text, question, None if resampling else self.criticise)
        segment.outcome = outcome
        if opened is None:
            await self.engine.settle(key)
        assert first is not None
        return first

    async def _turn(
        self, tree: RolloutTree, parent: Segment, key: RolloutKey, seed: int, resampling: int
    ) -> tuple[Segment, str, tuple[str, ...], Outcome | None]:
        """Generate up to the end of the turn; returns it, its answer, the calls in it, and how it ended, if it did."""
        path = parent.path()
        context = [int(i) for segment in path for i in segment.ids]
        images = [image for segment in path for image in segment.images]
        head = _open_turn(path)  # what a frozen prefix holds of this turn
        room = min(self.sampling.max_tokens - len(head), self.limits.context - len(context))
        sampling = replace(self.sampling, max_tokens=room)
        generation = await self.engine.generate(Request(context, images, sampling, seed, key))
        turn = self.chat.parse(head + generation.ids)
        spans = [span.shifted(-len(head)) for span in turn.calls if span.start >= len(head)]
        thought = None if turn.thinking_end is None else turn.thinking_end - len(head)
        segment = tree.append(
            parent,
            Kind.POLICY,
            generation.ids,
            generation.logprobs,
            calls=spans,
            resampled=resampling,
            entropies=generation.entropies,
            thought=None if thought is None or thought < 0 else thought,
        )
        outcome = None
        if generation.finish is Finish.LENGTH:
            outcome = Outcome(StopReason.TOKENS, 0.0, decided_by="token limit")
        elif not turn.calls:
            outcome = Outcome(StopReason.ANSWER)
        elif _depth(segment) >= self.limits.turns:
            outcome = Outcome(StopReason.TURNS, 0.0, decided_by="turn limit")
        return segment, turn.answer, turn.call_texts, outcome

    async def _act(
        self, tree: RolloutTree, segment: Segment, calls: Sequence[str], conversation: Conversation
    ) -> tuple[Segment, Outcome | None]:
        """Run the calls of a turn and append what they return, or say why the rollout ends here."""
        uses: list[ToolUse] = []
        try:
            results = [await self._call(text, conversation, uses) for text in calls]
            ids, images = self.chat.observation(results)
        except (SystemFault, ChatError) as fault:
            return segment, Outcome(StopReason.VOID, None, decided_by=str(fault), uses=tuple(uses))
        path = segment.path()
        if sum(len(s.images) for s in path) + len(images) > self.limits.images:
            return segment, Outcome(StopReason.IMAGES, 0.0, decided_by="image limit", uses=tuple(uses))
        if sum(map(len, path)) + len(ids) >= self.limits.context:
            return segment, Outcome(StopReason.TOKENS, 0.0, decided_by="context limit", uses=tuple(uses))
        return tree.append(segment, Kind.OBSERVATION, ids, images=images, uses=uses), None

    async def _call(self, text: str, conversation: Conversation, uses: list[ToolUse]) -> tuple[str, tuple[bytes, ...]]:
        name = self.toolbox.named(text)
        try:
            result = await self.toolbox.run(text, conversation)
        except SystemFault:
            uses.append(ToolUse(name, SYSTEM_FAULT))
            raise
        uses.append(ToolUse(name, result.fault and result.fault.value))
        conversation.images.extend(result.images)
        return result.text, result.images

    async def _judge(
        self, text: str, question: Question, criticise: Callable[[Verdict, Question], str] | None
    ) -> Outcome:
        try:
            verdict = await asyncio.to_thread(partial(self.score, text, question))
            if not verdict.decided:
                return Outcome(StopReason.VOID, None, verdict.answer, verdict.by)
            critique = "" if criticise is None else await asyncio.to_thread(partial(criticise, verdict, question))
        except RuntimeError as error:
            return Outcome(StopReason.VOID, None, decided_by=str(error))
        return Outcome(StopReason.ANSWER, verdict.score, verdict.answer, verdict.by, critique)

    # Going on from inside a rollout

    @property
    def vocabulary(self) -> int:
        """How many tokens there are to choose from."""
        return len(self.chat.tokenizer)

    async def _repeat(self, start: Segment, conversation: Conversation) -> str | None:
        """Bring the tools into the state that they had at `start`; returns the system fault that prevents it."""
        path = start.path()
        for place, segment in enumerate(path):
            if segment.kind is Kind.OBSERVATION:
                for text in self.chat.parse(_open_turn(path[:place])).call_texts:
                    try:
                        await self.toolbox.repeat(text, conversation)
                    except SystemFault as fault:
                        return str(fault)
                conversation.images.extend(image.data for image in segment.images)
        return None

    def written_after(self, start: Segment, first: Segment) -> str:
        """What the turn holds that `first` continues after `start`: its first call in canonical JSON, else its answer.

        Two continuations that act alike have it in common.
        """
        turn, head = self.chat.parse(_open_turn(first.path())), len(_open_turn(start.path()))
        texts = [text for text, call in zip(turn.call_texts, turn.calls, strict=True) if call.end > head]
        return canonical(texts[0]) if texts else turn.answer

    def after_critique(self, tree: RolloutTree, leaf: Segment) -> RolloutTree | None:
        """A tree whose prompt is a rollout that has answered, followed by its critique (rltf); None where that passes
        the limit on the context."""
        assert leaf.outcome is not None
        path = leaf.path()
        ids = [int(i) for segment in path for i in segment.ids] + self.chat.reply(leaf.outcome.critique)
        if len(ids) >= self.limits.context:
            return None
        return RolloutTree(tree.question_id, ids, [image for segment in path for image in segment.images])


def canonical(call_text: str) -> str:
    """A call so that two that say the same are equal: its JSON with sorted keys, or as it is where that is broken."""
    try:
        return json.dumps(json.loads(call_text), sort_keys=True)
    except (ValueError, RecursionError):
        return call_text


def _close(opened: ExitStack, _: "asyncio.Future[None]") -> None:
    opened.close()


def _depth(segment: Segment) -> int:
    """How many turns of the path have been answered by tools."""
    return sum(s.kind is Kind.OBSERVATION for s in segment.path())


def _open_turn(path: Sequence[Segment]) -> list[int]:
    """The policy's ids at the end of the path: the beginning of a turn that is to be continued."""
    ids: list[int] = []
    for segment in reversed(path):
        if segment.kind is not Kind.POLICY:
            break
        ids = [int(i) for i in segment.ids] + ids
    return ids


def _seed(*path: int) -> int:
    """A seed for each place in a run: near places must not share random numbers."""
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0])
