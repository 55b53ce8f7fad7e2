"""Questions to train and evaluate on, and trajectories to imitate, from JSONL or Parquet files.

A row has `question` (text; each `<image>` marks where an image stands, and without markers images come first),
`answer` (text, or a list of accepted ones), and may have `images` (paths relative to the file, base64 text, or
bytes), `options` (the texts of the choices A, B, …, for checking only: the question must list them itself), `system`
(a system prompt), `family` (a name to report by) and `id`.
"""

import base64
import binascii
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from axpo.images import ImageError, check_image

logger = logging.getLogger(__name__)

MARKER = "<image>"
_COLUMNS = ("question", "answer", "images", "options", "system", "family", "id", "turns")
# How a PNG, JPEG, GIF or WebP file begins in base64. A path is neither that long nor called that.
_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")

Message = dict[str, Any]


class DataError(ValueError):
    """A data file that cannot be used: names the file and the line."""


class _ImageError(Exception):
    """An image that does not open; its question is left out."""


@dataclass(frozen=True)
class Question:
    """A question, its images (encoded files, in the order of the markers), and what counts as right.

    `messages` are those of the prompt: {"role", "content"}, the content being text or a list of {"type": "text",
    "text"} and {"type": "image"} parts.
    """

    id: str
    messages: list[Message]
    images: tuple[bytes, ...]
    answer: str | tuple[str, ...]
    options: tuple[str, ...] = ()
    family: str = ""


@dataclass(frozen=True)
class Turn:
    """One turn of a trajectory. An assistant's `content` is the raw text that the policy would emit after the
    generation prompt, its thinking and calls included; a tool's is what it returned, with its images."""

    role: Literal["assistant", "tool"]
    content: str
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Trajectory:
    """A question and the turns that answer it: assistant and tool alternate, an assistant's turn is the last."""

    question: Question
    turns: tuple[Turn, ...]


def load_questions(path: Path) -> list[Question]:
    """The questions of a .jsonl or .parquet file.

    A question with an image that does not open is left out with a warning that names it. Raises DataError for a file
    that is missing, of another kind or empty, for the first row that is not as described above, and if nothing is
    left. An `id` that is not given is the file's name and the line.
    """
    return [question for question, _ in _load(path, with_turns=False)]


def load_trajectories(path: Path) -> list[Trajectory]:
    """The trajectories of a file of questions that also has `turns`: a list of {"role", "content", "images"}.

    Left out and raised as by `load_questions`.
    """
    return [Trajectory(question, turns) for question, turns in _load(path, with_turns=True)]


def _load(path: Path, with_turns: bool) -> list[tuple[Question, tuple[Turn, ...]]]:
    loaded = []
    lines: dict[str, int] = {}
    dropped = []
    for line, row in _rows(path):
        where = f"{path}, line {line}"
        _check_columns(row, where)
        name = f"{path.name}:{line}" if row.get("id") is None else str(row["id"])
        if name in lines:
            raise DataError(f"{where}: the id {name!r} is already that of line {lines[name]}")
        lines[name] = line
        try:
            question = _question(row, name, path.parent, where)
            loaded.append((question, _turns(row, path.parent, where) if with_turns else ()))
        except _ImageError as error:
            dropped.append(f"question {name!r} (line {line}): {error}")
            logger.warning("%s: left out %s", path, dropped[-1])
    if not lines:
        raise DataError(f"{path}: holds no questions")
    if not loaded:
        raise DataError(f"{path}: no question is left, because of images that do not open: {dropped[0]}")
    return loaded


# Rows -----------------------------------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{path}: must end in .jsonl or .parquet")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return _jsonl_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path)


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f'{path}, line {number}: must be a JSON object, such as {{"question": …}}')
            yield number, row


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=32):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file that can be read: {error}") from error


def _check_columns(row: dict[str, Any], where: str) -> None:
    """A misspelt column would be left unread in silence, and the policy would never see its images."""
    for name in row:
        nearest = get_close_matches(name, _COLUMNS, n=1, cutoff=0.8)
        if nearest and name not in _COLUMNS and row.get(nearest[0]) is None:
            raise DataError(f"{where}: unknown column {name!r}, did you mean {nearest[0]!r}?")


# Fields ---------------------------------------------------------------------------------------------------------------


def _question(row: dict[str, Any], name: str, folder: Path, where: str) -> Question:
    text = row.get("question")
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f"{where}: the question is missing" if text in (None, "") else f"{where}: question must be text"
        )
    sources = _list(row, "images", where)
    markers = text.count(MARKER)
    if markers not in (0, len(sources)):
        raise DataError(f"{where}: {markers} {MARKER} markers in the question, but {len(sources)} images")
    messages: list[Message] = [{"role": "user", "content": _content(text, len(sources))}]
    system = row.get("system")
    if system is not None:
        if not isinstance(system, str):
            raise DataError(f"{where}: system must be text")
        messages.insert(0, {"role": "system", "content": system})
    answer, options = _answer(row, where), tuple(_texts(_list(row, "options", where), "options", where))
    return Question(
        id=name,
        messages=messages,
        images=tuple(_image(source, folder, where) for source in sources),
        answer=answer,
        options=options,
        family=str(row.get("family") or ""),
    )


def _content(text: str, images: int) -> str | list[dict[str, str]]:
    if not images:
        return text
    texts = text.split(MARKER) if MARKER in text else [""] * images + [text]
    parts = [{"type": "text", "text": texts[0]}]
    for after in texts[1:]:
        parts += [{"type": "image"}, {"type": "text", "text": after}]
    return [part for part in parts if part.get("text") != ""]


def _answer(row: dict[str, Any], where: str) -> str | tuple[str, ...]:
    given = row.get("answer")
    golds = _texts(given if isinstance(given, list) else [] if given is None else [given], "answer", where)
    if not golds or not all(gold.strip() for gold in golds):
        raise DataError(f"{where}: the answer is missing")
    return tuple(golds) if isinstance(given, list) else golds[0]


def _turns(row: dict[str, Any], folder: Path, where: str) -> tuple[Turn, ...]:
    turns = []
    for index, given in enumerate(_list(row, "turns", where)):
        place = f"{where}: turn {index + 1}"
        role: Literal["assistant", "tool"] = "tool" if index % 2 else "assistant"
        if not isinstance(given, dict) or given.get("role") != role:
            raise DataError(f"{place} must be of role {role!r}: assistant and tool alternate, the assistant is first")
        content, images = given.get("content"), _list(given, "images", place)
        if not isinstance(content, str) or (role == "assistant" and not content.strip()):
            raise DataError(f"{place} has no content")
        if images and role == "assistant":
            raise DataError(f"{place} is the assistant's and cannot hold images")
        turns.append(Turn(role, content, tuple(_image(source, folder, place) for source in images)))
    if not turns:
        raise DataError(f"{where}: the turns are missing")
    if len(turns) % 2 == 0:
        raise DataError(f"{where}: the last turn must be the assistant's")
    return tuple(turns)


def _list(row: dict[str, Any], key: str, where: str) -> list[Any]:
    value = row.get(key)
    if value is not None and not isinstance(value, list):
        raise DataError(f"{where}: {key} must be a list")
    return value or []


def _texts(values: list[Any], key: str, where: str) -> list[str]:
    """Texts, or numbers as text."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise DataError(f"{where}: {key} must be text, got {value!r}")
    return [str(value) for value in values]


# Images ---------------------------------------------------------------------------------------------------------------


def _image(source: Any, folder: Path, where: str) -> bytes:
    data = _image_bytes(source, folder, where)
    try:
        check_image(data)
    except ImageError as error:
        raise _ImageError(f"image {_name(source)} does not open: {error}") from error
    return data


def _image_bytes(source: Any, folder: Path, where: str) -> bytes:
    if isinstance(source, dict):  # as the `datasets` library stores images
        stored = source.get("bytes")
        source = source.get("path") if stored is None else stored
    if isinstance(source, bytes):
        return source
    if not isinstance(source, str) or not source:
        raise DataError(f"{where}: an image must be a path, base64 text or bytes, got {source!r}")
    try:
        if source.startswith("data:"):
            return base64.b64decode(source.partition(",")[2], validate=True)
        if len(source) > 64 and source.startswith(_BASE64_STARTS):
            return base64.b64decode("".join(source.split()), validate=True)
        return (folder / source).read_bytes()
    except (OSError, binascii.Error) as error:
        raise _ImageError(f"image {_name(source)} does not open: {error}") from error


def _name(source: Any) -> str:
    if isinstance(source, dict):
        source = source.get("path")
    return repr(source) if isinstance(source, str) and len(source) <= 200 else "given as bytes"
