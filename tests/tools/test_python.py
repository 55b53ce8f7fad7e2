import asyncio
import os
import time

import pytest

from axpo.tools.base import Conversation, Fault, SystemFault, Toolbox, ToolResult
from axpo.tools.python import make_python
from axpo.tools.sandbox import NONE, Sandbox


def test_state_lasts_as_long_as_the_rollout(plain_sandbox: Sandbox) -> None:
    async def story() -> list[ToolResult]:
        toolbox = Toolbox([make_python(plain_sandbox)])
        async with Conversation() as one, Conversation() as other:
            calls = [("x = 41", one), ("x = 0", other), ("x + 1", one), ("1 / x", other)]
            return [await toolbox.call("python", {"code": code}, rollout) for code, rollout in calls]

    first, second, third, fourth = asyncio.run(story())
    assert first == second == ToolResult("(no output)")
    assert third == ToolResult("42")
    assert fourth.fault == "raised"
    assert fourth.text.endswith("ZeroDivisionError: division by zero")


def test_the_end_of_the_rollout_ends_the_interpreter(plain_sandbox: Sandbox) -> None:
    async def story() -> ToolResult:
        toolbox = Toolbox([make_python(plain_sandbox)])
        async with Conversation() as conversation:
            return await toolbox.call("python", {"code": "import os; os.getpid()"}, conversation)

    process = int(asyncio.run(story()).text)
    deadline = time.monotonic() + 5
    while os.path.exists(f"/proc/{process}") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{process}")


def test_the_deadline_shows_what_was_printed_although_that_of_the_toolbox_is_shorter(plain_sandbox: Sandbox) -> None:
    async def story() -> list[ToolResult]:
        toolbox = Toolbox([make_python(plain_sandbox, timeout=0.5)], timeout=0.1)
        async with Conversation() as conversation:
            codes = ["print('here', flush=True)\nwhile True: pass", "'again'"]
            return [await toolbox.call("python", {"code": code}, conversation) for code in codes]

    stopped, again = asyncio.run(story())
    assert stopped == ToolResult("here\nStopped after 0.5 s. All variables are lost.", fault=Fault.TIMEOUT)
    assert again == ToolResult("'again'")


def test_eight_rollouts_compute_side_by_side(plain_sandbox: Sandbox) -> None:
    async def story() -> tuple[list[list[str]], float]:
        toolbox = Toolbox([make_python(plain_sandbox)])

        async def rollout(number: int) -> list[str]:
            async with Conversation() as conversation:
                codes = [f"n = {number}", "import time; time.sleep(1)", "n * n"]
                return [(await toolbox.call("python", {"code": code}, conversation)).text for code in codes]

        start = time.monotonic()
        return await asyncio.gather(*map(rollout, range(8))), time.monotonic() - start

    texts, seconds = asyncio.run(story())
    assert texts == [["(no output)", "(no output)", str(number**2)] for number in range(8)]
    assert seconds < 7  # eight seconds of sleep one after the other


def test_no_interpreter_is_a_system_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("axpo.tools.base.RETRY_AFTER", (0.0,))
    monkeypatch.setattr("axpo.tools.interpreter.bubblewrap.executable", lambda: "/nowhere/python")

    async def story() -> None:
        async with Conversation() as conversation:
            await Toolbox([make_python(Sandbox(NONE))]).call("python", {"code": "1"}, conversation)

    with pytest.raises(SystemFault, match="no interpreter can be started"):
        asyncio.run(story())


def test_a_set_prints_alike_in_every_interpreter(plain_sandbox: Sandbox) -> None:
    async def shown() -> str:
        async with Conversation() as conversation:
            call = {"code": "print({'a', 'b', 'c', 'd', 'e'})"}
            return (await Toolbox([make_python(plain_sandbox)]).call("python", call, conversation)).text

    assert len({asyncio.run(shown()) for _ in range(4)}) == 1
