"""Questions for the tool that training never offers: written as files, they are answered by what the table holds."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from axpo.miniature.unseen import COUNT, PAINTERS, image_search, sample_pictures, write
from axpo.miniature.world import sample_problems
from axpo.questions import load_questions
from axpo.tools.base import Conversation, Toolbox
from axpo.tools.image_providers import ImageTable
from axpo.tools.image_search import make_image_search


def test_the_files_are_what_evaluation_takes(tmp_path: Path) -> None:
    write(tmp_path / "unseen")
    far = load_questions(tmp_path / "unseen" / "far.jsonl")
    assert far == [
        replace(p.question, messages=q.messages) for p, q in zip(sample_problems(90, 1, "far"), far, strict=True)
    ]
    questions = load_questions(tmp_path / "unseen" / "unseen.jsonl")
    assert [question.answer for question in questions] == [p.question.answer for p in sample_pictures(COUNT, 0)]
    toolbox = Toolbox([make_image_search(ImageTable(tmp_path / "unseen" / "table.jsonl"))])

    async def ask(images: tuple[bytes, ...]) -> str:
        async with Conversation(images) as conversation:
            return (await toolbox.call("image_search", {"img_idx": 0}, conversation)).text

    for question in questions[:5]:
        assert asyncio.run(ask(question.images)) == f"1. Painted by {question.answer}."


def test_the_base_knows_the_tool_from_other_pictures() -> None:
    mine, others = sample_pictures(20, 0), sample_pictures(20, 1)
    assert not {p.question.images for p in mine} & {p.question.images for p in others}
    assert {str(p.question.answer) for p in mine} <= set(PAINTERS)

    async def ask(images: tuple[bytes, ...]) -> str:
        async with Conversation(images) as conversation:
            return (await toolbox.call("image_search", {"img_idx": 0}, conversation)).text

    toolbox = Toolbox([image_search(others)])
    assert asyncio.run(ask(others[3].question.images)) == f"1. Painted by {others[3].question.answer}."
    assert "Painted" not in asyncio.run(ask(mine[3].question.images))
    assert "error" not in asyncio.run(ask(mine[3].question.images)).lower()


def test_guesses_are_worth_little() -> None:
    answers = [str(p.question.answer) for p in sample_pictures(200, 1)]
    assert answers.count(PAINTERS[0]) / 200 == pytest.approx(0.5, abs=0.11)
