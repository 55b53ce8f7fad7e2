"""AdamW with a warm-up and gradient clipping."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from axpo.reference import in_host
from axpo.sharding import like, whole


class Optimizer:
    """Steps a model's trainable parameters.

    The learning rate rises linearly over `warmup_steps`; then it stays, or falls linearly to nothing at `total_steps`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        learning_rate: float,
        warmup_steps: int = 0,
        weight_decay: float = 0.0,
        grad_clip: float = 1.0,
        total_steps: int | None = None,
        offload: bool = False,
    ) -> None:
        """With `offload` its state, and the float32 weights that it steps, lie in the host's memory."""
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # A usual step is smaller than bfloat16 can add to a weight: it is added to a float32 copy.
        copied = [p for p in self.parameters if offload or p.dtype != torch.float32]
        self.copies = {p: in_host(p, torch.float32) if offload else p.detach().float() for p in copied}
        self.stepped = [self.copies.get(p, p) for p in self.parameters]
        self.adamw = torch.optim.AdamW(self.stepped, lr=learning_rate, weight_decay=weight_decay)
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.grad_clip = grad_clip
        self.steps = 0

    def take(self) -> None:
        """After a backward: add the gradients of weights that have a float32 copy to the copy's.

        The sum of many in bfloat16 would lose the small ones.
        """
        for parameter, copy in self.copies.items():
            if parameter.grad is not None:
                gradient = parameter.grad.to(copy.device, torch.float32)
                copy.grad = gradient if copy.grad is None else copy.grad.add_(gradient)
                parameter.grad = None

    def forget(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Leave these without a gradient in the next step."""
        for parameter in parameters:
            parameter.grad = self.copies.get(parameter, parameter).grad = None

    def step(self) -> float:
        """Apply the gradients that were taken and clear them; returns their norm before clipping.

        A gradient that is not finite is dropped: one bad batch must not spoil the weights.
        """
        self.take()
        self.steps += 1
        for group in self.adamw.param_groups:
            group["lr"] = self.learning_rate * self._share()
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.stepped, self.grad_clip)))
        if norm < float("inf"):
            self.adamw.step()
            for parameter, copy in self.copies.items():
                parameter.data.copy_(copy)
        for stepped in self.stepped:
            stepped.grad = None
        return norm

    def state(self, keep: bool = True) -> dict[str, Any]:
        """All that its next steps depend on besides the weights, on the CPU.

        Processes that share it must all ask; who need not `keep` what is put together gets empty tensors.
        """

        def put(tensor: Tensor) -> Tensor:
            full = whole(tensor.detach())
            return full.cpu() if keep else full.new_empty(0)

        adamw = self.adamw.state_dict()
        moments = {number: {name: put(value) for name, value in m.items()} for number, m in adamw["state"].items()}
        return {
            "steps": self.steps,
            "adamw": {**adamw, "state": moments},
            "copies": [put(copy) for copy in self.copies.values()],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned; the model has the weights of then."""
        self.steps = state["steps"]
        kept = {
            number: {n: value if n == "step" else like(value, self.stepped[number]) for n, value in moments.items()}
            for number, moments in state["adamw"]["state"].items()
        }
        self.adamw.load_state_dict({**state["adamw"], "state": kept})
        for copy, saved in zip(self.copies.values(), state["copies"], strict=True):
            copy.data.copy_(like(saved, copy))

    def _share(self) -> float:
        rising = min(1.0, self.steps / (self.warmup_steps + 1))
        if self.total_steps is None:
            return rising
        return min(rising, max(0.0, (self.total_steps + 1 - self.steps) / (self.total_steps - self.warmup_steps + 1)))
