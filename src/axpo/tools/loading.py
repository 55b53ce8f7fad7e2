"""From the names in a config to tools."""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from axpo.tools.base import Tool, ToolError
from axpo.tools.python import Interpreters, make_python
from axpo.tools.sandbox import Sandbox
from axpo.tools.search import make_search
from axpo.tools.zoom import make_zoom

BUILT_IN = ("zoom", "python", "search")


def load_tools(
    names: Sequence[str],
    corpus: Path | Sequence[Mapping[str, str]] | None = None,
    zoom_pixels: int = 262_144,
    search_results: int = 3,
    timeout: float = 30.0,
    sandbox: Interpreters | None = None,
) -> list[Tool]:
    """The tools of these names: "zoom", "python", "search" (which needs a corpus), or the path of a Python file.

    Raises ToolError for an unknown name, for `search` without a usable corpus, and for a file that gives no tools.
    """
    tools: list[Tool] = []
    for name in names:
        if name == "zoom":
            tools.append(make_zoom(zoom_pixels))
        elif name == "python":
            tools.append(make_python(sandbox or Sandbox(), timeout))
        elif name == "search":
            if corpus is None:
                raise ToolError("the tool 'search' needs a corpus")
            tools.append(make_search(corpus, search_results))
        elif name.endswith(".py"):
            tools.extend(load_file(Path(name)))
        else:
            raise ToolError(f"unknown tool {name!r}: choose from {', '.join(BUILT_IN)}, or give a .py file")
    return tools


def load_file(path: Path) -> list[Tool]:
    """The tools of a Python file: those in its list `TOOLS`, else its own public functions with a docstring.

    Raises ToolError that names the file, and the line where it does not import.
    """
    if not path.is_file():
        raise ToolError(f"the tool file {path} does not exist")
    module = _import(path)
    if hasattr(module, "TOOLS"):
        tools = module.TOOLS
        if not isinstance(tools, list | tuple) or not all(inspect.isroutine(tool) for tool in tools):
            raise ToolError(f"{path}: TOOLS is not a list of functions")
        tools = list(tools)
    else:
        own = (f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == module.__name__)
        tools = [f for f in dict.fromkeys(own) if not f.__name__.startswith("_") and f.__doc__]
    if not tools:
        raise ToolError(f"{path} holds no tool: neither TOOLS nor a public function with a docstring")
    return tools


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
