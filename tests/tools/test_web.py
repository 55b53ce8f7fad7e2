import asyncio
import gc
import time
import warnings
from typing import Any

import pytest

from axpo.tools.base import Conversation, SystemFault, Toolbox, ToolError
from axpo.tools.web import Limits, Web, read_json

QUICK = Limits(timeout=0.5, attempts=3, pause=0.01, longest_pause=2.0)


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def ask(web: Web, server: Any, path: str = "/any") -> Any:
    return asyncio.run(web.fetch("GET", server.url + path, read_json))


@pytest.fixture
def server(search_server: Any) -> Any:
    search_server.answer = {"fine": True}
    return search_server


@pytest.mark.parametrize("fault", ["500", "503", "429", "408", "garbage", "drop", "truncated", "hang", "drip"])
def test_what_may_pass_is_tried_again(server: Any, fault: str) -> None:
    server.faults += [fault, fault]
    assert ask(Web("it", QUICK), server) == {"fine": True}
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("500", r"it: it answered 500 \(went wrong"),
        ("garbage", "it: JSONDecodeError"),
        ("drop", "it: RemoteProtocolError"),
        ("hang", r"it: no answer within 0\.5 s"),
        ("drip", r"it: no answer within 0\.5 s"),
    ],
)
def test_then_it_is_given_up(server: Any, fault: str, complaint: str) -> None:
    server.faults += [fault] * 3
    start = time.monotonic()
    with pytest.raises(SystemFault, match=complaint) as caught:
        ask(Web("it", QUICK), server)
    assert caught.value.final
    assert caught.value.__context__ is None, "the error of httpx, whose request holds the keys, is not kept"
    assert len(server.requests) == 3
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("status", ["301", "400", "401", "403", "404", "432"])
def test_what_is_our_own_doing_is_not_tried_again(server: Any, status: str) -> None:
    server.faults += [status]
    with pytest.raises(SystemFault, match=f"it answered {status} .*; check the address"):
        ask(Web("it", QUICK), server)
    assert len(server.requests) == 1


def test_nobody_there() -> None:
    web = Web("it", QUICK)
    with pytest.raises(SystemFault, match="it: ConnectError"):
        asyncio.run(web.fetch("GET", "http://127.0.0.1:9", read_json))


def test_an_answer_without_end(server: Any) -> None:
    server.answer = "x" * 5000
    with pytest.raises(SystemFault, match="longer than 1000 bytes"):
        asyncio.run(Web("it", QUICK).fetch("GET", f"{server.url}/any", read_json, max_bytes=1000))


def test_the_pauses_double_and_are_shortened_at_random(server: Any) -> None:
    clock = Clock()
    server.faults += ["500"] * 4
    ask(Web("it", Limits(attempts=5, pause=1.0, longest_pause=3.0), clock, clock.sleep), server)
    bounds = [1.0, 2.0, 3.0, 3.0]
    assert len(clock.slept) == 4
    assert all(bound / 2 <= slept <= bound for bound, slept in zip(bounds, clock.slept, strict=True))
    assert len(set(clock.slept)) == 4


def test_retry_after_is_honoured(server: Any) -> None:
    clock = Clock()
    web = Web("it", Limits(pause=0.01), clock, clock.sleep)
    server.faults += ["429 7", "503 5"]
    assert ask(web, server) == {"fine": True}
    assert clock.slept[:1] == [7.0]
    assert sum(clock.slept) == pytest.approx(12.0)


def test_retry_after_may_be_a_date(server: Any) -> None:
    clock = Clock()
    server.faults += ["503 Wed, 21 Oct 2015 07:28:00 GMT", "503 soon"]
    assert ask(Web("it", Limits(pause=0.01), clock, clock.sleep), server) == {"fine": True}
    assert max(clock.slept) <= 0.02


def test_a_server_that_asks_for_an_hour_is_given_up(server: Any) -> None:
    server.faults += ["429 3600"]
    with pytest.raises(SystemFault, match="asks to wait for 3600 s"):
        ask(Web("it", QUICK), server)
    assert len(server.requests) == 1


def test_429_holds_back_the_others_too(server: Any) -> None:
    web = Web("it", Limits(attempts=2, pause=0.01))
    server.faults += ["429 0.4"]

    async def both() -> None:
        first = asyncio.create_task(web.fetch("GET", f"{server.url}/any", read_json))
        await asyncio.sleep(0.15)
        await web.fetch("GET", f"{server.url}/any", read_json)
        await first

    asyncio.run(both())
    times = [request.time for request in server.requests]
    assert len(times) == 3
    assert min(times[1:]) - times[0] > 0.35


def test_the_rate_is_kept_by_all_together(server: Any) -> None:
    web = Web("it", Limits(rate=20))

    async def many() -> None:
        await asyncio.gather(*(web.fetch("GET", f"{server.url}/any", read_json) for _ in range(4)))

    asyncio.run(many())
    asyncio.run(many())  # another event loop, the same rate
    times = sorted(request.time for request in server.requests)
    assert len(times) == 8
    assert times[-1] - times[0] > 0.25  # 7 intervals of 0.05, less what the first connection takes


def test_after_failures_in_a_row_all_fail_at_once_then_one_is_let_through(server: Any) -> None:
    clock = Clock()
    web = Web("it", Limits(attempts=2, pause=0.01, failures=2, cool_down=60), clock, clock.sleep)
    server.faults += ["500"] * 4
    for _ in range(2):
        with pytest.raises(SystemFault, match="it answered 500"):
            ask(web, server)
    with pytest.raises(SystemFault, match="given up for 60 s: 2 requests failed in a row"):
        ask(web, server)
    assert len(server.requests) == 4
    clock.now += 61
    server.faults += ["500"]
    with pytest.raises(SystemFault, match="it answered 500"):
        ask(web, server)  # the trial: one attempt only
    with pytest.raises(SystemFault, match="given up for"):
        ask(web, server)
    assert len(server.requests) == 5
    clock.now += 61
    assert ask(web, server) == {"fine": True}
    assert ask(web, server) == {"fine": True}


def test_while_the_trial_runs_the_others_fail(server: Any) -> None:
    web = Web("it", Limits(timeout=0.5, attempts=1, failures=1, cool_down=0.05))
    server.faults += ["500", "hang"]
    with pytest.raises(SystemFault):
        ask(web, server)

    async def two() -> list[Any]:
        await asyncio.sleep(0.06)
        calls = [web.fetch("GET", f"{server.url}/any", read_json) for _ in range(2)]
        return await asyncio.gather(*calls, return_exceptions=True)

    first, second = asyncio.run(two())
    assert "no answer" in str(first)
    assert "given up for" in str(second)


def test_a_cancelled_trial_makes_room_for_the_next(server: Any) -> None:
    web = Web("it", Limits(timeout=5, attempts=1, failures=1, cool_down=0.05))
    server.faults += ["500", "hang"]
    with pytest.raises(SystemFault):
        ask(web, server)

    async def cancelled() -> None:
        await asyncio.sleep(0.06)
        trial = asyncio.create_task(web.fetch("GET", f"{server.url}/any", read_json))
        await asyncio.sleep(0.1)
        trial.cancel()
        await asyncio.gather(trial, return_exceptions=True)
        assert await web.fetch("GET", f"{server.url}/any", read_json) == {"fine": True}

    asyncio.run(cancelled())


def test_a_refused_request_is_no_failure_of_the_server(server: Any) -> None:
    web = Web("it", Limits(attempts=1, failures=1))
    server.faults += ["400", "404"]
    for status in ("400", "404"):
        with pytest.raises(SystemFault, match=f"it answered {status}"):
            ask(web, server)
    assert ask(web, server) == {"fine": True}


def test_connections_are_reused_within_a_loop_and_closed_with_it(server: Any) -> None:
    web = Web("it", QUICK)

    async def several() -> None:
        for _ in range(5):
            await web.fetch("GET", f"{server.url}/any", read_json)

    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        for loops in (1, 2, 3):
            asyncio.run(several())
            assert server.connections == loops
        assert not web._clients
        gc.collect()


def test_the_toolbox_does_not_multiply_the_attempts(server: Any) -> None:
    web = Web("it", QUICK)

    async def look() -> str:
        """Look."""
        return str(await web.fetch("GET", f"{server.url}/any", read_json))

    server.faults += ["500"] * 9
    with pytest.raises(SystemFault):
        asyncio.run(Toolbox([look]).call("look", {}, Conversation()))
    assert len(server.requests) == 3


@pytest.mark.parametrize(("name", "value"), [("attempts", 0), ("timeout", -1.0), ("rate", 0.0), ("failures", 0)])
def test_limits_that_would_let_nothing_through(name: str, value: float) -> None:
    with pytest.raises(ToolError, match=f"{name}: got {value}, but it must be above 0"):
        Limits(**{name: value})  # type: ignore[arg-type]
