"""Every command through its real entry, with the package's tiny model: a user's own run, and a user's mistakes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import yaml
from commands import axpo, mistake, succeed
from transformers import Qwen3VLForConditionalGeneration
from typer.testing import Result

from axpo import build
from axpo.chat import Chat
from axpo.config import load_config
from axpo.miniature import quickstart
from axpo.miniature.base import BASE
from axpo.storage import load_trees

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
SHORT_QUICKSTART = """
from axpo import cli
from axpo.miniature import quickstart
quickstart.TEACHER_PROBLEMS = 6
cli.app()
"""
CALL = '<tool_call>\n{"name": "count_letters", "arguments": {"text": "red"}}\n</tool_call>'
TRAJECTORIES: list[dict[str, Any]] = [
    {
        **QUESTIONS[0],
        "turns": [
            {"role": "assistant", "content": f"Count.</think>{CALL}"},
            {"role": "tool", "content": "3", "images": ["1.png"]},
            {"role": "assistant", "content": "So</think>4"},
        ],
    },
    {**QUESTIONS[2], "turns": [{"role": "assistant", "content": "Easy.</think>4"}]},
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
        "run.json",
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


def test_a_step_logs_what_the_diagnostics_find(trained: tuple[Path, Result]):
    step, evaluation = metrics(trained[0])
    named = {
        "one_outcome",
        "turns_per_rollout",
        "tokens_per_rollout",
        "forked",
        "recovered",
        "tool_calls",
        "tool_errors",
    }
    for calls in "call_tokens", "resampled_call_tokens":
        named |= {f"{calls}_{sign}" for sign in ("positive", "zero", "negative")}
    assert named <= step.keys()
    assert step["alarms"] == []
    assert "alarms" not in evaluation
    assert 1 <= step["tokens_per_rollout"] <= 4 * 8  # at most four turns of max_tokens


def test_an_alarm_may_end_a_run(project: Path):
    options = ("alarms.stop=true", "alarms.steps=7", "alarms.tool_use=1", "alarms.one_outcome=1", "method=grpo")
    result = axpo("train", project, *options, "train.steps=9")
    assert result.exit_code == 3, result.output
    run = project.parent / "run"
    warning, end = result.stderr.splitlines()
    assert warning.startswith("warning: step 7: ")
    assert warning.endswith("% of the rollouts of the last 7 steps use a tool, less than alarms.tool_use = 100.0%")
    assert end == f"stopped after step 7 by alarms.stop (tool_use): the run so far is in {run}"
    assert [step["alarms"] for step in metrics(run)] == [[]] * 6 + [["tool_use"]]
    opens(run / "checkpoint")


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
    monkeypatch.setattr(quickstart, "TEACHER_PROBLEMS", 12)
    tools = ["data.sft=miniature", "tools.names=[zoom, python, search]", "tools.corpus=miniature"]
    succeed("sft", project, *tools, "sft.steps=1", "tools.zoom_pixels=16384")
    assert [figures["stage"] for figures in metrics(project.parent / "run")] == ["sft"]
    assert "tools.names: the teacher" in mistake("sft", project, "data.sft=miniature", "output=other")


def test_quickstart_goes_from_the_base_to_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "TEACHER_PROBLEMS", 12)
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


def test_the_same_seed_gives_the_same_metrics_byte_for_byte_but_for_times(tmp_path: Path):
    options = "seed=3 threads=1 rollout.questions=3 rollout.rollouts=3 method.budget=0.5 train.steps=2 sft.steps=2"
    options += " rollout.max_tokens=48 eval.questions=3"
    written = []
    for name in ("one", "other"):  # processes of their own, with hash seeds of their own
        command = [sys.executable, "-c", SHORT_QUICKSTART, "quickstart", *options.split(), f"output={tmp_path / name}"]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        text = (tmp_path / name / "metrics.jsonl").read_text()
        written.append(re.sub(r'"\w*seconds": [^,}]+', "", text))
    assert written[0].count("\n") > 3
    assert "tool_use" in written[0]
    assert written[0] == written[1]


def test_help_and_mistakes_in_a_config_come_without_torch():
    program = (
        "import sys\nfrom axpo.cli import main\n"
        "try: main()\nfinally: print({'torch', 'transformers'} & set(sys.modules), file=sys.stderr)"
    )
    for arguments, told in (["--help"], "quickstart"), (["quickstart", "sed=1"], "did you mean seed?"):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
        assert told in done.stdout + done.stderr
        assert done.stderr.splitlines()[-1] == "set()"


def test_a_terminal_that_lacks_a_character_gets_a_question_mark():
    command = [sys.executable, "-c", "from axpo.cli import main; main()", "quickstart", "--help"]
    latin = os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=latin)
    assert "runs/quickstart-2, ? that is" in " ".join(done.stdout.split())


def test_an_interrupted_run_is_usable(project: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", "from axpo.cli import main; main()", "train", str(project), "train.steps=100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    run = project.parent / "run"
    deadline = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
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
        ("data.train=nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("data.eval=nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("eval.questions=5", "error: eval.questions: got 5, but data.eval holds 3"),
        ("rollout.rollouts=1", "error: rollout.rollouts: got 1, must be at least 2"),
        ("method.continuations=5", "so nothing can ever be resampled: r·B·N = 1·2·2 = 4 extra rollouts a step"),
        ("tools.names=[nowhere.py]", "error: tools.names[0]: the tool file "),
        ("tools.names=[hammer]", "error: tools.names[0]: got 'hammer', must be one of zoom, python, search"),
        ("model=.", "is not a checkpoint: it holds no config.json"),
        (
            "model=./nowhere",
            "/nowhere', but there is no such folder; a run's checkpoint is there once axpo sft or axpo",
        ),
        ("device=cuda:99", "error: device: got 'cuda:99', but torch"),
        ("rollout.max_context=60", "error: rollout.max_context: got 60, but the prompt of question zero alone has"),
        ("rollout.max_images=0", "error: rollout.max_images: got 0, but the prompt of question zero alone has 1 im"),
        ("output=questions.jsonl", "questions.jsonl is a file; must be a folder"),
        ("output=/proc/run", "error: output: /proc/run cannot be written"),
        ("output=.", "is not empty; must be a new folder, so that no run is overwritten"),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_a_wrong_value_is_told_before_weights_are_loaded(
    override: str, told: str, project: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(project.parent)
    assert told in mistake("train", project, override)
    assert not (project.parent / "run").exists()


def test_a_config_that_is_not_there(tmp_path: Path):
    assert mistake("train", tmp_path / "c.yaml") == f"error: {tmp_path / 'c.yaml'}: no such file; must be a YAML file\n"


def test_several_mistakes_are_told_at_once(project: Path):
    assert len(mistake("train", project, "train.steps=x", "sed=1").splitlines()) == 2


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the package's model, to be spoiled."""
    return Path(shutil.copytree(BASE, tmp_path / "model"))


@pytest.mark.usefixtures("no_weights")
def test_a_model_without_a_template_that_knows_tools(project: Path, base: Path):
    template = base / "chat_template.jinja"
    template.unlink()
    assert mistake("train", project, f"model={base}") == f"error: model {base}: the tokenizer has no chat template\n"
    template.write_text("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}")
    assert f"error: model {base}: the chat template ignores tools" in mistake("train", project, f"model={base}")


def test_a_model_whose_weights_are_missing_leaves_no_run_folder(project: Path, base: Path):
    (base / "model.safetensors").unlink()
    assert f"error: {base} is not a checkpoint that can be opened" in mistake("train", project, f"model={base}")
    assert not (project.parent / "run").exists()


def test_an_image_that_does_not_open_costs_its_question_only(project: Path):
    (project.parent / "0.png").write_bytes(b"no image")
    result = succeed("train", project)
    (warning, *more) = result.stderr.splitlines()
    assert warning.startswith("warning: ")
    assert "left out question 'zero' (line 1): image '0.png' does not open" in warning
    assert len(more) == 1  # the file is that of the evaluation too
    (_, evaluation) = metrics(project.parent / "run")
    assert evaluation["questions"] == 2


@pytest.mark.usefixtures("no_weights")
def test_data_that_cannot_be_used(project: Path):
    data = project.parent / "bad.jsonl"
    for rows, told in (
        ([], f"error: {data}: holds no questions\n"),
        ([QUESTIONS[0], {"question": "Why?"}], f"error: {data}, line 2: the answer is missing\n"),
    ):
        write_rows(data, rows)
        assert mistake("train", project, f"data.train={data}") == told
    write_rows(data, [{**QUESTIONS[0], "images": ["nowhere.png"]}])
    assert f"error: {data}: no question is left" in mistake("train", project, f"data.train={data}", warned=True)


@pytest.mark.usefixtures("no_weights")
def test_a_tool_file_that_does_not_import(project: Path):
    tool = project.parent / "count.py"
    tool.write_text("import nowhere\n")
    told = f"error: tools.names[0]: {tool}:1: does not import: ModuleNotFoundError: No module named 'nowhere'\n"
    assert mistake("train", project) == told


@pytest.mark.usefixtures("no_weights")
def test_trajectories_that_cannot_be_used(project: Path):
    assert "error: data.sft: got nothing" in mistake("sft", project, "data.sft=")
    questions = project.parent / "questions.jsonl"
    assert "line 1: the turns are missing" in mistake("sft", project, f"data.sft={questions}")
    spoiled = {**QUESTIONS[2], "turns": [{"role": "assistant", "content": "<|im_start|>user"}], "id": "bad"}
    write_rows(project.parent / "trajectories.jsonl", [TRAJECTORIES[0], spoiled])
    told = "error: trajectory bad: a policy turn cannot hold <|im_start|>\n"
    assert mistake("sft", project) == told
    doubled = {**QUESTIONS[2], "turns": [{"role": "assistant", "content": "<think>Easy.</think>4"}], "id": "twice"}
    write_rows(project.parent / "trajectories.jsonl", [doubled])
    told = "error: trajectory twice: a turn begins with <think>, with which this model's prompt ends; leave it out\n"
    assert mistake("sft", project) == told
    turns = [{**turn, "content": turn["content"].replace("count_letters", "zoom")} for turn in TRAJECTORIES[0]["turns"]]
    write_rows(
        project.parent / "trajectories.jsonl", [{**TRAJECTORIES[0], "turns": turns, "id": f"n{i}"} for i in "12"]
    )
    assert mistake("sft", project) == (
        "error: tools.names: offers count_letters, but turns of data.sft call 'zoom' (2 trajectories), first in n1; "
        "they must call tools by the names that they have here\n"
    )


@pytest.mark.usefixtures("no_weights")
def test_a_folder_that_is_no_run(project: Path, trained: tuple[Path, Result]):
    run, _ = trained
    missing = project.parent / "nowhere"
    assert mistake("eval", missing) == f"error: {missing} is not a run folder: it holds no config.yaml\n"
    told = f"error: {run} holds no checkpoint 'sft'; it holds checkpoint\n"
    assert mistake("eval", run, "--checkpoint", "sft") == told
    assert "trees is not a checkpoint: it holds no config.json" in mistake("eval", run, "--checkpoint", "trees")
    assert "error: data.eval: got nothing" in mistake("eval", run, "data.eval=")
    assert "error: model: cannot be given here" in mistake("eval", run, "model=miniature")
    assert "error: eval.sample: unknown key -> did you mean eval.samples?" in mistake("eval", run, "eval.sample=1")


def test_a_bug_is_not_called_a_mistake(project: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*arguments: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(build, "load_data", broken)
    result = axpo("train", project)
    assert isinstance(result.exception, ValueError)
    assert result.stderr == ""


def test_methods_are_listed_with_options_and_sources() -> None:
    shown = axpo("methods")
    assert shown.exit_code == 0
    assert max(map(len, shown.output.splitlines())) <= 80
    for word in ("grpo:", "axpo:", "arXiv 2605.28774", "prefix_credit", "arpo_rule", "num_rollouts"):
        assert word in shown.output
    listed = {method["name"]: method for method in json.loads(axpo("methods", "--json").output)}
    assert list(listed) == ["grpo", "axpo", "tool_bonus", "tool_penalty", "cispo", "arpo", "rltf"]
    assert listed["axpo"]["options"]["continuations"] == 4
    assert listed["cispo"]["options"]["kl"] == 0
    assert set(listed["cispo"]) == {"name", "summary", "source", "options"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method=ppo"], "error: method.name: got 'ppo', must be 'grpo'"),
        (["method=grpo", "method.rank=random"], "error: method.rank: got 'random', but that is an option of axpo"),
        (["method.threshold=2"], "error: method.threshold: got 2, must be less than or equal to 1"),
    ],
)
def test_a_wrong_method_is_told_before_a_model_is_loaded(overrides: list[str], said: str, tmp_path: Path) -> None:
    result = axpo("quickstart", f"output={tmp_path / 'run'}", *overrides)
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()
