"""The rollouts of one training step while they are drawn: what a method may ask for."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from axpo.questions import Question
from axpo.tree import RolloutTree, Segment

if TYPE_CHECKING:
    from axpo.agent import Agent, Group


class Drawing:
    """Draws rollouts of some questions until nothing more is asked for.

    A method asks at first, and from callbacks that are called when what it asked for is scored; a run is then repeated
    exactly, whatever time tools and scoring take. `size` is N. `kept` is what an adaptive budget has left over, in
    rollouts: from the step before, and afterwards for the next.
    """

    def __init__(
        self,
        agent: "Agent",
        questions: Sequence[Question],
        size: int,
        seed: Sequence[int],
        spare: Sequence[Question] = (),
        kept: int = 0,
    ) -> None:
        """`spare` questions replace groups that teach nothing, where the method asks for them."""
        self.agent = agent
        self.groups: list[Group] = agent.new_groups(questions)
        self.size = size
        self.kept = kept
        self._seed = seed
        self._spare = list(spare)
        self._keys = [0] * len(self.groups)
        self._running: list[asyncio.Future[list[None]]] = []

    @property
    def trees(self) -> list[RolloutTree]:
        return [tree for tree, _ in self.groups]

    def draw(
        self,
        group: int,
        count: int,
        start: Segment | None = None,
        resampling: int = 0,
        then: Callable[[], None] | None = None,
        instead: "Group | None" = None,
    ) -> None:
        """Begin `count` rollouts of a group from `start`, or its root; `then` is called when all are scored.

        `resampling` numbers the resamplings of a tree from 1, 0 being its own rollouts. `instead` is another tree with
        which the group's question goes on, as its rollouts do.
        """
        keys = range(self._keys[group], self._keys[group] + count)
        self._keys[group] += count
        drawn = self.groups[group] if instead is None else instead
        begun = self.agent.begin(drawn, start or drawn[0].root, keys, (*self._seed, group), resampling, then)
        self._running.append(begun)

    def replace(self) -> int | None:
        """Begin a group of a spare question and return its number; None where none is left."""
        while self._spare:
            if groups := self.agent.new_groups([self._spare.pop(0)]):
                self.groups += groups
                self._keys.append(0)
                return len(self.groups) - 1
        return None

    async def ended(self) -> None:
        """Wait until all has ended, also what callbacks have begun. An error of one ends all."""
        done = 0
        try:
            while done < len(self._running):
                running = self._running[done:]
                done += len(running)
                await asyncio.gather(*running)
        except BaseException:
            for begun in self._running:
                begun.cancel()
            raise
