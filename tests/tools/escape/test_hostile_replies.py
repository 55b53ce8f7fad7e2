"""What the policy's code may do to the channel that its interpreter answers on, to its output, and to the loop itself.

`attempt` (conftest.py) asserts after each that nothing of the host was touched, that no process or
descriptor is left, and that the sandbox goes on. In it `send` writes to the channel, and the call is number 2.
"""

import asyncio
import io
import re
import struct
import time
import zlib
from dataclasses import dataclass
from typing import Any

import PIL.Image
import pytest

from axpo.tools.base import ToolResult
from axpo.tools.sandbox import DIED, Sandbox

NOLEFT_OUTG, LOST = "(no output)", "All variables are lost."


@dataclass(frozen=True)
class Forgery:
    """`text` is the end of what the policy sees, `after` what may become of the variables."""

    name: str
    code: str
    text: str = DIED
    after: str = "lost"
    timeout: float = 5.0


REPLIES = [
    Forgery("no number", r"send(b'nonsense\n'); time.sleep(9)"),
    Forgery("an empty line", r"send(b'\n'); time.sleep(9)"),
    Forgery(
        "a pickle",
        "import pickle\nclass C:\n    def __reduce__(self): return os.system, ('touch ' + TMP + '2',)\n"
        r"send(pickle.dumps(C()) + b'\n'); time.sleep(9)",
    ),
    Forgery("one number", r"send(b'2\n'); time.sleep(9)"),
    Forgery("a fraction", r"send(b'2 0.0\n'); time.sleep(9)"),
    Forgery("not a number", r"send(b'2 nan\n'); time.sleep(9)"),
    Forgery("other digits", r"send('٢ ٠ \n'.encode()); time.sleep(9)"),
    Forgery("a negative length", r"send(b'2 -1\n'); time.sleep(9)"),
    Forgery("a negative size", r"send(b'2 0 -5\n'); time.sleep(9)"),
    Forgery("too long a report", r"send(b'2 99999999999\n'); time.sleep(9)"),
    Forgery("a gigantic number", r"send(b'2 1' + b'0' * 5000 + b'\n'); time.sleep(9)"),
    Forgery("a large number", r"send(b'2 1' + b'0' * 4000 + b'\n'); time.sleep(9)"),
    Forgery("a gigantic number of the call", r"send(b'1' * 4000 + b' 0\n2 0\n')", NOLEFT_OUTG, "kept|lost"),
    Forgery("too many pictures", r"send(b'2 0' + b' 1' * 5 + b'\n'); time.sleep(9)"),
    Forgery("very many pictures", r"send(b'2 0' + b' 1' * 30000 + b'\n'); time.sleep(9)"),
    Forgery("too large a picture", r"send(b'2 0 8388609\n'); time.sleep(9)"),
    Forgery("a line without end", "while True: send(b'2 ' * 4096)"),
    Forgery("a line of spaces without end", "while True: send(b' ' * 4096)"),
    Forgery("half a reply", r"send(b'2 100\nhalf'); time.sleep(9)", LOST, timeout=0.3),
    Forgery("half a reply and the end", r"send(b'2 100\nhalf'); os._exit(0)"),
    Forgery("replies to other calls without end", r"while True: send(b'0 0\n' * 4096)"),
    Forgery("replies to other calls, slowly", "while True:\n    send(b'0 0\\n'); time.sleep(0.001)"),
    Forgery("replies to other calls, large", r"while True: send(b'0 8000 8388608\n' + bytes(8396608))"),
    Forgery("a few replies to other calls", r"send(b'0 0\n7 3\nabc-5 0\n')", NOLEFT_OUTG, "kept"),
    Forgery("its own, too early", r"send(b'2 0\n')", NOLEFT_OUTG, "kept"),
    Forgery(
        "its own, too early, and the next one's",
        r"send(b'2 0\n3 0\n'); time.sleep(0.1)",
        NOLEFT_OUTG,
        r"kept|lost|\(no output\)",
    ),
    Forgery("a report that is no text", r"send(b'2 4\n\xff\x00\x1b[')", "��\x00\x1b[".replace("��", "�"), "kept"),
    Forgery(
        "nonsense in the next call",
        "threading.Timer(0.005, send, [b'nonsense\\n']).start()",
        NOLEFT_OUTG,
        f"(kept|lost)?\n?({DIED})?",
    ),
    Forgery(
        "a flood between calls",
        r"threading.Thread(target=lambda: send(b'x' * (64 << 20)), daemon=True).start()",
        NOLEFT_OUTG,
        rf"(kept|lost)?\n?({re.escape(DIED)})?",
    ),
]
CHANNEL = [
    Forgery("closing all descriptors", "os.closerange(0, 256)", after="lost"),
    Forgery("closing the output", "os.close(1)\nos.close(2)", NOLEFT_OUTG, "(?s).*"),
    Forgery("closing the channel", "os.close(3)"),
    Forgery("another channel", "os.dup2(os.open('/dev/null', 2), 3)", LOST, timeout=0.3),
    Forgery("ending the channel", "socket.socket(fileno=os.dup(3)).shutdown(2)"),
    Forgery(
        "ending one side of the channel",
        "socket.socket(fileno=os.dup(3)).shutdown(0)",
        NOLEFT_OUTG,
        f"lost|(?s:.*){DIED}",
    ),
    Forgery("the output as channel", "os.dup2(1, 3)", LOST, timeout=0.3),
    Forgery("the channel as output", "print('x')\nsys.stdout.flush()\nos.dup2(3, 1)\nprint('so far', flush=True)"),
    Forgery("an impatient channel", "os.set_blocking(3, False)", NOLEFT_OUTG, f"kept|lost|(?s:.*){DIED}"),
    Forgery(
        "descriptors over the channel",
        "ours = socket.socket(fileno=os.dup(3))\n"
        r"for n in range(9): socket.send_fds(ours, [b'0 0\n'], [0, 1, os.open('/', 0), ours.fileno()])",
        NOLEFT_OUTG,
        "kept",
    ),
    Forgery("urgent data", "socket.socket(fileno=os.dup(3)).send(b'x', socket.MSG_OOB)", "1", "kept"),
    Forgery(
        "leftover descriptors",
        "import stat\nfor fd in range(3, 70000):\n    kind = tried(os.fstat, fd)\n    if kind != 'EBADF':\n"
        "        print(fd, stat.S_ISSOCK(kind.st_mode), tried(socket.socket(fileno=os.dup(fd)).getpeername))\n"
        "print(*(stat.S_IFMT(os.fstat(fd).st_mode) == kind for fd, kind in ((0, stat.S_IFCHR), (1, stat.S_IFREG))))",
        "3 True \nTrue True",
        "kept",
    ),
    Forgery("a program that was run has no channel", "os.system('ls /proc/self/fd | wc -l')\nNone", "4", "kept"),
]
OUTPUT_FILE = [
    Forgery("no text", r"_ = os.write(1, b'a\xff\x00\x1b[31m\r\x07\xed\xa0\x80\n')", "a�\x00\x1b[31m\r\x07���", "kept"),
    Forgery("lone surrogates", r"_ = sys.stdout.reconfigure(errors='surrogatepass'); print('\ud800x')", "���x", "kept"),
    Forgery("lone surrogates, strictly", r"print('\ud800')", "surrogates not allowed", "kept"),
    Forgery("one long line", "print('x' * 10**6, end='')", "x" * 2000, "kept"),
    Forgery("a hole", "os.ftruncate(1, 1 << 20)", "\0" * 2000, "kept"),
    Forgery("another place", "os.lseek(1, 1 << 19, 0)\nprint('there')", "there", "kept"),
    Forgery("another place in the next call", "_ = os.lseek(1, 1 << 19, 0)", NOLEFT_OUTG, "kept"),
    Forgery(
        "unbuffered input and output",
        "import fcntl\nprint('x', flush=True)\n_ = fcntl.fcntl(1, fcntl.F_SETFL, os.O_DIRECT)",
        "x",
        "(?s).*",
    ),
    Forgery(
        "from the start in the next call",
        "import fcntl\n_ = fcntl.fcntl(1, fcntl.F_SETFL, 0)\n_ = os.write(1, b'x' * 9)",
        "x" * 9,
        "\0*kept",
    ),
    Forgery(
        "a map of it",
        "import mmap\nos.ftruncate(1, 4096)\nm = mmap.mmap(1, 4096)\nm[:5] = b'hello'\nos.ftruncate(1, 5)",
        "hello",
        "kept",
    ),
    Forgery("locked", "import fcntl\nfcntl.flock(1, 2)\nfcntl.lockf(1, 2)\nprint('held')", "held", "kept"),
]
LOOP = [
    Forgery(
        "functions replaced",
        "import builtins, linecache, traceback, io, posix\nno = lambda *a, **k: 1 / 0\nsys.stdout = sys.stderr = None\n"
        "for m, names in ((os, ('write', 'getpid', '_exit', 'fork')), (builtins, ('print', 'compile', 'exec')),\n"
        "                 (linecache, ('getline', 'cache')), (traceback, ('format_exception',)), (io, ('BytesIO',))):\n"
        "    for name in names: setattr(m, name, no)\n1",
        "",
        "(?s).*",
    ),
    Forgery(
        "import hooks",
        "class Hook:\n    def find_spec(self, *_): os.kill(os.getpid(), 9)\nsys.meta_path.insert(0, Hook())\n"
        "sys.modules.clear()",
        "",
        "(?s).*",
    ),
    Forgery("no modules", "sys.modules.clear()\nsys.path.clear()", "", "(?s).*"),
    Forgery(
        "no built-ins",
        "__builtins__.__dict__.clear() if hasattr(__builtins__, '__dict__') else __builtins__.clear()",
        "",
        "(?s).*",
    ),
    Forgery("a trace", "def trace(*_): 1 / 0\nsys.settrace(trace)\nlen(str(5))", "", "(?s).*"),
    Forgery("a profile", "def trace(*_): os._exit(3)\nsys.setprofile(trace)", DIED, "lost"),
    Forgery("an audit hook", "def hook(*_): raise RuntimeError\nsys.addaudithook(hook)", "", "(?s).*"),
    Forgery("recursion", "def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded", "kept"),
    Forgery("no recursion", "sys.setrecursionlimit(25)", "", "(?s).*"),
    Forgery(
        "no memory in the loop",
        "import resource\nx = bytearray(50 << 20)\n"
        "_ = resource.setrlimit(resource.RLIMIT_AS, (int(open('/proc/self/statm').read().split()[0]) * 4096,) * 2)",
        NOLEFT_OUTG,
        "(?s).*",
    ),
    Forgery(
        "no files in the loop",
        "import resource\n_ = resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))",
        NOLEFT_OUTG,
        "(?s).*",
    ),
    Forgery(
        "its own end",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True: pass",
        DIED,
        "lost",
    ),
    Forgery(
        "the loop's own variables",
        "frame = sys._getframe()\nwhile frame := frame.f_back: frame.f_globals.update(reply=None, write=None)",
        DIED,
        "lost",
    ),
    Forgery("a number", "1 << (1 << 40)", "(Memory|Overflow)Error", "kept"),
    Forgery("a class", "class C(type): __repr__ = lambda s: s.x\nC('D', (), {})", "has no attribute 'x'", "kept"),
    Forgery(
        "a text that is none",
        "class E(Exception):\n    def __str__(self): raise SystemExit\n    __repr__ = __str__\nraise E",
        "E: <exception str() failed>",
        "kept",
    ),
    Forgery(
        "a text that lasts", "class E(Exception):\n    def __str__(self): time.sleep(60)\nraise E", LOST, "lost", 0.3
    ),
    Forgery("a text that exits", "class E(Exception):\n    def __str__(self): os._exit(0)\nraise E", DIED, "lost"),
    Forgery("a long text", "raise ValueError('x' * 10**7)", "x" * 500, "kept"),
    Forgery("a text of surrogates", r"raise ValueError('\ud800')", "ValueError: ?", "kept"),
    Forgery(
        "causes in a ring",
        "a, b = ValueError(), KeyError()\na.__cause__, b.__cause__ = b, a\nraise a",
        "ValueError",
        "kept",
    ),
    Forgery(
        "a deep group", "e = ValueError()\nfor _ in range(5000): e = ExceptionGroup('g', [e])\nraise e", "", "kept"
    ),
    Forgery(
        "a class of errors that lies",
        "class E(BaseException):\n"
        "    __class__ = __traceback__ = __cause__ = __context__ = property(lambda s: 1 / 0)\nraise E",
        "",
        "kept",
    ),
    Forgery("an interrupt", "raise KeyboardInterrupt", "KeyboardInterrupt", "kept"),
    Forgery(
        "leaving with an odd code",
        "class C:\n    def __bool__(self): raise SystemExit\nsys.exit(C())",
        "",
        "(?s)kept|lost",
    ),
    Forgery(
        "a value that forks",
        "class C:\n    def __repr__(self): return str(os.fork() and 'parent')\nC()",
        "(parent|0)",
        "(0\n|parent\n)*kept(0|\n)*",
    ),
]


@pytest.mark.parametrize("forgery", [*REPLIES, *CHANNEL, *OUTPUT_FILE, *LOOP], ids=lambda forgery: forgery.name)
def test_the_protocol_survives(attempt: Any, forgery: Forgery) -> None:
    outcome = attempt(forgery.code, forgery.timeout, forgery.after)
    assert outcome.result.text.rstrip().endswith(forgery.text) or re.search(forgery.text + "$", outcome.result.text)
    assert outcome.cpu < 0.5  # of the trainer, which serves other rollouts too
    assert outcome.result.images == ()


def test_what_an_interpreter_sends_unasked_takes_little_memory(bubblewrap_sandbox: Sandbox) -> None:
    async def story() -> int:
        interpreter = bubblewrap_sandbox.interpreter()
        flood = "import os, threading\ndef send():\n    while True: os.write(3, bytes(1 << 20))\n"
        await interpreter.run(f"{flood}threading.Timer(0.1, send).start()", 5)
        await asyncio.sleep(0.3)
        assert interpreter._running is not None
        held = len(interpreter._running.reader._buffer)
        interpreter.close()
        return held

    assert 0 < asyncio.run(story()) < 1 << 20


def test_what_an_interpreter_inherits_of_the_template_opens_nothing(attempt: Any) -> None:
    look = """
import gc
frame, found = sys._getframe(), {}
while frame := frame.f_back:
    found.update(frame.f_globals, **frame.f_locals)
print(*{tried(os.fstat, fd) for fd in (found['control'].fileno(), *found['running'])})
print([name for name in sys.modules if name.startswith('axpo')])"""
    assert attempt(look).result.text == "EBADF\n[]"


# Pictures -------------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes, colour: int = 2, depth: int = 8, rows: bytes | None = None) -> bytes:
    """By hand: RGB, all black, with more chunks before its pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    rows = bytes(height * (1 + width * 3)) if rows is None else rows
    parts = (head, *more, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


LEFT_OUT = "[4 pictures left out: broken, of more than 1048576 pixels, or a side over 100 times the other]"
BOMBS = {
    "many pixels": (png(20_000, 20_000, rows=bytes(1_000_000)), LEFT_OUT),
    "no pixels": (png(0, 10), LEFT_OUT),
    "a side that overflows": (png((1 << 31) - 1, 3, rows=bytes(100)), LEFT_OUT),
    "a few pixels more": (png(1100, 1100), LEFT_OUT),
    "thin": (png(101, 1), LEFT_OUT),
    "tall": (png(1, 1_000_000), LEFT_OUT),
    "pixels that are missing": (png(1000, 1000, rows=bytes(10)), LEFT_OUT),
    "pixels that unpack to more": (png(10, 10, rows=bytes(200 << 20)), ""),
    "millions of chunks": (png(8, 8, chunk(b"aaAa") * 690_000), LEFT_OUT),
    "texts that unpack to much": (png(8, 8, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6)))] * 70), ""),
    "a colour profile that unpacks to much": (png(8, 8, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(50 << 20)))), ""),
    "a broken orientation": (png(8, 8, chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff")), ""),
    "frames": (png(8, 8, chunk(b"acTL", struct.pack(">II", 1 << 30, 0)), chunk(b"fcTL", bytes(26))), ""),
    "a chunk without end": (png(8, 8)[:33] + struct.pack(">I", 0xFFFFFFFF) + b"IDAT" + bytes(100), LEFT_OUT),
    "an unknown kind": (png(8, 8, colour=9), LEFT_OUT),
    "another format": (b"GIF89a" + bytes(100), LEFT_OUT),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_picture_that_is_a_bomb(bubblewrap_sandbox: Sandbox, name: str) -> None:
    """Left out, or freed of what is no pixels; in no case is the trainer kept busy."""
    data, text = BOMBS[name]
    assert len(data) < 8 << 20
    code = (
        "import os, zlib\nmessage = b'1 0' + b' %d' % len(image_0) * 4 + b'\\n' + image_0 * 4\n"
        "while message: message = message[os.write(3, message):]"
    ).replace("image_0", "data")
    packed = zlib.compress(data)

    async def story() -> tuple[ToolResult, float, str]:
        interpreter = bubblewrap_sandbox.interpreter()
        worked = time.process_time()
        result = await interpreter.run(f"import zlib\ndata = zlib.decompress({packed!r})\n{code}", 20)
        worked = time.process_time() - worked
        after = await interpreter.run("6 * 7", 20)
        interpreter.close()
        return result, worked, after.text

    result, worked, after = asyncio.run(story())
    assert result.text == text
    assert after == "42"
    assert len(result.images) == (0 if text else 4)
    for image in result.images:
        opened = PIL.Image.open(io.BytesIO(image))
        assert opened.convert("RGB").getextrema() == ((0, 0),) * 3
        assert not opened.info
    assert worked < 2.0
