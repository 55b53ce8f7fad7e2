"""Interpreters on other machines: a service with the HTTP protocol of github.com/bytedance/SandboxFusion.

Each call is one `POST URL/run_jupyter`. The service keeps nothing between calls, so that a call sends the code of all
calls before it again, and a rollout's state is what running them again gives: what depends on time, on chance or on
files that an earlier call has changed may differ.

It does NOT protect from anything by itself: what the code can reach is for those who run the service to decide. It is
as slow as its network and its kernels' start (about a second a call), and its results are taken as it gives them.
"""

import asyncio
import base64
import binascii
import re
from collections.abc import Sequence
from typing import Any

import httpx

from axpo.tools.base import Fault, SystemFault, ToolError, ToolResult
from axpo.tools.interpreter.session import PICTURES, TRACEBACK, cut
from axpo.tools.sandbox import DIED, OUTPUT, tell

SLACK = 30.0  # seconds beyond the code's own that the service may take: it waits 10 itself


class RemoteSandbox:
    """A service at `url`, such as http://sandbox:8080."""

    level = "remote"

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def check(self) -> None:
        """Raise ToolError unless the service computes."""
        try:
            reply = httpx.post(f"{self.url}/run_jupyter", json=_request(["6 * 7"], [], 10.0), timeout=10 + SLACK)
            shown = _read(reply)["cells"][-1]["display"][0]["text/plain"]
        except (httpx.HTTPError, httpx.InvalidURL, SystemFault, LookupError, TypeError) as error:
            reason = str(error) or type(error).__name__
            raise ToolError(
                f"tools.sandbox: no SandboxFusion service answers at {self.url}: {reason}; must be the URL of one, "
                "such as {remote: http://sandbox:8080}"
            ) from error
        if shown != "42":
            raise ToolError(f"tools.sandbox: the service at {self.url} says that 6 * 7 is {shown!r}")

    def interpreter(self) -> "RemoteInterpreter":
        return RemoteInterpreter(self.url)


class RemoteInterpreter:
    """One rollout's calls so far."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._cells: list[str] = []
        self._calls = 0
        self._images = 0

    async def start(self) -> None:
        """Nothing is to be started: a call does all."""

    async def run(self, code: str, timeout: float, images: Sequence[bytes] = ()) -> ToolResult:
        """As `sandbox.Interpreter.run`. Raises SystemFault where the service fails."""
        new = [f"image_{n} = PIL.Image.open('image_{n}')" for n in range(self._images, len(images))]
        cells = [*self._cells, *(["\n".join(["import PIL.Image", *new])] if new else []), code]
        seconds = timeout * (self._calls + 1)  # for running the earlier calls again
        try:
            async with asyncio.timeout(seconds + SLACK), httpx.AsyncClient(timeout=None) as client:
                request = _request(cells, images, seconds)
                answer = _read(await client.post(f"{self._url}/run_jupyter", json=request))
        except (httpx.HTTPError, TimeoutError) as error:
            raise SystemFault(f"the sandbox service failed: {type(error).__name__}: {error}") from error
        if answer["status"] != "Success":
            self.close()
            if (answer.get("driver") or {}).get("status") == "TimeLimitExceeded":
                return ToolResult(f"Stopped after {timeout:g} s. All variables are lost.", fault=Fault.TIMEOUT)
            return ToolResult(DIED, fault=Fault.RAISED)
        self._cells, self._calls, self._images = cells, self._calls + 1, len(images)
        try:
            return _shown(answer["cells"][len(cells) - 1])
        except (LookupError, TypeError, AttributeError, binascii.Error) as error:
            raise SystemFault(f"the sandbox service answered nonsense: {error!r}") from error

    def close(self) -> None:
        self._cells, self._calls, self._images = [], 0, 0


def _request(cells: Sequence[str], images: Sequence[bytes], seconds: float) -> dict[str, Any]:
    files = {f"image_{n}": base64.b64encode(image).decode() for n, image in enumerate(images)}
    return {"cells": list(cells), "total_timeout": seconds, "kernel": "python3", "files": files}


def _read(response: httpx.Response) -> dict[str, Any]:
    """Raises SystemFault for what is no answer of a working sandbox."""
    if response.status_code != 200:
        raise SystemFault(f"the sandbox service answered with HTTP {response.status_code}")
    try:
        answer = response.json()
    except ValueError as error:
        raise SystemFault("the sandbox service answered no JSON") from error
    if not isinstance(answer, dict) or answer.get("status") not in ("Success", "Failed"):
        raise SystemFault(f"the sandbox service failed: {str(answer)[:200]}")
    if (answer.get("driver") or {}).get("status") == "Error":
        raise SystemFault("the sandbox service could not run its kernel")
    return answer


def _shown(cell: dict[str, Any]) -> ToolResult:
    """What a cell has printed, the values and pictures that it shows, and its traceback."""
    pictures = [base64.b64decode(data["image/png"]) for data in cell["display"] if "image/png" in data]
    values = [data.get("text/plain", "") for data in cell["display"] if "image/png" not in data]
    output = "\n".join(text.rstrip("\n") for text in (cell["stdout"], cell["stderr"], *values) if text)
    errors = ["\n".join(error.get("traceback", [error.get("ename", "")])) for error in cell["error"]]
    report = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(errors))
    return tell(cut(output, OUTPUT), cut(report, TRACEBACK), pictures[:PICTURES], Fault.RAISED if report else None)
