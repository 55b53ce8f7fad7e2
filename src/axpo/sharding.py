"""Weights that several processes share: each holds a part of every one (FSDP2), and with it gradients and optimizer.

An update gathers the weights of a layer when it gets there. The rollouts need all of them for each token, and no two
ranks generate equally many: they are gathered before, and given back after.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from axpo.config import ConfigError
from axpo.options_size import ParallelConfig


def check_sharding(options: ParallelConfig) -> None:
    """Raises ConfigError where this torch cannot share weights."""
    if options.sharding == "full" and not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ConfigError(
            f"parallel.sharding: got 'full', which needs torch 2.13 or later; this is {torch.__version__}"
        )


def shard(model: PreTrainedModel) -> None:
    """Divide the model's weights, in place, over all processes: each layer of the language model by itself.

    All else (vision tower, embeddings, output head) is one part, gathered for the whole of an update's forward and
    backward, so that a rank without an image gathers it too.
    """
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    for module in _parts(model):
        module.set_gradient_divide_factor(1.0)  # gradients are added: the loss is a mean over all ranks' tokens
        module.set_force_sum_reduction_for_comms(True)
        module.set_reduce_scatter_unused_params(True, recurse=False)  # a rank may have no image


def gather(model: PreTrainedModel) -> None:
    """Every process holds all weights, until `scatter`. Does nothing for a model that is not shared."""
    for module in _parts(model):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()


def scatter(model: PreTrainedModel) -> None:
    """Every process holds its part of the weights again."""
    for module in _parts(model):
        outermost: object = model
        module.set_reshard_after_forward(module is not outermost, recurse=False)
        module.reshard()


def gather_outer(model: PreTrainedModel) -> None:
    """Gather what is in none of the layers, which is used outside of the model's own forward too."""
    if isinstance(model, FSDPModule):
        model.unshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that the processes share, put together on each of them, which all must ask for; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, other: Tensor) -> Tensor:
    """A whole value as `other` is held: of a shared one this process's part. On its device, in its own precision."""
    value = value.to(other.device)
    if not isinstance(other, DTensor):
        return value
    return distribute_tensor(value, other.device_mesh, other.placements, src_data_rank=None)


@torch.no_grad()
def set_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter, of which this process may hold a part, a value that is whole."""
    parameter.copy_(like(value, parameter))


def _parts(model: PreTrainedModel) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
