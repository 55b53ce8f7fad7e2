"""The options of training at size: processes and GPUs, adapters, and vLLM as the engine."""

from typing import Literal

from pydantic import Field

from axpo.options import Integer, Real, Section

VLLM_TEMPERATURES = (0.01, 2.0)  # what vLLM samples at; it also takes 0, which is greedy


class ParallelConfig(Section):
    """Training with several processes, one a GPU."""

    processes: Integer = Field(default=1, ge=1)
    """Processes on this machine that train together, each on its share of a step's questions or trajectories.
    `axpo train` and `axpo sft` start them, unless torchrun or accelerate has. Default: 1."""
    sharding: Literal["none", "full"] = "none"
    """full: each process holds its share of weights, gradients and optimizer (FSDP2); none: each holds all.
    Default: none."""
    offload: bool = False
    """true: the optimizer's state, with its float32 weights, and the reference policy lie in the host's memory while
    they are not needed. Default: false."""


class LoraConfig(Section):
    """Training of low-rank adapters instead of all weights (peft)."""

    rank: Integer = Field(default=0, ge=0)
    """The adapters' rank. Default: 0, no adapters: all weights are trained."""
    alpha: Real = Field(default=32.0, gt=0)
    """What the adapters' product is scaled by, over the rank. Default: 32."""
    targets: str | list[str] = "all-linear"
    """Names of the layers that get adapters, or all-linear: every linear layer of the language model.
    Default: all-linear."""


class VllmConfig(Section):
    """vLLM as the engine (`engine.name: vllm`)."""

    servers: list[str] = Field(default_factory=list)
    """URLs of `vllm serve` instances. Default: none, vLLM runs in the process that trains, on its device."""
    memory: Real = Field(default=0.45, gt=0, lt=1)
    """The share of the GPU's memory that vLLM takes in the process that trains: weights, keys and values. It gives it
    back during the update. Default: 0.45."""
    eager: bool = False
    """true: no CUDA graphs: starts faster and takes less memory, generates slower. Default: false."""
