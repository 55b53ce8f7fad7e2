"""Attempts to get out of a bubblewrap sandbox: to the host's files, network, processes, and to a larger kernel.

`attempt` (conftest.py) runs each and asserts afterwards that nothing of the host was read, changed, reached or
signalled, that no process is left, and that the sandbox goes on. Those that are harmless are made without isolation
too, where they must succeed. More are in interpreter/test_excess.py and interpreter/test_hostile_replies.py.
"""

import asyncio
import os
import platform
import re
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from axpo.tools.base import Fault, ToolResult
from axpo.tools.interpreter import bubblewrap
from axpo.tools.sandbox import DIED, Sandbox


@dataclass(frozen=True)
class Escape:
    """`contained` is a pattern of what the code says when it is held. `real`: otherwise it succeeds, harmlessly."""

    name: str
    code: str
    contained: str
    real: bool = False


FILES = [
    Escape(
        "by name", "print(tried(lambda: open(HOME).read()), tried(lambda: open(TMP).read()))", "ENOENT ENOENT", True
    ),
    Escape(
        "through the roots, folders and descriptors of other processes",
        """
def look(path):
    return SECRET in open(path, errors='replace').read()
found = [tried(look, f'{process}/{door}{path}') for process in glob.glob('/proc/[0-9]*')
         for door in ('root', 'cwd/root', 'root/proc/1/root', 'fd/0/..', 'fd/3') for path in (HOME, TMP)]
print(True in found)""",
        "False",
        True,
    ),
    Escape(
        "the environment of other processes",
        """
def look(path):
    return SECRET in open(path, errors='replace').read()
print(True in [tried(look, path) for path in glob.glob('/proc/[0-9]*/environ') if f'/{os.getpid()}/' not in path])""",
        "False",
        True,
    ),
    Escape(
        "links",
        """
os.chdir('/tmp')
for name in ('link', 'hard', 'up', 'proc'):
    tried(os.unlink, name)
os.symlink(TMP, 'link'), os.symlink('../../../../../../../..' + TMP, 'up'), os.symlink('/proc/1/root' + TMP, 'proc')
print(tried(os.link, TMP, 'hard'), *(tried(lambda n=n: SECRET in open(n).read()) for n in ('link', 'up', 'proc')))
for name in ('link', 'hard', 'up', 'proc'):
    tried(os.unlink, name)""",
        "ENOENT ENOENT ENOENT (ENOENT|EACCES)",
        True,
    ),
    Escape(
        "out of the folder of any descriptor",
        """
ways = [tried(lambda: os.open(path, os.O_RDONLY, dir_fd=fd)) for fd in range(64) for path in ('..', '.', TMP[1:])]
print(*sorted(set(ways)))""",
        "EBADF ENOTDIR",
    ),
    Escape(
        "writing where it is read-only",
        """
places = ['/usr/axpo', '/usr/bin/axpo', '/axpo', '/etc/axpo', '/dev/axpo', '/proc/axpo', '/lib/axpo', os.__file__,
          '/proc/sys/kernel/core_pattern', '/proc/sys/kernel/hostname', '/proc/sysrq-trigger',
          '/proc/self/oom_score_adj', '/proc/self/uid_map', '/proc/1/mem', '/proc/2/mem', '/proc/1/oom_score_adj']
print(*sorted(set(tried(lambda p=p: os.close(os.open(p, os.O_WRONLY | os.O_CREAT))) for p in places)))
os.system('echo 0 > /proc/self/oom_score_adj; cat /proc/self/oom_score_adj')
None""",
        "EACCES ENOENT EROFS\n.*Read-only file system\n1000|EROFS\n.*Read-only file system\n1000",
    ),
    Escape(
        "changing its own program",
        """
print(tried(os.chmod, '/proc/self/exe', 0o4777), tried(lambda: os.open('/proc/self/exe', os.O_WRONLY)),
      tried(os.truncate, '/proc/self/exe', 0), tried(os.utime, '/proc/self/exe'))""",
        "(EPERM|EROFS) (EACCES|ETXTBSY) (EACCES|ETXTBSY|EROFS) (EACCES|EROFS|EPERM)",
    ),
    Escape(
        "devices",
        """
print(*sorted(os.listdir('/dev')))
print(*(tried(os.mknod, '/tmp/d', 0o600 | kind, os.makedev(*n)) for kind, n in ((0o60000, (8, 0)), (0o20000, (1, 1)))))
print(*{tried(os.open, f'/dev/{name}', 2) for name in ('mem', 'kmem', 'kvm', 'vsock', 'fuse', 'sda', 'vda', 'tty')})""",
        "fd full null random shm stderr stdin stdout urandom zero\nEPERM EPERM\nENOENT",
    ),
]

NETWORK = [
    Escape(
        "TCP to loopback",
        "print(tried(lambda: socket.create_connection(('127.0.0.1', TCP), 2).close()))",
        "ECONNREFUSED",
        True,
    ),
    Escape("UDP to loopback", "socket.socket(2, 2).sendto(b'x', ('127.0.0.1', UDP)); 'sent'", "'sent'", True),
    Escape(
        "addresses beyond",
        """
targets = [(2, '10.0.0.1'), (2, '192.168.1.1'), (2, '169.254.169.254'), (2, '8.8.8.8'), (10, '2001:4860:4860::8888')]
print(*{tried(lambda: socket.socket(family, kind).connect((host, 53))) for family, host in targets for kind in (1, 2)})
print(tried(socket.getaddrinfo, 'localhost.example.com', 80), len(open('/proc/net/route').readlines()))""",
        "ENETUNREACH\n(EAI_AGAIN|gaierror) 1",
    ),
    Escape("an abstract socket", "print(tried(socket.socket(1).connect, ABSTRACT))", "ECONNREFUSED", True),
    Escape("a socket's file", "print(tried(socket.socket(1).connect, SOCKET))", "ENOENT", True),
    Escape(
        "sockets that are not of the network's namespace",
        """
families = [f for f in range(46) if f not in (1, 2, 10)]
print(*{tried(make, f, kind) for make in (socket.socket, socket.socketpair) for f in families for kind in (1, 2, 3, 5)})
print(*{tried(socket.socket, f, 3, 255) for f in (2, 10)})""",
        "EAFNOSUPPORT\nEPERM",
    ),
]

PROCESSES = [
    Escape(
        "signals to a process of the host and to its parent",
        "print(*{tried(os.kill, PID + n, s) for n in range(-9, 10) for s in (0, 15, 19)}, os.getppid())",
        "ESRCH 0",
    ),
    Escape(
        "descriptors, limits and priorities of a process of the host",
        """
import resource
print(tried(os.pidfd_open, PID), tried(resource.prlimit, PID, resource.RLIMIT_CPU), tried(os.getpriority, 0, PID),
      tried(os.sched_setaffinity, PID, [0]), tried(os.getsid, PID))
print(*(p for p in glob.glob('/proc/[0-9]*') if int(p[6:]) > 9))""",
        "ESRCH ESRCH ESRCH ESRCH ESRCH",
    ),
    Escape(
        "tracing bubblewrap and the placeholder",
        """
buffer = ctypes.create_string_buffer(8)
print(*{call('ptrace', 16, pid, 0, 0) for pid in (1, 2)},
      *{call('process_vm_writev', pid, 0, 0, 0, 0) for pid in (1, 2)},
      *{call('pidfd_getfd', tried(os.pidfd_open, pid), 0, 0) for pid in (1, 2)}, call('kcmp', 1, 2, 0, 0, 0))""",
        "EPERM EPERM EPERM EPERM",
    ),
    Escape(
        "joining namespaces",
        """
kinds = ('user', 'mnt', 'pid', 'net', 'ipc', 'uts')
doors = [tried(os.open, f'/proc/{process}/ns/{kind}', 0) for process in (1, 2, 'self') for kind in kinds]
print(*{call('setns', fd, 0) for fd in range(32)}, *{call('unshare', 1 << bit) for bit in (7, 17, *range(25, 31))})
print(*{call('clone', 17 | 1 << bit, 0, 0, 0, 0) for bit in (17, *range(25, 31))}, call('clone3', 0, 88))
print(subprocess.run(['unshare', '-Urm', 'id'], capture_output=True).returncode != 0)
print(*{line.split()[1] for line in open('/proc/self/status') if line.startswith('Cap')})""",
        "EPERM EPERM\nEPERM ENOSYS\nTrue\n0{16}",
    ),
    Escape(
        "becoming another user",
        """
print(tried(os.setuid, 0), tried(os.setgid, 0), tried(os.setgroups, [0]), libc.prctl(24, 0, 0, 0, 0), libc.prctl(8, 1))
commands = ['su -c id', 'mount -t tmpfs x /tmp', 'umount /proc', 'passwd -d root', 'chsh -s /bin/sh']
print(*{subprocess.run(c.split(), capture_output=True, stdin=0).returncode > 0 for c in commands})
print(all('nosuid' in line for line in open('/proc/self/mounts')))
os.system('grep NoNewPrivs /proc/self/status')
None""",
        "(EPERM|EINVAL) (EPERM|EINVAL) EPERM -1 0\nTrue\nTrue\nNoNewPrivs:\t1",
    ),
]

KERNEL = [
    Escape(
        "every call that is refused",
        "asked = ('clone', 'socket', 'socketpair', 'ioctl', 'fallocate')\n"
        "print(*sorted({call(name, 0, 0, 0, 0, 0) for name in NUMBERS if name not in asked}))",
        "ENOSYS EPERM",
    ),
    Escape(
        "typing into a terminal",
        "print(*{call('ioctl', fd, r, 0) for fd in (0, 1, 3) for r in (0x5412, 0x541C)})",
        "EPERM",
    ),
    Escape(
        "raising its own limits",
        """
import resource
names = [n for n in dir(resource) if n.startswith('RLIMIT_') and resource.getrlimit(getattr(resource, n))[1] >= 0]
def higher(which):
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (hard + 1, hard + 1))
print(*{tried(higher, getattr(resource, name)) for name in names}, len(names) > 8)
print(tried(os.nice, -1), tried(os.sched_setscheduler, 0, 1, os.sched_param(1)))""",
        "ValueError True\nEPERM EPERM",
    ),
]


@pytest.mark.parametrize("escape", [*FILES, *NETWORK, *PROCESSES, *KERNEL], ids=lambda escape: escape.name)
def test_contained(attempt: Any, escape: Escape) -> None:
    program = os.stat(bubblewrap.executable())
    outcome = attempt(escape.code)
    assert outcome.result.fault is None
    assert outcome.after == "kept"
    assert re.fullmatch(escape.contained, outcome.result.text)
    assert attempt.host.secret not in outcome.result.text
    now = os.stat(bubblewrap.executable())
    assert (now.st_mode, now.st_mtime, now.st_size) == (program.st_mode, program.st_mtime, program.st_size)


@pytest.mark.parametrize("escape", [e for e in [*FILES, *NETWORK] if e.real], ids=lambda escape: escape.name)
def test_real(unconfined: Callable[[str], ToolResult], host: Any, escape: Escape) -> None:
    text = unconfined(escape.code).text
    assert host.secret in text or "True" in text or host.touched()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the calls of i386 and x32")
def test_calls_by_another_door(attempt: Any) -> None:
    """x32's are refused; those of i386, whose numbers mean other calls, end the process."""
    assert attempt("print(call(0x40000000 | 39), call(0x40000000 | 101))").result.text == "ENOSYS ENOSYS"
    interrupt = """
import mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex('b814000000cd80c3'))  # mov eax, 20 (getpid of i386); int 0x80; ret
print('so far', flush=True)
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))())"""
    outcome = attempt(interrupt)
    assert outcome.result == ToolResult(f"so far\n{DIED}", fault=Fault.RAISED)
    assert outcome.after == "lost"


def test_an_interpreter_leaves_nothing_to_the_next(bubblewrap_sandbox: Sandbox) -> None:
    """Neither files that Python or the linker would run, nor variables, nor modules."""
    code = """
import os, sys, builtins, random, numpy
for path in ('sitecustomize.py', 'usercustomize.py', '.pythonrc.py', 'numpy.py', 'matplotlibrc', '.local/x', 'e.so'):
    os.makedirs(os.path.dirname(f'/tmp/{path}'), exist_ok=True)
    open(f'/tmp/{path}', 'w').write('raise SystemExit')
os.environ.update(LD_PRELOAD='/tmp/e.so', PYTHONSTARTUP='/tmp/.pythonrc.py', PYTHONPATH='/tmp')
builtins.left = numpy.left = 1
sys.modules['left'] = 1
random.seed(5)"""
    shown = {Path(path).parts[2] for path in bubblewrap.seen() if path.startswith("/tmp/")}  # this very Python
    look = f"import os, sys, numpy, random\nprint([name for name in os.listdir('/tmp') if name not in {shown!r}], "
    look += "sorted(os.environ), 'left' in dir(__builtins__), "
    look += "'left' in sys.modules, hasattr(numpy, 'left'), random.random())"

    async def story() -> tuple[str, str, str]:
        texts = []
        for codes in ([look], [code, "1"], [look]):
            interpreter = bubblewrap_sandbox.interpreter()
            texts.append([(await interpreter.run(code, 20)).text for code in codes][-1])
            interpreter.close()
        return tuple(texts)

    before, _, after = asyncio.run(story())
    assert before.startswith("[] ['HOME', ")
    assert after == before


def test_a_rollout_does_not_wait_for_the_bomb_of_another(attempt: Any) -> None:
    """The template is not kept busy: another interpreter starts while one forks, and ends many processes."""

    async def story() -> float:
        bomb, other = attempt.sandbox.interpreter(), attempt.sandbox.interpreter()
        await bomb.run("x = 1", 20)
        forks = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
        call = asyncio.create_task(bomb.run(forks, 1.0))
        await asyncio.sleep(0.2)
        begin = time.monotonic()
        assert (await other.run("6 * 7", 20)).text == "42"
        seconds = time.monotonic() - begin
        assert (await call).fault == Fault.TIMEOUT
        bomb.close()
        other.close()
        return seconds

    assert asyncio.run(story()) < 2.0  # 0.03 on an idle machine; the forks take all cores


def test_many_starts_leave_nothing_in_the_template(bubblewrap_sandbox: Sandbox) -> None:
    template = bubblewrap_sandbox._template
    assert template is not None

    def held() -> tuple[int, str]:
        children = Path(f"/proc/{template.pid}/task/{template.pid}/children").read_text()
        return len(os.listdir(f"/proc/{template.pid}/fd")), children

    async def start(code: str) -> None:
        interpreter = bubblewrap_sandbox.interpreter()
        await interpreter.run(code, 20)
        interpreter.close()

    def settled() -> tuple[int, str]:
        deadline = time.monotonic() + 5
        while held()[1] and time.monotonic() < deadline:
            time.sleep(0.01)
        return held()

    before = settled()
    for _ in range(5):
        codes = ("1", "import os; os._exit(0)", "import os; os.system('sleep 60 &')", "import os; os.kill(-1, 9)")
        asyncio.run(asyncio.wait_for(together(*map(start, codes)), 20))
    assert settled() == before
    assert before[1] == ""


def test_the_template_collects_the_dead_itself(bubblewrap_sandbox: Sandbox) -> None:
    """A container's first process may never do it, and then every rollout would leave two processes."""

    def interpreters(parent: int) -> list[str]:
        pids = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return re.findall(r"NSpid:.*\t3\n", "".join(Path(f"/proc/{pid}/status").read_text() for pid in pids))

    async def story() -> bool:
        interpreter = bubblewrap_sandbox.interpreter()
        await interpreter.run("1", 20)
        assert bubblewrap_sandbox._template is not None
        deadline = time.monotonic() + 5
        while not (found := interpreters(bubblewrap_sandbox._template.pid)) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        interpreter.close()
        return bool(found)

    assert asyncio.run(story())


async def together(*stories: Coroutine[Any, Any, None]) -> None:
    await asyncio.gather(*stories)


def test_a_fork_of_the_trainer_does_not_keep_an_interpreter(bubblewrap_sandbox: Sandbox) -> None:
    async def story() -> tuple[int, str]:
        interpreter = bubblewrap_sandbox.interpreter()
        await interpreter.run("import subprocess; subprocess.Popen(['sleep', '62.5'])", 20)
        fork = os.fork()
        if fork == 0:
            time.sleep(60)
            os._exit(0)
        interpreter.close()
        template = bubblewrap_sandbox._template
        assert template is not None
        children = Path(f"/proc/{template.pid}/task/{template.pid}/children")
        deadline = time.monotonic() + 5
        while children.read_text() and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        return fork, children.read_text()

    fork, left = asyncio.run(story())
    os.kill(fork, 9)
    os.waitpid(fork, 0)
    assert left == ""
