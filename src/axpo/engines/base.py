"""The engine protocol: tokens in, tokens and their log-probs out."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Protocol

from axpo.tree import Image


class Finish(StrEnum):
    """Why a generation ended."""

    STOP = "stop"  # the policy emitted the end-of-turn token (it is the last id)
    LENGTH = "length"  # the token limit was reached


@dataclass(frozen=True)
class Sampling:
    """The sampling distribution. `top_k` 0 and `top_p` 1 leave it whole; `temperature` 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256


@dataclass(frozen=True)
class Request:
    """One generation: continue `ids` (which hold the placeholders of `images`, in order).

    `rollout` names the rollout that asks, as given to `Engine.rollout`. `seed` alone decides the random numbers.
    """

    ids: Sequence[int]
    images: Sequence[Image]
    sampling: Sampling
    seed: int
    rollout: "RolloutKey"


@dataclass(frozen=True, order=True)
class RolloutKey:
    """The identity of a rollout: it orders what happens at the same time, so that a run can be repeated.

    `place` is the question's among those rolled out together, which may hold one question twice.
    """

    question_id: str
    index: int
    place: int = 0


@dataclass(frozen=True)
class Generation:
    """New ids, the log-prob of each under the sampling distribution, and why it ended.

    `entropies` are those of the distributions that they were drawn from, in nats, where the engine was to keep them.
    """

    ids: list[int]
    logprobs: list[float]
    finish: Finish
    entropies: list[float] | None = None


@dataclass
class Counters:
    """What the engine has done with the tokens of requests, computed or taken from the cache, and how many it sampled.

    In the local engine the last token of a request is computed with the first decode step, and counts as prefilled.
    """

    prefilled_tokens: int = 0
    reused_tokens: int = 0
    decoded_tokens: int = 0

    def __add__(self, other: "Counters") -> "Counters":
        return Counters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: "Counters") -> "Counters":
        return Counters(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    @property
    def hit_rate(self) -> float | None:
        """The share of the requests' tokens that the cache held; None without any."""
        tokens = self.reused_tokens + self.prefilled_tokens
        return self.reused_tokens / tokens if tokens else None


class EngineError(RuntimeError):
    """What an engine runs on has failed: a server is gone, or has not taken the weights."""


class Engine(Protocol):
    """What rollouts need of an inference engine."""

    counters: Counters

    async def generate(self, request: Request) -> Generation: ...

    def rollout(self, key: RolloutKey) -> AbstractContextManager[Any]:
        """Surrounds one rollout, so that the engine knows that further requests of it may come."""
        ...

    async def settle(self, key: RolloutKey) -> None:
        """Return at a moment that does not depend on how long the tools and the scoring of this rollout have taken.

        What it starts then, before its next await, is part of a run that can be repeated. Engines that cannot repeat
        a run return at once.
        """
        ...

    def sleep(self) -> None:
        """Nothing is asked until the weights have changed: give back the memory that only generating needs."""
        ...

    def update_weights(self) -> None:
        """The policy's weights have changed: forget what was computed with the old ones."""
        ...
