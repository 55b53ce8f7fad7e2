"""A request as vLLM takes it: ids with expanded placeholders, images that are prepared already, and sampling options.

vLLM could expand one placeholder an image and resize it by itself. It is given instead what the trainer computes with:
the same ids and the same pixels, so that neither count of tokens nor picture can differ.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from axpo.chat import Chat
from axpo.engines.base import EngineError, Finish, Generation, Request, Sampling
from axpo.engines.sampling import check_sampling
from axpo.options_size import VLLM_TEMPERATURES
from axpo.policy import banned_tokens
from axpo.tree import Image

BAN = -100.0  # vLLM's least bias on a logit: a banned token has e^-100 of its probability
MOST_BANNED = 1024  # biases that vLLM takes for one request


@dataclass(frozen=True)
class Placeholders:
    """Where the tokens of an image lie, and the image."""

    image: Image
    start: int


def banned_ids(chat: Chat, model: PreTrainedModel) -> list[int]:
    """What the policy can never write. Raises EngineError where vLLM cannot ban so many."""
    banned: list[int] = banned_tokens(chat, model).tolist()
    if len(banned) > MOST_BANNED:
        raise EngineError(
            f"model: {len(banned)} ids must be banned, most of them padding of the vocabulary; vLLM bans {MOST_BANNED}"
        )
    return banned


def check_request(request: Request, vocabulary: int) -> None:
    """Raises ValueError where ids or sampling make no sense."""
    if not len(request.ids):
        raise ValueError("a request needs at least one id")
    if min(request.ids) < 0 or max(request.ids) >= vocabulary:
        raise ValueError(f"a request holds ids outside 0..{vocabulary - 1}")
    check_sampling(request.sampling)
    least, most = VLLM_TEMPERATURES
    if (given := request.sampling.temperature) and not least <= given <= most:
        raise ValueError(f"temperature is {given}: vLLM samples at temperatures from {least} to {most:g}, and 0")


def placeholders(request: Request, chat: Chat) -> Iterator[Placeholders]:
    """Where each image of the request lies. Raises ValueError where placeholders and images do not match."""
    ids = [int(i) for i in request.ids]
    expected = sum(image.tokens for image in request.images)
    placeholder = -1 if chat.image_token_id is None else chat.image_token_id
    found = ids.count(placeholder)
    if found != expected:
        raise ValueError(f"{found} image placeholders in the ids, but the images take {expected}")
    end = 0
    for image in request.images:
        start = ids.index(placeholder, end)
        end = start + image.tokens
        if ids[start:end] != [placeholder] * image.tokens:
            raise ValueError(f"the placeholders of an image of {image.tokens} tokens do not lie side by side")
        yield Placeholders(image, start)


def image_hash(image: Image) -> str:
    """What vLLM knows an image by."""
    return hashlib.blake2b(image.data, digest_size=16).hexdigest()


def image_item(image: Image, chat: Chat) -> Any:
    """An image's patches and grid as vLLM's processor would hand them to the model."""
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems

    pixels, grids = chat.pixels([image])
    fields = {
        "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", grids.prod(-1)),
        "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
    }
    return MultiModalKwargsItems.from_hf_inputs({"pixel_values": pixels, "image_grid_thw": grids}, fields)["image"][0]


def engine_input(request: Request, chat: Chat) -> Mapping[str, Any]:
    """The request's ids and images as an engine in this process takes them."""
    from vllm.inputs.engine import mm_input, tokens_input
    from vllm.multimodal.inputs import PlaceholderRange

    ids = [int(i) for i in request.ids]
    places = list(placeholders(request, chat))
    if not places:
        return dict(tokens_input(ids))
    ranges = [PlaceholderRange(offset=place.start, length=place.image.tokens) for place in places]
    return dict(
        mm_input(
            ids,
            {"image": [image_item(place.image, chat) for place in places]},
            {"image": [image_hash(place.image) for place in places]},
            {"image": ranges},
        )
    )


def sampling_options(sampling: Sampling, seed: int, stop_id: int, banned: Sequence[int]) -> dict[str, Any]:
    """vLLM's sampling options, which JSON can hold. With `logprobs` 0 the sampled token's own come back."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_tokens,
        "seed": seed % 2**63,
        "stop_token_ids": [stop_id],
        "ignore_eos": True,  # the end of a turn is the one end, whatever the checkpoint says
        "logprobs": 0,
        "logit_bias": dict.fromkeys(banned, BAN),
        "detokenize": False,
    }


def generation(ids: Sequence[int], logprobs: Sequence[float], stop_id: int, sampling: Sampling) -> Generation:
    """What vLLM has answered. A greedy token has one possible value, so log-prob 0."""
    finish = Finish.STOP if ids and ids[-1] == stop_id else Finish.LENGTH
    return Generation(list(ids), [0.0] * len(ids) if sampling.temperature == 0 else list(logprobs), finish)
