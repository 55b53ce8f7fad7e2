"""Where the policy's Python code runs: an interpreter of its own for each rollout.

`Sandbox` has two levels; a third, a service on other machines, is remote.py. None falls back on another: `check` says
what to install or to choose where a level does not work.

`bubblewrap` (Linux): the interpreter has user, pid, ipc, net, uts and mount namespaces of its own. It sees the system
and this Python's packages read-only, nothing else of the machine's files, a /tmp of bounded size that is its home, and
no environment. It has no privileges; system calls that manage the machine, namespaces or other processes are refused
(interpreter/confine.py). It can write into two places alone: its /tmp (64 MiB, in memory) and the file that it prints
into (16 MiB, on the host's disk). Memory and CPU time of a process, processes, and the size and number of files are
limited, and all of its processes are killed at a call's deadline and at the rollout's end.
It does NOT protect from: faults of the kernel itself; reading what lies under /usr and in this Python's site-packages
(keep no secrets there), or about the host's hardware; use of all cores until the rollout's end, also between calls; use
of memory by many processes at once, each within the limit, and by the kernel for their sockets and pipes (a cgroup
around the trainer would bound it; the kernel is told to kill these processes first); side channels between processes of
one machine. The code runs as nobody where the trainer is root's, else as the trainer's own user.

`none_i_trust_the_policy`: a plain child process in a folder of its own, with limits on memory, CPU time and files,
and no environment.
It does NOT protect from anything the user may do: the code can read and delete the user's files, use the network, start
processes that leave the process group and live on, and kill the trainer. It is for policies and questions that are
trusted, and for systems without bubblewrap.
"""

import asyncio
import contextlib
import io
import os
import resource
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import PIL.Image

from axpo.images import MAX_ASPECT
from axpo.tools.base import Fault, SystemFault, ToolError, ToolResult
from axpo.tools.interpreter import bubblewrap
from axpo.tools.interpreter.session import PICTURE_PIXELS, PICTURES, TRACEBACK, cut
from axpo.tools.interpreter.template import Limits, Setup, send

BUBBLEWRAP, NONE = "bubblewrap", "none_i_trust_the_policy"
OUTPUT = 4000  # characters of a call's output that the policy sees
NO_OUTPUT = "(no output)"  # what the policy sees of a call that printed nothing
START = 30.0  # seconds that an interpreter may take to start, the template's imports included
DIED = "The interpreter died. All variables are lost."
_REPORT = 4 * TRACEBACK + 1000  # bytes of a traceback
_PICTURE = 8 << 20  # bytes of one picture
_CHUNKS = 4096  # of its file: honest writers need some hundred
_PASSED_OVER = 16  # replies to other requests that are skipped: each takes the trainer's time
_ENVIRONMENT = {
    "HOME": "/tmp",
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # a set must print alike in every run
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",  # each thread of a numeric library reserves memory that counts against the limit
    "OPENBLAS_NUM_THREADS": "1",
}


class Sandbox:
    """Starts interpreters at one of the two levels above, as forks of a template process that it keeps.

    The template starts with the first interpreter, or at `check`, and ends with this process however that ends.
    matplotlib keeps its list of fonts in the folder `fonts`.
    """

    def __init__(self, level: str = BUBBLEWRAP, limits: Limits | None = None, fonts: Path | None = None) -> None:
        self.level = level
        self.limits = limits or Limits()
        self._fonts = fonts
        self._template: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 (it lasts as long as this object)

    def check(self) -> None:
        """Raise ToolError, saying what to install or choose, unless an interpreter starts and computes."""
        try:
            if self.level == BUBBLEWRAP and not shutil.which("bwrap"):
                raise SystemFault("bubblewrap is not installed: apt install bubblewrap, or dnf install bubblewrap")
            with contextlib.closing(_Process(self)) as process:
                process.connect_now()
        except SystemFault as fault:
            raise ToolError(
                f"tools.sandbox: {self.level!r} does not work here: {fault}. In a container bubblewrap needs user "
                "namespaces (docker: --security-opt seccomp=unconfined). Else choose {remote: URL} of a SandboxFusion "
                f"service, or {NONE}"
                if self.level == BUBBLEWRAP
                else f"tools.sandbox: {self.level!r} does not work here: {fault}"
            ) from fault

    def interpreter(self) -> "Interpreter":
        """One that starts at its first call."""
        return Interpreter(self)

    def start(self, folder: str, channel: int, output: int, lifeline: int) -> None:
        """Have the template start an interpreter on these descriptors. `folder` is its home where it has no /tmp of its
        own. Raises SystemFault where it cannot."""
        try:
            if not self.alive:
                self._start_template()
            assert self._control is not None
            send(self._control, {"limits": asdict(self.limits), "folder": folder}, [channel, output, lifeline])
        except OSError as error:
            raise SystemFault(f"no interpreter can be started: {error}") from error

    @property
    def alive(self) -> bool:
        """Whether the template runs, and so whatever it has started."""
        return self._template is not None and self._template.poll() is None

    def complaints(self) -> str:
        """The last line that the template has written as it failed."""
        size = os.fstat(self._complaints.fileno()).st_size
        lines = os.pread(self._complaints.fileno(), size, 0).decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else ""

    def close(self) -> None:
        """End the template and all interpreters."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._template is not None:
            self._template.wait()
            self._template = None

    def _own(self) -> list[str]:
        """The programs of the sandbox's processes whose files are the user's own: system ones are root's."""
        if self.level == NONE or os.getuid() == 0:
            return []
        programs = (bubblewrap.executable(), os.path.realpath(shutil.which("bwrap") or ""))
        return [path for path in programs if os.stat(path).st_uid == os.getuid() or os.access(path, os.W_OK)]

    def _start_template(self) -> None:
        self.close()
        root = str(Path(__file__).parents[2])
        program = (
            f"import sys; sys.path.append({root!r}); from axpo.tools.interpreter import template; "
            f"template.ROOT = {root!r}; template.main(int(sys.argv[1]), {self._own()!r})"
        )
        ours, theirs = socket.socketpair()
        _allow_many_files()
        setup = Setup(
            packages=bubblewrap.packages(),
            environment=_ENVIRONMENT,
            matplotlib=str(self._fonts or ""),
            bubblewrap=bubblewrap.command() if self.level == BUBBLEWRAP else [],
            shown_in_tmp=[path for path in bubblewrap.seen() if path.startswith("/tmp/")],
        )
        with theirs:
            # Not -I, which would ignore PYTHONHASHSEED.
            self._template = subprocess.Popen(
                [bubblewrap.executable(), "-P", "-s", "-S", "-u", "-X", "utf8", "-c", program, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._complaints,
                pass_fds=[theirs.fileno()],
                env=_ENVIRONMENT,
                cwd="/",
                start_new_session=True,  # Ctrl-C is for the trainer, which closes the rollouts in order
            )
        self._control = ours
        send(ours, asdict(setup), [])


class Interpreter:
    """A Python interpreter that keeps its variables from one call to the next, until it is stopped or dies."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._running: _Process | None = None
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Start, unless it runs. Raises SystemFault where it cannot."""
        if self._running is None:
            self._running = await _start(self._sandbox)

    async def run(self, code: str, timeout: float, images: Sequence[bytes] = ()) -> ToolResult:
        """Run the code for at most `timeout` seconds; the text is its output, then the traceback if it raised.

        `images` are all those of the conversation so far: `image_0`, … in the code. Raises SystemFault where no
        interpreter can be started, or the sandbox is lost.
        """
        async with self._lock:
            await self.start()
            process = self._running
            assert process is not None
            pictures: list[bytes] = []
            lost = True
            process.forget_output()
            try:
                async with asyncio.timeout(timeout):
                    report, pictures = await process.exchange(code, images)
                fault, lost = Fault.RAISED if report else None, False
            except TimeoutError:
                report, fault = f"Stopped after {timeout:g} s. All variables are lost.", Fault.TIMEOUT
            except (OSError, EOFError, ValueError) as error:
                if not self._sandbox.alive:
                    self.close()
                    raise SystemFault("the sandbox's template process has ended") from error
                report, fault = DIED, Fault.RAISED
            except BaseException:
                self.close()
                raise
            output = process.output()
            if lost:
                self.close()
            return tell(output, report, pictures, fault)

    def close(self) -> None:
        """Kill the interpreter, if it runs, with all that it has started. A later call starts a new one."""
        if self._running is not None:
            self._running.close()
            self._running = None


class _Process:
    """A running interpreter: the channel that it answers on, the file that it prints into, the lifeline."""

    def __init__(self, sandbox: Sandbox) -> None:
        """Ask for it. Raises SystemFault where that is impossible."""
        self.requests = 0
        self.images = 0
        with contextlib.ExitStack() as resources:
            folder = ""
            if sandbox.level == NONE:
                folder = resources.enter_context(
                    tempfile.TemporaryDirectory(prefix="axpo-", ignore_cleanup_errors=True)
                )
            self.file, printed = _output_file()
            ours, channel = socket.socketpair()
            self.lifeline, lifeline = socket.socketpair()
            for resource in (self.file, ours, self.lifeline):
                resources.enter_context(resource)
            with printed, channel, lifeline:
                sandbox.start(folder, channel.fileno(), printed.fileno(), lifeline.fileno())
            self.socket, self.sandbox = ours, sandbox
            self.resources = resources.pop_all()

    def connect_now(self) -> None:
        """Wait, blocking, until it is ready. Raises SystemFault."""
        self.socket.settimeout(START)
        try:
            ready = self.socket.recv(16)
        except TimeoutError as error:
            raise self.not_started(error) from error
        if ready != b"0 0\n":
            raise self.not_started(EOFError())

    async def connect(self) -> None:
        self.reader, self.writer = await asyncio.open_unix_connection(sock=self.socket)
        self.resources.callback(self.writer.transport.abort)
        await self.receive(0)

    def not_started(self, error: Exception) -> SystemFault:
        reason = self.output().strip() or self.sandbox.complaints() or type(error).__name__
        return SystemFault(f"the interpreter did not start: {reason}")

    async def exchange(self, code: str, images: Sequence[bytes]) -> tuple[str, list[bytes]]:
        """The traceback, or "", and the pictures. Raises OSError, EOFError or ValueError where the interpreter has
        died or talks nonsense."""
        self.requests += 1
        data, new = code.encode("utf-8", "replace"), images[self.images :]
        self.images = len(images)
        self.writer.write(" ".join(map(str, (len(data), *map(len, new)))).encode() + b"\n")
        for part in (data, *new):
            self.writer.write(part)
        await self.writer.drain()
        return await self.receive(self.requests)

    async def receive(self, number: int) -> tuple[str, list[bytes]]:
        for _ in range(_PASSED_OVER):
            answered, length, *sizes = map(int, (await self.reader.readline()).split())
            if not 0 <= length <= _REPORT or len(sizes) > PICTURES or not all(0 <= s <= _PICTURE for s in sizes):
                raise ValueError(f"a reply of {length} and {sizes} bytes")
            report = await self.reader.readexactly(length)
            pictures = [await self.reader.readexactly(size) for size in sizes]
            if answered == number:
                return report.decode("utf-8", "replace"), pictures
        raise ValueError("too many replies to other requests")

    def forget_output(self) -> None:
        """Empty the file before a request. Raises SystemFault where the host's disk fails."""
        try:
            self.file.truncate(0)
        except OSError as error:
            raise SystemFault(f"the interpreter's output cannot be kept: {error}") from error

    def output(self) -> str:
        """What was printed since the last request, its middle left out where it is long."""
        size = os.fstat(self.file.fileno()).st_size
        return cut(os.pread(self.file.fileno(), size, 0).decode("utf-8", "replace"), OUTPUT)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a process that this one has forked may hold it open
            self.lifeline.shutdown(socket.SHUT_RDWR)
        self.resources.close()


def _output_file() -> tuple[BinaryIO, BinaryIO]:
    """A file without a name, for the trainer, and again for the interpreter, which adds to its end.

    Opened twice: what the code does to its descriptor, such as setting O_DIRECT, is not to concern the trainer's.
    """
    fd, path = tempfile.mkstemp()
    try:
        return os.fdopen(fd, "rb+"), open(path, "ab+", buffering=0)
    finally:
        os.unlink(path)


async def _start(sandbox: Sandbox) -> _Process:
    process = _Process(sandbox)
    try:
        async with asyncio.timeout(START):
            await process.connect()
    except (OSError, EOFError, ValueError) as error:
        fault = process.not_started(error)
        process.close()
        raise fault from error
    except BaseException:
        process.close()
        raise
    return process


def tell(output: str, report: str, pictures: Sequence[bytes], fault: Fault | None) -> ToolResult:
    """What the policy sees. The pictures were made by its code: one that cannot be shown is left out."""
    images = [picture for picture in map(_only_pixels, pictures) if is_small_png(picture)]
    notes = []
    if len(images) < len(pictures):
        why = f"broken, of more than {PICTURE_PIXELS} pixels, or a side over {MAX_ASPECT} times the other"
        notes.append(f"[{len(pictures) - len(images)} pictures left out: {why}]")
    parts = [part for part in (output.rstrip("\n"), report.rstrip("\n"), *notes) if part]
    return ToolResult("\n".join(parts) or ("" if images else NO_OUTPUT), tuple(images), fault)


def is_small_png(data: bytes) -> bool:
    """Whether the bytes are a whole PNG of at most PICTURE_PIXELS pixels that is not too thin to be shown."""
    try:
        with PIL.Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            width, height = image.size
            if width * height > 1.01 * PICTURE_PIXELS or max(width, height) > MAX_ASPECT * min(width, height):
                return False
            image.load()
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError):
        return False
    return True


def _only_pixels(data: bytes) -> bytes:
    """The PNG without what is no pixels: readers choke on forged metadata. b"" where it is not made of chunks."""
    kept, place = [data[:8]], 8
    with contextlib.suppress(struct.error):
        for _ in range(_CHUNKS):
            length, kind = struct.unpack_from(">I4s", data, place)
            end = place + 12 + length
            if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
                kept.append(data[place:end])
            if kind == b"IEND":
                return b"".join(kept)
            place = end
    return b""


def _allow_many_files() -> None:
    """Each interpreter takes three descriptors here: as many as the system lets this process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(OSError, ValueError):  # macOS has a limit of its own below an infinite one
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
