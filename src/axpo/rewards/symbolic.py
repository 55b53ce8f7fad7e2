"""Equality of two mathematical expressions, decided by math-verify in a child process.

An answer is whatever the policy wrote, and simplifying `9^{9^{9^9}}` never ends. math-verify's own limit is a
signal handler: it needs the main thread and does not interrupt a long computation in C. So the comparison runs in a
child that the kernel ends, and that is started again for the next question.
"""

import atexit
import logging
import os
import signal
import subprocess
import sys
import threading
from typing import TextIO

CPU_SECONDS = 3.0  # of one comparison; CPU time, so that a busy machine decides as an idle one
MEMORY_BYTES = 1 << 30  # address space of the child
LONGEST = 500  # characters: a longer expression is not compared

_lock = threading.Lock()
_worker: "subprocess.Popen[str] | None" = None


def equal_expressions(gold: str, answer: str) -> bool:
    """Whether two LaTeX expressions are equal. An answer that cannot be compared within the limits is not.

    Safe to call from any thread; one comparison runs at a time. Raises RuntimeError if the child cannot be started,
    which is a fault of the system and says nothing about the answer.
    """
    global _worker
    if max(len(gold), len(answer)) > LONGEST:
        return False
    with _lock:
        if _worker is None or _worker.poll() is not None:
            _worker = _start()
        assert _worker.stdin is not None
        assert _worker.stdout is not None
        try:
            _worker.stdin.write(_line(gold) + _line(answer))
            _worker.stdin.flush()
            reply = _worker.stdout.readline()
        except BrokenPipeError:
            reply = ""
        except BaseException:  # an interrupt: a reply that nobody took would answer the next question
            _stop()
            raise
        if not reply:
            _stop()
        return reply == "equal\n"


def _line(text: str) -> str:
    return " ".join(text.split()) + "\n"


def _start() -> "subprocess.Popen[str]":
    # Its own session: Ctrl-C in the terminal is for the trainer. -P: this folder is not a place to import from.
    try:
        worker = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise RuntimeError(f"the process that compares expressions did not start: {error}") from error
    assert worker.stdout is not None
    if worker.stdout.readline() != "ready\n":
        worker.communicate()
        raise RuntimeError(f"the process that compares expressions did not start (exit code {worker.returncode})")
    return worker


def _stop() -> None:
    global _worker
    if _worker is not None:
        _worker.kill()
        _worker.communicate()
        _worker = None


atexit.register(_stop)


def _serve(replies: TextIO) -> None:
    import resource

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    # LaTeX only: math-verify reads plain expressions with `eval`.
    config = [LatexExtractionConfig()]
    replies.write("ready\n")
    replies.flush()
    while gold := sys.stdin.readline():
        answer = sys.stdin.readline()
        # The default action of SIGPROF ends the process, whatever it is doing.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        parsed = [parse(f"${text.strip()}$", config, parsing_timeout=None) for text in (gold, answer)]
        equal = verify(*parsed, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write("equal\n" if equal else "different\n")
        replies.flush()


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)  # whatever a library prints goes to stderr, never into the protocol
        _serve(channel)
