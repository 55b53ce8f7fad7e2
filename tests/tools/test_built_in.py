"""The tools with names, made from a config's options: which provider, which key, which folder, which limit."""

import asyncio
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from axpo.config import load_config
from axpo.tools.base import Conversation, Tool, Toolbox, ToolError, ToolResult, encode_png
from axpo.tools.built_in import Documents, built_in
from axpo.tools.search import NOTHING

DOCUMENTS = [
    {"title": "Velm", "text": "The tower of Velm has 41 steps, " + "and " * 40 + "no lift."},
    {"title": "Oru", "text": "Oru is a town on a lake."},
]
IMAGE = encode_png(PIL.Image.new("RGB", (80, 60), "red"))


def shorten(text: str, words: int) -> str:
    """The first words of a text: here a token is a word."""
    ends = [word.end() for word in re.finditer(r"\S+", text)]
    return text if len(ends) <= words else text[: ends[words - 1]]


def make(cache: Path, name: str, documents: Documents = DOCUMENTS, **options: Any) -> Any:
    """The tool of this name under these options."""
    config = load_config(None, [f"tools={json.dumps({'cache': str(cache)} | options)}"])
    return built_in(config.tools, lambda: documents, shorten)[name]()


def call(tool: Tool, images: Sequence[bytes] = (IMAGE,), **arguments: Any) -> ToolResult:
    async def story() -> ToolResult:
        async with Conversation(images) as conversation:
            return await Toolbox([tool]).call(tool.__name__, arguments, conversation)

    return asyncio.run(story())


def written(folder: Path) -> Path:
    """The documents in a file."""
    (folder / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DOCUMENTS))
    return folder / "documents.jsonl"


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("TAVILY_API_KEY", "SERPER_API_KEY", "MY_KEY"):
        monkeypatch.setenv(variable, f"the-value-of-{variable}")


@pytest.fixture
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("TAVILY_API_KEY", "SERPER_API_KEY", "MY_KEY"):
        monkeypatch.delenv(variable, raising=False)


# Search ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "provider"),
    [
        ("local", "local corpus of 2 documents, BM25"),
        ("tavily", "tavily https://api.tavily.com"),
        ({"tavily": "http://mine:1/"}, "tavily http://mine:1"),
        ("serper", "serper https://google.serper.dev"),
        ({"serper": "http://mine:2"}, "serper http://mine:2"),
        ({"searxng": "http://mine:3"}, "searxng http://mine:3"),
        ({"url": "http://mine:4/?q={query}&key={key:MY_KEY}"}, "endpoint http://mine:4/?q={query}&key={key:MY_KEY}"),
    ],
)
@pytest.mark.usefixtures("keys")
def test_search_asks_the_provider_that_is_named(tmp_path: Path, choice: Any, provider: str) -> None:
    assert str(make(tmp_path, "search", search=choice).provider) == provider


@pytest.mark.parametrize("name", ["tavily", "serper", "searxng", "url"])
def test_what_a_provider_finds_is_shown_and_kept_under_the_cache(tmp_path: Path, search_server: Any, name: str) -> None:
    address = f"{search_server.url}/{name}"
    if name == "url":
        address, search_server.answer = f"{search_server.url}/any?q={{query}}", search_server.results
    for _ in range(2):  # the second time it is another process, as it were
        tool = make(tmp_path, "search", search={name: address}, search_results=1)
        assert call(tool, query="tower").text.splitlines()[0] == "1. Velm"
    assert len(search_server.requests) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["search"]


def test_search_keeps_to_its_rate(tmp_path: Path, search_server: Any) -> None:
    tool = make(tmp_path, "search", search={"tavily": f"{search_server.url}/tavily"}, search_rate=10.0)

    async def story() -> None:
        toolbox = Toolbox([tool])
        await asyncio.gather(*(toolbox.call("search", {"query": f"q{n}"}, Conversation()) for n in range(3)))

    asyncio.run(story())
    times = [request.time for request in search_server.requests]
    assert times[-1] - times[0] > 0.15  # 0.2 as they are sent; how long they take to arrive varies


def test_the_index_of_a_corpus_is_kept_under_the_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert call(make(cache, "search", written(tmp_path)), query="lake").text == "1. Oru: Oru is a town on a lake."
    assert [path.name.partition("-")[0] for path in cache.iterdir()] == ["bm25"]


def test_a_result_is_cut_to_its_tokens(tmp_path: Path) -> None:
    start = "1. Oru: Oru is a town on a lake.\n2. Velm: The tower of Velm has 41 steps"
    whole = call(make(tmp_path, "search", search_tokens=100), query="tower lake").text
    assert whole.startswith(start)
    assert whole.endswith("and no lift.")
    cut = call(make(tmp_path, "search", search_tokens=20), query="tower lake").text
    assert len(cut.split()) <= 20
    assert cut.startswith(start)
    assert cut.endswith(" …")
    assert call(make(tmp_path, "search", search_results=1), query="tower lake").text.count("\n") == 0
    assert call(make(tmp_path, "search"), query="zebra").text == NOTHING


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ("tavily", "the environment variable TAVILY_API_KEY is not set; it holds the key for tavily"),
        ("serper", "the environment variable SERPER_API_KEY is not set; it holds the key for serper"),
        ({"url": "http://mine/?q={query}&k={key:MY_KEY}"}, "the environment variable MY_KEY is not set"),
        ({"url": "http://mine/"}, "lacks the place for the query, {query}"),
        ({"searxng": "mine"}, "'mine' is not an address"),
    ],
)
@pytest.mark.usefixtures("no_keys")
def test_search_that_cannot_work_is_refused(tmp_path: Path, choice: Any, told: str) -> None:
    with pytest.raises(ToolError, match=r"^tools\.search: ") as caught:
        make(tmp_path, "search", search=choice)
    assert told in str(caught.value)


def test_a_corpus_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text("{}\n")
    with pytest.raises(ToolError, match=r"^tools\.corpus: .*corpus\.jsonl:1: 'title' is missing"):
        make(tmp_path, "search", tmp_path / "corpus.jsonl")
    with pytest.raises(ToolError, match=r"^tools\.cache: the index cannot be kept in .*corpus\.jsonl"):
        make(tmp_path / "corpus.jsonl", "search", written(tmp_path))
    with pytest.raises(ToolError, match=r"^tools\.embedder: .*nowhere is not a folder; must be that of a sentence-"):
        make(tmp_path, "search", embedder=str(tmp_path / "nowhere"))


def test_local_search_needs_documents(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"^tools\.corpus: the tool 'search' needs a \.jsonl"):
        make(tmp_path, "search", None)


# Image search ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "provider"),
    [
        ({"url": "http://mine:1/images?k={key:MY_KEY}"}, "endpoint http://mine:1/images?k={key:MY_KEY}"),
        ({"serper": "http://mine:2/upload"}, "serper https://google.serper.dev"),
    ],
)
@pytest.mark.usefixtures("keys")
def test_image_search_asks_the_provider_that_is_named(tmp_path: Path, choice: Any, provider: str) -> None:
    assert str(make(tmp_path, "image_search", image_search=choice).provider) == provider


def test_image_search_in_a_table(tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    table.write_text(json.dumps({"sha256": hashlib.sha256(IMAGE).hexdigest(), "results": [{"title": "A red wall"}]}))
    tool = make(tmp_path, "image_search", image_search={"table": str(table)})
    assert str(tool.provider) == f"table {table}"
    assert call(tool, img_idx=0) == ToolResult("1. A red wall")


def test_images_that_were_found_are_kept_under_the_cache(tmp_path: Path, search_server: Any) -> None:
    search_server.results = [{"title": "A wall", "thumbnail": f"{search_server.url}/thumbnails/40.png"}]
    for _ in range(2):
        tool = make(tmp_path, "image_search", image_search={"url": f"{search_server.url}/images"})
        assert call(tool, img_idx=0).text == "1. A wall (thumbnail 1)"
    assert [request.path for request in search_server.requests] == ["/images", "/thumbnails/40.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["image_search"]


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        (None, "the tool 'image_search' needs it, to know where to search"),
        ({"serper": "http://mine"}, "the environment variable SERPER_API_KEY is not set"),
        ({"url": "http://mine/{key:MY_KEY}"}, "the environment variable MY_KEY is not set"),
        ({"table": "/nowhere.jsonl"}, "the image table /nowhere.jsonl cannot be read"),
    ],
)
@pytest.mark.usefixtures("no_keys")
def test_image_search_that_cannot_work_is_refused(tmp_path: Path, choice: Any, told: str) -> None:
    with pytest.raises(ToolError, match=r"^tools\.image_search: ") as caught:
        make(tmp_path, "image_search", image_search=choice)
    assert told in str(caught.value)


# Zoom and Python ------------------------------------------------------------------------------------------------------


def test_zoom_enlarges_to_the_given_pixels(tmp_path: Path) -> None:
    tool = make(tmp_path, "zoom", zoom_pixels=32 * 96)
    (image,) = call(tool, bbox_2d=[0, 0, 500, 500], label="corner", img_idx=0).images
    assert image[16:24] == (64).to_bytes(4) + (64).to_bytes(4)  # width and height in a PNG file: at least 3072 pixels


def test_python_runs_at_the_level_and_within_the_deadline_of_the_options(tmp_path: Path) -> None:
    tool = make(tmp_path, "python", sandbox="none_i_trust_the_policy", timeout=0.5)
    assert tool.level == "none_i_trust_the_policy"
    assert call(tool, code="6 * 7").text == "42"
    assert call(tool, code="while True: pass").text == "Stopped after 0.5 s. All variables are lost."
    assert [path.name for path in tmp_path.iterdir()] == ["matplotlib"]


@pytest.mark.usefixtures("bubblewrap_sandbox")
def test_python_is_isolated_unless_the_options_say_otherwise(tmp_path: Path) -> None:
    tool = make(tmp_path, "python")
    assert tool.level == "bubblewrap"
    assert call(tool, code=f"import os; os.path.exists({str(Path(__file__))!r})").text == "False"


def test_a_remote_sandbox_that_does_not_answer_is_refused(tmp_path: Path) -> None:
    told = r"tools\.sandbox: no SandboxFusion service answers at http://127\.0\.0\.1:9: ConnectError"
    with pytest.raises(ToolError, match=told):
        make(tmp_path, "python", sandbox={"remote": "http://127.0.0.1:9"})
