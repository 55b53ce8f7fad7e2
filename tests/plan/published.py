"""The published config.json of the models that the recipes name, and what else `axpo plan` reads of a checkpoint."""

import json
from pathlib import Path
from typing import Any

SPECIAL = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
PREPROCESSOR = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}


def _text(hidden: int, layers: int, heads: int, intermediate: int) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": 262144,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_theta": 5000000,
        "use_cache": True,
        "vocab_size": 151936,
    }


def _sees(text: dict[str, Any], tied: bool, depth: int, hidden: int, intermediate: int, deep: list[int]) -> Any:
    rope = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": {**text, "model_type": "qwen3_vl_text", "rope_scaling": rope},
        "tie_word_embeddings": tied,
        "vision_config": {
            "deepstack_visual_indexes": deep,
            "depth": depth,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": hidden,
            "in_channels": 3,
            "intermediate_size": intermediate,
            "model_type": "qwen3_vl",
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        **SPECIAL,
    }


_SMALL_TOWER = (24, 1024, 4096, [5, 11, 17])
CONFIGS: dict[str, Any] = {
    "qwen3_vl_2b": _sees(_text(2048, 28, 16, 6144), True, *_SMALL_TOWER),
    "qwen3_vl_4b": _sees(_text(2560, 36, 32, 9728), True, *_SMALL_TOWER),
    "qwen3_vl_8b": _sees(_text(4096, 36, 32, 12288), False, 27, 1152, 4304, [8, 16, 24]),
    "qwen3_text": {
        **_text(2560, 36, 32, 9728),
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "tie_word_embeddings": True,
    },
}


def write_checkpoint(folder: Path, config: dict[str, Any]) -> Path:
    """A folder of config.json and, where it sees, preprocessor_config.json; no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if "vision_config" in config:
        (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder
