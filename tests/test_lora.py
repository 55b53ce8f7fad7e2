"""Adapters by the real peft: what is trained, what is saved, and what the reference is."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from processes import assert_learnt_alike, make_project, train, train_interrupted
from transformers import PreTrainedModel

from axpo import build
from axpo.adapters import FOLDER, adapted_layers, add_adapters, check_adapters, without_adapters
from axpo.chat import Chat
from axpo.config import ConfigError, load_config
from axpo.options_size import LoraConfig
from axpo.policy import image_features, load_policy, policy_weights, restore_weights
from axpo.run import Run

LORA = ("lora.rank=4", "lora.alpha=8")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(20)[None]).logits


@pytest.fixture
def adapted(tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """A model with adapters that change something; without them it lies in the folder `base`."""
    make_model().save_pretrained(tmp_path / "base")
    model = load_policy(tmp_path / "base")
    add_adapters(model, LoraConfig(rank=4, alpha=8), seed=0)
    torch.testing.assert_close(logits(model), logits(load_policy(tmp_path / "base")), atol=0, rtol=0)
    torch.manual_seed(1)
    for layer in adapted_layers(model).values():
        layer.lora_B["default"].weight.data.normal_(std=0.1)
    return model


def test_a_checkpoint_holds_the_merged_weights_and_adapters_that_peft_opens(
    adapted: PreTrainedModel, chat: Chat, tmp_path: Path
) -> None:
    run = Run(load_config(None, [f"output={tmp_path}/run"]))
    place = run.save_checkpoint(adapted, chat)
    base, expected = load_policy(tmp_path / "base"), logits(adapted)
    assert (expected - logits(base)).abs().max() > 0.1
    torch.testing.assert_close(logits(load_policy(place)), expected, atol=1e-4, rtol=1e-4)
    assert {name for name, _ in policy_weights(adapted)} == {name for name, _ in base.named_parameters()}
    opened = PeftModel.from_pretrained(load_policy(tmp_path / "base"), place / FOLDER)
    torch.testing.assert_close(logits(opened), expected, atol=1e-5, rtol=1e-5)
    restored = load_policy(tmp_path / "base")
    add_adapters(restored, LoraConfig(rank=4, alpha=8), seed=5)
    restore_weights(restored, place)
    assert torch.equal(logits(restored), expected)


def test_without_adapters_the_model_is_the_one_that_training_started_from(
    adapted: PreTrainedModel, tmp_path: Path
) -> None:
    with without_adapters(adapted) as reference:
        assert torch.equal(logits(reference), logits(load_policy(tmp_path / "base")))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 7 * 3  # A and B, of seven layers in each of three
    assert all(".lora_" in name and ".language_model." in name for name in trained)


def test_targets_are_layers_of_the_language_model(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model()
    add_adapters(model, LoraConfig(rank=2, targets=["q_proj", "down_proj"]), seed=0)
    assert {name.rpartition(".")[2] for name in adapted_layers(model)} == {"q_proj", "down_proj"}
    with pytest.raises(ConfigError, match=r"^lora.targets: got lm_head, qkv; must be all-linear, or of down_proj, "):
        add_adapters(make_model(), LoraConfig(rank=2, targets=["qkv", "lm_head", "q_proj"]), seed=0)


def test_without_peft_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r'^lora.rank: got 4, .* pip install "axpo\[lora\]"$'):
        check_adapters(LoraConfig(rank=4))
    check_adapters(LoraConfig())


def test_two_processes_train_adapters_as_one_does_and_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    one = train_interrupted(project, "one", *LORA)
    two = train(project, "two", *LORA, "parallel.processes=2")
    assert_learnt_alike(one, two)


def test_a_frozen_vision_tower_stays_as_it_is() -> None:
    config = load_config(None, ["model=miniature_sft", "train.vision=false"])
    model = build.load_model(config)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith("model.visual.")}
    pixels, grids = torch.rand(64, 1536), torch.tensor([[1, 8, 8]])
    assert not image_features(model, pixels, grids).pooler_output[0].requires_grad
    model.requires_grad_(True)
    assert image_features(model, pixels, grids).pooler_output[0].requires_grad
