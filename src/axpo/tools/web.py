"""Requests to other people's servers: limited in time and rate, tried again with patience, given up for a while.

Every HTTP provider asks through one `Web`, so what is to be done about a server that is slow, busy, broken or gone is
decided here and nowhere else. What fails for good is a `SystemFault` that is `final`: the toolbox, which tries other
system faults again, leaves it alone, so attempts are never multiplied.
"""

import asyncio
import datetime
import email.utils
import functools
import json
import math
import random
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from axpo.tools.base import SystemFault, ToolError
from axpo.tools.keys import redact

T = TypeVar("T")

_BUSY = (408, 425, 429)  # worth another attempt, as is 500 and above

_certificates = functools.cache(httpx.create_ssl_context)  # reading them takes longer than a request


@dataclass(frozen=True)
class Limits:
    """How patient a `Web` is: in its turn, a call takes at most attempts · (timeout + longest_pause) seconds."""

    timeout: float = 15.0
    """Seconds that one attempt may take in all, however steadily the server drips."""
    attempts: int = 4
    """How often a request is sent at most."""
    pause: float = 0.5
    """Seconds before the second attempt; they double with each. Up to half is taken off at random."""
    longest_pause: float = 30.0
    """Seconds. A server that asks for more (Retry-After) is given up at once."""
    rate: float | None = None
    """Requests a second, of all rollouts that share the tool."""
    failures: int | None = 5
    """Requests given up in a row after which all fail at once. None: never."""
    cool_down: float = 30.0
    """Seconds for which they do. Then one request is let through, and its outcome decides."""

    def __post_init__(self) -> None:
        for name in ("timeout", "attempts", "rate", "failures"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ToolError(f"{name}: got {value}, but it must be above 0")


class Web:
    """Sends requests on behalf of one provider, which `name` names in messages.

    May be used from one event loop after the other, and from several at once. `clock` and `sleep` are for tests.
    """

    def __init__(
        self,
        name: str,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Any] = asyncio.sleep,
    ) -> None:
        self.name = name
        self.limits = limits or Limits()
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()  # held for a few instructions, never across an await
        self._next = 0.0  # when the next request may be sent
        self._failed = 0  # requests given up since the last answer
        self._closed_until = 0.0
        self._trying = False
        self._clients: dict[
            asyncio.AbstractEventLoop, tuple[httpx.AsyncClient, AsyncGenerator[httpx.AsyncClient, None]]
        ] = {}

    async def fetch(
        self,
        method: str,
        url: str,
        read: Callable[[bytes], T],
        advice: str = "check the address",
        max_bytes: int = 8_000_000,
        **request: Any,
    ) -> T:
        """What `read` makes of the answer's body; it raises ValueError for a body that it cannot use.

        Tried again: no answer in time, a transport error, 408, 425, 429, 5xx, and what `read` refuses. Any other status
        is a mistake of ours, or of the key: given up at once. `request` goes to `httpx.AsyncClient.stream`.

        Raises SystemFault that says what went wrong and, with `advice`, what to check.
        """
        trial = self._admit()
        answered: bool | None = None  # None: cancelled, which says nothing about the server
        problem, pause = "", 0.0
        try:
            for attempt in range(1 if trial else self.limits.attempts):
                await self._turn(pause, trial)
                client = await self._client()
                status, headers = 0, httpx.Headers()
                try:
                    async with asyncio.timeout(self.limits.timeout):
                        status, headers, body = await _send(client, method, url, max_bytes, request)
                    if 200 <= status < 300:
                        value = _understood(read, body)
                        answered = True
                        return value
                    problem = f"it answered {status}{_excerpt(body)}"
                except TimeoutError:
                    problem = f"no answer within {self.limits.timeout:g} s"
                except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
                    problem = f"{type(error).__name__}: {error}"
                if 300 <= status < 500 and status not in _BUSY:
                    answered = True  # the server is well
                    break
                pause = self._pause(attempt, headers, status)
                if pause > self.limits.longest_pause:
                    problem += f", and asks to wait for {pause:.0f} s"
                    break
            answered = bool(answered)
        finally:
            self._settle(answered, trial)
        raise self._fault(f"{problem}; {advice}" if answered else problem)

    def _fault(self, problem: str) -> SystemFault:
        return SystemFault(redact(f"{self.name}: {problem}"), final=True)

    async def _client(self) -> httpx.AsyncClient:
        """The client of the running loop, whose connections are reused within it."""
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            for old in [other for other in self._clients if other.is_closed()]:
                self._clients.pop(old, None)
            # An event loop closes its async generators before it ends; nothing else tells that it does.
            holder = self._hold(loop)
            self._clients[loop] = (await anext(holder), holder)
        return self._clients[loop][0]

    async def _hold(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[httpx.AsyncClient, None]:
        # Deadlines are ours: httpx's are for each read, so that a dripping server would never meet them.
        async with httpx.AsyncClient(timeout=None, verify=_certificates()) as client:
            try:
                yield client
            finally:
                self._clients.pop(loop, None)

    async def _turn(self, pause: float, trial: bool) -> None:
        """Wait for `pause` seconds, then for a place in the rate. Raises SystemFault if all is given up meanwhile."""
        if pause:
            await self._sleep(pause)
        with self._lock:
            now = self._clock()
            place = max(self._next, now)
            self._next = place + (1 / self.limits.rate if self.limits.rate else 0)
        if place > now:
            await self._sleep(place - now)
        with self._lock:
            given_up = self._closed_until > self._clock() and not trial
        if given_up:
            raise self._fault("given up: too many requests failed in a row")

    def _pause(self, attempt: int, headers: Mapping[str, str], status: int) -> float:
        """Seconds before the next attempt. After 429 with Retry-After nobody else sends either until then."""
        asked = _retry_after(headers.get("retry-after", ""))
        jitter = random.uniform(0.5, 1)
        pause: float = min(self.limits.pause * 2**attempt, self.limits.longest_pause) * jitter
        if asked is None:
            return pause
        if status == 429 and asked <= self.limits.longest_pause:
            with self._lock:
                self._next = max(self._next, self._clock() + asked)
        return max(asked, pause)

    def _admit(self) -> bool:
        """Whether this request is the trial after a cool-down. Raises SystemFault while all requests are refused."""
        if self.limits.failures is None:
            return False
        with self._lock:
            if self._failed < self.limits.failures:
                return False
            wait = self._closed_until - self._clock()
            if wait <= 0 and not self._trying:
                self._trying = True
                return True
        raise self._fault(f"given up for {max(wait, 0):.0f} s: {self._failed} requests failed in a row")

    def _settle(self, answered: bool | None, trial: bool) -> None:
        with self._lock:
            if trial:
                self._trying = False
            if answered:
                self._failed, self._closed_until = 0, 0.0
            elif answered is False:
                self._failed += 1
                if self.limits.failures is not None and self._failed >= self.limits.failures:
                    self._closed_until = self._clock() + self.limits.cool_down


def _understood(read: Callable[[bytes], T], body: bytes) -> T:
    """What `read` makes of an answer. Whatever an answer makes it stumble over is the server's doing: ValueError."""
    try:
        return read(body)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"the answer makes no sense ({type(error).__name__}: {error})") from error


async def _send(
    client: httpx.AsyncClient, method: str, url: str, max_bytes: int, request: Mapping[str, Any]
) -> tuple[int, httpx.Headers, bytes]:
    async with client.stream(method, url, **request) as response:
        body = bytearray()
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > max_bytes:
                raise ValueError(f"the answer is longer than {max_bytes} bytes")
        return response.status_code, response.headers, bytes(body)


def _retry_after(value: str) -> float | None:
    """Seconds, from a number of them or from a date (RFC 9110, 10.2.3)."""
    try:
        seconds = float(value)
        return max(seconds, 0.0) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(
        (date.replace(tzinfo=date.tzinfo or datetime.UTC) - datetime.datetime.now(datetime.UTC)).total_seconds(), 0.0
    )


def _excerpt(body: bytes) -> str:
    text = " ".join(redact(body.decode("utf-8", "replace")).split())  # before it is cut, or half a key would be left
    return f" ({text[:200]})" if text else ""


def read_json(body: bytes) -> Any:
    """The JSON of an answer. Raises ValueError."""
    try:
        return json.loads(body)
    except RecursionError as error:
        raise ValueError("the answer is nested too deeply") from error
