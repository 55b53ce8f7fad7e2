"""Numbers as people write them, against exact fractions."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axpo.rewards.quantities import read_quantity, same_quantity


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("5", Fraction(5), ""),
        ("+.5", Fraction(1, 2), ""),
        ("-1,234.50", Fraction(-2469, 2), ""),
        ("5.", Fraction(5), ""),
        ("1e-4", Fraction(1, 10000), ""),
        (r"1.5 \times 10^{3}", Fraction(1500), ""),
        ("2 × 10^-2 m", Fraction(1, 50), "m"),
        ("3/4", Fraction(3, 4), ""),
        (r"-\frac{3}{4}", Fraction(-3, 4), ""),
        (r"2\frac{1}{2}", Fraction(5, 2), ""),
        ("1 1/2 inches", Fraction(3, 2), "in"),
        ("30°", Fraction(30), "°"),
        ("50%", Fraction(50), "%"),
        ("12 cm^{2}", Fraction(12), "cm2"),
        ("12cm²", Fraction(12), "cm2"),
        ("60 km/h", Fraction(60), "km/h"),
        ("5 g", Fraction(5), "g"),
    ],
)
def test_a_quantity_is_read(text: str, value: Fraction, unit: str) -> None:
    quantity = read_quantity(text)
    assert quantity is not None
    assert (quantity.value, quantity.unit) == (value, unit)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "cat",
        "1,23",
        "1/0",
        "5g",
        "5x",
        "17 23/1",
        "17*23",
        "2+3",
        "(1,2)",
        "1 2",
        "5 apples",
        "7 Eleven",
        "--5",
        "1:2",
    ],
)
def test_other_text_is_no_quantity(text: str) -> None:
    assert read_quantity(text) is None


@pytest.mark.parametrize(("text", "found"), [("5 apples", True), ("5x", False), ("5 xy", False), ("5 million", False)])
def test_any_word_counts_as_a_unit_only_where_asked(text: str, found: bool) -> None:
    assert (read_quantity(text, any_unit=True) is not None) == found


@given(st.integers(-(10**18), 10**18), st.integers(0, 12))
def test_every_way_of_writing_a_decimal_is_the_same_number(units: int, places: int) -> None:
    value = Fraction(units, 10**places)
    plain = f"{'-' if units < 0 else ''}{abs(units) // 10**places}"
    if places:
        plain += f".{abs(units) % 10**places:0{places}d}"
    whole, _, decimals = plain.partition(".")
    grouped = f"{int(whole):,}" if whole != "-0" else "-0"
    grouped += f".{decimals}" if decimals else ""
    for text in (plain, grouped, f"{units}e-{places}", f"{units}/{10**places}", rf"{units} \times 10^{{-{places}}}"):
        quantity = read_quantity(text)
        assert quantity is not None, text
        assert quantity.value == value, text


@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_integers_are_the_same_only_if_equal(gold: int, answer: int) -> None:
    left, right = read_quantity(str(gold)), read_quantity(str(answer))
    assert left is not None
    assert right is not None
    assert same_quantity(left, right) == (gold == answer)


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ("123456789", "123456790", False),
        ("1/3", "0.333333", True),
        ("1/3", "0.3333", False),
        ("0.00000015", "0", False),
        ("0", "0.0000001", False),
        ("1000000.5", "1000001.5", False),
        ("3.1415927", "3.1415926", True),
        ("5 cm", "5", True),
        ("5", "5 cm", True),
        ("5 cm", "5 m", False),
        ("5 centimetres", "5 cm", True),
        ("50%", "0.5", True),
        ("0.5", "50%", True),
        ("50%", "50", True),
        ("50%", "5", False),
    ],
)
def test_values_and_units_are_compared(gold: str, answer: str, same: bool) -> None:
    left, right = read_quantity(gold), read_quantity(answer)
    assert left is not None
    assert right is not None
    assert same_quantity(left, right) == same
