"""A server that speaks the protocols of the search providers, and fails in all the ways that servers fail."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import PIL.Image
import pytest


@dataclass
class Request:
    """What the server was sent."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    time: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class SearchServer:
    """Answers at `url`, as Tavily under /tavily, as Serper under /serper, as SearXNG under /searxng.

    /any answers what `answer` holds; /images takes images; /thumbnails/N.png are images. `faults` are met by the next
    requests, in turn: an HTTP status ("500"), perhaps with a Retry-After ("429 2"), "garbage", "truncated", "drop" (the
    connection ends), "hang" (no answer), "drip" (a byte at a time, forever). `results` are what is found.
    """

    url: str
    key: str = "sk-+the/secret=key with-more"
    faults: list[str] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    answer: Any = None
    connections: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)

    def respond(self, request: Request) -> tuple[int, Any]:
        """The status and the JSON (or bytes) of an answer that goes well."""
        bearer, key = request.headers.get("authorization"), request.headers.get("x-api-key")
        rows = self.results
        match request.method, request.path:
            case "POST", "/tavily/search":
                if bearer != f"Bearer {self.key}":
                    return 401, {"detail": {"error": f"Unauthorized: invalid API key {bearer}"}}
                keys = {"title": "title", "link": "url", "text": "content"}
                found = [{keys[name]: value for name, value in row.items() if name in keys} for row in rows]
                return 200, {"query": request.json["query"], "results": found[: request.json["max_results"]]}
            case "POST", "/serper/search" | "/serper/lens":
                if key != self.key:
                    return 403, {"message": f"Unauthorized {key}", "statusCode": 403}
                keys = {"title": "title", "link": "link", "text": "snippet", "thumbnail": "thumbnailUrl"}
                found = [{keys[name]: value for name, value in row.items() if name in keys} for row in rows]
                return 200, {"searchParameters": request.json} | ({"organic": found} if found else {})
            case "GET", "/searxng/search":
                if request.query.get("format") != "json":
                    return 403, {}
                keys = {"title": "title", "link": "url", "text": "content"}
                found = [{keys[name]: value for name, value in row.items() if name in keys} for row in rows]
                return 200, {"query": request.query["q"], "results": found, "unresponsive_engines": []}
            case "POST", "/upload":
                return 200, {"url": f"{self.url}/uploaded.png"}
            case "POST", "/images":
                return 200, {"results": rows}
            case "GET", path if path.startswith("/thumbnails/"):
                return 200, picture(int(path.removeprefix("/thumbnails/").removesuffix(".png")))
            case _, "/any":
                return 200, self.answer
        return 404, {"error": f"no such page: {request.path}"}


def picture(side: int) -> bytes:
    """A PNG of side × side pixels."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (side, side), (side % 256, 80, 40)).save(file, "PNG")
    return file.getvalue()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def setup(self) -> None:
        super().setup()
        self.server.state.connections += 1

    def _serve(self) -> None:
        state: SearchServer = self.server.state
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        request = Request(self.command, parts.path, query, headers, body, time.monotonic())
        state.requests.append(request)
        fault, _, after = (state.faults.pop(0) if state.faults else "").partition(" ")
        if fault == "drop":
            self.close_connection = True
        elif fault == "hang":
            state.stopped.wait(30)
            self.close_connection = True
        elif fault == "drip":
            self._head(200, 10_000)
            while not state.stopped.wait(0.02):
                self.wfile.write(b" ")
                self.wfile.flush()
        elif fault == "truncated":
            self._head(200, 10_000)
            self.wfile.write(b'{"results": [')
            self.close_connection = True
        elif fault == "garbage":
            self._send(200, b"<html>no JSON</html>")
        elif fault:
            self._send(int(fault), f"went wrong: {self.path} {' ' * 150} {headers}".encode(), after)
        else:
            status, answer = state.respond(request)
            self._send(status, answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    def _head(self, status: int, length: int, after: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if after:
            self.send_header("Retry-After", after)
        self.end_headers()

    def _send(self, status: int, body: bytes, after: str = "") -> None:
        self._head(status, len(body), after)
        self.wfile.write(body)

    do_GET = do_POST = _serve  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        pass  # clients hang up in these tests


@pytest.fixture(scope="session")
def warm_client() -> None:
    """The first request imports much, for which the short deadlines of these tests have no time."""

    async def knock() -> None:
        async with httpx.AsyncClient() as client:
            with contextlib.suppress(httpx.TransportError):
                await client.get("http://127.0.0.1:9")

    asyncio.run(knock())


@pytest.fixture
def serve(warm_client: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any, Callable[[str], Any]], Any]]:
    """Starts a server on loopback. Its handlers find what `make` makes of its URL as `self.server.state`."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with contextlib.ExitStack() as servers:

        def start(handler: Any, make: Callable[[str], Any]) -> Any:
            server: Any = servers.enter_context(_Server(("127.0.0.1", 0), handler))
            server.state = make(f"http://127.0.0.1:{server.server_port}")
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            servers.callback(server.shutdown)
            servers.callback(server.state.stopped.set)
            return server.state

        yield start


@pytest.fixture
def search_server(serve: Callable[..., SearchServer], monkeypatch: pytest.MonkeyPatch) -> SearchServer:
    """A `SearchServer` on loopback, whose key is in TAVILY_API_KEY, SERPER_API_KEY and MY_KEY."""
    state = serve(_Handler, SearchServer)
    state.results = [
        {"title": "Velm", "link": "https://velm.example/tower", "text": "The tower of Velm has 41 steps."},
        {"title": "Oru", "link": "https://oru.example", "text": "Oru is a town\n\n\non a\tlake."},
    ]
    for variable in ("TAVILY_API_KEY", "SERPER_API_KEY", "MY_KEY"):
        monkeypatch.setenv(variable, state.key)
    return state
