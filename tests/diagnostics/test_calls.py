import json
import random
import warnings
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axpo.diagnostics.calls import Call, alike, cluster, normalised, overlap


def call(name: str, output: str = "", **arguments: object) -> Call:
    return Call(json.dumps({"name": name, "arguments": arguments}), output)


def zoom(*box: float, image: object = 0, label: str = "it") -> Call:
    return call("image_zoom_in_tool", bbox_2d=list(box), img_idx=image, label=label)


def python(code: str, output: str = "") -> Call:
    return call("python", output, code=code)


def search(query: str) -> Call:
    return call("search", query=query)


# Zoom -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 100, 100), (0, 0, 100, 100), 1.0),
        ((0, 0, 100, 100), (0, 0, 100, 50), 0.5),
        ((0, 0, 100, 100), (50, 0, 150, 100), 5000 / 15000),
        ((0, 0, 100, 100), (90, 90, 110, 110), 100 / (10000 + 400 - 100)),
        ((0, 0, 100, 100), (100, 0, 200, 100), 0.0),
        ((0, 0, 100, 100), (500, 500, 600, 600), 0.0),  # apart in both directions
    ],
)
def test_overlap_is_intersection_over_union(a: tuple, b: tuple, expected: float):
    assert overlap(a, b) == overlap(b, a) == pytest.approx(expected)


def test_boxes_are_alike_from_half_an_overlap_on():
    whole = zoom(0, 0, 100, 100)
    assert alike(whole, zoom(0, 0, 100, 50))  # 1/2
    assert not alike(whole, zoom(0, 0, 100, 49))
    assert alike(whole, zoom(10, 0, 110, 100, label="other"))  # 90/110; the label is only a remark
    assert not alike(whole, zoom(40, 0, 140, 100))  # 60/140


def test_boxes_of_different_images_differ():
    assert not alike(zoom(0, 0, 100, 100), zoom(0, 0, 100, 100, image=1))
    assert alike(zoom(0, 0, 100, 100), zoom(0, 0, 100, 100, image=0.0))


def test_boxes_are_clamped_to_the_image_as_the_tool_does():
    assert alike(zoom(-500, 0, 500, 1000), zoom(0, 0, 500, 2000))


@pytest.mark.parametrize(
    "broken",
    [
        zoom(0, 0, 100),
        zoom(100, 0, 0, 100),
        zoom(1000, 0, 1100, 100),
        zoom(0, 0, float("nan"), 100),
        zoom(0, 0, True, 100),
        zoom(0, 0, 10**400, 100, image=10**400),
        zoom(0, 0, 100, 100, image=0.5),
        zoom(0, 0, 100, 100, image="0"),
        call("image_zoom_in_tool", bbox_2d="all", img_idx=0),
        call("image_zoom_in_tool"),
    ],
)
def test_a_zoom_that_its_tool_cannot_read_is_compared_as_json(broken: Call):
    assert alike(broken, Call(json.dumps(json.loads(broken.text), indent=1)))
    assert not alike(broken, zoom(0, 0, 100, 100))


# Python ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("print(17 * 23 % 6)", "print( 17*23 %6 )  # the remainder"),
        ("a = 17\nb = 23\nprint(a * b)", "x = 17; y = 23\nprint(x * y)"),
        ("print([i for i in range(3)])", "print([n for n in range(3)])"),
        ("print('a')", 'print("a")'),
    ],
)
def test_programs_that_differ_in_layout_and_names_of_variables_are_alike(a: str, b: str):
    assert alike(python(a), python(b))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("print(17 * 23)", "print(23 * 17)"),
        ("a = 1\nb = 2\nprint(a)", "a = 1\nb = 2\nprint(b)"),
        ("print(len('a'))", "print(ord('a'))"),  # names that the program does not assign
        ("def f(a, b): return a - b\nf(a=1, b=2)", "def f(b, a): return b - a\nf(a=1, b=2)"),
        ("end = 1\nprint(1, end=end)", "sep = 1\nprint(1, sep=sep)"),
        ("import math as m\nm.pi", "import cmath as m\nm.pi"),
    ],
)
def test_programs_that_do_something_else_are_not(a: str, b: str):
    assert not alike(python(a), python(b))
    assert not alike(python(a, "1"), python(b, "2"))
    assert alike(python(a, "391"), python(b, "391"))  # the output decides where the trees differ


def test_programs_of_one_tree_are_alike_whatever_they_print():
    assert alike(python("random()", "0.1"), python("random()", "0.2"))


def test_no_output_says_nothing():
    assert not alike(python("a = 1"), python("a = 2"))


def test_code_that_does_not_parse_is_compared_as_it_is():
    assert normalised("print(") is None
    assert normalised("a = '\0'") is None
    assert normalised("\ud800") is None
    assert alike(python("print("), python("print("))
    assert not alike(python("print(", "SyntaxError"), python("print((", "SyntaxError"))


def test_parsing_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert normalised(r"print('\d')") is not None


# Search and the rest --------------------------------------------------------------------------------------------------


def test_queries_are_alike_if_more_than_half_of_all_their_words_are_in_both():
    asked = search("metal of Belria")
    assert alike(asked, search("BELRIA: metal"))  # 2 of 3
    assert alike(asked, search("the metal of Belria today"))  # 3 of 5
    assert not alike(asked, search("the metal of Belria mines today"))  # 3 of 6
    assert not alike(asked, search("metal of Karlund"))  # 2 of 4
    assert alike(search("?"), search("?"))
    assert not alike(search("?"), search("!"))


def test_other_tools_are_compared_as_json():
    a = Call('{"name": "count", "arguments": {"text": "a", "n": 1}}')
    assert alike(a, Call('{"arguments":{"n":1,"text":"a"},"name":"count"}'))
    assert alike(
        a, Call('{"name": "count", "arguments": "{\\"text\\": \\"a\\", \\"n\\": 1}"}')
    )  # the toolbox reads it too
    assert not alike(a, Call('{"name": "count", "arguments": {"text": "a", "n": 2}}'))
    assert not alike(call("count", code="1"), call("python", code="1"))


@pytest.mark.parametrize(
    "text", ["{nonsense", "[1, 2]", '"text"', "", '{"name": "python"}', '{"name": 1, "arguments": {}}']
)
def test_a_malformed_call_is_like_itself_alone(text: str):
    assert alike(Call(text), Call(f" {text}\n"))
    assert not alike(Call(text), python("1"))
    assert not alike(Call(text), Call("{other nonsense"))


# Clusters -------------------------------------------------------------------------------------------------------------


def test_golden_clusters():
    calls = [
        zoom(0, 0, 100, 100),
        search("metal of Belria"),
        zoom(0, 0, 100, 60),  # 0.6 of the first
        python("print(1)", "1"),
        zoom(500, 500, 600, 600),
        search("Belria metal"),
        python("print(2 - 1)", "1"),
        Call("{nonsense"),
        zoom(0, 0, 100, 40),  # 0.4 of the first, but 2/3 of the third: linked
    ]
    assert cluster(calls) == [0, 1, 0, 2, 3, 1, 2, 4, 0]
    assert cluster([]) == []


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.randoms())
def test_clusters_do_not_depend_on_the_order(starts: list[int], rng: random.Random):
    calls = [zoom(40 * start, 0, 40 * start + 100, 100) for start in starts]  # neighbours overlap by 60/140, not enough
    calls += [zoom(30 * start, 200, 30 * start + 100, 300) for start in starts]  # by 70/130, enough
    numbers = cluster(calls)
    assert len(set(numbers[: len(starts)])) == len(set(starts))
    steps = sorted(set(starts))
    gaps = sum(right - left > 1 for left, right in pairwise(steps))
    assert len(set(numbers[len(starts) :])) == 1 + gaps
    assert list(dict.fromkeys(numbers)) == list(range(max(numbers) + 1))
    order = rng.sample(range(len(calls)), len(calls))
    shuffled = cluster([calls[place] for place in order])
    pairs = {(numbers[place], number) for place, number in zip(order, shuffled, strict=True)}
    assert len(pairs) == max(numbers) + 1
