"""Threads for sync tools, which the event loop must not wait for.

Not `asyncio.to_thread`: its few threads are shared, so tools that hang would stop all others and the exit too.
"""

import asyncio
import contextlib
import contextvars
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

Outcome = tuple[Any, BaseException | None]  # what a function returned, or what it raised
_Job = tuple[Callable[[], Any], contextvars.Context, asyncio.AbstractEventLoop, "asyncio.Future[Outcome]"]


class Worker:
    """A thread that calls the functions it is given one after another, and ends when nobody holds the worker."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=_work, args=(self._jobs,), daemon=True)
        self.thread.start()
        weakref.finalize(self, self._jobs.put, None)

    def submit(self, function: Callable[[], Any]) -> "asyncio.Future[Outcome]":
        """Call the function in the thread. Cancelling the future stops the waiting, not the function."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Outcome] = loop.create_future()
        self._jobs.put((function, contextvars.copy_context(), loop, future))
        return future

    async def run(self, function: Callable[[], Any]) -> Any:
        output, error = await self.submit(function)
        if error is not None:
            raise error
        return output


def _work(jobs: "queue.SimpleQueue[_Job | None]") -> None:
    while (job := jobs.get()) is not None:
        function, context, loop, future = job
        outcome: Outcome
        try:
            outcome = (context.run(function), None)
        except BaseException as error:
            outcome = (None, error)
        with contextlib.suppress(RuntimeError):  # the loop was closed while the function ran: nobody waits
            loop.call_soon_threadsafe(_deliver, future, outcome)
        del job, function, context, loop, future, outcome  # while the thread waits for the next job


def _deliver(future: "asyncio.Future[Outcome]", outcome: Outcome) -> None:
    if not future.done():
        future.set_result(outcome)
