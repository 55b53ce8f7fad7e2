r"""Reading a number, with its unit, out of a short answer such as `$\frac{1}{2}$`, `1,234`, `30^\circ` or `5 cm`."""

import re
from dataclasses import dataclass
from fractions import Fraction

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)"
_NUMBER = rf"{_DIGITS}(?:[eE][-+]?\d{{1,3}})?"
_VALUE = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:(?P<whole>\d+)?\s*\\frac\{{(?P<top>-?{_NUMBER})\}}\{{(?P<bottom>{_NUMBER})\}}"
    rf"|(?P<mixed>\d+\s+)?(?P<number>{_NUMBER})(?:\s*/\s*(?P<divisor>{_NUMBER}))?)"
    r"(?P<gap>\s*)(?P<unit>[^\d\s].*)?"
)
_POWER_OF_TEN = re.compile(r"(?<=[\d.])\s*(?:\\times|\\cdot|×|\*|x)\s*10\s*\^\s*(?:\{\s*(-?\d+)\s*\}|(-?\d+))")

_UNITS = """
m meter meters metre metres | cm centimeter centimeters centimetre centimetres
mm millimeter millimeters millimetre millimetres | km kilometer kilometers kilometre kilometres
in inch inches | ft foot feet | yd yard yards | mi mile miles
g gram grams | kg kilogram kilograms | mg milligram milligrams | lb lbs pound pounds | oz ounce ounces
s sec secs second seconds | min mins minute minutes | h hr hrs hour hours | day days | week weeks | month months
year years | l liter liters litre litres | ml milliliter milliliters millilitre millilitres
° deg degree degrees | % percent | € euro euros | usd dollar dollars | cent cents | unit units
hz hertz | n newton newtons | j joule joules | w watt watts | v volt volts | pa pascal pascals | °c | °f
"""
_CANONICAL = {
    name: group.split()[0]
    for line in _UNITS.strip().splitlines()
    for group in line.split("|")
    for name in group.split()
}
_MULTIPLIERS = {"dozen", "hundred", "thousand", "million", "billion", "trillion"}


@dataclass(frozen=True)
class Quantity:
    """An exact value, and its unit ("" if none was written)."""

    value: Fraction
    unit: str
    integer: bool  # written without a decimal point or a division


def read_quantity(text: str, any_unit: bool = False) -> Quantity | None:
    """The quantity that the whole of `text` (as `clean` leaves it) states, or None.

    A unit must be a known one; with `any_unit` one word after a space will do ("7 apples").
    """
    text = _POWER_OF_TEN.sub(lambda match: f"e{match[1] or match[2]}", text)
    match = _VALUE.fullmatch(text)
    if match is None:
        return None
    unit = _unit(match["unit"] or "", spaced=bool(match["gap"]), any_unit=any_unit)
    if unit is None:
        return None
    top, bottom = (match["top"], match["bottom"]) if match["top"] else (match["number"], match["divisor"] or "1")
    whole = match["whole"] or match["mixed"]
    divisor = _fraction(bottom)
    if divisor == 0 or (match["mixed"] and not match["divisor"]):
        return None
    value = _fraction(top) / divisor
    if whole and not 0 <= value < 1:  # "17 23/1" is a sum, not a mixed number
        return None
    value += int(whole or 0)
    integer = not (match["top"] or match["divisor"]) and re.search(r"[.eE]", match["number"]) is None
    return Quantity(-value if match["sign"] == "-" else value, unit, integer)


def same_quantity(gold: Quantity, answer: Quantity) -> bool:
    """Whether an answer states the gold quantity.

    A unit that one side leaves out is forgiven, two different units are not. Integers are compared exactly; where a
    side is rounded, the values may differ by 1e-6, and by 2e-6 of the gold value.
    """
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    if _close(gold, answer):
        return True
    if (gold.unit == "%") == (answer.unit == "%"):
        return False
    percent, plain = (gold, answer) if gold.unit == "%" else (answer, gold)
    return _close(Quantity(percent.value / 100, "", False), plain)


def _close(gold: Quantity, answer: Quantity) -> bool:
    if gold.value == answer.value:
        return True
    if gold.integer and answer.integer:
        return False
    tolerance = min(Fraction(1, 10**6), abs(gold.value) * Fraction(2, 10**6))
    return abs(gold.value - answer.value) <= tolerance


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace(",", "").strip().rstrip("."))


def _unit(text: str, spaced: bool, any_unit: bool) -> str | None:
    if not text:
        return ""
    name = re.sub(r"[\s{}^]", "", text.casefold()).replace("²", "2").replace("³", "3").rstrip(".")
    parts = [re.fullmatch(r"(.*?)([23]?)", part) for part in name.split("/")]
    known = [_CANONICAL[part[1]] + part[2] for part in parts if part and part[1] in _CANONICAL]
    # "5g" may be five times g, "5 g" is not.
    if len(known) == len(parts) and (spaced or len(name) > 1 or not name.isalpha()):
        return "/".join(known)
    if any_unit and spaced and re.fullmatch(r"[^\W\d_]{3,}", text) and name not in _MULTIPLIERS:
        return name
    return None
