"""Tools: plain typed functions that the policy may call.

A tool is a sync or async function with type hints and a Google-style docstring; both enter the prompt as its schema
(`transformers.utils.get_json_schema`). It returns text, an image (PIL, or the bytes of a file), a list or tuple that
mixes them, or a `ToolResult`. A parameter annotated `Conversation` is filled in by the toolbox and is not part of the
schema. A function may carry its own deadline in seconds as an attribute `timeout`.

What goes wrong has one owner. The policy's fault (bad arguments, its code raised, too slow) is an observation. The
system's fault (`SystemFault`, any `OSError`, an HTTP client's transport error) is tried again and then raised as
`SystemFault`: the rollout is void. So a tool whose arguments name files must itself turn "no such file" into a
`PolicyFault`, or the policy could void the rollouts it is losing.
"""

import asyncio
import contextvars
import functools
import inspect
import io
import json
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Any, get_type_hints

import PIL.Image
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from transformers.utils.chat_template_utils import (
    DocstringParsingException,
    TypeHintParsingException,
    get_json_schema,
)

logger = logging.getLogger(__name__)

Tool = Callable[..., Any]

RETRY_AFTER = (0.1, 0.5)  # seconds before the second and the third attempt after a system fault
_PNG = b"\x89PNG\r\n\x1a\n"
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)


class Fault(StrEnum):
    """What the policy did wrong in a call."""

    MALFORMED = "malformed"  # the call is not the JSON that was asked for
    UNKNOWN_TOOL = "unknown_tool"
    BAD_ARGUMENTS = "bad_arguments"
    RAISED = "raised"  # the tool, or the policy's code in it, raised an exception
    TIMEOUT = "timeout"


class ToolError(ValueError):
    """A tool cannot be offered: it is not described well enough, or its file or corpus cannot be used."""


class PolicyFault(Exception):  # noqa: N818 (a fault, not a mistake in the program)
    """Raised by a tool to tell the policy what it did wrong."""

    def __init__(self, message: str, kind: Fault = Fault.BAD_ARGUMENTS) -> None:
        super().__init__(message)
        self.kind = kind


class SystemFault(Exception):  # noqa: N818
    """Raised by a tool whose provider is down or whose sandbox is lost. The policy never sees it."""


@dataclass(frozen=True)
class ToolResult:
    """What goes back to the policy. `images` are PNG files; `fault` is None where the call went well."""

    text: str
    images: tuple[bytes, ...] = ()
    fault: Fault | None = None


class Conversation:
    """What tools may know and keep of one rollout.

    `images` are the encoded files of all its images at their original resolution, in order, those that tools returned
    included. `state` is for tools that keep something between calls, under a key of their own.
    """

    def __init__(self, images: Sequence[bytes] = ()) -> None:
        self.images = list(images)
        self.state: dict[str, Any] = {}
        self._callbacks: list[Callable[[], object]] = []

    def on_close(self, callback: Callable[[], object]) -> None:
        """Call `callback` (sync or async) when the rollout ends, the last one registered first."""
        self._callbacks.append(callback)

    async def close(self) -> None:
        """End the rollout. A callback that fails is logged; the others are called all the same."""
        while self._callbacks:
            try:
                outcome = self._callbacks.pop()()
                if inspect.isawaitable(outcome):
                    await outcome
            except Exception:
                logger.exception("a tool could not be closed")

    async def __aenter__(self) -> "Conversation":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class Toolbox:
    """The tools that the policy is offered.

    `timeout` is in seconds for each attempt at a call. Raises ToolError for two tools of one name, and for a function
    that lacks a docstring, the description of an argument, or a type hint that JSON can express.
    """

    def __init__(self, tools: Sequence[Tool], timeout: float = 30.0) -> None:
        self._tools: dict[str, _Offer] = {}
        for function in tools:
            offer = _Offer(function, timeout)
            if offer.name in self._tools:
                raise ToolError(f"two tools are called {offer.name!r}")
            self._tools[offer.name] = offer

    @property
    def names(self) -> list[str]:
        return list(self._tools)

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """One JSON schema a tool, as chat templates take them."""
        return [offer.schema for offer in self._tools.values()]

    async def run(self, call_text: str, conversation: Conversation) -> ToolResult:
        """Run the call written between the tags: `{"name": ..., "arguments": {...}}`. Raises SystemFault only."""
        try:
            name, arguments = _parse(call_text)
        except PolicyFault as fault:
            return _explain(fault)
        return await self.call(name, arguments, conversation)

    def named(self, call_text: str) -> str:
        """The tool that a call names, "" where that is none of these."""
        try:
            name, _ = _parse(call_text)
        except PolicyFault:
            return ""
        return name if name in self._tools else ""

    async def repeat(self, call_text: str, conversation: Conversation) -> None:
        """Run a call again for what its tool keeps in the conversation, if it is one that can. Raises SystemFault."""
        name = self.named(call_text)
        if name and self._tools[name].conversation:
            await self.run(call_text, conversation)

    async def call(self, name: str, arguments: Mapping[str, Any], conversation: Conversation) -> ToolResult:
        """Check the arguments and run the tool. Raises SystemFault only."""
        try:
            offer = self._tools.get(name)
            if offer is None:
                known = ", ".join(self._tools) or "none"
                raise PolicyFault(f"there is no tool {_short(name)}. Tools: {known}.", Fault.UNKNOWN_TOOL)
            values = offer.check(arguments)
            output = await offer.run_with_retries(values, conversation)
        except PolicyFault as fault:
            return _explain(fault)
        except RecursionError:
            return _explain(PolicyFault("the arguments are nested too deeply"))
        try:
            return _result(output)
        except (TypeError, OSError) as error:
            raise SystemFault(f"the tool {name!r} returned what cannot be shown: {error}") from error


class _Offer:
    """One tool: its function, the schema, and how its arguments are checked."""

    def __init__(self, function: Tool, timeout: float) -> None:
        if not inspect.isroutine(function):
            raise ToolError(f"a tool is a function, but {function!r} is not")
        self.name: str = function.__name__
        self.function = function
        self.timeout: float = getattr(function, "timeout", timeout)
        signature, hints = inspect.signature(function), _hints(function)
        for parameter in signature.parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise ToolError(f"tool {self.name!r}: the parameter {str(parameter)!r} cannot be passed by name")
        self.conversation = [name for name, hint in hints.items() if hint is Conversation]
        shown = {name: p for name, p in signature.parameters.items() if name not in self.conversation}
        try:
            self.schema = get_json_schema(_stand_in(function, shown, hints))
            self.adapters = {name: TypeAdapter[Any](hints[name], config=_STRICT) for name in shown}
        except (DocstringParsingException, TypeHintParsingException, PydanticUserError) as error:
            raise ToolError(f"tool {self.name!r}: {error}") from error
        self.required = [name for name, parameter in shown.items() if parameter.default is parameter.empty]

    def check(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as the function takes them. Raises PolicyFault that says what is wrong with them."""
        wrong = [f"missing argument {name!r}" for name in self.required if name not in arguments]
        values = {}
        for name, value in arguments.items():
            if name not in self.adapters:
                wrong.append(f"unknown argument {_short(name)}")
                continue
            try:
                values[name] = self.adapters[name].validate_json(json.dumps(_whole(value)))
            except (ValidationError, PolicyFault) as error:
                wrong.append(f"{name}{_complaint(error)}, not {_short(value)}")
        if wrong:
            raise PolicyFault(f"{'; '.join(wrong[:3])}. {self.name} takes {self.expected()}.")
        return values

    def expected(self) -> str:
        properties: dict[str, Any] = self.schema["function"]["parameters"]["properties"]
        described = [
            f"{name} ({schema.get('type', 'any')}{'' if name in self.required else ', optional'})"
            for name, schema in properties.items()
        ]
        return ", ".join(described) or "no arguments"

    async def run_with_retries(self, values: dict[str, Any], conversation: Conversation) -> Any:
        for pause in RETRY_AFTER:
            try:
                return await self.run(values, conversation)
            except SystemFault as fault:
                logger.warning("tool %s: %s; trying again", self.name, fault)
                await asyncio.sleep(pause)
        return await self.run(values, conversation)

    async def run(self, values: dict[str, Any], conversation: Conversation) -> Any:
        """One attempt. Every exception leaves it as either PolicyFault or SystemFault."""
        call = functools.partial(self.function, **values, **dict.fromkeys(self.conversation, conversation))
        try:
            async with asyncio.timeout(self.timeout) as deadline:
                return await (call() if inspect.iscoroutinefunction(self.function) else _in_thread(call))
        except (PolicyFault, SystemFault):
            raise
        except (Exception, SystemExit) as error:
            if isinstance(error, TimeoutError) and deadline.expired():
                raise PolicyFault(f"{self.name} took longer than {self.timeout:g} s.", Fault.TIMEOUT) from error
            if _is_transport(error):
                raise SystemFault(f"{type(error).__name__}: {error}") from error
            logger.debug("tool %s raised", self.name, exc_info=error)
            raise PolicyFault(f"{type(error).__name__}: {error}", Fault.RAISED) from error


def _hints(function: Tool) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except NameError as error:
        raise ToolError(f"tool {function.__name__!r}: a type hint cannot be resolved: {error}") from error


def _stand_in(function: Tool, shown: Mapping[str, inspect.Parameter], hints: Mapping[str, Any]) -> Tool:
    """What `get_json_schema` is to see: no conversation, and no return type, which would only lengthen the prompt."""

    def stand_in() -> None: ...

    stand_in.__name__ = function.__name__
    stand_in.__doc__ = function.__doc__
    stand_in.__annotations__ = {name: hints[name] for name in shown if name in hints}
    stand_in.__signature__ = inspect.Signature(list(shown.values()))  # type: ignore[attr-defined]
    return stand_in


def _parse(call_text: str) -> tuple[str, dict[str, Any]]:
    form = 'A call is {"name": <name>, "arguments": <object>}.'
    try:
        call = json.loads(call_text, object_pairs_hook=_unique)
        if isinstance(call, dict) and isinstance(call.get("arguments"), str):
            call["arguments"] = json.loads(call["arguments"], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise PolicyFault(f"the call is not valid JSON: {error}. {form}", Fault.MALFORMED) from error
    if not isinstance(call, dict):
        raise PolicyFault(f"the call is not a JSON object. {form}", Fault.MALFORMED)
    if call.keys() != {"name", "arguments"}:
        keys = ", ".join(map(_short, call)) or "none"
        raise PolicyFault(f"the call has these keys: {keys}. {form}", Fault.MALFORMED)
    if not isinstance(call["name"], str) or not isinstance(call["arguments"], dict):
        raise PolicyFault(f"the name is not a string or the arguments are not an object. {form}", Fault.MALFORMED)
    return call["name"], call["arguments"]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {_short(key)} is given twice")
        found[key] = value
    return found


def _whole(value: Any) -> Any:
    """The value with 3.0 as 3, which JSON does not tell apart. Raises PolicyFault for NaN and infinities."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise PolicyFault(": Input should be a finite number")
        return int(value) if value.is_integer() else value
    if isinstance(value, list | tuple):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    return value


def _complaint(error: ValidationError | PolicyFault) -> str:
    if isinstance(error, PolicyFault):
        return str(error)
    first = error.errors(include_url=False)[0]
    return "".join(f"[{place}]" for place in first["loc"]) + f": {first['msg']}"


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _explain(fault: PolicyFault) -> ToolResult:
    return ToolResult(_clean(f"Error: {fault}"), fault=fault.kind)


def _result(output: Any) -> ToolResult:
    """Raises TypeError or OSError for what is neither text nor an image."""
    if isinstance(output, ToolResult):
        return ToolResult(_clean(output.text), output.images, output.fault)
    texts: list[str] = []
    images: list[bytes] = []
    for part in output if isinstance(output, list | tuple) else [output]:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, PIL.Image.Image):
            images.append(encode_png(part))
        elif isinstance(part, bytes):
            images.append(part if part.startswith(_PNG) else encode_png(PIL.Image.open(io.BytesIO(part))))
        else:
            raise TypeError(f"{_short(part)} is neither text nor an image")
    return ToolResult(_clean("\n".join(texts)), tuple(images))


def encode_png(image: PIL.Image.Image) -> bytes:
    """The image as a PNG file, packed lightly: observations are written far more often than they are sent anywhere."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _clean(text: str) -> str:
    """Lone surrogates can be neither tokenised nor saved."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _is_transport(error: BaseException) -> bool:
    """Whether the error came from outside: of the system, or of an HTTP client (httpx's base class goes by name)."""
    return isinstance(error, OSError) or any(base.__name__ == "TransportError" for base in type(error).__mro__)


async def _in_thread(function: Callable[[], Any]) -> Any:
    """Run a sync function in a thread of its own.

    Not `asyncio.to_thread`: its few threads are shared, so tools that hang would stop all others and the exit too.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

    def deliver(output: Any, error: BaseException | None) -> None:
        if not future.done():
            future.set_result((output, error))

    def work() -> None:
        outcome: tuple[Any, BaseException | None]
        try:
            outcome = (function(), None)
        except BaseException as error:
            outcome = (None, error)
        if not loop.is_closed():
            loop.call_soon_threadsafe(deliver, *outcome)

    threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True).start()
    output, error = await future
    if error is not None:
        raise error
    return output
