"""Preflight with the package's tiny model, engine and tools: what is sound passes, each fault is told by its key."""

import asyncio
import json
import logging
import shutil
import time
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import axpo, mistake, succeed
from transformers import Qwen3Config, Qwen3ForCausalLM

from axpo import build, preflight
from axpo.config import MINIATURE, load_config
from axpo.engines.base import Generation, Request
from axpo.engines.local import LocalEngine
from axpo.miniature.base import BASE
from axpo.policy import ImageFeatures, image_features
from axpo.preflight import (
    PreflightError,
    agreement,
    answering_tools,
    checkpoint_bytes,
    disk_space,
    picture,
    sees_images,
    stable_template,
)
from axpo.run import Run
from axpo.tools.base import SystemFault, Toolbox, ToolResult
from axpo.tools.providers import Hit
from axpo.tools.python import make_python
from axpo.tools.search import make_search
from axpo.trainer import Trainer

QUESTIONS = [{"question": f"What is {n} + 2?", "answer": n + 2} for n in range(2)]
OPTIONS = [
    "threads=1",
    "tools={names: [zoom, search, python], corpus: miniature, sandbox: none_i_trust_the_policy, zoom_pixels: 16384}",
    "rollout={questions: 2, rollouts: 2, max_tokens: 8, max_context: 800}",
    "method={name: grpo}",
]
Usage = namedtuple("Usage", "free")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Trainer]:
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))

    def make(*overrides: str) -> Trainer:
        data = f"data.train={tmp_path / 'questions.jsonl'}"
        config = load_config(None, [*OPTIONS, data, f"output={tmp_path / 'run'}", *overrides])
        chat, model = build.load_chat(config), build.load_model(config)
        toolbox, questions = build.load_toolbox(config, chat), build.load_data(config).train
        assert questions is not None
        agent = build.training_agent(config, build.make_engine(config, model, chat), chat, toolbox)
        return Trainer(config, agent, model, questions)

    return make


@torch.no_grad()
def blind(model: Any) -> None:
    """Nothing of the vision encoder's output reaches the language model."""
    for merger in (model.model.visual.merger, *model.model.visual.deepstack_merger_list):
        merger.linear_fc2.weight.zero_()
        merger.linear_fc2.bias.zero_()


async def check(trainer: Trainer, folder: Path) -> None:
    await preflight.preflight(trainer.config, trainer.model, trainer.agent, folder)


def seen(trainer: Trainer) -> str | None:
    return sees_images(trainer.config, trainer.model, trainer.agent.chat)


def agreed(trainer: Trainer) -> str | None:
    return asyncio.run(agreement(trainer.config, trainer.model, trainer.agent))


def failures(trainer: Trainer, folder: Path) -> list[str]:
    with pytest.raises(PreflightError) as error:
        asyncio.run(check(trainer, folder))
    return str(error.value).splitlines()


# The whole ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("override", ["dtype=float32", "dtype=bfloat16", "train.autocast=true", "rollout.max_images=1"])
def test_what_is_sound_passes_within_seconds(make: Callable[..., Trainer], tmp_path: Path, override: str) -> None:
    trainer = make(override)
    started = time.process_time()
    asyncio.run(check(trainer, tmp_path))
    assert time.process_time() - started < 2


def test_training_goes_on_as_if_nothing_had_been_asked(make: Callable[..., Trainer], tmp_path: Path) -> None:
    async def first_step(trainer: Trainer, checked: bool) -> list[Any]:
        if checked:
            await check(trainer, tmp_path)
        drawing = await trainer.roll_out(0)
        segments = [segment for tree in drawing.trees for segment in tree.segments() if segment.logprobs is not None]
        return [(segment.ids.tolist(), segment.logprobs.tolist()) for segment in segments if len(segment)]

    checked, plain = (asyncio.run(first_step(make(), checked)) for checked in (True, False))
    assert checked == plain


def test_the_engine_remembers_nothing_of_it(make: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = make()
    counters = trainer.agent.engine.counters  # type: ignore[attr-defined]
    asyncio.run(check(trainer, tmp_path))
    agreed(trainer)  # asks again what it has asked
    assert counters.reused_tokens == 0
    agreed(trainer)
    assert counters.reused_tokens > 0


def test_all_failures_are_told_at_once(
    make: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make("tools.names=[zoom]")
    blind(trainer.model)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0))
    disk, model, hint = failures(trainer, tmp_path)
    assert disk.startswith(f"preflight: output: {tmp_path} has 0.0 GiB of free disk space, but 2 checkpoints of ")
    assert model.startswith("preflight: model: miniature does not see its images")
    assert hint == "preflight: the run has not begun; preflight=false begins it without these checks"


def test_a_text_only_model_has_no_images_to_see(make: Callable[..., Trainer], tmp_path: Path) -> None:
    folder = tmp_path / "text"
    build.load_chat(load_config(None, ["model=miniature"])).tokenizer.save_pretrained(folder)
    config = json.loads((BASE / "config.json").read_text())["text_config"]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    Qwen3ForCausalLM(
        Qwen3Config(vocab_size=config["vocab_size"], **sizes, num_key_value_heads=1, head_dim=8)
    ).save_pretrained(folder)
    trainer = make(f"model={folder}", "tools.names=[search]")
    assert seen(trainer) is None
    asyncio.run(check(trainer, tmp_path))


# Images ---------------------------------------------------------------------------------------------------------------


def test_a_model_without_vision_does_not_see(make: Callable[..., Trainer]) -> None:
    trainer = make()
    assert seen(trainer) is None
    blind(trainer.model)
    told = seen(trainer) or ""
    assert "by 0 with the one in a prompt, less than 0.001" in told
    assert "by 0 with the one in a tool's result, less than 0.001" in told
    assert seen(make("rollout.max_images=0")) is None


def test_a_model_that_sees_the_first_image_only_is_found_out(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_only(*arguments: Any) -> ImageFeatures:
        features = image_features(*arguments)
        first, *others = features.pooler_output
        deep = [[layer[0], *map(torch.zeros_like, layer[1:])] for layer in features.deepstack_features]
        return ImageFeatures([first, *map(torch.zeros_like, others)], deep)

    monkeypatch.setattr("axpo.policy.image_features", first_only)
    told = seen(make()) or ""
    assert "in a prompt" not in told
    assert "by 0 with the one in a tool's result" in told


# Template -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (  # as templates do that take a tool's result for a new question
            [("if message.role == 'user' -%}{%- set last", "if message.role in ('user', 'tool') -%}{%- set last")],
            "rewrites what came before: '<think>\\n' becomes 'I call.",
        ),
        (  # the same where the policy opens its thinking itself
            [
                ("if message.role == 'user' -%}{%- set last", "if message.role in ('user', 'tool') -%}{%- set last"),
                (
                    "'<|im_start|>assistant\\n<think>\\n' -}}\n{%- endif -%}",
                    "'<|im_start|>assistant\\n' -}}\n{%- endif -%}",
                ),
            ],
            "drops the thinking of a turn that called a tool",
        ),
        (
            [("{{- '<|im_start|>user\\n' + render", "{{- '<|im_start|>user\\n' ~ messages|length ~ ' ' ~ render")],
            "rewrites what came before: '1 ?",
        ),
        ([("'\\n<tool_response>\\n'", "'\\n<tool_response>\\n' ~ loop.index0 ~ ' '")], "writes a tool's result as '"),
        (
            [
                (
                    "{%- set start = 0 -%}",
                    "{%- if messages|length > 3 -%}{{ raise_exception('Too long.') }}{%- endif -%}",
                )
            ],
            "cannot render these messages: Too long.; ",
        ),
    ],
)
def test_templates_that_do_not_keep_what_they_wrote(changes: Sequence[tuple[str, str]], told: str) -> None:
    config = load_config(None, [f"model={MINIATURE}"])
    chat = build.load_chat(config)
    assert stable_template(chat, config) is None
    for old, new in changes:
        assert old in chat.tokenizer.chat_template
        chat.tokenizer.chat_template = chat.tokenizer.chat_template.replace(old, new)
    chat = type(chat)(chat.tokenizer, chat.image_processor)  # what is checked there already finds nothing
    found = stable_template(chat, config) or ""
    assert found.startswith(f"model: the chat template {told}")
    assert "mend chat_template.jinja of model miniature, so that it keeps turns" in found


# Engine ---------------------------------------------------------------------------------------------------------------


def test_an_engine_with_other_weights_disagrees(make: Callable[..., Trainer]) -> None:
    trainer = make()
    assert agreed(trainer) is None
    other = build.load_model(trainer.config)
    with torch.no_grad():
        other.model.language_model.layers[0].mlp.down_proj.weight.mul_(1.1)
    trainer.agent = replace(trainer.agent, engine=LocalEngine(other, trainer.agent.chat))
    told = agreed(trainer) or ""
    assert told.startswith("engine.name: the log-probs of the local engine and of the trainer differ by 0.")
    assert "more than 0.001. They do not compute the same model" in told


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_that_loses_the_tools_image_disagrees(make: Callable[..., Trainer], dtype: str) -> None:
    trainer = make(f"dtype={dtype}")
    generate = trainer.agent.engine.generate

    async def confused(request: Request) -> Generation:
        first, second = request.images
        assert first != second
        return await generate(replace(request, images=(first, first)))

    trainer.agent.engine.generate = confused  # type: ignore[method-assign]
    assert "do not compute the same model" in (agreed(trainer) or "")


def test_an_engine_that_tells_no_logprobs_disagrees(make: Callable[..., Trainer]) -> None:
    trainer = make()
    generate = trainer.agent.engine.generate

    async def silent(request: Request) -> Generation:
        answer = await generate(request)
        return replace(answer, logprobs=[float("nan")] * len(answer.ids))

    trainer.agent.engine.generate = silent  # type: ignore[method-assign]
    assert "differ by nothing that is known" in (agreed(trainer) or "")


def test_a_narrow_sampling_distribution_is_no_disagreement(make: Callable[..., Trainer]) -> None:
    trainer = make("rollout={top_k: 2, top_p: 0.5, temperature: 0.7, questions: 2, max_context: 4096}")
    assert agreed(trainer) is None


# Tools ----------------------------------------------------------------------------------------------------------------


class Wrong:
    """An interpreter that computes otherwise."""

    level = "none"

    def interpreter(self) -> "Wrong":
        return self

    async def start(self) -> None: ...

    async def run(self, code: str, timeout: float, images: Sequence[bytes] = ()) -> ToolResult:
        assert (code, len(images)) == ("print(1 + 1)", 1)
        return ToolResult("3")

    def close(self) -> None: ...


class Provider:
    longest = None

    def __init__(self, answer: Callable[[], list[Hit]], seconds: float = 0.0) -> None:
        self.answer, self.seconds = answer, seconds

    async def search(self, query: str, count: int) -> list[Hit]:
        await asyncio.sleep(self.seconds)
        return self.answer()


def down() -> list[Hit]:
    raise SystemFault("tavily refuses the key of TAVILY_API_KEY (401)", final=True)


def test_tools_that_do_not_answer_are_named_with_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(*tools: Any) -> list[str | None]:
        return asyncio.run(answering_tools(Toolbox(tools), picture(0)))

    python, search = answers(make_python(Wrong()), make_search(Provider(down)))
    assert python is not None
    assert python.startswith(
        "tools.sandbox: the tool 'python' answers '3' and 0 images to {'code': 'print(1 + 1)'}. Look at the address"
    )
    assert search is not None
    assert search.startswith(
        "tools.search: the tool 'search' does not answer: tavily refuses the key of TAVILY_API_KEY (401). Look"
    )
    assert answers(make_search(Provider(list))) == [None]  # it answers, if with nothing
    monkeypatch.setattr(preflight, "TOOL_SECONDS", 0.05)
    assert "has not answered after 0.05 s" in (answers(make_search(Provider(list, seconds=9)))[0] or "")


def test_a_users_tool_is_not_called(caplog: pytest.LogCaptureFixture) -> None:
    def search(query: str) -> str:
        """Delete everything.

        Args:
            query: What.
        """
        pytest.fail("it was called")

    caplog.set_level(logging.INFO, "axpo.preflight")
    assert asyncio.run(answering_tools(Toolbox([search]), picture(0))) == []
    assert caplog.messages == ["preflight does not call these tools: search"]


# Disk -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_is_as_large_as_is_said(make: Callable[..., Trainer], dtype: str) -> None:
    trainer = make(f"dtype={dtype}")
    for parameter in trainer.optimizer.parameters:
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    state = {"trainer": trainer.state()}
    place = Run(trainer.config).save_checkpoint(trainer.model, trainer.agent.chat, state=state)
    weights, rest = ((place / name).stat().st_size for name in ("model.safetensors", "training.pt"))
    assert checkpoint_bytes(trainer.model) == pytest.approx(weights + rest, rel=0.05)
    assert checkpoint_bytes(trainer.model, tuning=True) == pytest.approx(weights, rel=0.05)


def test_room_is_asked_for_two_checkpoints_less_the_one_that_lies_there(
    make: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make("train.steps=100", "train.save_every=10")
    size = checkpoint_bytes(trainer.model)

    def enough(free: int) -> bool:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free))
        return disk_space(trainer.config, trainer.model, tmp_path) is None

    assert enough(2 * size)
    assert not enough(2 * size - 1)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "weights").write_bytes(b"0" * 1000)
    assert enough(2 * size - 1000)
    (tmp_path / "checkpoint" / "weights").unlink()
    train = trainer.config.train.model_copy(update={"save_every": 0})
    trainer.config = trainer.config.model_copy(update={"train": train})
    assert enough(size)
    assert not enough(size - 1)


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "config.yaml").write_text(
        "{model: miniature, output: run, threads: 1, data: {train: questions.jsonl}, method: grpo,\n"
        " rollout: {questions: 2, rollouts: 2, max_tokens: 4, max_context: 800}, train: {steps: 1, save_every: 1}}\n"
    )
    return tmp_path


def test_a_command_tells_what_is_wrong_and_leaves_no_folder(project: Path) -> None:
    shutil.copytree(BASE, project / "blind")
    model = build.load_model(load_config(None, ["model=miniature"]))
    blind(model)
    model.save_pretrained(project / "blind")
    told = mistake("train", project / "config.yaml", f"model={project / 'blind'}")
    assert told.startswith(f"error: preflight: model: {project / 'blind'} does not see its images")
    assert not (project / "run").exists()
    succeed("train", project / "config.yaml", f"model={project / 'blind'}", "preflight=false")


@pytest.mark.parametrize("command", ["eval", "diagnose"])
def test_nothing_is_measured_of_a_model_that_does_not_see(project: Path, command: str) -> None:
    succeed("train", project / "config.yaml", "train.steps=0", "tools={names: [zoom], zoom_pixels: 16384}")
    run = project / "run"
    questions = project / "questions.jsonl"
    arguments = [run, f"data.eval={questions}"] if command == "eval" else [run, questions, "--questions", 1]
    config = load_config(run / "config.yaml", [f"model={run / 'checkpoint'}"])
    model = build.load_model(config)
    blind(model)
    model.save_pretrained(run / "checkpoint")
    told = mistake(command, *arguments)
    assert told.startswith(f"error: preflight: model: {run / 'checkpoint'} does not see its images")
    assert not (run / command).exists()
    succeed(command, *arguments, "preflight=false")


def test_fine_tuning_is_checked_too(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [{"role": "assistant", "content": "Hm.\n</think>\n\n<answer>2</answer>"}]
    (project / "sft.jsonl").write_text(json.dumps({**QUESTIONS[0], "turns": turns}) + "\n")
    arguments = ["sft", project / "config.yaml", f"data.sft={project / 'sft.jsonl'}", "sft={steps: 1, batch: 1}"]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(0))
        assert "0.0 GiB of free disk space, but 1 checkpoint of " in mistake(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(preflight, "SEEN", 1e9)
        told = mistake(*arguments)
    assert told.startswith("error: preflight: model: miniature does not see its images")
    assert not (project / "run").exists()
    succeed(*arguments)


def test_a_run_that_is_resumed_is_checked_and_kept(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    succeed("train", project / "config.yaml")
    run = project / "run"
    (run / "run.json").write_text('{"command": "train", "ended": false}')
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("steps: 1\n", "steps: 2\n"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(0))
        assert "error: preflight: output: " in mistake("resume", run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert axpo("resume", run).exit_code == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
