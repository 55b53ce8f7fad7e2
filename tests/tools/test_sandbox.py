import asyncio
import io
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import PIL.Image
import pytest

from axpo.tools.base import Fault, SystemFault, ToolError, ToolResult
from axpo.tools.interpreter import bubblewrap
from axpo.tools.interpreter.template import Limits
from axpo.tools.sandbox import BUBBLEWRAP, NONE, OUTPUT, Interpreter, Sandbox

T = TypeVar("T")


@pytest.fixture(params=["plain", "bubblewrap"])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    shared: Sandbox = request.getfixturevalue(f"{request.param}_sandbox")
    return shared


@pytest.fixture
def isolated(sandbox: Sandbox) -> bool:
    return sandbox.level == BUBBLEWRAP


def with_interpreter(sandbox: Sandbox, story: Callable[[Interpreter], Awaitable[T]]) -> T:
    async def whole() -> T:
        interpreter = sandbox.interpreter()
        try:
            return await story(interpreter)
        finally:
            interpreter.close()

    return asyncio.run(whole())


def run(sandbox: Sandbox, *codes: str, timeout: float = 20.0, images: Sequence[bytes] = ()) -> list[ToolResult]:
    """The results of one call after another in one interpreter."""

    async def story(interpreter: Interpreter) -> list[ToolResult]:
        return [await interpreter.run(code, timeout, images) for code in codes]

    return with_interpreter(sandbox, story)


def test_variables_are_kept_and_values_shown(sandbox: Sandbox) -> None:
    results = run(
        sandbox, "x = 6", "x * 7", "def f(n):\n    return n + x\nprint('hi')\nf(1)", "None", "import math", "math.pi"
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


def test_an_exception_is_shown_and_costs_nothing(sandbox: Sandbox) -> None:
    failed, syntax, value = run(sandbox, "x = 3\nprint('so far')\n1 / 0", "y = = 2", "x")
    assert failed.fault == "raised"
    assert failed.text.startswith(
        'so far\nTraceback (most recent call last):\n  File "<call 1>", line 3, in <module>\n    1 / 0'
    )
    assert failed.text.endswith("ZeroDivisionError: division by zero")
    assert "worker" not in failed.text
    assert syntax.fault == "raised"
    assert syntax.text.endswith("SyntaxError: invalid syntax")
    assert value == ToolResult("3")


def test_everything_printed_is_captured_in_order(sandbox: Sandbox) -> None:
    code = (
        "import os, sys\nprint('one')\nos.write(1, b'two\\n')\nprint('three', file=sys.stderr)\n"
        "os.system('echo four')\nprint('fünf', end='')"
    )
    assert run(sandbox, code)[0].text == "one\ntwo\nthree\nfour\nfünf"


def test_what_imitates_the_protocol_is_only_output(sandbox: Sandbox) -> None:
    first, second = run(sandbox, "print('1 0\\n2 0\\n')\nprint({'id': 1})", "'second'")
    assert first.text == "1 0\n2 0\n\n{'id': 1}"
    assert second.text == "'second'"


def test_a_forged_reply_to_another_call_is_passed_over(sandbox: Sandbox) -> None:
    forge = "import os\nfor fd in range(3, 256):\n    try: os.write(fd, b'0 0\\n')\n    except OSError: pass\n"
    first, second = run(sandbox, forge + "import time; time.sleep(0.1)\n'mine'", "'second'")
    assert first == ToolResult("'mine'")
    assert second == ToolResult("'second'")


def test_long_output_loses_its_middle(sandbox: Sandbox) -> None:
    (result,) = run(sandbox, "print('a' * 3000 + 'b' * 3000, end='')")
    assert result.text == "a" * 2000 + "\n[... 2000 characters left out ...]\n" + "b" * 2000


def test_output_without_end_is_bounded(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "limits", Limits(file=200_000))
    flood, after = run(sandbox, "while True: print('x' * 1000)", "'alive'")
    assert flood.fault == "raised"
    assert "OSError" in flood.text
    assert len(flood.text) < OUTPUT + 2500
    assert after == ToolResult("'alive'")


def test_the_deadline_ends_the_interpreter_and_its_children(sandbox: Sandbox) -> None:
    code = "import os, time\nx = 1\nif os.fork() == 0: time.sleep(60)\nprint('started')\ntime.sleep(60)"
    start = time.monotonic()
    stopped, after = run(sandbox, code, "x", timeout=0.5)
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


def test_children_do_not_outlive_a_plain_interpreter(plain_sandbox: Sandbox) -> None:
    (result,) = run(plain_sandbox, "import os, time\nchild = os.fork()\nif not child: time.sleep(60)\nchild")
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
def test_an_interpreter_that_dies_is_replaced(sandbox: Sandbox, code: str) -> None:
    _, died, lost, after = run(sandbox, "x = 1", code, "x", "1 + 1")
    assert died.fault == "raised"
    assert died.text.endswith("The interpreter died. All variables are lost.")
    assert "NameError" in lost.text
    assert after == ToolResult("2")


def test_memory_is_limited(sandbox: Sandbox) -> None:
    failed, after = run(sandbox, "x = 5\ny = bytearray(2 << 30)", "x")
    assert failed.fault == "raised"
    assert failed.text.endswith("MemoryError")
    assert after == ToolResult("5")


def test_cpu_time_is_limited(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "limits", Limits(cpu=2))
    (result,) = run(sandbox, "while True: pass")
    assert result.text == "The interpreter died. All variables are lost."


def test_leaving_is_not_failing(sandbox: Sandbox) -> None:
    left, failed, after = run(sandbox, "import sys\nprint('bye')\nsys.exit()", "sys.exit('no')", "sys.exit")
    assert left == ToolResult("bye")
    assert failed.fault == "raised"
    assert failed.text.endswith("SystemExit: no")
    assert after.fault is None


def test_a_fork_answers_once(sandbox: Sandbox) -> None:
    code = "import os\nif os.fork() == 0:\n    print('child')\nelse:\n    os.wait()\n    print('parent')"
    first, second = run(sandbox, code, "'next'")
    assert first == ToolResult("child\nparent")
    assert second == ToolResult("'next'")


def test_input_ends_at_once_and_stdout_comes_back(sandbox: Sandbox) -> None:
    first, second = run(sandbox, "import io, sys\nsys.stdout = io.StringIO()\ninput()", "print('back')")
    assert "EOFError" in first.text
    assert second == ToolResult("back")


def test_installed_packages_can_be_imported(sandbox: Sandbox) -> None:
    assert run(sandbox, "import numpy\nint(numpy.arange(5).sum())")[0] == ToolResult("10")


def test_code_longer_than_a_pipe_holds(sandbox: Sandbox) -> None:
    assert run(sandbox, f"x = '{'ä' * 500_000}'\nlen(x)")[0] == ToolResult("500000")


def test_the_environment_is_not_inherited(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    (result,) = run(sandbox, "import os\nsorted(os.environ)")
    assert set(eval(result.text)) <= {
        "HOME",
        "LANG",
        "MPLBACKEND",
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "PATH",
        "PWD",
        "PYTHONHASHSEED",
    }


def test_the_environment_of_bubblewrap_itself_is_empty_too(
    bubblewrap_sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    code = "import glob\nfor path in glob.glob('/proc/[0-9]*/environ'):\n    print(path, open(path).read())"
    (result,) = run(bubblewrap_sandbox, code)
    assert "/proc/1/environ" in result.text
    assert "hunter2" not in result.text


def test_files_of_the_host_are_hidden(sandbox: Sandbox, isolated: bool) -> None:
    with tempfile.NamedTemporaryFile(dir=Path.home()) as at_home, tempfile.NamedTemporaryFile() as in_tmp:
        results = run(sandbox, *(f"open({file.name!r}).read()" for file in (at_home, in_tmp)))
    if isolated:
        assert all(
            result.text.endswith(f"'{name}'") for result, name in zip(results, (at_home.name, in_tmp.name), strict=True)
        )
        assert all("FileNotFoundError" in result.text for result in results)
    else:
        assert results == [ToolResult("''"), ToolResult("''")]  # or the test above would prove nothing


def test_the_network_is_out_of_reach(sandbox: Sandbox, isolated: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (result,) = run(sandbox, f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=5)\n'open'")
    assert result.text.endswith("'open'") != isolated
    assert (result.fault == "raised") == isolated


def test_the_system_is_read_only_and_empty(bubblewrap_sandbox: Sandbox) -> None:
    writes = [f"open({path!r}, 'w')" for path in ("/usr/new", "/new", os.__file__)]
    *refused, scratch, processes, user = run(
        bubblewrap_sandbox,
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


def test_cancelling_a_call_ends_the_interpreter(sandbox: Sandbox) -> None:
    async def story(interpreter: Interpreter) -> ToolResult:
        await interpreter.run("x = 1", 5)
        call = asyncio.create_task(interpreter.run("import time; time.sleep(60)", 60))
        await asyncio.sleep(0.1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        return await interpreter.run("x", 20)

    assert "NameError" in with_interpreter(sandbox, story).text


def test_two_calls_at_once_run_one_after_the_other(sandbox: Sandbox) -> None:
    async def story(interpreter: Interpreter) -> list[ToolResult]:
        return await asyncio.gather(interpreter.run("x = 1\nprint('a')", 20), interpreter.run("x += 1\nprint(x)", 20))

    assert [result.text for result in with_interpreter(sandbox, story)] == ["a", "2"]


def test_nothing_is_left_behind(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = os.listdir("/proc/self/fd")
    run(sandbox, "open('kept', 'w').write('x')", "import os; os._exit(1)", "open('kept', 'w').write('x')")
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_template_that_cannot_start_is_a_system_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("axpo.tools.interpreter.bubblewrap.executable", lambda: str(tmp_path / "nowhere"))
    with pytest.raises(SystemFault, match=r"no interpreter can be started: .*nowhere"):
        run(Sandbox(NONE), "1")


def test_an_interpreter_that_does_not_start_in_time_is_a_system_fault(
    plain_sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("axpo.tools.sandbox.START", 0.0)
    with pytest.raises(SystemFault, match="the interpreter did not start: TimeoutError"):
        run(plain_sandbox, "1")


def test_a_lost_template_is_a_system_fault_and_is_replaced() -> None:
    sandbox = Sandbox(NONE)

    async def story(interpreter: Interpreter) -> ToolResult:
        await interpreter.run("x = 1", 20)
        assert sandbox._template is not None
        sandbox._template.kill()
        sandbox._template.wait()
        with pytest.raises(SystemFault, match="template process has ended"):
            await interpreter.run("import time; time.sleep(60)", 20)
        return await interpreter.run("1 + 1", 20)

    assert with_interpreter(sandbox, story) == ToolResult("2")
    sandbox.close()


def test_there_is_no_silent_fallback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError, match=r"tools.sandbox: 'bubblewrap' does not work here: bubblewrap is not installed"):
        Sandbox(BUBBLEWRAP).check()
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'No permissions to create namespaces' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    broken = Sandbox(BUBBLEWRAP)
    with pytest.raises(ToolError, match=r"(?s)No permissions to create.* Else choose .*none_i_trust_the_policy"):
        broken.check()
    broken.close()


def test_packages_that_lie_under_tmp_are_seen(monkeypatch: pytest.MonkeyPatch, bubblewrap_sandbox: Sandbox) -> None:
    del bubblewrap_sandbox  # skips where bubblewrap does not work
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        Path(folder, "lies_in_tmp.py").write_text("x = 41\n")
        packages = bubblewrap.packages()
        monkeypatch.setattr(bubblewrap, "packages", lambda: [*packages, folder])
        sandbox = Sandbox(BUBBLEWRAP)
        seen, written, refused = run(
            sandbox,
            "import lies_in_tmp; lies_in_tmp.x + 1",
            "open('/tmp/mine', 'w').write('x')",
            f"open('{folder}/new', 'w')",
        )
        sandbox.close()
    assert (seen, written) == (ToolResult("42"), ToolResult("1"))
    assert "Read-only file system" in refused.text


# Images ---------------------------------------------------------------------------------------------------------------


def png(width: int, height: int, colour: str = "red") -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def size(data: bytes) -> tuple[int, int]:
    return PIL.Image.open(io.BytesIO(data)).size


def test_images_of_the_conversation_are_there_also_those_that_came_later(sandbox: Sandbox) -> None:
    async def story(interpreter: Interpreter) -> list[ToolResult]:
        images = [png(40, 30)]
        first = await interpreter.run("image_0.size, image_0.getpixel((3, 3))", 20, images)
        images += [png(50, 20, "blue"), png(8, 9)]
        return [first, await interpreter.run("image_0.size, image_1.size, image_2.size", 20, images)]

    first, second = with_interpreter(sandbox, story)
    assert first == ToolResult("((40, 30), (255, 0, 0))")
    assert second == ToolResult("((40, 30), (50, 20), (8, 9))")


def test_an_image_that_is_turned_is_seen_upright(sandbox: Sandbox) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    file = io.BytesIO()
    PIL.Image.new("RGB", (40, 30)).save(file, "JPEG", exif=exif)
    assert run(sandbox, "image_0.size", images=[file.getvalue()])[0] == ToolResult("(30, 40)")


def test_an_image_that_does_not_open_costs_nothing(sandbox: Sandbox) -> None:
    bits = io.BytesIO()
    PIL.Image.new("1", (14000, 14000)).save(bits, "PNG")  # more than Pillow opens by itself
    large, broken = run(sandbox, "image_0.size", "image_1", images=[bits.getvalue(), b"no image"])
    assert large == ToolResult("(14000, 14000)")
    assert broken == ToolResult("b'no image'")


def test_an_image_as_value_and_what_is_shown_come_back(sandbox: Sandbox) -> None:
    codes = [
        "image_0.crop((0, 0, 20, 10))",
        "image_0.show()\ndisplay(image_0.resize((7, 7)))\nprint('both')",
        "import matplotlib.pyplot as plt\n_ = plt.plot([1, 2])\nplt.show()\nlen(plt.get_fignums())",
        "_ = plt.plot([1, 2])",
        "_ = plt.plot([1, 2])\n1 / 0",
    ]
    cropped, both, figure, left_open, failed = run(sandbox, *codes, images=[png(40, 30)])
    assert (cropped.text, [size(image) for image in cropped.images]) == ("", [(20, 10)])
    assert (both.text, [size(image) for image in both.images]) == ("both", [(40, 30), (7, 7)])
    assert (figure.text, [size(image) for image in figure.images]) == ("0", [(640, 480)])
    assert [size(image) for image in left_open.images] == [(640, 480)]
    assert failed.fault == "raised"
    assert len(failed.images) == 1


def test_pictures_are_bounded_in_number_and_size(sandbox: Sandbox) -> None:
    many, large, figure, odd = run(
        sandbox,
        "import PIL.Image\nfor n in range(7): PIL.Image.new('RGB', (9, 9)).show()",
        "PIL.Image.new('RGB', (4000, 1000))",
        "import matplotlib.pyplot as plt\n_ = plt.figure(figsize=(100, 20))",
        "PIL.Image.new('CMYK', (5, 5)).show()\nPIL.Image.new('F', (6, 6)).show()",
    )
    assert len(many.images) == 4
    assert many.text == "[3 more pictures left out: 4 are shown of a call]"
    assert [size(image) for image in large.images] == [(2048, 512)]
    ((width, height),) = [size(image) for image in figure.images]
    assert 0.9 * 2**20 < width * height <= 1.01 * 2**20
    assert [size(image) for image in odd.images] == [(5, 5), (6, 6)]


@pytest.mark.parametrize(
    "data",
    [b"", b"\x89PNG\r\n\x1a\n" + b"nonsense", png(64, 64)[:-40], png(3000, 3000), png(5000, 3), b"GIF89a"],
    ids=["empty", "header", "cut", "huge", "thin", "other format"],
)
def test_a_forged_picture_is_left_out(plain_sandbox: Sandbox, data: bytes) -> None:
    forge = (
        f"import os\ndata = {data!r}\nfor fd in range(3, 64):\n    try: os.write(fd, b'1 0 %d\\n' % len(data) + data)\n"
    )
    (result,) = run(plain_sandbox, forge + "    except OSError: pass")
    assert result.images == ()
    assert result.text.startswith("[1 pictures left out: broken, of more than 1048576 pixels")


# Life and death -------------------------------------------------------------------------------------------------------


def processes_with(mark: str) -> list[int]:
    """Those whose memory of their arguments or of their parent's shows the mark: the trees of a template."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "cmdline").read_bytes() and alive(int(folder.name)):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_nothing_outlives_a_trainer_that_is_killed(sandbox: Sandbox, tmp_path: Path) -> None:
    program = tmp_path / "trainer.py"
    program.write_text(
        f"""
import asyncio, sys
from axpo.tools.sandbox import Sandbox
async def main():
    interpreter = Sandbox({sandbox.level!r}).interpreter()
    code = "import subprocess, time; subprocess.Popen(['sleep', '61.25']); time.sleep(60)"
    await asyncio.gather(interpreter.run(code, 60), tell())
async def tell():
    await asyncio.sleep(3)
    print('ready', flush=True)
asyncio.run(main())
"""
    )
    trainer = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE)
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == b"ready\n"
    deadline = time.monotonic() + 20
    while not (sleeping := processes_with("sleep\00061.25")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(sleeping) == 1
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 5
    while alive(sleeping[0]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(sleeping[0])


def test_an_interpreter_starts_quickly(bubblewrap_sandbox: Sandbox) -> None:
    async def seconds() -> float:
        interpreter = bubblewrap_sandbox.interpreter()
        start = time.perf_counter()
        await interpreter.run("import numpy, sympy, PIL, matplotlib.pyplot", 20)
        elapsed = time.perf_counter() - start
        interpreter.close()
        return elapsed

    assert sorted(asyncio.run(seconds()) for _ in range(9))[4] < 0.2  # idle 0.03; leave room for a busy machine
