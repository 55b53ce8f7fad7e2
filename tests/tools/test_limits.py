"""The rules that hold for every call: deadlines, tool time, turns, whose fault it is."""

import asyncio
import gc
import logging
import threading
import time
from typing import Any

import pytest

from axpo.tools import base
from axpo.tools.base import Conversation, Fault, PolicyFault, SystemFault, Toolbox, ToolError, ToolResult
from axpo.tools.faults import is_system


def described(function: Any) -> Any:
    function.__doc__ = "Do it."
    return function


def call(toolbox: Toolbox, name: str, conversation: Conversation | None = None) -> ToolResult:
    return asyncio.run(toolbox.call(name, {}, conversation or Conversation()))


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "RETRY_AFTER", (0.0, 0.0))


@described
def nap() -> str:
    time.sleep(0.1)
    return "rested"


# Deadlines


def test_a_tool_that_will_not_be_cancelled_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "GRACE", 0.1)
    ended = asyncio.Event()

    @described
    async def stubborn() -> str:
        while True:
            try:
                await ended.wait()
                return "late"
            except asyncio.CancelledError:
                pass

    async def story() -> tuple[ToolResult, float]:
        start = time.monotonic()
        result = await Toolbox([stubborn], timeout=0.1).call("stubborn", {}, Conversation())
        took = time.monotonic() - start
        ended.set()
        return result, took

    result, took = asyncio.run(story())
    assert result == ToolResult("Error: stubborn took longer than 0.1 s.", fault=Fault.TIMEOUT)
    assert took < 0.5


def test_threads_left_behind_are_told_at_8_16_and_so_on(caplog: pytest.LogCaptureFixture) -> None:
    released = threading.Event()

    @described
    def hang() -> str:
        released.wait(20)
        return "late"

    async def story() -> None:
        toolbox = Toolbox([hang], timeout=0.1)
        await asyncio.gather(*(toolbox.call("hang", {}, Conversation()) for _ in range(17)))
        released.set()
        await asyncio.sleep(0.1)
        released.clear()
        await toolbox.call("hang", {}, Conversation())
        released.set()

    with caplog.at_level(logging.WARNING):
        asyncio.run(story())
    assert [record.getMessage() for record in caplog.records] == [
        "tool hang: 8 calls that took too long cannot be stopped and still run",
        "tool hang: 16 calls that took too long cannot be stopped and still run",
    ]


# Tool time of a rollout


def test_a_rollout_may_use_so_much_tool_time() -> None:
    toolbox, conversation = Toolbox([nap], timeout=5.0, rollout_timeout=0.15), Conversation()
    results = [call(toolbox, "nap", conversation) for _ in range(3)]
    # The second call begins within the time and may take its own.
    assert [result.text for result in results[:2]] == ["rested", "rested"]
    spent = "Error: this rollout has used its 0.15 s of tool time; answer without tools."
    assert results[2] == ToolResult(spent, fault=Fault.TIMEOUT)
    assert 0.2 <= conversation.tool_seconds < 0.4
    assert call(toolbox, "nap").text == "rested"  # another rollout


def test_a_call_that_took_too_long_counts() -> None:
    toolbox, conversation = Toolbox([nap], timeout=0.05, rollout_timeout=0.04), Conversation()
    assert call(toolbox, "nap", conversation).text == "Error: nap took longer than 0.05 s."
    assert "answer without tools" in call(toolbox, "nap", conversation).text


@pytest.mark.usefixtures("no_pause")
def test_what_the_system_takes_does_not_count() -> None:
    attempts: list[int] = []

    async def prepare(conversation: Conversation) -> None:
        await asyncio.sleep(0.1)

    @described
    def shaky() -> str:
        attempts.append(1)
        if len(attempts) < 3:
            time.sleep(0.1)
            raise ConnectionError("down")
        return "up"

    shaky.prepare = prepare
    toolbox, conversation = Toolbox([shaky], rollout_timeout=0.05), Conversation()
    assert call(toolbox, "shaky", conversation).text == "up"
    assert conversation.tool_seconds < 0.05


def test_calls_repeated_for_a_fork_do_not_count_and_are_not_refused() -> None:
    seen: list[str] = []

    @described
    def note(conversation: Conversation) -> str:
        time.sleep(0.05)
        seen.append("note")
        return "noted"

    toolbox, conversation = Toolbox([note, nap], rollout_timeout=0.01), Conversation()
    conversation.tool_seconds = 0.02
    for name in ("note", "note", "nap"):
        asyncio.run(toolbox.repeat(f'{{"name": "{name}", "arguments": {{}}}}', conversation))
    assert seen == ["note", "note"]
    assert conversation.tool_seconds == 0.02


# Turns


def watched(limit: int | None = None) -> tuple[Any, list[int], list[str]]:
    """A tool that takes 0.05 s, how many of its calls ran at once, and in which order they began."""
    running: list[int] = [0]
    begun: list[str] = []

    async def busy(name: str) -> str:
        """Be busy.

        Args:
            name: Whose call.
        """
        begun.append(name)
        running.append(running[-1] + 1)
        await asyncio.sleep(0.05)
        running.append(running[-1] - 1)
        return name

    if limit is not None:
        busy.concurrency = limit  # type: ignore[attr-defined]
    return busy, running, begun


async def all_at_once(toolbox: Toolbox, count: int) -> list[ToolResult]:
    return await asyncio.gather(*(toolbox.call("busy", {"name": f"{n}"}, Conversation()) for n in range(count)))


@pytest.mark.parametrize(("shared", "own", "most"), [(2, None, 2), (None, 3, 3), (1, 4, 4), (None, None, 6)])
def test_so_many_calls_of_a_tool_run_at_once(shared: int | None, own: int | None, most: int) -> None:
    busy, running, begun = watched(own)
    # The deadline begins with the turn: six calls in threes of 0.05 s pass one of 0.08 s.
    toolbox = Toolbox([busy], timeout=0.08, concurrency=shared)
    for _ in range(3):  # an event loop each
        results = asyncio.run(all_at_once(toolbox, 6))
        assert [result.text for result in results] == [f"{n}" for n in range(6)]
    assert max(running) == most
    assert begun == [f"{n}" for n in range(6)] * 3


def test_a_cancelled_loop_leaves_no_turn_taken() -> None:
    busy, _, _ = watched(1)
    toolbox = Toolbox([busy])

    async def interrupted() -> None:
        tasks = asyncio.gather(*(toolbox.call("busy", {"name": "x"}, Conversation()) for _ in range(3)))
        await asyncio.sleep(0.01)
        tasks.cancel()

    asyncio.run(interrupted())
    assert len(asyncio.run(all_at_once(toolbox, 2))) == 2


def test_a_call_that_is_stopped_gives_up_its_turn_though_its_thread_hangs() -> None:
    released = threading.Event()
    calls: list[int] = []

    @described
    def hang() -> str:
        calls.append(1)
        if len(calls) == 1:
            released.wait(20)
        return "done"

    async def story() -> list[ToolResult]:
        toolbox = Toolbox([hang], timeout=0.2, concurrency=1)
        return await asyncio.gather(*(toolbox.call("hang", {}, Conversation()) for _ in range(3)))

    results = asyncio.run(story())
    released.set()
    assert [result.fault for result in results] == [Fault.TIMEOUT, None, None]


def test_a_limit_of_none_at_all_is_refused() -> None:
    with pytest.raises(ToolError, match="tool 'nap': its concurrency is 0; at least 1 call must run"):
        Toolbox([nap], concurrency=0)


def test_a_toolbox_tells_the_limits_of_what_it_offers_and_evaluation_offers_more() -> None:
    @described
    def patient() -> str:
        return "done"

    patient.timeout, patient.concurrency = 9.0, 2
    toolbox = Toolbox([nap], timeout=3.0, evaluation=[patient])
    assert [(offer.name, offer.function, offer.timeout, offer.concurrency) for offer in toolbox.offers] == [
        ("nap", nap, 3.0, None)
    ]
    assert [offer.name for offer in toolbox.in_evaluation.offers] == ["nap", "patient"]
    assert (toolbox.in_evaluation.offers[1].timeout, toolbox.in_evaluation.offers[1].concurrency) == (9.0, 2)
    assert call(toolbox, "patient").fault == Fault.UNKNOWN_TOOL
    assert call(toolbox.in_evaluation, "patient").text == "done"


# Whose fault


class TransportError(Exception):
    """As httpx has it: no OSError."""


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "system"),
    [
        (FileNotFoundError("x"), True),
        (ExceptionGroup("tasks", [ConnectionError("x"), TransportError("x")]), True),
        (ExceptionGroup("tasks", [ExceptionGroup("more", [SystemFault("x")])]), True),
        (ExceptionGroup("tasks", [ConnectionError("x"), ValueError("x")]), False),
        (caused(RuntimeError("no answer"), TransportError("x")), True),
        (caused(RuntimeError("no answer"), caused(KeyError("x"), ConnectionError("x"))), True),
        (caused(ValueError("no such page"), FileNotFoundError("x")), False),
        (caused(PolicyFault("no such page"), ConnectionError("x")), False),
        (ValueError("x"), False),
    ],
)
def test_what_counts_as_the_system(error: Exception, system: bool) -> None:
    assert is_system(error) is system


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.usefixtures("no_pause")
def test_a_group_of_lost_connections_is_a_system_fault(is_async: bool) -> None:
    @described
    def fail() -> str:
        raise ExceptionGroup("tasks", [ConnectionError("the host is secret")])

    @described
    async def fail_async() -> str:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(fail))
        return ""

    with pytest.raises(SystemFault, match="ConnectionError: the host is secret"):
        call(Toolbox([fail_async if is_async else fail]), "fail_async" if is_async else "fail")


def test_the_one_member_of_a_group_speaks() -> None:
    @described
    def fail() -> str:
        raise ExceptionGroup("tasks", [PolicyFault("no such page.")])

    assert call(Toolbox([fail]), "fail") == ToolResult("Error: no such page.", fault=Fault.BAD_ARGUMENTS)


def test_the_text_of_an_exception_is_cut() -> None:
    @described
    def fail() -> str:
        raise ValueError("x" * 10_000)

    assert len(call(Toolbox([fail]), "fail").text) == 500 + len("Error: ")


@pytest.mark.parametrize("is_async", [False, True])
def test_an_interrupt_is_never_swallowed(is_async: bool) -> None:
    @described
    def stop() -> str:
        raise KeyboardInterrupt

    @described
    async def stop_async() -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(Toolbox([stop_async if is_async else stop]), "stop_async" if is_async else "stop")
    gc.collect()  # asyncio's complaint of the lost task: Python 3.11 cannot bear it while it parses another test


@pytest.mark.usefixtures("no_pause")
def test_only_callers_cancel() -> None:
    @described
    async def inner() -> str:
        task = asyncio.ensure_future(asyncio.sleep(5))
        task.cancel()
        await task
        return ""

    with pytest.raises(SystemFault, match="the tool 'inner' was cancelled, by none of its callers"):
        call(Toolbox([inner]), "inner")

    stopped: list[str] = []

    @described
    async def slow() -> str:
        try:
            await asyncio.sleep(5)
        finally:
            stopped.append("slow")
        return ""

    async def story() -> None:
        task = asyncio.ensure_future(Toolbox([slow]).call("slow", {}, Conversation()))
        await asyncio.sleep(0.01)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(story())
    assert stopped == ["slow"]


@pytest.mark.usefixtures("no_pause")
def test_a_tool_that_does_not_get_ready_is_a_system_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "READY", 0.05)
    ran: list[int] = []

    async def refuse(conversation: Conversation) -> None:
        raise PolicyFault("not yet")

    async def slow(conversation: Conversation) -> None:
        await asyncio.sleep(5)

    @described
    def tool() -> str:
        ran.append(1)
        return ""

    for prepare, reason in ((refuse, "PolicyFault: not yet"), (slow, "TimeoutError")):
        tool.prepare = prepare
        with pytest.raises(SystemFault, match=f"the tool 'tool' does not get ready: {reason}"):
            call(Toolbox([tool]), "tool")
    assert ran == []


def test_a_rollout_that_ends_does_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("axpo.tools.conversation.CLOSE", 0.05)
    closed: list[str] = []

    async def story() -> None:
        async with Conversation() as conversation:
            conversation.on_close(lambda: closed.append("first"))
            conversation.on_close(lambda: asyncio.sleep(5))

    start = time.monotonic()
    asyncio.run(story())
    assert time.monotonic() - start < 1
    assert closed == ["first"]
    assert [record.message for record in caplog.records] == ["a tool could not be closed"]
