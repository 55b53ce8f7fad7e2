"""Rollout trees as Parquet: one file for many trees, one row for each segment, nothing lost.

A tree's rows stand depth first, its root (the row without a parent) before the rest, so a reader in any
language rebuilds it in one pass. Rollouts are the paths from the root to the rows that nothing names as parent.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from axpo.tree import CallSpan, Credit, Image, Kind, Outcome, RolloutTree, Segment, StopReason, ToolUse, TreeError

_USES = pa.list_(pa.struct([("name", pa.string()), ("fault", pa.string())]))
_SCHEMA = pa.schema(
    [
        ("question_id", pa.string()),
        ("tree", pa.int32()),
        ("segment", pa.int32()),
        ("parent", pa.int32()),  # null for the root
        ("kind", pa.string()),
        ("ids", pa.list_(pa.int64())),
        ("logprobs", pa.list_(pa.float32())),  # null but for policy segments
        (
            "images",
            pa.list_(pa.struct([("data", pa.binary()), ("grid", pa.list_(pa.int32())), ("tokens", pa.int32())])),
        ),
        ("calls", pa.list_(pa.struct([("start", pa.int32()), ("opened", pa.int32()), ("end", pa.int32())]))),
        ("resampled", pa.int32()),
        (
            "outcome",
            pa.struct(
                [
                    ("stop", pa.string()),
                    ("reward", pa.float64()),
                    ("answer", pa.string()),
                    ("decided_by", pa.string()),
                    ("critique", pa.string()),
                    ("uses", _USES),
                ]
            ),
        ),
        ("credits", pa.list_(pa.struct([("advantage", pa.float64()), ("stream_tokens", pa.int64())]))),
        ("entropies", pa.list_(pa.float32())),  # null where they were not asked for
        ("thought", pa.int32()),
        ("uses", _USES),
    ]
)


_ARRAYS = ["ids", "logprobs", "entropies"]


def save_trees(path: str | Path, trees: Sequence[RolloutTree], images: bool = True) -> None:
    """Write `trees` to `path`: beside it first, then renamed, so that a reader never sees half a file.

    Without `images` their bytes are empty. One tree is one row group, which bounds memory by a tree, however many
    images a step holds.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".partial")
    try:
        with pq.ParquetWriter(beside, _SCHEMA, compression="zstd") as writer:
            for index, tree in enumerate(trees):
                writer.write_table(pa.Table.from_pylist(_rows(tree, index, images), _SCHEMA))
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load_trees(path: str | Path) -> list[RolloutTree]:
    """Read what `save_trees` wrote, in its order.

    Raises TreeError, naming the file, if it is missing, is not Parquet, has other columns, or holds rows that make
    no tree.
    """
    path = Path(path)
    if not path.is_file():
        raise TreeError(f"{path}: no such file")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise TreeError(f"{path}: not a Parquet file: {error}") from error
    with file:
        wrong = _wrong_columns(file.schema_arrow)
        if wrong:
            raise TreeError(f"{path}: no file of rollout trees: missing, unknown or of another type: {wrong}")
        try:
            return _read(file)
        except (IndexError, TypeError, ValueError, OSError) as error:
            raise TreeError(f"{path}: the rows make no tree: {error}") from error


def _read(file: Any) -> list[RolloutTree]:
    trees: list[RolloutTree] = []
    segments: list[Segment] = []
    for group in range(file.num_row_groups):
        table = file.read_row_group(group)
        for index, row in enumerate(table.drop_columns(_ARRAYS).to_pylist()):
            row |= {name: _array(table[name][index]) for name in _ARRAYS}
            if row["parent"] is None:
                trees.append(RolloutTree(row["question_id"], row["ids"], _images(row)))
                segments = [trees[-1].root]
            else:
                segments.append(_append(trees[-1], segments, row))
    return trees


def _rows(tree: RolloutTree, index: int, images: bool) -> list[dict[str, Any]]:
    place: dict[Segment | None, int] = {segment: i for i, segment in enumerate(tree.segments())}
    return [
        {
            "question_id": tree.question_id,
            "tree": index,
            "segment": place[segment],
            "parent": place.get(segment.parent),
            "kind": segment.kind.value,
            "ids": segment.ids,
            "logprobs": segment.logprobs,
            "images": [asdict(image) | ({} if images else {"data": b""}) for image in segment.images],
            "calls": [asdict(call) for call in segment.calls],
            "resampled": segment.resampled,
            "outcome": segment.outcome and asdict(segment.outcome),
            "credits": [asdict(credit) for credit in segment.credits],
            "entropies": segment.entropies,
            "thought": segment.thought,
            "uses": [asdict(use) for use in segment.uses],
        }
        for segment in tree.segments()
    ]


def _append(tree: RolloutTree, segments: Sequence[Segment], row: dict[str, Any]) -> Segment:
    segment = tree.append(
        segments[row["parent"]],
        Kind(row["kind"]),
        row["ids"],
        row["logprobs"],
        _images(row),
        [CallSpan(**call) for call in row["calls"]],
        row["resampled"],
        row["entropies"],
        row["thought"],
        _uses(row),
    )
    if row["outcome"]:
        outcome = row["outcome"]
        segment.outcome = Outcome(**outcome | {"stop": StopReason(outcome["stop"]), "uses": _uses(outcome)})
    segment.credits = tuple(Credit(**credit) for credit in row["credits"])
    return segment


def _images(row: dict[str, Any]) -> list[Image]:
    return [Image(image["data"], tuple(image["grid"]), image["tokens"]) for image in row["images"]]


def _uses(row: dict[str, Any]) -> tuple[ToolUse, ...]:
    return tuple(ToolUse(**use) for use in row["uses"])


def _array(cell: Any) -> Any:
    """A copy, since what Arrow hands out is read-only, which torch does not take."""
    return np.array(cell.values) if cell.is_valid else None


def _wrong_columns(schema: Any) -> str:
    given, wanted = {f.name: f.type for f in schema}, {f.name: f.type for f in _SCHEMA}
    return ", ".join(sorted(name for name in given.keys() | wanted.keys() if given.get(name) != wanted.get(name)))
