"""From the names in a config to tools."""

import abc
import dataclasses
import enum
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from axpo.tools.arguments import read_arguments
from axpo.tools.base import Tool, ToolError
from axpo.tools.faults import blame
from axpo.tools.stateful import described_methods, methods


def load_tools(
    names: Sequence[str | Mapping[str, Any]],
    built_in: Mapping[str, Callable[[], Tool]] | None = None,
    key: str = "tools.names",
) -> list[Tool]:
    """The tools of these names, which stand under `key` in a config: `built_in` ones, or paths of Python files.

    A mapping {"mcp": SERVER} adds those of an MCP server, a command line or a URL; with "env": [NAME, …] the command
    gets these environment variables too, with "only": [NAME, …] no other tools of it are taken (`axpo.tools.mcp`).

    Raises ToolError for an unknown name, for a file or a server that gives no tools, and where a built-in tool cannot
    be made.
    """
    known = built_in or {}
    tools: list[Tool] = []
    for place, name in enumerate(names):
        with blame(f"{key}[{place}]"):
            if isinstance(name, Mapping):
                from axpo.tools.mcp import connect  # only a run with a server pays for its import

                tools.extend(connect(name["mcp"], name.get("env", []), name.get("only")))
            elif name in known:
                tools.append(known[name]())
            elif name.endswith(".py"):
                tools.extend(load_file(Path(name)))
            else:
                raise ToolError(f"unknown tool {name!r}: choose from {', '.join(known)}, or give a .py file")
    return tools


def load_file(path: Path) -> list[Tool]:
    """The tools of a Python file: its list `TOOLS`, else its own public functions and classes with a docstring.

    A class stands for its methods (`axpo.tools.stateful`). Dataclasses, enums, exceptions, protocols, abstract classes
    and types of data (TypedDict, NamedTuple, pydantic's) are no tools.

    Raises ToolError that names the file, and the line of what does not import or cannot be offered.
    """
    if not path.is_file():
        raise ToolError(f"the tool file {path} does not exist")
    module = _import(path)
    if hasattr(module, "TOOLS"):
        found = module.TOOLS
        if not isinstance(found, list | tuple) or not all(inspect.isroutine(one) or _is_own_tool(one) for one in found):
            raise ToolError(f"{path}: TOOLS is not a list of functions and classes of tools")
    else:
        own = [one for one in vars(module).values() if getattr(one, "__module__", None) == module.__name__]
        own = [one for one in own if inspect.isfunction(one) or (_is_own_tool(one) and described_methods(one))]
        found = [one for one in own if not one.__name__.startswith("_") and one.__doc__]
    tools = [tool for one in dict.fromkeys(found) for tool in _checked(path, one)]
    if not tools:
        raise ToolError(f"{path} holds no tool: neither TOOLS nor a public function or class with a docstring")
    return tools


def _checked(path: Path, found: Any) -> list[Tool]:
    """The tools of a function or a class. Raises ToolError with the line of what cannot be offered."""
    blamed = found
    try:
        tools = methods(found) if isinstance(found, type) else [found]
        for tool in tools:
            blamed = inspect.unwrap(tool)
            read_arguments(tool)
    except ToolError as error:
        raise ToolError(f"{_place(path, blamed)}: {error}") from error
    return tools


def _is_own_tool(found: Any) -> bool:
    """Whether it is a class, and none that describes data or other classes."""
    if not isinstance(found, type) or dataclasses.is_dataclass(found) or getattr(found, "_is_protocol", False):
        return False
    if inspect.isabstract(found) or abc.ABC in found.__bases__:
        return False
    return not issubclass(found, enum.Enum | BaseException | BaseModel | dict | tuple)


def _place(path: Path, found: Any) -> str:
    try:
        return f"{path}:{inspect.getsourcelines(found)[1]}"
    except (OSError, TypeError):
        return str(path)


def _import(path: Path) -> ModuleType:
    name = f"axpo_tools_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up the module of their class
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename) == path.absolute()]
        if not lines and isinstance(error, SyntaxError):
            lines = [error.lineno]
        place = f"{path}:{lines[-1]}" if lines else str(path)
        raise ToolError(f"{place}: does not import: {type(error).__name__}: {error}") from error
    return module
