"""Starts the processes of a training on this machine: the same command again, once for each."""

import atexit
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import IO, Any

from axpo.config import Config

LOST = 4  # how a process ends that finds another one gone
TOLD = 5  # how one ends whose error the first one tells
GRACE = 30.0  # seconds that the others have to end by themselves once one has failed
_LIFELINE = "AXPO_LIFELINE"  # names the pipe that closes when the process that started this one has ended


def starts_others(config: Config) -> bool:
    """Whether this process is to start those that train, because nobody else has."""
    return config.parallel.processes > 1 and "RANK" not in os.environ


def start(processes: int) -> int:
    """Run this very command in so many processes and wait for them; returns the exit code of the first.

    Ctrl-C reaches each of them once. They end when this process does, however it does. Where one fails without having
    been able to tell the first one how, what it wrote last is shown.
    """
    read, write = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        said = [open(os.path.join(folder, str(rank)), "w+b") for rank in range(processes)]  # noqa: SIM115
        port = free_port()
        running = [_process(rank, processes, port, read, said[rank]) for rank in range(processes)]
        os.close(read)
        try:
            with _passed_on(running):
                failed = _first_failed(running)
                _end(running)
            code = running[0].returncode
            if failed is not None and failed > 0 and running[failed].returncode != TOLD:
                said[failed].seek(0)
                sys.stderr.write(said[failed].read().decode(errors="replace"))
                sys.stderr.write(f"error: process {failed} has ended with code {running[failed].returncode}\n")
            return 0 if failed is None else max(code, 1)
        finally:
            os.close(write)
            for file in said:
                file.close()


def end_with_parent() -> None:
    """End this process when the one that started it has ended, if that was axpo."""
    if (lifeline := os.environ.pop(_LIFELINE, None)) is not None:
        end_when_closed(int(lifeline))


def end_when_closed(pipe: int) -> None:
    """Kill this process once the other end of the pipe is closed: when who holds it has ended, however it did."""

    def watch() -> None:
        os.read(pipe, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def end_rank(code: object) -> None:
    """End this process, if it is one of several that train together, without taking the interpreter apart.

    As that is done, a thread that torch.distributed has left aborts the process now and then, when all is written.
    """
    if "RANK" in os.environ:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def _process(rank: int, processes: int, port: int, lifeline: int, said: IO[bytes]) -> "subprocess.Popen[bytes]":
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return subprocess.Popen(
        [sys.executable, "-m", "axpo", *sys.argv[1:]],
        env={**os.environ, **{key: str(value) for key, value in place.items()}, _LIFELINE: str(lifeline)},
        pass_fds=(lifeline,),
        stdout=None if rank == 0 else subprocess.DEVNULL,
        stderr=None if rank == 0 else said,
        start_new_session=True,  # a terminal's Ctrl-C comes from here alone
    )


def free_port(address: str = "127.0.0.1") -> int:
    """A port at an address of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind((address, 0))
        return int(free.getsockname()[1])


@contextmanager
def _passed_on(running: "Sequence[subprocess.Popen[bytes]]") -> Iterator[None]:
    """Ctrl-C and a request to end go to all processes."""

    def send(number: int, frame: FrameType | None) -> None:
        for process in running:
            process.send_signal(number)

    before: dict[int, Any] = {number: signal.signal(number, send) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_failed(running: "Sequence[subprocess.Popen[bytes]]") -> int | None:
    """Wait until one has failed, and return its rank; None where all end well."""
    while True:
        codes = [process.poll() for process in running]
        if failed := [rank for rank, code in enumerate(codes) if code]:
            # The one to blame is not who found it gone.
            return next((rank for rank in failed if codes[rank] != LOST), failed[0])
        if None not in codes:
            return None
        time.sleep(0.05)


def _end(running: "Sequence[subprocess.Popen[bytes]]") -> None:
    """Wait for all to end, and kill who takes too long."""
    deadline = time.monotonic() + GRACE
    for process in running[::-1]:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
