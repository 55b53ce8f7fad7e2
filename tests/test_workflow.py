"""The training stage around its steps, which are told here instead of run."""

import asyncio
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import pytest

from axpo import build, workflow
from axpo.config import load_config
from axpo.diagnostics.alarms import AlarmStop
from axpo.parallel import Ranks
from axpo.run import FollowedRun, Run
from axpo.tree import RolloutTree
from axpo.workflow import run_training

T = TypeVar("T")
FIGURES: dict[str, Any] = {"tool_use": 0.4, "one_outcome": 0.5, "void": 0, "rollouts": 8, "mismatch_mean": 0.0}


class Silent:
    def stage(self, name: str, total: int) -> None: ...

    def step(self, figures: dict[str, Any]) -> None: ...


class Saving(Run):
    """A run folder in which a checkpoint is a number."""

    saved = 0

    def save_checkpoint(self, *_: object, **__: object) -> Path:
        self.saved += 1
        return self.folder


class Following(FollowedRun):
    """The run folder of another rank, without its part in a checkpoint."""

    def save_checkpoint(self, *_: object, **__: object) -> Path:
        return self.folder


class Second(Ranks):
    """Rank 1 of two, as which the other says the same, and of the main rank's values nothing."""

    def all(self, value: T) -> list[T]:
        return [{} if value is None else value, value]  # type: ignore[list-item]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trains through steps in which so many of 8 rollouts are void; returns the run."""

    def run(void: list[int], *overrides: str, follows: bool = False) -> Saving:
        class Told:
            done = 0

            def __init__(self, *_: object) -> None: ...

            def state(self) -> dict[str, Any]:
                return {}

            def together(self) -> AbstractContextManager[None]:
                return nullcontext()

            async def step(self, number: int) -> tuple[list[RolloutTree], dict[str, Any]]:
                self.done = number + 1
                return [RolloutTree("q", [1])], {"step": number + 1, **FIGURES, "void": void[number]}

        monkeypatch.setattr(workflow, "Trainer", Told)
        for name in ("make_engine", "training_agent"):
            monkeypatch.setattr(build, name, lambda *_, **__: None)
        config = load_config(
            None, [f"output={tmp_path}/run", f"train.steps={len(void)}", "eval.every=0", "preflight=false", *overrides]
        )
        folder = Saving(config)
        data: Any = build.Data([], None)
        nothing: Any = None
        if follows:
            (folder.folder / "metrics.jsonl").write_text('{"stage": "eval", "of": "st')  # another is rewinding it
            own = Following(folder.folder)
            asyncio.run(run_training(config, own, Silent(), nothing, nothing, nothing, data, ranks=Second(1, 2)))
            return folder
        try:
            asyncio.run(run_training(config, folder, Silent(), nothing, nothing, nothing, data))
        finally:
            assert folder.saved == 1
        return folder

    return run


def logged(folder: Path) -> list[list[str]]:
    return [json.loads(line)["alarms"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_alarm_is_told_when_it_begins_and_logged_while_it_lasts(train: Any, caplog: pytest.LogCaptureFixture):
    run = train([0, 4, 4, 0, 8])
    assert logged(run.folder) == [[], ["void"], ["void"], [], ["void"]]
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [message.partition(" of the rollouts")[0] for message in told] == ["step 2: 50.0%", "step 5: 100.0%"]


def test_an_alarm_ends_the_run_where_that_is_asked_for(train: Any, tmp_path: Path):
    with pytest.raises(AlarmStop, match=r"^stopped after step 2 by alarms.stop \(void\)$"):
        train([0, 4, 4], "alarms.stop=true")
    assert logged(tmp_path / "run") == [[], ["void"]]


def test_only_the_main_rank_reads_the_metrics_that_it_rewinds(train: Any, tmp_path: Path):
    train([0], follows=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"stage": "eval", "of": "st'
