"""What tests of engines ask, and the oracle for what they are told."""

import asyncio
import io
from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch

from axpo.chat import Chat
from axpo.engines.base import Engine, Generation, Request, RolloutKey, Sampling
from axpo.policy import banned_tokens, forward_logits, policy_logprobs
from axpo.positions import mrope_positions
from axpo.tree import Image

Prompt = tuple[list[int], tuple[Image, ...]]
TOOL = {"type": "function", "function": {"name": "zoom", "description": "Look closer.", "parameters": {}}}


def noise(width: int, height: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.effect_noise((width, height), 90).convert("RGB").save(file, "PNG")
    return file.getvalue()


PICTURES = [noise(64, 96), noise(64, 96), noise(96, 64)]


def request(prompt: Prompt, seed: int = 0, question: str = "q", index: int = 0, **sampling: Any) -> Request:
    return Request(*prompt, Sampling(**{"max_tokens": 12, **sampling}), seed, RolloutKey(question, index))


def answers(engine: Engine, requests: Sequence[Request]) -> list[Generation]:
    async def ask() -> list[Generation]:
        return await asyncio.gather(*(engine.generate(request) for request in requests))

    return asyncio.run(ask())


def longer(prompt: Prompt, ids: Sequence[int], images: Sequence[Image] = ()) -> Prompt:
    return [*prompt[0], *ids], (*prompt[1], *images)


@torch.no_grad()
def fresh_rows(model: Any, chat: Chat, request: Request, ids: Sequence[int]) -> torch.Tensor:
    """The oracle: one full forward of the whole path. The policy's log-probs (n, V) where each id was drawn."""
    whole, prompt = [*request.ids, *ids], len(request.ids)
    positions, _ = mrope_positions(whole, request.images, chat.image_token_id or -1, chat.merge_size)
    mask = torch.ones(1, 1, len(whole), len(whole), dtype=torch.bool).tril()
    images = chat.pixels(request.images) if request.images else None
    logits = forward_logits(model, torch.tensor([whole]), torch.from_numpy(positions)[:, None], mask, images)
    return policy_logprobs(logits[0, prompt - 1 : -1], banned_tokens(chat, model), request.sampling.temperature or 1.0)


def fresh_logprobs(model: Any, chat: Chat, request: Request, ids: Sequence[int]) -> list[float]:
    """The same, then the sampling rules row by row, in plain Python: the log-prob of each id."""
    rules = request.sampling
    result = []
    for row, drawn in zip(fresh_rows(model, chat, request, ids).exp().tolist(), ids, strict=True):
        ranked = sorted(range(len(row)), key=lambda i: -row[i])[: rules.top_k or None]
        mass, kept = 0.0, []
        for i in ranked:
            if mass >= rules.top_p * sum(row[j] for j in ranked):
                break
            kept.append(i)
            mass += row[i]
        result.append(torch.tensor(row[drawn] / mass if drawn in kept else 0.0).log().item())
    return result
