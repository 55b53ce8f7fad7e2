"""Loading questions and trajectories: every form of an image, and a message for every mistake."""

import base64
import io
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from axpo.questions import DataError, Question, Trajectory, Turn, load_questions, load_trajectories


def encoded(colour: str, kind: str = "PNG", size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


RED, BLUE = encoded("red"), encoded("blue", "JPEG", (64, 64))


def jsonl(folder: Path, *rows: Any) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(**fields: Any) -> dict[str, Any]:
    return {"question": "How many?", "answer": "3", **fields}


def test_a_plain_question(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path, row(), "", row(id=7, answer=[4, "four"], options=["4", 5], family="count", system="Be brief.")
    )
    assert load_questions(path) == [
        Question("data.jsonl:1", [{"role": "user", "content": "How many?"}], (), "3"),
        Question(
            "7",
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}],
            (),
            ("4", "four"),
            ("4", "5"),
            "count",
        ),
    ]


def test_images_stand_where_the_markers_are(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "red.png").write_bytes(RED)
    (tmp_path / "blue.jpg").write_bytes(BLUE)
    images = ["pictures/red.png", str(tmp_path / "blue.jpg")]
    path = jsonl(
        tmp_path, row(question="Is <image> like\n<image>?", images=images), row(question="Same?", images=images)
    )
    marked, unmarked = load_questions(path)
    image = {"type": "image"}
    assert marked.images == unmarked.images == (RED, BLUE)
    assert marked.messages[0]["content"] == [
        {"type": "text", "text": "Is "},
        image,
        {"type": "text", "text": " like\n"},
        image,
        {"type": "text", "text": "?"},
    ]
    assert unmarked.messages[0]["content"] == [image, image, {"type": "text", "text": "Same?"}]


def test_base64_text_is_an_image(tmp_path: Path) -> None:
    red, blue = (base64.b64encode(data).decode() for data in (RED, BLUE))
    (question,) = load_questions(
        jsonl(tmp_path, row(images=[red, blue, f"data:image/png;base64,{red}", {"bytes": blue, "path": None}]))
    )
    assert question.images == (RED, BLUE, RED, BLUE)


def test_parquet_holds_bytes_paths_and_lists(tmp_path: Path) -> None:
    (tmp_path / "blue.jpg").write_bytes(BLUE)
    rows = [
        row(images=[{"bytes": RED, "path": "gone.png"}, {"bytes": None, "path": "blue.jpg"}], answer=["3"], id="a"),
        row(images=None, answer=["three", "3"], id="b"),
    ]
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    first, second = load_questions(path)
    assert (first.images, first.answer) == ((RED, BLUE), ("3",))
    assert (second.images, second.answer) == ((), ("three", "3"))
    pq.write_table(pa.table({"question": ["q"], "answer": ["a"], "images": pa.array([[RED]])}), path)
    assert load_questions(path)[0].images == (RED,)


@pytest.mark.parametrize(
    "image",
    ["none.png", "broken.png", "cut.jpg", "text.png", ".", base64.b64encode(RED).decode()[:70], "data:image/png,%"],
)
def test_an_image_that_does_not_open_costs_its_question_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, image: str
) -> None:
    (tmp_path / "broken.png").write_bytes(RED[:50])
    (tmp_path / "cut.jpg").write_bytes(encoded("blue", "JPEG", (300, 300))[:-400])
    (tmp_path / "text.png").write_text("no image")
    path = jsonl(tmp_path, row(id="first"), row(id="bad one", images=[image]), row(id="last"))
    with caplog.at_level(logging.WARNING):
        assert [question.id for question in load_questions(path)] == ["first", "last"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "left out question 'bad one' (line 2)" in message
    assert "does not open" in message


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    path = jsonl(tmp_path, row(id="x", images=["none.png"]))
    with pytest.raises(DataError, match=r"no question is left.*question 'x'.*none\.png"):
        load_questions(path)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "data.jsonl: holds no questions"),
        (["", "  "], "data.jsonl: holds no questions"),
        ([row(), "{"], "data.jsonl, line 2: not valid JSON"),
        (["[1]"], "line 1: must be a JSON object"),
        ([row(question=None)], "line 1: the question is missing"),
        ([{"answer": "3"}], "line 1: the question is missing"),
        ([row(question=" ")], "line 1: "),
        ([row(question=5)], "line 1: question must be text"),
        ([{"question": "q"}], "line 1: the answer is missing"),
        ([row(), row(answer=None)], "line 2: the answer is missing"),
        ([row(answer=" ")], "line 1: the answer is missing"),
        ([row(answer=[])], "line 1: the answer is missing"),
        ([row(answer=["3", ""])], "line 1: the answer is missing"),
        ([row(answer=True)], "line 1: answer must be text, got True"),
        ([row(answer={"a": 1})], "line 1: answer must be text"),
        ([row(images="red.png")], "line 1: images must be a list"),
        ([row(images=[5])], "line 1: an image must be a path, base64 text or bytes, got 5"),
        (
            [row(question="<image> <image>", images=["red.png"])],
            "line 1: 2 <image> markers in the question, but 1 images",
        ),
        ([row(question="<image>")], "line 1: 1 <image> markers in the question, but 0 images"),
        ([row(id="a"), row(id="b"), row(id="a")], "line 3: the id 'a' is already that of line 1"),
        ([row(image=["red.png"])], "line 1: unknown column 'image', did you mean 'images'?"),
        ([row(system=["x"])], "line 1: system must be text"),
        ([row(options="AB")], "line 1: options must be a list"),
    ],
)
def test_a_mistake_names_the_file_and_the_line(tmp_path: Path, rows: list[Any], expected: str) -> None:
    with pytest.raises(DataError) as error:
        load_questions(jsonl(tmp_path, *rows))
    assert expected in str(error.value)
    assert "data.jsonl" in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        load_questions(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"data\.csv: must end in \.jsonl or \.parquet"):
        load_questions(tmp_path / "data.csv")
    (tmp_path / "data.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"data\.parquet: not a Parquet file"):
        load_questions(tmp_path / "data.parquet")
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), tmp_path / "data.parquet")
    with pytest.raises(DataError, match="holds no questions"):
        load_questions(tmp_path / "data.parquet")


CALL = 'I look closer.\n</think>\n\n<tool_call>\n{"name": "zoom"}\n</tool_call>'
ANSWER = "Seen.\n</think>\n\n<answer>3</answer>"


def test_a_trajectory(tmp_path: Path) -> None:
    (tmp_path / "crop.png").write_bytes(RED)
    turns = [
        {"role": "assistant", "content": CALL},
        {"role": "tool", "content": "", "images": ["crop.png"]},
        {"role": "assistant", "content": ANSWER},
    ]
    path = jsonl(tmp_path, row(id="t", turns=turns))
    (trajectory,) = load_trajectories(path)
    assert trajectory == Trajectory(
        Question("t", [{"role": "user", "content": "How many?"}], (), "3"),
        (Turn("assistant", CALL), Turn("tool", "", (RED,)), Turn("assistant", ANSWER)),
    )
    pq.write_table(pa.Table.from_pylist([row(id="t", turns=turns)]), tmp_path / "data.parquet")
    assert load_trajectories(tmp_path / "data.parquet") == [trajectory]
    assert load_questions(path) == [trajectory.question]


def test_an_image_that_is_too_large_costs_its_question(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (9, 5)).save(tmp_path / "large.png")
    monkeypatch.setattr("axpo.images.MAX_PIXELS", 44)
    path = jsonl(tmp_path, row(id="first"), row(id="large", images=["large.png"]))
    assert [question.id for question in load_questions(path)] == ["first"]
    (message,) = caplog.messages
    assert "left out question 'large' (line 2): image 'large.png' does not open: it has 9 × 5 pixels" in message
    with pytest.raises(DataError, match="9 × 5 pixels, and 44 are allowed"):
        load_questions(jsonl(tmp_path, row(images=["large.png"])))


def test_a_trajectory_with_an_image_that_does_not_open_is_left_out(tmp_path: Path) -> None:
    turns = [
        {"role": "assistant", "content": CALL},
        {"role": "tool", "content": "", "images": ["none.png"]},
        {"role": "assistant", "content": ANSWER},
    ]
    path = jsonl(tmp_path, row(turns=turns), row(turns=turns[2:]))
    assert [t.question.id for t in load_trajectories(path)] == ["data.jsonl:2"]


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (None, "line 1: the turns are missing"),
        ([], "line 1: the turns are missing"),
        ("text", "line 1: turns must be a list"),
        ([("tool", "x")], "line 1: turn 1 must be of role 'assistant'"),
        ([("assistant", CALL), ("assistant", ANSWER)], "line 1: turn 2 must be of role 'tool'"),
        ([("assistant", CALL), ("tool", "x")], "line 1: the last turn must be the assistant's"),
        ([("assistant", " ")], "line 1: turn 1 has no content"),
        ([("assistant", CALL), ("tool", None), ("assistant", ANSWER)], "line 1: turn 2 has no content"),
    ],
)
def test_turns_that_do_not_alternate(tmp_path: Path, turns: Any, expected: str) -> None:
    if isinstance(turns, list):
        turns = [{"role": role, "content": content} for role, content in turns]
    with pytest.raises(DataError, match=expected):
        load_trajectories(jsonl(tmp_path, row(turns=turns)))


def test_the_assistant_holds_no_images(tmp_path: Path) -> None:
    turns = [{"role": "assistant", "content": ANSWER, "images": ["x.png"]}]
    with pytest.raises(DataError, match="turn 1 is the assistant's and cannot hold images"):
        load_trajectories(jsonl(tmp_path, row(turns=turns)))
