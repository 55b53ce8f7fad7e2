"""Whether an engine computes with the policy's weights: log-probs of a few tokens, beside a forward of the policy."""

import numpy as np
import PIL.Image
import torch
from transformers import PreTrainedModel

from axpo.chat import Chat
from axpo.engines.base import Generation, Request, RolloutKey, Sampling
from axpo.policy import banned_tokens, forward_logits, policy_logprobs
from axpo.positions import mrope_positions
from axpo.tools.base import encode_png

PROBE_TOKENS = 16
TOLERANCE = 0.1  # nats: bfloat16 differs by hundredths, other weights by whole ones


def probe(chat: Chat) -> Request:
    """A question with a picture, where the model sees any, of which only log-probs matter."""
    text = {"type": "text", "text": "What is in the picture?"}
    if chat.image_token_id is None:
        ids, images = chat.prompt([{"role": "user", "content": [text]}], [], [])
    else:
        noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
        picture = encode_png(PIL.Image.fromarray(noise))
        ids, images = chat.prompt([{"role": "user", "content": [{"type": "image"}, text]}], [picture], [])
    return Request(ids, images, Sampling(max_tokens=PROBE_TOKENS), 0, RolloutKey("probe", 0))


@torch.no_grad()
def mean_difference(model: PreTrainedModel, chat: Chat, request: Request, answer: Generation) -> float:
    """The mean absolute difference, in nats, of the answer's log-probs and those of a fresh forward of the policy."""
    whole = [*map(int, request.ids), *answer.ids]
    placeholder = -1 if chat.image_token_id is None else chat.image_token_id
    positions, _ = mrope_positions(whole, request.images, placeholder, chat.merge_size)
    device = model.device
    ids = torch.tensor([whole], device=device)
    mask = torch.ones(1, 1, len(whole), len(whole), dtype=torch.bool, device=device).tril()
    keep = torch.arange(len(request.ids) - 1, len(whole) - 1, device=device)
    images = chat.pixels(request.images) if request.images else None
    logits = forward_logits(model, ids, torch.from_numpy(positions).to(device)[:, None], mask, images, keep)
    logprobs = policy_logprobs(logits[0], banned_tokens(chat, model), request.sampling.temperature)
    own = logprobs.gather(-1, ids[0, len(request.ids) :, None])[:, 0].cpu()
    return float((own - torch.tensor(answer.logprobs)).abs().mean())
