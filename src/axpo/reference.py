"""The policy that training starts from, to which the KL divergence is measured."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from axpo.adapters import adapted_layers, without_adapters
from axpo.sharding import scatter, shard


class Reference:
    """A frozen copy of a policy; of one with adapters it is the policy itself without them."""

    def __init__(self, policy: PreTrainedModel, offload: bool = False, share: bool = False) -> None:
        """With `offload` its weights lie in the host's memory while nobody asks. With `share` it is divided over all
        processes, as the policy will be."""
        self.adapted = bool(adapted_layers(policy))
        self.model = policy if self.adapted else copy.deepcopy(policy).requires_grad_(False)
        self.device = policy.device
        self.host: dict[torch.nn.Parameter, torch.Tensor] = {}
        if offload and not self.adapted:
            self.host = {p: in_host(p.data) for p in self.model.parameters()}
            self._put_away()
        if share and not self.adapted:
            shard(self.model)

    @contextmanager
    def present(self) -> Iterator[PreTrainedModel]:
        """The model, to be asked inside."""
        if self.adapted:
            with without_adapters(self.model):
                yield self.model
            return
        for parameter, weight in self.host.items():
            parameter.data = weight.to(self.device, non_blocking=True)
        try:
            yield self.model
        finally:
            self._put_away()

    def _put_away(self) -> None:
        for parameter, weight in self.host.items():
            parameter.data = weight
        scatter(self.model)


def in_host(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A copy in the host's memory, from where it is moved fast; it gets its `dtype` there, not on the device."""
    copied = tensor.detach().to("cpu", copy=True).to(dtype or tensor.dtype)
    return copied.pin_memory() if tensor.device.type == "cuda" else copied
