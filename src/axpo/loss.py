"""The policy loss, on flat tensors over the n trained tokens of a batch (AXPO, arXiv 2605.28774, eqs. 5 and 6)."""

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["seq-mean", "token-mean"]

# exp of more overflows float32 soon; verl clamps the log-ratio there too. Beyond it the gradient is 0.
_LOG_RATIO_LIMIT = 20.0


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float = 0.2, clip_high: float = 0.4
) -> Tensor:
    """min(ρA, clip(ρ, 1−ε_low, 1+ε_high)·A) for each token, (n,): to be maximised (eq. 6, without its KL term).

    ρ is the ratio of the policy to the sampling policy; its logarithm is clamped to ±20.
    """
    ratio = (logprobs - old_logprobs).clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """The k3 estimate of KL(π‖π_ref) for each token, (n,): q − 1 − log q with q = π_ref/π, never negative.

    Source: J. Schulman, "Approximating KL Divergence", 2020. The logarithm is clamped to ±20.
    """
    log_ratio = (reference_logprobs - logprobs).clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    return torch.expm1(log_ratio) - log_ratio


def token_weights(
    stream_tokens: Tensor, rollouts: int, total_tokens: int, aggregation: Aggregation = "seq-mean"
) -> Tensor:
    """How much each trained token weighs in the loss, (n,), in the dtype of `stream_tokens` if that is floating.

    `stream_tokens` (n,) is the length of each token's own stream, `rollouts` is B·N of the whole step and
    `total_tokens` the trained tokens of the whole step. "seq-mean" is the sum of eq. 5 divided by B·N: a mean
    within each stream, and a continuation weighs as much as a rollout. "token-mean" weighs all tokens equally.
    """
    if aggregation == "seq-mean":
        return (stream_tokens * rollouts).reciprocal()
    return torch.full_like(stream_tokens, total_tokens).reciprocal()


def cispo_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float = 1.0, clip_high: float = 0.4
) -> Tensor:
    """sg(clip(ρ, 1−ε_low, 1+ε_high))·A·log π for each token, (n,): to be maximised.

    Source: MiniMax-M1, arXiv 2506.13585, eq. 4.
    The clipped ratio ρ is a weight without a gradient, so that no token's gradient is dropped.
    """
    ratio = (logprobs - old_logprobs).clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT).exp()
    return ratio.clamp(1 - clip_low, 1 + clip_high).detach() * advantages * logprobs


def importance_weights(old_logprobs: Tensor, sampling_logprobs: Tensor, cap: float) -> Tensor:
    """min(π_old/π_sampling, cap) for each token, (n,), without gradient: truncated importance sampling.

    π_old is the policy before the update as the trainer computes it, π_sampling what the engine drew from. A token
    whose log-prob of sampling is NaN was not sampled after its path and weighs 1 (or the cap, where that is less).
    Source: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025.
    """
    log_ratio = (old_logprobs - sampling_logprobs).detach().nan_to_num(nan=0.0)
    return log_ratio.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT).exp().clamp(max=cap)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    reference_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.4,
    kl: float = 1e-3,
    surrogate: Literal["clipped", "cispo"] = "clipped",
    importance: Tensor | None = None,
) -> Tensor:
    """−Σᵢ wᵢ (vᵢ·surrogateᵢ − β·KLᵢ), a scalar to be minimised (eqs. 5 and 6), β being `kl`.

    All tensors are (n,) over trained tokens; `weights` come from `token_weights`. A token whose old log-prob is NaN was
    not sampled after its path: its ratio is 1. Parts of a step add up to the whole of it. Without a reference there is
    no KL term. The `importance` v comes from `importance_weights`, without it v is 1; as in verl and TRL it does not
    weigh the KL term.
    """
    old_logprobs = torch.where(old_logprobs.isnan(), logprobs.detach(), old_logprobs)
    kind = clipped_surrogate if surrogate == "clipped" else cispo_surrogate
    objective = kind(logprobs, old_logprobs, advantages, clip_low, clip_high)
    if importance is not None:
        objective = importance * objective
    if reference_logprobs is not None:
        objective = objective - kl * kl_k3(logprobs, reference_logprobs)
    return -(weights * objective).sum()
