import asyncio
from pathlib import Path

import pytest

from axpo.tools.base import Conversation, Tool, Toolbox, ToolError
from axpo.tools.loading import load_file, load_tools
from axpo.tools.zoom import make_zoom

FILE = '''
import math
from os.path import join
from axpo.tools.base import Conversation

def area(radius: float) -> str:
    """The area of a circle.

    Args:
        radius: Its radius.
    """
    return helper(math.pi * radius**2)

def helper(value: float) -> str:
    return f"{value:.2f}"

async def count(conversation: Conversation) -> str:
    """Count the images."""
    return str(len(conversation.images))

def _private() -> str:
    """Not shown."""
    return ""

same = area
'''


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_names_are_made_when_asked_for() -> None:
    made: list[str] = []

    def make() -> Tool:
        made.append("zoom")
        return make_zoom()

    known = {"zoom": make, "other": lambda: pytest.fail("nobody asked for it")}
    assert Toolbox(load_tools(["zoom"], known)).names == ["image_zoom_in_tool"]
    assert made == ["zoom"]
    assert load_tools([], known) == []


def test_a_file_gives_its_own_public_described_functions(tmp_path: Path) -> None:
    toolbox = Toolbox(load_tools([str(written(tmp_path / "mine.py", FILE)), "zoom"], {"zoom": make_zoom}))
    assert toolbox.names == ["area", "count", "image_zoom_in_tool"]

    async def story() -> list[str]:
        conversation = Conversation([b"an image"])
        area = await toolbox.call("area", {"radius": 2}, conversation)
        return [area.text, (await toolbox.call("count", {}, conversation)).text]

    assert asyncio.run(story()) == ["12.57", "1"]


def test_a_list_of_tools_goes_before(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.py", FILE + "\nTOOLS = [count]\n")
    assert [tool.__name__ for tool in load_file(path)] == ["count"]


def test_dataclasses_and_postponed_hints_work_in_a_file(tmp_path: Path) -> None:
    path = written(
        tmp_path / "modern.py",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from axpo.tools.base import Conversation\n\n@dataclass\nclass Kept:\n    n: int = 0\n\n"
        'def count(conversation: Conversation) -> str:\n    """Count."""\n    return str(Kept(3).n)\n',
    )
    toolbox = Toolbox(load_file(path))
    assert asyncio.run(toolbox.call("count", {}, Conversation())).text == "3"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x = 1\ny = 2 +\n", r"mine\.py:2: does not import: SyntaxError"),
        ("x = 1\n\nimport nothing_of_this_name\n", r"mine\.py:3: does not import: ModuleNotFoundError: .*nothing_of_"),
        ("def f():\n    return 1 / 0\n\nf()\n", r"mine\.py:2: does not import: ZeroDivisionError"),
        ("import sys\nsys.exit(3)\n", r"mine\.py:2: does not import: SystemExit: 3"),
        ("x = '\0'\n", r"mine\.py.*: does not import"),
        ("def f(x: int) -> str:\n    return ''\n", r"mine\.py holds no tool"),
        ("from os.path import join\n", r"mine\.py holds no tool"),
        ("TOOLS = []\n", r"mine\.py holds no tool"),
        ("TOOLS = ['zoom']\n", r"mine\.py: TOOLS is not a list of functions"),
        ("TOOLS = 3\n", r"mine\.py: TOOLS is not a list of functions"),
    ],
)
def test_a_file_that_gives_no_tools_is_named_with_the_line(tmp_path: Path, text: str, complaint: str) -> None:
    path = written(tmp_path / "mine.py", text)
    with pytest.raises(ToolError, match=complaint):
        load_tools([str(path)])


def test_a_relative_path_has_its_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "mine.py", "1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ToolError, match=r"^tools\.names\[0\]: mine\.py:1: does not import: ZeroDivisionError"):
        load_tools(["mine.py"])


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(
        ToolError, match=r"^tools\.names\[0\]: unknown tool 'zom': choose from zoom, or give a \.py file"
    ):
        load_tools(["zom"], {"zoom": make_zoom})
    with pytest.raises(ToolError, match=r"nowhere\.py does not exist"):
        load_tools([str(tmp_path / "nowhere.py")])
