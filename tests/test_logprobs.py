"""Log-probs in chunks of rows: the same numbers and gradients as from all logits at once."""

import pytest
import torch

from axpo import logprobs
from axpo.logprobs import target_logprobs
from axpo.policy import policy_logprobs

BANNED = torch.tensor([3, 9])


def make(
    rows: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 5, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(11, 5, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(4, 9, (rows,), generator=generator)
    return hidden, weight, targets, torch.randn(rows, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("rows", [1, 4, 7, 8])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_as_from_all_logits_at_once(rows: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "ROWS", 4)
    hidden, weight, targets, slope = make(rows)
    ours = target_logprobs(hidden, weight, targets, BANNED, temperature)
    whole = policy_logprobs(hidden @ weight.T, BANNED, temperature)[torch.arange(rows), targets]
    torch.testing.assert_close(ours, whole, atol=1e-12, rtol=0)
    for one, other in zip(
        torch.autograd.grad((ours * slope).sum(), [hidden, weight]),
        torch.autograd.grad((whole * slope).sum(), [hidden, weight]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_a_uniform_distribution_by_hand() -> None:
    found = target_logprobs(torch.zeros(2, 5), torch.zeros(11, 5), torch.tensor([0, 10]), BANNED, 1.0)
    torch.testing.assert_close(found.exp(), torch.full((2,), 1 / 9))  # 11 tokens, of which 2 are banned


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, targets, _ = make(3)
    target_logprobs(hidden, weight.detach(), targets, BANNED, 1.0).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_bfloat16_gives_float32_logprobs_and_bfloat16_gradients() -> None:
    hidden, weight, targets, _ = make(600, torch.bfloat16)  # more than one chunk
    found = target_logprobs(hidden, weight, targets, BANNED, 1.0)
    assert found.dtype == torch.float32
    one = torch.autograd.grad(found.sum(), [hidden, weight])
    assert [g.dtype for g in one] == [torch.bfloat16] * 2
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    other = torch.autograd.grad(target_logprobs(*wide, targets, BANNED, 1.0).sum(), wide)
    for near, exact in zip(one, other, strict=True):
        assert (near.double() - exact).norm() < 0.01 * exact.norm()


def test_only_some_rows_of_logits_are_ever_held(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def seen(logits: torch.Tensor, *rest: object) -> torch.Tensor:
        sizes.append(len(logits))
        return policy_logprobs(logits, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(logprobs, "policy_logprobs", seen)
    monkeypatch.setattr(logprobs, "ROWS", 4)
    hidden, weight, targets, _ = make(9)
    target_logprobs(hidden, weight, targets, BANNED, 1.0).sum().backward()
    assert sizes == [4, 4, 1, 4, 4, 1]  # forward, and again for the backward pass


def test_autocast_reaches_the_logits_and_their_gradients() -> None:
    hidden, weight, targets, _ = make(6, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = target_logprobs(hidden, weight, targets, BANNED, 1.0)
    expected = target_logprobs(hidden.bfloat16(), weight.bfloat16(), targets, BANNED, 1.0)
    assert torch.equal(rounded, expected)
    one, other = (torch.autograd.grad(x.sum(), [hidden, weight]) for x in (rounded, expected))
    assert all(g.dtype == torch.float32 for g in one)
    assert all(map(torch.equal, one, other))
