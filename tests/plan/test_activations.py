"""What autograd keeps of the real layers, tensor by tensor, against the plan's terms."""

import weakref

import pytest
import torch
from plan.measured import NoiseChat, make_model, make_tree, wide_config
from torch import Tensor
from transformers import PreTrainedModel

from axpo.adapters import add_adapters
from axpo.options_size import LoraConfig
from axpo.packing import PackInputs, forward_logprobs, pack_trees
from axpo.plan.activations import Batch, Compute, activations, head_bytes
from axpo.plan.shapes import shape_of
from axpo.policy import banned_tokens, update_forward

RANK = 8
PACK = pack_trees([make_tree(0, rollouts=4, prompt=160, length=60)], NoiseChat(), 1000)[0]  # type: ignore[arg-type]
BATCH = Batch(len(PACK.ids), len(PACK.targets), patches=256)


def saved_bytes(model: PreTrainedModel, checkpointing: bool, autocast: bool) -> int:
    """The storages that one forward keeps for its backward, each once, without the weights."""
    kept: list[weakref.ref[Tensor]] = []

    def keep(tensor: Tensor) -> Tensor:
        saved = tensor.detach()
        kept.append(weakref.ref(saved))  # where nothing needs a gradient it goes at once
        return saved

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    inputs = PackInputs.of(PACK, NoiseChat(), model.device)  # type: ignore[arg-type]
    banned = banned_tokens(NoiseChat(), model)  # type: ignore[arg-type]
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, update_forward(model, checkpointing, autocast):
        logprobs = forward_logprobs(model, inputs, banned)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for r in kept if (t := r()) is not None}
    assert logprobs.requires_grad  # and holds the graph until here
    return sum(size for place, size in storages.items() if place not in weights)


@pytest.mark.parametrize("vision", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_tensors_are_those_of_the_formula(dtype: torch.dtype, checkpointing: bool, vision: bool):
    model = make_model(wide_config(), dtype)
    model.model.visual.requires_grad_(vision)
    compute = Compute(dtype.itemsize, checkpointing=checkpointing, vision=vision)
    shape = shape_of(wide_config())
    saved = saved_bytes(model, checkpointing, False)
    if checkpointing:  # cosines and sines are no saved tensors then: what computes the layers again holds them
        saved += 2 * BATCH.tokens * shape.head_dim * dtype.itemsize
    assert activations(shape, BATCH, compute).saved == pytest.approx(saved, rel=0.01)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_autocast_keeps_copies_of_the_weights(checkpointing: bool):
    model = make_model(wide_config(), torch.float32)
    planned = activations(shape_of(wide_config()), BATCH, Compute(4, True, checkpointing)).saved
    assert planned == pytest.approx(saved_bytes(model, checkpointing, True), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_keep_what_they_read(dtype: torch.dtype):
    model = make_model(wide_config(), dtype)
    add_adapters(model, LoraConfig(rank=RANK), seed=0)
    compute = Compute(dtype.itemsize, vision=False, rank=RANK)
    planned = activations(shape_of(wide_config()), BATCH, compute).saved
    assert planned == pytest.approx(saved_bytes(model, False, False), rel=0.02)


def test_the_head_by_hand():
    shape = shape_of(wide_config())
    # 1000 trained tokens of 256 values, the weight's gradient, and 512 rows of 6000 logits three times: all float32.
    assert head_bytes(shape, 1000, Compute(4)) == 4 * (1000 * 256 + 6000 * 256 + 3 * 512 * 6000)
    # Frozen, the weight has no gradient.
    assert head_bytes(shape, 1000, Compute(4, rank=8)) == 4 * (1000 * 256 + 3 * 512 * 6000)
    # A few rows are not 512.
    assert head_bytes(shape, 3, Compute(4, rank=8)) == 4 * (3 * 256 + 3 * 3 * 6000)
