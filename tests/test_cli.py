"""Every command through its real entry, with the package's tiny model: a user's own run, and a user's mistakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import yaml
from transformers import Qwen3VLForConditionalGeneration
from typer.testing import CliRunner, Result

from axpo import build, cli
from axpo.chat import Chat
from axpo.config import load_config
from axpo.miniature import quickstart
from axpo.miniature.base import BASE
from axpo.storage import load_trees
from axpo.tree import Kind

TOOL = '''
def count_letters(text: str) -> str:
    """Count the letters of a text.

    Args:
        text: The text.
    """
    return str(len(text))
'''
QUESTIONS: list[dict[str, Any]] = [
    {"question": "<image>Which digit?", "answer": "4", "images": ["0.png"], "family": "digits", "id": "zero"},
    {"question": "Which colour is it?", "answer": ["red", "crimson"], "images": ["1.png"], "family": "colours"},
    {"question": "What is 2 + 2?", "answer": 4},
]
CALL = '<tool_call>\n{"name": "count_letters", "arguments": {"text": "red"}}\n</tool_call>'
TRAJECTORIES: list[dict[str, Any]] = [
    {
        **QUESTIONS[0],
        "turns": [
            {"role": "assistant", "content": f"<think>Count.</think>{CALL}"},
            {"role": "tool", "content": "3", "images": ["1.png"]},
            {"role": "assistant", "content": "<think>So</think>4"},
        ],
    },
    {**QUESTIONS[2], "turns": [{"role": "assistant", "content": "<think>Easy.</think>4"}]},
]
CONFIG: dict[str, Any] = {
    "model": "miniature",
    "output": "run",
    "threads": 1,
    "max_pixels": 16384,
    "data": {"train": "questions.jsonl", "eval": "questions.jsonl", "sft": "trajectories.jsonl"},
    "tools": {"names": ["count.py"]},
    "rollout": {"questions": 2, "rollouts": 2, "max_tokens": 8, "max_context": 800},
    "method": {"budget": 1, "continuations": 2},
    "train": {"steps": 1, "warmup_steps": 0, "save_every": 0},
    "sft": {"steps": 2, "batch": 2},
    "eval": {"samples": 2},
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_project(folder: Path) -> Path:
    """A user's own questions with images, a tool and a config; returns the config."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(2):
        noise = np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).save(folder / f"{index}.png")
    write_rows(folder / "questions.jsonl", QUESTIONS)
    write_rows(folder / "trajectories.jsonl", TRAJECTORIES)
    (folder / "count.py").write_text(TOOL)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    return config


def axpo(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Result:
    result = axpo(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def mistake(*arguments: object) -> str:
    """The message of a command that a user's mistake ends."""
    result = axpo(*arguments)
    assert (result.exit_code, type(result.exception)) == (2, SystemExit), result.output + repr(result.exception)
    lines = result.stderr.splitlines()
    assert all(line.startswith(("error: ", "warning: ")) for line in lines), result.stderr
    return result.stderr


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return write_project(tmp_path)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrong must be found before weights are loaded, and before a run folder is made."""

    def refuse(*arguments: object) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr(build, "load_model", refuse)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    config = write_project(tmp_path_factory.mktemp("trained"))
    return config.parent / "run", succeed("train", config)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def opens(checkpoint: Path) -> None:
    model = Qwen3VLForConditionalGeneration.from_pretrained(checkpoint)
    assert Chat.from_pretrained(checkpoint).stop_id < model.config.text_config.vocab_size


# What goes well -------------------------------------------------------------------------------------------------------


def test_train_leaves_a_whole_run_folder(trained: tuple[Path, Result]):
    run, result = trained
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "trees",
        "checkpoint",
    }
    step, evaluation = metrics(run)
    assert (step["stage"], step["step"], evaluation["stage"]) == ("axpo", 1, "eval")
    assert step["rollouts"] >= 4
    trees = load_trees(run / "trees" / "step_00001.parquet")
    assert len(trees) == 2
    assert all(len(tree.base_leaves()) == 2 for tree in trees)
    assert {tree.question_id for tree in load_trees(run / "trees" / "eval_axpo.parquet")} == {
        "zero",
        "questions.jsonl:2",
        "questions.jsonl:3",
    }
    summary = json.loads((run / "summary.json").read_text())["axpo"]
    assert (summary["questions"], summary["samples"]) == (3, 2)
    assert set(summary["families"]) <= {"digits", "colours"}
    assert load_config(run / "config.yaml").data.train == run.parent / "questions.jsonl"
    opens(run / "checkpoint")
    assert "AXPO" in result.stdout
    assert "axpo: 1/1 in " in result.stdout
    assert result.stderr == ""


def test_the_prompt_lists_the_users_tool(trained: tuple[Path, Result]):
    run, _ = trained
    chat = Chat.from_pretrained(run / "checkpoint")
    tree = load_trees(run / "trees" / "step_00001.parquet")[0]
    assert "count_letters" in chat.tokenizer.decode(tree.root.ids)


def test_eval_writes_a_new_folder_each_time_and_touches_nothing_else(trained: tuple[Path, Result]):
    run, _ = trained
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    result = succeed("eval", run, "eval.samples=1", "eval.questions=2")
    succeed("eval", run, "eval.samples=1", "eval.questions=1")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for name, questions in (("eval", 2), ("eval-2", 1)):
        summary = json.loads((run / name / "summary.json").read_text())["checkpoint"]
        assert (summary["questions"], summary["samples"]) == (questions, 1)
        assert len(load_trees(run / name / "trees" / "eval_checkpoint.parquet")) == questions
        assert load_config(run / name / "config.yaml").eval.questions == questions
        shutil.rmtree(run / name)
    assert "CHECKPOINT" in result.stdout
    assert "Pass@1" in result.stdout


def test_eval_repeats_what_training_measured(trained: tuple[Path, Result]):
    run, _ = trained
    succeed("eval", run)
    again = json.loads((run / "eval" / "summary.json").read_text())["checkpoint"]
    shutil.rmtree(run / "eval")
    assert again == json.loads((run / "summary.json").read_text())["axpo"]


def test_train_without_evaluation_writes_no_summary(project: Path):
    result = succeed("train", project, "data.eval=", "method.name=grpo")
    run = project.parent / "run"
    assert [figures["stage"] for figures in metrics(run)] == ["grpo"]
    assert not (run / "summary.json").exists()
    assert str(run) in result.stdout


def test_sft_learns_the_trajectories(project: Path):
    succeed("sft", project, "sft.steps=12", "sft.learning_rate=1e-3", "sft.warmup_steps=0")
    run = project.parent / "run"
    losses = [figures["loss"] for figures in metrics(run)]
    assert len(losses) == 12
    assert losses[-1] < 0.7 * losses[0]
    opens(run / "checkpoint")
    assert "it holds no checkpoint" not in succeed("eval", run, "eval.samples=1").output


def test_sft_can_imitate_the_miniatures_teacher(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quickstart, "TEACHER_PROBLEMS", 2)
    tools = ["data.sft=miniature", "tools.names=[zoom, python, search]", "tools.corpus=miniature"]
    succeed("sft", project, *tools, "sft.steps=1", "tools.zoom_pixels=16384")
    assert [figures["stage"] for figures in metrics(project.parent / "run")] == ["sft"]
    assert "tools.names: the teacher" in mistake("sft", project, "data.sft=miniature", "output=other")


def test_quickstart_goes_from_the_base_to_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "TEACHER_PROBLEMS", 2)
    monkeypatch.setattr(build, "MINIATURE_QUESTIONS", 2)
    monkeypatch.setattr(build, "MINIATURE_HELD_OUT", 2)
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "metrics.jsonl").touch()
    small = ["threads=1", "sft.steps=1", "sft.batch=1", "train.steps=1", "rollout.questions=2", "rollout.rollouts=2"]
    small += ["rollout.max_tokens=8", "method.budget=0.5", "method.continuations=2", "eval.questions=2"]
    result = succeed("quickstart", *small, "eval.samples=2")
    run = tmp_path / "runs" / "quickstart-2"
    assert list(json.loads((run / "summary.json").read_text())) == ["sft", "axpo"]
    assert [figures["stage"] for figures in metrics(run)] == ["sft", "eval", "axpo", "eval"]
    opens(run / "checkpoint")
    for told in ("SFT", "AXPO", "axpo eval runs/quickstart-2", str(run)):
        assert told in result.stdout
    assert succeed("eval", run, "--checkpoint", "sft", "eval.samples=1").exit_code == 0
    assert json.loads((run / "eval" / "summary.json").read_text()).keys() == {"sft"}


def test_help_and_mistakes_in_a_config_come_without_torch():
    program = (
        "import sys\nfrom axpo.cli import main\n"
        "try: main()\nfinally: print({'torch', 'transformers'} & set(sys.modules), file=sys.stderr)"
    )
    for arguments, told in (["--help"], "quickstart"), (["quickstart", "sed=1"], "did you mean seed?"):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
        assert told in done.stdout + done.stderr
        assert done.stderr.splitlines()[-1] == "set()"


def test_an_interrupted_run_is_usable(project: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", "from axpo.cli import main; main()", "train", str(project), "train.steps=100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    run = project.parent / "run"
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.splitlines() == [f"interrupted: the run so far is in {run}"]
    assert load_config(run / "config.yaml").train.steps == 100000
    steps = metrics(run)
    assert [figures["step"] for figures in steps] == list(range(1, len(steps) + 1))
    for number in range(1, len(steps) + 1):
        assert len(load_trees(run / "trees" / f"step_{number:05d}.parquet")) == 2
    opens(run / "checkpoint")
    succeed("eval", run, "eval.samples=1")


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("rolout.n=8", "error: rolout.n: unknown key -> did you mean rollout.rollouts?"),
        ("train.steps=many", "error: train.steps: got 'many', must be a valid integer"),
        ("train.steps=-1", "error: train.steps: got -1, must be greater than or equal to 0"),
        ("data.train=", "error: data.train: got nothing"),
        ("data.train=missing.jsonl", "missing.jsonl: no such file"),
        ("data.eval=missing.jsonl", "missing.jsonl: no such file"),
        ("eval.questions=5", "error: eval.questions: got 5, but data.eval holds 3"),
        ("rollout.rollouts=1", "error: rollout.rollouts: got 1, must be at least 2"),
        ("method.continuations=5", "so nothing can ever be resampled: r·B·N = 1·2·2 = 4 extra rollouts a step"),
        ("tools.names=[missing.py]", "missing.py does not exist"),
        ("tools.names=[hammer]", "error: tools.names[0]: got 'hammer', must be one of zoom, python, search"),
        ("tools.names=[search]", "error: tools.corpus: got nothing, but tools.names has 'search'")
        if False
        else ("max_pixels=1024", None),
        ("device=cuda:99", "error: device: got 'cuda:99', but torch"),
        ("rollout.max_context=60", "error: rollout.max_context: got 60, but the prompt of question zero alone has"),
        (
            "rollout.max_images=0",
            "error: rollout.max_images: got 0, but the prompt of question zero alone has 1 images",
        ),
    ],
)
def test_a_mistake_in_a_value(override: str, told: str | None, project: Path, no_weights: None):
    pass
