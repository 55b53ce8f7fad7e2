"""Documents ranked by what they mean: embeddings of a sentence-transformers checkpoint, searched exhaustively."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axpo.tools.base import ToolError
from axpo.tools.providers import Hit

CHUNK = 1024  # documents embedded at once


class Embeddings:
    """Unit vectors of the documents, float32 [documents, dimensions], and the model that embeds queries."""

    def __init__(self, model: Any, matrix: NDArray[np.float32]) -> None:
        self.model, self.matrix = model, matrix
        self._lock = threading.Lock()  # a fast tokenizer serves one thread at a time

    def nearest(self, query: str, count: int) -> NDArray[np.int64]:
        """The places of the documents of the highest cosine, the nearest first; equal ones in their order."""
        with self._lock:
            vector = self.model.encode_query([query], normalize_embeddings=True, show_progress_bar=False)[0]
        scores = self.matrix @ np.asarray(vector, np.float32)
        least = np.partition(scores, -count)[-count] if count < len(scores) else -np.inf
        places = np.flatnonzero(scores >= least)
        ranked: NDArray[np.int64] = places[np.argsort(-scores[places], kind="stable")][:count]
        return ranked


def load_embedder(folder: Path) -> Any:
    """The model in a folder, on the CPU. Raises ToolError where there is none, or where the library is missing."""
    if not folder.is_dir():
        raise ToolError(f"tools.embedder: {folder} is not a folder; must be that of a sentence-transformers checkpoint")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        told = f"tools.embedder: it needs sentence-transformers: pip install 'axpo[embeddings]' ({error})"
        raise ToolError(told) from error
    try:
        return SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    except Exception as error:
        raise ToolError(f"tools.embedder: {folder} cannot be loaded: {type(error).__name__}: {error}") from error


def identify(folder: Path) -> list[list[Any]]:
    """What tells one state of a checkpoint from another: path, size and time of change of its files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [[str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def embed(model: Any, documents: Sequence[Hit], path: Path | None = None) -> NDArray[np.float32]:
    """The vectors of the documents, written to `path` (.npy) as they come if there is one."""
    matrix: NDArray[np.float32] | None = None
    for start in range(0, len(documents), CHUNK):
        texts = [f"{title}\n{text}" for title, _, text in documents[start : start + CHUNK]]
        vectors = model.encode_document(texts, normalize_embeddings=True, show_progress_bar=False)
        if matrix is None:
            shape = (len(documents), vectors.shape[1])
            matrix = (
                np.empty(shape, np.float32)
                if path is None
                else np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
            )
        matrix[start : start + len(texts)] = vectors
    assert matrix is not None, "a corpus has documents"
    if isinstance(matrix, np.memmap):
        matrix.flush()
    return matrix


def load_vectors(path: Path, documents: int) -> NDArray[np.float32]:
    """The vectors in a file, mapped into memory. Raises ValueError where they are not of these documents."""
    matrix: NDArray[np.float32] = np.load(path, mmap_mode="r")
    if matrix.ndim != 2 or len(matrix) != documents or matrix.dtype != np.float32:
        raise ValueError(f"{path} does not hold the vectors of {documents} documents")
    return matrix
