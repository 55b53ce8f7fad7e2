"""What tools may know and keep of one rollout."""

import asyncio
import inspect
import logging
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)

CLOSE = 10.0  # seconds that an async callback may take at the end of a rollout


class Conversation:
    """What tools may know and keep of one rollout.

    `images` are the encoded files of all its images at their original resolution, in order, those that tools returned
    included. `state` is for tools that keep something between calls, under a key of their own. `tool_seconds` is the
    tool time that the rollout has used.
    """

    def __init__(self, images: Sequence[bytes] = ()) -> None:
        self.images = list(images)
        self.state: dict[str, Any] = {}
        self.tool_seconds = 0.0
        self._callbacks: list[Callable[[], object]] = []

    def on_close(self, callback: Callable[[], object]) -> None:
        """Call `callback` (sync, or async for at most CLOSE seconds) when the rollout ends, the last one first."""
        self._callbacks.append(callback)

    async def close(self) -> None:
        """End the rollout. A callback that fails is logged; the others are called all the same."""
        while self._callbacks:
            try:
                outcome = self._callbacks.pop()()
                if inspect.isawaitable(outcome):
                    async with asyncio.timeout(CLOSE):
                        await outcome
            except (Exception, SystemExit):
                logger.exception("a tool could not be closed")

    async def __aenter__(self) -> "Conversation":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
