"""The documents of a local corpus: read from JSONL or Parquet, checked, and kept in a file mapped into memory."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from axpo.tools.base import ToolError
from axpo.tools.providers import Hit

BATCH = 4096  # documents written at once


def read_documents(source: Path | Sequence[Mapping[str, str]]) -> Iterator[Hit]:
    """The documents, one after the other. Raises ToolError that names the file and the line of one that is none."""
    where = f" {source}" if isinstance(source, Path) else ""
    if not isinstance(source, Path):
        read: Callable[[], Iterable[tuple[int, Any]]] = lambda: enumerate(source, 1)  # noqa: E731
    elif source.suffix in (".jsonl", ".parquet"):
        read = lambda: (_jsonl if source.suffix == ".jsonl" else _parquet)(source)  # noqa: E731
    else:
        raise ToolError(f"{source}: a corpus is a .jsonl or a .parquet file")
    empty = True
    try:
        for number, row in read():
            yield _checked(row, f"{source if where else 'document'}:{number}")
            empty = False
    except (OSError, UnicodeDecodeError) as error:
        raise ToolError(f"the corpus{where} cannot be read: {error}") from error
    if empty:
        raise ToolError(f"the corpus{where} is empty")


def _jsonl(path: Path) -> Iterable[tuple[int, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ToolError(f"{path}:{number}: not valid JSON: {error}") from error


def _parquet(path: Path) -> Iterable[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if not {"title", "text"} <= set(names):
                raise ToolError(f"{path}: a corpus has the columns title and text, but this one has {', '.join(names)}")
            number = 0
            for batch in file.iter_batches(BATCH, columns=[n for n in ("title", "text", "url") if n in names]):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        raise ToolError(f"{path}: not a Parquet file with the columns title and text: {error}") from error


def _checked(row: Any, place: str) -> Hit:
    if not isinstance(row, Mapping):
        raise ToolError(f'{place}: a document is an object with "title" and "text"')
    for key in ("title", "text"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ToolError(f"{place}: {key!r} is missing, empty or not a string")
    url = row.get("url")
    if url is not None and not isinstance(url, str):
        raise ToolError(f"{place}: 'url' is not a string")
    return Hit(*map(_whole, (row["title"], (url or "").strip(), row["text"])))


def _whole(text: str) -> str:
    """Lone surrogates, which JSON may hold and no file can, become question marks, as they do when shown."""
    return text.encode("utf-8", "replace").decode("utf-8")


def write_documents(documents: Iterable[Hit], path: Path) -> Iterator[Hit]:
    """Passes the documents on while it writes them to an Arrow file; it is whole when the last has been taken."""
    import pyarrow

    schema = pyarrow.schema([(name, pyarrow.large_string()) for name in Hit._fields])
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, schema) as file:
        batch: list[Hit] = []

        def write() -> None:
            file.write_batch(pyarrow.record_batch([list(column) for column in zip(*batch, strict=True)], schema=schema))
            batch.clear()

        for document in documents:
            batch.append(document)
            yield document
            if len(batch) == BATCH:
                write()
        if batch:
            write()


class MappedDocuments(Sequence[Hit]):
    """The documents in a file of `write_documents`: no more of it is in memory than what is looked at."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        self._table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
        if tuple(self._table.column_names) != Hit._fields:
            raise ValueError(f"{path} holds other columns")

    def __len__(self) -> int:
        rows: int = self._table.num_rows
        return rows

    @overload
    def __getitem__(self, place: int) -> Hit: ...
    @overload
    def __getitem__(self, place: slice) -> list[Hit]: ...
    def __getitem__(self, place: int | slice) -> Hit | list[Hit]:
        if isinstance(place, int):
            return Hit(**self._table.slice(place, 1).to_pylist()[0])
        start, stop, _ = place.indices(len(self))
        return [Hit(**row) for row in self._table.slice(start, stop - start).to_pylist()]
