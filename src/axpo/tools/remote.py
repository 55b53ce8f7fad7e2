"""Interpreters on other machines: a service with the HTTP protocol of github.com/bytedance/SandboxFusion.

Each call is one `POST URL/run_jupyter`. The service keeps nothing between calls, so that a call sends the code of all
calls before it again, and a rollout's state is what running them again gives: what depends on time, on chance or on
files that an earlier call has changed may differ.

It does NOT protect from anything by itself: what the code can reach is for those who run the service to decide. It is
as slow as its network and its kernels' start (about a second a call), and its results are taken as it gives them: a
kernel that it cannot start in time, or that dies, looks like code that takes too long. What was printed before the
deadline is lost.
"""

import asyncio
import base64
import re
import time
from collections.abc import Sequence
from typing import Any

import httpx

from axpo.tools.base import Fault, SystemFault, ToolError, ToolResult
from axpo.tools.faults import described
from axpo.tools.interpreter.session import PICTURES, TRACEBACK, cut
from axpo.tools.sandbox import DIED, OUTPUT, tell
from axpo.tools.web import read_json

SLACK = 30.0  # seconds beyond the code's own that the service may take: it waits 10 itself
MOST = 64 << 20  # bytes of an answer: what all calls so far have printed and shown
_TRIAL = "import PIL.Image, PIL.ImageOps\n6 * 7"


class RemoteSandbox:
    """A service at `url`, such as http://sandbox:8080."""

    level = "remote"

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def check(self) -> None:
        """Raise ToolError unless the service computes, and has Pillow to open images with."""
        try:
            reply = httpx.post(f"{self.url}/run_jupyter", json=_request([_TRIAL], [], 10.0), timeout=10 + SLACK)
            answer = _read(reply.status_code, reply.content)
            if answer["status"] != "Success":
                raise SystemFault(f"its kernel does not compute: {str(answer)[:200]}")
            text = _shown(answer, 1).text
        except (httpx.HTTPError, httpx.InvalidURL, SystemFault) as error:
            raise ToolError(
                f"tools.sandbox: no SandboxFusion service answers at {self.url}: {described(error)}; must be the URL "
                "of one, such as {remote: http://sandbox:8080}"
            ) from error
        if text != "42":
            raise ToolError(f"tools.sandbox: the service at {self.url} cannot run {_TRIAL!r}, it answers {text!r}")

    def interpreter(self) -> "RemoteInterpreter":
        return RemoteInterpreter(self.url)


class RemoteInterpreter:
    """A rollout's interpreter: the code of the calls that make up its state."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.close()

    def close(self) -> None:
        """Forget the state."""
        self._cells: list[str] = []
        self._images = 0
        self._took = 0.0  # seconds that the last call took, which ran all earlier ones too

    async def start(self) -> None:
        """Nothing is to be started: a call does all."""

    async def run(self, code: str, timeout: float, images: Sequence[bytes] = ()) -> ToolResult:
        """As `sandbox.Interpreter.run`. Raises SystemFault where the service fails."""
        new = "\n".join(f"image_{n} = _axpo_images[{n}]" for n in range(self._images, len(images)))
        cells = [*self._cells, *filter(None, [new]), code.encode("utf-8", "replace").decode()]
        sent = [*_opening(len(images)), *cells]
        seconds = timeout + self._took
        start = time.monotonic()
        try:
            async with asyncio.timeout(seconds + SLACK), httpx.AsyncClient(timeout=None) as client:
                reply = await _post(client, f"{self._url}/run_jupyter", _request(sent, images, seconds))
        except (httpx.HTTPError, TimeoutError) as error:
            raise SystemFault(f"the sandbox service failed: {described(error)}") from error
        if reply is None:
            told = f"All calls together have printed and shown over {MOST >> 20} MiB. This one counts as not made."
            return ToolResult(told, fault=Fault.RAISED)
        answer = _read(*reply)
        if answer["status"] != "Success":
            self.close()
            if _driver(answer) == "TimeLimitExceeded":
                return ToolResult(f"Stopped after {timeout:g} s. All variables are lost.", fault=Fault.TIMEOUT)
            return ToolResult(DIED, fault=Fault.RAISED)
        result = _shown(answer, len(sent))
        self._cells, self._images, self._took = cells, len(images), time.monotonic() - start
        return result


def _opening(count: int) -> list[str]:
    """The first cell, which opens all images, turned as `axpo.images` has them, before code can change the folder."""
    opened = "PIL.ImageOps.exif_transpose(PIL.Image.open(f'image_{n}'))"
    code = f"import PIL.Image, PIL.ImageOps\n_axpo_images = [{opened} for n in range({count})]"
    return [code] if count else []


def _request(cells: Sequence[str], images: Sequence[bytes], seconds: float) -> dict[str, Any]:
    files = {f"image_{n}": base64.b64encode(image).decode() for n, image in enumerate(images)}
    return {"cells": list(cells), "total_timeout": seconds, "kernel": "python3", "files": files}


async def _post(client: httpx.AsyncClient, url: str, request: dict[str, Any]) -> tuple[int, bytes] | None:
    """The status and the body of the answer; None where that is longer than MOST."""
    async with client.stream("POST", url, json=request) as response:
        body = bytearray()
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > MOST:
                return None
        return response.status_code, bytes(body)


def _read(status: int, body: bytes) -> dict[str, Any]:
    """Raises SystemFault for what is no answer of a working sandbox."""
    if status != 200:
        raise SystemFault(f"the sandbox service answered with HTTP {status}")
    try:
        answer = read_json(body)
    except ValueError as error:
        raise SystemFault("the sandbox service answered no JSON") from error
    if not isinstance(answer, dict) or answer.get("status") not in ("Success", "Failed"):
        raise SystemFault(f"the sandbox service failed: {str(answer)[:200]}")
    if _driver(answer) == "Error":
        raise SystemFault("the sandbox service could not run its kernel")
    return answer


def _driver(answer: dict[str, Any]) -> Any:
    """How the process ended that drives the kernel."""
    driver = answer.get("driver")
    return driver.get("status") if isinstance(driver, dict) else None


def _shown(answer: dict[str, Any], count: int) -> ToolResult:
    """What the last of so many cells has printed, the values and pictures that it shows, and its traceback.

    Raises SystemFault where the answer does not tell.
    """
    try:
        cell = answer["cells"][count - 1]
        pictures = [base64.b64decode(data["image/png"]) for data in cell["display"] if "image/png" in data]
        values = [data.get("text/plain", "") for data in cell["display"] if "image/png" not in data]
        output = "\n".join(text.rstrip("\n") for text in (cell["stdout"], cell["stderr"], *values) if text)
        errors = ["\n".join(error.get("traceback") or [error.get("ename", "")]) for error in cell["error"]]
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise SystemFault(f"the sandbox service answered nonsense: {error!r}") from error
    report = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(errors))
    return tell(cut(output, OUTPUT), cut(report, TRACEBACK), pictures[:PICTURES], Fault.RAISED if errors else None)
