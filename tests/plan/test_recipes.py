"""Every recipe of examples/ is planned at the published shapes, and takes a step on a small model of its structure."""

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from commands import axpo, succeed
from plan.published import CONFIGS, write_checkpoint
from processes import lines
from processes import succeed as succeed_in_processes
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

from axpo.chat import Chat
from axpo.config import Config, load_config
from axpo.drawing import Drawing
from axpo.plan.memory import GIB
from axpo.plan.planning import Plan, make_plan
from axpo.plan.shapes import Shape, image_pixels, load_shape
from axpo.questions import DataError, load_questions, load_trajectories
from axpo.rewards.verify import verify
from axpo.sft import check_calls, trajectory_tree
from axpo.trainer import Trainer
from axpo.tree import Outcome, StopReason

EXAMPLES = Path(__file__).parents[2] / "examples"
README = (EXAMPLES / "README.md").read_text()
RECIPES = sorted(path.stem for path in EXAMPLES.glob("qwen3*.yaml"))
ROWS = {"2B": "qwen3_vl_2b", "4B": "qwen3_vl_4b", "8B": "qwen3_vl_8b", "text": "qwen3_text"}


def model_of(recipe: str) -> str:
    return re.sub("_(sft|grpo)$", "", recipe)


def readme_overrides() -> Iterator[tuple[str, int, str]]:
    """Recipe, GPUs and overrides of each cell of the table in examples/README.md."""
    lines = README.splitlines()
    (head,) = (line for line in lines if line.startswith("| | 8 GPUs"))
    gpus = [int(number) for number in re.findall(r"(\d) GPU", head)]
    for line in lines:
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        for recipe in RECIPES if name in ROWS else []:
            if model_of(recipe) == ROWS[name]:
                yield from ((recipe, number, cell.strip("`-")) for number, cell in zip(gpus, cells, strict=True))


def test_all_recipes_are_there_and_in_the_table():
    models = [f"qwen3_vl_{size}b" for size in (2, 4, 8)]
    assert sorted(["qwen3_text", *(m + end for m in models for end in ("", "_grpo", "_sft"))]) == RECIPES
    assert sorted({(recipe, gpus) for recipe, gpus, _ in readme_overrides()}) == sorted(
        (recipe, gpus) for recipe in RECIPES for gpus in (1, 2, 4, 8)
    )


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Config, Plan]]:
    """Plans a recipe with overrides on GPUs of 79 GiB, at its model's published shape."""

    @cache
    def measured(model: str) -> tuple[Path, Shape, int]:
        folder = write_checkpoint(tmp_path_factory.mktemp(model), CONFIGS[model])
        config = load_config(None, [f"model={folder}", "max_pixels=1048576"])
        shape = load_shape(config)
        return folder, shape, image_pixels(config) if shape.vision else 0

    def plan(recipe: str, *overrides: str) -> tuple[Config, Plan]:
        folder, shape, pixels = measured(model_of(recipe))
        config = load_config(EXAMPLES / f"{recipe}.yaml", [f"model={folder}", *overrides])
        return config, make_plan(config, shape, pixels, 79 * GIB)

    return plan


@pytest.mark.parametrize(("recipe", "gpus", "overrides"), list(readme_overrides()))
def test_a_recipe_fits_as_the_readme_says(
    recipe: str, gpus: int, overrides: str, planned: Callable[..., tuple[Config, Plan]]
):
    tuning = recipe.endswith("_sft")
    config, plan = planned(recipe, *overrides.split())
    assert config.parallel.processes == gpus
    assert tuning or config.engine.name == "vllm"
    assert plan.tuning == tuning
    assert not plan.excess


def test_the_config_of_ones_own_fits_a_gpu(tmp_path: Path):
    """It is no recipe: its model, tools and data are the reader's."""
    folder = write_checkpoint(tmp_path / "model", CONFIGS["qwen3_vl_2b"])
    given = (EXAMPLES / "own_model.yaml", f"model={folder}", "tools.names=[zoom, python]", "--gpu-memory", 79)
    assert "It fits" in succeed("plan", *given).stdout


@pytest.mark.parametrize("recipe", ["qwen3_vl_8b", "qwen3_vl_8b_sft", "qwen3_text"])
def test_the_command_plans_a_recipe(recipe: str, tmp_path: Path):
    folder = write_checkpoint(tmp_path / "model", CONFIGS[model_of(recipe)])
    result = succeed("plan", EXAMPLES / f"{recipe}.yaml", f"model={folder}", "--gpu-memory", 79)
    assert "It fits" in result.stdout


def test_the_manual_shows_what_the_command_prints(tmp_path: Path):
    folder = write_checkpoint(tmp_path / "model", CONFIGS["qwen3_vl_8b"])
    given = (EXAMPLES / "qwen3_vl_8b.yaml", f"model={folder}", "--gpu-memory")
    manual = (EXAMPLES.parent / "docs" / "plan.md").read_text()
    shown = [line.strip() for line in manual.splitlines() if line.startswith("    ") and "axpo plan" not in line]
    printed = [line.strip() for line in succeed("plan", *given, 79).stdout.splitlines()]
    fits = shown.index("It fits: the start takes 52.9 GiB, and 75.0 GiB can be used.")
    assert fits > 9
    assert set(shown[: fits + 1]) <= {*printed, "…"}
    refused = axpo("plan", *given, 48)
    assert refused.exit_code == 1
    (error,) = (" ".join(shown[i : i + 2]) for i, line in enumerate(shown) if line.startswith("error: "))
    assert refused.stderr.strip() == error


def test_how_large_packs_may_be_is_as_the_readme_says(planned: Callable[..., tuple[Config, Plan]]):
    (told,) = re.findall(r"up to ([\d,]+) tokens for the 8B model and ([\d,]+) for\s+the 4B", README)
    for size, number in zip("84", told, strict=True):
        largest = int(number.replace(",", ""))
        assert not planned(f"qwen3_vl_{size}b", f"train.pack_tokens={largest}")[1].excess
        assert planned(f"qwen3_vl_{size}b", f"train.pack_tokens={largest + 1024}")[1].excess


def test_more_for_vllm_is_room_for_as_many_rollouts_as_the_readme_says(tmp_path: Path):
    (told,) = re.findall(
        r"`(vllm\.memory=[\d.]+)` fits too, .* room for (\d+) of\s+the\s+longest .* in place of (\d+)", README
    )
    folder = write_checkpoint(tmp_path / "model", CONFIGS["qwen3_vl_8b"])
    given = ("plan", EXAMPLES / "qwen3_vl_8b.yaml", f"model={folder}", "--gpu-memory", 79)
    for override, number in ((told[0], told[1]), ("threads=", told[2])):
        assert f"room for {number} rollouts of the longest at once.\nIt fits" in succeed(*given, override).stdout


def test_the_lines_of_the_readme_are_read(tokenizer: PreTrainedTokenizerFast, image_processor: Any, tmp_path: Path):
    blocks = re.findall(r'^      (\{"question".*(?:\n        .*)*)', README, re.MULTILINE)
    question, trajectory = (" ".join(line.strip() for line in block.splitlines()) for block in blocks)
    for name, line in (("train", question), ("sft", trajectory)):
        (tmp_path / f"{name}.jsonl").write_text(line + "\n")
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (asked,) = load_questions(tmp_path / "train.jsonl")
    assert (len(asked.images), asked.answer) == (1, "7")
    (learned,) = load_trajectories(tmp_path / "sft.jsonl")
    chat = Chat(tokenizer, image_processor)
    assert chat.opens_thinking
    tree = trajectory_tree(learned, chat, [])
    check_calls([tree], ["python"])
    with pytest.raises(DataError, match=r"turns of data.sft call 'python' \(1 trajectories\)"):
        check_calls([tree], ["search"])
    answer = chat.parse(tree.leaves()[0].ids.tolist()).answer
    assert verify(answer, learned.question.answer).score == 1


def test_offload_takes_as_much_of_the_host_as_the_readme_says(planned: Callable[..., tuple[Config, Plan]]):
    (told,) = re.findall(r"about (\d+) GiB for the 8B model, twice that with two processes", README)
    given = ("parallel.sharding=none", "parallel.offload=true")
    for processes in (1, 2):
        plan = planned("qwen3_vl_8b", f"parallel.processes={processes}", *given)[1]
        assert plan.host / GIB == pytest.approx(processes * int(told), rel=0.05)


# A step ---------------------------------------------------------------------------------------------------------------

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "depth": 4,
    "out_hidden_size": 32,
    "deepstack_visual_indexes": [0, 1, 2],
}
SMOKE = [
    "device=cpu",
    "threads=1",
    "max_pixels=16384",
    "engine.name=local",
    "tools.sandbox=none_i_trust_the_policy",
    "tools.search=local",
    "tools.corpus=miniature",
    "rollout.questions=2",
    "rollout.max_tokens=6",
    "train.steps=1",
    "sft.steps=1",
    "sft.batch=2",
    "preflight=false",
]
# That bfloat16 shows.
LARGE_STEP = [f"{kind}.{key}" for kind in ("train", "sft") for key in ("warmup_steps=0", "learning_rate=0.01")]


def shrunk(recipe: str, tokenizer: PreTrainedTokenizerFast, image_processor: Any, folder: Path) -> Path:
    """A checkpoint with random weights: the published config with small widths and this tokenizer's ids."""
    token = tokenizer.convert_tokens_to_ids
    config = json.loads(json.dumps(CONFIGS[model_of(recipe)]))
    sees = "vision_config" in config
    text = config["text_config"] if sees else config
    text |= SMALL | {"vocab_size": len(tokenizer) + 6, "eos_token_id": None, "bos_token_id": None}
    if sees:
        text["rope_scaling"]["mrope_section"] = [4, 2, 2]
        config["vision_config"] |= TOWER
        config |= {"image_token_id": token("<|image_pad|>"), "video_token_id": token("<|video_pad|>")}
        config |= {"vision_start_token_id": token("<|vision_start|>"), "vision_end_token_id": token("<|vision_end|>")}
    torch.manual_seed(0)
    family = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    family.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16).save_pretrained(folder)
    Chat(tokenizer, image_processor if sees else None).save(folder)
    return folder


def write_data(folder: Path, sees: bool) -> None:
    rows = []
    for index in range(2):
        noise = np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).save(folder / f"{index}.png")
        row: dict[str, Any] = {"question": ("<image> " if sees else "") + f"What is it, {index}?", "answer": "7"}
        rows.append(row | ({"images": [f"{index}.png"]} if sees else {}))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns = [{"role": "assistant", "content": "Hm.\n</think>\n\n<answer>7</answer>"}]
    (folder / "trajectories.jsonl").write_text("".join(json.dumps(row | {"turns": turns}) + "\n" for row in rows))


def moved(before: Path, after: Path) -> set[str]:
    """The names of the weights that training has changed."""
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    return {name for name in old if not torch.equal(old[name], new[name])}


@pytest.fixture
def mixed_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second rollout is right: of random weights all are wrong, and would teach nothing."""
    roll_out = Trainer.roll_out

    async def rewarded(self: Trainer, number: int) -> Drawing:
        drawing = await roll_out(self, number)
        for tree in drawing.drawn.values():
            for index, leaf in enumerate(tree.leaves()):
                leaf.outcome = Outcome(StopReason.ANSWER, float(index % 2))
        return drawing

    monkeypatch.setattr(Trainer, "roll_out", rewarded)


@pytest.mark.usefixtures("mixed_rewards")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_takes_a_step(recipe: str, tokenizer: PreTrainedTokenizerFast, image_processor: Any, tmp_path: Path):
    model = shrunk(recipe, tokenizer, image_processor, tmp_path / "model")
    write_data(tmp_path, sees=recipe != "qwen3_text")
    kind, data = ("sft", "trajectories") if recipe.endswith("_sft") else ("train", "train")
    run = tmp_path / "run"
    given = [f"model={model}", f"output={run}", f"data.{kind}={tmp_path / data}.jsonl", *SMOKE]
    given += [*LARGE_STEP, "parallel.processes=1", "parallel.sharding=none"]
    succeed(kind, EXAMPLES / f"{recipe}.yaml", *given)
    step = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    if kind == "sft":
        assert step["trained_tokens"] > 10
    else:
        assert step["rollouts"] >= 16
    changed = moved(model, run / "checkpoint")
    assert changed
    assert not any("visual" in name for name in changed)


@pytest.mark.parametrize("recipe", ["qwen3_vl_8b", "qwen3_vl_8b_sft"])
def test_a_recipe_takes_a_step_in_processes_that_share_weights(
    recipe: str, tokenizer: PreTrainedTokenizerFast, image_processor: Any, tmp_path: Path
):
    model = shrunk(recipe, tokenizer, image_processor, tmp_path / "model")
    write_data(tmp_path, sees=True)
    kind, data = ("sft", "trajectories") if recipe.endswith("_sft") else ("train", "train")
    run = tmp_path / "run"
    given = [f"model={model}", f"output={run}", f"data.{kind}={tmp_path / data}.jsonl", *SMOKE]
    given += LARGE_STEP
    succeed_in_processes(kind, EXAMPLES / f"{recipe}.yaml", *given, "parallel.processes=2")
    assert load_config(run / "config.yaml").parallel.sharding == "full"
    [step, *_] = lines(run)
    if kind == "train":  # all rollouts of these random weights are wrong, and teach nothing
        assert step["trained_tokens"] > 16
        return
    changed = moved(model, run / "checkpoint")
    assert changed
    assert not any("visual" in name for name in changed)
