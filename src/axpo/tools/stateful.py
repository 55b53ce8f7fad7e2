"""Own tools that keep something: the methods of a class, of which each rollout has an instance of its own.

Each public method with a docstring is a tool, but for `close`. The instance is made at the first call of one of them in
a rollout; `__init__` takes nothing, or one parameter annotated `Conversation`, and what it raises is the system's
fault: the policy gave it nothing. `close`, sync or async, is called when the rollout ends.

What is guaranteed: the calls of a rollout run one after another (the agent makes them so). `__init__`, sync methods and
a sync `close` run in one thread, which is the instance's own, so that what belongs to a thread (a connection to SQLite)
can be kept; async methods run in the event loop. A call that took too long may go on in that thread, so it takes the
instance with it: the next call finds a new one, and the policy is told. A fork repeats the calls of its prefix on an
instance of its own.
"""

import asyncio
import functools
import inspect
from typing import Any

from axpo.tools.arguments import resolved_hints
from axpo.tools.base import Conversation, Tool, ToolError
from axpo.tools.threads import Worker

LOST = "All that it kept is lost."
_FILLED = "_conversation"  # the parameter by which the toolbox hands the conversation over


def described_methods(kind: type) -> dict[str, Any]:
    """The methods that are tools, in the order of their definition. Those of classes from other files are none."""
    functions: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base.__module__ == kind.__module__:
            functions |= vars(base)
    shown = {name: f for name, f in functions.items() if inspect.isfunction(f) and not name.startswith("_")}
    return {name: f for name, f in shown.items() if f.__doc__ and name != "close"}


def methods(kind: type) -> list[Tool]:
    """The tools of a class. Raises ToolError where it has none, or `__init__` cannot be called."""
    described = described_methods(kind)
    if not described:
        raise ToolError(f"the class {kind.__name__} has no public method with a docstring")
    maker = _Maker(kind)
    return [_tool(maker, name, function) for name, function in described.items()]


class _Instance:
    """One rollout's object and the thread in which it lives."""

    def __init__(self) -> None:
        self.object: Any = None
        self.worker = Worker()
        self.given_up = False

    async def run(self, function: Any, **values: Any) -> Any:
        call = functools.partial(function, self.object, **values)
        return await (call() if inspect.iscoroutinefunction(function) else self.worker.run(call))

    async def close(self) -> None:
        close = getattr(self.object, "close", None)
        if inspect.iscoroutinefunction(close):
            await close()
        elif callable(close):
            closed = self.worker.submit(close)
            if not self.given_up:  # else it waits behind a call that may never end
                _, error = await closed
                if error is not None:
                    raise error


class _Maker:
    """Makes the instances of one class."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.key = f"{kind.__qualname__} {id(kind)}"  # files may have classes of one name
        self.takes: list[str] = []
        if "__init__" in {name for base in kind.__mro__[:-1] for name in vars(base)}:
            hints = resolved_hints(kind.__init__)  # type: ignore[misc]
            parameters = list(inspect.signature(kind).parameters.values())
            needed = [
                p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            ]
            self.takes = [p.name for p in parameters if hints.get(p.name) is Conversation]
            if len(self.takes) > 1 or not set(needed) <= set(self.takes):
                raise ToolError(
                    f"the class {kind.__name__}: __init__ takes nothing, or one parameter annotated Conversation, "
                    f"not {', '.join(needed)}"
                )

    async def prepare(self, conversation: Conversation) -> None:
        """Make the rollout's instance, if it has none."""
        if self.key in conversation.state:
            return
        instance = _Instance()
        make = functools.partial(self.kind, **dict.fromkeys(self.takes, conversation))
        instance.object = await instance.worker.run(make)
        conversation.state[self.key] = instance
        conversation.on_close(instance.close)


def _tool(maker: _Maker, name: str, function: Any) -> Tool:
    hints = resolved_hints(function)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    filled = [p.name for p in parameters if hints.get(p.name) is Conversation]
    shown = [p for p in parameters if p.name not in filled]

    async def method(**values: Any) -> Any:
        conversation = values.pop(_FILLED)
        instance: _Instance = conversation.state[maker.key]
        try:
            return await instance.run(function, **values, **dict.fromkeys(filled, conversation))
        except asyncio.CancelledError:
            instance.given_up = True
            conversation.state.pop(maker.key, None)
            raise

    method.__name__ = name
    method.__qualname__ = f"{maker.kind.__qualname__}.{name}"
    method.__doc__ = function.__doc__
    method.__module__ = function.__module__
    method.__annotations__ = {p.name: hints[p.name] for p in shown if p.name in hints} | {_FILLED: Conversation}
    taken = inspect.Parameter(_FILLED, inspect.Parameter.KEYWORD_ONLY, annotation=Conversation)
    attributes = {"prepare": maker.prepare, "after_timeout": LOST, "__signature__": inspect.Signature([*shown, taken])}
    method.__dict__.update({**vars(function), **attributes, "__wrapped__": function})
    return method
