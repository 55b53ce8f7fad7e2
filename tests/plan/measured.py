"""What one update really takes: the real trainer, optimizer and packing on a random Qwen3-VL."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForImageTextToText, PreTrainedModel, Qwen3VLConfig

from axpo.adapters import add_adapters
from axpo.config import load_config
from axpo.credit import credit_axpo
from axpo.policy import freeze_vision, use_tree_attention
from axpo.trainer import Trainer
from axpo.tree import Image, Kind, Outcome, RolloutTree, StopReason

IMAGE_TOKEN, GRID = 9, (1, 16, 16)


def wide_config(tied: bool = True) -> Qwen3VLConfig:
    """9 million parameters, in the proportions of the real ones."""
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [12, 10, 10]}
    return Qwen3VLConfig(
        text_config={
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "vocab_size": 6000,
            "rope_parameters": rope,
            "tie_word_embeddings": tied,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_heads": 2,
            "out_hidden_size": 256,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [1, 3],
        },
        tie_word_embeddings=tied,
        image_token_id=IMAGE_TOKEN,
        video_token_id=10,
        vision_start_token_id=11,
        vision_end_token_id=12,
    )


def make_model(config: Qwen3VLConfig, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    use_tree_attention(model)
    return model


class NoiseChat:
    """What packing and training ask of a chat, with noise for every image."""

    image_token_id = IMAGE_TOKEN
    merge_size = 2
    banned_ids = (IMAGE_TOKEN,)
    tokenizer = range(6000)

    def pixels(self, images: Sequence[Image]) -> tuple[Tensor, Tensor]:
        patches = sum(int(np.prod(image.grid)) for image in images)
        return torch.randn(patches, 3 * 2 * 16 * 16), torch.tensor([image.grid for image in images])


def make_tree(number: int, rollouts: int, prompt: int, length: int) -> RolloutTree:
    """A prompt that holds one image, and rollouts of which every second is right."""
    rng = np.random.default_rng(number)
    tokens = GRID[1] * GRID[2] // 4
    ids = np.insert(rng.integers(20, 6000, prompt - tokens), 5, [IMAGE_TOKEN] * tokens)
    tree = RolloutTree(f"q{number}", ids, (Image(bytes([number]), GRID, tokens),))
    for index in range(rollouts):
        leaf = tree.append(tree.root, Kind.POLICY, rng.integers(20, 6000, length), [-1.0] * length)
        leaf.outcome = Outcome(StopReason.ANSWER, float(index % 2))
    credit_axpo(tree)
    return tree


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that tensors have held at once, over what they held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return int(np.cumsum([size for _, size in changes]).max())


def update_peak(model_config: Qwen3VLConfig, trees: Sequence[RolloutTree], overrides: Sequence[str] = ()) -> int:
    """The most that a model, its reference, its optimizer and an update on these trees take; the optimizer has stepped
    before, so that its state is there."""
    config = load_config(None, ["rollout.questions=2", "rollout.rollouts=6", "method.name=grpo", *overrides])
    agent: Any = SimpleNamespace(chat=NoiseChat(), engine=SimpleNamespace(update_weights=lambda: None))

    def run() -> None:
        model = make_model(model_config, getattr(torch, config.dtype))
        if not config.train.vision:
            freeze_vision(model)
        if config.lora.rank:
            add_adapters(model, config.lora, seed=0)
        trainer = Trainer(config, agent, model, [])
        trainer.update({0: make_tree(9, 2, 80, 2)})
        trainer.update(dict(enumerate(trees)))

    return peak_bytes(run)
