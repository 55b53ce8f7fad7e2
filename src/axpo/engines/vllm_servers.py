"""vLLM behind HTTP: `vllm serve` instances on GPUs of their own, which are sent ids, prepared images, and new weights.

All rollouts of a question go to one server, which then computes their prompt once.
"""

import asyncio
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
from transformers import PreTrainedModel

from axpo.chat import Chat
from axpo.engines.base import Counters, EngineError, Generation, Request, RolloutKey
from axpo.engines.vllm_fingerprint import PROBE_TOKENS, TOLERANCE, mean_difference, probe
from axpo.engines.vllm_requests import (
    banned_ids,
    check_request,
    generation,
    image_hash,
    image_item,
    placeholders,
    sampling_options,
)
from axpo.engines.vllm_server_check import COMMAND, CONNECT
from axpo.engines.vllm_transfer import Transfer
from axpo.parallel import ALONE, Ranks
from axpo.policy import vocabulary_size
from axpo.sharding import gather, scatter


class VllmServers:
    """Implements `axpo.engines.base.Engine` over vLLM servers, whose weights follow those of `model`.

    All ranks ask the same servers. One of them sends the weights, which are whole on all of them meanwhile.
    """

    def __init__(self, model: PreTrainedModel, chat: Chat, urls: Sequence[str], ranks: Ranks = ALONE) -> None:
        """Raises EngineError, naming the server, where one does not take the weights or serves others."""
        self.counters = Counters()
        self._model = model
        self._chat = chat
        self._urls = [url.rstrip("/") for url in urls]
        self._vocabulary = vocabulary_size(model)
        self._banned = banned_ids(chat, model)
        self._in_flight = 0
        self._client: tuple[asyncio.AbstractEventLoop, httpx.AsyncClient] | None = None
        self._transfer = Transfer(model, self._urls)
        self._ranks = ranks
        self.update_weights()

    async def generate(self, request: Request) -> Generation:
        """Continue a path. See `Engine`.

        Raises ValueError where ids, images or sampling make no sense, EngineError where the server fails.
        """
        check_request(request, self._vocabulary)
        url = self._urls[zlib.crc32(request.rollout.question_id.encode()) % len(self._urls)]
        body = self._body(request)
        self._in_flight += 1
        try:
            response = await self._session().post(f"{url}/inference/v1/generate", json=body)
        except httpx.HTTPError as error:
            raise EngineError(f"vllm.servers: {url} failed: {type(error).__name__}: {error}") from error
        finally:
            self._in_flight -= 1
        return self._answer(url, request, response)

    @contextmanager
    def rollout(self, key: RolloutKey) -> Iterator[None]:
        """Nothing depends on which requests belong together."""
        yield

    async def settle(self, key: RolloutKey) -> None:
        """Returns at once. See `Engine`."""

    def sleep(self) -> None:
        """The servers keep their memory, which is their own. Raises RuntimeError with requests in flight."""
        if self._in_flight:
            raise RuntimeError(f"the weights cannot change while {self._in_flight} generations are in flight")

    def update_weights(self) -> None:
        """Send the policy's weights, and check that every server computes with them, up to what rounding explains.

        All ranks call it. Raises RuntimeError with requests in flight, and EngineError, naming the server, where it
        does not take them or computes other log-probs than the policy.
        """
        self.sleep()
        self._ranks.meet()  # the others have no requests in flight either
        gather(self._model)
        if self._ranks.main:
            self._transfer.send()
            self._check_weights()
        scatter(self._model)
        self._ranks.meet()

    def _check_weights(self) -> None:
        request = probe(self._chat)
        for url in self._urls:
            with httpx.Client(timeout=httpx.Timeout(None, connect=CONNECT)) as client:
                try:
                    response = client.post(f"{url}/inference/v1/generate", json=self._body(request))
                except httpx.HTTPError as error:
                    raise EngineError(f"vllm.servers: {url} failed: {type(error).__name__}: {error}") from error
            answer = self._answer(url, request, response)
            difference = mean_difference(self._model, self._chat, request, answer)
            if not difference <= TOLERANCE:
                raise EngineError(
                    f"vllm.servers: {url} serves other weights than the policy's, or computes otherwise: the log-probs "
                    f"of {PROBE_TOKENS} tokens differ by {difference:.3g} on average; it must serve the model of this "
                    f"config, started as: {COMMAND}"
                )

    def _session(self) -> httpx.AsyncClient:
        """The connections of this loop."""
        loop = asyncio.get_running_loop()
        if self._client is None or self._client[0] is not loop:
            # A server closes connections that nobody has used for 5 s; one that closes as it is used is lost.
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=2)
            timeout = httpx.Timeout(None, connect=CONNECT)
            self._client = loop, httpx.AsyncClient(limits=limits, timeout=timeout)
        return self._client[1]

    def _body(self, request: Request) -> dict[str, Any]:
        rules = sampling_options(request.sampling, request.seed, self._chat.stop_id, self._banned)
        rules["logit_bias"] = {str(i): bias for i, bias in rules["logit_bias"].items()}
        body: dict[str, Any] = {"token_ids": [int(i) for i in request.ids], "sampling_params": rules}
        if places := list(placeholders(request, self._chat)):
            from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import encode_mm_kwargs_item

            body["features"] = {
                "mm_hashes": {"image": [image_hash(place.image) for place in places]},
                "mm_placeholders": {
                    "image": [{"offset": place.start, "length": place.image.tokens} for place in places]
                },
                "kwargs_data": {
                    "image": [encode_mm_kwargs_item(image_item(place.image, self._chat)) for place in places]
                },
            }
        return body

    def _answer(self, url: str, request: Request, response: httpx.Response) -> Generation:
        if response.status_code != 200:
            raise EngineError(f"vllm.servers: {url} answers {response.status_code}: {response.text[:500]}")
        try:
            found = response.json()
            (choice,) = found["choices"]
            logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
            reused = (found["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"vllm.servers: {url} answers what vLLM does not: {response.text[:500]}") from error
        self.counters.prefilled_tokens += len(request.ids) - reused
        self.counters.reused_tokens += reused
        self.counters.decoded_tokens += len(choice["token_ids"])
        return generation(choice["token_ids"], logprobs, self._chat.stop_id, request.sampling)
