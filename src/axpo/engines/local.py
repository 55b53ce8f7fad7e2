"""The embedded engine: the Hugging Face model itself, one token a step for everything in flight.

It shares the model object with the trainer, so new weights need no copying. What tree paths share is computed
once: N rollouts prefill their prompt once, a turn only its observation, a continuation only what follows the fork.
"""

import asyncio
import hashlib
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from axpo.chat import Chat
from axpo.engines.base import Finish, Generation, Request, RolloutKey
from axpo.engines.clock import Clock
from axpo.engines.kv import Keys, PathCache
from axpo.engines.sampling import check_sampling, sample
from axpo.policy import ImageFeatures, banned_tokens, forward_logits, image_features, vocabulary_size
from axpo.positions import mrope_positions
from axpo.tree import Ids, Image

_WORTH_WAITING = 16  # tokens of a prefix that justify one more forward to compute it once
_PREFILL_TOKENS = 8192  # at most so many, padding included, in one forward
_CACHED_IMAGES = 256


@dataclass
class Counters:
    """What the engine has done: tokens computed in prefills, taken from the cache, and sampled."""

    prefilled_tokens: int = 0
    reused_tokens: int = 0
    decoded_tokens: int = 0


@dataclass(eq=False)
class _Job:
    """A request being answered. `path` (n,) are its keys in the cache, `positions` (3, n)."""

    request: Request
    ids: Ids
    path: Keys
    runs: list[tuple[int, int]]  # where each image's placeholders begin and end
    positions: npt.NDArray[np.int64]
    following: int  # the position of the first new token
    uniforms: npt.NDArray[np.float64]
    future: asyncio.Future[Generation]
    new_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def outside_images(self, shared: int) -> int:
        """The longest prefix of at most `shared` tokens that leaves a token to compute and splits no image."""
        shared = min(shared, len(self.ids) - 1)
        return next((begin for begin, end in self.runs if begin < shared < end), shared)


class LocalEngine:
    """Implements `axpo.engines.base.Engine` over a model in this process.

    At most `max_batch` requests are in flight, the others wait in order. `overlap` is the number of decode
    steps for which the engine goes on without a rollout that runs a tool, before it waits for it.

    A run is repeated exactly, whatever time its tools take, if every rollout lies in `rollout(key)`, those
    that run together open before the first of them asks, and none waits for another inside.
    """

    def __init__(self, model: PreTrainedModel, chat: Chat, max_batch: int = 64, overlap: int = 16) -> None:
        """Raises ValueError where `max_batch` is below 1 or `overlap` below 0."""
        if max_batch < 1 or overlap < 0:
            raise ValueError(f"max_batch is {max_batch} and overlap {overlap}: at least 1 and 0 are needed")
        self.counters = Counters()
        self._model = model
        self._chat = chat
        self._max_batch = max_batch
        self._banned = banned_tokens(chat, model)
        self._cache = PathCache(max_batch)
        self._features: OrderedDict[bytes, tuple[Tensor, list[Tensor]]] = OrderedDict()
        self._clock: Clock[_Job] = Clock(overlap)
        self._waiting: deque[_Job] = deque()
        self._begun: set[RolloutKey] = set()  # open rollouts that have had an answer
        self._jobs: list[_Job] = []  # in flight, in the order of the cache's rows
        self._driver: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    # Asking

    async def generate(self, request: Request) -> Generation:
        """Continue a path. See `Engine`.

        Raises ValueError where ids, images or sampling make no sense, and whatever the model raises in a step.
        """
        job = self._job(request)
        key = request.rollout
        self._run_driver(job.future.get_loop())
        self._clock.ask(key, job)
        self._changed.set()
        try:
            return await job.future
        except asyncio.CancelledError:
            self._clock.answered(key, job)
            self._changed.set()
            raise

    @contextmanager
    def rollout(self, key: RolloutKey) -> Iterator[None]:
        """Surrounds a rollout: between its requests the engine knows that it will be back.

        Raises ValueError where a rollout of this key is open.
        """
        self._clock.open(key)
        try:
            yield
        finally:
            self._clock.close(key)
            self._begun.discard(key)
            self._changed.set()

    def update_weights(self) -> None:
        """Forget keys, values and image features of the old weights. Raises RuntimeError with requests in flight."""
        self._drop_cancelled()
        if self._jobs:
            raise RuntimeError(f"the weights cannot change while {len(self._jobs)} generations are in flight")
        self._cache.reset()
        self._features.clear()

    def _job(self, request: Request) -> _Job:
        ids = np.asarray(request.ids, dtype=np.int64)
        if not len(ids):
            raise ValueError("a request needs at least one id")
        if ids.min() < 0 or ids.max() >= vocabulary_size(self._model):
            raise ValueError(f"a request holds ids outside 0..{vocabulary_size(self._model) - 1}")
        check_sampling(request.sampling)
        placeholder = -1 if self._chat.image_token_id is None else self._chat.image_token_id
        positions, following = mrope_positions(ids, request.images, placeholder, self._chat.merge_size)
        path, runs = ids.copy(), []
        places = iter(np.flatnonzero(ids == placeholder).tolist())
        for image in request.images:
            run = [next(places) for _ in range(image.tokens)]
            runs.append((run[0], run[-1] + 1))
            path[run] = _image_key(image)
        uniforms = np.random.Generator(np.random.Philox(request.seed)).random(request.sampling.max_tokens)
        future = asyncio.get_running_loop().create_future()
        return _Job(request, ids, path, runs, positions, following, uniforms, future)

    # Driving

    def _run_driver(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the driver in this loop, unless it runs. It ends when nothing is expected any more."""
        if self._driver is not None and self._driver.get_loop() is not loop:
            self._abandon(asyncio.CancelledError())  # that loop ended without cancelling its tasks
            self._driver = None
        if self._driver is None or self._driver.done():
            self._changed = asyncio.Event()  # an event belongs to the loop that first waits for it
            self._driver = loop.create_task(self._drive())

    async def _drive(self) -> None:
        try:
            while self._jobs or self._waiting or self._clock.jump():
                while self._clock.late():
                    self._changed.clear()
                    await self._changed.wait()
                # Who has begun comes first: its keys and values are still here, and its tools hold resources.
                waiting = [*self._waiting, *self._clock.take_due()]
                self._waiting = deque(sorted(waiting, key=lambda job: job.request.rollout not in self._begun))
                self._drop_cancelled()
                if self._jobs or self._waiting:
                    with torch.no_grad():
                        self._step()
                await asyncio.sleep(0)
        except BaseException as error:
            self._abandon(error)
            if not isinstance(error, Exception):
                raise

    def _abandon(self, error: BaseException) -> None:
        """Answer everybody who waits: with the error, or by cancelling where it is none of the model's."""
        jobs = [*self._jobs, *self._waiting, *self._clock.asking()]
        self._waiting.clear()
        if isinstance(error, asyncio.CancelledError):  # comes between two steps: what is cached stays true
            for row in reversed(range(len(self._jobs))):
                self._release(row)
        else:
            self._jobs.clear()
            self._cache.reset()
        for job in jobs:
            self._clock.answered(job.request.rollout, job)
            if job.future.get_loop().is_closed():
                continue
            if not isinstance(error, Exception):
                job.future.cancel()
            elif not job.future.done():
                job.future.set_exception(error)

    def _drop_cancelled(self) -> None:
        self._waiting = deque(job for job in self._waiting if not job.future.cancelled())
        for row in reversed(range(len(self._jobs))):
            if self._jobs[row].future.cancelled():
                self._release(row)

    def _release(self, row: int) -> None:
        self._cache.release(row)
        self._jobs[row] = self._jobs[-1]
        self._jobs.pop()

    # Computing

    def _step(self) -> None:
        """One token for everything in flight."""
        old = len(self._jobs)
        logits = self._admit()
        if old:
            logits.insert(0, self._decode(old))
        rules = [job.request.sampling for job in self._jobs]
        uniforms = [job.uniforms[len(job.new_ids)] for job in self._jobs]
        ids, logprobs = sample(torch.cat(logits), rules, uniforms, self._banned)
        for job, new_id, logprob in zip(self._jobs, ids.tolist(), logprobs.tolist(), strict=True):
            job.new_ids.append(new_id)
            job.logprobs.append(logprob)
        self._clock.step += 1
        self.counters.decoded_tokens += len(self._jobs)
        for row in reversed(range(len(self._jobs))):
            self._finish(row)

    def _finish(self, row: int) -> None:
        job = self._jobs[row]
        stopped = job.new_ids[-1] == self._chat.stop_id
        if stopped or len(job.new_ids) == job.request.sampling.max_tokens:
            self._release(row)
            self._clock.answered(job.request.rollout, job)
            if self._clock.is_open(job.request.rollout):
                self._begun.add(job.request.rollout)
            if not job.future.done():
                finish = Finish.STOP if stopped else Finish.LENGTH
                job.future.set_result(Generation(job.new_ids, job.logprobs, finish))

    def _decode(self, rows: int) -> Tensor:
        """The next logits (rows, V) of those that were in flight before this step."""
        jobs = self._jobs[:rows]
        ids = np.array([[job.new_ids[-1]] for job in jobs])
        positions = np.array([[job.following + len(job.new_ids) - 1] for job in jobs])
        return self._forward(0, ids, ids, np.broadcast_to(positions, (3, rows, 1)), np.ones(rows, np.int64), [])

    def _admit(self) -> list[Tensor]:
        """Move as many as there is room for from waiting into flight. Returns their logits, in order of rows.

        Where a path shares more with one that is admitted beside it than with what is cached, it comes one
        forward later and copies.
        """
        room = self._max_batch - len(self._jobs)
        jobs = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        logits: list[Tensor] = []
        while jobs:
            wave: list[tuple[int, _Job]] = []
            later: list[_Job] = []
            for job in jobs:
                shared = job.outside_images(self._cache.match(job.path)[1])
                beside = max((_shared(job.path, other.path) for _, other in wave), default=0)
                if job.outside_images(beside) >= shared + _WORTH_WAITING:
                    later.append(job)
                else:
                    wave.append((len(job.ids) - shared, job))
            wave.sort(key=lambda entry: entry[0])  # by what is to compute: equal lengths need no padding
            logits += self._prefill([job for _, job in wave])
            jobs = later
        return logits

    def _prefill(self, jobs: Sequence[_Job]) -> list[Tensor]:
        """Place these paths in the cache and compute what it lacks of them. Returns the logits that follow."""
        first = len(self._jobs)
        for job in jobs:
            source, shared = self._cache.match(job.path)
            self._cache.place(job.path, source, job.outside_images(shared))
        self._jobs.extend(jobs)
        starts = self._cache.lengths[first : first + len(jobs)].copy()
        counts = np.array([len(job.ids) for job in jobs]) - starts
        self.counters.reused_tokens += int(starts.sum())
        self.counters.prefilled_tokens += int(counts.sum())
        logits = []
        for begin, end in _batches(counts):
            group = list(zip(jobs[begin:end], starts[begin:end].tolist(), strict=True))
            width = int(counts[begin:end].max())
            ids = np.full((len(group), width), self._chat.pad_id)
            paths = ids.copy()
            positions = np.zeros((3, len(group), width), dtype=np.int64)
            for row, (job, start) in enumerate(group):
                new = len(job.ids) - start
                ids[row, :new] = job.ids[start:]
                paths[row, :new] = job.path[start:]
                positions[:, row, :new] = job.positions[:, start:]
            images = [
                image
                for job, start in group
                for image, (place, _) in zip(job.request.images, job.runs, strict=True)
                if place >= start
            ]
            logits.append(self._forward(first + begin, ids, paths, positions, counts[begin:end], images))
        return logits

    def _forward(
        self,
        first: int,
        ids: npt.NDArray[np.int64],
        paths: Keys,
        positions: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
        images: Sequence[Image],
    ) -> Tensor:
        """Run new tokens (b, T) of the rows from `first` on; the logits (b, V) after the last real one of each."""
        device = self._model.device
        mask = self._cache.window(first, first + len(ids), paths, counts, device)
        logits = forward_logits(
            self._model,
            torch.from_numpy(ids).to(device),
            torch.from_numpy(positions.copy()).to(device),
            mask,
            self._encoded(images) if images else None,
            keep=torch.from_numpy(counts - 1).to(device)[:, None],
            past=self._cache,
        )
        return logits[:, 0]

    def _encoded(self, images: Sequence[Image]) -> ImageFeatures:
        """The vision features of these images, each image computed once."""
        missing = list({image.data: image for image in images if image.data not in self._features}.values())
        if missing:
            new = image_features(self._model, *self._chat.pixels(missing))
            for index, image in enumerate(missing):
                layers = [layer[index].clone() for layer in new.deepstack_features]
                self._features[image.data] = (new.pooler_output[index].clone(), layers)
        for image in images:
            self._features.move_to_end(image.data)
        found = [self._features[image.data] for image in images]
        while len(self._features) > _CACHED_IMAGES:
            self._features.popitem(last=False)
        return ImageFeatures([pooled for pooled, _ in found], list(zip(*(layers for _, layers in found), strict=True)))


def _image_key(image: Image) -> int:
    """A number below 0, which no id is, that stands for the bytes of the image."""
    return -1 - int.from_bytes(hashlib.blake2b(image.data, digest_size=7).digest(), "big")


def _shared(one: Keys, other: Keys) -> int:
    """The number of first tokens that two paths share."""
    width = min(len(one), len(other))
    different = np.flatnonzero(one[:width] != other[:width])
    return int(different[0]) if len(different) else width


def _batches(counts: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Cut rising counts into runs whose padding, and whose size, stay small."""
    begin = 0
    for end in range(1, len(counts) + 1):
        if end == len(counts) or (
            counts[end] > 2 * counts[begin] + 16 or (end + 1 - begin) * counts[end] > _PREFILL_TOKENS
        ):
            yield begin, end
            begin = end
