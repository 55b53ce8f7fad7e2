"""The tools that have names in a config, made from its options when they are asked for."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from axpo.tools.base import Tool, ToolError
from axpo.tools.faults import blame
from axpo.tools.python import Interpreters, make_python
from axpo.tools.remote import RemoteSandbox
from axpo.tools.sandbox import Sandbox
from axpo.tools.zoom import make_zoom

if TYPE_CHECKING:
    from axpo.options import ToolsConfig
    from axpo.tools.providers import Provider
    from axpo.tools.search import Shorten

Documents = Path | Sequence[Mapping[str, str]] | None


def built_in(
    options: "ToolsConfig", documents: Callable[[], Documents], shorten: "Shorten"
) -> dict[str, Callable[[], Tool]]:
    """What makes each tool. `documents` are those of local search, `shorten` cuts a text to so many tokens.

    Making one raises ToolError where it cannot work as the options say.
    """

    def make_search_tool() -> Tool:
        from axpo.tools.search import make_search  # only a run that searches pays for the import

        provider = _provider(options, documents)
        return make_search(provider, options.search_results, shorten, options.search_tokens)

    return {
        "zoom": lambda: make_zoom(options.zoom_pixels),
        "python": lambda: make_python(_interpreters(options), options.timeout),
        "search": make_search_tool,
        "image_search": lambda: _image_search(options),
    }


def undone(options: "ToolsConfig") -> dict[str, Callable[[], Tool]]:
    """The same where nobody will call them: what they work with need not be there."""
    from axpo.tools.image_search import make_image_search
    from axpo.tools.search import make_search

    nothing: Any = SimpleNamespace(level="none", longest=None)
    return {
        "zoom": lambda: make_zoom(options.zoom_pixels),
        "python": lambda: make_python(nothing),
        "search": lambda: make_search(nothing),
        "image_search": lambda: make_image_search(nothing),
    }


def _interpreters(options: "ToolsConfig") -> Interpreters:
    if isinstance(options.sandbox, dict):
        remote = RemoteSandbox(options.sandbox["remote"])
        remote.check()
        return remote
    return _checked_sandbox(options.sandbox, options.cache / "matplotlib")


@functools.cache
def _checked_sandbox(level: str, fonts: Path) -> Sandbox:
    """One for the whole process: its template takes a second to start."""
    sandbox = Sandbox(level, fonts=fonts)
    sandbox.check()
    return sandbox


def _provider(options: "ToolsConfig", documents: Callable[[], Documents]) -> "Provider":
    from axpo.tools import corpus, providers
    from axpo.tools.web import Limits

    name, address = _named(options.search)
    if name == "local":
        source = documents()
        if source is None:
            raise ToolError("tools.corpus: the tool 'search' needs a .jsonl or .parquet file of documents")
        with blame("tools.corpus"):
            return corpus.open_corpus(source, options.cache, options.embedder)
    limits, cache = Limits(rate=options.search_rate), options.cache / "search"
    with blame("tools.search"):
        if name == "url":
            return providers.endpoint(address, limits, cache)
        if name == "searxng":
            return providers.searxng(address, limits, cache)
        make = {"tavily": providers.tavily, "serper": providers.serper}[name]
        return make(address, limits, cache) if address else make(limits=limits, cache=cache)


def _image_search(options: "ToolsConfig") -> Tool:
    from axpo.tools.image_providers import ImageProvider, ImageTable, image_endpoint, serper_lens
    from axpo.tools.image_search import make_image_search
    from axpo.tools.web import Limits

    if options.image_search is None:
        raise ToolError("tools.image_search: the tool 'image_search' needs it, to know where to search")
    ((name, address),) = options.image_search.items()
    limits, cache = Limits(rate=options.search_rate), options.cache / "image_search"
    provider: ImageProvider
    with blame("tools.image_search"):
        if name == "table":
            provider = ImageTable(Path(address))
        elif name == "url":
            provider = image_endpoint(address, limits, cache)
        else:
            provider = serper_lens(address, limits, cache)
    return make_image_search(provider, cache=cache)


def _named(choice: str | dict[str, str]) -> tuple[str, str]:
    return next(iter(choice.items())) if isinstance(choice, dict) else (choice, "")
