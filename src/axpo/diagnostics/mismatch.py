"""How far the policy that sampled is from the one that is trained: the same weights, computed by two programs.

An engine of its own, other kernels or another precision give a token another log-prob than the trainer does, and what
was sampled "on-policy" is then off-policy (Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL
Training", 2025).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from axpo.loss import kl_k3


@dataclass(frozen=True)
class Mismatch:
    """Sums over tokens, to be added over packs and processes (`largest` is a maximum)."""

    tokens: int = 0
    absolute: float = 0.0
    divergence: float = 0.0
    largest: float = 0.0

    @staticmethod
    def of(sampling: Tensor, training: Tensor) -> "Mismatch":
        """Of tokens (n,): their log-probs when they were sampled, and those of the trainer at the same weights.

        Tokens whose log-prob of sampling is NaN, which were not sampled after their path, are left out.
        """
        sampling, training = (logprobs.detach().cpu().double() for logprobs in (sampling, training))
        known = ~sampling.isnan()
        if not known.any():
            return Mismatch()
        sampling, training = sampling[known], training[known]
        absolute = (training - sampling).abs()
        # The tokens were drawn from the sampling distribution, so k3 estimates KL(sampling ‖ training).
        divergence = kl_k3(sampling, training)
        return Mismatch(len(absolute), absolute.sum().item(), divergence.sum().item(), absolute.max().item())

    def __add__(self, other: "Mismatch") -> "Mismatch":
        return Mismatch(
            self.tokens + other.tokens,
            self.absolute + other.absolute,
            self.divergence + other.divergence,
            max(self.largest, other.largest),
        )

    def figures(self) -> Mapping[str, float | None]:
        """What a step tells, in nats: the mean and the greatest |Δ|, Δ being log π_training − log π_sampling, and the
        estimate of KL(π_sampling ‖ π_training) a token. None where no token is known.

        Both are of the distribution at the sampling temperature without banned tokens. With top_p below 1 or top_k
        above 0 the engine's is cut and scaled up besides, so that the figures hold −log of the mass that was kept too:
        what is trained is the whole distribution, and that difference is one between the two policies.
        """
        if not self.tokens:
            return {"mismatch_mean": None, "mismatch_max": None, "mismatch_kl": None}
        return {
            "mismatch_mean": self.absolute / self.tokens,
            "mismatch_max": self.largest,
            "mismatch_kl": self.divergence / self.tokens,
        }
