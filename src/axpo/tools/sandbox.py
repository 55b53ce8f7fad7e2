"""A Python interpreter of its own for each rollout, in a child process.

Where bubblewrap is installed and works, the process has its own user, pid, ipc and net namespaces, sees the system and
this Python's packages read-only, nothing of the user's files, a private /tmp and no environment. Elsewhere it is a
plain child process in a folder of its own, and one warning says so. In both cases its memory, CPU time and the size of
its files are limited.

Not covered: system calls are not filtered, what /tmp holds in total is not limited, the limit on processes does not
bind for root, and without bubblewrap a process that leaves its session outlives the rollout.
"""

import asyncio
import contextlib
import functools
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from axpo.tools.base import Fault, SystemFault, ToolResult

logger = logging.getLogger(__name__)

OUTPUT = 4000  # characters of a call's output that the policy sees
NO_OUTPUT = "(no output)"  # what the policy sees of a call that printed nothing
START = 10.0  # seconds that an interpreter may take to start
_REPORT = 1 << 20  # bytes of a traceback; the program sends far fewer unless the code writes to its socket
_PROGRAM = Path(__file__).with_name("worker.py")
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",  # each thread of a numeric library reserves memory that counts against the limit
    "OPENBLAS_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Limits:
    """What one interpreter may use over its life."""

    memory: int = 1 << 30  # bytes of address space
    cpu: int = 600  # seconds
    file: int = 16 << 20  # bytes a file, and of output a call
    processes: int = 64  # under bubblewrap only: elsewhere all processes of the user would count


class Interpreter:
    """A Python interpreter that keeps its variables from one call to the next, until it is stopped or dies.

    It starts at the first call. `isolated` puts it under bubblewrap.
    """

    def __init__(self, isolated: bool, limits: Limits | None = None) -> None:
        self._isolated = isolated
        self._limits = limits or Limits()
        self._running: _Process | None = None
        self._lock = asyncio.Lock()

    async def run(self, code: str, timeout: float) -> ToolResult:
        """Run the code for at most `timeout` seconds; the text is its output, then the traceback if it raised.

        Raises SystemFault where no interpreter can be started.
        """
        async with self._lock:
            if self._running is None:
                self._running = await _start(self._isolated, self._limits)
            process = self._running
            try:
                async with asyncio.timeout(timeout):
                    report = await process.exchange(code)
                fault = Fault.RAISED if report else None
            except TimeoutError:
                report, fault = f"Stopped after {timeout:g} s. All variables are lost.", Fault.TIMEOUT
                process.kill()
            except (OSError, EOFError, ValueError):
                report, fault = "The interpreter died. All variables are lost.", Fault.RAISED
                process.kill()
            except BaseException:
                self.close()
                raise
            text = _join(process.output(), report)
            if process.dead:
                self.close()
            return ToolResult(text, fault=fault)

    def close(self) -> None:
        """Kill the interpreter, if it runs. A later call starts a new one."""
        if self._running is not None:
            self._running.close()
            self._running = None


class _Process:
    """A running child with the socket that it answers on and the file that it prints into."""

    def __init__(self, isolated: bool, limits: Limits) -> None:
        self.requests = 0
        with contextlib.ExitStack() as resources:
            folder = resources.enter_context(tempfile.TemporaryDirectory(prefix="axpo-", ignore_cleanup_errors=True))
            self.file = resources.enter_context(tempfile.TemporaryFile())
            ours, theirs = socket.socketpair()
            self.socket = resources.enter_context(ours)
            with theirs:
                command = _command(theirs.fileno(), limits, isolated)
                # From the event loop's thread, which lives on: bubblewrap's --die-with-parent goes by the thread.
                self.child = subprocess.Popen(
                    [*_bubblewrap(), *command] if isolated else command,
                    stdin=subprocess.DEVNULL,
                    stdout=self.file,
                    stderr=subprocess.STDOUT,
                    pass_fds=[theirs.fileno()],
                    env=_ENVIRONMENT | {"HOME": "/tmp" if isolated else folder},
                    cwd=folder,
                    start_new_session=True,
                )
            resources.callback(self.kill)
            self.resources = resources.pop_all()

    async def connect(self) -> None:
        self.reader, self.writer = await asyncio.open_unix_connection(sock=self.socket)
        self.resources.callback(self.writer.transport.abort)
        await self.receive(0)

    async def exchange(self, code: str) -> str:
        """The traceback, or "". Raises OSError, EOFError or ValueError where the child has died or talks nonsense."""
        self.file.truncate(0)
        self.file.seek(0)  # the child shares this offset
        self.requests += 1
        data = code.encode("utf-8", "replace")
        self.writer.write(b"%d\n%b" % (len(data), data))
        await self.writer.drain()
        return await self.receive(self.requests)

    async def receive(self, number: int) -> str:
        while True:
            answered, length = map(int, (await self.reader.readline()).split())
            if not 0 <= length <= _REPORT:
                raise ValueError(f"a report of {length} bytes")
            report = await self.reader.readexactly(length)
            if answered == number:
                return report.decode("utf-8", "replace")

    def output(self) -> str:
        """What was printed since the last request, its middle left out where it is long."""
        size = os.fstat(self.file.fileno()).st_size
        text = os.pread(self.file.fileno(), size, 0).decode("utf-8", "replace")
        if len(text) <= OUTPUT:
            return text
        half = OUTPUT // 2
        return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"

    def kill(self) -> None:
        if not self.dead:
            os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()

    @property
    def dead(self) -> bool:
        return self.child.returncode is not None

    def close(self) -> None:
        self.resources.close()


async def _start(isolated: bool, limits: Limits) -> _Process:
    try:
        process = _Process(isolated, limits)
    except OSError as error:
        raise SystemFault(f"no interpreter can be started: {error}") from error
    try:
        async with asyncio.timeout(START):
            await process.connect()
    except (OSError, EOFError, ValueError) as error:
        process.kill()
        reason = process.output().strip() or type(error).__name__
        process.close()
        raise SystemFault(f"the interpreter did not start: {reason}") from error
    except BaseException:
        process.close()
        raise
    return process


def _join(output: str, report: str) -> str:
    return "\n".join(part for part in (output.rstrip("\n"), report.rstrip("\n")) if part) or NO_OUTPUT


def _command(channel: int, limits: Limits, isolated: bool) -> list[str]:
    arguments = (channel, limits.memory, limits.cpu, limits.file, limits.processes if isolated else 0)
    # Not -I, which would ignore PYTHONHASHSEED: a set must print alike in every run.
    program = [_executable(), "-P", "-s", "-S", "-u", "-X", "utf8", "-c", _PROGRAM.read_text(encoding="utf-8")]
    return [*program, *map(str, arguments), *_packages()]


def _executable() -> str:
    """The interpreter itself: a virtual environment's is a link to it."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _packages() -> list[str]:
    return sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


def _bubblewrap() -> list[str]:
    """The command line up to the program: namespaces, and the few folders that are to be seen, read-only."""
    command = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-user",
        "--unshare-all",
        "--uid",
        "65534",
        "--gid",
        "65534",
        "--cap-drop",
        "ALL",
    ]
    command += ["--die-with-parent", "--new-session", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    for folder in ("/usr", "/bin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(folder):
            command += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            command += ["--ro-bind", folder, folder]
    for path in ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime"):
        command += ["--ro-bind-try", path, path]
    for path in (_executable(), os.path.join(sys.base_prefix, "lib"), *_packages()):
        if os.path.exists(path) and not path.startswith("/usr/"):
            command += ["--ro-bind", path, path]
    return [*command, "--remount-ro", "/", "--chdir", "/tmp"]


@functools.cache
def isolation_works() -> bool:
    """Whether bubblewrap is installed and may do its work here. Logs one warning if not."""
    reason = "bubblewrap (bwrap) is not installed"
    if shutil.which("bwrap"):
        trial = subprocess.run(
            [*_bubblewrap(), _executable(), "-I", "-S", "-c", ""], capture_output=True, text=True, check=False
        )
        if trial.returncode == 0:
            return True
        reason = f"bubblewrap does not work here ({trial.stderr.strip()})"
    logger.warning("%s: the python tool runs the policy's code in a plain child process", reason)
    return False
