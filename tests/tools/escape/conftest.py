"""A host that an escape would touch, and attempts in a sandbox on it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import re
import secrets
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from axpo.tools.base import ToolResult
from axpo.tools.interpreter import confine
from axpo.tools.interpreter.template import Limits
from axpo.tools.sandbox import Interpreter, Sandbox

SMALL = Limits(memory=192 << 20, cpu=20, file=1 << 20, disk=4 << 20, files=200, open_files=64, processes=24)
COLUMN = confine._MACHINES[platform.machine()][0] if platform.machine() in confine._MACHINES else 0
NUMBERS = {name: n[COLUMN] for name, n in {**confine._REFUSED, **confine._CALLS}.items() if n[COLUMN] is not None}

# What every attempt may use: facts of the host, and two ways to try without an exception.
PRELUDE = """
import ctypes, errno, glob, os, signal, socket, struct, subprocess, sys, threading, time
HOME, TMP, SECRET, TCP, UDP, ABSTRACT, SOCKET, PID, NUMBERS = {facts!r}
libc = ctypes.CDLL(None, use_errno=True)
def tried(action, *arguments):
    try:
        return action(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno, type(error).__name__)
    except Exception as error:
        return type(error).__name__
def call(name, *arguments):
    number = NUMBERS[name] if isinstance(name, str) else name
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_void_p(a) if isinstance(a, int) else a for a in arguments))
    return result if result >= 0 else errno.errorcode[ctypes.get_errno()]
def send(data):
    while data:
        data = data[os.write(3, data):]
"""


@dataclass
class Host:
    """Files, servers and a process that no attempt may read, change, reach or signal."""

    home: Path
    tmp: Path
    secret: str
    tcp: socket.socket
    udp: socket.socket
    abstract: socket.socket
    named: socket.socket
    process: subprocess.Popen[bytes]

    @property
    def prelude(self) -> str:
        sockets = (self.tcp.getsockname()[1], self.udp.getsockname()[1], self.abstract.getsockname().decode())
        facts = (str(self.home), str(self.tmp), self.secret[:8], *sockets, self.named.getsockname(), self.process.pid)
        return PRELUDE.format(facts=(*facts, NUMBERS))

    def touched(self) -> list[str]:
        """What an attempt has done to it. Connections and datagrams are told once."""
        found = []
        for path in (self.home, self.tmp):
            kept = path.exists() and path.read_text() == self.secret and stat.S_IMODE(path.stat().st_mode) == 0o644
            if not kept or {p.name for p in path.parent.iterdir()} - {"named"} != {path.name}:
                found.append(f"the files of {path.parent}")
        for name, server in (("tcp", self.tcp), ("abstract", self.abstract), ("named", self.named)):
            with contextlib.suppress(BlockingIOError):
                server.accept()[0].close()
                found.append(f"a connection to {name}")
        with contextlib.suppress(BlockingIOError):
            self.udp.recv(100)
            found.append("a datagram")
        state = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return found + ([] if state == "S" else [f"the process: {state}"])


@pytest.fixture(scope="session")
def host() -> Iterator[Host]:
    secret = secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        folders = [
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="axpo-canary-", dir=where)))
            for where in (Path.home(), None)
        ]
        home, tmp = (folder / "canary" for folder in folders)
        for path in (home, tmp):
            path.write_text(secret)
            path.chmod(0o644)
        for folder in folders:
            folder.chmod(0o755)
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        udp, abstract, named = (
            stack.enter_context(socket.socket(*kind))
            for kind in ((socket.AF_INET, socket.SOCK_DGRAM), (socket.AF_UNIX,), (socket.AF_UNIX,))
        )
        udp.bind(("127.0.0.1", 0))
        abstract.bind(f"\0axpo-canary-{secret}")
        named.bind(str(tmp.parent / "named"))
        for server in (abstract, named):
            server.listen()
        for server in (tcp, udp, abstract, named):
            server.setblocking(False)
        process = stack.enter_context(
            subprocess.Popen(["sleep", "3600"], env={"CANARY": secret, "PATH": "/usr/bin:/bin"})
        )
        stack.callback(process.kill)
        yield Host(home, tmp, secret, tcp, udp, abstract, named, process)


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def namespace(pid: int) -> str:
    """The pid namespace of a process, "" where it has ended."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/pid")
    return ""


def is_first(pid: int) -> bool:
    """Whether a process is the first of a pid namespace."""
    with contextlib.suppress(OSError):
        return bool(re.search(r"NSpid:.*\t1\n", Path(f"/proc/{pid}/status").read_text()))
    return False


def started(pid: int) -> str:
    """When a process was started, "" where it is gone: numbers are given again."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    return ""


def soon(holds: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.005)
    return holds()


@dataclass
class Outcome:
    """`result` is that of the attempt itself, `after` tells whether its variables were "kept" or "lost"."""

    result: ToolResult
    after: str
    disk: int  # bytes that its output took on the host
    processes: int  # of the sandbox, as it ended
    cpu: float  # seconds that the trainer has worked meanwhile


class Attempts:
    """Runs hostile code, and asserts what must hold after all of it."""

    def __init__(self, sandbox: Sandbox, host: Host, folder: Path) -> None:
        self.sandbox, self.host, self.folder = sandbox, host, folder

    def __call__(self, code: str, timeout: float = 10.0, after: str = "kept|lost") -> Outcome:
        """`after` is a pattern of what a next call says of the variables."""
        template = self.sandbox._template
        assert template is not None
        descriptors = len(os.listdir("/proc/self/fd"))
        outcome, firsts = asyncio.run(self._story(code, timeout))
        assert re.fullmatch(after, outcome.after)
        assert self.host.touched() == []
        assert list(self.folder.iterdir()) == []  # the interpreter's files on the host
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert self.sandbox._template is template
        assert self.sandbox.alive
        assert soon(lambda: not children(template.pid))
        assert soon(lambda: not any(started(pid) == when for pid, when in firsts.items()))
        return outcome

    async def _story(self, code: str, timeout: float) -> tuple[Outcome, dict[int, str]]:
        interpreter, fresh = self.sandbox.interpreter(), self.sandbox.interpreter()
        try:
            ready = await interpreter.run(f"{self.host.prelude}\nkept = 1", 20)
            assert ready.text == "(no output)"
            worked = time.process_time()
            result = await interpreter.run(code, timeout)
            worked = time.process_time() - worked
            disk, firsts, processes = self._sizes(interpreter)
            check = "__import__('posix').write(1, b'kept' if 'kept' in globals() else b'lost') and None"
            after = await interpreter.run(check, 10)
            firsts |= self._sizes(interpreter)[1]
            assert (await fresh.run("6 * 7", 20)).text == "42"
        finally:
            interpreter.close()
            fresh.close()
        return Outcome(result, after.text, disk, processes, worked), firsts

    def _sizes(self, interpreter: Interpreter) -> tuple[int, dict[int, str], int]:
        """Bytes of output on the host, the first processes of all sandboxes with their starts, and how many run there.

        A pid namespace ends with its first process.
        """
        assert self.sandbox._template is not None
        running = interpreter._running
        disk = os.fstat(running.file.fileno()).st_blocks * 512 if running else 0
        firsts = [pid for outer in children(self.sandbox._template.pid) for pid in children(outer) if is_first(pid)]
        namespaces = {namespace(first) for first in firsts} - {""}
        inside = [p for p in os.listdir("/proc") if p.isdigit() and namespace(int(p)) in namespaces]
        return disk, {first: started(first) for first in firsts}, len(inside)


@pytest.fixture
def attempt(bubblewrap_sandbox: Sandbox, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attempts:
    monkeypatch.setattr(bubblewrap_sandbox, "limits", SMALL)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Attempts(bubblewrap_sandbox, host, tmp_path)


@pytest.fixture
def unconfined(plain_sandbox: Sandbox, host: Host) -> Callable[[str], ToolResult]:
    """Runs the same code without isolation, to show that there was something to contain."""

    def run(code: str) -> ToolResult:
        async def story() -> ToolResult:
            interpreter = plain_sandbox.interpreter()
            try:
                await interpreter.run(host.prelude, 20)
                return await interpreter.run(code, 20)
            finally:
                interpreter.close()

        return asyncio.run(story())

    return run
