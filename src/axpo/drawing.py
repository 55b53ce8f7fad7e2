"""The rollouts of one training step while they are drawn: what a method may ask for."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from axpo.questions import Question
from axpo.tree import RolloutTree, Segment

if TYPE_CHECKING:
    from axpo.agent import Agent, Group
    from axpo.parallel import Ranks


class Drawing:
    """Draws rollouts of some questions until nothing more is asked for.

    A method asks at first, and from callbacks that are called when what it asked for is scored; a run is then repeated
    exactly, whatever time tools and scoring take. `size` is N. `kept` is what an adaptive budget has left over, in
    rollouts: from the step before, and afterwards for the next.

    Over several processes each draws its `own` groups, with the numbers and the seeds that they would have on one; of
    the other groups it has the prompts only.
    """

    def __init__(
        self,
        agent: "Agent",
        questions: Sequence[Question],
        size: int,
        seed: Sequence[int],
        spare: Sequence[Question] = (),
        kept: int = 0,
        ranks: "Ranks | None" = None,
    ) -> None:
        """`spare` questions replace groups that teach nothing, where the method asks for them. `ranks` draw together;
        none: this process alone."""
        self.agent = agent
        self.groups: list[Group] = agent.new_groups(questions)
        self.alone = ranks is None or ranks.size == 1
        self.own = [*range(len(self.groups))] if ranks is None else [*ranks.share(len(self.groups))]
        self.size = size
        self.kept = kept
        self._seed = seed
        self._spare = list(spare)
        self._keys = [0] * len(self.groups)
        self._running: list[asyncio.Future[list[None]]] = []
        self._ranks = ranks
        self._meetings: list[tuple[Callable[[], Any], Callable[[list[Any]], None]]] = []

    @property
    def trees(self) -> list[RolloutTree]:
        return [tree for tree, _ in self.groups]

    @property
    def drawn(self) -> dict[int, RolloutTree]:
        """The trees of the own groups, by the groups' numbers."""
        return {group: self.groups[group][0] for group in self.own}

    def meet(self, offer: Callable[[], Any], then: Callable[[list[Any]], None]) -> None:
        """When all that runs on any process has ended, call `then` with what each process has to offer by then."""
        self._meetings.append((offer, then))

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
                self.own.append(len(self.groups) - 1)
                self._keys.append(0)
                return len(self.groups) - 1
        return None

    async def ended(self) -> None:
        """Wait until all has ended, also what callbacks have begun. An error of one ends all."""
        done = 0
        try:
            while done < len(self._running) or self._meetings:
                running = self._running[done:]
                done += len(running)
                await asyncio.gather(*running)
                if done == len(self._running) and self._meetings and self._ranks is not None:
                    offer, then = self._meetings.pop(0)
                    then(self._ranks.all(offer()))
        except BaseException:
            for begun in self._running:
                begun.cancel()
            raise
