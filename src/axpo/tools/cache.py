"""Answers kept on disk, so that what was asked once costs nothing again and says the same."""

import asyncio
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from axpo.tools.base import ToolError

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Answers(Generic[T]):
    """One small JSON file for each answer, named by the SHA-256 of what was asked. None: nothing is kept.

    `kind` is the type of an answer, which JSON must be able to hold; what a file holds of another kind is asked anew.
    Several processes may share a folder. Equal questions that are asked at once within one event loop go out once,
    kept or not. Raises ToolError where the folder cannot be made.
    """

    def __init__(self, kind: type[T], folder: Path | None) -> None:
        self.folder = folder
        self._kind = TypeAdapter(kind)
        self._asking: dict[tuple[asyncio.AbstractEventLoop, str], asyncio.Future[T]] = {}
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ToolError(f"tools.cache: the folder {folder} cannot be made: {error}") from error

    async def get(self, question: Mapping[str, Any], ask: Callable[[], Awaitable[T]]) -> T:
        """What `ask` answers, now or earlier. Only what it returns is kept, never what it raises.

        `question` is JSON, and holds no key.
        """
        text = json.dumps(question, sort_keys=True)
        here = (asyncio.get_running_loop(), text)
        task = self._asking.get(here)
        if task is None:
            task = asyncio.ensure_future(self._look_up(text, ask))
            self._asking[here] = task
            task.add_done_callback(lambda done: self._forget(here, done))
        # Whoever asked first may be cancelled; the others still want the answer.
        return await asyncio.shield(task)

    def _forget(self, here: tuple[asyncio.AbstractEventLoop, str], done: "asyncio.Future[T]") -> None:
        self._asking.pop(here, None)
        if not done.cancelled():
            done.exception()  # seen, even if nobody is left to await it

    async def _look_up(self, text: str, ask: Callable[[], Awaitable[T]]) -> T:
        path = self._path(text)
        if path is not None:
            try:
                kept = json.loads(path.read_bytes())
                if kept["question"] == json.loads(text):
                    return self._kind.validate_python(kept["answer"])
            except FileNotFoundError:
                pass
            except ValidationError:
                logger.warning("%s is ignored and written anew: its answer is of another kind", path)
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                logger.warning("%s is ignored and written anew: %s", path, error)
        fresh = await ask()
        if path is not None:
            try:
                _write(path, json.dumps({"question": json.loads(text), "answer": fresh}))
            except OSError as error:  # the answer is there, and was paid for
                logger.warning("an answer could not be kept: %s", error)
        return fresh

    def _path(self, text: str) -> Path | None:
        if self.folder is None:
            return None
        name = hashlib.sha256(text.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.json"


def _write(path: Path, text: str) -> None:
    """Write beside and rename, so that no reader ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(beside).replace(path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
