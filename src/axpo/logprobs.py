"""The log-probs of the trained tokens, without ever holding the logits of all of them.

A packed forward trains thousands of tokens, and a vocabulary has 150,000: the logits alone would not fit. They are
computed a few rows at a time, and computed again for the backward pass.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from axpo.policy import policy_logprobs

ROWS = 512  # whose logits are held at once: enough to keep a matrix product busy


def target_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, banned: Tensor, temperature: float) -> Tensor:
    """The log-prob (n,) of each target under the policy's distribution (`policy_logprobs`).

    `hidden` (n, H) are the states before the output head, `weight` (V, H) is the head's, `targets` (n,) are token ids.
    Differentiable once, in `hidden` and `weight`. Under autocast the logits are in its dtype.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):  # which does not reach into the backward pass below
        hidden, weight = (x.to(torch.get_autocast_dtype(kind)) for x in (hidden, weight))
    result: Tensor = _TargetLogprobs.apply(hidden, weight, targets, banned, temperature)  # type: ignore[no-untyped-call]
    return result


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, banned: Tensor, temperature: float
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets, banned)
        ctx.temperature = temperature
        chosen = []
        for start in range(0, max(1, len(hidden)), ROWS):
            rows = slice(start, start + ROWS)
            given = targets[rows, None]  # nothing but what is gathered outlives its chunk
            chosen.append(policy_logprobs(linear(hidden[rows], weight), banned, temperature).gather(1, given)[:, 0])
        return torch.cat(chosen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden, weight, targets, banned = ctx.saved_tensors
        moved = torch.empty_like(hidden)
        # The chunks' shares are added in float32 at least: bfloat16 would lose the small ones.
        turned = None
        if ctx.needs_input_grad[1]:
            turned = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for start in range(0, len(hidden), ROWS):
            rows = slice(start, start + ROWS)
            states, ids, slope = hidden[rows], targets[rows, None], grad[rows, None]
            # d log p(target) / d logits = (1 at the target - p) / temperature
            change = policy_logprobs(linear(states, weight), banned, ctx.temperature).exp_().mul_(-slope)
            change = change.scatter_add_(1, ids, slope).div_(ctx.temperature).to(weight.dtype)
            torch.mm(change, weight, out=moved[rows])
            if turned is not None:
                turned += change.T @ states
            del change  # before the next chunk is made
        return moved, None if turned is None else turned.to(weight.dtype), None, None, None
