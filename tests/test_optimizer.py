"""Warm-up and clipping, against values computed by hand."""

import copy
from collections.abc import Callable

import pytest
import torch

from axpo.optimizer import Optimizer


def rates(optimizer: Optimizer, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        optimizer.parameters[0].grad = torch.zeros_like(optimizer.parameters[0])
        optimizer.step()
        found.append(optimizer.adamw.param_groups[0]["lr"])
    return found


def test_the_learning_rate_rises_and_stays(make_model: Callable) -> None:
    assert rates(Optimizer(make_model(), 0.3, warmup_steps=2), 5) == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3])


def test_without_a_warm_up_it_is_whole_at_once(make_model: Callable) -> None:
    assert rates(Optimizer(make_model(), 0.3), 2) == pytest.approx([0.3, 0.3])


def test_the_gradient_is_clipped_and_its_norm_returned(make_model: Callable) -> None:
    optimizer = Optimizer(make_model(), 0.1, grad_clip=1.0)
    parameter = optimizer.parameters[0]
    parameter.grad = torch.zeros_like(parameter)
    parameter.grad.view(-1)[:2] = torch.tensor([3.0, 4.0])
    assert optimizer.step() == pytest.approx(5.0)
    moment = optimizer.adamw.state[parameter]["exp_avg"].view(-1)[:2]  # (1 − β₁)·gradient, after clipping to length 1
    torch.testing.assert_close(moment, torch.tensor([0.06, 0.08]))
    assert parameter.grad is None


def test_steps_too_small_for_bfloat16_add_up(make_model: Callable) -> None:
    model = make_model().to(torch.bfloat16)
    optimizer = Optimizer(model, 1e-4)
    parameter = optimizer.parameters[0]
    with torch.no_grad():
        parameter.fill_(1.0)  # where neighbours are 0.004 apart
    optimizer.copies[parameter].fill_(1.0)
    for _ in range(100):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert parameter.dtype == torch.bfloat16
    torch.testing.assert_close(parameter.float().mean().item(), 0.99, atol=2e-3, rtol=0)


def test_gradients_of_many_packs_add_up_in_float32(make_model: Callable) -> None:
    """In bfloat16 256 + 1 is 256."""
    optimizer = Optimizer(make_model().to(torch.bfloat16), 0.1)
    parameter = optimizer.parameters[0]
    for _ in range(600):
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad.view(-1)[0] = 1.0
        optimizer.take()
    assert optimizer.step() == pytest.approx(600)
    assert parameter.grad is None
    assert optimizer.copies[parameter].grad is None


def test_the_learning_rate_falls_to_nothing_where_the_end_is_known(make_model: Callable) -> None:
    optimizer = Optimizer(make_model(), 0.3, warmup_steps=1, total_steps=4)
    assert rates(optimizer, 5) == pytest.approx([0.15, 0.225, 0.15, 0.075, 0.0])


def test_in_the_hosts_memory_it_steps_as_it_would_on_the_device(make_model: Callable) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        models = [make_model().to(dtype), make_model().to(dtype)]
        for model, offload in zip(models, (False, True), strict=True):
            optimizer = Optimizer(model, 1e-3, offload=offload)
            for seed in range(3):
                torch.manual_seed(seed)
                for parameter in optimizer.parameters:
                    parameter.grad = torch.randn_like(parameter)
                optimizer.step()
            held = {p.data_ptr() for group in optimizer.adamw.param_groups for p in group["params"]}
            assert held.isdisjoint({p.data_ptr() for p in model.parameters()}) == (offload or dtype != torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_restored_it_goes_on_as_it_would_have(make_model: Callable) -> None:
    for dtype in (torch.float32, torch.bfloat16):  # of bfloat16 weights it keeps exact copies
        models = [make_model().to(dtype), make_model().to(dtype)]
        optimizers = [Optimizer(model, 1e-3, warmup_steps=3) for model in models]

        def step(place: int, seed: int, optimizers: list[Optimizer] = optimizers) -> None:
            torch.manual_seed(seed)
            for parameter in optimizers[place].parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizers[place].step()

        step(0, 1)
        step(0, 2)
        models[1].load_state_dict(models[0].state_dict())
        optimizers[1].restore(copy.deepcopy(optimizers[0].state()))
        step(0, 3)
        step(1, 3)
        assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))
