import asyncio
import json
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from axpo.tools.base import Conversation, SystemFault, Toolbox, ToolError, ToolResult
from axpo.tools.providers import Hit, WebProvider, clean, endpoint, searxng, serper, tavily
from axpo.tools.search import make_search
from axpo.tools.web import Limits

QUICK = Limits(timeout=0.5, attempts=2, pause=0.01)
VELM = Hit("Velm", "https://velm.example/tower", "The tower of Velm has 41 steps.")
ORU = Hit("Oru", "https://oru.example", "Oru is a town on a lake.")
MAKERS: dict[str, Callable[..., WebProvider]] = {
    "tavily": lambda url, **given: tavily(f"{url}/tavily", **given),
    "serper": lambda url, **given: serper(f"{url}/serper/", **given),
    "searxng": lambda url, **given: searxng(f"{url}/searxng", **given),
    "template": lambda url, **given: endpoint(f"{url}/any?k={{key:MY_KEY}}&q={{query}}&n={{count}}", **given),
}


@pytest.fixture
def server(search_server: Any) -> Any:
    search_server.answer = search_server.results
    return search_server


def find(provider: WebProvider, query: str = "tower", count: int = 3) -> list[Hit]:
    return asyncio.run(provider.search(query, count))


@pytest.mark.parametrize("name", MAKERS)
def test_every_provider_finds(server: Any, name: str) -> None:
    provider = MAKERS[name](server.url, limits=QUICK)
    assert find(provider) == [VELM, ORU]
    assert find(provider, count=1) == [VELM]


def test_what_is_sent(server: Any) -> None:
    for name in MAKERS:
        find(MAKERS[name](server.url), "  how high\nis Ørsund & co? ", 5)
    to_tavily, to_serper, to_searxng, to_template = server.requests
    query = "how high is Ørsund & co?"
    assert to_tavily.json == {"query": query, "max_results": 5, "search_depth": "basic"}
    assert to_serper.json == {"q": query, "num": 5}
    assert to_searxng.query == {"q": query, "format": "json"}
    assert to_template.query == {"q": query, "n": "5", "k": server.key}


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_found_is_an_answer(server: Any, name: str) -> None:
    server.results, server.answer = [], []
    toolbox = Toolbox([make_search(MAKERS[name](server.url, limits=QUICK))])
    assert asyncio.run(toolbox.call("search", {"query": "x"}, Conversation())) == ToolResult("No results.")


@pytest.mark.parametrize(
    "answer",
    [
        [{"title": "Velm", "url": VELM.link, "snippet": VELM.text}],
        {"results": [{"name": "Velm", "link": VELM.link, "content": VELM.text}]},
        {"items": [{"title": "Velm", "href": VELM.link, "text": VELM.text}], "total": 1},
        {"organic": [{"title": "Velm", "link": VELM.link, "description": VELM.text}]},
        {"data": [{"title": " Velm\n", "url": VELM.link, "text": "", "description": VELM.text}]},
        {"hits": [{"title": None, "name": "Velm", "url": VELM.link, "text": VELM.text}, 3, {}, {"url": "x"}]},
    ],
)
def test_shapes_of_answers(server: Any, answer: Any) -> None:
    server.answer = answer
    assert find(MAKERS["template"](server.url)) == [VELM]


@pytest.mark.parametrize("answer", [{}, {"results": "many"}, "text", 3, None, {"error": "no"}])
def test_an_answer_that_is_not_understood_is_a_fault(server: Any, answer: Any) -> None:
    server.answer = answer
    with pytest.raises(SystemFault, match="neither a list nor an object with one of the lists results, items"):
        find(MAKERS["template"](server.url, limits=QUICK))
    assert len(server.requests) == 2


def test_engines_that_fail_are_not_nothing_found(server: Any) -> None:
    server.answer = {"results": [], "unresponsive_engines": [["brave", "too many requests"]]}
    search = searxng(f"{server.url}/any", limits=QUICK)
    server.respond = lambda request: (200, server.answer)
    with pytest.raises(SystemFault, match=r"its engines do not answer: .*brave"):
        find(search)


@pytest.mark.parametrize("name", MAKERS)
def test_a_run_is_repeated_from_the_cache(server: Any, name: str, tmp_path: Path) -> None:
    for _ in range(2):
        provider = MAKERS[name](server.url, cache=tmp_path)
        assert find(provider) == find(provider, " tower\n") == [VELM, ORU]
    assert len(server.requests) == 1
    find(MAKERS[name](server.url, cache=tmp_path), count=2)
    find(MAKERS[name](server.url, cache=tmp_path), "towers")
    assert len(server.requests) == 3


@pytest.mark.parametrize("damaged", [3, "text", [["Velm", "text"]], [["Velm", None, "text"]], ["abc"]])
def test_damage_to_the_cache_is_not_the_policys_fault(server: Any, tmp_path: Path, damaged: Any) -> None:
    provider = MAKERS["tavily"](server.url, cache=tmp_path)
    toolbox = Toolbox([make_search(provider)])
    found = asyncio.run(toolbox.call("search", {"query": "tower"}, Conversation()))
    [path] = tmp_path.rglob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"answer": damaged}))
    assert asyncio.run(toolbox.call("search", {"query": "tower"}, Conversation())) == found
    assert find(provider) == [VELM, ORU]
    assert len(server.requests) == 2


def test_providers_do_not_answer_for_each_other(server: Any, tmp_path: Path) -> None:
    for name in MAKERS:
        find(MAKERS[name](server.url, cache=tmp_path))
    assert len(server.requests) == len(MAKERS)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("faults", [["401"], ["500", "500"], ["drop", "drop"], ["garbage", "hang"], []])
def test_the_key_is_never_shown(
    server: Any, name: str, faults: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forms = [server.key, quote(server.key), quote(server.key, safe=""), quote(server.key, safe="/="), server.key[:5]]
    server.faults += faults
    server.results[0]["text"] = server.answer[0]["text"] = f"echoes {forms[0]} and {forms[2]}"
    shown = []
    with caplog.at_level(logging.DEBUG):
        provider = MAKERS[name](server.url, limits=QUICK, cache=tmp_path)
        shown += [str(provider), repr(provider), repr(make_search(provider))]
        try:
            shown.append(repr(find(provider)))
            assert not faults
        except SystemFault as fault:
            assert faults
            shown += [repr(fault), str(fault), "".join(traceback.format_exception(fault)), repr(fault.__context__)]
    assert "HTTP Request: " in caplog.text or "drop" in faults
    shown += [caplog.text, *(path.read_text() for path in tmp_path.rglob("*.json"))]
    assert len(list(tmp_path.rglob("*.json"))) == (0 if faults else 1)
    for text in shown:
        assert not any(form in text for form in forms), text
    if not faults or (name == "template" and faults[0] in ("401", "500")):
        assert any("***" in text for text in shown)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("tavily", "tavily: it answered 401 .*check the key in TAVILY_API_KEY"),
        ("serper", "serper: it answered 403 .*check the key in SERPER_API_KEY"),
    ],
)
def test_a_wrong_key_is_told(server: Any, name: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{name.upper()}_API_KEY", "wrong-key")
    with pytest.raises(SystemFault, match=advice) as caught:
        find(MAKERS[name](server.url))
    assert "wrong-key" not in str(caught.value)
    assert len(server.requests) == 1


def test_a_searxng_without_json_is_told(server: Any) -> None:
    server.faults += ["403"]
    with pytest.raises(SystemFault, match=r"json is among search\.formats in the settings\.yml"):
        find(MAKERS["searxng"](server.url))


@pytest.mark.parametrize(("name", "variable"), [("tavily", "TAVILY_API_KEY"), ("serper", "SERPER_API_KEY")])
def test_a_missing_key_is_told_when_the_tool_is_made(name: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ToolError, match=f"the environment variable {variable} is not set"):
        MAKERS[name]("http://127.0.0.1:9")
    monkeypatch.setenv(variable, "a\nb")
    with pytest.raises(ToolError, match=f"{variable} holds characters"):
        MAKERS[name]("http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("http://x/?q=", r"lacks the place for the query, \{query\}"),
        ("http://x/?q={query}&n={number}", r"only \{query\}, \{count\} and \{key:VARIABLE\} may stand in braces"),
        ("http://x/?q={query}&k={key:NOT_THERE}", "variable NOT_THERE is not set"),
        ("x/?q={query}", "begins with http:// or https://"),
        ("ftp://x/?q={query}", "begins with http:// or https://"),
        ("http://user:word@x/?q={query}", "holds a user or password"),
        ("http://x:y/?q={query}", "is not an address"),
    ],
)
def test_templates_that_cannot_work(template: str, complaint: str) -> None:
    with pytest.raises(ToolError, match=complaint) as caught:
        endpoint(template)
    assert "word" not in str(caught.value).replace("password", "")


def test_a_query_cannot_leave_its_place(server: Any) -> None:
    find(MAKERS["template"](server.url), "a&k=mine#{count}{key:MY_KEY}/../%2e\ud800\x00")
    assert server.requests[0].query == {"q": "a&k=mine#{count}{key:MY_KEY}/../%2e", "n": "3", "k": server.key}


@pytest.mark.parametrize(("name", "longest"), [("tavily", 400), ("serper", 2000)])
def test_a_long_query_is_the_fault_of_the_policy(server: Any, name: str, longest: int) -> None:
    toolbox = Toolbox([make_search(MAKERS[name](server.url))])
    result = asyncio.run(toolbox.call("search", {"query": "x" * (longest + 1)}, Conversation()))
    assert result.fault == "bad_arguments"
    assert f"at most {longest} are allowed. Use fewer words." in result.text
    assert asyncio.run(toolbox.call("search", {"query": "x" * longest}, Conversation())).fault is None
    assert len(server.requests) == 1


def test_one_toolbox_serves_several_loops_and_many_rollouts(server: Any) -> None:
    toolbox = Toolbox([make_search(MAKERS["tavily"](server.url))])

    async def many(word: str) -> set[str]:
        calls = [toolbox.call("search", {"query": f"{word} {i % 4}"}, Conversation()) for i in range(32)]
        return {result.text for result in await asyncio.gather(*calls)}

    assert asyncio.run(many("a")) == asyncio.run(many("b"))
    assert len(server.requests) == 8, "equal queries at once go out once"


def test_what_strangers_write_is_cleaned() -> None:
    text = " a\x00b\x1b[31m\u202ec \n\n\t d\u200b\ufeff\U000e0041 \ud800 क्\u200dष "
    assert clean(text) == "ab[31mc d क्\u200dष"


@pytest.mark.parametrize("organic", [5, {"a": 1}, "abc", [3], [{"title": {"a": 1}}]])
def test_results_of_another_shape_are_the_providers_fault(organic: Any, search_server: Any, tmp_path: Path) -> None:
    search_server.answer = {"organic": organic, "searchParameters": {}}
    search_server.respond = lambda request: (200, search_server.answer)
    provider = serper(f"{search_server.url}/serper", Limits(attempts=1, failures=None), tmp_path)
    if isinstance(organic, list):
        assert asyncio.run(provider.search("tower", 3)) == []
    else:
        with pytest.raises(SystemFault):
            asyncio.run(provider.search("tower", 3))
        assert list(tmp_path.rglob("*.json")) == []
