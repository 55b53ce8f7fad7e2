"""Who answers a search: Tavily, Serper, a SearXNG instance, or any endpoint that answers JSON."""

import unicodedata
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote

from axpo.tools.base import ToolError
from axpo.tools.cache import Answers
from axpo.tools.keys import check_address, fill_keys, read_key, redact
from axpo.tools.web import Limits, Web, read_json

SERPER = "https://google.serper.dev"
LISTS = ("results", "items", "organic", "data", "hits")
TITLES, LINKS, TEXTS = ("title", "name"), ("url", "link", "href"), ("snippet", "content", "text", "description")
_KEPT = "\n\t\r\v\f\u200c\u200d"
_LONGEST_LINK = 500  # characters; a longer one would take the place of what is worth reading


class Hit(NamedTuple):
    """One thing found. `link` is "" where it has none."""

    title: str
    link: str
    text: str


class Provider(Protocol):
    """Who answers a search. `longest` is how many characters a query may have, None for any number."""

    longest: int | None

    async def search(self, query: str, count: int) -> list[Hit]:
        """At most `count` hits, the best first. Raises SystemFault where the provider fails."""
        ...


class WebProvider:
    """A provider that is asked over HTTP. `ask` sends one query and returns the items of the answer."""

    def __init__(
        self,
        identity: str,
        ask: Callable[[str, int], Awaitable[list[Hit]]],
        longest: int,
        cache: Path | None,
    ) -> None:
        self.longest: int | None = longest
        self._identity, self._ask, self._answers = identity, ask, Answers(list[Hit], cache)

    def __str__(self) -> str:
        return self._identity

    async def search(self, query: str, count: int) -> list[Hit]:
        query = clean(query)
        if not query:
            return []

        async def ask() -> list[Hit]:
            return (await self._ask(query, count))[:count]

        question = {"provider": self._identity, "query": query, "count": count}
        return await self._answers.get(question, ask)


def tavily(
    base: str = "https://api.tavily.com", limits: Limits | None = None, cache: Path | None = None
) -> WebProvider:
    """Tavily: POST {base}/search with TAVILY_API_KEY as bearer token; `results` of `title`, `url`, `content`.

    https://docs.tavily.com/documentation/api-reference/endpoint/search, which allows 400 characters and 20 results; a
    status of 432 or 433 tells that the plan is used up. Raises ToolError without the key.
    """
    base, web = check_address(base, "tavily"), Web("tavily", limits)
    headers = {"Authorization": f"Bearer {read_key('TAVILY_API_KEY', 'tavily')}"}

    async def ask(query: str, count: int) -> list[Hit]:
        body = {"query": query, "max_results": min(count, 20), "search_depth": "basic"}
        advice = "check the key in TAVILY_API_KEY, and what is left of its plan"
        return await web.fetch("POST", f"{base}/search", _hits, advice, json=body, headers=headers)

    return WebProvider(f"tavily {base}", ask, 400, cache)


def serper(base: str = SERPER, limits: Limits | None = None, cache: Path | None = None) -> WebProvider:
    """Serper: POST {base}/search with SERPER_API_KEY as X-API-KEY; `organic` of `title`, `link`, `snippet`.

    https://serper.dev. An answer without `organic` is one that found nothing. Raises ToolError without the key.
    """
    base, web = check_address(base, "serper"), Web("serper", limits)
    headers = {"X-API-KEY": read_key("SERPER_API_KEY", "serper")}

    def read(body: bytes) -> list[Hit]:
        return clean_hits(organic(body))

    async def ask(query: str, count: int) -> list[Hit]:
        advice = "check the key in SERPER_API_KEY, and what is left of its credits"
        return await web.fetch("POST", f"{base}/search", read, advice, json={"q": query, "num": count}, headers=headers)

    return WebProvider(f"serper {base}", ask, 2000, cache)


def searxng(base: str, limits: Limits | None = None, cache: Path | None = None) -> WebProvider:
    """A SearXNG instance: GET {base}/search?q=…&format=json; `results` of `title`, `url`, `content`.

    https://docs.searxng.org/dev/search_api.html: 403 unless `json` is among `search.formats` in its settings.yml. An
    answer that found nothing and names engines that failed (`unresponsive_engines`) is a fault, not "nothing found".
    """
    base, web = check_address(base, "searxng"), Web("searxng", limits)

    def read(body: bytes) -> list[Hit]:
        answer = read_json(body)
        hits = clean_hits(items(answer))
        if not hits and isinstance(answer, dict) and answer.get("unresponsive_engines"):
            raise ValueError(f"its engines do not answer: {answer['unresponsive_engines']}")
        return hits

    async def ask(query: str, count: int) -> list[Hit]:
        advice = f"check the address {base}, and that json is among search.formats in the settings.yml of the instance"
        params = {"q": query, "format": "json"}
        return await web.fetch("GET", f"{base}/search", read, advice, params=params)

    return WebProvider(f"searxng {base}", ask, 2000, cache)


def endpoint(template: str, limits: Limits | None = None, cache: Path | None = None) -> WebProvider:
    """Any endpoint that is asked by GET and answers JSON.

    `template` is its address with {query}, and {count} if it takes one. {key:VARIABLE} stands for the key in that
    environment variable. The answer is a list, or an object with one in `results`, `items`, `organic`, `data` or
    `hits`. What is in the list are objects with `title` or `name`, `url`, `link` or `href`, and `snippet`, `content`,
    `text` or `description`.

    Raises ToolError for a template that is no such address, and without the keys.
    """
    purpose = "the search endpoint"
    if "{query}" not in template:
        raise ToolError(f"{purpose} {template!r} lacks the place for the query, {{query}}")
    address = fill_keys(template, purpose, in_url=True)
    if {"{", "}"} & set(address.replace("{query}", "").replace("{count}", "")):
        raise ToolError(f"{purpose} {template!r}: only {{query}}, {{count}} and {{key:VARIABLE}} may stand in braces")
    check_address(address.replace("{query}", "x").replace("{count}", "1"), purpose)
    web = Web(purpose, limits)

    async def ask(query: str, count: int) -> list[Hit]:
        url = address.replace("{count}", str(count)).replace("{query}", quote(query, safe=""))
        return await web.fetch("GET", url, _hits, "check its address and key")

    return WebProvider(f"endpoint {template}", ask, 2000, cache)


def organic(body: bytes) -> list[Any]:
    """The list in an answer of Serper's, empty where it found nothing. Raises ValueError for what is none."""
    answer = read_json(body)
    if not isinstance(answer, dict) or not {"organic", "searchParameters"} & answer.keys():
        raise ValueError("the answer is no list of search results")
    found = answer.get("organic") or []
    if not isinstance(found, list):
        raise ValueError("`organic` is no list")
    return found


def items(answer: Any) -> list[Any]:
    """The list in an answer. Raises ValueError that says where it was looked for."""
    if isinstance(answer, dict):
        answer = next((answer[key] for key in LISTS if isinstance(answer.get(key), list)), None)
    if not isinstance(answer, list):
        raise ValueError(f"the answer is neither a list nor an object with one of the lists {', '.join(LISTS)}")
    return answer


def clean_hits(found: Iterable[Any]) -> list[Hit]:
    """The hits in the objects of an answer; those with neither a title nor a text are left out."""
    hits = []
    for item in found:
        if isinstance(item, dict):
            title, link, text = (first(item, keys) for keys in (TITLES, LINKS, TEXTS))
            link = link.replace(" ", "%20")
            if title or text:
                hits.append(Hit(title, link if len(link) <= _LONGEST_LINK else "", text))
    return hits


def first(item: Mapping[str, Any], keys: Iterable[str]) -> str:
    """The first text among these keys, cleaned; "" if there is none."""
    return next((clean(value) for key in keys if isinstance(value := item.get(key), str) and value.strip()), "")


def clean(text: str) -> str:
    """Text of strangers on one line, without keys and without what is not seen: control, format, lone surrogates.

    The joiners of scripts and emoji, U+200C and U+200D, stay.
    """
    shown = (c for c in redact(text) if c in _KEPT or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    return " ".join("".join(shown).split())


def _hits(body: bytes) -> list[Hit]:
    return clean_hits(items(read_json(body)))
