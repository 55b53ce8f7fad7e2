"""The tools of MCP servers (Model Context Protocol), by the official client.

A server is a command line, which is started here and spoken to by its stdin and stdout, or an http(s) URL (streamable
HTTP). It is one for all rollouts: what it keeps between calls they share, so a fork does not repeat its calls.

A command gets a short list of environment variables (HOME, LOGNAME, PATH, SHELL, TERM, USER) and those that are named
to it; the values of the named ones are blotted out of all messages. Its stderr is not shown, but for its end in
messages about its failure. It is told to end when this process exits; if this process is killed, its stdin ends, and
with that every server that keeps to the protocol. One that does not outlives us.

Whose fault: what a tool reports as its error, and arguments that the server refuses, are the policy's. A lost
connection, a dead process, HTTP errors, any other error of the protocol, and an answer that makes no sense are the
system's; the next attempt connects again where that is needed. A server that gives no sign of life after a call took
too long is connected to anew, a command so started anew.
"""

import asyncio
import atexit
import base64
import contextlib
import json
import logging
import os
import shlex
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import mcp_types
import PIL.Image
from mcp import Client, MCPError, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client

from axpo.tools.arguments import read_arguments
from axpo.tools.base import Conversation, Fault, PolicyFault, SystemFault, Tool, ToolError, ToolResult, as_png
from axpo.tools.faults import cut, described, short
from axpo.tools.keys import fill_keys

logger = logging.getLogger(__name__)

START = 50.0  # seconds that a server may take to start and list its tools; less than a tool may take to get ready
ALIVE = 5.0  # seconds in which it answers after a call that took too long, or is given up
STOP = 10.0  # seconds that it may take to end
_STDERR = 2000  # bytes of its stderr that are kept
_GONE = (mcp_types.CONNECTION_CLOSED, mcp_types.INVALID_REQUEST)  # the second is how HTTP says that a session ended

for _name in ("mcp", "client"):  # else the library's log lines land on the terminal where no logging is set up
    logging.getLogger(_name).addHandler(logging.NullHandler())


def connect(server: str, env: Sequence[str] = (), only: Sequence[str] | None = None) -> list[Tool]:
    """The tools of an MCP server, a command line or a URL, which is connected to until this process exits.

    `env` names environment variables that a command gets beside the usual ones; `only` the tools to take. Raises
    ToolError that names the server where it cannot be started, reached or understood, or lacks the tools.
    """
    connected = Server(server, env)
    offered = {tool.name: tool for tool in connected.offered}
    missing = [name for name in only or () if name not in offered]
    if missing:
        connected.close()
        raise ToolError(f"the MCP server {connected.name} has no tool {missing[0]!r}; it has {', '.join(offered)}")
    tools = [connected.tool(offered[name]) for name in (only or offered)]
    try:
        for tool in tools:
            read_arguments(tool)
    except ToolError as error:
        connected.close()
        raise ToolError(f"the MCP server {connected.name}: {error}") from error
    return tools


class Server:
    """A connection to an MCP server that lives in a thread with an event loop of its own, so any loop may call."""

    def __init__(self, server: str, env: Sequence[str] = ()) -> None:
        self.name, self._command = _understood(server, env)
        self._url = fill_keys(server, "an MCP server", in_url=True) if self._command is None else server
        self._secrets = [os.environ[name] for name in env if len(os.environ[name]) > 3]
        self._stderr = _Tail()
        self._connection: _Connection | None = None
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self.offered: list[mcp_types.Tool] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_run, args=(self._loop,), daemon=True)
        self._thread.start()
        atexit.register(self.close)
        try:
            asyncio.run_coroutine_threadsafe(self._connect(), self._loop).result()
        except SystemFault as fault:
            self.close()
            raise ToolError(str(fault)) from fault
        except BaseException:
            self.close()
            raise

    def tool(self, offered: mcp_types.Tool) -> Tool:
        """One of its tools as a function that a toolbox takes."""

        async def call(**arguments: Any) -> ToolResult:
            result: ToolResult = await self._elsewhere(self._call(offered.name, arguments))
            return result

        async def prepare(conversation: Conversation) -> None:
            await self._elsewhere(self._connect())

        call.__name__ = call.__qualname__ = offered.name
        call.__doc__ = offered.description or offered.title or ""
        call.__dict__.update(schema=offered.input_schema, prepare=prepare, server=self.name)
        return call

    def close(self) -> None:
        """End the connection, and with it a command. Calls that are under way fail."""
        atexit.unregister(self.close)
        if self._thread.is_alive():
            with contextlib.suppress(Exception):  # it is of no use any more
                asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(STOP)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(1.0)

    async def _elsewhere(self, work: Any) -> Any:
        """Await in the server's loop. A caller that is cancelled cancels it there, and the server is told."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    # What follows runs in the server's loop

    async def _connect(self) -> None:
        """Connect unless that is done. Raises SystemFault."""
        async with self._lock:
            if self._connection is not None and not self._connection.task.done():
                return
            self._connection = None
            self._stderr = _Tail()
            connection = _Connection(self._transport(self._stderr))
            self._keep(connection.task)
            try:
                async with asyncio.timeout(START):
                    offered = await asyncio.shield(connection.opened)
            except TimeoutError as error:
                connection.stop()
                raise SystemFault(self._say(f"does not answer within {START:g} s")) from error
            except Exception as error:
                raise SystemFault(self._say(f"cannot be used: {described(error)}")) from error
            except BaseException:
                connection.stop()
                raise
            try:
                self._accept(offered)
            except BaseException:
                connection.stop()
                raise
            self._connection = connection

    def _accept(self, offered: list[mcp_types.Tool]) -> None:
        names = [tool.name for tool in offered]
        if not names:
            raise SystemFault(self._name("offers no tools"))
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise SystemFault(self._name(f"offers two tools called {twice[0]!r}"))
        before = {tool.name: tool.input_schema for tool in self.offered}
        if before and before != {tool.name: tool.input_schema for tool in offered}:
            raise SystemFault(self._name("has other tools than when the run began"))
        self.offered = offered

    async def _call(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        connection = self._connection
        if connection is None:
            raise SystemFault(self._name("has lost its connection"))
        try:
            return _read(await connection.client.call_tool(name, arguments))
        except MCPError as error:
            if error.code == mcp_types.INVALID_PARAMS:
                raise PolicyFault(f"{name} refused the arguments: {cut(error.message, 500)}") from error
            if error.code not in _GONE:
                raise SystemFault(self._name(f"failed: {error.message}")) from error
            self._drop(connection)
            raise SystemFault(self._say(f"is gone: {error.message}")) from error
        except asyncio.CancelledError:
            self._keep(self._loop.create_task(self._check(connection)))
            raise
        except PolicyFault:
            raise
        except Exception as error:
            raise SystemFault(self._name(f"answered what makes no sense: {described(error)}")) from error

    async def _check(self, connection: "_Connection") -> None:
        """Give up a server that a call seems to have stopped."""
        try:
            async with asyncio.timeout(ALIVE):
                await connection.client.list_tools()
        except Exception:
            if connection.stopped:
                return
            logger.warning("%s; connecting again", self._name(f"gives no sign of life in {ALIVE:g} s"))
            self._drop(connection)

    def _drop(self, connection: "_Connection") -> None:
        connection.stop()
        if self._connection is connection:
            self._connection = None

    def _keep(self, task: "asyncio.Task[None]") -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _stop(self) -> None:
        if self._connection is not None:
            self._drop(self._connection)
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    @contextlib.asynccontextmanager
    async def _transport(self, stderr: "_Tail") -> AsyncIterator[Any]:
        if self._command is None:
            # Without a limit on an event: an image of over 1 MiB is one.
            async with streamable_http_client(self._url, max_sse_event_size=None) as streams:
                yield streams
            return
        read_end, write_end = os.pipe()
        pipe, _ = await self._loop.connect_read_pipe(lambda: stderr, os.fdopen(read_end, "rb"))
        try:
            with os.fdopen(write_end, "w") as writing:
                async with stdio_client(self._command, writing) as streams:
                    writing.close()  # the process has its own: with that one the pipe ends
                    yield streams
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await stderr.ended.wait()
        finally:
            pipe.close()

    def _say(self, what: str) -> str:
        """A message about its end, with the end of what it wrote to stderr."""
        stderr = self._stderr.text.decode("utf-8", "replace").strip()
        return self._name(f"{what}; the end of its stderr:\n{stderr}" if stderr else what)

    def _name(self, what: str) -> str:
        """A message with the server's name, and without secrets."""
        text = f"the MCP server {self.name} {what}"
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


class _Connection:
    """A client in a task of its own, which enters and leaves it, as the library asks."""

    def __init__(self, transport: Any) -> None:
        self.client = Client(transport, cache=None)
        self.opened: asyncio.Future[list[mcp_types.Tool]] = asyncio.get_running_loop().create_future()
        self._stopped = asyncio.Event()
        self.task = asyncio.create_task(self._hold())

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def stop(self) -> None:
        self._stopped.set()
        if not self.opened.done():
            self.task.cancel()

    async def _hold(self) -> None:
        try:
            async with self.client:
                offered = await _list(self.client)
                if not self.opened.done():
                    self.opened.set_result(offered)
                await self._stopped.wait()
        except Exception as error:
            # Once open, it is the transport that failed; the calls under way are told by the library.
            logger.debug("an MCP connection ended", exc_info=error)
            if not self.opened.done():
                self.opened.set_exception(error)


async def _list(client: Client) -> list[mcp_types.Tool]:
    page = await client.list_tools()
    tools = list(page.tools)
    while page.next_cursor is not None:
        page = await client.list_tools(cursor=page.next_cursor)
        tools.extend(page.tools)
    return tools


class _Tail(asyncio.Protocol):
    """The end of what comes out of a pipe."""

    def __init__(self) -> None:
        self.text = b""
        self.ended = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.text = (self.text + data)[-_STDERR:]

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _understood(server: str, env: Sequence[str]) -> tuple[str, StdioServerParameters | None]:
    """How messages call a server, and the command that it is, None for a URL. Raises ToolError."""
    if server.startswith(("http://", "https://")):
        if env:
            raise ToolError(f"the MCP server {server!r} is a URL: only a command gets environment variables")
        parts = urlsplit(server)
        if not parts.hostname:
            raise ToolError(f"the MCP server {server!r} is no URL: it names no host")
        # A password or a key may stand before the host or behind the path.
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}", None
    try:
        words = shlex.split(server)
    except ValueError as error:
        raise ToolError(f"the MCP server {server!r} is no command line: {error}") from error
    if not words:
        raise ToolError("an MCP server is a command line or a URL, not an empty text")
    missing = [name for name in env if name not in os.environ]
    if missing:
        raise ToolError(f"the environment variable {missing[0]}, which the MCP server {server!r} is to get, is not set")
    return short(server, 200), StdioServerParameters(
        command=words[0], args=words[1:], env={name: os.environ[name] for name in env}
    )


def _read(result: mcp_types.CallToolResult) -> ToolResult:
    """The result as text and images. Raises OSError or ValueError for an image that is none."""
    texts: list[str] = []
    images: list[bytes] = []
    for block in result.content:
        part = _part(block)
        if isinstance(part, bytes):
            images.append(part)
        else:
            texts.append(part)
    if not texts and result.structured_content is not None:
        texts.append(json.dumps(result.structured_content, ensure_ascii=False))
    text = "\n".join(texts)
    if result.is_error:
        return ToolResult(text if text.startswith("Error") else f"Error: {text}", tuple(images), Fault.RAISED)
    return ToolResult(text or ("" if images else "(no output)"), tuple(images))


def _part(block: mcp_types.ContentBlock) -> str | bytes:
    """Text, the PNG file of an image, or a word about what is neither."""
    match block:
        case mcp_types.TextContent():
            return block.text
        case mcp_types.ImageContent():
            return _image(block.data, block.mime_type)
        case mcp_types.EmbeddedResource(resource=mcp_types.TextResourceContents(text=text)):
            return text
        case mcp_types.EmbeddedResource(resource=mcp_types.BlobResourceContents() as blob):
            kind = blob.mime_type or "unknown type"
            return (
                _image(blob.blob, kind) if kind.startswith("image/") else f"[a file of {kind}, not shown: {blob.uri}]"
            )
        case mcp_types.AudioContent():
            return f"[sound of {block.mime_type}, not shown]"
        case mcp_types.ResourceLink():
            return f"[a link to {block.name}: {block.uri}]"
    return f"[{block.type}, not shown]"


def _image(data: str, kind: str) -> str | bytes:
    PIL.Image.init()
    if kind not in PIL.Image.MIME.values():
        return f"[an image of {kind}, not shown]"
    return as_png(base64.b64decode(data))
