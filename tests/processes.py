"""Commands run in real processes, two of which gloo connects; and what their runs come to."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from axpo.miniature.base import SFT
from axpo.storage import load_trees
from axpo.tree import RolloutTree

LANDS = ("Bel-nia", "Kar-dor", "Mot-via", "Tis-mar")
QUESTIONS: list[dict[str, Any]] = [
    {"question": f'What is the crop of "{land}"?', "answer": "rye", "id": land} for land in LANDS
]
QUESTIONS[1] |= {"question": "<image>Which digit is on the house?", "images": ["house.png"]}
OF_THE_MINIATURE: dict[str, Any] = {
    "model": "miniature_sft",
    "output": "run",
    "threads": 1,
    "data": {"train": "questions.jsonl", "eval": "questions.jsonl"},
    "tools": {  # those that this policy knows
        "names": ["zoom", "python", "search"],
        "sandbox": "none_i_trust_the_policy",
        "zoom_pixels": 16384,
        "corpus": "miniature",
        "search_results": 1,
    },
}
CONFIG: dict[str, Any] = {
    **OF_THE_MINIATURE,
    "seed": 1,  # with which no token is drawn so near to another that rounding decides between them
    "rollout": {"questions": 6, "rollouts": 3, "max_tokens": 40, "max_turns": 1, "max_context": 800},
    "method": {"budget": 0.5, "continuations": 2},  # fewer prefixes than there are candidates
    "train": {  # a minibatch holds three questions, a pack at most one: the ranks do not compute equally many
        "steps": 2,
        "warmup_steps": 0,
        "learning_rate": 5e-6,
        "minibatches": 2,
        "pack_tokens": 500,  # of which some are cut
        "save_every": 1,
    },
    "eval": {"samples": 1},
    "sft": {"steps": 3, "batch": 3, "learning_rate": 1e-4, "warmup_steps": 0},
}
TURNS = [{"role": "assistant", "content": "Hm.\n</think>\n\n<answer>rye</answer>"}]


def start(*arguments: object, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "axpo", *(str(argument) for argument in arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def succeed(*arguments: object) -> str:
    process = start(*arguments)
    said, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return said


def make_project(folder: Path) -> Path:
    """A folder with a config and its questions, one of which has an image."""
    Image.new("RGB", (64, 64), "red").save(folder / "house.png")
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    taught = [row | {"turns": TURNS} for row in QUESTIONS]
    (folder / "trajectories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in taught))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def train(project: Path, name: str, *overrides: str) -> Path:
    succeed("train", project / "config.yaml", f"output={project / name}", *overrides)
    return project / name


def fine_tune(project: Path, name: str, *overrides: str) -> Path:
    data = f"data.sft={project}/trajectories.jsonl"
    succeed("sft", project / "config.yaml", data, f"output={project / name}", *overrides)
    return project / name


def train_interrupted(project: Path, name: str, *overrides: str) -> Path:
    """Interrupt a training after its first step, and resume it."""
    run = project / name
    process = start("train", project / "config.yaml", f"output={run}", *overrides)
    wait_for(run / "trees" / "step_00001.parquet", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert errors.splitlines() == [f"interrupted: the run so far is in {run}"]
    assert len(lines(run)) == 1
    succeed("resume", run)
    return run


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoint" / "model.safetensors")


def laid_out(trees: list[RolloutTree]) -> list[Any]:
    return [
        (tree.question_id, [(s.kind, s.ids.tolist(), s.resampled, s.outcome, s.credits) for s in tree.segments()])
        for tree in trees
    ]


def assert_learnt_alike(one: Path, two: Path, apart: float = 1e-6) -> None:
    """The same rollouts and figures; weights the same but for a thousandth of what has been learnt, and nowhere by more
    than `apart`."""
    for tree in sorted((one / "trees").iterdir()):
        assert laid_out(load_trees(two / "trees" / tree.name)) == laid_out(load_trees(tree))
    assert_weights_alike(one, two, apart)
    assert_figures_alike(one, two)


def assert_weights_alike(one: Path, two: Path, apart: float = 1e-6) -> None:
    before, after, other = load_file(SFT / "model.safetensors"), weights(one), weights(two)
    steps = torch.cat([(after[name] - before[name]).flatten() for name in before])
    errors = torch.cat([(other[name] - after[name]).flatten() for name in before])
    assert steps.abs().max() > 1e-5
    assert errors.norm() < 1e-3 * steps.norm()
    assert errors.abs().max() < apart


def assert_figures_alike(one: Path, two: Path) -> None:
    for ours, theirs in zip(lines(one), lines(two), strict=True):
        for figure, value in ours.items():
            if "seconds" in figure or figure in ("packed_tokens", "prefix_hit_rate"):
                continue  # how it was computed
            if isinstance(value, float):
                least = 1e-4 if figure.startswith("mismatch") else 1e-7  # rounding itself is measured there
                assert theirs[figure] == pytest.approx(value, rel=1e-4, abs=least), figure
            else:
                assert theirs[figure] == value, figure


def numbers(run: Path) -> str:
    """All that was logged, but for times."""
    return re.sub(r'"\w*seconds": [^,}]+', "", (run / "metrics.jsonl").read_text())


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    """Wait until a process has written a file."""
    deadline = time.monotonic() + 300
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
