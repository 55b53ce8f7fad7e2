"""Low-rank adapters (LoRA, arXiv 2106.09685) on linear layers of the language model, by peft: only they are trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from axpo.config import ConfigError
from axpo.options_size import LoraConfig
from axpo.sharding import set_weight, whole

FOLDER = "adapter"  # of a checkpoint: what peft opens over the model that training started from
_NAME = "default"  # peft's, of the only adapter
_PREFIX = "base_model.model."  # before the names of weights in peft's files


def check_adapters(options: LoraConfig) -> None:
    """Raises ConfigError where adapters are asked for and peft is not installed."""
    if not options.rank:
        return
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f'lora.rank: got {options.rank}, but adapters need peft, which is not installed; pip install "axpo[lora]"'
        ) from error


def add_adapters(model: PreTrainedModel, options: LoraConfig, seed: int) -> None:
    """Put adapters into the model, which change nothing yet, and freeze all else. `seed` decides their first weights.

    Raises ConfigError for a target that the language model does not have.
    """
    import peft

    layers = _language_layers(model)
    names = {name.rpartition(".")[2] for name in layers}
    wanted = names if options.targets == "all-linear" else {*_listed(options.targets)}
    if unknown := sorted(wanted - names):
        raise ConfigError(
            f"lora.targets: got {', '.join(unknown)}; must be all-linear, or of {', '.join(sorted(names))}"
        )
    chosen = [name for name in layers if name.rpartition(".")[2] in wanted]
    given = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # it is a factor, and need not be whole
        target_modules=chosen,
        base_model_name_or_path=model.name_or_path,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(given, model)


def adapted_layers(model: PreTrainedModel) -> dict[str, Any]:
    """The layers with an adapter, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@contextmanager
def without_adapters(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Inside, the model is the one that training started from."""
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield model
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged(weight: Tensor, layer: Any) -> Tensor:
    """The weight of an adapted layer, given whole, with what its adapter adds: W + α/r·B·A, added in float32."""
    down, up = (whole(part[_NAME].weight.detach()).float() for part in (layer.lora_A, layer.lora_B))
    added: Tensor = layer.scaling[_NAME] * (up @ down)
    return (weight.float() + added).to(weight.dtype)


def save_adapters(model: PreTrainedModel, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write what `adapter_weights` gave as a folder that `peft.PeftModel.from_pretrained` opens."""
    folder.mkdir()
    options: Any = model.peft_config
    options[_NAME].save_pretrained(folder)
    save_file(weights, folder / "adapter_model.safetensors")


def adapter_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapters' weights under peft's names, whole, on the CPU. All processes that share them must ask."""
    return {
        _PREFIX + name.replace(f".{_NAME}.", "."): whole(parameter.detach()).cpu().contiguous()
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }


def load_adapters(model: PreTrainedModel, folder: Path) -> None:
    """Take the adapters' weights that `save_adapters` wrote."""
    saved = load_file(folder / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            set_weight(parameter, saved[_PREFIX + name.replace(f".{_NAME}.", ".")])


def _listed(targets: str | list[str]) -> list[str]:
    return [targets] if isinstance(targets, str) else targets


def _language_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers of the language model but its output head."""
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    inside = set(decoder.modules())
    return {n: module for n, module in model.named_modules() if isinstance(module, nn.Linear) and module in inside}
