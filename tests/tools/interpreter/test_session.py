import pytest

from axpo.tools.interpreter import session


def test_the_value_of_a_last_expression_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {}
    session.evaluate("x = 20\nx + 1", "<call 1>", namespace)
    session.evaluate("x\nNone", "<call 2>", namespace)
    session.evaluate("", "<call 3>", namespace)
    session.evaluate("'text'", "<call 4>", namespace)
    assert capsys.readouterr().out == "21\n'text'\n"
    assert namespace["x"] == 20


def test_a_traceback_begins_in_the_code_and_shows_its_lines() -> None:
    programs = {"<call 1>": "def f(n):\n    return 1 / n", "<call 2>": "f(0)"}
    namespace: dict[str, object] = {}
    session.evaluate(programs["<call 1>"], "<call 1>", namespace)
    with pytest.raises(ZeroDivisionError) as raised:
        session.evaluate(programs["<call 2>"], "<call 2>", namespace)
    text = session.describe(raised.value, programs)
    assert [line for line in text.splitlines() if set(line) - set(" ~^")] == [
        "Traceback (most recent call last):",
        '  File "<call 2>", line 1, in <module>',
        "    f(0)",
        '  File "<call 1>", line 2, in f',
        "    return 1 / n",
        "ZeroDivisionError: division by zero",
    ]


def test_a_long_traceback_loses_its_middle() -> None:
    text = session.describe(ValueError("x" * 5000), {})
    assert text == "ValueError: " + "x" * 988 + "\n[... 3013 characters left out ...]\n" + "x" * 999 + "\n"


def test_an_exception_that_cannot_be_described_is_named() -> None:
    class Rude(Exception):  # noqa: N818
        __cause__ = property(lambda self: 1 / 0)

    assert session.describe(Rude(), {}) == "Rude"
