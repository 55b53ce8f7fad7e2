"""When a request joins the batch, decided by counting decode steps and never by the time of day.

Rounding depends on which rows are computed together, so a run can only be repeated if the batches can. Tools
run in real time, and a fast and a slow run of the same tool must lead to the same batches.
"""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from axpo.engines.base import RolloutKey

Entry = TypeVar("Entry")  # what waits: a request, or a pause


@dataclass
class _Rollout(Generic[Entry]):
    """An open rollout. It is *away* while it asks nothing; then it is expected back by step `deadline`."""

    deadline: int
    asking: set[Entry] = field(default_factory=set)


class Clock(Generic[Entry]):
    """A rollout that got an answer at step s is expected back by s + overlap: with its next request, or ended.

    One that comes back early is held until exactly that step; for one that is late the engine waits. A rollout
    that has opened is expected at once. A request of no open rollout is due at once, and makes no promise.
    """

    def __init__(self, overlap: int) -> None:
        self.step = 0
        self._overlap = overlap
        self._open: dict[RolloutKey, _Rollout[Entry]] = {}
        self._asked = 0
        self._held: list[tuple[int, RolloutKey, int, Entry]] = []

    def open(self, key: RolloutKey) -> None:
        """Raises ValueError where a rollout of this key is open."""
        if key in self._open:
            raise ValueError(f"{key} is open already: every rollout that runs needs a key of its own")
        self._open[key] = _Rollout(self.step)

    def is_open(self, key: RolloutKey) -> bool:
        return key in self._open

    def close(self, key: RolloutKey) -> None:
        del self._open[key]

    def ask(self, key: RolloutKey, job: Entry) -> None:
        """A request has come: it is due at its rollout's deadline."""
        rollout = self._open.get(key)
        due = self.step
        if rollout is not None:
            due = max(due, rollout.deadline)
            rollout.asking.add(job)
        self._held.append((due, key, self._asked, job))
        self._asked += 1

    def answered(self, key: RolloutKey, job: Entry, at_once: bool = False) -> None:
        """A request has been answered, or given up: its rollout is away from now on, or expected back at once."""
        self._held = [held for held in self._held if held[3] is not job]
        rollout = self._open.get(key)
        if rollout is not None and job in rollout.asking:
            rollout.asking.remove(job)
            rollout.deadline = self.step + (0 if at_once else self._overlap)

    def asking(self) -> list[Entry]:
        """All requests that are not taken yet."""
        return [held[3] for held in self._held]

    def late(self) -> bool:
        """Whether a rollout is away past its deadline: the engine must not step before it is back."""
        return any(not rollout.asking and rollout.deadline <= self.step for rollout in self._open.values())

    def take_due(self) -> list[Entry]:
        """The requests that are due, in the order of their rollouts."""
        due = sorted(held[:3] for held in self._held if held[0] <= self.step)
        jobs = {held[2]: held[3] for held in self._held}
        self._held = [held for held in self._held if held[0] > self.step]
        return [jobs[asked] for _, _, asked in sorted(due, key=lambda entry: entry[1:])]

    def jump(self) -> bool:
        """With nothing to compute, go on to the next deadline. False where nothing is expected any more."""
        expected = [rollout.deadline for rollout in self._open.values() if not rollout.asking]
        expected += [held[0] for held in self._held]
        self.step = max(self.step, min(expected, default=self.step))
        return bool(expected)
