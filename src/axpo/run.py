"""The run folder: config.yaml, run.json, metrics.jsonl, summary.json, trees/, checkpoint/.

Everything is written beside its place and renamed, or appended line by line, so that the folder is usable
whenever the run ends, and a training that was killed goes on from its last checkpoint.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axpo.config import Config, ConfigError, save_config
from axpo.storage import save_trees
from axpo.tree import RolloutTree

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from axpo.chat import Chat

TRAINING_STATE = "training.pt"  # in a checkpoint: what training needs besides the weights to go on


class Run:
    """A run folder that is being written."""

    def __init__(self, config: Config, command: str = "train") -> None:
        """Make the folder. Raises ConfigError where it holds something already: nothing is ever overwritten."""
        self.folder = config.output
        self.command = command
        self.made = True
        if self.folder.exists() and any(self.folder.iterdir()):
            raise ConfigError(
                f"output: {self.folder} is not empty; must be a new folder, so that no run is overwritten"
            )
        (self.folder / "trees").mkdir(parents=True, exist_ok=True)
        self._save_status(ended=False)
        save_config(config, self.folder / "config.yaml")

    @classmethod
    def reopen(cls, folder: Path) -> "Run":
        """The folder of a training that is to go on.

        Raises ConfigError where it is none, another command made it, or it has ended.
        """
        run = cls.__new__(cls)
        run.folder, run.made = folder.absolute(), False
        status = run_status(run.folder)
        run.command = str(status["command"])
        if run.command != "train":
            raise ConfigError(f"{run.folder}: was made by axpo {run.command}, but only a run of axpo train goes on")
        if status["ended"]:
            raise ConfigError(f"{run.folder}: the run has ended, there is nothing to resume")
        return run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep the folder to this process. Raises ConfigError where another one writes it."""
        with (self.folder / "config.yaml").open("rb") as file:  # a file that is never replaced
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"{self.folder}: another process is writing this run; wait for it, or end it"
                ) from None
            yield

    def discard(self) -> None:
        """Remove the folder, if this command has made it and nothing has run: it would be in the next one's way."""
        if self.made and not (self.folder / "metrics.jsonl").exists():
            shutil.rmtree(self.folder)

    def end(self) -> None:
        """Note that all is done."""
        self._save_status(ended=True)

    def _save_status(self, ended: bool) -> None:
        self.save_summary({"command": self.command, "ended": ended}, "run")

    def log(self, figures: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")

    def save_trees(self, name: str, trees: Sequence[RolloutTree], images: bool = True) -> None:
        """Write trees/NAME.parquet; without `images` their bytes are left out."""
        save_trees(self.folder / "trees" / f"{name}.parquet", trees, images)

    def save_summary(self, summary: Mapping[str, Any], name: str = "summary") -> None:
        """Write NAME.json."""
        beside = self.folder / f"{name}.json.tmp"
        beside.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        beside.replace(self.folder / f"{name}.json")

    def save_checkpoint(
        self, model: "PreTrainedModel", chat: "Chat", name: str = "checkpoint", state: Mapping[str, Any] | None = None
    ) -> Path:
        """Write a folder that `from_pretrained` opens: weights, tokenizer with its template, image processor.

        Adapters are merged into the weights, and also lie in a folder of their own. With them, in one rename, goes the
        state of training: tensors, numbers and texts in dicts and lists.
        """
        import torch

        from axpo.adapters import FOLDER, save_adapters

        beside, place, old = self._places(name)
        for leftover in (beside, old):
            shutil.rmtree(leftover, ignore_errors=True)
        weights, adapters = _gathered(model)
        model.save_pretrained(beside, state_dict=weights)
        if adapters:
            save_adapters(model, beside / FOLDER, adapters)
        chat.save(beside)
        if state is not None:
            torch.save(dict(state), beside / TRAINING_STATE)
        os.sync()  # also a machine that goes down leaves a whole checkpoint, and the lines and trees before it
        if place.exists():
            place.rename(old)
        beside.rename(place)
        shutil.rmtree(old, ignore_errors=True)
        return place

    def training_state(self, name: str = "checkpoint") -> dict[str, Any] | None:
        """What `save_checkpoint` was given as the state, on the CPU; None where there is no checkpoint yet.

        Raises ConfigError where the checkpoint holds none.
        """
        import torch

        self.complete_checkpoint(name)
        _, place, _ = self._places(name)
        if not place.exists():
            return None
        if not (place / TRAINING_STATE).is_file():
            raise ConfigError(f"{place}: holds no {TRAINING_STATE}, without which training cannot go on")
        # Mapped, not read: several processes may hold it at once.
        state: dict[str, Any] = torch.load(place / TRAINING_STATE, map_location="cpu", weights_only=True, mmap=True)
        return state

    def complete_checkpoint(self, name: str = "checkpoint") -> None:
        """Put a checkpoint in its place where a process was killed as it did so."""
        beside, place, old = self._places(name)
        if old.exists() and not place.exists():  # killed between the two renames: the new one is whole
            (beside if beside.exists() else old).rename(place)

    def _places(self, name: str) -> tuple[Path, Path, Path]:
        """Where a checkpoint is written, where it lies, and where the one before goes meanwhile."""
        beside, place, old = (self.folder / f"{name}{end}" for end in (".tmp", "", ".old"))
        return beside, place, old

    def rewind(self, stage: str, steps: int) -> None:
        """Drop the lines and trees of what came after so many steps of a stage of training, and half a line."""
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        later = (n for n, line in enumerate(map(json.loads, whole)) if line["stage"] == stage and line["step"] > steps)
        kept = whole[: next(later, len(whole))]
        if kept != lines:
            beside = metrics.with_suffix(".jsonl.tmp")
            beside.write_bytes(b"".join(kept))
            beside.replace(metrics)
        for path in (self.folder / "trees").iterdir():
            number = re.fullmatch(r"(?:eval_)?step_(\d+)\.parquet", path.name)
            if path.suffix == ".partial" or (number and int(number[1]) > steps):
                path.unlink()

    def evaluations(self) -> dict[str, dict[str, Any]]:
        """The figures of the evaluations that are done, by name."""
        metrics = self.folder / "metrics.jsonl"
        lines = map(json.loads, metrics.read_text("utf-8").splitlines() if metrics.exists() else [])
        return {
            line["of"]: {key: value for key, value in line.items() if key not in ("stage", "of", "seconds")}
            for line in lines
            if line["stage"] == "eval"
        }


class FollowedRun(Run):
    """A run folder that another process of the training writes: what is to be written is left to that one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.command = "train"

    @contextmanager
    def locked(self) -> Iterator[None]:
        yield

    def log(self, figures: Mapping[str, Any]) -> None: ...

    def save_trees(self, name: str, trees: Sequence[RolloutTree], images: bool = True) -> None: ...

    def save_summary(self, summary: Mapping[str, Any], name: str = "summary") -> None: ...

    def rewind(self, stage: str, steps: int) -> None: ...

    def discard(self) -> None: ...

    def save_checkpoint(
        self, model: "PreTrainedModel", chat: "Chat", name: str = "checkpoint", state: Mapping[str, Any] | None = None
    ) -> Path:
        _gathered(model, keep=False)  # the others' part in it
        return self.folder / name


def _gathered(model: "PreTrainedModel", keep: bool = True) -> "tuple[dict[str, Tensor], dict[str, Tensor]]":
    """The policy's weights and those of its adapters, whole, on the CPU; no weights where they need not be kept."""
    from axpo.adapters import adapter_weights
    from axpo.policy import policy_weights

    weights = {name: weight.cpu() for name, weight in policy_weights(model) if keep}
    return weights, adapter_weights(model)


def run_status(folder: Path) -> dict[str, Any]:
    """The `command` that made a run folder, and whether it has `ended`. Raises ConfigError where it is none."""
    # config.yaml is what is written last when a folder is made
    if not (folder / "config.yaml").is_file() or not (folder / "run.json").is_file():
        raise ConfigError(f"{folder} is not a run folder: it holds no config.yaml and run.json")
    status: dict[str, Any] = json.loads((folder / "run.json").read_text("utf-8"))
    return status
