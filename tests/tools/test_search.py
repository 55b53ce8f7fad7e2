import asyncio
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axpo.tools.base import Conversation, Toolbox, ToolError, ToolResult
from axpo.tools.corpus import open_corpus
from axpo.tools.providers import Hit
from axpo.tools.search import make_search

DOCUMENTS = [
    {"title": "Velm", "text": "The tower of Velm has 41 steps."},
    {"title": "Oru", "text": "Oru is a town on a lake."},
    {"title": "Vitamin C", "text": "An acid. See also B and D."},
    {"title": "Lake Tarn", "text": "A lake, a deep lake, near Oru."},
]


def search(query: str, documents: Any = DOCUMENTS, top_k: int = 3) -> ToolResult:
    toolbox = Toolbox([make_search(open_corpus(documents), top_k)])
    return asyncio.run(toolbox.call("search", {"query": query}, Conversation()))


def test_results_are_numbered_best_first() -> None:
    assert search("lake").text == "1. Lake Tarn: A lake, a deep lake, near Oru.\n2. Oru: Oru is a town on a lake."
    assert search("lake", top_k=1).text == "1. Lake Tarn: A lake, a deep lake, near Oru."


@pytest.mark.parametrize(("query", "title"), [("41", "Velm"), ("what about C?", "Vitamin C"), ("VELM!", "Velm")])
def test_numbers_single_letters_and_capitals_are_found(query: str, title: str) -> None:
    assert search(query).text.startswith(f"1. {title}: ")


@pytest.mark.parametrize("query", ["zebra", "?!", "4"])
def test_nothing_found(query: str) -> None:
    assert search(query) == ToolResult("No results.")


@pytest.mark.parametrize("query", ["", " \n"])
def test_an_empty_query_is_the_fault_of_the_policy(query: str) -> None:
    assert search(query).fault == "bad_arguments"


def test_equal_documents_keep_their_order() -> None:
    texts = ["moss and stone" if i % 7 == 0 else "moss" if i % 3 == 0 else "stone" for i in range(50)]
    documents = [{"title": f"T{i}", "text": text} for i, text in enumerate(texts)]
    assert search("moss", documents).text == "1. T3: moss\n2. T6: moss\n3. T9: moss"


def bm25(query: str, documents: list[str]) -> list[float]:
    """Robertson's BM25 with Lucene's idf, written out: k1 1.5, b 0.75."""
    split = [Counter(document.split()) for document in documents]
    mean = sum(sum(counts.values()) for counts in split) / len(split)
    scores = []
    for counts in split:
        score = 0.0
        for word in query.split():
            having = sum(word in other for other in split)
            idf = math.log(1 + (len(split) - having + 0.5) / (having + 0.5))
            score += idf * counts[word] / (counts[word] + 1.5 * (1 - 0.75 + 0.75 * sum(counts.values()) / mean))
        scores.append(score)
    return scores


sentences = st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=6).map(" ".join)


@settings(max_examples=60)
@given(st.lists(sentences, min_size=1, max_size=12), sentences)
def test_the_ranking_is_bm25(texts: list[str], query: str) -> None:
    documents = [{"title": f"{number}", "text": text} for number, text in enumerate(texts)]
    expected = bm25(query, [f"{d['title']} {d['text']}" for d in documents])
    result = search(query, documents, top_k=4).text
    found = [int(number) for number in re.findall(r"^\d+\. (\d+):", result, re.MULTILINE)]
    assert len(found) == min(4, sum(score > 0 for score in expected))
    # float32 inside the index: equal to 1e-5, so neighbours that close may be in either order
    for place, number in enumerate(found):
        assert expected[number] == pytest.approx(sorted(expected, reverse=True)[place], abs=1e-5)


def test_files(tmp_path: Path) -> None:
    lines = tmp_path / "corpus.jsonl"
    lines.write_text("\n\n".join(json.dumps(document) for document in DOCUMENTS), encoding="utf-8")
    table = tmp_path / "corpus.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(DOCUMENTS), table)
    assert search("lake", lines) == search("lake", table) == search("lake")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"title": "a", "text": "b"}\nnot json\n', r"corpus\.jsonl:2: not valid JSON"),
        ('{"title": "a", "text": "b"}\n\n{"title": "a"}\n', r"corpus\.jsonl:3: 'text' is missing"),
        ('{"title": 3, "text": "b"}\n', r"corpus\.jsonl:1: 'title' is missing, empty or not a string"),
        ('{"title": "a", "text": " "}\n', r"corpus\.jsonl:1: 'text'"),
        ("[1]\n", r"corpus\.jsonl:1: a document is an object"),
        ("\n", r"corpus\.jsonl is empty"),
        (b"\xff\xfe", r"corpus\.jsonl cannot be read"),
    ],
)
def test_a_bad_corpus_is_named_with_the_line(tmp_path: Path, content: str | bytes, complaint: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ToolError, match=complaint):
        open_corpus(path)


def test_a_corpus_that_is_missing_or_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"nowhere\.jsonl cannot be read"):
        open_corpus(tmp_path / "nowhere.jsonl")
    with pytest.raises(ToolError, match=r"nowhere\.parquet cannot be read"):
        open_corpus(tmp_path / "nowhere.parquet")
    with pytest.raises(ToolError, match=r"corpus\.csv: a corpus is a \.jsonl or a \.parquet file"):
        open_corpus(tmp_path / "corpus.csv")
    with pytest.raises(ToolError, match="the corpus is empty"):
        open_corpus([])


def test_a_bad_parquet_file(tmp_path: Path) -> None:
    other = tmp_path / "other.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"name": ["a"], "text": ["b"]}), other)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 no more")
    null = tmp_path / "null.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"title": ["a", None], "text": ["b", "c"]}), null)
    with pytest.raises(ToolError, match=r"other\.parquet"):
        open_corpus(other)
    with pytest.raises(ToolError, match=r"broken\.parquet: not a Parquet file"):
        open_corpus(broken)
    with pytest.raises(ToolError, match=r"null\.parquet:2: 'title'"):
        open_corpus(null)


class Fixed:
    """A provider that always finds the same."""

    longest: int | None = 50

    def __init__(self, *hits: Hit) -> None:
        self.hits = list(hits)

    async def search(self, query: str, count: int) -> list[Hit]:
        return self.hits[:count]


def by_word(text: str, count: int) -> str:
    """A token is a word with the space around it."""
    return "".join(re.findall(r"\s*\S+\s*|\s+", text)[:count])


def by_letter(text: str, count: int) -> str:
    return text[:count]


def found(hits: list[Hit], shorten: Any = None, tokens: int | None = None) -> str:
    toolbox = Toolbox([make_search(Fixed(*hits), 10, shorten, tokens)])
    return asyncio.run(toolbox.call("search", {"query": "x"}, Conversation())).text


def words(count: int) -> str:
    return " ".join(f"w{i}" for i in range(count))


def test_links_have_lines_of_their_own() -> None:
    hits = [
        Hit("Velm", "https://velm.example", "A tower."),
        Hit("", "https://x.example", ""),
        Hit("Oru", "", "A town."),
    ]
    assert found(hits) == "1. Velm\nhttps://velm.example\nA tower.\n\n2.\nhttps://x.example\n\n3. Oru: A town."
    assert found([Hit("Velm", "", ""), Hit("", "", "A town.")]) == "1. Velm\n2. A town."


def test_what_short_texts_leave_goes_to_the_long_ones() -> None:
    # Without the texts "1. A: 2. B: 3. C:" are 6 words; 24 are left: 2 for B, 11 each for A and C, of which one is "…".
    hits = [Hit("A", "", words(40)), Hit("B", "", "two words"), Hit("C", "", words(12))]
    text = found(hits, by_word, 30)
    assert text == f"1. A: {words(10)} …\n2. B: two words\n3. C: {words(10)} …"
    assert len(text.split()) == 30


def test_what_fits_is_shown_whole() -> None:
    hits = [Hit("A", "", words(40)), Hit("B", "https://b.example", words(3))]
    whole = found(hits)
    count = len(whole.split())
    assert found(hits, by_word, count) == whole
    assert found(hits, by_word, count - 1) != whole


def test_where_titles_take_too_much_the_last_hits_go() -> None:
    hits = [Hit(f"T{i} {words(5)}", "", words(9)) for i in range(4)]
    text = found(hits, by_word, 18)
    assert text == f"1. T0 {words(5)}: w0 …\n2. T1 {words(5)}: w0 …"
    assert found([Hit(words(50), "", "x")], by_word, 6) == "1. w0 w1 w2 w3 …"


texts = st.text(st.sampled_from("ab ….\n"), max_size=60)


@settings(max_examples=150)
@given(st.lists(st.builds(Hit, texts, st.sampled_from(["", "https://x.example"]), texts), max_size=4), st.data())
def test_a_result_is_within_its_tokens(hits: list[Hit], data: st.DataObject) -> None:
    shorten = data.draw(st.sampled_from([by_word, by_letter]))
    tokens = data.draw(st.integers(11, 150))
    text = found(hits, shorten, tokens)
    assert shorten(text, tokens) == text
    if text != found(hits):
        assert "…" in text or len(text) < len(found(hits))


def test_a_real_tokenizer(tokenizer: Any) -> None:
    def shorten(text: str, count: int) -> str:
        ids = tokenizer.encode(text, add_special_tokens=False)
        return text if len(ids) <= count else tokenizer.decode(ids[:count]).rstrip("\ufffd")

    hits = [Hit("Velm", "https://velm.example", "Ein Türmchen — 塔の高さ。 " * 20), Hit("Oru", "", "the town " * 30)]
    for tokens in (40, 90, 200):
        text = found(hits, shorten, tokens)
        assert tokens - 12 < len(tokenizer.encode(text, add_special_tokens=False)) <= tokens


def test_budgets_that_cannot_work() -> None:
    with pytest.raises(ToolError, match="shorten and tokens go together"):
        make_search(Fixed(), tokens=100)
    with pytest.raises(ToolError, match=r"tools\.search_tokens: a result of 1 tokens is too short"):
        make_search(Fixed(), shorten=by_word, tokens=1)


def test_a_query_of_too_many_letters() -> None:
    toolbox = Toolbox([make_search(Fixed())])
    result = asyncio.run(toolbox.call("search", {"query": "x" * 51}, Conversation()))
    assert result.fault == "bad_arguments"
    assert result.text == "Error: the query has 51 characters, but at most 50 are allowed. Use fewer words."


def test_a_slow_provider_is_not_the_fault_of_the_policy() -> None:
    class Slow(Fixed):
        async def search(self, query: str, count: int) -> list[Hit]:
            await asyncio.sleep(0.05)
            return []

    toolbox = Toolbox([make_search(Slow())], timeout=0.01)
    assert asyncio.run(toolbox.call("search", {"query": "x"}, Conversation())) == ToolResult("No results.")
