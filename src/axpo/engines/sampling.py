"""Drawing the next tokens of a batch, each row by its own rules and its own random number."""

from collections.abc import Sequence

import torch
from torch import Tensor

from axpo.engines.base import Sampling
from axpo.policy import policy_logprobs


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError, naming the field, where no distribution answers to these numbers."""
    if not sampling.temperature >= 0:
        raise ValueError(f"temperature is {sampling.temperature}: it must be 0 (greedy) or above")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p is {sampling.top_p}: it must be above 0 and at most 1")
    if sampling.top_k < 0:
        raise ValueError(f"top_k is {sampling.top_k}: it must be 0 (all tokens) or above")
    if sampling.max_tokens < 1:
        raise ValueError(f"max_tokens is {sampling.max_tokens}: it must be at least 1")


def sample(
    logits: Tensor, rules: Sequence[Sampling], uniforms: Sequence[float], banned: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token for each row: logits (b, V) to ids (b,), their log-probs (b,) in float32 or wider, and the
    log-probs (b, V) of the distributions that they were drawn from.

    A row's token is the inverse of its distribution function, in the order of the vocabulary, at the row's
    uniform number in [0, 1); it does not depend on the other rows. The log-prob is under the distribution that
    was drawn from: with temperature, banned ids left out, truncated (top-k first, then top-p of what is
    left, as in vLLM) and renormalised. A greedy row (temperature 0) has one possible token, so log-prob 0.
    """
    temperatures = torch.tensor([r.temperature or 1.0 for r in rules], device=logits.device)
    logprobs = policy_logprobs(logits, banned, temperatures[:, None])
    if any(r.top_k > 0 or r.top_p < 1 for r in rules):
        logprobs = _truncated(logprobs, rules)
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    points = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None] * total
    # Below the total even where the product rounds up, so that a token of probability 0 is never hit.
    points = torch.minimum(points, torch.nextafter(total, torch.zeros_like(total)))
    ids = torch.searchsorted(cumulative, points, right=True)
    chosen = logprobs.gather(-1, ids)
    if any(r.temperature == 0 for r in rules):
        greedy = torch.tensor([r.temperature == 0 for r in rules], device=logits.device)[:, None]
        ids = torch.where(greedy, logprobs.argmax(-1, keepdim=True), ids)
        chosen = torch.where(greedy, torch.zeros_like(chosen), chosen)
    return ids[:, 0], chosen[:, 0], logprobs


def entropy(logprobs: Tensor) -> Tensor:
    """H = −Σ p·log p of each row, in nats: (b, V) to (b,)."""
    values: Tensor = torch.special.entr(logprobs.exp()).sum(-1)
    return values


def _truncated(logprobs: Tensor, rules: Sequence[Sampling]) -> Tensor:
    """Keep the top-k, then the smallest set of those whose mass reaches top-p; renormalise. (b, V) to (b, V)."""
    vocabulary = logprobs.shape[-1]
    top_k = torch.tensor([r.top_k or vocabulary for r in rules], device=logprobs.device)[:, None]
    top_p = torch.tensor([r.top_p for r in rules], dtype=torch.float64, device=logprobs.device)[:, None]
    ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
    ranked = torch.arange(vocabulary, device=logprobs.device) < top_k
    mass = (ordered.double().exp() * ranked).cumsum(-1)
    before = mass - ordered.double().exp()
    kept_in_order = ranked & ((before < top_p * mass[:, -1:]) | (top_p == 1))
    kept = torch.zeros_like(kept_in_order).scatter(-1, order, kept_in_order)
    whole = (top_k >= vocabulary) & (top_p == 1)
    renormalised = logprobs.masked_fill(~kept, float("-inf")).log_softmax(-1)
    return torch.where(whole, logprobs, renormalised)
