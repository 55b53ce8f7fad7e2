import io
import re
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLForConditionalGeneration,
)

from axpo.attention import TreeMask
from axpo.chat import Chat
from axpo.config import ConfigError
from axpo.parallel import Ranks
from axpo.policy import (
    PolicyError,
    banned_tokens,
    forward_hidden,
    forward_logits,
    image_features,
    load_policy,
    output_head,
    policy_logprobs,
    same_weights,
    start_fingerprint,
    update_forward,
    use_tree_attention,
    vocabulary_size,
)
from axpo.positions import mrope_positions


def noise(width: int, height: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.effect_noise((width, height), 90).convert("RGB").save(file, "PNG")
    return file.getvalue()


def causal(length: int) -> torch.Tensor:
    return torch.ones(1, 1, length, length, dtype=torch.bool).tril()


@pytest.fixture
def seen(chat: Chat) -> dict[str, torch.Tensor]:
    """A prompt with two images, as the model's own forward takes it."""
    content = [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}]
    ids, images = chat.prompt([{"role": "user", "content": content}], [noise(64, 96), noise(96, 64)], [])
    pixels, grids = chat.pixels(images)
    positions, _ = mrope_positions(ids, images, chat.image_token_id or -1, chat.merge_size)
    return {
        "ids": torch.tensor([ids]),
        "positions": torch.from_numpy(positions)[:, None],
        "pixels": pixels,
        "grids": grids,
    }


@torch.no_grad()
def test_forward_equals_the_models_own(tiny_model: Any, seen: dict[str, torch.Tensor]) -> None:
    ids = seen["ids"]
    expected = tiny_model(
        input_ids=ids,
        mm_token_type_ids=(ids == tiny_model.config.image_token_id).int(),
        pixel_values=seen["pixels"],
        image_grid_thw=seen["grids"],
    ).logits
    tiny_model.model.rope_deltas = torch.tensor([[1234]])
    mask = causal(ids.shape[1])
    features = image_features(tiny_model, seen["pixels"], seen["grids"])
    additive = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    for images in ((seen["pixels"], seen["grids"]), features):
        for how in (mask, additive):
            logits = forward_logits(tiny_model, ids, seen["positions"], how, images)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    kept = forward_logits(tiny_model, ids, seen["positions"], mask, features, keep=torch.tensor([3, -1]))
    torch.testing.assert_close(kept, expected[:, [3, -1]], rtol=0, atol=1e-5)
    assert tiny_model.model.rope_deltas.item() == 1234
    tiny_model.set_attn_implementation("eager")  # adds a mask to the scores, so a boolean one would say nothing
    logits = forward_logits(tiny_model, ids, seen["positions"], mask, features)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_hidden_states_times_the_head_are_the_logits(tiny_model: Any, seen: dict[str, torch.Tensor]) -> None:
    given = (tiny_model, seen["ids"], seen["positions"], causal(seen["ids"].shape[1]), (seen["pixels"], seen["grids"]))
    keep = torch.tensor([3, 5, 8])
    hidden = forward_hidden(*given, keep)
    assert hidden.shape == (1, 3, 32)
    torch.testing.assert_close(hidden @ tiny_model.lm_head.weight.T, forward_logits(*given, keep))
    assert not tiny_model.lm_head._forward_pre_hooks


@torch.no_grad()
def test_logits_that_are_more_than_the_heads_are_refused_for_training() -> None:
    config = GraniteConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        logits_scaling=8.0,
    )
    model = GraniteForCausalLM(config).eval()
    positions = torch.arange(4).expand(3, 1, 4)
    with pytest.raises(PolicyError, match="output head"):
        forward_hidden(model, torch.tensor([[4, 8, 15, 16]]), positions, causal(4), None, torch.tensor([3]))


def gradients(model: Any, seen: dict[str, torch.Tensor], **how: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    mask = causal(seen["ids"].shape[1])
    with update_forward(model, **how):
        logits = forward_logits(model, seen["ids"], seen["positions"], mask, (seen["pixels"], seen["grids"]))
    logits.double().square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach(), found


def test_checkpointing_computes_the_layers_again_for_equal_gradients(
    tiny_model: Any, seen: dict[str, torch.Tensor]
) -> None:
    model = tiny_model.double()
    layers = [*model.model.language_model.layers, *model.model.visual.blocks]
    calls: list[object] = []
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda module, _: calls.append(module))
    logits, plain = gradients(model, seen)
    assert len(calls) == len(layers)
    again, checkpointed = gradients(model, seen, checkpointing=True)
    assert len(calls) == 3 * len(layers)
    torch.testing.assert_close(again, logits, atol=1e-9, rtol=0)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-9, rtol=0)
    gradients(model, seen)
    assert len(calls) == 4 * len(layers)  # outside nothing is left of it
    assert not model.training


def test_checkpointing_needs_layers(tiny_model: Any) -> None:
    with pytest.raises(PolicyError, match="gradient checkpointing"), update_forward(tiny_model.lm_head, True):
        pass


def test_autocast_computes_in_bfloat16_over_float32_weights(tiny_model: Any, seen: dict[str, torch.Tensor]) -> None:
    kinds: list[torch.dtype] = []
    tiny_model.model.language_model.layers[1].mlp.down_proj.register_forward_hook(lambda *a: kinds.append(a[2].dtype))
    exact, plain = gradients(tiny_model, seen)
    logits, rounded = gradients(tiny_model, seen, autocast=True)
    assert kinds == [torch.float32, torch.bfloat16]
    assert 1e-4 < (logits - exact).norm() / exact.norm() < 0.03
    for name, gradient in plain.items():
        assert rounded[name].dtype == torch.float32
        if gradient.norm() > 1e-6:
            assert (rounded[name] - gradient).norm() < 0.2 * gradient.norm(), name
    gradients(tiny_model, seen)
    assert kinds[-1] == torch.float32


def test_gradients_reach_the_vision_encoder(tiny_model: Any, seen: dict[str, torch.Tensor]) -> None:
    mask = causal(seen["ids"].shape[1])
    forward_logits(tiny_model, seen["ids"], seen["positions"], mask, (seen["pixels"], seen["grids"])).sum().backward()
    assert tiny_model.model.visual.patch_embed.proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_text_only_model(tmp_path: Path) -> None:
    config = Qwen3Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    model = load_policy(tmp_path)
    ids = torch.tensor([[4, 8, 15, 16, 23, 42]])
    positions = torch.arange(6).expand(3, 1, 6)
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(forward_logits(model, ids, positions, causal(6)), expected)
    # A tree whose one branch is [4, 8, 15] and the other [4, 8, 23].
    until, tree = torch.tensor([4, 4, 3, 4]), torch.tensor([[4, 8, 15, 23]])
    places = torch.tensor([0, 1, 2, 2]).expand(3, 1, 4)
    packed = forward_logits(model, tree, places, TreeMask(until))
    torch.testing.assert_close(packed[:, :3], expected[:, :3])
    other = model(input_ids=torch.tensor([[4, 8, 23]])).logits
    torch.testing.assert_close(packed[:, 3], other[:, 2])


def test_a_model_that_attends_in_a_way_of_its_own_is_refused(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tiny_model), "_supports_attention_backend", False)
    with pytest.raises(PolicyError, match="attention interface"):
        use_tree_attention(tiny_model)


def test_logprobs_golden() -> None:
    logits = torch.tensor([[0.0, 2.0, 5.0], [1.0, 1.0, 9.0]])
    logprobs = policy_logprobs(logits, torch.tensor([2]), temperature=2.0)
    e = 2.718281828
    expected = torch.tensor([[1 / (1 + e), e / (1 + e), 0.0], [0.5, 0.5, 0.0]])
    torch.testing.assert_close(logprobs.exp(), expected)


def test_logprobs_keep_float64_and_widen_bfloat16() -> None:
    for given, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        assert policy_logprobs(torch.zeros(1, 3, dtype=given), torch.tensor([0])).dtype == expected


def test_logprobs_have_finite_gradients_beside_banned_ids() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    policy_logprobs(logits, torch.tensor([2]))[0, 0].backward()
    share = torch.tensor([0.0, 1.0]).softmax(0)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[1 - share[0], -share[1], 0.0]]))


def test_banned_tokens_cover_the_padded_vocabulary(tiny_model: Any, chat: Chat) -> None:
    banned = banned_tokens(chat, tiny_model).tolist()
    assert banned == [*chat.banned_ids, *range(len(chat.tokenizer), vocabulary_size(tiny_model))]
    assert vocabulary_size(tiny_model) == len(chat.tokenizer) + 6
    assert chat.stop_id not in banned


def test_load_policy(tiny_model: Any, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    loaded = load_policy(tmp_path, dtype=torch.float64)
    assert type(loaded) is type(tiny_model)
    assert loaded.dtype == torch.float64
    assert not loaded.training
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(PolicyError, match="not a checkpoint that can be opened"):
        load_policy(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(PolicyError, match=r"holds no config\.json"):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    ("tied", "lost", "said"),
    [
        (True, "model.visual.", r"lacks \d+ of the weights of Qwen3VLForConditionalGeneration: model.visual.*, …$"),
        (False, "lm_head.weight", "lacks 1 of the weights of Qwen3VLForConditionalGeneration: lm_head.weight$"),
        (True, "lm_head.weight", None),
    ],
)
def test_weights_that_a_checkpoint_lacks_are_not_made_up(
    tmp_path: Path, tiny_model: Any, tied: bool, lost: str, said: str | None
) -> None:
    tiny_model.config.tie_word_embeddings = tiny_model.config.text_config.tie_word_embeddings = tied
    weights = {name: weight.clone() for name, weight in tiny_model.state_dict().items() if not name.startswith(lost)}
    tiny_model.config.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if said is None:
        assert torch.equal(output_head(load_policy(tmp_path)).weight, output_head(tiny_model).weight)
    else:
        with pytest.raises(PolicyError, match=re.escape(str(tmp_path)) + " " + said):
            load_policy(tmp_path)


def test_processes_that_have_loaded_different_weights_do_not_train_together(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = start_fingerprint(tiny_model)
    for factor in (1.0, 1.01):
        ranks = Ranks(0, 2)
        monkeypatch.setattr(ranks, "all", lambda value, factor=factor: [value, factor * value])
        if factor == 1.0:
            assert same_weights(start_fingerprint(tiny_model, ranks), own)
        else:
            with pytest.raises(ConfigError, match="process 1 of the training has loaded other weights than process 0"):
                start_fingerprint(tiny_model, ranks)


def test_weights_that_were_cut_off_are_named(tmp_path: Path, tiny_model: Qwen3VLForConditionalGeneration) -> None:
    tiny_model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(PolicyError, match=re.escape(str(tmp_path))):
        load_policy(tmp_path)
