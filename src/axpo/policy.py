"""The policy: a Hugging Face model, called with explicit positions and masks.

The engine and the trainer both come through here, so that what was sampled is what is trained: the same
forward, and the same log-probs of the same distribution.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from axpo import attention
from axpo.adapters import FOLDER as ADAPTER
from axpo.adapters import adapted_layers, load_adapters, merged
from axpo.attention import TreeMask
from axpo.chat import Chat
from axpo.config import ConfigError
from axpo.parallel import ALONE, Ranks
from axpo.sharding import gather_outer, set_weight, whole


class PolicyError(ValueError):
    """A model that cannot be loaded."""


class ImageFeatures:
    """What the vision encoder computed: a tensor (tokens, hidden) for each image, and the same for each layer
    that feeds the language model directly (DeepStack). The names are those that the model reads.

    Not a dataclass, in which FSDP2 would find the tensors and, once it has their gradients, take the backward of all
    that is outside of the layers as done: that of the vision tower, which made them, is still to come.
    """

    def __init__(self, pooler_output: Sequence[Tensor], deepstack_features: Sequence[Sequence[Tensor]]) -> None:
        self.pooler_output = pooler_output
        self.deepstack_features = deepstack_features


def load_policy(path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PreTrainedModel:
    """Load a checkpoint in evaluation mode: a vision-language model where its config has a vision part.

    Raises PolicyError where `path` is not a checkpoint, or lacks weights of its architecture.
    """
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise PolicyError(f"{path} is not a checkpoint: it holds no config.json")
    try:
        sees = getattr(AutoConfig.from_pretrained(path), "vision_config", None) is not None
        family = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        opened: Any = family.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise PolicyError(f"{path} is not a checkpoint that can be opened: {error}") from error
    model: PreTrainedModel
    model, loaded = opened
    if missing := sorted(loaded["missing_keys"]):  # each would be drawn at random, in each process another
        named = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise PolicyError(f"{path} lacks {len(missing)} of the weights of {type(model).__name__}: {named}")
    use_tree_attention(model)
    return model.to(device).eval()  # type: ignore[arg-type, no-any-return]


def use_tree_attention(model: PreTrainedModel) -> None:
    """Let the language model attend through attention.py, which without a tree is SDPA with a 4-D mask or none.

    Raises PolicyError for an architecture that does not call transformers' attention interface.
    """
    if model.config.get_text_config()._attn_implementation == attention.NAME:
        return
    text = getattr(model.config, "text_config", None)
    if model._supports_attention_backend:
        model.set_attn_implementation(attention.NAME if text is None else {"text_config": attention.NAME})
    if model.config.get_text_config()._attn_implementation != attention.NAME:
        raise PolicyError(f"{type(model).__name__} does not go through transformers' attention interface")


def banned_tokens(chat: Chat, model: PreTrainedModel) -> Tensor:
    """The ids that the policy can never write: (n,) on the model's device.

    To the chat's banned ids come the rows that pad the model's vocabulary beyond the tokenizer's.
    """
    padding = range(len(chat.tokenizer), vocabulary_size(model))
    return torch.tensor([*chat.banned_ids, *padding], dtype=torch.long, device=model.device)


def vocabulary_size(model: PreTrainedModel) -> int:
    """The number of logits of the model."""
    return int(model.config.get_text_config().vocab_size)


def output_head(model: PreTrainedModel) -> torch.nn.Linear:
    """The layer from hidden states to logits."""
    head: torch.nn.Linear = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head


def vision_tower(model: PreTrainedModel) -> torch.nn.Module | None:
    """What encodes images, with what maps its output into the language model; None where the model does not see."""
    tower: torch.nn.Module | None = getattr(model.base_model, "visual", None)
    return tower


def freeze_vision(model: PreTrainedModel) -> None:
    """Train no weight of the vision tower. Raises PolicyError for a model that sees, but not by such a part."""
    tower = vision_tower(model)
    if tower is not None:
        tower.requires_grad_(False)
    elif getattr(model.config, "vision_config", None) is not None:
        raise PolicyError(f"train.vision: cannot be false for {type(model).__name__}, whose vision tower is not known")


def start_fingerprint(model: PreTrainedModel, ranks: Ranks = ALONE) -> Tensor:
    """Enough to tell weights apart: the sum of each parameter, (n,) in float64 on the CPU. They are whole.

    Raises ConfigError where processes that are to train together hold different ones.
    """
    own = torch.stack([p.detach().sum(dtype=torch.float64) for p in model.parameters()]).cpu()
    first, *others = ranks.all(own)
    for rank, other in enumerate(others, 1):
        if not same_weights(first, other):
            raise ConfigError(f"model: process {rank} of the training has loaded other weights than process 0")
    return own


def same_weights(one: Tensor, other: Tensor) -> bool:
    """Whether two of `start_fingerprint` are of the same weights, up to what a sum is rounded by."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-6)


def policy_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Each weight of the policy by its name in a checkpoint: whole, with the adapters merged in.

    Tied weights come once. Processes that share the weights (sharding.py) must all run through it.
    """
    adapted = adapted_layers(model)
    for name, parameter in model.named_parameters():
        layer, _, own = name.partition(".base_layer.")
        weight = whole(parameter.detach())
        if own:
            yield f"{layer}.{own}", merged(weight, adapted[layer]) if own == "weight" else weight
        elif ".lora_" not in name:
            yield name, weight


def restore_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Take the weights of a checkpoint of the same policy; of one with adapters only theirs."""
    if adapted_layers(model):
        load_adapters(model, checkpoint / ADAPTER)
        return
    saved = dict(load_policy(checkpoint, model.dtype).named_parameters())
    for name, parameter in model.named_parameters():
        set_weight(parameter, saved[name])


def image_features(model: PreTrainedModel, pixels: Tensor, grids: Tensor) -> ImageFeatures:
    """Encode images: patches (P, dim) and grids (n, 3), as `Chat.pixels` gives them."""
    encode: Any = model.get_image_features
    tower = vision_tower(model)
    trained = tower is None or any(parameter.requires_grad for parameter in tower.parameters())
    with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
        features = encode(pixels.to(model.device), grids.to(model.device), return_dict=True)
    return ImageFeatures(features.pooler_output, features.deepstack_features)


def forward_logits(
    model: PreTrainedModel,
    ids: Tensor,
    positions: Tensor,
    mask: Tensor | TreeMask | None,
    images: ImageFeatures | tuple[Tensor, Tensor] | None = None,
    keep: Tensor | None = None,
    past: Any = None,
) -> Tensor:
    """The next-token logits, (B, T or kept, V).

    `ids` (B, T); `positions` (3, B, T) as `mrope_positions` gives them, of which a text-only model takes the
    first axis; `mask` (B, 1, T, S), True where a query may attend to a key, or what is added to the scores, or that
    of a pack (then B is 1);
    `images` the features, or (patches, grids), of all images whose placeholders are in `ids`, in row order;
    `keep` the token indices to compute logits for, (n,) or (B, n); `past` the engine's cache, which attends by itself
    and needs no mask.
    The `rope_deltas` that the model object remembers are neither read nor written.
    """
    use_tree_attention(model)
    inputs: dict[str, Any] = {}
    if isinstance(images, ImageFeatures):
        inputs["mm_encoder_outputs"] = {"image": images}
    elif images is not None:
        inputs["mm_encoder_outputs"] = {"image": image_features(model, *images)}
    if keep is not None:
        inputs["logits_to_keep"] = keep
    sees = getattr(model.config, "vision_config", None) is not None
    if isinstance(mask, TreeMask):
        inputs["tree"] = mask
    if past is not None:
        inputs["paths"] = past
    output = model(
        input_ids=ids,
        position_ids=positions if sees else positions[0],
        attention_mask=None if isinstance(mask, TreeMask) else mask,
        past_key_values=past,
        use_cache=past is not None,
        **inputs,
    )
    logits: Tensor = output.logits
    return logits


def forward_hidden(
    model: PreTrainedModel,
    ids: Tensor,
    positions: Tensor,
    mask: Tensor | TreeMask,
    images: ImageFeatures | tuple[Tensor, Tensor] | None,
    keep: Tensor,
) -> Tensor:
    """What the output head makes the logits of the kept tokens from, (B, n, H); arguments as `forward_logits` has them.

    Raises PolicyError for a model whose logits are not its head's weight times these (soft caps, scales, biases).
    """
    head = output_head(model)
    caught: list[Tensor] = []

    def take(module: torch.nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        caught.append(given[0])
        return (given[0][:, :1].detach(),)  # the head then computes one row, by which it is checked

    handle = head.register_forward_pre_hook(take)
    try:
        logits = forward_logits(model, ids, positions, mask, images, keep)
    finally:
        handle.remove()
    with torch.no_grad():
        expected = linear(caught[0][:, :1], head.weight)
    if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise PolicyError(f"{type(model).__name__} makes more of its output head's logits than packed training knows")
    return caught[0]


@contextmanager
def update_forward(model: PreTrainedModel, checkpointing: bool = False, autocast: bool = False) -> Iterator[None]:
    """How a forward inside is computed, whose backward pass comes after.

    With `checkpointing` a layer keeps what goes into it only, and is computed again for the backward pass. With
    `autocast` matrix products and attention are in bfloat16; weights, their gradients and log-probs stay as they are.
    Raises PolicyError for a model that does not say which its layers are.
    """
    gather_outer(model)
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] if checkpointing else []
    if checkpointing and not layers:
        raise PolicyError(f"{type(model).__name__} does not support gradient checkpointing")
    # The library's own switch acts in training mode only, which would also let dropout act.
    for layer in layers:
        again = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        setattr(layer, "forward", again)  # noqa: B010
    try:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            yield
    finally:
        for layer in layers:
            delattr(layer, "forward")


def policy_logprobs(logits: Tensor, banned: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """The policy's distribution over the next token: logits (n, V) to log-probs (n, V).

    The logits are divided by `temperature` (a number, or (n, 1)), which must be above 0; banned ids have -inf.
    In float32, or wider where the logits are. Sampling and training both use this function.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return logits.index_fill_(-1, banned, float("-inf")).log_softmax(-1)
