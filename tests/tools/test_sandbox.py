import asyncio
import os
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from axpo.tools import sandbox
from axpo.tools.base import Fault, SystemFault, ToolResult
from axpo.tools.sandbox import OUTPUT, Interpreter, Limits, isolation_works

T = TypeVar("T")
WITHOUT = "bubblewrap is not installed or does not work here"


@pytest.fixture(params=["plain", "bubblewrap"])
def isolated(request: pytest.FixtureRequest) -> bool:
    if request.param == "bubblewrap" and not isolation_works():
        pytest.skip(WITHOUT)
    return bool(request.param == "bubblewrap")


def with_interpreter(isolated: bool, story: Callable[[Interpreter], Awaitable[T]], limits: Limits | None = None) -> T:
    async def whole() -> T:
        interpreter = Interpreter(isolated, limits)
        try:
            return await story(interpreter)
        finally:
            interpreter.close()

    return asyncio.run(whole())


def run(isolated: bool, *codes: str, timeout: float = 20.0, limits: Limits | None = None) -> list[ToolResult]:
    """The results of one call after another in one interpreter."""

    async def story(interpreter: Interpreter) -> list[ToolResult]:
        return [await interpreter.run(code, timeout) for code in codes]

    return with_interpreter(isolated, story, limits)


def test_variables_are_kept_and_values_shown(isolated: bool) -> None:
    results = run(
        isolated, "x = 6", "x * 7", "def f(n):\n    return n + x\nprint('hi')\nf(1)", "None", "import math", "math.pi"
    )
    assert [result.text for result in results] == [
        "(no output)",
        "42",
        "hi\n7",
        "(no output)",
        "(no output)",
        f"{3.141592653589793}",
    ]
    assert {result.fault for result in results} == {None}


def test_an_exception_is_shown_and_costs_nothing(isolated: bool) -> None:
    failed, syntax, value = run(isolated, "x = 3\nprint('so far')\n1 / 0", "y = = 2", "x")
    assert failed.fault == "raised"
    assert failed.text.startswith(
        'so far\nTraceback (most recent call last):\n  File "<call 1>", line 3, in <module>\n    1 / 0'
    )
    assert failed.text.endswith("ZeroDivisionError: division by zero")
    assert "worker" not in failed.text
    assert syntax.fault == "raised"
    assert syntax.text.endswith("SyntaxError: invalid syntax")
    assert value == ToolResult("3")


def test_everything_printed_is_captured_in_order(isolated: bool) -> None:
    code = (
        "import os, sys\nprint('one')\nos.write(1, b'two\\n')\nprint('three', file=sys.stderr)\n"
        "os.system('echo four')\nprint('fünf', end='')"
    )
    assert run(isolated, code)[0].text == "one\ntwo\nthree\nfour\nfünf"


def test_what_imitates_the_protocol_is_only_output(isolated: bool) -> None:
    first, second = run(isolated, "print('1 0\\n2 0\\n')\nprint({'id': 1})", "'second'")
    assert first.text == "1 0\n2 0\n\n{'id': 1}"
    assert second.text == "'second'"


def test_a_forged_reply_to_another_call_is_passed_over(isolated: bool) -> None:
    forge = "import os\nfor fd in range(3, 256):\n    try: os.write(fd, b'0 0\\n')\n    except OSError: pass\n"
    first, second = run(isolated, forge + "import time; time.sleep(0.1)\n'mine'", "'second'")
    assert first == ToolResult("'mine'")
    assert second == ToolResult("'second'")


def test_long_output_loses_its_middle(isolated: bool) -> None:
    (result,) = run(isolated, "print('a' * 3000 + 'b' * 3000, end='')")
    assert result.text == "a" * 2000 + "\n[... 2000 characters left out ...]\n" + "b" * 2000


def test_output_without_end_is_bounded(isolated: bool) -> None:
    flood, after = run(isolated, "while True: print('x' * 1000)", "'alive'", limits=Limits(file=200_000))
    assert flood.fault == "raised"
    assert "OSError" in flood.text
    assert len(flood.text) < OUTPUT + 2500
    assert after == ToolResult("'alive'")


def test_the_deadline_ends_the_interpreter_and_its_children(isolated: bool) -> None:
    code = "import os, time\nx = 1\nif os.fork() == 0: time.sleep(60)\nprint('started')\ntime.sleep(60)"
    start = time.monotonic()
    stopped, after = run(isolated, code, "x", timeout=0.5)
    assert stopped == ToolResult("started\nStopped after 0.5 s. All variables are lost.", fault=Fault.TIMEOUT)
    assert after.fault == "raised"
    assert "NameError" in after.text
    assert time.monotonic() - start < 20


def alive(process: int) -> bool:
    """Whether a process runs: one that has died and waits to be collected does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_children_do_not_outlive_a_plain_interpreter() -> None:
    (result,) = run(False, "import os, time\nchild = os.fork()\nif not child: time.sleep(60)\nchild")
    deadline = time.monotonic() + 5
    while alive(int(result.text)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(int(result.text))


@pytest.mark.parametrize(
    "code",
    [
        "import os; os._exit(0)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import ctypes; ctypes.string_at(0)",
        "import os; os.system('sleep 60 &'); os._exit(0)",
        "import os; os.closerange(3, 100)",
        "import os\nfor fd in range(3, 256):\n    try: os.write(fd, b'1 99999999999\\n')\n    except OSError: pass",
        "import os\nfor fd in range(3, 256):\n    try: os.write(fd, b'nonsense\\n')\n    except OSError: pass",
    ],
    ids=["exit", "kill", "segfault", "leaving a child", "close", "too long", "nonsense"],
)
def test_an_interpreter_that_dies_is_replaced(isolated: bool, code: str) -> None:
    _, died, lost, after = run(isolated, "x = 1", code, "x", "1 + 1")
    assert died.fault == "raised"
    assert died.text.endswith("The interpreter died. All variables are lost.")
    assert "NameError" in lost.text
    assert after == ToolResult("2")


def test_memory_is_limited(isolated: bool) -> None:
    failed, after = run(isolated, "x = 5\ny = bytearray(2 << 30)", "x")
    assert failed.fault == "raised"
    assert failed.text.endswith("MemoryError")
    assert after == ToolResult("5")


def test_cpu_time_is_limited(isolated: bool) -> None:
    (result,) = run(isolated, "while True: pass", limits=Limits(cpu=1))
    assert result.text == "The interpreter died. All variables are lost."


def test_leaving_is_not_failing(isolated: bool) -> None:
    left, failed, after = run(isolated, "import sys\nprint('bye')\nsys.exit()", "sys.exit('no')", "sys.exit")
    assert left == ToolResult("bye")
    assert failed.fault == "raised"
    assert failed.text.endswith("SystemExit: no")
    assert after.fault is None


def test_a_fork_answers_once(isolated: bool) -> None:
    code = "import os\nif os.fork() == 0:\n    print('child')\nelse:\n    os.wait()\n    print('parent')"
    first, second = run(isolated, code, "'next'")
    assert first == ToolResult("child\nparent")
    assert second == ToolResult("'next'")


def test_input_ends_at_once_and_stdout_comes_back(isolated: bool) -> None:
    first, second = run(isolated, "import io, sys\nsys.stdout = io.StringIO()\ninput()", "print('back')")
    assert "EOFError" in first.text
    assert second == ToolResult("back")


def test_installed_packages_can_be_imported(isolated: bool) -> None:
    assert run(isolated, "import numpy\nint(numpy.arange(5).sum())")[0] == ToolResult("10")


def test_code_longer_than_a_pipe_holds(isolated: bool) -> None:
    assert run(isolated, f"x = '{'ä' * 500_000}'\nlen(x)")[0] == ToolResult("500000")


def test_the_environment_is_not_inherited(isolated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    (result,) = run(isolated, "import os\nsorted(os.environ)")
    assert set(eval(result.text)) <= {
        "HOME",
        "LANG",
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "PATH",
        "PWD",
        "PYTHONHASHSEED",
    }


def test_the_environment_of_bubblewrap_itself_is_empty_too(monkeypatch: pytest.MonkeyPatch) -> None:
    if not isolation_works():
        pytest.skip(WITHOUT)
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    code = "import glob\nfor path in glob.glob('/proc/[0-9]*/environ'):\n    print(path, open(path).read())"
    (result,) = run(True, code)
    assert "/proc/1/environ" in result.text
    assert "hunter2" not in result.text


def test_files_of_the_host_are_hidden(isolated: bool) -> None:
    with tempfile.NamedTemporaryFile(dir=Path.home()) as at_home, tempfile.NamedTemporaryFile() as in_tmp:
        results = run(isolated, *(f"open({file.name!r}).read()" for file in (at_home, in_tmp)))
    if isolated:
        assert all(
            result.text.endswith(f"'{name}'") for result, name in zip(results, (at_home.name, in_tmp.name), strict=True)
        )
        assert all("FileNotFoundError" in result.text for result in results)
    else:
        assert results == [ToolResult("''"), ToolResult("''")]  # or the test above would prove nothing


def test_the_network_is_out_of_reach(isolated: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (result,) = run(isolated, f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=5)\n'open'")
    assert result.text.endswith("'open'") != isolated
    assert (result.fault == "raised") == isolated


def test_the_system_is_read_only_and_empty() -> None:
    if not isolation_works():
        pytest.skip(WITHOUT)
    writes = [f"open({path!r}, 'w')" for path in ("/usr/new", "/new", os.__file__)]
    *refused, scratch, processes, user = run(
        True,
        *writes,
        "open('new', 'w').write('kept')\nimport os\nos.getcwd(), os.listdir('.')",
        "len([name for name in os.listdir('/proc') if name.isdigit()])",
        "os.getuid()",
    )
    assert all(result.text.endswith(tuple(f"'{p}'" for p in ("/usr/new", "/new", os.__file__))) for result in refused)
    assert all("Read-only file system" in result.text for result in refused)
    where, names = eval(scratch.text)
    assert where == "/tmp"
    assert "new" in names
    assert int(processes.text) <= 3
    assert user.text == "65534"


def test_cancelling_a_call_ends_the_interpreter(isolated: bool) -> None:
    async def story(interpreter: Interpreter) -> ToolResult:
        await interpreter.run("x = 1", 5)
        call = asyncio.create_task(interpreter.run("import time; time.sleep(60)", 60))
        await asyncio.sleep(0.1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        return await interpreter.run("x", 20)

    assert "NameError" in with_interpreter(isolated, story).text


def test_two_calls_at_once_run_one_after_the_other(isolated: bool) -> None:
    async def story(interpreter: Interpreter) -> list[ToolResult]:
        return await asyncio.gather(interpreter.run("x = 1\nprint('a')", 20), interpreter.run("x += 1\nprint(x)", 20))

    assert [result.text for result in with_interpreter(isolated, story)] == ["a", "2"]


def test_nothing_is_left_behind(isolated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = os.listdir("/proc/self/fd")
    run(isolated, "open('kept', 'w').write('x')", "import os; os._exit(1)", "open('kept', 'w').write('x')")
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_an_interpreter_that_cannot_start_is_a_system_fault(
    isolated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "broken.py"
    program.write_text("raise SystemExit('out of order')")
    monkeypatch.setattr(sandbox, "_PROGRAM", program)
    with pytest.raises(SystemFault, match="the interpreter did not start: out of order"):
        run(isolated, "1")
    program.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(sandbox, "START", 0.3)
    with pytest.raises(SystemFault, match="the interpreter did not start: TimeoutError"):
        run(isolated, "1")
    monkeypatch.setattr(sandbox, "_executable", lambda: str(tmp_path / "nowhere"))
    with pytest.raises(SystemFault, match=r"nowhere.*No such file|No such file.*nowhere"):
        run(isolated, "1")


def test_one_warning_where_bubblewrap_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    isolation_works.cache_clear()
    try:
        assert [isolation_works(), isolation_works()] == [False, False]
        assert [record.message for record in caplog.records] == [
            "bubblewrap (bwrap) is not installed: the python tool runs the policy's code in a plain child process"
        ]
        (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'No permissions' >&2\nexit 1\n")
        (tmp_path / "bwrap").chmod(0o755)
        isolation_works.cache_clear()
        assert not isolation_works()
        assert "bubblewrap does not work here (No permissions)" in caplog.records[-1].message
    finally:
        isolation_works.cache_clear()
