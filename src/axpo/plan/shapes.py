"""From a checkpoint's config.json to the sizes that memory is computed from. No weights are read or made."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from axpo.build import model_path
from axpo.config import Config, ConfigError

KNOWN = ("qwen3", "qwen3_vl")  # whose layers `activations` describes


@dataclass(frozen=True)
class Vision:
    """A vision tower: `depth` blocks over patches, each `merge`² of which become one token of the language model."""

    depth: int
    hidden: int
    intermediate: int
    out: int
    mergers: int  # one for the language model's input, one for each layer that DeepStack feeds
    patch_values: int  # numbers of a patch
    patch: int  # pixels a side
    merge: int  # patches a side of what becomes one token


@dataclass(frozen=True)
class Shape:
    """A model's sizes. `queries` and `keys` are heads times head_dim; parameters are numbers of weights."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    vision: Vision | None
    language_parameters: int  # without embeddings
    vision_parameters: int  # with what maps the tower's output into the language model
    embedding_parameters: int  # with the output head; one matrix where they are tied
    layer_parameters: int  # of one layer of the language model
    linears: tuple[tuple[str, int, int], ...]  # name, inputs and outputs of each linear layer of the language model

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.key_heads * self.head_dim

    @property
    def parameters(self) -> int:
        return self.language_parameters + self.vision_parameters + self.embedding_parameters

    def adapters(self, rank: int, targets: str | list[str]) -> int:
        """Parameters of adapters of this rank on these layers."""
        return sum(rank * (inputs + outputs) for _, inputs, outputs in self.adapted(targets))

    def adapted(self, targets: str | list[str]) -> list[tuple[str, int, int]]:
        """The linear layers of the language model that get adapters: all, or those of these names."""
        names = [targets] if isinstance(targets, str) else targets
        whole = names == ["all-linear"]
        return [layer for layer in self.linears if whole or any(_ends(layer[0], name) for name in names)]


def load_shape(config: Config) -> Shape:
    """The sizes of the config's model. It needs its config.json alone.

    Raises ConfigError where there is none, or where the model is of a kind that is not KNOWN.
    """
    path = model_path(config)
    try:
        found = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"model: got {config.model!r}, but its config.json cannot be read ({reason}); "
            "must be a folder that holds config.json (and preprocessor_config.json), or a name that a hub resolves"
        ) from error
    if found.model_type not in KNOWN:
        raise ConfigError(
            f"model: {config.model} is of type {found.model_type!r}, whose layers the plan does not know; "
            f"it knows {', '.join(KNOWN)}"
        )
    return shape_of(found)


def shape_of(config: Any) -> Shape:
    """The sizes of a transformers config. Parameters are counted on the real class, made on the meta device."""
    sees = getattr(config, "vision_config", None) is not None
    with torch.device("meta"):
        family = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        model: PreTrainedModel = family.from_config(config)  # type: ignore[no-untyped-call]
    text = config.get_text_config()
    decoder: torch.nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    embeddings = {p for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}  # type: ignore[no-untyped-call]
    language = {p for p in decoder.parameters() if p not in embeddings}
    linears = [
        (name, m.in_features, m.out_features) for name, m in decoder.named_modules() if isinstance(m, torch.nn.Linear)
    ]
    return Shape(
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        key_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        intermediate=text.intermediate_size,
        vocabulary=text.vocab_size,
        tied=len(embeddings) == 1,
        vision=_vision(config.vision_config) if sees else None,
        language_parameters=_count(language),
        vision_parameters=_count({p for p in model.parameters() if p not in language | embeddings}),
        embedding_parameters=_count(embeddings),
        layer_parameters=_count(set(decoder.layers[0].parameters())),  # type: ignore[index, union-attr]
        linears=tuple(linears),
    )


def image_pixels(config: Config) -> int:
    """Pixels of the largest image as the model gets it, of a model with vision.

    Raises ConfigError where there is no image processor's file.
    """
    path = model_path(config)
    try:
        processor: Any = AutoImageProcessor.from_pretrained(path)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model: {config.model} has no preprocessor_config.json that can be read, which says how large images are"
        ) from error
    most = int(processor.size["longest_edge"])
    return most if config.max_pixels is None else min(most, config.max_pixels)


def _vision(config: Any) -> Vision:
    return Vision(
        depth=config.depth,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        out=config.out_hidden_size,
        mergers=1 + len(config.deepstack_visual_indexes),
        patch_values=config.in_channels * config.temporal_patch_size * config.patch_size**2,
        patch=config.patch_size,
        merge=config.spatial_merge_size,
    )


def _count(parameters: set[torch.nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)
