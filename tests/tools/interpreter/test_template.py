import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from axpo.tools.interpreter import template
from axpo.tools.interpreter.template import Limits, Setup, _receive, send

SETUP = Setup(packages=[], environment={"PATH": "/usr/bin:/bin"}, matplotlib="", bubblewrap=[], shown_in_tmp=[])


def test_a_message_is_its_length_and_json() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(ours, {"folder": "ü"}, [])
        assert theirs.recv(100) == b"\x00\x00\x00\x14" + b'{"folder": "\\u00fc"}'


@pytest.mark.parametrize("message", [{}, {"a": 1}, {"text": "x" * 300_000}], ids=["empty", "small", "large"])
def test_messages_come_whole_and_apart(message: dict[str, Any]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=lambda: [send(ours, message, []), send(ours, "next", [])])
        sender.start()
        assert json.loads(_receive(theirs)[0]) == message
        assert json.loads(_receive(theirs)[0]) == "next"
        sender.join()


def test_descriptors_come_with_their_message_and_are_not_inherited() -> None:
    ours, theirs = socket.socketpair()
    first, second = os.pipe(), os.pipe()
    with ours, theirs:
        send(ours, 1, [first[1], second[1], first[0]])
        send(ours, 2, [])
        message, fds = _receive(theirs)
        assert json.loads(message) == 1
        assert _receive(theirs) == (b"2", [])
    os.write(fds[1], b"second")
    assert os.read(second[0], 10) == b"second"
    assert [os.get_inheritable(fd) for fd in fds] == [False] * 3
    for fd in (*fds, *first, *second):
        os.close(fd)


def test_the_end_of_the_socket_is_an_empty_message() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        ours.close()
        assert _receive(theirs) == (b"", [])


def in_a_fork(action: Callable[[], object]) -> object:
    """What the action returns in a process of its own, whose limits it may lower."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, json.dumps(action()).encode())
        except BaseException:
            os.write(write, json.dumps(traceback.format_exc()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return json.loads(text)


def limits_after(limits: Limits, isolated: bool) -> dict[str, list[int]]:
    names = ("CPU", "FSIZE", "NOFILE", "CORE", "AS", "NPROC", "SIGPENDING", "MSGQUEUE", "RTPRIO", "NICE")

    def action() -> dict[str, tuple[int, int]]:
        template._limit(limits, isolated)
        return {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}")) for name in names}

    found = in_a_fork(action)
    assert isinstance(found, dict)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
def test_limits_are_set_for_good() -> None:
    limits = Limits(memory=1 << 30, cpu=7, file=1 << 20, open_files=50, processes=9)
    found = limits_after(limits, isolated=True)
    taken = found.pop("AS")
    assert taken[0] == taken[1] > 1 << 30  # what was mapped before comes on top
    assert found == {
        "CPU": [7, 7],
        "FSIZE": [1 << 20] * 2,
        "NOFILE": [50, 50],
        "CORE": [0, 0],
        "NPROC": [9, 9],
        "SIGPENDING": [1024, 1024],
        "MSGQUEUE": [0, 0],
        "RTPRIO": [0, 0],
        "NICE": [0, 0],
    }


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
def test_without_isolation_all_processes_of_the_user_would_count() -> None:
    found = limits_after(Limits(processes=9), isolated=False)
    assert found["NPROC"] == list(resource.getrlimit(resource.RLIMIT_NPROC))
    assert found["SIGPENDING"] == list(resource.getrlimit(resource.RLIMIT_SIGPENDING))


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
def test_a_limit_of_the_trainer_that_is_lower_stays() -> None:
    def action() -> list[int]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        template._limit(Limits(file=5000), isolated=False)
        return list(resource.getrlimit(resource.RLIMIT_FSIZE))

    assert in_a_fork(action) == [4000, 4000]


def begin(setup: Setup) -> tuple[template._Running, socket.socket, str]:
    """Ask for an interpreter: what runs, the trainer's end of its channel, and what was printed."""
    ours, theirs = socket.socketpair()
    printed_read, printed = os.pipe()
    os.set_blocking(printed_read, False)
    running = template._begin(setup, Limits(), "/", theirs.detach(), printed)
    with os.fdopen(printed_read, "rb") as file:
        return running, ours, (file.read() or b"").decode()


def test_where_no_process_can_be_forked_only_this_interpreter_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    running, channel, printed = begin(SETUP)
    assert running.pids == set()
    assert channel.recv(1) == b""  # the trainer learns of it
    assert printed == "BlockingIOError: [Errno 11] Resource temporarily unavailable\n"
    channel.close()


@pytest.mark.skipif(sys.platform != "linux", reason="bubblewrap is for Linux")
def test_a_bubblewrap_that_is_missing_leaves_no_descriptor(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    running, channel, printed = begin(replace(SETUP, bubblewrap=[str(tmp_path / "bwrap")]))
    channel.close()
    assert running.pids == set()
    assert printed.startswith("FileNotFoundError: ")
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.skipif(sys.platform != "linux", reason="bubblewrap is for Linux")
def test_a_bubblewrap_that_fails_ends_the_interpreter_that_waits_for_it(tmp_path: Path) -> None:
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    before = os.listdir("/proc/self/fd")
    running, channel, _ = begin(replace(SETUP, bubblewrap=[str(tmp_path / "bwrap")]))
    assert channel.recv(1) == b""
    channel.close()
    assert len(running.pids) == 2
    for pid in running.pids:
        os.waitpid(pid, 0)
    assert running.held is not None
    os.close(running.held)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_an_interpreter_is_ended_with_its_group() -> None:
    leader = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, start_new_session=True)
    assert leader.stdout is not None
    child = int(leader.stdout.readline())
    template._end(os.open("/dev/null", os.O_RDONLY), template._Running({leader.pid}, None))
    assert leader.stdout.read() == b""  # closed by both
    with pytest.raises(ProcessLookupError):
        os.kill(leader.pid, 0)
    leader.returncode = -signal.SIGKILL  # it was collected
    leader.stdout.close()
    assert child


@pytest.mark.skipif(sys.platform != "linux", reason="bubblewrap is for Linux")
def test_the_dead_are_collected_and_their_numbers_forgotten() -> None:
    def action() -> list[list[int]]:
        dead, living = os.fork(), os.fork()
        if 0 in (dead, living):
            os._exit(0) if dead == 0 else signal.pause()
        running = {1: template._Running({dead}, 5), 2: template._Running({living}, 6)}
        while running[1].pids:
            template._collect_dead(running)
        os.kill(living, signal.SIGKILL)
        return [sorted(r.pids - {living}) for r in running.values()] + [[len(running[2].pids)]]

    assert in_a_fork(action) == [[], [], [1]]
