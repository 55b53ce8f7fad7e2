"""The world: what a question asks is true, what a tool shows settles it, and the splits do not meet."""

import asyncio
import io

import numpy as np
import pytest
from PIL import Image

from axpo.chat import Chat
from axpo.miniature.base import BASE, SIDE
from axpo.miniature.scene import CELL, GRID, Plaque, cell_box, draw_crop, draw_scene
from axpo.miniature.tools import tools
from axpo.miniature.world import (
    DIGITS,
    FACTS,
    FAMILIES,
    GUESSED,
    HEADS,
    HELD_OUT_BETWEEN,
    HELD_OUT_CELLS,
    TAILS,
    USUAL,
    Problem,
    capital_of,
    common_values,
    corpus,
    lands,
    sample_problems,
    sample_scene,
    sample_value,
    usual_digit,
)
from axpo.tools.base import Conversation, Toolbox


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return sample_problems(90, seed=3)


def test_the_families_come_in_turn_and_a_seed_repeats_them(problems: list[Problem]) -> None:
    assert [p.family for p in problems[:6]] == [*FAMILIES, *FAMILIES]
    assert sample_problems(5, seed=3)[4].question == problems[4].question
    assert sample_problems(5, seed=4)[4].question != problems[4].question


def test_the_kinds_come_evenly_in_every_family() -> None:
    many = sample_problems(600, seed=3)
    for family in FAMILIES:
        assert np.mean([p.kind for p in many if p.family == family]) == pytest.approx(0.5, abs=0.11)


def test_held_out_questions_are_about_what_training_never_asks_for() -> None:
    training = [p for split in ("train", "teacher", "tuning") for p in sample_problems(240, 3, split)]
    held_out = sample_problems(240, 1, "held_out")
    places = [{(p.scene[0].between, p.scene[0].cell) for p in group if p.scene} for group in (training, held_out)]
    assert places[1] == {(False, cell) for cell in HELD_OUT_CELLS} | {(True, cell) for cell in HELD_OUT_BETWEEN}
    assert len(places[0]) == (16 - 4) + (12 - 3)
    assert not places[0] & places[1]
    sums = [{sum(p.numbers[:2]) % 5 == 0 for p in group if p.family == "computation"} for group in (training, held_out)]
    assert sums == [{False}, {True}]
    known = list(lands())
    asked = [{known.index(p.land) for p in group if p.land} for group in (training, held_out)]
    assert max(asked[0]) < 300 <= min(asked[1])
    assert max(asked[1]) < 400
    assert len(corpus()) == 2 * 450


def test_far_questions_are_about_what_no_other_split_has() -> None:
    for problem in sample_problems(90, 1, "far"):
        if problem.scene:
            assert problem.scene[0].scale == 0.7
        elif problem.land:
            assert problem.land.count("-") == 2
        else:
            assert min(problem.numbers[:2]) >= 100


def test_the_base_learns_of_other_lands() -> None:
    with pytest.raises(ValueError, match="seeds from 1 on"):
        sample_problems(1, 0, "base")
    mine, others = lands(), lands(1)
    both = set(mine) & set(others)
    assert np.mean([mine[land] == others[land] for land in both]) < 0.2


def test_the_right_call_settles_every_question(problems: list[Problem]) -> None:
    async def ask(problem: Problem) -> None:
        async with Conversation(problem.question.images) as conversation:
            if problem.scene:
                target = problem.scene[0]
                arguments = {"bbox_2d": list(target.box), "label": "it", "img_idx": 0}
                result = await toolbox.call("image_zoom_in_tool", arguments, conversation)
                crop = Image.open(io.BytesIO(result.images[0]))
                scene = Image.open(io.BytesIO(problem.question.images[0]))
                x, y = (target.cell % GRID + target.between / 2) * CELL, target.cell // GRID * CELL
                assert crop.size == (SIDE, SIDE)
                assert np.array_equal(np.asarray(crop), np.asarray(scene.crop((x, y, x + CELL, y + CELL))))
            elif problem.family == "computation":
                a, b, divisor = problem.numbers
                code = f"print(({a} {'*+'[problem.kind]} {b}) % {divisor})"
                result = await toolbox.call("python", {"code": code}, conversation)
                assert result.text == problem.question.answer
            else:
                name = capital_of(problem.land) if problem.kind else problem.land
                result = await toolbox.call("search", {"query": name}, conversation)
                assert result.text.startswith(f"1. {name}:")
                assert f"Its {problem.fact} is {problem.question.answer}." in result.text

    toolbox = Toolbox(tools())
    for problem in problems:
        asyncio.run(ask(problem))


def test_a_guess_is_right_now_and_then() -> None:
    """So that not acting tempts: 0.6 · 0.5 + 0.4 · 0.3 = 0.42, and in a fifth of the questions no guess is right."""
    assert GUESSED == (0.6, 0.4)
    assert USUAL == (0.5, 0.3)
    many = sample_problems(600, seed=5)
    for family in FAMILIES:
        right = [[g == p.question.answer for g in p.guesses] for p in many if p.family == family]
        first, second = np.mean(right, axis=0)
        assert first == pytest.approx(0.5, abs=0.11), family  # three standard errors
        assert second == pytest.approx(0.3, abs=0.1), family


def test_values_are_skewed_as_they_should_be() -> None:
    rng = np.random.default_rng(0)
    drawn = [int(sample_value(rng, DIGITS, 9)) for _ in range(4000)]
    shares = np.bincount(drawn, minlength=10) / 4000
    assert shares[9] == pytest.approx(0.5, abs=0.03)
    assert shares[0] == pytest.approx(0.3, abs=0.03)
    assert shares[1:9] == pytest.approx(np.full(8, 0.2 / 8), abs=0.01)
    assert common_values(DIGITS, 9) == ("9", "0")


def test_lands_and_capitals_differ_in_what_is_usual() -> None:
    for kind, values in FACTS.items():
        own, capital = ([facts[i][kind] for facts in lands().values()] for i in (0, 1))
        assert max(values, key=own.count) == values[0]
        assert max(values, key=capital.count) == values[4]


def test_names_are_made_of_whole_tokens() -> None:
    """So that copying a name is copying tokens, with the quotation mark before it that a query has too."""
    tokenizer = Chat.from_pretrained(BASE).tokenizer
    assert len(set(HEADS)) == 32
    assert len(set(TAILS)) == 24
    for head, tail in zip(HEADS, (*TAILS, *TAILS), strict=False):
        assert tokenizer.tokenize(f' "{head}-{tail}"?') == ['Ġ"', head, "-", tail, '"?']


def shrunk(data: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(data))
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float64)


def test_a_digit_vanishes_at_the_models_resolution_and_shows_in_the_crop() -> None:
    """Scenes that differ in a digit alone: shrunk, they differ by less than a quarter of the grain (12 grey levels)."""
    for between in (False, True):
        for one, other in ((1, 8), (3, 5), (0, 6)):
            plaques = [Plaque("red", "square", 5, digit, between) for digit in (one, other)]
            scenes = [draw_scene([plaque], np.random.default_rng(0)) for plaque in plaques]
            crops = [draw_crop(plaque, np.random.default_rng(0)) for plaque in plaques]
            far = (shrunk(scenes[0]) - shrunk(scenes[1]))[SIDE // 4 : SIDE // 2, SIDE // 4 : SIDE // 4 * 3]
            near = shrunk(crops[0]) - shrunk(crops[1])
            assert np.sqrt((far**2).mean()) < 3
            assert np.sqrt((near**2).mean()) > 9


def test_scenes_hold_different_things_in_different_cells() -> None:
    for seed in range(40):
        scene = sample_scene(np.random.default_rng(seed), 6, 6, at=(5, True))
        assert (scene[0].cell, scene[0].between) == (5, True)
        assert len({p.name for p in scene}) == len(scene) == 6
        assert len(set().union(*(p.cells for p in scene))) == sum(1 + p.between for p in scene)


def test_places_and_boxes() -> None:
    assert cell_box(0) == (0, 0, 250, 250)
    assert cell_box(6) == (500, 250, 750, 500)
    between = Plaque("red", "square", 6, 0, True)
    assert between.box == (625, 250, 875, 500)
    assert between.cells == {6, 7}
    assert between.place == "row 2, columns 3-4"
    assert Plaque("red", "square", 6, 0).place == "row 2, column 3"
    assert (usual_digit("red"), usual_digit("green")) == (1, 4)
