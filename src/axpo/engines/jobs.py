"""What the local engine works on: requests, and in what order their tokens are computed."""

import asyncio
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from axpo.chat import Chat
from axpo.engines.base import Generation, Request, RolloutKey
from axpo.engines.pictures import Part
from axpo.engines.rows import Keys
from axpo.engines.sampling import check_sampling
from axpo.positions import mrope_positions
from axpo.tree import Ids, Image

_WORTH_WAITING = 16  # tokens of a prefix that justify one more forward to compute it once
_PREFILL_TOKENS = 8192  # at most so many, padding included, in one forward


def _nothing() -> Keys:
    return np.zeros(0, dtype=np.int64)


@dataclass(eq=False)
class Job:
    """A request being answered. `path` (n,) are its keys in the cache, `positions` (3, n)."""

    request: Request
    ids: Ids
    path: Keys
    runs: list[tuple[int, int]]  # where each image's placeholders begin and end
    positions: npt.NDArray[np.int64]
    following: int  # the position of the first new token
    uniforms: npt.NDArray[np.float64]
    future: asyncio.Future[Generation]
    trunk: Keys = field(default_factory=_nothing)  # the beginning of `path` that it stands on
    new_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)

    @staticmethod
    def of(request: Request, chat: Chat, vocabulary: int) -> "Job":
        """Raises ValueError where ids, images or sampling make no sense."""
        ids = np.asarray(request.ids, dtype=np.int64)
        if not len(ids):
            raise ValueError("a request needs at least one id")
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise ValueError(f"a request holds ids outside 0..{vocabulary - 1}")
        check_sampling(request.sampling)
        placeholder = -1 if chat.image_token_id is None else chat.image_token_id
        positions, following = mrope_positions(ids, request.images, placeholder, chat.merge_size)
        path, runs = ids.copy(), []
        places = iter(np.flatnonzero(ids == placeholder).tolist())
        for image in request.images:
            run = [next(places) for _ in range(image.tokens)]
            runs.append((run[0], run[-1] + 1))
            path[run] = _image_key(image)
        uniforms = np.random.Generator(np.random.Philox(request.seed)).random(request.sampling.max_tokens)
        future = asyncio.get_running_loop().create_future()
        return Job(request, ids, path, runs, positions, following, uniforms, future)

    @property
    def key(self) -> RolloutKey:
        return self.request.rollout

    @property
    def own_tokens(self) -> int:
        """How many tokens its tail may come to hold."""
        return len(self.ids) - len(self.trunk) + self.request.sampling.max_tokens

    def next_input(self) -> tuple[int, int, npt.NDArray[np.int64]]:
        """The token to feed next, its key, and its position (3,)."""
        if not self.new_ids:
            return int(self.ids[-1]), int(self.path[-1]), self.positions[:, -1]
        last = self.new_ids[-1]
        return last, last, np.full(3, self.following + len(self.new_ids) - 1)

    def pictures(self, start: int, end: int) -> list[Part]:
        """The parts of images whose placeholders lie from `start` to `end`."""
        return [
            (image, max(start, begin) - begin, min(end, stop) - begin)
            for image, (begin, stop) in zip(self.request.images, self.runs, strict=True)
            if start < stop and begin < end
        ]


@dataclass(eq=False)
class Pause:
    """A rollout that waits for its time."""

    key: RolloutKey
    future: asyncio.Future[None]


Span = tuple[Job, int, int]  # whose tokens are to be computed, from where to where


def next_wave(spans: Sequence[Span]) -> tuple[list[Span], list[Job]]:
    """Which of these spans to compute now, shortest first (equal lengths need no padding), and whose come later.

    One that shares more with a span beside it than with what is cached comes a forward later, and copies.
    """
    wave: list[Span] = []
    later: list[Job] = []
    for job, shared, end in spans:
        beside = max((min(_common(job.path, other.path), end) for other, _, _ in wave), default=0)
        if beside >= min(shared + _WORTH_WAITING, end) > shared:
            later.append(job)
        else:
            wave.append((job, shared, end))
    return sorted(wave, key=lambda span: span[2] - span[1]), later


def batches(counts: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Cut rising counts into runs whose padding, and whose size, stay small."""
    begin = 0
    for end in range(1, len(counts) + 1):
        if end == len(counts) or (
            counts[end] > 2 * counts[begin] + 16 or (end + 1 - begin) * counts[end] > _PREFILL_TOKENS
        ):
            yield begin, end
            begin = end


def _common(one: Keys, other: Keys) -> int:
    """The number of first tokens that two paths share."""
    width = min(len(one), len(other))
    different = np.flatnonzero(one[:width] != other[:width])
    return int(different[0]) if len(different) else width


def _image_key(image: Image) -> int:
    """A number below 0, which no id is, that stands for the bytes of the image."""
    return -1 - int.from_bytes(hashlib.blake2b(image.data, digest_size=7).digest(), "big")
