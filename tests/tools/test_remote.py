"""The remote sandbox against a server that answers as SandboxFusion's does, and runs the cells in a process."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from axpo.tools import base, remote
from axpo.tools.base import Conversation, Fault, SystemFault, Toolbox, ToolError, ToolResult
from axpo.tools.python import make_python
from axpo.tools.remote import RemoteInterpreter, RemoteSandbox
from axpo.tools.sandbox import DIED, OUTPUT

# Runs the cells of input.json as a kernel does: one namespace, the value of a last expression is displayed, an error
# does not keep the next cell from running, and is told in colours.
KERNEL = r"""
import ast, base64, contextlib, io, json, traceback

def display(value):
    shown = {"text/plain": repr(value)}
    if hasattr(value, "_repr_png_"):
        shown["image/png"] = base64.encodebytes(value._repr_png_()).decode()
    cell["display"].append(shown)

answer, namespace = [], {"__name__": "__main__", "display": display}
with open("input.json") as file:
    codes = json.load(file)
with open("output.json", "w") as file:
    for code in codes:
        cell = {"stdout": "", "stderr": "", "display": [], "error": []}
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                body = ast.parse(code).body
                last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
                exec(compile(ast.Module(body, []), "<cell>", "exec"), namespace)
                if last is not None:
                    value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), namespace)
                    if value is not None:
                        display(value)
            except BaseException as error:
                lines = [f"\x1b[0;31m{line}\x1b[0m" for line in traceback.format_exception_only(error)]
                told = ["\x1b[0;31m-----\x1b[0m", *lines]
                cell["error"].append({"ename": type(error).__name__, "evalue": str(error), "traceback": told})
        cell["stdout"], cell["stderr"] = out.getvalue(), err.getvalue()
        answer.append(cell)
    json.dump(answer, file)
"""


@dataclass
class Service:
    """Answers POST /run_jupyter at `url`. `faults` are met by the next requests, in turn: an HTTP status ("500"),
    "sandbox" (an error of the service), "driver" (its process cannot be run), "hang" (no answer), or an answer.

    `grace` are the seconds beyond total_timeout after which the process is killed; the real service gives 10.
    """

    url: str
    grace: float = 1.0
    faults: list[Any] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = {"status": "Failed", "message": "", "driver": None, "cells": [], "files": {}}
        with tempfile.TemporaryDirectory() as folder:
            for name, content in request["files"].items():
                (Path(folder) / name).write_bytes(base64.b64decode(content))
            (Path(folder) / "input.json").write_text(json.dumps(request["cells"]))
            process = subprocess.Popen([sys.executable, "-c", KERNEL], cwd=folder, stderr=subprocess.DEVNULL)
            try:
                code = process.wait(request["total_timeout"] + self.grace)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                return answer | {"driver": {"status": "TimeLimitExceeded", "stdout": "", "stderr": ""}}
            answer["driver"] = {"status": "Finished", "return_code": code, "stdout": "", "stderr": ""}
            if code == 0:
                cells = json.loads((Path(folder) / "output.json").read_text())
                answer |= {"status": "Success", "cells": cells}
        return answer


class _Handler(BaseHTTPRequestHandler):
    server: Any

    def do_POST(self) -> None:
        service: Service = self.server.state
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        service.requests.append(request)
        assert self.path == "/run_jupyter"
        fault = service.faults.pop(0) if service.faults else None
        if fault == "hang":
            service.stopped.wait(20)
            return
        failed: dict[str, Any] = {"message": "", "driver": None, "cells": [], "files": {}}
        if fault == "sandbox":
            self._send(200, failed | {"status": "SandboxError", "message": "exception on running jupyter: no netns"})
        elif fault == "driver":
            self._send(200, failed | {"status": "Failed", "driver": {"status": "Error", "stderr": "no bash"}})
        elif isinstance(fault, str) and fault.isdigit():
            self._send(int(fault), {"detail": "went wrong"})
        else:
            self._send(200, service.answer(request) if fault is None else fault)

    def _send(self, status: int, answer: Any) -> None:
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def service(serve: Callable[..., Service], monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.setattr(base, "RETRY_AFTER", (0.0, 0.0))
    return serve(_Handler, Service)


def picture(width: int, height: int = 20, turned: bool = False) -> bytes:
    """A JPEG file; a camera that was `turned` has said so in its EXIF data."""
    image, file = PIL.Image.new("RGB", (width, height), "red"), io.BytesIO()
    exif = PIL.Image.Exif()
    if turned:
        exif[0x0112] = 6
    image.save(file, "JPEG", exif=exif)
    return file.getvalue()


def run(
    service: Service,
    *codes: str | tuple[str, Sequence[bytes]],
    timeout: float = 5.0,
    interpreter: RemoteInterpreter | None = None,
) -> list[ToolResult]:
    """The results of these calls, one after another in one interpreter; the images are those of the conversation."""
    interpreter = interpreter or RemoteSandbox(service.url).interpreter()

    async def story() -> list[ToolResult]:
        return [
            await interpreter.run(code, timeout)
            if isinstance(code, str)
            else await interpreter.run(code[0], timeout, code[1])
            for code in codes
        ]

    return asyncio.run(story())


def test_variables_last_from_call_to_call_and_rollouts_share_nothing(service: Service) -> None:
    codes = ["x = 41; print('printed')", "x += 1", "x", "import sys; print('a'); print('b', file=sys.stderr); (x, 'c')"]
    assert run(service, *codes) == [
        ToolResult("printed"),
        ToolResult("(no output)"),
        ToolResult("42"),
        ToolResult("a\nb\n(42, 'c')"),
    ]
    (other,) = run(service, "x")
    assert other.fault == Fault.RAISED
    assert other.text.endswith("NameError: name 'x' is not defined")


def test_an_error_is_told_in_plain_text_and_what_came_before_it_stays(service: Service) -> None:
    failed, after = run(service, "y = 1; print('so far'); y / 0; y = 2", "y")
    assert failed == ToolResult("so far\n-----\nZeroDivisionError: division by zero", fault=Fault.RAISED)
    assert after == ToolResult("1")


def test_an_error_without_a_traceback_is_told_by_its_name(service: Service) -> None:
    error = {"ename": "SystemExit", "evalue": "", "traceback": []}
    cell = {"stdout": "", "stderr": "", "display": [], "error": [error]}
    service.faults.append({"status": "Success", "driver": {"status": "Finished"}, "cells": [cell]})
    assert run(service, "exit()") == [ToolResult("SystemExit", fault=Fault.RAISED)]


def test_images_are_variables_also_those_that_come_later(service: Service) -> None:
    first, second = picture(30), picture(40, turned=True)
    results = run(
        service,
        ("image_0.size", [first]),
        ("import os; os.chdir('/'); image_0 = 'mine'", [first]),
        ("image_0, image_1.size", [first, second]),
        ("image_0, image_1.getpixel((1, 1))[0] > 200", [first, second]),
        ("image_2", [first, second]),
    )
    assert [result.text for result in results[:4]] == [
        "(30, 20)",
        "(no output)",
        "('mine', (20, 40))",
        "('mine', True)",
    ]
    assert results[4].text.endswith("NameError: name 'image_2' is not defined")
    assert set(service.requests[1]["files"]) == {"image_0"}
    assert base64.b64decode(service.requests[2]["files"]["image_1"]) == second


def test_pictures_come_back_and_not_their_names(service: Service) -> None:
    code = "import PIL.Image\ndisplay(PIL.Image.new('RGB', (8, 9)))\nprint('two')\nPIL.Image.new('L', (5, 4))"
    many = "for n in range(6): display(PIL.Image.new('RGB', (8 + n, 8)))"
    two, four = run(service, code, many)
    sizes = [[PIL.Image.open(io.BytesIO(image)).size for image in result.images] for result in (two, four)]
    assert sizes == [[(8, 9), (5, 4)], [(8, 8), (9, 8), (10, 8), (11, 8)]]
    assert (two.text, four.text) == ("two", "")


def test_what_is_no_small_picture_is_left_out(service: Service) -> None:
    shown = [{"image/png": base64.b64encode(b"no picture").decode()}]
    cell = {"stdout": "", "stderr": "", "display": shown, "error": []}
    service.faults.append({"status": "Success", "driver": {"status": "Finished"}, "cells": [cell]})
    (result,) = run(service, "1")
    assert result.images == ()
    assert result.text.startswith("[1 pictures left out")


def test_long_output_and_long_tracebacks_are_cut(service: Service) -> None:
    printed, raised = run(service, "print('a' * 5000 + 'z' * 5000)", "raise ValueError('a' * 5000 + 'z')")
    assert printed.text.startswith("a" * (OUTPUT // 2) + "\n[... 6000 characters left out")
    assert printed.text.endswith("left out ...]\n" + "z" * (OUTPUT // 2))
    assert len(raised.text) < 2100
    assert raised.text.endswith("aaaz")


def test_an_answer_without_end_is_not_read(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MOST", 1 << 20)
    _, flood, after = run(service, "x = 1", "x = 2; print('a' * (1 << 20))", "x")
    assert flood == ToolResult(
        "All calls together have printed and shown over 1 MiB. This one counts as not made.", fault=Fault.RAISED
    )
    assert after == ToolResult("1")


def test_code_that_takes_too_long_is_the_policys_fault_and_loses_the_state(service: Service) -> None:
    service.grace = 0.0
    image = picture(30)
    calls = [("x = 1", [image]), ("while True: pass", [image]), ("'x' in globals(), image_0.size", [image])]
    _, stopped, after = run(service, *calls, timeout=1.5)
    assert stopped == ToolResult("Stopped after 1.5 s. All variables are lost.", fault=Fault.TIMEOUT)
    assert after == ToolResult("(False, (30, 20))")
    assert len(service.requests[2]["cells"]) == 3  # opens the images, names them, runs the code


def test_the_deadline_allows_for_what_the_earlier_calls_took_and_no_more(service: Service) -> None:
    run(service, "import time; time.sleep(0.5)", "1", "2", timeout=3.0)
    first, second, third = (request["total_timeout"] for request in service.requests)
    assert first == 3.0
    assert 3.5 <= second < 6
    assert 3.5 <= third < 6


def test_a_kernel_that_dies_is_the_policys_fault_and_loses_the_state(service: Service) -> None:
    died, after = run(service, "import os; os._exit(1)", "'os' in globals()")
    assert died == ToolResult(DIED, fault=Fault.RAISED)
    assert after == ToolResult("False")


CELL = {"stdout": "", "stderr": "", "display": [], "error": []}
DONE = {"status": "Success", "driver": {"status": "Finished"}}
FAULTS = [
    ("500", "the sandbox service answered with HTTP 500"),
    ("422", "the sandbox service answered with HTTP 422"),
    ("sandbox", "exception on running jupyter: no netns"),
    ("driver", "could not run its kernel"),
    (b"<html>", "answered no JSON"),
    (b"[" * 100_000, "answered no JSON"),
    ([], "the sandbox service failed: []"),
    ({"status": "fine"}, "the sandbox service failed"),
    (DONE, "answered nonsense: KeyError"),
    (DONE | {"cells": []}, "answered nonsense: IndexError"),
    (DONE | {"cells": "xx", "driver": "gone"}, "answered nonsense: TypeError"),
    (DONE | {"cells": [CELL | {"stdout": 1}]}, "answered nonsense: AttributeError"),
    (DONE | {"cells": [CELL | {"display": [{"image/png": "ä"}]}]}, "answered nonsense: ValueError"),
]


@pytest.mark.parametrize(("fault", "told"), FAULTS)
def test_a_failure_of_the_service_is_the_systems_fault(service: Service, fault: Any, told: str) -> None:
    interpreter = RemoteSandbox(service.url).interpreter()
    service.faults.append(fault)
    with pytest.raises(SystemFault) as caught:
        run(service, "1", interpreter=interpreter)
    assert told in str(caught.value)
    assert interpreter._cells == []  # so that another attempt runs nothing twice


def test_no_answer_in_time_is_the_systems_fault(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SLACK", 0.2)
    service.faults.append("hang")
    with pytest.raises(SystemFault, match="the sandbox service failed: TimeoutError"):
        run(service, "1", timeout=0.1)


def test_no_service_is_the_systems_fault() -> None:
    with pytest.raises(SystemFault, match="the sandbox service failed: ConnectError"):
        asyncio.run(RemoteSandbox("http://127.0.0.1:9").interpreter().run("1", 1.0))


def test_the_python_tool_tries_again_and_runs_nothing_twice(service: Service) -> None:
    async def story() -> list[ToolResult]:
        toolbox = Toolbox([make_python(RemoteSandbox(service.url), 5.0)])
        results = []
        async with Conversation() as conversation:
            for code, faults in (("x = 1", []), ("x += 1", ["500", DONE]), ("print(x)\nimage_0.width", [])):
                service.faults += faults
                results.append(await toolbox.call("python", {"code": code}, conversation))
                conversation.images = [picture(30)]
        return results

    assert asyncio.run(story())[-1] == ToolResult("2\n30")
    assert len(service.requests) == 5


def test_half_a_character_does_not_stop_a_call(service: Service) -> None:
    assert run(service, "'\ud800'") == [ToolResult("'?'")]


def test_check_is_content_with_a_service_that_computes(service: Service) -> None:
    RemoteSandbox(service.url + "/").check()
    assert [len(request["cells"]) for request in service.requests] == [1]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        *FAULTS,
        (DONE | {"status": "Failed"}, "its kernel does not compute"),
        (DONE | {"status": "Failed", "driver": {"status": "TimeLimitExceeded"}}, "TimeLimitExceeded"),
        (DONE | {"cells": [CELL | {"display": [{"text/plain": "41"}]}]}, "it answers '41'"),
        (DONE | {"cells": [CELL | {"error": [{"traceback": ["No module named 'PIL'"]}]}]}, "No module named 'PIL'"),
    ],
)
def test_check_tells_what_is_wrong(service: Service, fault: Any, told: str) -> None:
    service.faults.append(fault)
    with pytest.raises(ToolError) as caught:
        RemoteSandbox(service.url).check()
    assert str(caught.value).startswith("tools.sandbox: ")
    assert service.url in str(caught.value)
    assert told in str(caught.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "sandbox:8080", "nowhere", "http://[", "ftp://sandbox"])
def test_check_tells_of_an_address_where_no_service_is(url: str) -> None:
    with pytest.raises(ToolError) as caught:
        RemoteSandbox(url).check()
    assert f"no SandboxFusion service answers at {url}: " in str(caught.value)
    assert "such as {remote: http://sandbox:8080}" in str(caught.value)
