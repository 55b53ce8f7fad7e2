import asyncio
import functools
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from axpo.tools import base, mcp
from axpo.tools.base import Conversation, Fault, SystemFault, Toolbox, ToolError, ToolResult
from axpo.tools.loading import load_tools
from axpo.tools.mcp import Server, connect
from axpo.tools.zoom import make_zoom

SCRIPT = Path(__file__).with_name("mcp_server.py")
COMMAND = shlex.join([sys.executable, str(SCRIPT)])
SECRET = "s3cret-value"


def serve(port: int) -> subprocess.Popen[bytes]:
    """The server on this port, when it answers."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(200):
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.05)
    process.kill()
    raise AssertionError("the server did not start")


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module", params=["stdio", "http"])
def server(request: pytest.FixtureRequest, port: int) -> Iterator[Server]:
    if request.param == "stdio":
        os.environ["AXPO_SECRET"] = SECRET
        server = Server(COMMAND, ["AXPO_SECRET"])
        yield server
        server.close()
        del os.environ["AXPO_SECRET"]
        return
    process = serve(port)
    server = Server(f"http://127.0.0.1:{port}/mcp")
    yield server
    server.close()
    process.kill()
    process.wait()


def boxed(server: Server, timeout: float = 10.0) -> Toolbox:
    return Toolbox([server.tool(tool) for tool in server.offered], timeout)


def call(toolbox: Toolbox, _tool: str, **arguments: Any) -> ToolResult:
    return asyncio.run(toolbox.call(_tool, arguments, Conversation()))


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "RETRY_AFTER", (0.0, 0.0))


def test_the_schema_is_the_servers_own(server: Server) -> None:
    assert boxed(server).schemas[0] == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "title": "addArguments",
                "properties": {
                    "a": {"title": "A", "type": "integer"},
                    "b": {"title": "B", "type": "integer", "default": 1},
                },
                "required": ["a"],
            },
        },
    }


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "missing argument 'a'"),
        ({"a": "2"}, "a: '2' is not of type 'integer'"),
        ({"a": True}, "a: True is not of type 'integer'"),
        ({"a": 1.5}, "a: 1.5 is not of type 'integer'"),
        ({"a": float("nan")}, "a: Input should be a finite number"),
        ({"a": 1, "c": 2}, "unknown argument 'c'"),
    ],
)
def test_arguments_are_checked_before_they_are_sent(server: Server, arguments: dict[str, Any], complaint: str) -> None:
    result = call(boxed(server), "add", **arguments)
    assert result.fault == Fault.BAD_ARGUMENTS
    assert result.text.startswith(f"Error: {complaint}")
    assert result.text.endswith("add takes a (integer), b (integer, optional).")


def test_what_no_server_could_read_is_refused(server: Server) -> None:
    assert call(boxed(server), "measure", text="\ud800").fault == Fault.BAD_ARGUMENTS
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    assert call(boxed(server), "add", a=deep).fault == Fault.BAD_ARGUMENTS
    assert call(boxed(server), "add", a=1, b=2.0).text == "3"  # and it still answers


def test_an_image_that_is_too_thin_is_the_policys_choice(server: Server) -> None:
    result = call(boxed(server), "strip", width=300)
    assert result.fault == Fault.RAISED
    assert result.text == "Error: the image of this call is too thin to be shown: 300 × 1 pixels."


def test_a_key_in_a_url_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ToolError, match="the environment variable MCP_KEY is not set"):
        connect("http://127.0.0.1:9/mcp?key={key:MCP_KEY}")
    monkeypatch.setenv("MCP_KEY", "hunter2-secret")
    with pytest.raises(ToolError) as told:
        connect("http://127.0.0.1:9/mcp?key={key:MCP_KEY}")
    assert "hunter2" not in str(told.value)


def test_results_are_text_images_and_words_for_the_rest(server: Server) -> None:
    toolbox = boxed(server)
    shown = call(toolbox, "show", colour="red")
    assert shown.text.split("\n") == [
        "a square",
        "a note",
        "[a file of application/pdf, not shown: file:///a.pdf]",
        "[an image of image/svg+xml, not shown]",
        "[sound of audio/wav, not shown]",
        "[a link to more: http://127.0.0.1/more]",
    ]
    images = [PIL.Image.open(io.BytesIO(data)) for data in shown.images]
    assert [(image.format, image.size, image.getpixel((0, 0))) for image in images] == [
        ("PNG", (4, 3), (254, 0, 0))
    ] * 2
    assert json.loads(call(toolbox, "measure", text="häh").text) == {"length": 3}
    assert call(toolbox, "nothing") == ToolResult('{"found": ["ä"]}')


def test_an_image_may_be_large(server: Server) -> None:
    result = call(boxed(server), "noise", megabytes=2)
    assert (result.fault, len(result.images)) == (None, 1)
    assert len(result.images[0]) > 2**21


@pytest.mark.usefixtures("no_pause")
def test_errors_have_their_owner(server: Server) -> None:
    toolbox = boxed(server)
    assert call(toolbox, "fail") == ToolResult("Error executing tool fail: no such page", fault=Fault.RAISED)
    refused = ToolResult("Error: refuse refused the arguments: not like this", fault=Fault.BAD_ARGUMENTS)
    assert call(toolbox, "refuse", code=-32602) == refused
    for code in (-32603, 7):
        with pytest.raises(SystemFault, match=r"the MCP server .* failed: not like this"):
            call(toolbox, "refuse", code=code)
    assert call(toolbox, "add", a=1).text == "2"


def test_a_call_that_took_too_long_is_cancelled_at_the_server(server: Server) -> None:
    late = call(boxed(server, 0.3), "wait", name="late", seconds=30.0)
    assert late == ToolResult("Error: wait took longer than 0.3 s.", fault=Fault.TIMEOUT)
    for _ in range(50):
        names = call(boxed(server), "stopped").text
        if "late" in names:
            break
        time.sleep(0.02)
    assert names == "late"


def test_any_loop_may_call_and_calls_overlap(server: Server) -> None:
    toolbox = boxed(server)
    answers: list[ToolResult] = []

    async def several() -> None:
        calls = [toolbox.call("wait", {"name": f"{n}", "seconds": 0.3}, Conversation()) for n in range(4)]
        answers.extend(await asyncio.gather(*calls))

    start = time.monotonic()
    threads = [threading.Thread(target=asyncio.run, args=(several(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.text for answer in answers) == sorted([f"{n} waited" for n in range(4)] * 2)
    assert time.monotonic() - start < 1.5  # one after another they take 2.4 s


def test_a_fork_repeats_no_call(server: Server, tmp_path: Path) -> None:
    text = json.dumps({"name": "die", "arguments": {"once": str(tmp_path / "once")}})
    asyncio.run(boxed(server).repeat(text, Conversation()))
    assert not (tmp_path / "once").exists()


# What only a command does


@pytest.mark.parametrize("server", ["stdio"], indirect=True)
def test_the_environment_is_a_short_list_and_what_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AXPO_OTHER", "x")
    toolbox = boxed(server)
    assert call(toolbox, "know", name="AXPO_SECRET").text == SECRET
    assert call(toolbox, "know", name="AXPO_OTHER").text == "unset"
    assert call(toolbox, "know", name="PATH").text == os.environ["PATH"]


@pytest.mark.parametrize("server", ["stdio"], indirect=True)
@pytest.mark.usefixtures("no_pause")
def test_a_server_that_dies_is_started_again(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    toolbox = boxed(server)
    before = call(toolbox, "pid").text
    assert call(toolbox, "die", once=str(tmp_path / "once")) == ToolResult("alive")
    assert call(toolbox, "pid").text != before
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "axpo.tools.base"]
    assert "Connection closed; the end of its stderr:" in warning
    assert "dying, with *** in mind" in warning
    assert SECRET not in warning
    assert "nobody should see" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("server", ["stdio"], indirect=True)
def test_a_server_that_gives_no_sign_of_life_is_started_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp, "ALIVE", 0.2)
    monkeypatch.setattr("mcp.client.stdio.PROCESS_TERMINATION_TIMEOUT", 0.2)
    before = call(boxed(server), "pid").text
    assert call(boxed(server, 0.2), "freeze", seconds=30.0).fault == Fault.TIMEOUT
    time.sleep(0.4)
    assert call(boxed(server), "pid").text != before
    for _ in range(100):
        if not alive(int(before)):
            break
        time.sleep(0.05)
    assert not alive(int(before))


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


PARENT = """
import asyncio, sys, time
from axpo.tools.base import Conversation, Toolbox
from axpo.tools.mcp import connect
pid = asyncio.run(Toolbox(connect(sys.argv[1])).call("pid", {}, Conversation()))
print(pid.text, flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize(("seconds", "kill"), [(60, True), (0, False)])
def test_the_child_does_not_outlive_us(seconds: int, kill: bool) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, COMMAND, str(seconds)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    if kill:
        assert alive(pid)
        parent.send_signal(signal.SIGKILL)
    _, stderr = parent.communicate(timeout=20)
    for _ in range(100 if kill else 1):
        if not alive(pid):
            break
        time.sleep(0.05)
    assert not alive(pid)
    assert stderr == ""


# What only a URL does


@pytest.mark.parametrize("server", ["http"], indirect=True)
def test_large_images_come_as_events_by_the_older_protocol(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp, "Client", functools.partial(mcp.Client, mode="legacy"))
    older = Server(server.name)
    try:
        result = call(boxed(older), "noise", megabytes=2)
        assert (result.fault, len(result.images)) == (None, 1)
    finally:
        older.close()


@pytest.mark.usefixtures("no_pause")
def test_a_server_that_comes_back_is_found_again() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    process = serve(port)
    server = Server(f"http://127.0.0.1:{port}/mcp")
    try:
        toolbox = boxed(server)
        assert call(toolbox, "add", a=1).text == "2"
        process.kill()
        process.wait()
        with pytest.raises(SystemFault, match=rf"the MCP server http://127\.0\.0\.1:{port}/mcp"):
            call(toolbox, "add", a=1)
        process = serve(port)
        assert call(toolbox, "add", a=2).text == "3"
    finally:
        server.close()
        process.kill()
        process.wait()


# Servers that are of no use. What the official package cannot do is written by hand.

RAW = """
import json, sys
tools = json.loads(sys.argv[1])
print("complaint", file=sys.stderr, flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request.get("method") == "initialize":
        version = request["params"]["protocolVersion"]
        result = {"protocolVersion": version, "capabilities": {"tools": {}}}
        result["serverInfo"] = {"name": "x", "version": "1"}
    elif request.get("method") == "tools/list":
        result = {"tools": tools}
    elif "id" in request:
        error = {"code": -32601, "message": "unknown"}
        print(json.dumps({"jsonrpc": "2.0", "id": request["id"], "error": error}), flush=True)
        continue
    else:
        continue
    print(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": result}), flush=True)
"""


def raw(*tools: dict[str, Any]) -> str:
    return shlex.join([sys.executable, "-c", RAW, json.dumps(tools)])


GOOD = {"name": "good", "inputSchema": {"type": "object"}}
DYING = shlex.join([sys.executable, "-c", "import sys; sys.exit('no key was given')"])


@pytest.mark.parametrize(
    ("server", "complaint"),
    [
        ("no-such-command --x", r"the MCP server 'no-such-command --x' cannot be used: FileNotFoundError"),
        (DYING, r"the MCP server .* cannot be used: .*; the end of its stderr:\nno key was given"),
        ("http://127.0.0.1:9/mcp?key=1", r"the MCP server http://127\.0\.0\.1:9/mcp cannot be used: ConnectError"),
        ("http://", r"'http://' is no URL: it names no host"),
        ("a 'b", '"a \'b" is no command line'),
        (" ", "a command line or a URL, not an empty text"),
        (raw(), r"the MCP server .* offers no tools"),
        (raw(GOOD, GOOD), r"the MCP server .* offers two tools called 'good'"),
    ],
)
def test_a_server_that_is_of_no_use_is_named(server: str, complaint: str) -> None:
    with pytest.raises(ToolError, match=complaint) as caught:
        connect(server)
    assert "key=1" not in str(caught.value)


def test_a_server_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp, "START", 0.2)
    monkeypatch.setattr("mcp.client.stdio.PROCESS_TERMINATION_TIMEOUT", 0.1)
    with pytest.raises(ToolError, match=r"the MCP server 'sleep 30' does not answer within 0\.2 s"):
        connect("sleep 30")


def test_only_some_tools_and_broken_schemas() -> None:
    other = {"name": "bad", "inputSchema": {"type": "object", "properties": {"x": {"type": "number", "minimum": "0"}}}}
    with pytest.raises(ToolError, match=r"the MCP server .* has no tool 'best'; it has good, bad"):
        connect(raw(GOOD, other), only=["best"])
    tools = connect(raw(GOOD, other), only=["good"])
    assert Toolbox(tools).names == ["good"]
    with pytest.raises(ToolError, match=r"the MCP server .*: tool 'bad': its JSON schema is not valid"):
        connect(raw(GOOD, other))


def test_entries_of_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AXPO_MISSING", raising=False)
    tools = load_tools(["zoom", {"mcp": raw(GOOD)}], {"zoom": make_zoom})
    assert [tool.__name__ for tool in tools] == ["image_zoom_in_tool", "good"]
    told = r"^tools\.names\[0\]: .* AXPO_MISSING, which the MCP server 'x' is to get, is not set"
    with pytest.raises(ToolError, match=told):
        load_tools([{"mcp": "x", "env": ["AXPO_MISSING"]}])
    with pytest.raises(ToolError, match=r"^eval\.tools\[1\]: .*only a command gets environment variables"):
        load_tools(["zoom", {"mcp": "http://127.0.0.1/mcp", "env": ["HOME"]}], {"zoom": make_zoom}, "eval.tools")


def test_the_library_is_imported_only_for_a_server() -> None:
    code = "import sys, axpo.tools.loading; sys.exit(int('mcp' in sys.modules or 'jsonschema' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
