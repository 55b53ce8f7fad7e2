"""Tools: plain typed functions that the policy may call, and the rules that hold for every call.

A tool is a sync or async function with type hints and a Google-style docstring; both enter the prompt as its schema
(`transformers.utils.get_json_schema`). It returns text, an image (PIL, or the bytes of a file), a list or tuple that
mixes them, or a `ToolResult`. A parameter annotated `Conversation` is filled in by the toolbox and is not part of the
schema. A function may carry attributes: `timeout`, its own deadline in seconds; `concurrency`, how many of its calls
may run at once; `schema`, the JSON schema of its arguments, which it then takes by name whatever they are; `prepare`,
an async function of the conversation, awaited before each attempt, whose time and failure are the system's;
`after_timeout`, a sentence that the policy reads when a call took too long; `keeps = False` where it only reads the
conversation, so that a fork need not call it again; and `counts = False` where a call's time is its provider's doing
and is not taken from the rollout's.

What goes wrong has one owner. The policy's fault (bad arguments, its code raised, too slow) is an observation. The
system's fault (`SystemFault`, any `OSError`, an HTTP client's transport error, see `is_system`) is tried again and then
raised as `SystemFault`: the rollout is void. So a tool whose arguments name files must itself turn "no such file" into
a `PolicyFault`, or the policy could void the rollouts it is losing.
"""

import asyncio
import contextlib
import functools
import inspect
import io
import logging
import math
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image

from axpo.images import MAX_ASPECT, ImageTooLargeError, as_seen, open_image
from axpo.tools.arguments import called_tool, near, parse_call, read_arguments
from axpo.tools.conversation import Conversation
from axpo.tools.faults import (
    Fault,
    PolicyFault,
    SystemFault,
    ToolError,
    alone,
    cut,
    described,
    is_system,
    short,
)
from axpo.tools.threads import Outcome, Worker

__all__ = [
    "Conversation",
    "Fault",
    "PolicyFault",
    "SystemFault",
    "Tool",
    "ToolError",
    "ToolResult",
    "Toolbox",
    "encode_png",
]

logger = logging.getLogger(__name__)

Tool = Callable[..., Any]

RETRY_AFTER = (0.1, 0.5)  # seconds before the second and the third attempt after a system fault
READY = 60.0  # seconds that `prepare` may take
GRACE = 1.0  # seconds that an async tool which was stopped may take to clean up
_RAISED = 500  # characters of an exception that the policy sees
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class ToolResult:
    """What goes back to the policy. `images` are PNG files; `fault` is None where the call went well."""

    text: str
    images: tuple[bytes, ...] = ()
    fault: Fault | None = None


class Toolbox:
    """The tools that the policy is offered, and the rules for their calls.

    `timeout`: seconds for each attempt at a call. One that is not done by then is stopped and is the policy's fault. A
    sync function cannot be stopped: it goes on in its thread, unheeded.

    `rollout_timeout`: seconds of tool time that a rollout may use in all, None for no limit. It counts while a call
    runs: not while it waits for its turn or its tool gets ready, nor attempts that end in a system fault, nor calls
    that are repeated for a fork. A call that begins within it may still take its own `timeout`, so the bound for a
    rollout is the sum of the two.

    `concurrency`: how many calls of one tool may run at once, over all rollouts; the others wait in order, and their
    time begins with their turn. It holds per event loop. A call that is stopped gives its place to the next even where
    its thread hangs on, so that one bad call cannot block a tool; the threads left behind are counted and told in the
    log.

    `evaluation`: tools that only evaluation offers (`in_evaluation`).

    Raises ToolError for two tools of one name, and for a function that lacks a docstring, the description of an
    argument, or a type hint that JSON can express.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        timeout: float = 30.0,
        rollout_timeout: float | None = None,
        concurrency: int | None = None,
        evaluation: Sequence[Tool] = (),
    ) -> None:
        self._rollout_timeout = math.inf if rollout_timeout is None else rollout_timeout
        self._tools: dict[str, Offer] = {}
        self._evaluation: dict[str, Offer] = {}
        for kept, functions in ((self._tools, tools), (self._evaluation, evaluation)):
            for function in functions:
                offer = Offer(function, timeout, concurrency)
                if offer.name in self._tools or offer.name in self._evaluation:
                    raise ToolError(f"two tools are called {offer.name!r}")
                kept[offer.name] = offer

    @property
    def in_evaluation(self) -> "Toolbox":
        """What evaluation offers. It shares the tools, and their limits on concurrency, with this one."""
        shared = Toolbox([], rollout_timeout=self._rollout_timeout)
        shared._tools = self._tools | self._evaluation
        return shared

    @property
    def names(self) -> list[str]:
        return list(self._tools)

    @property
    def offers(self) -> "list[Offer]":
        """The tools with their limits."""
        return list(self._tools.values())

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """One JSON schema a tool, as chat templates take them."""
        return [offer.arguments.schema for offer in self._tools.values()]

    async def run(self, call_text: str, conversation: Conversation) -> ToolResult:
        """Run the call written between the tags: `{"name": ..., "arguments": {...}}`. Raises SystemFault only."""
        try:
            name, arguments = parse_call(call_text)
        except PolicyFault as fault:
            return _explain(fault)
        return await self.call(name, arguments, conversation)

    def named(self, call_text: str) -> str:
        """The tool that a call names, "" where that is none of these."""
        name = called_tool(call_text)
        return name if name is not None and name in self._tools else ""

    async def repeat(self, call_text: str, conversation: Conversation) -> None:
        """Run a call again for what its tool keeps in the conversation, if it is one that can. Raises SystemFault."""
        name = self.named(call_text)
        if name and self._tools[name].keeps:
            used, conversation.tool_seconds = conversation.tool_seconds, 0.0
            try:
                await self.run(call_text, conversation)
            finally:
                conversation.tool_seconds = used

    async def call(self, name: str, arguments: Mapping[str, Any], conversation: Conversation) -> ToolResult:
        """Check the arguments and run the tool. Raises SystemFault only."""
        try:
            offer = self._offer(name)
            values = offer.arguments.check(arguments)
            if conversation.tool_seconds >= self._rollout_timeout:
                used = f"this rollout has used its {self._rollout_timeout:g} s of tool time"
                raise PolicyFault(f"{used}; answer without tools.", Fault.TIMEOUT)
            output = await offer.run_with_retries(values, conversation)
            try:
                return _result(output) if isinstance(output, str) else await Worker().run(lambda: _result(output))
            except (TypeError, ValueError, OSError) as error:
                raise SystemFault(f"the tool {name!r} returned what cannot be shown: {error}") from error
        except PolicyFault as fault:
            return _explain(fault)
        except RecursionError:
            return _explain(PolicyFault("the arguments are nested too deeply"))

    def _offer(self, name: str) -> "Offer":
        if name in self._tools:
            return self._tools[name]
        meant = near(name, self._tools)
        hint = f"Did you mean {meant!r}?" if meant else f"Tools: {', '.join(self._tools) or 'none'}."
        raise PolicyFault(f"there is no tool {short(name)}. {hint}", Fault.UNKNOWN_TOOL)


class Offer:
    """One tool with its limits: how a call of it runs. `timeout` is in seconds, `concurrency` None for no limit."""

    def __init__(self, function: Tool, timeout: float, concurrency: int | None) -> None:
        self.arguments = read_arguments(function)
        self.name: str = function.__name__
        self.function = function
        self.timeout: float = getattr(function, "timeout", timeout)
        self.keeps = bool(self.arguments.conversation) and getattr(function, "keeps", True)
        self.counts: bool = getattr(function, "counts", True)
        self.concurrency: int | None = getattr(function, "concurrency", concurrency)
        if self.concurrency is not None and self.concurrency < 1:
            raise ToolError(f"tool {self.name!r}: its concurrency is {self.concurrency}; at least 1 call must run")
        self.prepare: Callable[[Conversation], Coroutine[Any, Any, None]] | None = getattr(function, "prepare", None)
        self.after_timeout: str = getattr(function, "after_timeout", "")
        # A semaphore belongs to the first event loop in which anybody waits for it.
        self._turns: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}
        self._left: list[threading.Thread | asyncio.Future[Outcome]] = []  # stopped, but not ended

    async def run_with_retries(self, values: dict[str, Any], conversation: Conversation) -> Any:
        for pause in RETRY_AFTER:
            try:
                return await self.run(values, conversation)
            except SystemFault as fault:
                if fault.final:
                    raise
                logger.warning("tool %s: %s; trying again", self.name, fault)
                await asyncio.sleep(pause)
        return await self.run(values, conversation)

    async def run(self, values: dict[str, Any], conversation: Conversation) -> Any:
        """One attempt, when its turn comes. Raises PolicyFault or SystemFault."""
        call = functools.partial(self.function, **values, **dict.fromkeys(self.arguments.conversation, conversation))
        async with self._turn():
            await self._get_ready(conversation)
            start = time.monotonic()
            output, error = await self._outcome(call)
            fault = None if error is None else self._fault(error)
            if fault is None or isinstance(fault, PolicyFault):
                conversation.tool_seconds += self.counts * (time.monotonic() - start)
            if fault is None:
                return output
            if fault is error:
                raise fault
            raise fault from error

    def _turn(self) -> contextlib.AbstractAsyncContextManager[None]:
        if self.concurrency is None:
            return contextlib.nullcontext()
        for loop in [loop for loop in self._turns if loop.is_closed()]:
            self._turns.pop(loop, None)
        return self._turns.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self.concurrency))

    async def _get_ready(self, conversation: Conversation) -> None:
        if self.prepare is None:
            return
        try:
            async with asyncio.timeout(READY):
                await self.prepare(conversation)
        except (Exception, SystemExit) as error:
            raise SystemFault(f"the tool {self.name!r} does not get ready: {described(error)}") from error

    async def _outcome(self, call: Callable[[], Any]) -> Outcome:
        """What the call returns or raises; a PolicyFault where it takes too long."""
        thread: threading.Thread | None = None
        work: asyncio.Future[Outcome]
        if inspect.iscoroutinefunction(self.function):
            work = asyncio.ensure_future(_caught(call()))
        else:
            worker = Worker()
            work, thread = worker.submit(call), worker.thread
        try:
            if not (await asyncio.wait({work}, timeout=self.timeout))[0]:
                text = f"{self.name} took longer than {self.timeout:g} s. {self.after_timeout}"
                return None, PolicyFault(text.strip(), Fault.TIMEOUT)
        finally:
            if not work.done():
                work.cancel()
                await asyncio.wait({work}, timeout=GRACE)
                self._leave(thread or work)
        if work.cancelled():
            return None, asyncio.CancelledError()
        return work.result()

    def _leave(self, rest: "threading.Thread | asyncio.Future[Outcome]") -> None:
        if not _goes_on(rest):
            return
        self._left = [one for one in self._left if _goes_on(one)] + [rest]
        count = len(self._left)
        if count >= 8 and count & (count - 1) == 0:  # 8, 16, 32, …
            logger.warning("tool %s: %d calls that took too long cannot be stopped and still run", self.name, count)

    def _fault(self, error: BaseException) -> BaseException:
        """Whose fault an exception is. What is meant for the program, such as KeyboardInterrupt, stays what it is."""
        error = alone(error)
        if isinstance(error, PolicyFault | SystemFault):
            return error
        if isinstance(error, asyncio.CancelledError):
            return SystemFault(f"the tool {self.name!r} was cancelled, by none of its callers")
        if not isinstance(error, Exception | SystemExit):
            return error
        if is_system(error):
            return SystemFault(described(error))
        logger.debug("tool %s raised", self.name, exc_info=error)
        return PolicyFault(cut(f"{type(error).__name__}: {error}", _RAISED), Fault.RAISED)


async def _caught(call: Coroutine[Any, Any, Any]) -> Outcome:
    """The outcome of an async tool. A SystemExit that left its task would end the event loop."""
    try:
        return await call, None
    except (Exception, SystemExit) as error:
        return None, error


def _goes_on(rest: "threading.Thread | asyncio.Future[Outcome]") -> bool:
    return rest.is_alive() if isinstance(rest, threading.Thread) else not rest.done()


def _explain(fault: PolicyFault) -> ToolResult:
    return ToolResult(_clean(f"Error: {fault}"), fault=fault.kind)


def _result(output: Any) -> ToolResult:
    """Raises TypeError for what is neither text nor an image, ImageError for what is no image, OSError for one that
    cannot be written, and PolicyFault for one that no model can be shown: its size may be the policy's choice."""
    if isinstance(output, ToolResult):
        return ToolResult(_clean(output.text), tuple(map(as_png, output.images)), output.fault)
    texts: list[str] = []
    images: list[bytes] = []
    for part in output if isinstance(output, list | tuple) else [output]:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, PIL.Image.Image):
            if 0 in part.size:
                size = f"{part.width} × {part.height} pixels"
                raise PolicyFault(f"the image of this call is empty: {size}.", Fault.RAISED)
            images.append(as_png(encode_png(as_seen(part))))
        elif isinstance(part, bytes):
            images.append(as_png(part))
        else:
            raise TypeError(f"{short(part)} is neither text nor an image")
    return ToolResult(_clean("\n".join(texts)), tuple(images))


def as_png(data: bytes) -> bytes:
    """The file of an image as a PNG file. Raises ImageError for what is no image, PolicyFault for what is too large or
    too thin to be shown."""
    try:
        image = open_image(data)  # it is kept, and the model is shown it next
    except ImageTooLargeError as error:
        raise PolicyFault(f"the image of this call is too large to be shown: {error}.", Fault.RAISED) from error
    if max(image.size) > MAX_ASPECT * min(image.size):
        size = f"{image.width} × {image.height} pixels"
        raise PolicyFault(f"the image of this call is too thin to be shown: {size}.", Fault.RAISED)
    return data if data.startswith(_PNG) else encode_png(image)


def encode_png(image: PIL.Image.Image) -> bytes:
    """The image as a PNG file, packed lightly: observations are written far more often than they are sent anywhere."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _clean(text: str) -> str:
    """Lone surrogates can be neither tokenised nor saved."""
    return text.encode("utf-8", "replace").decode("utf-8")
