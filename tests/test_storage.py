from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from axpo.storage import load_trees, save_trees
from axpo.tree import CallSpan, Credit, Image, Kind, Outcome, RolloutTree, Segment, StopReason, ToolUse, TreeError

USES = st.lists(st.builds(ToolUse, st.text(max_size=3), st.none() | st.text(max_size=3)), max_size=2).map(tuple)
IMAGES = st.lists(st.builds(Image, st.binary(max_size=8), st.tuples(*[st.integers(1, 64)] * 3), st.integers(1, 999)))
OUTCOMES = st.builds(
    Outcome,
    st.sampled_from(StopReason),
    st.none() | st.floats(allow_nan=False),
    st.text(),
    st.text(max_size=5),
    st.text(),
    USES,
)
CREDITS = st.lists(st.builds(Credit, st.floats(allow_nan=False), st.integers(0, 2**40)), max_size=2).map(tuple)
IDS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6)


@st.composite
def trees(draw: st.DrawFn) -> RolloutTree:
    tree = RolloutTree(draw(st.text()), draw(IDS), draw(IMAGES))
    for _ in range(draw(st.integers(0, 3))):
        _grow(draw, tree, tree.root, resampled=0)
    for _ in range(draw(st.integers(0, 3))):
        forkable = [s for s in tree.segments() if s.kind is Kind.POLICY and len(s) > 1]
        if forkable:
            segment = draw(st.sampled_from(forkable))
            prefix = tree.fork(segment, draw(st.integers(1, len(segment) - 1)))
            _grow(draw, tree, prefix, resampled=1)
    for segment in tree.segments():
        segment.credits = () if segment is tree.root else draw(CREDITS)
    return tree


def _grow(draw: st.DrawFn, tree: RolloutTree, end: Segment, resampled: int) -> None:
    for turn in range(draw(st.integers(1, 2))):
        if turn:
            end = tree.append(end, Kind.OBSERVATION, draw(IDS), images=draw(IMAGES), uses=draw(USES))
        ids = draw(IDS)
        logprobs = draw(st.lists(st.floats(max_value=0, width=32), min_size=len(ids), max_size=len(ids)))
        calls = (
            [CallSpan(0, draw(st.sampled_from([None, 1])), len(ids))] if len(ids) > 1 and draw(st.booleans()) else []
        )
        entropies = draw(st.none() | st.just([0.5] * len(ids)))
        number, thought = 0 if turn else resampled, draw(st.none() | st.integers(0, 3))
        end = tree.append(end, Kind.POLICY, ids, logprobs, (), calls, number, entropies, thought)
    end.outcome = draw(OUTCOMES)


def content(tree: RolloutTree) -> list[Any]:
    """All that a tree holds, as plain data: arrays by type and bytes, so that no bit may differ."""
    place: dict[Segment | None, int] = {segment: i for i, segment in enumerate(tree.segments())}
    fields = [
        (
            place.get(segment.parent),
            segment.kind,
            (segment.ids.dtype, segment.ids.tobytes()),
            segment.logprobs if segment.logprobs is None else (segment.logprobs.dtype, segment.logprobs.tobytes()),
            (segment.images, segment.calls, segment.resampled, segment.outcome, segment.credits, segment.uses),
            (segment.thought, None if segment.entropies is None else segment.entropies.tolist()),
        )
        for segment in tree.segments()
    ]
    return [tree.question_id, *fields]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.lists(trees(), max_size=3))
def test_nothing_is_lost(tmp_path: Path, forest: list[RolloutTree]):
    save_trees(tmp_path / "step.parquet", forest)
    assert [content(tree) for tree in load_trees(tmp_path / "step.parquet")] == [content(tree) for tree in forest]
    assert [file.name for file in tmp_path.iterdir()] == ["step.parquet"]


def small_tree() -> RolloutTree:
    tree = RolloutTree("q", [1, 2])
    rollout = tree.append(tree.root, Kind.POLICY, [3, 4], [-1.0, -2.0], calls=[CallSpan(0, 1, 2)])
    rollout.outcome = Outcome(StopReason.ANSWER, 0.0, "7", "exact")
    tree.append(tree.fork(rollout, 1), Kind.POLICY, [5], [-3.0], resampled=1).outcome = Outcome(StopReason.VOID)
    return tree


def test_images_may_be_left_out(tmp_path: Path):
    tree = RolloutTree("q", [9], [Image(b"picture", (1, 4, 6), 6)])
    tree.append(tree.root, Kind.OBSERVATION, [8], images=[Image(b"crop", (1, 2, 2), 1)])
    save_trees(tmp_path / "step.parquet", [tree], images=False)
    (loaded,) = load_trees(tmp_path / "step.parquet")
    found = [segment.images for segment in loaded.segments()]
    assert found == [(Image(b"", (1, 4, 6), 6),), (Image(b"", (1, 2, 2), 1),)]
    assert b"crop" not in (tmp_path / "step.parquet").read_bytes()


def test_one_row_a_segment_as_other_readers_see_it(tmp_path: Path):
    save_trees(tmp_path / "step.parquet", [RolloutTree("empty", [9]), small_tree()])
    rows = pq.read_table(tmp_path / "step.parquet").to_pylist()
    assert [(r["question_id"], r["tree"], r["segment"], r["parent"]) for r in rows] == [
        ("empty", 0, 0, None),
        ("q", 1, 0, None),
        ("q", 1, 1, 0),
        ("q", 1, 2, 1),
        ("q", 1, 3, 1),
    ]
    assert [r["kind"] for r in rows] == ["prompt", "prompt", "policy", "policy", "policy"]
    assert [r["ids"] for r in rows] == [[9], [1, 2], [3], [4], [5]]
    assert [r["logprobs"] for r in rows] == [None, None, [-1.0], [-2.0], [-3.0]]
    assert [r["resampled"] for r in rows] == [0, 0, 0, 0, 1]
    assert rows[2]["calls"] == [{"start": 0, "opened": 1, "end": 1}]
    assert rows[3]["outcome"] == {
        "stop": "answer",
        "reward": 0.0,
        "answer": "7",
        "decided_by": "exact",
        "critique": "",
        "uses": [],
    }


def test_a_loaded_tree_can_be_forked_and_written_to(tmp_path: Path):
    save_trees(tmp_path / "step.parquet", [small_tree()])
    (tree,) = load_trees(tmp_path / "step.parquet")
    assert tree.leaves()[0].ids.flags.writeable
    tree.append(tree.root, Kind.POLICY, [7, 8], [-1, -1])
    tree.fork(tree.leaves()[-1], 1)
    assert tree.rows()[-1].ids.tolist() == [1, 2, 7, 8]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "step.parquet"
    save_trees(path, [small_tree()])
    before = path.read_bytes()
    with pytest.raises(UnicodeEncodeError):
        save_trees(path, [small_tree(), RolloutTree("\ud800", [1])])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(TreeError, match=r"nowhere\.parquet: no such file"):
        load_trees(tmp_path / "nowhere.parquet")


def test_a_file_of_another_kind_is_named(tmp_path: Path):
    path = tmp_path / "notes.parquet"
    path.write_text("these are no trees")
    with pytest.raises(TreeError, match=r"notes\.parquet: not a Parquet file"):
        load_trees(path)


def test_a_truncated_file_is_named(tmp_path: Path):
    path = tmp_path / "step.parquet"
    save_trees(path, [small_tree()])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(TreeError, match=r"step\.parquet"):
        load_trees(path)


def test_wrong_columns_are_named(tmp_path: Path):
    path = tmp_path / "step.parquet"
    save_trees(path, [small_tree()])
    table = pq.read_table(path)
    other = table.drop_columns(["kind"]).append_column("color", pa.array(["red"] * len(table)))
    other = other.set_column(other.column_names.index("tree"), "tree", pa.array(["1"] * len(table)))
    pq.write_table(other, path)
    with pytest.raises(TreeError, match=r"step\.parquet: .*: color, kind, tree$"):
        load_trees(path)


@pytest.mark.parametrize(
    ("column", "value"),
    [("parent", [None, 2, 1, 1]), ("parent", [0, 0, 1, 1]), ("kind", ["prompt", "author", "policy", "policy"])],
    ids=["a parent that comes later", "no root", "an unknown kind"],
)
def test_rows_that_make_no_tree(tmp_path: Path, column: str, value: list[Any]):
    path = tmp_path / "step.parquet"
    save_trees(path, [small_tree()])
    table = pq.read_table(path)
    field = table.schema.get_field_index(column)
    pq.write_table(
        table.set_column(field, table.schema.field(field), pa.array(value, table.schema.field(field).type)), path
    )
    with pytest.raises(TreeError, match=r"step\.parquet: the rows make no tree"):
        load_trees(path)


def test_reading_does_not_depend_on_row_groups(tmp_path: Path):
    path = tmp_path / "step.parquet"
    save_trees(path, [small_tree(), small_tree()])
    pq.write_table(pq.read_table(path), path, row_group_size=3)
    assert [content(tree) for tree in load_trees(path)] == [content(small_tree())] * 2
    assert np.all(load_trees(path)[1].rows()[1].ids == [1, 2, 3, 5])
