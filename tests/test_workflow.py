"""The training stage around its steps, which are told here instead of run."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from axpo import build, workflow
from axpo.config import load_config
from axpo.diagnostics.alarms import AlarmStop
from axpo.parallel import Ranks
from axpo.run import FollowedRun, Run
from axpo.tree import RolloutTree
from axpo.workflow import run_sft, run_training

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
        monkeypatch.setattr(build, "training_agent", lambda *_: None)
        config = load_config(
            None, [f"output={tmp_path}/run", f"train.steps={len(void)}", "eval.every=0", "preflight=false", *overrides]
        )
        folder = Saving(config)
        data: Any = build.Data([], None)
        nothing: Any = None
        engine: Any = SimpleNamespace(sleep=lambda: None)
        if follows:
            (folder.folder / "metrics.jsonl").write_text('{"stage": "eval", "of": "st')  # another is rewinding it
            own = Following(folder.folder)
            asyncio.run(run_training(config, own, Silent(), nothing, nothing, nothing, data, engine, Second(1, 2)))
            return folder
        try:
            asyncio.run(run_training(config, folder, Silent(), nothing, nothing, nothing, data, engine))
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


def test_the_engine_sleeps_while_the_reference_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A GPU need not hold what vLLM takes beside two whole policies."""
    done: list[str] = []

    def trainer(*_: object) -> None:
        done.append("trainer")
        raise KeyboardInterrupt

    monkeypatch.setattr(workflow, "Trainer", trainer)
    monkeypatch.setattr(build, "training_agent", lambda *_: None)
    config = load_config(None, [f"output={tmp_path}/run"])
    nothing: Any = None
    engine: Any = SimpleNamespace(sleep=lambda: done.append("sleep"))
    told = run_training(config, nothing, Silent(), nothing, nothing, nothing, build.Data([], None), engine)
    with pytest.raises(KeyboardInterrupt):
        told.send(None)
    assert done == ["sleep", "trainer"]


@pytest.mark.parametrize(("every", "lost", "saved"), [(2, True, 2), (0, True, 0), (2, False, 3), (5, False, 1)])
def test_fine_tuning_saves_as_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, lost: bool, saved: int
):
    """After an error amid what ranks compute together the last checkpoint is what is left."""
    ranks = Ranks()

    def steps(*_: object) -> Iterator[dict[str, int]]:
        yield from ({"step": number} for number in range(1, 6))
        if lost:
            ranks.lost = True
            raise RuntimeError("out of memory")

    monkeypatch.setattr(workflow, "sft_steps", steps)
    config = load_config(None, [f"output={tmp_path}/run", "sft.steps=5", f"sft.save_every={every}", "preflight=false"])
    folder, nothing = Saving(config, "sft"), None
    tuning = run_sft(config, folder, Silent(), nothing, nothing, [], ranks=ranks)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="out of memory") if lost else nullcontext():
        asyncio.run(tuning)
    assert folder.saved == saved
