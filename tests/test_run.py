import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from axpo.chat import Chat
from axpo.config import Config, ConfigError, load_config
from axpo.policy import load_policy
from axpo.run import Run
from axpo.storage import load_trees
from axpo.tree import RolloutTree


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(None, [f"output={tmp_path / 'deep' / 'run'}", "seed=3"])


def test_a_new_folder_holds_the_resolved_config(config: Config):
    run = Run(config)
    assert load_config(run.folder / "config.yaml") == config
    assert (run.folder / "trees").is_dir()


def test_an_empty_folder_will_do_but_nothing_is_overwritten(config: Config):
    config.output.mkdir(parents=True)
    Run(config)
    with pytest.raises(ConfigError, match=r"output: .*run is not empty; must be a new folder"):
        Run(config)


def test_figures_are_appended_line_by_line(config: Config):
    run = Run(config)
    figures = [{"step": 1, "accuracy": None}, {"step": 2, "accuracy": 0.1}]
    for each in figures:
        run.log(each)
        assert (run.folder / "metrics.jsonl").read_text().endswith("\n")
    assert [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()] == figures


def test_a_summary_replaces_the_one_before(config: Config):
    run = Run(config)
    run.save_summary({"sft": {"pass1": 0.5}})
    run.save_summary({"sft": {"pass1": 0.5}, "axpo": {"pass1": None}})
    assert json.loads((run.folder / "summary.json").read_text()) == {"sft": {"pass1": 0.5}, "axpo": {"pass1": None}}
    assert list(run.folder.glob("*.tmp")) == []


def test_trees_are_named_files(config: Config):
    run = Run(config)
    run.save_trees("step_00001", [RolloutTree("q", [1, 2])])
    (tree,) = load_trees(run.folder / "trees" / "step_00001.parquet")
    assert (tree.question_id, tree.root.ids.tolist()) == ("q", [1, 2])


def test_a_checkpoint_opens_and_replaces_the_one_before(
    config: Config, chat: Chat, tiny_model: Qwen3VLForConditionalGeneration
):
    run = Run(config)
    run.save_checkpoint(tiny_model, chat)
    place = run.folder / "checkpoint"
    (run.folder / "checkpoint.tmp").mkdir()  # what a killed process leaves
    (run.folder / "checkpoint.tmp" / "half").touch()
    changed = next(tiny_model.parameters())
    with torch.no_grad():
        changed += 1
    assert run.save_checkpoint(tiny_model, chat) == place
    assert sorted(path.name for path in run.folder.iterdir()) == ["checkpoint", "config.yaml", "run.json", "trees"]
    assert not (place / "half").exists()
    opened = load_policy(place)
    assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), tiny_model.parameters(), strict=True))
    again = Chat.from_pretrained(place)
    message = [{"role": "user", "content": "What is it?"}]
    assert again.prompt(message, [], []) == chat.prompt(message, [], [])
    assert again.stop_id == chat.stop_id


def test_another_checkpoint_lies_beside(config: Config, chat: Chat, tiny_model: Qwen3VLForConditionalGeneration):
    run = Run(config)
    run.save_checkpoint(tiny_model, chat, "sft")
    assert (run.folder / "sft" / "config.json").is_file()
    assert not (run.folder / "checkpoint").exists()
