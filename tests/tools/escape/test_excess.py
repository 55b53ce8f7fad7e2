"""Code that takes more than it is given, or that stays longer than its call. As in tests/tools/test_escape.py.

Limits are small, so that a failure would not take the machine down.
"""

import re
import time
from dataclasses import dataclass
from typing import Any

import pytest

from axpo.tools.base import Fault
from axpo.tools.sandbox import DIED, OUTPUT


@dataclass(frozen=True)
class Excess:
    """Code that takes or stays. `text` is a pattern of what the policy sees, `after` what becomes of the variables."""

    name: str
    code: str
    text: str = r"\(no output\)"
    after: str = "kept"
    timeout: float = 10.0


STOPPED = r"Stopped after [0-9.]+ s\. All variables are lost\."
DEAD = re.escape(DIED)
TAKING = [
    Excess("memory", "x = bytearray(1 << 40)", r"(?s).*MemoryError"),
    Excess(
        "memory in pieces",
        "x = []\nwhile True: x.append(bytearray(4 << 20))",
        r"(?s).*MemoryError",
    ),
    Excess(
        "memory that no process has mapped",
        """
print(*{call(n, 0, 1 << 20, 0o1600) for n in ('shmget', 'semget', 'msgget')}, tried(os.memfd_create, 'x'),
      call('memfd_secret', 0), libc.mq_open(b'/q', 66, 384, None))
try: os.setxattr('/tmp', 'user.x', bytes(60000))
except OSError as error: print(error.errno)""",
        "EPERM EPERM EPERM -1\n1",
    ),
    Excess(
        "files of memory",
        """
try:
    for n in range(9): open(f'/tmp/{n}', 'wb').write(bytes(1 << 20))
except OSError as error: print(error.strerror, n, sum(os.stat(f'/tmp/{n}').st_blocks * 512 for n in range(9)
                               if os.path.exists(f'/tmp/{n}')) <= 4 << 20)
for n in range(9): tried(os.unlink, f'/tmp/{n}')""",
        "No space left on device [0-4] True",
    ),
    Excess(
        "a file without bound", "f = open('/tmp/f', 'wb')\nwhile True: f.write(bytes(1 << 16))", r"(?s).*File too large"
    ),
    Excess(
        "shared memory beyond its file system",
        """
import mmap
maps = []
for n in range(9):
    f = open(f'/dev/shm/m{n}', 'wb+'); f.truncate(1 << 20); maps.append(mmap.mmap(f.fileno(), 1 << 20))
    maps[-1][:] = bytes(1 << 20)""",
        DEAD,
        "lost",
    ),
    Excess(
        "numbers of files",
        """
try:
    for n in range(10**6): open(f'/tmp/f{n}', 'w')
except OSError as error: print(error.strerror, n < 200)""",
        "No space left on device True",
    ),
    Excess(
        "deep folders",
        """
os.chdir('/tmp')
try:
    for n in range(10**6): os.mkdir('d'), os.chdir('d')
except OSError as error: print(error.strerror, n < 200)""",
        "No space left on device True",
    ),
    Excess(
        "descriptors and watches",
        """
found = []
try:
    while True: found.append(os.open('/dev/null', 0))
except OSError as error: print(error.strerror, len(found) < 64)
for fd in found: os.close(fd)
print(*(call(name, 0) for name in ('inotify_init1', 'fanotify_init')))""",
        "Too many open files True\nEPERM EPERM",
    ),
    Excess(
        "the host's disk, beyond the limit on a file",
        """
import fcntl
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
found = [(libc.fallocate(1, mode, 0, 32 << 20), errno.errorcode[ctypes.get_errno()])[1] for mode in (0, 1, 16, 17, 3)]
reserve = struct.pack('hhqqii16x', 0, 0, 0, 32 << 20, 0, 0)
print(*found, *(tried(fcntl.ioctl, 1, request, reserve) for request in (0x40305828, 0x4030582A)))
print(tried(os.ftruncate, 1, 32 << 20), tried(os.truncate, '/proc/self/fd/1', 32 << 20))""",
        "EFBIG ENOTSUP ENOTSUP ENOTSUP ENOTSUP EPERM EPERM\n(EFBIG|EACCES) (EFBIG|EACCES)",
    ),
    Excess("output without end", "while True: os.write(1, b'x' * 65536)", r"(?s)x{2000}\n\[\.\.\..*File too large"),
    Excess("output from children without end", "os.system('yes')\nos.ftruncate(1, 1)", r"y"),
    Excess(
        "threads",
        """
threads = []
try:
    while True:
        thread = threading.Thread(target=time.sleep, args=(60,), daemon=True); thread.start(); threads.append(thread)
except RuntimeError as error: print(error, len(threads) < 24)""",
        "can't start new thread True",
    ),
    Excess(
        "processes",
        """
children = []
try:
    while True:
        child = os.fork()
        if not child: os.setsid(); time.sleep(60)
        children.append(child)
except BlockingIOError: print(15 < len(children) < 24)""",
        "True",
    ),
    Excess(
        "a fork bomb",
        "while True:\n    try: os.fork()\n    except OSError: pass",
        STOPPED,
        "lost",
        0.5,
    ),
    Excess("a fork bomb of a shell", "os.system(':(){ :|:& };:')", "(?s).*", "kept|lost", 0.5),
    Excess(
        "a deep recursion in C",
        "import _sre\neval('(' * 90000 + ')' * 90000)",
        "(?s).*(Error|too many nested.*)",
        "kept",
    ),
    Excess(
        "a deep recursion",
        "sys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**5): x = [x]\nrepr(x)",
        DEAD,
        "lost",
    ),
]
STAYING = [
    Excess("a loop", "while True: pass", STOPPED, "lost", 0.3),
    Excess("a sleep in C", "libc.sleep(60)", STOPPED, "lost", 0.3),
    Excess(
        "a number too large", "print(len(str(10**5000)))\n9**9**9", r"(?s).*(ValueError|Stopped).*", "kept|lost", 0.3
    ),
    Excess(
        "signals ignored",
        """
for s in signal.valid_signals(): tried(signal.signal, s, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
while True:
    try: time.sleep(1)
    except BaseException: pass""",
        STOPPED,
        "lost",
        0.3,
    ),
    Excess("being stopped", "os.kill(os.getpid(), signal.SIGSTOP)", STOPPED, "lost", 0.3),
    Excess(
        "a child in a session of its own that holds the output",
        """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)
        while True: time.sleep(0.01); os.write(1, b'here ')
    os._exit(0)
os.wait()[1]""",
        r"(here |0\n)*(here|0)? ?",
        "(here )*(kept|lost)(here )*",
    ),
    Excess(
        "a thread that prints in the next call",
        "def later():\n    while True: time.sleep(0.001); os.write(1, b'.')\nthreading.Thread(target=later).start()",
        r"[.]*|\(no output\)",
        "[.]*kept[.]*",
    ),
    Excess("leaving in a thread", "threading.Thread(target=os._exit, args=(0,)).start(); time.sleep(9)", DEAD, "lost"),
    Excess("leaving a thread", "t = threading.Thread(target=sys.exit, args=(3,)); t.start(); t.join()"),
    Excess(
        "a pool of processes",
        "import multiprocessing\npool = multiprocessing.Pool(2)\npool.map(abs, [-1, -2])",
        r"\[1, 2\]",
    ),
    Excess("exit hooks", "import atexit\natexit.register(time.sleep, 60)\nos.register_at_fork(before=lambda: 1 / 0)"),
    Excess("a finaliser", "class C:\n    def __del__(self): time.sleep(60)\nc = C()"),
    Excess(
        "an alarm", "signal.signal(14, lambda *_: 1 / 0)\nsignal.setitimer(0, 0.001)\ntime.sleep(1)", "(?s).*ZeroDiv.*"
    ),
    Excess(
        "an alarm between calls",
        "signal.signal(14, lambda *_: 1 / 0)\n_ = signal.setitimer(0, 0.003, 0.003)",
        "(?s).*",
        rf"(?s)kept|lost|.*ZeroDiv.*|{DEAD}",
    ),
    Excess("killing all that can be", "os.kill(-1, 9)\ntime.sleep(0.2)", rf"{DEAD}|\(no output\)", "kept|lost"),
    Excess("killing its group", "os.kill(0, 9)", DEAD, "lost"),
    Excess(
        "killing bubblewrap and the placeholder",
        "tried(os.kill, 1, 9), tried(os.kill, 1, 19)\ntried(os.kill, 2, 9)\ntime.sleep(0.2)",
        rf"{DEAD}|\(no output\)",
        "kept|lost",
    ),
    Excess(
        # Where the interpreter is of the same user as pid 1, as with trainers that are not root's: make it forget that
        # it is to die with its parent, prctl(PR_SET_PDEATHSIG, 0), and pause for ever.
        "making bubblewrap outlive the sandbox",
        """
def attack():
    place = int(open('/proc/1/syscall').read().split()[-1], 16)
    with open('/proc/1/mem', 'r+b', buffering=0) as memory:
        memory.seek(place)
        memory.write(bytes.fromhex('b89d000000bf0100000031f631d24d31d24d31c00f05b8220000000f05ebf7'))
    return 'written'
outcome = tried(attack)
for _ in range(5): os.system('(sleep 0.01 &)')
outcome""",
        "'(EACCES|EROFS)'",
    ),
]


@pytest.mark.parametrize("excess", [*TAKING, *STAYING], ids=lambda excess: excess.name)
def test_bounded(attempt: Any, excess: Excess) -> None:
    begin = time.monotonic()
    outcome = attempt(excess.code, excess.timeout, excess.after)
    assert re.fullmatch(excess.text, outcome.result.text)
    assert len(outcome.result.text) < OUTPUT + 2500
    assert outcome.result.fault == (Fault.TIMEOUT if "Stopped" in outcome.result.text else outcome.result.fault)
    assert outcome.disk <= attempt.sandbox.limits.file
    assert outcome.processes <= attempt.sandbox.limits.processes + 2  # bubblewrap's first process, and the placeholder
    assert outcome.cpu < 1.0
    assert time.monotonic() - begin < excess.timeout + 10
