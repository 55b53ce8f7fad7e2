"""The template process, of which every interpreter is a fork: what is slow to import is imported once.

The trainer starts it as a program of its own and talks to it over a Unix socket of messages. The first message is a
`Setup` as JSON. Each later one asks for an interpreter: it carries its limits and its home as JSON, and three
descriptors, the interpreter's channel (session.py), the file that it prints into, and a lifeline. When the trainer
closes its end of the lifeline, by will or by dying, the interpreter and all that it has started are killed. When it
closes the socket, this process ends too, and with it every sandbox (bubblewrap's --die-with-parent).

Nothing that the policy's code writes is read here.
"""

import contextlib
import gc
import importlib
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass

from axpo.tools.interpreter import session

if sys.platform == "linux":
    from axpo.tools.interpreter import confine

PRELOADED = (
    "random",
    "numpy.random",
    "sympy",
    "PIL.Image",
    "PIL.ImageDraw",
    "PIL.ImageFilter",
    "PIL.ImageOps",
    "matplotlib.pyplot",
)
ROOT = ""  # the folder that axpo itself was imported from, for the template alone
_CHANNEL = 3  # the only descriptor above 2 that an interpreter keeps


@dataclass(frozen=True)
class Setup:
    """What all interpreters have in common. `environment` is all that the policy's code has of one, `matplotlib` the
    folder of its list of fonts, `bubblewrap` its command line up to the options for descriptors, [] to do without, and
    `shown_in_tmp` what stays to be seen of the machine's /tmp."""

    packages: list[str]
    environment: dict[str, str]
    matplotlib: str
    bubblewrap: list[str]
    shown_in_tmp: list[str]


@dataclass(frozen=True)
class Limits:
    """What one interpreter may use over its life."""

    memory: int = 1 << 30  # bytes of address space a process, beyond what the template takes
    cpu: int = 600  # seconds of a process
    file: int = 16 << 20  # bytes a file, and of output a call
    disk: int = 64 << 20  # bytes in /tmp, which lies in memory; under bubblewrap only
    files: int = 4096  # files in /tmp; under bubblewrap only
    open_files: int = 256
    processes: int = 64  # and threads; under bubblewrap only: elsewhere all those of the user would count


@dataclass(frozen=True)
class _Running:
    """The processes of one interpreter that are this one's children, and what keeps the sandbox's placeholder alive."""

    pids: set[int]
    held: int | None
    folder: str = ""


def main(control_fd: int, own: list[str]) -> None:
    """Serve the trainer. `own` are the programs that the policy's code could change if they were not read-only."""
    if own:
        confine.run_from_read_only(own)
    control = socket.socket(fileno=control_fd)
    control.set_inheritable(False)
    setup = Setup(**json.loads(_receive(control)[0]))
    sys.path += setup.packages
    if setup.matplotlib:
        os.environ["MPLCONFIGDIR"] = setup.matplotlib
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # else the collector would touch, and so copy, every page that the forks share
    if setup.bubblewrap:
        confine.adopt_orphans()
    trainer = os.getppid()
    poller = select.poll()
    poller.register(control, select.POLLIN)
    running: dict[int, _Running] = {}
    while os.getppid() == trainer:  # a fork of the trainer may hold the socket open after its death
        if setup.bubblewrap:
            _collect_dead(running)
        for fd, _ in poller.poll(50):
            if fd != control.fileno():
                poller.unregister(fd)
                _end(fd, running.pop(fd))
                continue
            message, fds = _receive(control)
            if not message:
                return _end_all(running)
            channel, output, lifeline = fds
            wish = json.loads(message)
            running[lifeline] = _begin(setup, Limits(**wish["limits"]), wish["folder"], channel, output)
            poller.register(lifeline, 0)
    return _end_all(running)


def send(control: socket.socket, message: object, fds: list[int]) -> None:
    """Send a message as JSON, and descriptors with it."""
    data = json.dumps(message).encode()
    header = len(data).to_bytes(4, "big")
    if fds:
        socket.send_fds(control, [header], fds)
    else:
        control.sendall(header)
    control.sendall(data)


def _receive(control: socket.socket) -> tuple[bytes, list[int]]:
    """The next message and its descriptors; b"" where the trainer has closed the socket."""
    header, fds, _, _ = socket.recv_fds(control, 4, 3)
    for fd in fds:
        os.set_inheritable(fd, False)
    return control.recv(int.from_bytes(header, "big"), socket.MSG_WAITALL), fds


def _begin(setup: Setup, limits: Limits, folder: str, channel: int, output: int) -> _Running:
    """Start an interpreter. What goes wrong from here on is written into its output, and its channel closes."""
    pids: set[int] = set()
    sandbox = None
    try:
        if setup.bubblewrap:
            sandbox = confine.Sandbox(setup.bubblewrap, output)
            pids.add(sandbox.pid)
        pids.add(os.fork())
    except OSError as error:  # the machine is out of processes, say: the interpreters that run are not to suffer
        _tell(output, error)
    if 0 in pids:
        status = 1
        try:
            _become(setup, limits, folder, channel, output, sandbox)
            status = 0
        except BaseException as error:
            _tell(2, error)
        finally:
            os._exit(status)
    os.close(channel)
    os.close(output)
    if sandbox is None:
        return _Running(pids, None, folder)
    sandbox.release()
    return _Running(pids, sandbox.hold)


def _tell(output: int, error: BaseException) -> None:
    os.write(output, f"{type(error).__name__}: {error}\n".encode())


def _become(
    setup: Setup, limits: Limits, folder: str, channel: int, output: int, sandbox: "confine.Sandbox | None"
) -> None:
    """Turn this fork into an interpreter, inside the sandbox where there is one, and serve."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    if sys.platform == "linux":
        confine.first_to_be_killed_for_memory()
        confine.die_with_parent()
    if sandbox is not None:
        sandbox.join()
        if os.fork():  # only a child is in the new pid namespace
            return
    os.setpgid(0, 0)  # no session of its own: the kernel may give each session an equal share of the processor
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.dup2(channel, _CHANNEL)
    os.set_inheritable(_CHANNEL, False)
    os.closerange(_CHANNEL + 1, 1 << 16)
    if sandbox is not None:
        confine.make_tmp(limits.disk, limits.files, setup.shown_in_tmp)
    home = folder or "/tmp"
    os.chdir(home)
    _limit(limits, sandbox is not None)
    if sandbox is not None:
        confine.give_up_privileges()
    os.environ.clear()
    os.environ.update(setup.environment, HOME=home)
    _forget_the_template()
    os.nice(10)  # below the trainer, and below the start of other interpreters
    session.serve(_CHANNEL)


def _limit(limits: Limits, isolated: bool) -> None:
    """Limits that the code cannot raise."""
    wanted = [
        (resource.RLIMIT_CPU, limits.cpu),
        (resource.RLIMIT_FSIZE, limits.file),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_CORE, 0),
    ]
    if sys.platform == "linux":  # elsewhere there is no such limit, or it does not bind
        with open("/proc/self/statm") as sizes:
            taken = int(sizes.read().split()[0]) * resource.getpagesize()
        wanted.append((resource.RLIMIT_AS, taken + limits.memory))
    if isolated:
        wanted.append((resource.RLIMIT_NPROC, limits.processes))
        # What is counted for all processes of a user, those outside included, and priorities above theirs.
        wanted += [(resource.RLIMIT_SIGPENDING, 1024), (resource.RLIMIT_MSGQUEUE, 0)]
        wanted += [(resource.RLIMIT_RTPRIO, 0), (resource.RLIMIT_NICE, 0)]
    for which, value in wanted:
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def _forget_the_template() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "axpo"]:
        del sys.modules[name]
    sys.path[:] = [path for path in sys.path if path != ROOT]
    sys.argv[:] = [""]
    # The same in every interpreter, so that a rollout's code runs alike when a fork repeats it.
    import random

    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)


def _end(lifeline: int, running: _Running) -> None:
    for pid in running.pids:
        for kill in (os.killpg, os.kill):  # without bubblewrap an interpreter leads a group of its own
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(pid, signal.SIGKILL)
    if running.held is not None:
        os.close(running.held)
    else:
        for pid in running.pids:
            os.waitpid(pid, 0)
    if running.folder:  # a trainer that was killed cannot do it
        shutil.rmtree(running.folder, ignore_errors=True)
    os.close(lifeline)


def _collect_dead(running: dict[int, _Running]) -> None:
    """Collect sandboxes' processes that have ended, without waiting for any. Their numbers may be given to others."""
    with contextlib.suppress(ChildProcessError):
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            for interpreter in running.values():
                interpreter.pids.discard(pid)


def _end_all(running: dict[int, _Running]) -> None:
    for lifeline, interpreter in running.items():
        _end(lifeline, interpreter)
    deadline = time.monotonic() + 5  # the trainer waits for this process
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.005)
