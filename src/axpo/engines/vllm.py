"""vLLM in the process that trains, on its device, with weights of its own that the trainer's replace after each update.

It steps in a thread: meanwhile tools run, rollouts end and begin, and what they ask joins the next step. Which requests
are computed together depends on how long the tools take, so a seed does not repeat a run exactly.
"""

import asyncio
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from transformers import PreTrainedModel

from axpo.chat import Chat
from axpo.engines.base import Counters, Generation, Request, RolloutKey
from axpo.engines.vllm_requests import (
    banned_ids,
    check_request,
    engine_input,
    generation,
    sampling_options,
)
from axpo.policy import policy_weights, vocabulary_size

Value = TypeVar("Value")


@dataclass(eq=False)
class _Job:
    """A request being answered."""

    name: str
    request: Request
    future: "asyncio.Future[Generation]"


class VllmEngine:
    """Implements `axpo.engines.base.Engine` over a vLLM engine in this process.

    `start` makes that engine (vllm_start.py), in the one thread in which all of vLLM runs. `sleeps` tells whether it
    can give its memory back.
    """

    def __init__(self, model: PreTrainedModel, chat: Chat, start: Callable[[], Any], sleeps: bool) -> None:
        """Raises whatever `start` raises."""
        self.counters = Counters()
        self._model = model
        self._chat = chat
        self._vocabulary = vocabulary_size(model)
        self._banned = banned_ids(chat, model)
        self._sleeps = sleeps
        self._asleep = False
        self._names = map(str, itertools.count())
        self._thread = ThreadPoolExecutor(1, "vllm")
        self._jobs: dict[str, _Job] = {}  # not answered yet
        self._asked: list[_Job] = []  # those of them that vLLM does not know yet
        self._given_up: list[str] = []  # those that it need not answer any more
        self._driver: asyncio.Task[None] | None = None
        self._engine = self._call(start)
        self.update_weights()

    # Asking

    async def generate(self, request: Request) -> Generation:
        """Continue a path. See `Engine`.

        Raises ValueError where ids, images or sampling make no sense, and whatever vLLM raises in a step.
        """
        check_request(request, self._vocabulary)
        loop = asyncio.get_running_loop()
        job = _Job(next(self._names), request, loop.create_future())
        self._run_driver(loop)
        self._jobs[job.name] = job
        self._asked.append(job)
        try:
            return await job.future
        finally:
            if self._jobs.pop(job.name, None) is not None:  # cancelled: vLLM need not go on
                self._given_up.append(job.name)

    @contextmanager
    def rollout(self, key: RolloutKey) -> Iterator[None]:
        """Nothing depends on which requests belong together."""
        yield

    async def settle(self, key: RolloutKey) -> None:
        """Returns at once. See `Engine`."""

    # Weights

    def sleep(self) -> None:
        """Give weights, keys and values back. Raises RuntimeError with requests in flight."""
        self._call(self._stop)
        if self._sleeps and not self._asleep:
            self._call(lambda: self._engine.sleep(level=2))
            self._asleep = True

    def update_weights(self) -> None:
        """Take the policy's weights, and forget what was computed with the old ones.

        Raises RuntimeError with requests in flight.
        """
        self._call(self._stop)
        self._call(self._load)
        self._asleep = False

    def _stop(self) -> None:
        self._engine.abort_request(self._given_up)
        self._given_up.clear()
        if self._jobs:
            raise RuntimeError(f"the weights cannot change while {len(self._jobs)} generations are in flight")

    def _load(self) -> None:
        if self._asleep:
            self._engine.wake_up(["weights"])
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": policy_weights(self._model)})
        self._engine.apply_model(_pack_head)
        self._engine.apply_model(_clear_features)
        if self._asleep:
            self._engine.wake_up(["kv_cache"])
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM kept keys and values of the old weights")
        self._engine.reset_encoder_cache()

    def _call(self, what: Callable[[], Value]) -> Value:
        return self._thread.submit(what).result()

    # Driving

    def _run_driver(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the driver in this loop, unless it runs. It ends when nothing is asked any more."""
        if self._driver is not None and self._driver.get_loop() is not loop:
            self._given_up += self._jobs  # of a loop that has ended without cancelling its tasks
            self._jobs.clear()
            self._asked.clear()
            self._driver = None
        if self._driver is None or self._driver.done():
            self._driver = loop.create_task(self._drive(loop))

    async def _drive(self, loop: asyncio.AbstractEventLoop) -> None:
        await asyncio.sleep(0)  # what is asked at the same time begins together
        while self._jobs:
            asked, given_up = self._asked, self._given_up
            self._asked, self._given_up = [], []
            try:
                answers = await loop.run_in_executor(self._thread, self._step, asked, given_up)
            except Exception as error:
                self._given_up += self._jobs
                for job in self._jobs.values():
                    if not job.future.done():
                        job.future.set_exception(error)
                return
            for name, answer in answers:
                if (answered := self._jobs.pop(name, None)) is not None and not answered.future.done():
                    if isinstance(answer, Exception):
                        answered.future.set_exception(answer)
                    else:
                        answered.future.set_result(answer)
            await asyncio.sleep(0)

    def _step(self, asked: list[_Job], given_up: list[str]) -> list[tuple[str, Generation | Exception]]:
        """One step of vLLM, for what is in flight and what joins it; returns what has been answered."""
        answers: list[tuple[str, Generation | Exception]] = []
        self._engine.abort_request(given_up)
        for job in asked:
            if job.name in self._jobs:
                try:
                    self._add(job)
                except ValueError as error:  # of this request alone
                    answers.append((job.name, error))
        for output in self._engine.step() if self._engine.has_unfinished_requests() else []:
            answered = self._jobs.get(output.request_id)  # a request may be given up at any time
            if output.finished and answered is not None:
                answers.append((answered.name, self._answer(output, answered.request)))
        return answers

    def _add(self, job: _Job) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        request = job.request
        options = sampling_options(request.sampling, request.seed, self._chat.stop_id, self._banned)
        rules = SamplingParams(**options, output_kind=RequestOutputKind.FINAL_ONLY)
        self._engine.add_request(job.name, engine_input(request, self._chat), rules)

    def _answer(self, output: Any, request: Request) -> Generation:
        (drawn,) = output.outputs
        ids = list(drawn.token_ids)
        logprobs = [of[i].logprob for i, of in zip(ids, drawn.logprobs, strict=True)]
        self.counters.prefilled_tokens += len(output.prompt_token_ids) - (output.num_cached_tokens or 0)
        self.counters.reused_tokens += output.num_cached_tokens or 0
        self.counters.decoded_tokens += len(ids)
        return generation(ids, logprobs, self._chat.stop_id, request.sampling)


def _clear_features(model: Any) -> None:
    """What vLLM adds to the hidden states of tokens that are no image's (DeepStack): it takes it for zeros, but sleep
    gives that memory back with the weights, and waking does not fill it."""
    for features in getattr(model, "deepstack_input_embeds", None) or []:
        features.zero_()


def _pack_head(model: Any) -> None:
    """Where there is no GPU, vLLM computes with packed copies of weights, and reloading forgets that of a head which is
    the embedding."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
