"""A real training that is killed at many moments, and goes on: the end is that of one that never stopped."""

import json
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import LANDS, OF_THE_MINIATURE
from transformers import Qwen3VLForConditionalGeneration
from typer.testing import CliRunner

from axpo import cli
from axpo.miniature.base import BASE
from axpo.optimizer import Optimizer
from axpo.run import Run

QUESTIONS = [{"question": f'What is the crop of "{land}"?', "answer": "rye", "id": land} for land in LANDS]
CONFIG: dict[str, Any] = {
    **OF_THE_MINIATURE,
    "rollout": {"questions": 2, "rollouts": 3, "max_tokens": 40, "max_turns": 1, "max_context": 800},
    "method": {"budget": 1, "continuations": 2, "adaptive_budget": 1},
    "train": {"steps": 5, "warmup_steps": 3, "learning_rate": 1e-3, "save_every": 2, "minibatches": 2},
    "eval": {"samples": 1, "every": 2, "questions": 2},
    "alarms": {"steps": 7},
}
# Processes that have imported what they need before they begin.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["axpo.workflow", "axpo.build", "axpo.cli"])


def stop_at(event: str, number: int, sent: signal.Signals) -> None:
    """Send this process a signal right before the n-th event of a kind, of those that change weights or folder."""
    left = number

    def watched(name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def acting(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            file = Path(arguments[0]).name if arguments and isinstance(arguments[0], str | Path) else ""
            if f"{name} {file}".strip() == event:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), sent)
            return act(*arguments, **named)

        return acting

    for owner, name in ((Path, "rename"), (Path, "replace"), (os, "replace"), (Run, "log"), (Optimizer, "step")):
        setattr(owner, name, watched(name, getattr(owner, name)))


def command(arguments: list[str], stopped_by: tuple[str, int, signal.Signals] | None) -> None:
    if stopped_by:
        stop_at(*stopped_by)
    cli.app(arguments)


def run_command(*arguments: object, stopped_by: tuple[str, int, signal.Signals] | None = None) -> int:
    """The exit code of a command in a process of its own."""
    process = FORKS.Process(target=command, args=([str(a) for a in arguments], stopped_by))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent.parent)  # where the process finds this module by its name
        process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


@pytest.fixture(scope="module")
def whole(project: Path) -> Path:
    """A run that never stopped."""
    run = project / "whole"
    assert run_command("train", project / "config.yaml", f"output={run}") == 0
    return run


def numbers(run: Path) -> str:
    return re.sub(r'"\w*seconds": [^,}]+', "", (run / "metrics.jsonl").read_text())


def assert_same(run: Path, whole: Path) -> None:
    assert numbers(run) == numbers(whole)
    for name in ("model.safetensors", "config.json"):
        assert (run / "checkpoint" / name).read_bytes() == (whole / "checkpoint" / name).read_bytes()
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in run.glob("*/*")) == sorted(path.name for path in whole.glob("*/*"))
    assert json.loads((run / "summary.json").read_text()) == json.loads((whole / "summary.json").read_text())


def test_a_run_that_is_killed_again_and_again_ends_in_the_same_numbers(project: Path, whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("of", line.get("step")) for line in lines] == [1, 2, "step_2", 3, 4, "step_4", 5, "axpo"]
    assert len({line["loss"] for line in lines if "loss" in line}) > 1  # something is learnt, so something can differ
    run = project / "killed"
    arguments: tuple[object, ...] = ("train", project / "config.yaml", f"output={run}")
    for event, number, sent, steps in (
        ("log", 2, signal.SIGKILL, None),  # no checkpoint yet: it starts over
        ("rename checkpoint.tmp", 1, signal.SIGKILL, None),  # the first checkpoint is not in its place
        ("step", 6, signal.SIGKILL, 2),  # amid the update of step 3
        ("log", 1, signal.SIGINT, 3),  # interrupted, it saves what it has
        ("rename checkpoint.tmp", 1, signal.SIGKILL, 4),  # the old one is out of its place, the new one not in it
        ("log", 1, signal.SIGKILL, 4),  # the evaluation after step 4 is done, but its line is missing
        ("log", 3, signal.SIGKILL, 5),  # so is that of the last one
        ("replace summary.json.tmp", 1, signal.SIGKILL, 5),
    ):
        code = run_command(*arguments, stopped_by=(event, number, sent))
        assert code == (-sent if sent == signal.SIGKILL else 130), event
        assert steps_of_checkpoint(run) == steps, event
        arguments = ("resume", run)
    assert run_command(*arguments) == 0
    assert_same(run, whole)


def steps_of_checkpoint(run: Path) -> int | None:
    reopened = shutil.copytree(run, run.with_name("copy"))  # to look must not mend
    try:
        state = Run.reopen(reopened).training_state()
    finally:
        shutil.rmtree(reopened)
    return None if state is None else state["trainer"]["steps"]


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output + repr(result.exception)
    return result.stderr


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """A copy of the whole run as if it had not ended."""
    run = Path(shutil.copytree(whole, tmp_path / "moved"))
    (run / "run.json").write_text('{"command": "train", "ended": false}')
    return run


def test_a_run_that_has_ended_says_so(whole: Path) -> None:
    assert refused("resume", whole) == f"error: {whole}: the run has ended, there is nothing to resume\n"


def test_what_is_no_run_of_train(tmp_path: Path, stopped: Path) -> None:
    assert "is not a run folder: it holds no config.yaml and run.json" in refused("resume", tmp_path)
    (stopped / "run.json").write_text('{"command": "sft", "ended": false}')
    assert "was made by axpo sft, but only a run of axpo train goes on" in refused("resume", stopped)


def test_a_folder_that_was_moved_goes_on_where_it_is(stopped: Path, whole: Path) -> None:
    result = CliRunner().invoke(cli.app, ["resume", str(stopped)])
    assert result.exit_code == 0, result.output
    assert_same(stopped, whole)


def test_a_run_that_is_being_written_is_left_alone(stopped: Path) -> None:
    with Run.reopen(stopped).locked():
        assert "another process is writing this run" in refused("resume", stopped)


def test_the_policy_that_training_started_from_must_be_there(stopped: Path) -> None:
    start = stopped.parent / "start"
    shutil.copytree(BASE, start)
    model = Qwen3VLForConditionalGeneration.from_pretrained(start)
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    model.save_pretrained(start)
    config = yaml.safe_load((stopped / "config.yaml").read_text())
    (stopped / "config.yaml").write_text(yaml.safe_dump({**config, "model": str(start)}))
    before = numbers(stopped)
    assert "model: holds other weights than those that the run started from" in refused("resume", stopped)
    assert numbers(stopped) == before


def test_a_checkpoint_without_the_state_of_training(stopped: Path) -> None:
    (stopped / "checkpoint" / "training.pt").unlink()
    assert "holds no training.pt, without which training cannot go on" in refused("resume", stopped)
