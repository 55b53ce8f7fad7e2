"""Runs the cells of a comparison in processes of their own, so many at a time. What has ended is never run again."""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from axpo.comparison.grid import Cell, Grid
from axpo.config import ConfigError, save_config
from axpo.run import run_status

GRID_COPY = "grid.yaml"  # by which an output is known as that of a comparison
GRACE = 120.0  # seconds in which an interrupted cell may save its checkpoint


class Display(Protocol):
    """What shows the user how far the comparison is."""

    def begun(self, cell: Cell) -> None: ...

    def ended(self, cell: Cell, seconds: float, error: str | None) -> None: ...


@dataclass(frozen=True)
class Failure:
    """A cell that did not end well, and what it said last."""

    cell: Cell
    error: str


def has_ended(cell: Cell) -> bool:
    """Whether the run of this cell is done."""
    try:
        return bool(run_status(cell.folder)["ended"])
    except ConfigError:
        return False


def cells_to_run(cells: Sequence[Cell], elsewhere: Container[tuple[str, int]]) -> list[Cell]:
    """The cells without those that ran elsewhere, and without the fine-tunings that only these need."""
    trainings = {cell for cell in cells if cell.command == "train" and (cell.name, cell.seed) not in elsewhere}
    wanted = trainings | {cell.needs for cell in trainings}
    return [cell for cell in cells if cell in wanted]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl, also while it is being written."""
    file = folder / "metrics.jsonl"
    lines = file.read_text("utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@contextlib.contextmanager
def output_of(grid: Grid, path: Path) -> Iterator[None]:
    """Make the output, keep it to this process, and put a copy of the grid file there.

    Raises ConfigError where it holds something else, or another process compares there.
    """
    copy = grid.output / GRID_COPY
    with contextlib.ExitStack() as held:
        try:
            grid.output.mkdir(parents=True, exist_ok=True)
            if not copy.exists() and any(grid.output.iterdir()):
                raise ConfigError(f"output: {grid.output} is not empty and holds no comparison; must be a new folder")
            folder = os.open(grid.output, os.O_RDONLY)
            held.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (copy.exists() and copy.samefile(path)):
                shutil.copyfile(path, copy)
        except BlockingIOError:
            raise ConfigError(f"output: {grid.output} is in use by another axpo compare") from None
        except OSError as error:
            raise ConfigError(f"output: {grid.output} cannot be written: {error.strerror}") from error
        yield


def parallel(grid: Grid, cells: Sequence[Cell]) -> int:
    """How many cells run at the same time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return grid.jobs or max(1, cores // max(cell.config.threads or 1 for cell in cells))


async def run_cells(grid: Grid, cells: Sequence[Cell], display: Display) -> list[Failure]:
    """Run all cells that have not ended; returns those that failed. Where it is cancelled, the running ones save
    their checkpoints first."""
    places = asyncio.Semaphore(parallel(grid, cells))
    runs: dict[Cell, asyncio.Task[Failure | None]] = {}

    async def run(cell: Cell) -> Failure | None:
        if has_ended(cell):
            return None
        if cell.needs:
            missing: Failure | None = await asyncio.shield(runs[cell.needs])
            if missing:
                return Failure(cell, f"not run, since {cell.needs.label} failed")
        async with places:
            display.begun(cell)
            started = time.monotonic()
            error = await _run(grid, cell)
            display.ended(cell, time.monotonic() - started, error)
        return Failure(cell, error) if error else None

    try:
        for cell in cells:
            runs[cell] = asyncio.create_task(run(cell))
        return [failure for failure in await asyncio.gather(*runs.values()) if failure]
    finally:
        for task in runs.values():
            task.cancel()
        await asyncio.gather(*runs.values(), return_exceptions=True)


async def _run(grid: Grid, cell: Cell) -> str | None:
    """Run one cell to its end; returns what went wrong."""
    log = grid.output / "logs" / f"{cell.file}.log"
    config = grid.output / "configs" / f"{cell.file}.yaml"
    for folder in (log.parent, config.parent):
        folder.mkdir(exist_ok=True)
    if cell.command == "train" and (cell.folder / "config.yaml").is_file():
        command = ["resume", str(cell.folder)]
    else:
        if cell.folder.exists():  # its making, or its fine-tuning, was cut short: there is nothing to go on from
            shutil.rmtree(cell.folder)
        save_config(cell.config, config)
        command = [cell.command, str(config)]
    threads = str(cell.config.threads)
    with log.open("ab") as file:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "axpo.comparison.cell", *command),
            stdin=asyncio.subprocess.PIPE,  # it ends when this process does
            stdout=file,
            stderr=file,
            env=os.environ | {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C in the terminal comes to us, and we tell it
        )
    try:
        code = await process.wait()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        try:
            await asyncio.wait_for(process.wait(), GRACE)
        except TimeoutError:
            process.kill()
        raise
    if code == 0 and has_ended(cell):
        return None
    return f"{_reason(code)}: {_last_line(log)} ({log})"


def _reason(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else "it said nothing"
