"""`axpo tools check` through its real entry, with real tools: what it tells, and a user's mistakes."""

import hashlib
import io
import json
import re
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import commands
import PIL.Image
import pytest
import yaml
from typer.testing import Result

from axpo import build
from axpo.chat import Chat
from axpo.cli_tools import LINES, draw_picture, sample
from axpo.config import load_config
from axpo.tools import base, sandbox

TOOLS = '''
"""Tools of a user's own."""
from typing import Literal

import PIL.Image


def shout(text: str, mode: Literal["loud", "soft"], times: list[int], note: str = "") -> str:
    """Shout.

    Args:
        text: The text.
        mode: How.
        times: How often.
        note: More.
    """
    return f"{text} {mode} {times}"


def paint(width: int) -> PIL.Image.Image:
    """Paint.

    Args:
        width: Pixels.
    """
    return PIL.Image.new("RGB", (63 + width, 32))


def recite(lines: int) -> str:
    """Recite.

    Args:
        lines: How many.
    """
    return "\\n".join(f"line {n}\\x1b[31m\\t{'so long ' * 20}end" for n in range(lines + 29))


class Counter:
    """Counts."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, by: int) -> str:
        """Count on.

        Args:
            by: How far.
        """
        self.count += by
        if self.count == 2:
            raise ValueError("two is too much")
        return f"counted to {self.count}"
'''
DOWN = '''
def dial(number: str) -> str:
    """Dial.

    Args:
        number: The number.
    """
    raise OSError("the line is dead")
'''
SERVER = Path(__file__).parent / "tools" / "mcp_server.py"


axpo = partial(commands.axpo, "tools", "check")
succeed = partial(commands.succeed, "tools", "check")
mistake = partial(commands.mistake, "tools", "check")


def parts(result: Result) -> dict[str, str]:
    """What is shown of each tool, by its heading."""
    blocks = result.stdout.strip().split("\n\n")
    return {heading: rest for heading, _, rest in (block.partition("\n") for block in blocks)}


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with tools of the user's own and no weights to be loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "load_model", lambda *_: pytest.fail("weights were loaded"))
    (tmp_path / "mine.py").write_text(TOOLS)
    (tmp_path / "down.py").write_text(DOWN)
    return tmp_path


def config(tools: Any, **more: Any) -> str:
    """The file of a config with these tools."""
    Path("config.yaml").write_text(yaml.safe_dump({"model": "miniature", "tools": tools, **more}))
    return "config.yaml"


@pytest.mark.usefixtures("bubblewrap_sandbox")
def test_the_built_in_tools_are_called_and_shown_as_the_policy_would_see_them(folder: Path):
    tools = {"names": ["zoom", "python"], "corpus": "miniature", "cache": "cache", "timeout": 20, "concurrency": 5}
    result = succeed(config(tools, eval={"tools": ["search"]}, max_pixels=16384), "--images", "shown")
    assert result.stderr == ""
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    found = parts(result)
    assert list(found) == ["image_zoom_in_tool", "python", "search (only in evaluation)", "images written to shown"]
    zoom, python, search = (found[name] for name in list(found)[:3])
    for part in zoom, python, search:
        first, second = re.findall(r"([\d.]+) ms", part)
        assert float(first) > 0
        assert float(second) > 0
    assert "built-in zoom; deadline 20 s, 5 calls at once" in zoom
    assert '| <tool_call>\n  | {"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [250, 250' in zoom
    assert "built-in python, sandbox level bubblewrap; deadline 20 s, 5 calls at once" in python
    assert f"  | Python {sys.version.split()[0]} (512, 384)\n  image 200×200, seen as 128×128, 16 tokens" in python
    assert "built-in search, local corpus of 900 documents, BM25; no deadline but its provider's" in words(search)
    query = re.search(r'"query": "(\w+)"', search)
    assert query is not None
    assert re.search(rf"  \| 1\. [\w-]*{query[1]}[\w -]*: Its ", search, re.IGNORECASE)

    written = folder / "shown"
    sizes = {path.name: PIL.Image.open(path).size for path in written.iterdir()}
    assert sizes == {"image_0.png": (512, 384), "image_zoom_in_tool-1-1.png": (608, 448), "python-1-1.png": (200, 200)}
    chat = build.load_chat(load_config(Path("config.yaml"), []))
    ids, images = chat.observation([("", [(written / "image_zoom_in_tool-1-1.png").read_bytes()])])
    assert f"observed {len(ids)} tokens\n  image 608×448, seen as 128×96, 12 tokens" in zoom
    assert images[0].tokens == 12  # of 32 × 32 pixels: max_pixels leaves 149 × 110


def test_the_zoom_of_the_test_picture_shows_what_is_in_its_middle():
    picture = PIL.Image.open(io.BytesIO(draw_picture())).convert("L")
    width, height = picture.size
    assert picture.crop((width // 4, height // 4, 3 * width // 4, 3 * height // 4)).getextrema()[0] < 100
    assert picture.crop((0, 0, 30, 30)).getextrema() == (255, 255)


def test_functions_and_classes_of_a_file_are_called_with_arguments_by_their_types():
    found = parts(succeed(config(["mine.py"])))
    assert list(found) == ["shout", "paint", "recite", "add"]
    assert "file mine.py; deadline 30 s, 64 calls at once" in found["shout"]
    told = '{"name": "shout", "arguments": {"text": "test", "mode": "loud", "times": [1]}}'
    assert told in words(found["shout"])
    assert "\n  | test loud [1]" in found["shout"]
    # Enlarged, because the model sees at least 4096 pixels.
    assert re.search(r"observed \d+ tokens\n  image 64×32, seen as 96×64, 6 tokens$", found["paint"])
    assert "  | counted to 1\n  the policy's fault at the second call  raised" in found["add"]


def test_a_long_text_is_cut_and_what_a_terminal_would_obey_is_spelled_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "60")
    result = succeed(config(["mine.py"]))
    assert all(len(line) <= 60 for line in result.stdout.splitlines())
    shown = parts(result)["recite"].partition("observed")[2].splitlines()[1:]
    assert len(shown) == LINES + 1
    assert shown[-1] == "  (cut here; it has 5299 characters)"  # 10 · 175 + 20 · 176 and 29 line ends
    assert shown[0].startswith(r"  | line 0\x1b[31m\tso long so")
    assert shown[1].startswith("    ")
    assert "\x1b" not in result.stdout


def test_the_tools_of_a_server():
    server = shlex.join([sys.executable, str(SERVER)])
    result = succeed(config([{"mcp": server, "only": ["add", "measure"]}]))
    found = parts(result)
    assert list(found) == ["add", "measure"]
    # The command is wrapped
    assert f"MCPserver'{server}';deadline30s".replace(" ", "") in found["add"].replace("\n", "").replace(" ", "")
    assert '| {"name": "add", "arguments": {"a": 1}}\n' in found["add"]
    assert found["add"].endswith("  | 2")
    assert '{"name": "measure", "arguments": {"text": "test"}}' in found["measure"]
    assert '"length": 4' in found["measure"]


def test_a_fault_of_the_system_is_told_and_the_other_tools_are_tried(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base, "RETRY_AFTER", (0.0, 0.0))
    result = axpo(config(["down.py", "mine.py"]))
    assert (result.exit_code, type(result.exception)) == (1, SystemExit), result.output
    found = parts(result)
    assert list(found) == ["dial", "shout", "paint", "recite", "add"]
    assert re.search(r"latency  [\d.]+ ms\n  system's fault  OSError: the line is dead$", found["dial"])
    assert "\n  | test loud [1]" in found["shout"]
    warning = "warning: tool dial: OSError: the line is dead; trying again"
    assert result.stderr.splitlines() == [warning, warning, "failed: dial; a rollout that meets this is void"]


def test_an_image_that_the_model_cannot_take_is_a_fault_of_the_system(
    monkeypatch: pytest.MonkeyPatch, byte_tokenizer: Callable[..., Any]
):
    monkeypatch.setattr(build, "load_chat", lambda _: Chat(byte_tokenizer()))
    result = axpo(config(["mine.py"]))
    assert result.exit_code == 1, result.output
    assert parts(result)["paint"].endswith("  system's fault  image 0: this model takes no images")
    assert result.stderr == "failed: paint; a rollout that meets this is void\n"


def test_calls_of_the_users_own_take_the_place_of_the_sample():
    calls = [("add", {"by": 5}), ("add", {"by": "x"}), ("add", {"by": 10}), ("paint", {"width": 33})]
    given = [part for name, values in calls for part in ("--call", json.dumps({"name": name, "arguments": values}))]
    found = parts(succeed(config(["mine.py"]), *given))
    assert re.findall(r"counted to \d+", found["add"]) == [
        "counted to 5",
        "counted to 20",
    ]  # each twice, in one rollout
    assert re.findall(r"\| \{.*\}", found["add"])[1] == '| {"name": "add", "arguments": {"by": "x"}}'
    assert "the policy's fault: bad_arguments\n  | Error: by: Input should be a valid integer" in found["add"]
    assert "image 96×32" in found["paint"]
    assert "| test loud [1]" in found["shout"]


def test_a_later_call_finds_the_images_of_an_earlier_one():
    zoom = {"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [0, 0, 1000, 500], "label": "top", "img_idx": 0}}
    again = {**zoom, "arguments": {**zoom["arguments"], "img_idx": 1}}
    given = config({"names": ["zoom"], "zoom_pixels": 1024})
    found = succeed(given, "--call", json.dumps(zoom), "--call", json.dumps(again)).stdout
    assert re.findall(r"image (\d+×\d+)", found) == ["512×192", "512×96"]
    missing = succeed(given, "--call", json.dumps(again)).stdout
    assert "the policy's fault: bad_arguments\n  | Error: img_idx 1 names no image" in missing


def test_image_search_is_asked_for_the_test_picture(folder: Path):
    row = {"sha256": hashlib.sha256(draw_picture()).hexdigest(), "results": [{"title": "A disc and a square"}]}
    (folder / "table.jsonl").write_text(json.dumps(row))
    tools = {"names": ["image_search"], "image_search": {"table": str(folder / "table.jsonl")}, "cache": "cache"}
    found = parts(succeed(config(tools)))["image_search"]
    told = f"built-in image search, table {folder / 'table.jsonl'}; no deadline but"
    assert "".join(found.split()).startswith("".join(told.split()))  # a long path is broken
    assert '{"name": "image_search", "arguments": {"img_idx": 0}}' in found
    assert "  | 1. A disc and a square" in found


def test_mistakes_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TAVILY_API_KEY", raising=False)
    assert mistake(config([])).startswith("error: tools.names: got nothing, but this command needs tools")
    assert mistake(config(["zoomm"])).startswith("error: tools.names")
    assert "error: tools.names[0]: the tool file" in mistake(config(["nowhere.py"]))
    tavily = {"names": ["search"], "search": "tavily"}
    assert "error: tools.search: the environment variable TAVILY_API_KEY is not set" in mistake(config(tavily))
    told = "error: tools.names[0]: the MCP server 'no-such-command' cannot be used"
    assert told in mistake(config([{"mcp": "no-such-command"}]))
    remote = {"names": ["python"], "sandbox": {"remote": "http://127.0.0.1:9"}}
    assert "error: tools.sandbox: no SandboxFusion service answers at http://127.0.0.1:9" in mistake(config(remote))
    given = config(["mine.py"])
    assert "error: --call: got '{}'" in mistake(given, "--call", "{}")
    unknown = json.dumps({"name": "shuot", "arguments": {}})
    told = "error: --call: got the tool 'shuot', must be one of shout, paint, recite, add\n"
    assert mistake(given, "--call", unknown) == told
    (folder / "file").touch()
    assert "error: --images: file cannot be written: " in mistake(given, "--images", "file")


def test_a_sandbox_that_does_not_work_is_a_mistake(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda _: None)
    told = mistake(config({"names": ["python"], "cache": "another"}))
    assert told.startswith("error: tools.sandbox: 'bubblewrap' does not work here: bubblewrap is not installed")


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string"}, "test"),
        ({"type": "integer"}, 1),
        ({"type": ["number", "null"]}, 1),
        ({"type": "boolean"}, True),
        ({"type": "null"}, None),
        ({"type": "array", "items": {"type": "boolean"}}, [True]),
        ({"type": "array"}, ["test"]),
        ({"type": "object"}, {}),
        ({"properties": {"a": {"type": "integer"}, "b": {}}, "required": ["a"]}, {"a": 1}),
        ({"type": "integer", "default": 0, "examples": [7]}, 0),
        ({"const": None}, None),
        ({"enum": ["x", "y"]}, "x"),
        ({"type": "integer", "examples": [7, 8]}, 7),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, 1),
        ({"$ref": "#/$defs/Side"}, 32),
        ({"$ref": "#/$defs/Endless"}, "test"),
        ({"$ref": "#/$defs/nowhere"}, "test"),
        ({"$ref": "https://elsewhere"}, "test"),
        ({}, "test"),
        (True, "test"),
    ],
)
def test_a_sample_follows_the_schema(schema: Any, value: object):
    root = {"$defs": {"Side": {"enum": [32, 64]}, "Endless": {"$ref": "#/$defs/Endless"}}}
    assert sample(schema, root) == value
