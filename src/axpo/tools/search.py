"""The search tool: a query to a provider, its hits as text within a budget of tokens."""

import math
from collections.abc import Callable, Sequence

from axpo.tools.base import PolicyFault, Tool, ToolError
from axpo.tools.providers import Hit, Provider

Shorten = Callable[[str, int], str]
"""Cuts a text to its first n tokens; a text of at most n tokens comes back as it is."""

NOTHING = "No results."


def make_search(provider: Provider, top_k: int = 3, shorten: Shorten | None = None, tokens: int | None = None) -> Tool:
    """The tool `search`, which shows the `top_k` best hits of a provider.

    With `shorten` and `tokens` a result has at most `tokens` tokens: each hit has its fair share of them, and what
    short ones leave goes to the others. How long a search takes is never the policy's doing, so the tool itself has no
    deadline; providers have their own.

    Raises ToolError where only one of `shorten` and `tokens` is given, or too few tokens for "No results.".
    """
    if (shorten is None) != (tokens is None):
        raise ToolError("search: shorten and tokens go together")
    if shorten is not None and tokens is not None and (tokens < 1 or shorten(NOTHING, tokens) != NOTHING):
        raise ToolError(f"tools.search_tokens: a result of {tokens} tokens is too short to be read")

    async def search(query: str) -> str:
        """Search the documents.

        Args:
            query: Words to look for.
        """
        if not query.strip():
            raise PolicyFault("the query is empty.")
        if provider.longest is not None and len(query) > provider.longest:
            raise PolicyFault(
                f"the query has {len(query)} characters, but at most {provider.longest} are allowed. Use fewer words."
            )
        hits = await provider.search(query, top_k)
        if not hits:
            return NOTHING
        return show(hits) if shorten is None or tokens is None else fit(hits, shorten, tokens)

    search.timeout = math.inf  # type: ignore[attr-defined]
    search.counts = False  # type: ignore[attr-defined]
    search.provider = provider  # type: ignore[attr-defined]
    return search


def show(hits: Sequence[Hit]) -> str:
    """Hits as the policy reads them: TITLE: TEXT on a line, or title, link and text on lines of their own."""
    shown = []
    for rank, (title, link, text) in enumerate(hits, 1):
        if link:
            shown.append("\n".join(filter(None, (f"{rank}. {title}".rstrip(), link, text))))
        else:
            shown.append(f"{rank}. {': '.join(filter(None, (title, text)))}")
    return ("\n\n" if any(hit.link for hit in hits) else "\n").join(shown)


def fit(hits: Sequence[Hit], shorten: Shorten, tokens: int) -> str:
    """Hits within `tokens` tokens: the longest cap on their texts under which all fit, found by bisection.

    A cut text ends in " …". Where even the titles and links take too much, the last hits are left out.
    """

    def cut(text: str, cap: int) -> str:
        start = shorten(text, cap)
        return text if start == text else f"{start.rstrip()} …".lstrip()

    def fits(shown: str) -> bool:
        return shorten(shown, tokens) == shown

    def capped(cap: int) -> str:
        return show([hit._replace(text=cut(hit.text, cap)) for hit in hits])

    whole = show(hits)
    if fits(whole):
        return whole
    hits = [hit._replace(text=cut(hit.text, tokens)) for hit in hits]  # more of them can never be shown
    while hits and not fits(capped(1)):
        hits = hits[:-1]
    if hits:
        return capped(_last(lambda cap: fits(capped(cap)), tokens))
    return cut(whole, _last(lambda cap: fits(cut(whole, cap)), tokens))


def _last(holds: Callable[[int], bool], high: int) -> int:
    """The last number from 1 to `high` for which it holds, given that it does for 1 and stops only once."""
    low = 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
