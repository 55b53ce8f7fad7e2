"""The run folder: config.yaml, metrics.jsonl, summary.json, trees/, checkpoint/.

Everything is written beside its place and renamed, or appended line by line, so that the folder is usable
whenever the run ends.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from axpo.chat import Chat
from axpo.config import Config, ConfigError, save_config
from axpo.storage import save_trees
from axpo.tree import RolloutTree


class Run:
    """A run folder that is being written."""

    def __init__(self, config: Config) -> None:
        """Make the folder. Raises ConfigError where it holds something already: nothing is ever overwritten."""
        self.folder = config.output
        if self.folder.exists() and any(self.folder.iterdir()):
            raise ConfigError(
                f"output: {self.folder} is not empty; must be a new folder, so that no run is overwritten"
            )
        (self.folder / "trees").mkdir(parents=True, exist_ok=True)
        save_config(config, self.folder / "config.yaml")

    def log(self, figures: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")

    def save_trees(self, name: str, trees: Sequence[RolloutTree]) -> None:
        """Write trees/NAME.parquet."""
        save_trees(self.folder / "trees" / f"{name}.parquet", trees)

    def save_summary(self, summary: Mapping[str, Any], name: str = "summary") -> None:
        """Write NAME.json."""
        beside = self.folder / f"{name}.json.tmp"
        beside.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        beside.replace(self.folder / f"{name}.json")

    def save_checkpoint(self, model: PreTrainedModel, chat: Chat, name: str = "checkpoint") -> Path:
        """Write a folder that `from_pretrained` opens: weights, tokenizer with its template, image processor."""
        beside, place, old = (self.folder / f"{name}{end}" for end in (".tmp", "", ".old"))
        for leftover in (beside, old):
            shutil.rmtree(leftover, ignore_errors=True)
        model.save_pretrained(beside)
        chat.save(beside)
        if place.exists():
            place.rename(old)
        beside.rename(place)
        shutil.rmtree(old, ignore_errors=True)
        return place
