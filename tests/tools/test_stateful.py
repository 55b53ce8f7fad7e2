import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from axpo.tools import base
from axpo.tools.base import Conversation, Fault, SystemFault, Toolbox, ToolError, ToolResult
from axpo.tools.loading import load_file, load_tools

FILE = '''
import asyncio
import sqlite3
import threading
import time
from axpo.tools.base import Conversation

LOG = []

class Notes:
    """Notes of a rollout."""

    def __init__(self, conversation: Conversation):
        LOG.append("made")
        self.images = len(conversation.images)
        self.base = sqlite3.connect(":memory:")
        self.base.execute("create table notes (text)")

    def write(self, text: str) -> str:
        """Write a note.

        Args:
            text: The note.
        """
        self.base.execute("insert into notes values (?)", [text])
        return self.read()

    def read(self) -> str:
        """Read all notes."""
        return " ".join(text for (text,) in self.base.execute("select text from notes"))

    async def count(self, above: int, here: Conversation) -> str:
        """Count.

        Args:
            above: From where.
        """
        await asyncio.sleep(0)
        return f"{above + self.images} {len(here.images)}"

    def hang(self) -> str:
        """Hang."""
        time.sleep(1)
        return "late"

    def helper(self) -> str:
        return "not shown"

    def _hidden(self) -> str:
        """Not shown."""

    def close(self) -> None:
        """Forget."""
        LOG.append("closed")
        self.base.close()
'''


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8")
    return path


def log(tools: list[Any]) -> list[str]:
    found: list[str] = tools[0].__wrapped__.__globals__["LOG"]
    return found


def test_the_methods_of_a_class_are_tools_with_an_instance_a_rollout(tmp_path: Path) -> None:
    tools = load_tools([str(written(tmp_path, FILE))])
    toolbox = Toolbox(tools)
    assert toolbox.names == ["write", "read", "count", "hang"]
    assert toolbox.schemas[2]["function"] == {
        "name": "count",
        "description": "Count.",
        "parameters": {
            "type": "object",
            "properties": {"above": {"type": "integer", "description": "From where."}},
            "required": ["above"],
        },
    }

    async def story() -> list[str]:
        texts = []
        async with Conversation([b"an image"]) as one, Conversation() as other:
            for conversation, note in ((one, "a"), (other, "b"), (one, "c")):
                texts.append((await toolbox.call("write", {"text": note}, conversation)).text)
            texts.append((await toolbox.call("count", {"above": 3}, one)).text)
            assert log(tools) == ["made", "made"]
        return texts

    for _ in range(2):  # the toolbox outlives an event loop
        assert asyncio.run(story()) == ["a", "b", "a c", "4 1"]
        assert log(tools) == ["made", "made", "closed", "closed"]
        log(tools).clear()


def test_a_class_that_is_not_called_is_not_made(tmp_path: Path) -> None:
    tools = load_file(written(tmp_path, FILE))

    async def story() -> ToolResult:
        async with Conversation() as conversation:
            return await Toolbox(tools).call("write", {"text": 3}, conversation)

    assert "write takes text (string)" in asyncio.run(story()).text
    assert log(tools) == []


def test_a_fork_repeats_the_calls(tmp_path: Path) -> None:
    toolbox = Toolbox(load_file(written(tmp_path, FILE)))

    async def story() -> str:
        async with Conversation() as forked:
            await toolbox.repeat('{"name": "write", "arguments": {"text": "a"}}', forked)
            return (await toolbox.call("write", {"text": "b"}, forked)).text

    assert asyncio.run(story()) == "a b"


def test_a_call_that_took_too_long_takes_the_instance_with_it(tmp_path: Path) -> None:
    tools = load_file(written(tmp_path, FILE))
    toolbox = Toolbox(tools, timeout=0.1)

    async def story() -> list[ToolResult]:
        async with Conversation() as conversation:
            calls = [("write", {"text": "a"}), ("hang", {}), ("write", {"text": "b"})]
            return [await toolbox.call(name, arguments, conversation) for name, arguments in calls]

    start = time.monotonic()
    first, late, after = asyncio.run(story())
    assert time.monotonic() - start < 0.8  # the rollout's end does not wait for the call
    assert (first.text, after.text) == ("a", "b")
    assert late == ToolResult("Error: hang took longer than 0.1 s. All that it kept is lost.", fault=Fault.TIMEOUT)
    for _ in range(100):  # the lost one is closed when its call returns
        if log(tools).count("closed") == 2:
            break
        threading.Event().wait(0.02)
    assert log(tools) == ["made", "made", "closed", "closed"]


def test_threads_end_with_their_rollouts(tmp_path: Path) -> None:
    toolbox = Toolbox(load_file(written(tmp_path, FILE)))

    async def story() -> None:
        async with Conversation() as conversation:
            await toolbox.call("write", {"text": "a"}, conversation)

    before = threading.active_count()
    for _ in range(5):
        asyncio.run(story())
    for _ in range(50):
        if threading.active_count() <= before:
            break
        threading.Event().wait(0.02)
    assert threading.active_count() <= before


HEAD = "import abc, dataclasses, enum, typing, pydantic, threading\nfrom axpo.tools.base import Conversation\n"
TOOL = 'class Tool:\n    """A tool."""\n    def ask(self) -> str:\n        """Ask."""\n        return "yes"\n'


@pytest.mark.parametrize("failure", ["raise ValueError('no key')", "raise SystemExit(1)"])
def test_an_instance_that_cannot_be_made_is_a_system_fault(
    tmp_path: Path, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "RETRY_AFTER", ())
    tools = load_file(written(tmp_path, TOOL + f"    def __init__(self) -> None:\n        {failure}\n"))
    with pytest.raises(SystemFault, match=r"the tool 'ask' does not get ready: (ValueError: no key|SystemExit: 1)"):
        asyncio.run(Toolbox(tools).call("ask", {}, Conversation()))


def test_an_async_close_and_limits_of_a_method(tmp_path: Path) -> None:
    text = TOOL + "    ask.timeout = 7.0\n    async def close(self) -> None:\n        LOG.append('closed')\nLOG = []\n"
    tools = load_file(written(tmp_path, text))
    assert tools[0].timeout == 7.0  # type: ignore[attr-defined]

    async def story() -> str:
        async with Conversation() as conversation:
            return (await Toolbox(tools).call("ask", {}, conversation)).text

    assert asyncio.run(story()) == "yes"
    assert log(tools) == ["closed"]


@pytest.mark.parametrize(
    "other",
    [
        '@dataclasses.dataclass\nclass D:\n    """Doc."""\n    n: int\n    def m(self) -> str:\n        """Doc."""\n',
        'class E(enum.Enum):\n    """Doc."""\n    A = 1\n    def m(self) -> str:\n        """Doc."""\n',
        'class X(ValueError):\n    """Doc."""\n    def m(self) -> str:\n        """Doc."""\n',
        'class P(typing.Protocol):\n    """Doc."""\n    def m(self) -> str:\n        """Doc."""\n',
        'class A(abc.ABC):\n    """Doc."""\n    def m(self) -> str:\n        """Doc."""\n',
        'class B(pydantic.BaseModel):\n    """Doc."""\n    def m(self) -> str:\n        """Doc."""\n',
        'class T(typing.TypedDict):\n    """Doc."""\n    n: int\n',
        'class N(typing.NamedTuple):\n    """Doc."""\n    n: int\n    def m(self) -> str:\n        """Doc."""\n',
        'class S(threading.Thread):\n    """Doc."""\n',
        'class U:\n    def m(self) -> str:\n        """Doc."""\n',
        'class _H:\n    """Doc."""\n    def m(self) -> str:\n        """Doc."""\n',
        'class K:\n    """Doc."""\n    def __init__(self, n: int) -> None: ...\n    def m(self) -> str: ...\n',
    ],
)
def test_other_classes_are_no_tools(tmp_path: Path, other: str) -> None:
    assert [tool.__name__ for tool in load_file(written(tmp_path, HEAD + other + TOOL))] == ["ask"]


def test_a_list_may_hold_classes_and_what_they_inherit_is_theirs(tmp_path: Path) -> None:
    more = 'class More(Tool):\n    def tell(self) -> str:\n        """Tell."""\n        return self.ask()\n'
    tools = load_file(written(tmp_path, TOOL + more + "TOOLS = [More]\n"))
    assert [tool.__name__ for tool in tools] == ["ask", "tell"]
    assert asyncio.run(Toolbox(tools).call("tell", {}, Conversation())).text == "yes"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            TOOL + "    def __init__(self, n: int) -> None: ...\n",
            r"mine\.py:3: the class Tool: __init__ takes nothing, or one parameter annotated Conversation, not n",
        ),
        (
            TOOL + "    def __init__(self, a: Conversation, b: Conversation) -> None: ...\n",
            r"mine\.py:3: the class Tool: __init__ takes nothing, .* not a, b",
        ),
        ('class Tool:\n    """Doc."""\nTOOLS = [Tool]\n', r"mine\.py:3: the class Tool has no public method with a"),
        (
            TOOL + '    def say(self, text: str) -> str:\n        """Say it."""\n        return text\n',
            r"mine\.py:8: tool 'say': .*no description for the argument 'text'",
        ),
        ('\ndef say(text: str) -> str:\n    """Say it."""\n', r"mine\.py:4: tool 'say': .*no description"),
        ('def say(t: "Nowhere") -> str:\n    """Say."""\n', r"mine\.py:3: tool 'say': a type hint cannot be resolved"),
        ("class E(enum.Enum):\n    A = 1\nTOOLS = [E]\n", r"mine\.py: TOOLS is not a list of functions and classes"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ToolError, match=complaint):
        load_tools([str(written(tmp_path, HEAD + text))])
