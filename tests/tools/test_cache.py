import asyncio
import json
import logging
import multiprocessing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from axpo.tools.base import SystemFault, ToolError
from axpo.tools.cache import Answers


class Pair(NamedTuple):
    title: str
    text: str


class Source:
    """Counts how often it is asked."""

    def __init__(self, answer: Any = "fine", pause: float = 0.0) -> None:
        self.answer, self.pause, self.asked = answer, pause, 0

    async def __call__(self) -> Any:
        self.asked += 1
        await asyncio.sleep(self.pause)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_a_second_run_asks_nobody(tmp_path: Path) -> None:
    source = Source({"a": ["é", 1]})
    for _ in range(2):  # two runs, two event loops
        answers = Answers(dict[str, list[Any]], tmp_path / "cache")
        assert asyncio.run(answers.get({"q": 1, "p": "x"}, source)) == {"a": ["é", 1]}
        assert asyncio.run(answers.get({"p": "x", "q": 1}, source)) == {"a": ["é", 1]}
    assert source.asked == 1
    asyncio.run(Answers(dict[str, list[Any]], tmp_path / "cache").get({"q": 2, "p": "x"}, source))
    assert source.asked == 2


def test_nothing_is_kept_without_a_folder() -> None:
    source, answers = Source(), Answers(str, None)
    asyncio.run(answers.get({}, source))
    asyncio.run(answers.get({}, source))
    assert source.asked == 2


def test_equal_questions_at_once_go_out_once() -> None:
    source, answers = Source(pause=0.02), Answers(str, None)

    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(answers.get({"q": i % 2}, source) for i in range(8)))

    assert asyncio.run(all_at_once()) == ["fine"] * 8
    assert source.asked == 2
    assert not answers._asking


def test_whoever_asked_first_may_be_cancelled() -> None:
    source, answers = Source(pause=0.05), Answers(str, None)

    async def first_leaves() -> Any:
        first = asyncio.create_task(answers.get({}, source))
        await asyncio.sleep(0.01)
        second = asyncio.create_task(answers.get({}, source))
        await asyncio.sleep(0.01)
        first.cancel()
        return await second

    assert asyncio.run(first_leaves()) == "fine"
    assert source.asked == 1


def test_faults_reach_all_who_ask_and_are_not_kept(tmp_path: Path) -> None:
    source, answers = Source(SystemFault("down"), 0.01), Answers(str, tmp_path)

    async def two() -> list[Any]:
        return await asyncio.gather(answers.get({}, source), answers.get({}, source), return_exceptions=True)

    assert [str(error) for error in asyncio.run(two())] == ["down", "down"]
    assert source.asked == 1
    source.answer = "fine"
    assert asyncio.run(answers.get({}, source)) == "fine"


@pytest.mark.parametrize("content", [b"", b'{"question": {}, "ans', b"\xff\xfe", b"[]", b"null", b'{"answer": 1}'])
def test_a_corrupt_file_is_written_anew(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    source, answers = Source(), Answers(str, tmp_path)
    asyncio.run(answers.get({}, source))
    [path] = tmp_path.rglob("*.json")
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert asyncio.run(answers.get({}, source)) == "fine"
    assert str(path) in caplog.text
    assert source.asked == 2
    assert json.loads(path.read_bytes())["answer"] == "fine"


@pytest.mark.parametrize(
    "answer", [None, 3, {"a": 1}, "text", ["text"], [["Oru"]], [["Oru", None]], [["Oru", "text", ""]]]
)
def test_a_kept_answer_of_another_kind_is_asked_for_again(
    tmp_path: Path, answer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    source, answers = Source([Pair("Velm", "tower")]), Answers(list[Pair], tmp_path)
    asyncio.run(answers.get({}, source))
    assert asyncio.run(answers.get({}, source)) == [Pair("Velm", "tower")]
    assert source.asked == 1
    [path] = tmp_path.rglob("*.json")
    path.write_text(json.dumps({"question": {}, "answer": answer}))
    with caplog.at_level(logging.WARNING):
        assert asyncio.run(answers.get({}, source)) == [Pair("Velm", "tower")]
    assert f"{path} is ignored and written anew" in caplog.text
    assert source.asked == 2
    assert json.loads(path.read_bytes())["answer"] == [["Velm", "tower"]]


def test_an_answer_that_cannot_be_kept_is_given_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    answers = Answers(str, tmp_path / "cache")
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("in the way")
    assert asyncio.run(answers.get({}, Source())) == "fine"
    assert "could not be kept" in caplog.text


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ToolError, match=r"tools\.cache: the folder .*file.* cannot be made"):
        Answers(str, tmp_path / "file" / "cache")


def _fill(folder: Path, number: int) -> None:
    answers = Answers(dict[str, Any], folder)
    for question in range(50):
        asyncio.run(answers.get({"q": question}, Source({"q": question, "long": "x" * 10_000})))


def test_several_processes_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_fill, args=(tmp_path, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    files = list(tmp_path.rglob("*.*"))
    assert len(files) == 50, "no half-written file is left behind"
    for path in files:
        kept = json.loads(path.read_bytes())
        assert kept["question"]["q"] == kept["answer"]["q"]
