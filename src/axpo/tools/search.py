"""The search tool: BM25 over a local corpus."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from axpo.tools.base import PolicyFault, Tool, ToolError


def make_search(corpus: Path | Sequence[Mapping[str, str]], top_k: int = 3) -> Tool:
    """The tool `search`, which shows the `top_k` best documents of the corpus.

    A document has a "title" and a "text". The corpus is a sequence of them, or a JSONL or Parquet file of them. The
    ranking is BM25 as Lucene has it (k1 1.5, b 0.75), over title and text; documents of one score keep their order.

    Raises ToolError that names the file and the line where the corpus cannot be used.
    """
    documents = _load(corpus) if isinstance(corpus, Path) else list(_checked(enumerate(corpus, 1), "document"))
    if not documents:
        raise ToolError(f"the corpus{f' {corpus}' if isinstance(corpus, Path) else ''} is empty")
    import bm25s  # only a run that searches pays for its import

    index = bm25s.BM25()
    index.index([_words(f"{title} {text}") for title, text in documents], show_progress=False)

    def search(query: str) -> str:
        """Search the documents.

        Args:
            query: Words to look for.
        """
        if not query.strip():
            raise PolicyFault("the query is empty.")
        words = [word for word in _words(query) if word in index.vocab_dict]
        if not words:
            return "No results."
        scores = index.get_scores(words)
        best = [place for place in np.argsort(-scores, kind="stable")[:top_k] if scores[place] > 0]
        return "\n".join(f"{rank}. {documents[i][0]}: {documents[i][1]}" for rank, i in enumerate(best, 1))

    return search


def _words(text: str) -> list[str]:
    """Lower-case words; digits and single letters are words too."""
    return re.findall(r"\w+", text.casefold())


def _load(path: Path) -> list[tuple[str, str]]:
    if path.suffix not in (".jsonl", ".parquet"):
        raise ToolError(f"{path}: a corpus is a .jsonl or a .parquet file")
    try:
        return list(_checked(_read_jsonl(path) if path.suffix == ".jsonl" else _read_parquet(path), str(path)))
    except (OSError, UnicodeDecodeError) as error:
        raise ToolError(f"the corpus {path} cannot be read: {error}") from error


def _read_jsonl(path: Path) -> Iterable[tuple[int, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ToolError(f"{path}:{number}: not valid JSON: {error}") from error


def _read_parquet(path: Path) -> Iterable[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return enumerate(pyarrow.parquet.read_table(path, columns=["title", "text"]).to_pylist(), 1)
    except pyarrow.ArrowException as error:
        raise ToolError(f"{path}: not a Parquet file with the columns title and text: {error}") from error


def _checked(rows: Iterable[tuple[int, Any]], source: str) -> Iterable[tuple[str, str]]:
    for number, row in rows:
        if not isinstance(row, Mapping):
            raise ToolError(f'{source}:{number}: a document is an object with "title" and "text"')
        for key in ("title", "text"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise ToolError(f"{source}:{number}: {key!r} is missing, empty or not a string")
        yield row["title"], row["text"]
