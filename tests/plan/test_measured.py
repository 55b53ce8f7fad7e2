"""The plan's peaks against those of real updates, to 20 %."""

from collections.abc import Sequence

import pytest
import torch
from plan.measured import GRID, make_model, make_tree, update_peak, wide_config

from axpo.config import load_config
from axpo.optimizer import Optimizer
from axpo.plan.activations import Batch
from axpo.plan.memory import moments
from axpo.plan.shapes import shape_of

PROMPT, LENGTH, ROLLOUTS = 120, 100, 6


def planned(overrides: Sequence[str], length: int, tied: bool = True) -> tuple[str, int]:
    config = load_config(None, overrides)
    batch = Batch(PROMPT + ROLLOUTS * length, ROLLOUTS * length, GRID[1] * GRID[2])
    peak = max(moments(config, shape_of(wide_config(tied)), batch, None)[1:], key=lambda moment: moment.total)
    return peak.name, peak.total


@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_an_update(dtype: str, checkpointing: str):
    overrides = [f"dtype={dtype}", f"train.gradient_checkpointing={checkpointing}", "train.pack_tokens=800"]
    name, total = planned(overrides, LENGTH)
    assert name == "update"
    trees = [make_tree(n, ROLLOUTS, PROMPT, LENGTH) for n in range(2)]  # of which each is a pack
    assert total == pytest.approx(update_peak(wide_config(), trees, overrides), rel=0.1)


def test_the_peak_with_an_output_head_of_its_own_and_a_frozen_tower():
    overrides = ["train.vision=false", "train.pack_tokens=800", "method.kl=0"]
    _, total = planned(overrides, LENGTH, tied=False)
    trees = [make_tree(n, ROLLOUTS, PROMPT, LENGTH) for n in range(2)]
    assert total == pytest.approx(update_peak(wide_config(tied=False), trees, overrides), rel=0.1)


def test_the_peak_with_short_packs():
    """What lasts takes most: weights, gradients, copies, moments, reference."""
    overrides = ["dtype=bfloat16", "train.gradient_checkpointing=true", "train.pack_tokens=200"]
    _, total = planned(overrides, 2)
    trees = [make_tree(n, ROLLOUTS, PROMPT, 2) for n in range(2)]
    assert total == pytest.approx(update_peak(wide_config(), trees, overrides), rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_with_adapters(dtype: str):
    overrides = [f"dtype={dtype}", "lora.rank=8", "train.pack_tokens=800"]
    _, total = planned(overrides, LENGTH)
    trees = [make_tree(n, ROLLOUTS, PROMPT, LENGTH) for n in range(2)]
    assert total == pytest.approx(update_peak(wide_config(), trees, overrides), rel=0.1)


def test_no_gradient_outlives_the_step():
    """Those of the float32 copies would take 4 bytes a weight of every update."""
    model = make_model(wide_config(), torch.bfloat16)
    optimizer = Optimizer(model, 1e-3)
    model.model.language_model.norm.weight.grad = torch.ones(256, dtype=torch.bfloat16)
    optimizer.step()
    assert all(p.grad is None for p in (*optimizer.parameters, *optimizer.copies.values()))
