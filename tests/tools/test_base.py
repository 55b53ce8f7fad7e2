import asyncio
import functools
import io
import threading
import time
from collections.abc import Callable
from typing import Any

import PIL.Image
import pytest

from axpo.tools import base
from axpo.tools.base import Conversation, Fault, PolicyFault, SystemFault, Toolbox, ToolError, ToolResult


def run(tool: Any, timeout: float = 5.0) -> ToolResult:
    return asyncio.run(Toolbox([tool], timeout).call(tool.__name__, {}, Conversation()))


def described(function: Any) -> Any:
    function.__doc__ = "Do it."
    return function


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "RETRY_AFTER", (0.0, 0.0))


# Schemas and what is refused when the toolbox is made


def test_the_schema_leaves_out_the_conversation_and_the_return_type() -> None:
    def look(index: int, conversation: Conversation, wide: bool = False) -> str:
        """Look at an image.

        Args:
            index: Which image.
            wide: Whether to look around.
        """
        return f"{index} {wide} {len(conversation.images)}"

    toolbox = Toolbox([look])
    assert toolbox.schemas == [
        {
            "type": "function",
            "function": {
                "name": "look",
                "description": "Look at an image.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "index": {"type": "integer", "description": "Which image."},
                        "wide": {"type": "boolean", "description": "Whether to look around."},
                    },
                    "required": ["index"],
                },
            },
        }
    ]
    assert toolbox.names == ["look"]
    result = asyncio.run(toolbox.call("look", {"index": 1}, Conversation([b"one", b"two"])))
    assert result == ToolResult("1 False 2")


def no_docstring(text: str) -> str:
    return text


def no_description(text: str) -> str:
    """Say it."""
    return text


def no_annotation(text):  # type: ignore[no-untyped-def]
    """Say it.

    Args:
        text: What.
    """
    return text


def unresolved(text: "Nowhere") -> str:  # type: ignore[name-defined] # noqa: F821
    """Say it.

    Args:
        text: What.
    """
    return str(text)


def own_class(text: threading.Lock) -> str:
    """Say it.

    Args:
        text: What.
    """
    return str(text)


def many(*texts: str) -> str:
    """Say it.

    Args:
        texts: What.
    """
    return str(texts)


@pytest.mark.parametrize(
    ("function", "missing"),
    [
        (no_docstring, "no docstring"),
        (no_description, "no description for the argument 'text'"),
        (no_annotation, "text is missing a type hint"),
        (unresolved, "'Nowhere' is not defined"),
        (own_class, "type hint"),
        (many, r"'\*texts: str' cannot be passed by name"),
    ],
)
def test_an_undescribed_function_is_refused(function: Any, missing: str) -> None:
    with pytest.raises(ToolError, match=rf"tool '{function.__name__}'.*{missing}"):
        Toolbox([function])


def test_what_is_not_a_function_or_comes_twice_is_refused() -> None:
    @described
    def wave() -> str:
        return "hello"

    with pytest.raises(ToolError, match=r"a tool is a function, but functools\.partial"):
        Toolbox([functools.partial(wave)])
    with pytest.raises(ToolError, match="two tools are called 'wave'"):
        Toolbox([wave, wave])


# What a tool returns


def image(colour: str, kind: str) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (4, 3), colour).save(file, kind)
    return file.getvalue()


def test_text_and_images_are_collected() -> None:
    png, jpeg = image("red", "PNG"), image("blue", "JPEG")

    @described
    def show() -> Any:
        return ["one", png, PIL.Image.new("RGB", (2, 2), "lime"), ("two"), jpeg]

    result = run(show)
    assert result.text == "one\ntwo"
    assert result.fault is None
    assert result.images[0] is png
    opened = [PIL.Image.open(io.BytesIO(data)) for data in result.images]
    assert [(o.format, o.size) for o in opened] == [("PNG", (4, 3)), ("PNG", (2, 2)), ("PNG", (4, 3))]
    assert opened[1].getpixel((0, 0)) == (0, 255, 0)
    assert opened[2].getpixel((0, 0)) == PIL.Image.open(io.BytesIO(jpeg)).getpixel((0, 0))


def test_a_result_is_handed_on_and_lone_surrogates_are_replaced() -> None:
    @described
    def answer() -> ToolResult:
        return ToolResult("bad \ud800", fault=Fault.RAISED)

    @described
    def say() -> str:
        return "\udfff good"

    assert run(answer) == ToolResult("bad ?", fault=Fault.RAISED)
    assert run(say) == ToolResult("? good")


@pytest.mark.parametrize("output", [3, None, {"a": 1}, ["x", 2], b"no image"])
def test_what_cannot_be_shown_is_not_the_fault_of_the_policy(output: Any) -> None:
    @described
    def broken() -> Any:
        return output

    with pytest.raises(SystemFault, match="the tool 'broken' returned what cannot be shown"):
        run(broken)


def test_images_come_as_the_model_sees_them() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned, four_colours = io.BytesIO(), io.BytesIO()
    PIL.Image.new("RGB", (40, 30)).save(turned, "JPEG", exif=exif)
    PIL.Image.new("CMYK", (5, 4)).save(four_colours, "JPEG")

    @described
    def show() -> Any:
        return [turned.getvalue(), four_colours.getvalue(), PIL.Image.new("RGBA", (3, 2)), PIL.Image.new("F", (2, 2))]

    opened = [PIL.Image.open(io.BytesIO(data)) for data in run(show).images]
    assert [image.size for image in opened] == [(30, 40), (5, 4), (3, 2), (2, 2)]
    assert opened[2].getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("as_result", [False, True])
def test_an_image_that_no_model_can_be_shown_is_told_to_the_policy(
    as_result: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    thin, broken = _png(505, 5), _png(50, 50)[:-30]

    def returning(data: bytes) -> Callable[[], Any]:
        @described
        def show() -> Any:
            return ToolResult("", (data,)) if as_result else data

        return show

    told = run(returning(thin))
    assert told == ToolResult(
        "Error: the image of this call is too thin to be shown: 505 × 5 pixels.", fault=Fault.RAISED
    )
    with pytest.raises(SystemFault, match="returned what cannot be shown"):
        run(returning(broken))
    monkeypatch.setattr("axpo.images.MAX_PIXELS", 2000)
    large = run(returning(_png(50, 41)))
    assert large.fault is Fault.RAISED
    assert "too large to be shown: it has 50 × 41 pixels" in large.text


def _png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("L", (width, height), 7).save(file, "PNG")
    return file.getvalue()


def test_an_empty_image_is_the_policys_choice() -> None:
    @described
    def crop() -> Any:
        return PIL.Image.new("RGB", (9, 9)).crop((0, 0, 0, 5))

    assert run(crop) == ToolResult("Error: the image of this call is empty: 0 × 5 pixels.", fault=Fault.RAISED)


def test_the_time_of_a_provider_is_not_the_rollouts() -> None:
    @described
    async def ask() -> str:
        await asyncio.sleep(0.05)
        return "answer"

    async def story() -> list[ToolResult]:
        toolbox, conversation = Toolbox([ask], rollout_timeout=0.01), Conversation()
        return [await toolbox.call("ask", {}, conversation) for _ in range(2)]

    assert [result.fault for result in asyncio.run(story())] == [None, Fault.TIMEOUT]
    ask.counts = False  # type: ignore[attr-defined]
    assert [result.fault for result in asyncio.run(story())] == [None, None]


def test_evaluation_may_offer_more() -> None:
    @described
    def known() -> str:
        return "known"

    @described
    def unseen() -> str:
        return "unseen"

    toolbox = Toolbox([known], rollout_timeout=9, evaluation=[unseen])
    assert toolbox.names == ["known"]
    assert [schema["function"]["name"] for schema in toolbox.schemas] == ["known"]
    assert toolbox.in_evaluation.names == ["known", "unseen"]

    async def story() -> list[ToolResult]:
        boxes = (toolbox, toolbox.in_evaluation)
        return [await box.call("unseen", {}, Conversation()) for box in boxes]

    refused, answered = asyncio.run(story())
    assert refused.fault is Fault.UNKNOWN_TOOL
    assert answered == ToolResult("unseen")
    with pytest.raises(ToolError, match="two tools are called 'known'"):
        Toolbox([known], evaluation=[known])


# Faults


@pytest.mark.parametrize("kind", [ValueError, StopIteration, SystemExit, RecursionError, KeyError])
@pytest.mark.parametrize("is_async", [False, True])
def test_an_exception_is_an_observation(kind: type[BaseException], is_async: bool) -> None:
    @described
    def fail() -> str:
        raise kind("boom")

    @described
    async def fail_async() -> str:
        raise kind("boom")

    result = run(fail_async if is_async else fail)
    assert result.fault == "raised"
    assert result.text.startswith("Error: ")
    if kind is not StopIteration:  # a coroutine cannot raise that one: Python says RuntimeError
        assert kind.__name__ in result.text
        assert "boom" in result.text


def test_a_tool_may_say_what_the_policy_did_wrong() -> None:
    @described
    def refuse() -> str:
        raise PolicyFault("not like this.")

    assert run(refuse) == ToolResult("Error: not like this.", fault=Fault.BAD_ARGUMENTS)


class TransportError(Exception):
    """As httpx has it: no OSError."""


class ConnectTimeout(TransportError):  # noqa: N818
    pass


@pytest.mark.parametrize(
    "error",
    [SystemFault("down"), ConnectionError("down"), OSError("down"), TimeoutError("down"), ConnectTimeout("down")],
)
@pytest.mark.usefixtures("no_pause")
def test_a_system_fault_is_tried_three_times_and_raised(error: Exception) -> None:
    attempts = []

    @described
    def provider() -> str:
        attempts.append(1)
        raise error

    with pytest.raises(SystemFault, match="down"):
        run(provider)
    assert len(attempts) == 3


def test_a_final_system_fault_is_raised_at_once() -> None:
    attempts = []

    @described
    async def provider() -> str:
        attempts.append(1)
        raise SystemFault("tried often enough", final=True)

    with pytest.raises(SystemFault, match="tried often enough"):
        run(provider)
    assert len(attempts) == 1


@pytest.mark.usefixtures("no_pause")
def test_a_system_fault_that_passes_leaves_no_trace() -> None:
    attempts = []

    @described
    async def provider() -> str:
        attempts.append(1)
        if len(attempts) < 3:
            raise ConnectionResetError("down")
        return "up"

    assert run(provider) == ToolResult("up")


def test_a_slow_tool_is_stopped() -> None:
    stopped = []

    @described
    async def slow() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            stopped.append(True)
            raise
        return "never"

    assert run(slow, timeout=0.05) == ToolResult("Error: slow took longer than 0.05 s.", fault=Fault.TIMEOUT)
    assert stopped == [True]


def test_a_deadline_of_its_own_goes_before() -> None:
    @described
    async def slow() -> str:
        await asyncio.sleep(0.2)
        return "done"

    slow.timeout = 5.0
    assert run(slow, timeout=0.05).text == "done"


def test_hanging_tools_hold_up_nobody() -> None:
    released = threading.Event()

    @described
    def hang() -> str:
        released.wait(20)
        return "late"

    @described
    def quick() -> str:
        return threading.current_thread().name

    async def all_of_them() -> tuple[list[ToolResult], ToolResult, float]:
        toolbox, conversation = Toolbox([hang, quick], timeout=1.0), Conversation()
        hanging = [asyncio.create_task(toolbox.call("hang", {}, conversation)) for _ in range(60)]
        await asyncio.sleep(0)
        start = time.monotonic()
        answer = await toolbox.call("quick", {}, conversation)
        waited = time.monotonic() - start
        return await asyncio.gather(*hanging), answer, waited

    results, answer, waited = asyncio.run(all_of_them())
    released.set()
    assert {result.fault for result in results} == {Fault.TIMEOUT}
    assert answer.fault is None
    assert answer.text != threading.main_thread().name
    assert waited < 0.9


# The conversation


def test_a_conversation_closes_what_tools_opened_last_first(caplog: pytest.LogCaptureFixture) -> None:
    closed = []

    async def close_second() -> None:
        await asyncio.sleep(0)
        closed.append("second")

    def fail() -> None:
        raise RuntimeError("stuck")

    async def story() -> None:
        async with Conversation() as conversation:
            conversation.on_close(lambda: closed.append("first"))
            conversation.on_close(close_second)
            conversation.on_close(fail)
            assert closed == []
        await conversation.close()

    asyncio.run(story())
    assert closed == ["second", "first"]
    assert [record.message for record in caplog.records] == ["a tool could not be closed"]


def test_conversations_share_nothing() -> None:
    @described
    def count(conversation: Conversation) -> str:
        conversation.state["n"] = conversation.state.get("n", 0) + 1
        return str(conversation.state["n"])

    async def story() -> list[str]:
        toolbox, one, other = Toolbox([count]), Conversation(), Conversation()
        return [(await toolbox.call("count", {}, c)).text for c in (one, one, other, one)]

    assert asyncio.run(story()) == ["1", "2", "1", "3"]
