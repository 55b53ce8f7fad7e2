"""The embedded engine: the Hugging Face model itself, one token a step for everything in flight.

It shares the model object with the trainer, so new weights need no copying. What tree paths share is computed
once: N rollouts prefill their prompt once, a turn only its observation, a continuation only what follows the fork.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from axpo.chat import Chat
from axpo.engines.base import Counters, Finish, Generation, Request, RolloutKey
from axpo.engines.clock import Clock
from axpo.engines.jobs import Job, Pause, Span, batches, next_wave
from axpo.engines.kv import PathCache
from axpo.engines.pictures import Part, Pictures
from axpo.engines.sampling import entropy, sample
from axpo.policy import banned_tokens, forward_logits, vocabulary_size
from axpo.sharding import gather, scatter

logger = logging.getLogger(__name__)


class LocalEngine:
    """Implements `axpo.engines.base.Engine` over a model in this process.

    At most `max_batch` requests are in flight, the others wait in order. `overlap` is the number of decode
    steps for which the engine goes on without a rollout that runs a tool, before it waits for it. Keys and values
    take at most `kv_memory` GiB, unless one path alone takes more: over it, the paths that were used longest ago are
    dropped, and computed again when they are asked for. With `entropies` a generation tells those of its tokens.

    A run is repeated exactly, whatever time its tools take, if every rollout lies in `rollout(key)`, those
    that run together open before the first of them asks, and none waits for another inside.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        chat: Chat,
        max_batch: int = 64,
        overlap: int = 16,
        kv_memory: float = 2.0,
        entropies: bool = False,
    ) -> None:
        """Raises ValueError where `max_batch` is below 1, `overlap` below 0 or `kv_memory` not above 0."""
        if max_batch < 1 or overlap < 0:
            raise ValueError(f"max_batch is {max_batch} and overlap {overlap}: at least 1 and 0 are needed")
        if not kv_memory > 0:
            raise ValueError(f"kv_memory is {kv_memory}: it must be above 0")
        self.counters = Counters()
        self._model = model
        self._chat = chat
        self._max_batch = max_batch
        self._entropies = entropies
        self._told = False
        self._banned = banned_tokens(chat, model)
        self._cache = PathCache(int(kv_memory * 2**30 / _token_bytes(model)))
        self._pictures = Pictures(model, chat)
        self._clock: Clock[Job | Pause] = Clock(overlap)
        self._waiting: deque[Job] = deque()
        self._begun: set[RolloutKey] = set()  # open rollouts that have had an answer
        self._jobs: list[Job] = []  # in flight, in the order of the cache's rows
        self._driver: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    # Asking

    async def generate(self, request: Request) -> Generation:
        """Continue a path. See `Engine`.

        Raises ValueError where ids, images or sampling make no sense, and whatever the model raises in a step.
        """
        job = Job.of(request, self._chat, vocabulary_size(self._model))
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

    async def settle(self, key: RolloutKey) -> None:
        """Wait for the step at which this rollout is expected back. See `Engine`."""
        loop = asyncio.get_running_loop()
        pause = Pause(key, loop.create_future())
        self._run_driver(loop)
        self._clock.ask(key, pause)
        self._changed.set()
        try:
            await pause.future
        finally:
            self._clock.answered(key, pause, at_once=True)
            self._changed.set()

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

    def sleep(self) -> None:
        """Give the memory of keys, values and image features back, and that of weights which other processes hold too.

        Raises RuntimeError with requests in flight.
        """
        self._drop_cancelled()
        if self._jobs:
            raise RuntimeError(f"the engine cannot sleep while {len(self._jobs)} generations are in flight")
        self._cache.reset()
        self._pictures.reset()
        scatter(self._model)

    def update_weights(self) -> None:
        """Forget keys, values and image features of the old weights, and gather the new ones where they are shared.

        Raises RuntimeError with requests in flight.
        """
        self.sleep()
        gather(self._model)

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
                due = self._clock.take_due()
                pauses = [entry for entry in due if isinstance(entry, Pause)]
                for pause in pauses:
                    self._clock.answered(pause.key, pause, at_once=True)
                    if not pause.future.done():
                        pause.future.set_result(None)
                # Who has begun comes first: its keys and values are still here, and its tools hold resources.
                waiting = [*self._waiting, *(entry for entry in due if isinstance(entry, Job))]
                self._waiting = deque(sorted(waiting, key=lambda job: job.key not in self._begun))
                if pauses:
                    continue  # what they start now is part of the next step
                self._drop_cancelled()
                if self._jobs or self._waiting:
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
            self._clock.answered(job.key, job)
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

    @torch.inference_mode()  # what a step has made can be changed in this mode only
    def _release(self, row: int) -> None:
        self._cache.release(row)
        self._jobs[row] = self._jobs[-1]
        self._jobs.pop()

    # Computing

    @torch.inference_mode()  # an eighth faster than no_grad, so much of a step are small operations
    def _step(self) -> None:
        """One token for everything in flight."""
        self._admit()
        ids, paths, positions = (
            np.stack(parts) for parts in zip(*(job.next_input() for job in self._jobs), strict=True)
        )
        self._cache.reserve(tail_tokens=int(self._cache.tails.lengths[: len(self._jobs)].max()) + 1)
        self._cache.decode(paths, self._model.device)
        last = [part for job in self._jobs if not job.new_ids for part in job.pictures(len(job.ids) - 1, len(job.ids))]
        logits = self._forward(ids[:, None], positions.T[..., None], last, keep=1)[:, 0]
        rules = [job.request.sampling for job in self._jobs]
        uniforms = [job.uniforms[len(job.new_ids)] for job in self._jobs]
        new, logprobs, drawn_from = sample(logits, rules, uniforms, self._banned)
        if self._entropies:
            for job, value in zip(self._jobs, entropy(drawn_from).tolist(), strict=True):
                job.entropies.append(value)
        for job, new_id, logprob in zip(self._jobs, new.tolist(), logprobs.tolist(), strict=True):
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
            self._clock.answered(job.key, job)
            if self._clock.is_open(job.key):
                self._begun.add(job.key)
            if not job.future.done():
                finish = Finish.STOP if stopped else Finish.LENGTH
                job.future.set_result(
                    Generation(job.new_ids, job.logprobs, finish, job.entropies if self._entropies else None)
                )

    def _admit(self) -> None:
        """Move as many as there is room for from waiting into flight, and compute all but the last token of each.

        The last one is the first to be decoded, together with everything else in flight.
        """
        jobs = self._admissible()
        if not jobs:
            return
        try:
            self._place(jobs)
        except BaseException:
            self._waiting.extendleft(job for job in jobs if job not in self._jobs)  # nobody is left without an answer
            raise

    def _place(self, jobs: list[Job]) -> None:
        """Compute what the cache lacks of these paths, but for the last token of each."""
        old, given, computed = len(self._jobs), sum(len(job.ids) for job in jobs), self.counters.prefilled_tokens
        trunks = list({job.trunk.tobytes(): job for job in jobs}.values())
        new = [job for job in trunks if not self._cache.use_trunk(job.trunk)]
        self._cache.reserve(trunks=len(new), trunk_tokens=max((len(job.trunk) for job in new), default=0))
        while new:
            wave, new = next_wave([(j, self._cache.shared_trunk(j.trunk), len(j.trunk)) for j in new])
            first = self._cache.trunks.busy
            for job, shared, _ in wave:
                self._cache.add_trunk(job.trunk, shared)
            self._prefill(wave, first, self._cache.extend_trunks)
        self._cache.reserve(tails=len(jobs), tail_tokens=max(len(job.ids) - len(job.trunk) for job in jobs))
        while jobs:
            last = [(j, self._cache.shared_tail(j.path[:-1], j.trunk), len(j.ids) - 1) for j in jobs]
            wave, jobs = next_wave(last)
            first = self._cache.tails.busy
            for job, shared, _ in wave:
                self._cache.add_tail(job.path, job.trunk, shared)
            self._jobs += [job for job, _, _ in wave]
            self._prefill(wave, first, self._cache.extend_tails)
        self.counters.prefilled_tokens += len(self._jobs) - old
        self.counters.reused_tokens += given - (self.counters.prefilled_tokens - computed)

    def _admissible(self) -> list[Job]:
        """Those of the waiting who can be in flight beside the others until they end. One alone always can."""
        jobs: list[Job] = []
        trunks = {job.trunk.tobytes() for job in self._jobs}
        longest = max((len(job.trunk) for job in self._jobs), default=0)
        own = max((job.own_tokens for job in self._jobs), default=0)
        while self._waiting and len(self._jobs) + len(jobs) < self._max_batch:
            job = self._waiting[0]
            length = self._cache.trunk_under(job.path)
            job.trunk = job.path[:-1] if length is None else job.path[:length]
            trunks.add(job.trunk.tobytes())
            longest, own = max(longest, len(job.trunk)), max(own, job.own_tokens)
            rows = len(self._jobs) + len(jobs) + 1
            fits = self._cache.fits(trunks=len(trunks), trunk_tokens=longest, tails=rows, tail_tokens=own)
            if rows > 1 and not fits:
                self._tell_of_limit(rows - 1)
                break
            jobs.append(self._waiting.popleft())
        return jobs

    def _tell_of_limit(self, rows: int) -> None:
        if not self._told:
            logger.warning(
                "engine.kv_memory has room for only %d rollouts at once, with all the tokens that they may write "
                "(engine.max_batch is %d); the others wait",
                rows,
                self._max_batch,
            )
        self._told = True

    def _prefill(self, wave: Sequence[Span], first: int, extend: Callable[..., None]) -> None:
        """Compute the spans of a wave, which lie in rows from `first` on, shortest first."""
        counts = np.array([end - start for _, start, end in wave])
        self.counters.prefilled_tokens += int(counts.sum())
        for begin, stop in batches(counts):
            if not counts[stop - 1]:
                continue
            part, width = wave[begin:stop], int(counts[stop - 1])
            ids = np.full((len(part), width), self._chat.pad_id)
            paths = ids.copy()
            positions = np.zeros((3, len(part), width), dtype=np.int64)
            for row, (job, start, end) in enumerate(part):
                ids[row, : end - start] = job.ids[start:end]
                paths[row, : end - start] = job.path[start:end]
                positions[:, row, : end - start] = job.positions[:, start:end]
            pictures = [part for job, start, end in part for part in job.pictures(start, end)]
            extend(first + begin, paths, counts[begin:stop], self._model.device)
            self._forward(ids, positions, pictures, keep=0)

    def _forward(
        self, ids: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], pictures: Sequence[Part], keep: int
    ) -> Tensor:
        """Run new tokens (b, T) in the rows that the cache is prepared for; returns the first `keep` logits of each."""
        device = self._model.device
        return forward_logits(
            self._model,
            torch.from_numpy(ids).to(device),
            torch.from_numpy(positions.copy()).to(device),
            None,
            self._pictures.features(pictures) if pictures else None,
            keep=torch.arange(keep, device=device),
            past=self._cache,
        )


def _token_bytes(model: PreTrainedModel) -> int:
    """What the keys and values of one token take."""
    text = model.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * text.num_key_value_heads * width * model.dtype.itemsize)
