import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from axpo.credit import credit_axpo
from axpo.loss import clipped_surrogate, importance_weights, kl_k3, policy_loss, token_weights
from axpo.tree import Kind, Outcome, RolloutTree, StopReason


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def logs(*ratios: float) -> Tensor:
    return doubles(*ratios).log().requires_grad_()


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient"),
    [
        (1.0, 2.0, 2.0, 2.0),
        (1.3, 2.0, 2.6, 2.6),
        (1.5, 2.0, 2.8, 0.0),  # above 1.4 nothing more is to be won
        (0.5, 2.0, 1.0, 1.0),  # a good token that fell is pulled back however far it fell
        (1.0, -2.0, -2.0, -2.0),
        (0.9, -2.0, -1.8, -1.8),
        (0.7, -2.0, -1.6, 0.0),  # below 0.8 nothing more is to be won
        (3.0, -2.0, -6.0, -6.0),  # a bad token that rose is pushed down however far it rose
        (0.7, 0.0, 0.0, 0.0),
    ],
)
def test_surrogate_by_hand(ratio: float, advantage: float, value: float, gradient: float):
    """d(ρA)/d log π = ρA where it is not clipped."""
    logprobs = logs(ratio)
    surrogate = clipped_surrogate(logprobs, doubles(0.0), doubles(advantage))
    surrogate.sum().backward()
    assert surrogate.tolist() == pytest.approx([value])
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([gradient])


def test_surrogate_takes_other_clips_and_the_ratio_to_the_sampling_policy():
    surrogate = clipped_surrogate(
        doubles(-1.0, -1.0), doubles(-2.0, 0.0), doubles(1.0, -1.0), clip_low=0.5, clip_high=1.0
    )
    assert surrogate.tolist() == pytest.approx([2.0, -0.5])  # ratios e and 1/e


def test_surrogate_and_kl_stay_finite_at_any_ratio():
    far = torch.tensor([-1000.0, 0.0], requires_grad=True)
    for token in (
        clipped_surrogate(far, far.detach().flip(0), torch.tensor([1.0, -1.0])),
        kl_k3(far, far.detach().flip(0)),
    ):
        (gradient,) = torch.autograd.grad(token.sum(), far, retain_graph=True)
        assert token.isfinite().all()
        assert gradient.tolist() == [0.0, 0.0]


def test_kl_by_hand():
    """q − 1 − log q with q = π_ref/π; its derivative by log π is 1 − q."""
    logprobs = doubles(-1.0, -1.0, -1.0).requires_grad_()
    kl = kl_k3(logprobs, doubles(-1.0, -1.0 + math.log(2), -1.0 - math.log(2)))
    kl.sum().backward()
    assert kl.tolist() == pytest.approx([0.0, 1 - math.log(2), math.log(2) - 0.5])
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0.0, -1.0, 0.5])


@given(st.floats(-15, 0), st.floats(-15, 0))
def test_kl_is_never_negative(logprob: float, reference: float):
    kl = kl_k3(doubles(logprob), doubles(reference)).item()
    assert kl >= -1e-18
    assert kl == pytest.approx(math.expm1(reference - logprob) - (reference - logprob), rel=1e-9, abs=1e-15)


def test_kl_is_unbiased():
    """Under the policy the expectation of k3 is the divergence itself."""
    policy, reference = doubles(0.7, 0.2, 0.1), doubles(0.3, 0.3, 0.4)
    expected = (policy * (policy / reference).log()).sum()
    assert (policy * kl_k3(policy.log(), reference.log())).sum().item() == pytest.approx(expected.item(), rel=1e-12)


def test_weights_make_means_of_streams():
    tokens = torch.tensor([2, 2, 3, 3, 3, 1])
    weights = token_weights(tokens, rollouts=4, total_tokens=6)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx([1 / 8, 1 / 8, 1 / 12, 1 / 12, 1 / 12, 1 / 4])
    assert token_weights(tokens, 4, 6, "token-mean").tolist() == pytest.approx([1 / 6] * 6)
    assert token_weights(tokens.double(), 3, 6).tolist() == [1 / 6, 1 / 6, 1 / 9, 1 / 9, 1 / 9, 1 / 3]


def test_loss_by_hand():
    """Two tokens: ratio 1.2 with A = 1, ratio 1 with A = −2; KL at q = 2 and q = 1; β 0.1."""
    logprobs = (doubles(-1.0, -2.0) + doubles(math.log(1.2), 0.0)).requires_grad_()
    reference = logprobs.detach() + doubles(math.log(2), 0.0)
    weights = doubles(0.25, 0.5)
    loss = policy_loss(logprobs, doubles(-1.0, -2.0), reference, doubles(1.0, -2.0), weights, kl=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(-(0.25 * (1.2 - 0.1 * (1 - math.log(2))) + 0.5 * -2.0))
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-0.25 * (1.2 + 0.1), -0.5 * -2.0])


def test_loss_without_a_reference_has_no_kl():
    old, advantages, weights = doubles(-1.0, -2.0), doubles(1.0, -2.0), doubles(0.25, 0.5)
    assert policy_loss(old, old, None, advantages, weights, kl=9.0).item() == pytest.approx(0.75)
    assert policy_loss(old, old, old - 1, advantages, weights, kl=0.0).item() == pytest.approx(0.75)


def test_importance_weights_by_hand():
    """Ratios 1, 1.5, 0.5 and 3, the last of which is cut; a token that was not sampled after its path weighs 1."""
    old = doubles(0.2, 0.3, 0.1, 0.6, 0.5).log().requires_grad_()
    sampling = doubles(0.2, 0.2, 0.2, 0.2, math.nan).log()
    weights = importance_weights(old, sampling, cap=2.0)
    assert not weights.requires_grad
    assert weights.tolist() == pytest.approx([1.0, 1.5, 0.5, 2.0, 1.0])
    assert importance_weights(old, sampling, cap=0.8).tolist() == pytest.approx([0.8, 0.8, 0.5, 0.8, 0.8])
    far = importance_weights(doubles(-1000.0, 0.0), doubles(0.0, -1000.0), cap=2.0)
    assert far.tolist() == pytest.approx([math.exp(-20), 2.0])


def test_importance_weighs_the_surrogate_and_not_the_kl_term():
    """As `test_loss_by_hand`, the first token's surrogate 1.2 weighted by 0.5 and the second's −2 by 2."""
    logprobs = (doubles(-1.0, -2.0) + doubles(math.log(1.2), 0.0)).requires_grad_()
    reference = logprobs.detach() + doubles(math.log(2), 0.0)
    loss = policy_loss(
        logprobs,
        doubles(-1.0, -2.0),
        reference,
        doubles(1.0, -2.0),
        doubles(0.25, 0.5),
        kl=0.1,
        importance=doubles(0.5, 2.0),
    )
    loss.backward()
    assert loss.item() == pytest.approx(-(0.25 * (0.5 * 1.2 - 0.1 * (1 - math.log(2))) + 0.5 * 2 * -2.0))
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-0.25 * (0.5 * 1.2 + 0.1), -0.5 * 2 * -2.0])


def test_gradient_against_finite_differences():
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(12, dtype=torch.float64, generator=generator)

    old, advantages, weights = draw() - 2, draw(), draw().abs()
    logprobs = (old + 0.5 * draw()).requires_grad_()
    ratio = (logprobs - old).exp()
    assert ((ratio < 0.8) | (ratio > 1.4)).any()
    assert ((ratio - 0.8).abs().min() > 1e-3) & ((ratio - 1.4).abs().min() > 1e-3)  # not at a kink
    reference = old + 0.1 * draw()

    def loss(values: Tensor) -> Tensor:
        return policy_loss(values, old, reference, advantages, weights, kl=0.3)

    (gradient,) = torch.autograd.grad(loss(logprobs), logprobs)
    steps = 1e-6 * torch.eye(12, dtype=torch.float64)
    numeric = torch.stack([(loss(logprobs + step) - loss(logprobs - step)) / 2e-6 for step in steps])
    assert gradient.tolist() == pytest.approx(numeric.tolist(), abs=1e-8, rel=0)


def test_eq_5_of_a_credited_tree():
    """At ratio 1 a stream's term is its advantage: −(1.5 + 0 + 0 + 0 − 0.5 + 1.5 − 0.5 − 0.5) / 4, lengths aside."""
    tree = RolloutTree("q", [1])
    for length in (5, 2, 3, 4):
        rollout = tree.append(tree.root, Kind.POLICY, [2] * length, [-1.0] * length)
        rollout.outcome = Outcome(StopReason.ANSWER, 0.0)
    prefix = tree.fork(tree.root.children[0], 3)
    for length, reward in ((1, 0.0), (6, 1.0), (2, 0.0), (3, 0.0)):
        drawn = tree.append(prefix, Kind.POLICY, [3] * length, [-1.0] * length, resampled=1)
        drawn.outcome = Outcome(StopReason.ANSWER, reward)
    streams = credit_axpo(tree, epsilon=0.0)
    advantages = doubles(*[s.advantage for s in streams for _ in range(s.tokens)])
    lengths = torch.tensor([s.tokens for s in streams for _ in range(s.tokens)]).double()
    logprobs = torch.full_like(advantages, -1.0)
    total = len(advantages)
    assert total == 3 + 2 + 3 + 4 + 1 + 6 + 2 + 3
    by_sequence = policy_loss(logprobs, logprobs, logprobs, advantages, token_weights(lengths, 4, total))
    assert by_sequence.item() == pytest.approx(-1.5 / 4)
    by_token = policy_loss(logprobs, logprobs, logprobs, advantages, token_weights(lengths, 4, total, "token-mean"))
    assert by_token.item() == pytest.approx(-(3 * 1.5 + 6 * 1.5 - 6 * 0.5) / 24)
