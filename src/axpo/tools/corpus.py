"""A local corpus: BM25 over its documents, and embeddings beside it, kept on disk and mapped into memory."""

import array
import contextlib
import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axpo.tools.base import ToolError
from axpo.tools.documents import MappedDocuments, read_documents, write_documents
from axpo.tools.embeddings import Embeddings, embed, identify, load_embedder, load_vectors
from axpo.tools.providers import Hit
from axpo.tools.threads import Worker

logger = logging.getLogger(__name__)

FORMAT = 1  # of the files in the cache; raise it with every change to them, or to how words are found
DEPTH = 100  # places of each ranking that are merged
RANK_CONSTANT = 60  # Cormack, Clarke and Büttcher, "Reciprocal Rank Fusion", 2009


class Corpus:
    """A provider of `search`: documents, their BM25 index, and embeddings where there are some. See `open_corpus`."""

    longest: int | None = None

    def __init__(self, documents: Sequence[Hit], index: "Index", embeddings: Embeddings | None = None) -> None:
        self.documents, self.index, self.embeddings = documents, index, embeddings

    def __str__(self) -> str:
        ranking = "BM25" if self.embeddings is None else "BM25 and embeddings"
        return f"local corpus of {len(self.documents)} documents, {ranking}"

    async def search(self, query: str, count: int) -> list[Hit]:
        found: list[Hit] = await Worker().run(lambda: self.find(query, count))
        return found

    def find(self, query: str, count: int) -> list[Hit]:
        """The best documents by BM25; with embeddings, by both rankings merged by reciprocal rank."""
        if self.embeddings is None:
            places = self.index.best(query, count).tolist()
        else:
            depth = max(DEPTH, count)
            places = merge([self.index.best(query, depth).tolist(), self.embeddings.nearest(query, depth).tolist()])
        return [self.documents[place] for place in places[:count]]


def open_corpus(
    source: Path | Sequence[Mapping[str, str]], cache: Path | None = None, embedder: Path | None = None
) -> Corpus:
    """The corpus in a JSONL or Parquet file, or in a sequence of documents.

    A document has a `title` and a `text`, and perhaps a `url`. The ranking is BM25 as Lucene has it (k1 1.5, b 0.75),
    over title and text; documents of one score keep their order. `embedder` is the folder of a sentence-transformers
    checkpoint, which runs on the CPU; its ranking is merged with that of BM25, so something is always found.

    Under `cache` the index of a file is kept, with a copy of its documents and their vectors, for as long as the file
    has the same path, size and time of change. It is mapped into memory, so opening it costs next to nothing, and
    processes share it. A sequence, and a file without a cache, are indexed in memory each time.

    Raises ToolError that names the file and the line where the corpus cannot be used.
    """
    identity: list[Any] = []
    if cache is not None and isinstance(source, Path) and source.is_file():
        status = source.stat()
        identity = [str(source.resolve()), status.st_size, status.st_mtime_ns, FORMAT]
        folder = kept(cache, "bm25", identity, lambda folder: _build(read_documents(source), folder), _load)
        documents, index = _load(folder)
    else:
        documents = list(read_documents(source))
        index = Index.build(f"{title} {text}" for title, _, text in documents)
    if embedder is None:
        return Corpus(documents, index)
    model = load_embedder(embedder)
    if cache is None or not identity:
        return Corpus(documents, index, Embeddings(model, embed(model, documents)))
    identity = [f"{identity[0]} {embedder.resolve()}", *identity[1:], identify(embedder)]

    def build(folder: Path) -> None:
        embed(model, documents, folder / "vectors.npy")

    def load(folder: Path) -> NDArray[np.float32]:
        return load_vectors(folder / "vectors.npy", len(documents))

    return Corpus(documents, index, Embeddings(model, load(kept(cache, "vectors", identity, build, load))))


def _build(documents: Iterable[Hit], folder: Path) -> None:
    passed = write_documents(documents, folder / "documents.arrow")
    Index.build(f"{title} {text}" for title, _, text in passed).save(folder)


def _load(folder: Path) -> tuple[Sequence[Hit], "Index"]:
    documents, index = MappedDocuments(folder / "documents.arrow"), Index.load(folder)
    if len(documents) != index.bm25.scores["num_docs"]:
        raise ValueError("its parts are of different corpora")
    return documents, index


def merge(rankings: Sequence[Iterable[int]]) -> list[int]:
    """Places by the sum of 1 / (60 + rank) over the rankings; of one sum, the first document first."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, place in enumerate(ranking, 1):
            scores[int(place)] = scores.get(int(place), 0.0) + 1 / (RANK_CONSTANT + rank)
    return sorted(scores, key=lambda place: (-scores[place], place))


class Index:
    """A BM25 index. Words are known by their 64-bit hashes, in order, so that the vocabulary is an array as well."""

    def __init__(self, bm25: Any, words: NDArray[np.uint64]) -> None:
        self.bm25, self.words = bm25, words

    @classmethod
    def build(cls, texts: Iterable[str]) -> "Index":
        import bm25s  # only a run that searches pays for its import

        vocabulary: dict[str, int] = {}
        rows = [array.array("i", [vocabulary.setdefault(w, len(vocabulary)) for w in words(text)]) for text in texts]
        vocabulary = vocabulary or {"": 0}  # bm25s takes no empty one
        hashes = np.fromiter(map(_hash, vocabulary), np.uint64, len(vocabulary))
        order = np.argsort(hashes)
        number = np.empty(len(order), np.int32)
        number[order] = np.arange(len(order))
        for place, row in enumerate(rows):
            rows[place] = array.array("i", number[np.frombuffer(row, np.int32)].tobytes())
        bm25 = bm25s.BM25()
        with np.errstate(invalid="ignore"):  # no document has a word
            bm25.index((rows, {n: n for n in range(len(order))}), show_progress=False)
        return cls(bm25, hashes[order])

    def save(self, folder: Path) -> None:
        self.bm25.vocab_dict = {}
        self.bm25.save(folder, show_progress=False)
        np.save(folder / "words.npy", self.words)

    @classmethod
    def load(cls, folder: Path) -> "Index":
        """Raises ValueError for files that do not fit together, and what libraries raise for damaged ones."""
        import bm25s

        bm25 = bm25s.BM25.load(folder, mmap=True, load_vocab=False)
        hashes = np.load(folder / "words.npy", mmap_mode="r")
        starts, places, scores = (bm25.scores[name] for name in ("indptr", "indices", "data"))
        if not (len(starts) == len(hashes) + 1 and starts[-1] == len(places) == len(scores)):
            raise ValueError("its parts differ in length")
        return cls(bm25, hashes)

    def best(self, query: str, count: int) -> NDArray[np.int64]:
        """The places of the documents with the highest scores above 0, at most `count`; equal ones in their order."""
        hashes = np.array([_hash(word) for word in words(query)], np.uint64)
        found = np.searchsorted(self.words, hashes)
        known = found[self.words[np.minimum(found, len(self.words) - 1)] == hashes]
        if not len(known):
            return np.empty(0, np.int64)
        scores = self.bm25.get_scores_from_ids(known.tolist())
        least = np.partition(scores, -count)[-count] if count < len(scores) else 0
        places = np.flatnonzero((scores > 0) & (scores >= least))
        ranked: NDArray[np.int64] = places[np.argsort(-scores[places], kind="stable")][:count]
        return ranked


def words(text: str) -> list[str]:
    """Lower-case words; digits and single letters are words too."""
    return re.findall(r"\w+", text.casefold())


def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def kept(
    cache: Path, kind: str, identity: Sequence[Any], build: Callable[[Path], None], load: Callable[[Path], object]
) -> Path:
    """The folder under `cache` that `build` filled for this identity, now or earlier; its first entry is a path.

    It is built beside and renamed. One that `load` refuses is built anew, and those of the
    same path that are out of date are removed (processes that have them open keep them). Raises ToolError where the
    cache cannot be written.
    """
    path = hashlib.sha256(str(identity[0]).encode("utf-8", "replace")).hexdigest()[:16]
    state = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    folder = cache / f"{kind}-{path}-{state}"

    def usable() -> bool:
        if not folder.is_dir():
            return False
        try:
            load(folder)
        except Exception as error:  # a damaged file may make a library raise anything
            logger.warning("%s is built anew: %s", folder, error)
            return False
        return True

    if usable():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{kind}-", ignore_cleanup_errors=True) as beside:
            fresh = Path(beside) / "fresh"
            fresh.mkdir()
            build(fresh)
            if usable():  # another process has made it meanwhile, and may be reading it
                return folder
            damaged = folder.is_dir()
            for number, old in enumerate(cache.glob(f"{kind}-{path}-*")):
                if old == folder and not damaged:
                    continue
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    old.rename(Path(beside) / f"old{number}")
            try:
                fresh.rename(folder)
            except OSError:
                if not folder.is_dir():  # nor did another process make it meanwhile
                    raise
    except OSError as error:
        raise ToolError(f"tools.cache: the index cannot be kept in {cache}: {error}") from error
    return folder
