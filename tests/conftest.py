"""Shared fixtures: the real classes at a tiny size, with random weights, made in a second."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

# The pure core is tested without torch and transformers: they are imported by the fixtures that need them.
if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from axpo.chat import Chat
    from axpo.tools.sandbox import Sandbox

# What the tools keep between runs goes, with the tests, from a folder of their own instead of the user's.
_CACHE = tempfile.TemporaryDirectory(prefix="axpo-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

settings.register_profile("axpo", deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("axpo")

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
# The pre-tokenizer of Qwen2 and Qwen3: a run of punctuation takes the newlines after it.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = files("axpo").joinpath("miniature/chat_template.jinja").read_text()


def byte_level(core: Tokenizer, tags: bool = True) -> PreTrainedTokenizerFast:
    """Wrap a byte-level BPE as Qwen does; `tags` False leaves `<tool_call>` and its like as plain text."""
    from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if tags:
        core.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Makes a tokenizer whose ids can be read by hand.

    Ids 0-255 are the bytes, then come the given merges, then SPECIAL, then (unless `tags` is False) TAGS.
    """

    def make(merges: Sequence[tuple[str, str]] = (), tags: bool = True) -> PreTrainedTokenizerFast:
        from tokenizers import Tokenizer, models

        vocabulary = {char: byte for byte, char in enumerate(bytes_in_order())}
        vocabulary |= {left + right: 256 + n for n, (left, right) in enumerate(merges)}
        return byte_level(Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges))), tags)

    return make


def bytes_in_order() -> list[str]:
    """How byte-level BPE writes the bytes 0 to 255, read off the library."""
    from tokenizers import pre_tokenizers

    write = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    written = {b: write(chr(b))[0][0] for b in range(128)}
    for code in range(128, 2048):  # two-byte characters hold every lead and continuation byte but a few
        written |= dict(zip(chr(code).encode(), write(chr(code))[0][0], strict=True))
    missing = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(written.values()))
    absent = [b for b in range(256) if b not in written]
    return [written.get(b) or missing[absent.index(b)] for b in range(256)]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    core.train_from_iterator([TEMPLATE, "What is the answer to the question in the picture?"], trainer)
    return byte_level(core)


@pytest.fixture(scope="session")
def image_processor() -> Qwen2VLImageProcessorPil:
    """One token for 32×32 pixels; images between 2 and 64 tokens."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(patch_size=16, size={"shortest_edge": 2 * 1024, "longest_edge": 64 * 1024})


@pytest.fixture(scope="session")
def chat(tokenizer: PreTrainedTokenizerFast, image_processor: Qwen2VLImageProcessorPil) -> Chat:
    from axpo.chat import Chat

    return Chat(tokenizer, image_processor)


def tiny_config(tokenizer: PreTrainedTokenizerFast, **text: Any) -> Qwen3VLConfig:
    """The configuration of `tiny_model`; `text` overrides entries of its text part."""
    from transformers import Qwen3VLConfig

    token = tokenizer.convert_tokens_to_ids
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 6,  # padded, as in real checkpoints
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 4096,
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
            **text,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 16,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def random_model(config: Qwen3VLConfig, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """Weights large enough that every token, position and pixel moves the logits."""
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
    return model


@pytest.fixture(scope="session")
def make_model(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Qwen3VLForConditionalGeneration]:
    """Makes a tiny model; keywords override entries of its text config."""

    def make(seed: int = 0, **text: Any) -> Qwen3VLForConditionalGeneration:
        return random_model(tiny_config(tokenizer, **text), seed)

    return make


@pytest.fixture
def tiny_model(make_model: Callable[..., Qwen3VLForConditionalGeneration]) -> Qwen3VLForConditionalGeneration:
    return make_model()


@pytest.fixture(scope="session")
def plain_sandbox() -> Iterator[Sandbox]:
    """Interpreters without isolation, for code that the tests trust."""
    from axpo.tools.sandbox import NONE, Sandbox

    sandbox = Sandbox(NONE)
    yield sandbox
    sandbox.close()


@pytest.fixture(scope="session")
def bubblewrap_sandbox() -> Iterator[Sandbox]:
    """Interpreters under bubblewrap; skips where that does not work."""
    from axpo.tools.base import ToolError
    from axpo.tools.sandbox import BUBBLEWRAP, Sandbox

    sandbox = Sandbox(BUBBLEWRAP)
    try:
        sandbox.check()
    except ToolError as error:
        pytest.skip(str(error))
    yield sandbox
    sandbox.close()
