"""`axpo diagnose` through its real entry, with the tiny model: what it leaves behind, and a user's mistakes."""

import json
import shutil
from pathlib import Path

import PIL.Image
import pytest
from commands import mistake, succeed

from axpo import build
from axpo.config import load_config, save_config
from axpo.miniature.base import BASE
from axpo.storage import load_trees, save_trees
from axpo.tree import CallSpan, Kind, Outcome, RolloutTree, StopReason

TOOLS = ["tools.names=[zoom,python,search]", "tools.corpus=miniature", "tools.zoom_pixels=16384"]
SMALL = [*TOOLS, "max_pixels=16384", "threads=1", "rollout.max_tokens=40", "rollout.max_context=1100"]
FEW = ["--questions", "3", "--continuations", "3", "--prefixes", "2"]


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrong must be found before weights are loaded."""

    def refuse(*arguments: object) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr(build, "load_model", refuse)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with a checkpoint, as training leaves it; its parent is the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    shutil.copytree(BASE, folder / "checkpoint")
    save_config(load_config(None, [*SMALL, f"output={folder}", "method.threshold=0.75"]), folder / "config.yaml")
    return folder


def test_a_run_is_diagnosed_into_a_new_folder_each_time(run: Path):
    result = succeed("diagnose", run, "miniature", *FEW, "rollout.rollouts=4")
    folder = run / "diagnose"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "diagnose.json",
        "gap.png",
        "divergence.png",
        "run.json",
        "trees",
    }
    found = json.loads((folder / "diagnose.json").read_text())
    assert (found["model"], found["data"]) == (str(run / "checkpoint"), "miniature")
    assert (found["questions"], found["decided"] + found["void"] >= 12) == (3, True)
    trees = load_trees(folder / "trees" / "diagnose.parquet")
    assert [tree.question_id for tree in trees] == ["tuning-0-0", "tuning-0-1", "tuning-0-2"]  # apart from training's
    assert [len(tree.base_leaves()) for tree in trees] == [4, 4, 4]
    assert load_config(folder / "config.yaml").method.threshold == 0.75
    for name in ("gap.png", "divergence.png"):
        with PIL.Image.open(folder / name) as picture:
            assert picture.format == "PNG"
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    for told in ("Under-attempt", "rollouts that call a tool", "20-35%", "Pearson", "written to run/diagnose"):
        assert told in result.stdout
    assert result.stderr == ""
    again = succeed("diagnose", run, "miniature", *FEW, "rollout.rollouts=4")
    assert "written to run/diagnose-2" in again.stdout
    assert json.loads((run / "diagnose-2" / "diagnose.json").read_text()) == found


def test_a_checkpoint_and_a_file_of_questions(run: Path):
    rows = [{"question": f"What is 1 + {n}?", "answer": str(n + 1), "id": f"q{n}"} for n in range(3)]
    (run.parent / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    succeed(
        "diagnose",
        "run/checkpoint",
        "questions.jsonl",
        "--questions",
        "2",
        "--continuations",
        "2",
        "rollout.rollouts=2",
        *SMALL,
    )
    found = json.loads((run.parent / "runs" / "diagnose" / "diagnose.json").read_text())
    assert (found["questions"], found["data"]) == (2, "questions.jsonl")
    config = load_config(run.parent / "runs" / "diagnose" / "config.yaml")
    assert (config.data.train, config.model) == (run.parent / "questions.jsonl", str(run / "checkpoint"))


def test_output_and_checkpoint_can_be_chosen(run: Path):
    (run / "checkpoint").rename(run / "sft")
    succeed("diagnose", run, "miniature", *FEW, "--checkpoint", "sft", "output=elsewhere", "rollout.rollouts=2")
    assert (run.parent / "elsewhere" / "diagnose.json").is_file()
    assert not (run / "diagnose").exists()


@pytest.mark.usefixtures("no_weights")
def test_mistakes_are_told_before_weights_are_loaded(run: Path):
    told = "error: RUN_OR_CHECKPOINT: got 'nowhere', must be a run folder (it holds config.yaml), the folder of a"
    assert told in mistake("diagnose", "nowhere", "miniature")
    assert "holds no checkpoint 'sft'; it holds checkpoint" in mistake("diagnose", run, "miniature", "--checkpoint=sft")
    assert "nowhere.jsonl: no such file" in mistake("diagnose", run, "nowhere.jsonl")
    assert "error: tools.names: got nothing" in mistake("diagnose", "miniature", "miniature")
    assert "error: tools.corpus: got nothing" in mistake("diagnose", "miniature", "miniature", "tools.names=[search]")
    assert "error: model: cannot be given here; RUN_OR" in mistake("diagnose", run, "miniature", "model=miniature")
    assert "error: data.eval: cannot be given here" in mistake("diagnose", run, "miniature", "data.eval=miniature")
    assert "did you mean rollout.rollouts?" in mistake("diagnose", run, "miniature", "rolout.n=8")
    assert "output: run is not empty" in mistake("diagnose", run, "miniature", "output=run").replace(f"{run}", "run")
    assert "error: rollout.max_context: got 64" in mistake("diagnose", run, "miniature", "rollout.max_context=64")
    assert (
        mistake("diagnose", run, "miniature", "--continuations=1")
        == "error: --continuations: got 1, must be at least 2\n"
    )
    assert "error: --questions: got -1, must be at least 0" in mistake("diagnose", run, "miniature", "--questions=-1")
    assert "error: --prefixes: got -1, must be at least 0" in mistake("diagnose", run, "miniature", "--prefixes=-1")
    assert not (run / "diagnose").exists()


def test_of_a_run_that_has_trained_its_resamplings_are_told(run: Path):
    """One question fails with both its calls and is resampled in vain, another is right with one of two."""
    trees = []
    for question, rewards in (("a", (0.0, 0.0)), ("b", (1.0, 0.0))):
        tree = RolloutTree(question, [1])
        for reward in rewards:
            end = tree.append(tree.root, Kind.POLICY, [2, 3, 4], [-1.0] * 3, calls=[CallSpan(0, 1, 2)])
            end.outcome = Outcome(StopReason.ANSWER, reward)
        trees.append(tree)
    prefix = trees[0].fork(trees[0].root.children[0], 1)
    again = trees[0].append(prefix, Kind.POLICY, [5, 6], [-1.0] * 2, resampled=1)
    again.outcome = Outcome(StopReason.ANSWER, 0.0)
    (run / "trees").mkdir()
    save_trees(run / "trees" / "step_00001.parquet", trees)
    result = succeed("diagnose", run, "miniature", *FEW, "rollout.rollouts=2")
    assert "0.0% of 1 resamplings found a right call; as many" in " ".join(result.stdout.split())
    found = json.loads((run / "diagnose" / "diagnose.json").read_text())
    assert found["coverage"]["resampled"] == 0
    # Held back one of two: "a" triggers both times and finds nothing; "b" once, and finds the right one.
    assert found["coverage"]["fresh_held_out"] == pytest.approx(1 / 3)
