"""The sizes of real models, from their configs alone."""

from pathlib import Path

import pytest
import torch
from plan.measured import make_model, wide_config
from plan.published import CONFIGS, write_checkpoint

from axpo import build
from axpo.adapters import add_adapters
from axpo.config import Config, ConfigError, load_config
from axpo.options_size import LoraConfig
from axpo.plan.shapes import image_pixels, load_shape, shape_of


def config_of(tmp_path: Path, name: str, *overrides: str) -> Config:
    return load_config(None, [f"model={write_checkpoint(tmp_path / name, CONFIGS[name])}", *overrides])


# The number of weights in the published safetensors files.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen3_vl_2b", 2_127_532_032),
        ("qwen3_vl_4b", 4_437_815_808),
        ("qwen3_vl_8b", 8_767_123_696),
        ("qwen3_text", 4_022_468_096),
    ],
)
def test_the_published_models_have_as_many_parameters_as_published(tmp_path: Path, name: str, parameters: int):
    shape = load_shape(config_of(tmp_path, name))
    assert shape.parameters == parameters
    text = CONFIGS[name].get("text_config", CONFIGS[name])
    h, i, queries, keys = text["hidden_size"], text["intermediate_size"], 128 * text["num_attention_heads"], 128 * 8
    layer = 2 * h * queries + 2 * h * keys + 3 * h * i + 2 * h + 2 * 128
    assert shape.layer_parameters == layer
    assert shape.language_parameters == text["num_hidden_layers"] * layer + h
    assert shape.embedding_parameters == 151936 * h * (1 if shape.tied else 2)
    assert shape.tied == (name != "qwen3_vl_8b")
    assert (shape.queries, shape.keys) == (queries, keys)


def test_the_miniature_has_as_many_as_its_weights():
    config = load_config(None)
    model = build.load_model(config)
    shape = load_shape(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.vision_parameters == sum(p.numel() for p in model.model.visual.parameters())
    assert shape.vision is not None
    assert (shape.vision.depth, shape.vision.mergers, shape.vision.patch_values) == (3, 2, 1536)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_adapters_are_counted_as_they_are_made(targets: str | list[str]):
    model = make_model(wide_config(), torch.float32)
    add_adapters(model, LoraConfig(rank=8, targets=targets), seed=0)
    made = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape_of(wide_config()).adapters(8, targets) == made > 0


def test_the_largest_image_is_the_models_own_or_max_pixels(tmp_path: Path):
    config = config_of(tmp_path, "qwen3_vl_2b")
    assert image_pixels(config) == 16777216
    assert image_pixels(config_of(tmp_path, "qwen3_vl_2b", "max_pixels=1048576")) == 1048576


def test_what_cannot_be_planned_is_named(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"model: got .*empty.*must be a folder that holds config\.json"):
        load_shape(load_config(None, [f"model={tmp_path / 'empty'}"]))
    other = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    folder = write_checkpoint(tmp_path / "other", other)
    with pytest.raises(ConfigError, match="of type 'gpt2', whose layers the plan does not know; it knows"):
        load_shape(load_config(None, [f"model={folder}"]))
    config = config_of(tmp_path, "qwen3_vl_2b")
    (tmp_path / "qwen3_vl_2b" / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no preprocessor_config\.json"):
        image_pixels(config)
