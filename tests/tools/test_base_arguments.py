import asyncio
import enum
import json
import math
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axpo.tools.base import Conversation, Fault, Toolbox, ToolResult


def point(box: list[float], label: str, index: int = 7, mode: Literal["a", "b"] = "a") -> str:
    """Point at something.

    Args:
        box: Where.
        label: What.
        index: Which.
        mode: How.
    """
    return repr((box, label, index, mode))


def run(tool: Any, arguments: dict[str, Any]) -> ToolResult:
    return asyncio.run(Toolbox([tool]).call(tool.__name__, arguments, Conversation()))


# Arguments


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"label": "x"}, "missing argument 'box'"),
        ({"box": [1], "label": "x", "colour": 1}, "unknown argument 'colour'. point takes"),
        ({"box": [1], "lable": "x"}, "missing argument 'label'; unknown argument 'lable' (did you mean 'label'?)"),
        ({"box": "1,2", "label": "x"}, "box: Input should be a valid array, not '1,2'"),
        ({"box": [1, 2, "3"], "label": "x"}, "box[2]: Input should be a valid number"),
        ({"box": [True], "label": "x"}, "box[0]: Input should be a valid number"),
        ({"box": [math.nan], "label": "x"}, "box: Input should be a finite number"),
        ({"box": [1, -math.inf], "label": "x"}, "box: Input should be a finite number"),
        ({"box": [10**400], "label": "x"}, "finite number"),
        ({"box": [], "label": 5}, "label: Input should be a valid string, not 5"),
        ({"box": [], "label": None}, "label: Input should be a valid string"),
        ({"box": [], "label": "\ud800"}, "label: "),
        ({"box": [], "label": "x", "index": 2.5}, "index: Input should be a valid integer, not 2.5"),
        ({"box": [], "label": "x", "index": "2"}, "index: Input should be a valid integer, not '2'"),
        ({"box": [], "label": "x", "index": True}, "index: Input should be a valid integer, not True"),
        ({"box": [], "label": "x", "mode": "c"}, "mode: Input should be 'a' or 'b', not 'c'"),
    ],
)
def test_wrong_arguments_are_named_with_what_is_expected(arguments: dict[str, Any], complaint: str) -> None:
    result = run(point, arguments)
    assert result.fault == "bad_arguments"
    assert complaint in result.text
    assert "point takes box (array), label (string), index (integer, optional), mode (string, optional)" in result.text


def test_an_integer_may_be_written_as_a_float_and_the_other_way_round() -> None:
    assert run(point, {"box": [1, 2.5, 1e300], "label": "x", "index": 3.0}).text == "([1.0, 2.5, 1e+300], 'x', 3, 'a')"


def test_json_becomes_what_the_hint_says() -> None:
    class Colour(enum.Enum):
        RED = "red"

    def paint(colour: Colour, place: tuple[int, str], extra: dict[str, Any], maybe: int | None) -> str:
        """Paint.

        Args:
            colour: Which.
            place: Where.
            extra: More.
            maybe: Perhaps.
        """
        return repr((colour is Colour.RED, place, extra, maybe))

    arguments = {"colour": "red", "place": [1, "x"], "extra": {"k": [None, 0.5]}, "maybe": None}
    globals()["Colour"] = Colour
    assert run(paint, arguments).text == "(True, (1, 'x'), {'k': [None, 0.5]}, None)"


def test_nesting_without_end_is_a_fault() -> None:
    value: list[Any] = []
    for _ in range(5000):
        value = [value]
    assert run(point, {"box": value, "label": "x"}).fault == "bad_arguments"
    assert run(point, {"other": value}).fault == "bad_arguments"


# The call as the policy writes it


def run_text(text: str) -> ToolResult:
    return asyncio.run(Toolbox([point]).run(text, Conversation()))


@pytest.mark.parametrize("arguments", ['{"box": [1], "label": "x"}', r'"{\"box\": [1], \"label\": \"x\"}"'])
def test_arguments_are_an_object_or_a_string_that_holds_one(arguments: str) -> None:
    result = run_text('\n{"name": "point", "arguments": ' + arguments + "}\n")
    assert result == ToolResult("([1.0], 'x', 7, 'a')")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not valid JSON"),
        ("point at it", "not valid JSON"),
        ('{"name": "point", "arguments": {"box": [1}}', "not valid JSON"),
        ('{"name": "point", "arguments": "{"}', "not valid JSON"),
        ('[{"name": "point", "arguments": {}}]', "not a JSON object"),
        ('{"name": "point"}', "these keys: 'name'"),
        ("{}", "these keys: none"),
        ('{"name": "point", "parameters": {}}', "these keys: 'name', 'parameters'"),
        ('{"name": 3, "arguments": {}}', "name is not a string"),
        ('{"name": "point", "arguments": [1]}', "arguments are not an object"),
        ('{"name": "point", "arguments": "3"}', "arguments are not an object"),
        ('{"name": "point", "name": "point", "arguments": {}}', "'name' is given twice"),
        ('{"name": "point", "arguments": {"label": "x", "label": "y"}}', "'label' is given twice"),
        (r'{"name": "point", "arguments": "{\"label\": 1, \"label\": 2}"}', "'label' is given twice"),
        ("[" * 200_000, "not valid JSON"),
        ('{"name": "point", "arguments": {"index": ' + "1" * 5000 + "}}", "not valid JSON"),
    ],
)
def test_a_malformed_call_is_answered_with_the_form(text: str, complaint: str) -> None:
    result = run_text(text)
    assert result.fault == "malformed"
    assert complaint in result.text
    assert 'A call is {"name": <name>, "arguments": <object>}.' in result.text


def test_nan_is_json_to_python_but_no_argument() -> None:
    assert run_text('{"name": "point", "arguments": {"box": [NaN], "label": "x"}}').fault == "bad_arguments"
    assert run_text('{"name": "point", "arguments": {"box": [1e999], "label": "x"}}').fault == "bad_arguments"


@pytest.mark.parametrize(
    ("name", "hint"), [("pointer", "Did you mean 'point'?"), ("search", "Tools: point."), ("p" * 101, "Tools: point.")]
)
def test_an_unknown_tool_is_answered_with_the_nearest_or_all(name: str, hint: str) -> None:
    result = run_text(json.dumps({"name": name, "arguments": {}}))
    assert result.fault == Fault.UNKNOWN_TOOL
    assert result.text.startswith("Error: there is no tool 'p" if name != "search" else "Error: there is no tool 's")
    assert result.text.endswith(hint)
    assert len(result.text) < 110


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60)
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(("box", "label", "index", "mode", "more"), json_values)))
def test_whatever_the_policy_passes_is_a_result(arguments: dict[str, Any]) -> None:
    direct = run(point, arguments)
    written = run_text(json.dumps({"name": "point", "arguments": arguments}))
    assert direct == written
    good = {"box", "label"} <= arguments.keys() and "more" not in arguments
    assert direct.fault == "bad_arguments" or (direct.fault is None and good)


@settings(max_examples=60)
@given(st.text() | json_values.map(json.dumps))
def test_whatever_the_policy_writes_is_a_result(text: str) -> None:
    assert run_text(text).fault == "malformed"
