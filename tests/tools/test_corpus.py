import asyncio
import json
import logging
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axpo.tools.base import Conversation, Toolbox, ToolError
from axpo.tools.corpus import Index, kept, merge, open_corpus
from axpo.tools.documents import MappedDocuments, write_documents
from axpo.tools.providers import Hit
from axpo.tools.search import make_search

DOCUMENTS = [
    {"title": "Velm", "text": "The tower of Velm has 41 steps."},
    {"title": "Oru", "text": "Oru is a town\non a lake.", "url": "https://oru.example"},
    {"title": "Vitamin C", "text": "An acid. See also B and D.", "url": None},
    {"title": "Lake Tarn", "text": "A lake, a deep lake, near Oru. \ud800"},
]


def write(path: Path, documents: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(document) for document in documents), encoding="utf-8")
    return path


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return write(tmp_path / "corpus.jsonl", DOCUMENTS)


def never(*_: Any) -> None:
    raise AssertionError("built once more")


def test_an_index_is_kept_and_mapped(lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "deep" / "cache"
    first = open_corpus(lines, cache)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(Index, "build", never)
    second = open_corpus(lines, cache)
    for corpus in (first, second):
        assert isinstance(corpus.documents, MappedDocuments)
        assert isinstance(corpus.index.words, np.memmap)
        assert isinstance(corpus.index.bm25.scores["data"], np.memmap)
    assert first.find("a lake", 3) == second.find("a lake", 3)
    assert [hit.title for hit in second.find("a lake", 3)] == ["Lake Tarn", "Oru"]


def test_what_is_kept_reads_the_same(lines: Path, tmp_path: Path) -> None:
    table = tmp_path / "corpus.parquet"
    clean = [{"url": None} | document | {"text": document["text"].replace("\ud800", "?")} for document in DOCUMENTS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(clean), table)
    sources = [open_corpus(s, c) for s in (lines, table) for c in (None, tmp_path / "cache")]
    sources.append(open_corpus(DOCUMENTS))
    boxes = [Toolbox([make_search(corpus)]) for corpus in sources]
    for query in ("lake", "41", "oru lake velm c", "zebra", "??", "\ud800"):
        texts = {asyncio.run(box.call("search", {"query": query}, Conversation())).text for box in boxes}
        assert len(texts) == 1, texts
    expected = (
        "1. Oru\nhttps://oru.example\nOru is a town\non a lake.\n\n2. Lake Tarn: A lake, a deep lake, near Oru. ?"
    )
    assert asyncio.run(boxes[0].call("search", {"query": "oru"}, Conversation())).text == expected


word = st.sampled_from("abcdefg")


@settings(max_examples=40)
@given(st.lists(st.lists(word, min_size=1, max_size=6), min_size=1, max_size=12), st.lists(word, max_size=4))
def test_ranking_is_that_of_bm25s_with_a_stable_sort(texts: list[list[str]], query: list[str]) -> None:
    import bm25s

    reference = bm25s.BM25()
    reference.index([["t", *text] for text in texts], show_progress=False)
    known = [w for w in query if w in reference.vocab_dict]
    scores = reference.get_scores(known) if known else np.zeros(len(texts))
    expected = [i for i in np.argsort(-scores, kind="stable") if scores[i] > 0]
    index = Index.build(" ".join(["t", *text]) for text in texts)
    for count in (1, 3, 20):
        assert index.best(" ".join(query), count).tolist() == expected[:count]


def test_a_file_that_changes_is_indexed_anew(lines: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    open_corpus(lines, cache)
    write(lines, [{"title": "Zebra", "text": "striped"}])
    old = open_corpus(lines, cache)
    assert old.find("zebra lake", 3) == [Hit("Zebra", "", "striped")]
    os.utime(lines, ns=(0, 0))
    assert open_corpus(lines, cache).find("zebra", 3) == old.find("zebra", 3), "what is open stays"
    assert len(list(cache.iterdir())) == 1, "what is out of date is removed"
    other = write(tmp_path / "other.jsonl", DOCUMENTS)
    open_corpus(other, cache)
    assert len(list(cache.iterdir())) == 2, "of this file only"


@pytest.mark.parametrize("name", ["documents.arrow", "words.npy", "data.csc.index.npy", "params.index.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "noise"])
def test_a_corrupt_index_is_built_anew(
    lines: Path, tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    expected = open_corpus(lines, cache).find("a lake", 3)
    [path] = cache.glob(f"*/{name}")
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "half": content[: len(content) // 2], "noise": b"\x80" * 300}[damage])
    with caplog.at_level(logging.WARNING):
        assert open_corpus(lines, cache).find("a lake", 3) == expected
    assert "is built anew" in caplog.text
    caplog.clear()
    open_corpus(lines, cache)
    assert not caplog.text
    assert len(list(cache.iterdir())) == 1


def _open(lines: Path, cache: Path) -> None:
    assert len(open_corpus(lines, cache).find("lake", 3)) == 2


def test_several_processes_may_build_at_once(lines: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_open, args=(lines, tmp_path / "cache")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_nothing_half_made_is_left_behind(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    bad = tmp_path / "corpus.jsonl"
    bad.write_text('{"title": "a", "text": "b"}\nnot json\n')
    for _ in range(2):
        with pytest.raises(ToolError, match=r"corpus\.jsonl:2: not valid JSON"):
            open_corpus(bad, cache)
    assert list(cache.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ToolError, match=r"the index cannot be kept in .*file"):
        open_corpus(write(bad, DOCUMENTS), tmp_path / "file")


def test_one_who_was_slower_takes_what_is_there(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "mine").touch()
        kept(tmp_path, "k", ["p"], lambda inner: (inner / "theirs").touch(), lambda _: None)

    folder = kept(tmp_path, "k", ["p"], build, lambda _: None)
    assert [path.name for path in folder.iterdir()] in (["mine"], ["theirs"])


def test_many_documents_pass_through_in_batches(tmp_path: Path) -> None:
    documents = [Hit(f"T{i}", "", f"word{i % 7} é") for i in range(9000)]
    assert list(write_documents(documents, tmp_path / "d.arrow")) == documents
    mapped = MappedDocuments(tmp_path / "d.arrow")
    assert len(mapped) == 9000
    assert [mapped[i] for i in (0, 4095, 4096, 8999)] == [documents[i] for i in (0, 4095, 4096, 8999)]
    assert mapped[4090:4100] == documents[4090:4100]


def test_documents_without_words_are_a_corpus_in_which_nothing_is_found() -> None:
    assert open_corpus([{"title": "?!", "text": "…"}]).find("a ?", 3) == []


@pytest.mark.parametrize("url", [3, ["x"]])
def test_a_url_is_a_string(url: Any) -> None:
    with pytest.raises(ToolError, match="document:1: 'url' is not a string"):
        open_corpus([{"title": "a", "text": "b", "url": url}])


def test_reciprocal_rank_fusion() -> None:
    # 7: 1/61 + 1/63, 5: 1/62 + 1/62, 1: 1/63, 9: 1/61; 7 is the first by a hair, as 1/x is convex
    assert merge([[7, 5, 1], [9, 5, 7]]) == [7, 5, 9, 1]
    assert merge([[4, 2], [2, 4]]) == [2, 4], "equal ones in their order"
    assert merge([[], [3]]) == [3]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose text vectors are the means of random vectors of their words."""
    pytest.importorskip("sentence_transformers")
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[UNK]", "[PAD]", "tower", "lake", "acid", "steps", "deep", "near", "the", "a", "of", "velm", "oru"]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    core.normalizer, core.pre_tokenizer = Lowercase(), pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("embedder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder / "bert")
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder / "bert"
    )
    transformer = Transformer(str(folder / "bert"))
    SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu").save(str(folder / "whole"))
    return folder / "whole"


def test_embeddings(embedder: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sentence_transformers import SentenceTransformer

    cache = tmp_path / "cache"
    first = open_corpus(lines, cache, embedder)
    in_memory = open_corpus(lines, None, embedder)
    assert first.embeddings is not None
    assert in_memory.embeddings is not None

    model = SentenceTransformer(str(embedder), device="cpu")
    texts = [f"{d['title']}\n{d['text']}".replace("\ud800", "?") for d in DOCUMENTS]
    reference = model.encode(texts, normalize_embeddings=True)
    assert np.allclose(first.embeddings.matrix, reference, atol=1e-6)
    assert np.allclose(in_memory.embeddings.matrix, reference, atol=1e-6)
    query = model.encode(["deep tower"], normalize_embeddings=True)[0]
    dense = np.argsort(-(reference @ query), kind="stable").tolist()
    assert first.embeddings.nearest("deep tower", 4).tolist() == dense
    assert first.embeddings.nearest("deep tower", 2).tolist() == dense[:2]
    expected = merge([first.index.best("deep tower", 100).tolist(), dense])
    assert first.find("deep tower", 3) == [first.documents[i] for i in expected[:3]]
    assert first.find("zebra", 2), "what no word finds, a vector does"

    monkeypatch.setattr("axpo.tools.corpus.embed", never)
    again = open_corpus(lines, cache, embedder)
    assert again.embeddings is not None
    assert isinstance(again.embeddings.matrix, np.memmap)
    assert again.find("deep tower", 3) == first.find("deep tower", 3)


def test_vectors_follow_the_checkpoint_and_are_rebuilt_when_corrupt(
    embedder: Path, lines: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    matrix = open_corpus(lines, cache, embedder).embeddings.matrix.copy()  # type: ignore[union-attr]
    [path] = cache.glob("vectors-*/vectors.npy")
    path.write_bytes(path.read_bytes()[:200])
    corpus = open_corpus(lines, cache, embedder)
    assert np.array_equal(corpus.embeddings.matrix, matrix)  # type: ignore[union-attr]
    os.utime(embedder / "modules.json", ns=(0, 0))
    open_corpus(lines, cache, embedder)
    assert [p.parent.name for p in cache.glob("vectors-*/vectors.npy")] != [path.parent.name]


def test_many_threads_may_search(embedder: Path, lines: Path) -> None:
    corpus = open_corpus(lines, None, embedder)

    async def many() -> list[list[Hit]]:
        return await asyncio.gather(*(corpus.search("deep tower", 3) for _ in range(16)))

    results = asyncio.run(many())
    assert all(result == results[0] for result in results)


def test_an_embedder_that_is_none(lines: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="nowhere is not a folder"):
        open_corpus(lines, None, tmp_path / "nowhere")
    pytest.importorskip("sentence_transformers")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ToolError, match=r"tools\.embedder: .*empty cannot be loaded"):
        open_corpus(lines, None, tmp_path / "empty")
