"""A grid of real trainings: interrupted, killed, and gone on with."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from axpo import cli
from axpo.comparison.cells import metrics

QUESTIONS = [{"question": f"What is the crop of {land}?", "answer": "rye", "family": "lookup"} for land in "ABC"]
CONFIG: dict[str, Any] = {
    "model": "miniature",
    "data": {"train": "questions.jsonl", "eval": "questions.jsonl"},
    "tools": {"names": ["search"], "corpus": "miniature", "search_results": 2},
    "rollout": {"questions": 2, "rollouts": 2, "max_tokens": 30, "max_turns": 1, "max_context": 600},
    "method": {"budget": 1, "continuations": 2},
    "train": {"steps": 2, "warmup_steps": 0, "learning_rate": 1e-4, "save_every": 1},
    "eval": {"samples": 2, "questions": 2},
}
GRID = {"config": CONFIG, "output": "out", "seeds": [1, 2], "methods": {"axpo": [], "grpo": ["method=grpo"]}, "jobs": 2}


def write(folder: Path, **changes: Any) -> Path:
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "grid.yaml").write_text(yaml.safe_dump({**GRID, **changes}, sort_keys=False))
    return folder / "grid.yaml"


def compare(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["compare", *map(str, arguments)])


def start(grid: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "axpo", "compare", str(grid)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(what: Any, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_free(run: Path) -> bool:
    with (run / "config.yaml").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_grid_is_interrupted_killed_and_goes_on(tmp_path: Path) -> None:
    grid = write(tmp_path)
    cells = tmp_path / "out" / "cells"
    begun = [cells / "sft" / "seed_1", cells / "axpo" / "seed_1"]  # two jobs

    first = start(grid)
    # The other, an evaluation alone, may have ended before this one begins.
    until(lambda: (begun[1] / "config.yaml").exists() and not is_free(begun[1]))
    second = compare(grid)
    assert second.exit_code == 2
    assert "is in use by another axpo compare" in second.stderr
    assert compare(grid, "--report").exit_code == 0
    until(lambda: metrics(cells / "axpo" / "seed_1"))
    first.send_signal(signal.SIGINT)
    output, errors = first.communicate(timeout=300)
    assert first.returncode == 130, errors
    assert "of 6 runs are done; the same command goes on" in errors
    assert max(map(len, output.splitlines())) <= 80
    assert all(map(is_free, begun))
    assert (cells / "axpo" / "seed_1" / "checkpoint" / "training.pt").exists()

    partial = compare(grid, "--report")  # what is done so far
    assert partial.exit_code == 0, partial.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["cells"]["all"] == 6
    assert (
        f"Not finished: {summary['cells']['finished']} of 6 runs are done." in (tmp_path / "out/table.md").read_text()
    )

    killed = start(grid)
    grpo = cells / "grpo" / "seed_1"
    until(lambda: (grpo / "config.yaml").exists() and not is_free(grpo))
    killed.kill()
    killed.communicate(timeout=300)
    until(lambda: is_free(grpo))  # its children end with it
    ended = {run: os.stat(run / "metrics.jsonl").st_mtime_ns for run in begun if (run / "summary.json").exists()}
    assert ended

    last = compare(grid)
    assert last.exit_code == 0, last.output
    assert {run: os.stat(run / "metrics.jsonl").st_mtime_ns for run in ended} == ended
    assert "6 of 6 runs are done" in last.stdout
    for name in ("axpo", "grpo"):
        for seed in (1, 2):
            lines = metrics(cells / name / f"seed_{seed}")
            assert [line.get("of", line.get("step")) for line in lines] == [1, 2, name]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {name: entry["seeds"] for name, entry in summary["methods"].items()} == {"sft": 2, "axpo": 2, "grpo": 2}
    assert summary["methods"]["grpo"]["rollouts"]["mean"] == 8
    assert set(summary["pairs"]["axpo_minus_grpo"]["pass1"]) == {"mean", "low", "high"}
    assert list(summary["families"]) == ["lookup"]
    written = {"summary.json", "results.json", "table.md", "page.md", "page.html", "dynamics.png", "learning.png"}
    written.add("differences.png")
    assert written <= {path.name for path in (tmp_path / "out").iterdir()}

    before = {path: path.stat().st_mtime_ns for path in cells.rglob("*")}
    assert compare(grid).exit_code == 0  # runs nothing
    assert {path: path.stat().st_mtime_ns for path in cells.rglob("*")} == before
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"question": "Why?"}\n')
    bad = {"bad": [f"data.train={tmp_path}/bad.jsonl"]}
    result = compare(write(tmp_path, seeds=[1], methods=bad, pairs=[]))
    assert result.exit_code == 1, result.output
    assert "1 of 2 runs are done" in result.stdout
    assert "failed: bad seed 1: exit code 2: " in result.stderr
    assert "bad.jsonl, line 1: the answer is missing" in result.stderr
    assert (tmp_path / "out" / "logs" / "bad-seed-1.log").is_file()


def test_what_ran_elsewhere_is_not_run_here(tmp_path: Path) -> None:
    for place, methods in (("here", ["axpo", "grpo"]), ("there", ["grpo"])):
        (tmp_path / place).mkdir()
        write(tmp_path / place, seeds=[1], methods={name: GRID["methods"][name] for name in methods})
    there, here = tmp_path / "there" / "grid.yaml", tmp_path / "here" / "grid.yaml"
    assert compare(there).exit_code == 0
    known = tmp_path / "there" / "out" / "results.json"
    result = compare(here, "--results", known)
    assert result.exit_code == 0, result.output
    assert "1 runs, 0 of them done" in result.stdout
    assert "3 of 3 runs are done" in result.stdout
    assert [path.name for path in (tmp_path / "here" / "out" / "cells").iterdir()] == ["axpo"]
    found, theirs = (json.loads(path.read_text())["cells"] for path in (tmp_path / "here/out/results.json", known))
    assert [cell["method"] for cell in found] == ["sft", "axpo", "grpo"]
    assert [cell for cell in found if cell["method"] != "axpo"] == theirs


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, "No such file"), ("[]", "is no results.json that axpo compare has written"), ('{"cells": []}', "has no")],
)
def test_results_from_elsewhere_must_be_of_this_grid(text: str | None, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    if text is not None:
        file.write_text(text)
    result = compare(write(tmp_path), "--results", file)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --results: ")
    assert expected in result.stderr
    assert not (tmp_path / "out").exists()


def test_there_must_be_something_to_report_on(tmp_path: Path) -> None:
    result = compare(write(tmp_path), "--report")
    assert result.exit_code == 2
    assert f"output: {tmp_path}/out holds no comparison to report on" in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_another_has_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    result = compare(write(tmp_path))
    assert result.exit_code == 2
    assert "is not empty and holds no comparison; must be a new folder" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("arguments", [[], ["--report"]])
def test_a_mistake_in_the_grid_comes_at_once(arguments: list[str], tmp_path: Path) -> None:
    result = compare(write(tmp_path, seeds=[1, 1]), *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {tmp_path}/grid.yaml: seeds: got [1, 1]")
