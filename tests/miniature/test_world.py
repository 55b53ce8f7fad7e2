"""The world: what a question asks is true, what a tool shows settles it, and the splits do not meet."""

import asyncio
import io

import numpy as np
import pytest
from PIL import Image

from axpo.miniature.base import SIDE
from axpo.miniature.scene import CELL, GRID, Plaque, cell_box, draw_crop, draw_scene
from axpo.miniature.tools import tools
from axpo.miniature.world import (
    FAMILIES,
    FAVOURED,
    HELD_OUT_LANDS,
    LANDS,
    Problem,
    corpus,
    favourite_digit,
    lands,
    sample_problems,
    sample_scene,
)
from axpo.tools.base import Conversation, Toolbox


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return sample_problems(90, seed=3)


def test_the_families_come_in_turn_and_a_seed_repeats_them(problems: list[Problem]) -> None:
    assert [p.family for p in problems[:6]] == [*FAMILIES, *FAMILIES]
    assert sample_problems(5, seed=3)[4].question == problems[4].question
    assert sample_problems(5, seed=4)[4].question != problems[4].question


def test_training_never_asks_for_a_held_out_land(problems: list[Problem]) -> None:
    held_out = {p.land for p in sample_problems(90, seed=3, split="held_out") if p.land}
    assert not held_out & {p.land for p in sample_problems(150, seed=3) if p.land}
    assert held_out <= set(list(lands())[-HELD_OUT_LANDS:])
    assert len(corpus()) == LANDS


def test_the_right_call_settles_every_question(problems: list[Problem]) -> None:
    async def ask(problem: Problem) -> None:
        async with Conversation(problem.question.images) as conversation:
            if problem.plaque is not None:
                arguments = {"bbox_2d": list(problem.plaque.box), "label": "it", "img_idx": 0}
                result = await toolbox.call("image_zoom_in_tool", arguments, conversation)
                crop = Image.open(io.BytesIO(result.images[0]))
                scene = Image.open(io.BytesIO(problem.question.images[0]))
                x, y = problem.plaque.cell % GRID * CELL, problem.plaque.cell // GRID * CELL
                assert crop.size == (SIDE, SIDE)
                assert np.array_equal(np.asarray(crop), np.asarray(scene.crop((x, y, x + CELL, y + CELL))))
            elif problem.family == "computation":
                a, b, divisor = problem.factors
                result = await toolbox.call("python", {"code": f"print({a} * {b} % {divisor})"}, conversation)
                assert result.text == problem.question.answer
            else:
                result = await toolbox.call("search", {"query": problem.land}, conversation)
                assert result.text.startswith(f"1. {problem.land}:")
                assert f"Its {problem.fact} is {problem.question.answer}." in result.text

    toolbox = Toolbox(tools())
    for problem in problems[:30]:
        asyncio.run(ask(problem))


def test_a_guess_is_right_now_and_then() -> None:
    """So that not acting tempts: the shares follow from the world's own numbers."""
    many = sample_problems(450, seed=5)
    for family, expected in (("perception", 0.46), ("computation", 0.36), ("lookup", 0.475)):
        mine = [p for p in many if p.family == family]
        share = sum(p.guess == p.question.answer for p in mine) / len(mine)
        assert share == pytest.approx(expected, abs=0.1), family
    assert pytest.approx(0.46) == FAVOURED + (1 - FAVOURED) / 10


def shrunk(data: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(data))
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float64)


def test_a_digit_vanishes_at_the_models_resolution_and_shows_in_the_crop() -> None:
    """Scenes that differ in a digit alone: shrunk, they differ by less than a quarter of the grain (12 grey levels)."""
    for one, other in ((1, 8), (3, 5), (0, 6)):
        scenes = [draw_scene([Plaque("red", "square", 5, d)], np.random.default_rng(0)) for d in (one, other)]
        crops = [draw_crop(Plaque("red", "square", 5, d), np.random.default_rng(0)) for d in (one, other)]
        far = (shrunk(scenes[0]) - shrunk(scenes[1]))[SIDE // 4 : SIDE // 2, SIDE // 4 : SIDE // 2]
        near = shrunk(crops[0]) - shrunk(crops[1])
        assert np.sqrt((far**2).mean()) < 3
        assert np.sqrt((near**2).mean()) > 9


def test_scenes_hold_different_things_in_different_cells() -> None:
    scene = sample_scene(np.random.default_rng(0), 9, 9)
    assert len({p.name for p in scene}) == len({p.cell for p in scene}) == 9
    assert cell_box(0) == (0, 0, 250, 250)
    assert cell_box(6) == (500, 250, 750, 500)
    assert 0 <= favourite_digit("red") <= 9
