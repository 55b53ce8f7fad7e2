"""Questions for a tool that training never offers: who painted a picture, which an image search tells.

    python -m axpo.miniature.unseen FOLDER

writes `unseen.jsonl`, for `data.eval`, and `table.jsonl`, for `tools.image_search={table: FILE}`; the tool is offered
with `eval.tools=[image_search]`. And `far.jsonl`, the questions far from training (world.py).
"""

import argparse
import base64
import hashlib
import json
from pathlib import Path

import numpy as np

from axpo.miniature.scene import draw_scene
from axpo.miniature.world import (
    Problem,
    common_values,
    make_question,
    sample_problems,
    sample_scene,
    sample_value,
)
from axpo.questions import Question
from axpo.tools.base import Tool
from axpo.tools.image_providers import ImageHit
from axpo.tools.image_search import make_image_search

PAINTERS = ("Ada", "Bo", "Cleo", "Dora", "Emil", "Fritz", "Greta", "Hugo")
COUNT = 90
FAR_SEED = 1


def sample_pictures(count: int, seed: int) -> list[Problem]:
    """`count` problems; seed 0 is the world's, the others are for the base."""
    problems = []
    for index in range(count):
        rng = np.random.default_rng([seed, 100, index])
        name, image = f"picture-{seed}-{index}", draw_scene(sample_scene(rng), rng)
        question = make_question(name, "picture", "Who painted this picture?", sample_value(rng, PAINTERS, 0), (image,))
        problems.append(Problem(question, "picture", 0, common_values(PAINTERS, 0)))
    return problems


def hit(problem: Problem) -> ImageHit:
    """What an image search finds for a problem's picture."""
    return ImageHit(f"Painted by {problem.question.answer}.", "", "")


class Gallery:
    """An image search that knows the pictures of some problems."""

    def __init__(self, problems: list[Problem]) -> None:
        self.hits = {problem.question.images[0]: hit(problem) for problem in problems}

    async def search(self, image: bytes, count: int) -> list[ImageHit]:
        return [self.hits[image]] if image in self.hits else []


def image_search(problems: list[Problem]) -> Tool:
    """The tool, over the pictures of these problems."""
    return make_image_search(Gallery(problems))


def write(folder: Path) -> None:
    """Write the questions and the table of what is found."""
    pictures = sample_pictures(COUNT, 0)
    hits = [
        {"sha256": hashlib.sha256(problem.question.images[0]).hexdigest(), "results": [hit(problem)._asdict()]}
        for problem in pictures
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (
        ("unseen", [row(problem.question) for problem in pictures]),
        ("far", [row(problem.question) for problem in sample_problems(COUNT, FAR_SEED, "far")]),
        ("table", hits),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(question: Question) -> dict[str, object]:
    """A question of one message as `axpo.questions` reads it from a file."""
    text = question.messages[0]["content"][-1]["text"]
    images = [base64.b64encode(image).decode() for image in question.images]
    about = {"id": question.id, "family": question.family}
    return {**about, "question": text, "images": images, "answer": question.answer}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
