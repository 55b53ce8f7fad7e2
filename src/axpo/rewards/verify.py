"""Checking an answer against the gold answer by rules: options, numbers, LaTeX, text."""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from axpo.rewards.extract import extract_answer, last_boxed
from axpo.rewards.quantities import Quantity, read_quantity, same_quantity
from axpo.rewards.symbolic import equal_expressions

LONGEST = 1000  # characters; a longer answer lists guesses (DeepEyes and PyVision-RL score it 0 as well)
_TAGS = ("<answer>", "</answer>", "<think>", "<tool_call>", "</tool_call>")


@dataclass(frozen=True)
class Verdict:
    """What was decided about an answer: the `score` 0 or 1, and `by` which rule.

    An answer that was not `decided` has no score worth using: its rollout is void, not wrong.
    """

    score: float
    decided: bool
    by: str
    answer: str


def verify(text: str, gold: str | Sequence[str], options: Sequence[str] = ()) -> Verdict:
    """Check the final answer in `text` against the gold answer, or any of several accepted ones.

    `options` are the texts of the choices A, B, … of a multiple-choice question. `by` is "choice", "number", "math",
    "text"; or "no answer", "too long", "nested tags", all of which score 0; or "no gold", which is not decided.
    Raises RuntimeError if expressions cannot be compared on this machine (`symbolic.equal_expressions`).
    """
    answer = extract_answer(text)
    golds = [g for g in ([gold] if isinstance(gold, str) else gold) if g.strip()]
    if not golds:
        return Verdict(0.0, False, "no gold", answer)
    for fault, found in (
        ("no answer", not answer),
        ("too long", len(answer) >= LONGEST),
        ("nested tags", any(tag in answer for tag in _TAGS)),
    ):
        if found:
            return Verdict(0.0, True, fault, answer)
    cleaned = clean(answer)
    choices = _without_labels(options)
    checks = [_check(clean(g), cleaned, choices) for g in golds]
    right, by = next((check for check in checks if check[0]), checks[0])
    return Verdict(float(right), True, by, answer)


def clean(text: str) -> str:
    r"""Remove what carries no meaning: `$`, `\boxed`, `\text`, spacing commands, emphasis, the final full stop."""
    boxed = last_boxed(text)
    text = text if boxed is None else boxed
    text = text.replace("−", "-").replace("–", "-").replace(r"\%", "%").replace("{,}", ",")
    text = re.sub(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree\b", "°", text)
    text = re.sub(r"(?<=\d)\\[,!](?=\d{3})", "", text)
    # A backslash before the command would make it the end of a matrix row.
    text = re.sub(r"(?<!\\)\\[()\[\]]|\\(?:left|right)(?![a-zA-Z])|\\?\$", "", text)
    text = re.sub(r"(?<!\\)\\[,;:! ]|\\q?quad\b|~", " ", text)
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = " ".join(text.split()).strip("*_` ").removesuffix(".").strip("*_` ")
    quoted = re.fullmatch(r"([\"'])(.*)\1", text)
    return quoted[2] if quoted else text


def _check(gold: str, answer: str, options: list[str]) -> tuple[bool, str]:
    index = _gold_option(gold, options)
    if index is not None:
        return _same_option(index, answer, options), "choice"
    return _same_value(gold, answer)


def _same_value(gold: str, answer: str) -> tuple[bool, str]:
    name = re.match(r"([A-Za-z])\s*=\s*(?=[^=<>]+$)", gold)
    if name and ("=" not in answer or re.match(rf"{name[1]}\s*=", answer)):
        gold = gold[name.end() :]
    if "=" not in gold and "=" in answer:
        answer = re.split(r"(?<![<>!])=", answer)[-1].strip()
    quantity = read_quantity(gold)
    if quantity is not None:
        return _same_number(quantity, gold, answer)
    if not _is_math(gold):
        return normalise_text(gold) == normalise_text(answer), "text"
    return _same_expression(gold, answer), "math"


# Options --------------------------------------------------------------------------------------------------------------


def _without_labels(options: Sequence[str]) -> list[str]:
    labels = string.ascii_uppercase.ljust(len(options))
    return [re.sub(rf"^\(?{label}[).:]\s+", "", clean(option)) for label, option in zip(labels, options, strict=False)]


def _gold_option(gold: str, options: list[str]) -> int | None:
    """The index of the gold option, or None where the question has no choices. A letter wins over an option's text."""
    letter = re.fullmatch(r"\(?([A-Z])\)?[.:]?", gold)
    if letter and (not options or _index(letter[1]) < len(options)):
        return _index(letter[1])
    matches = _options_stated(gold, options)
    return matches[0] if len(matches) == 1 else None


def _same_option(gold: int, answer: str, options: list[str]) -> bool:
    answer = re.sub(r"^(?:option|choice|answer)\b[\s:]*", "", answer, flags=re.IGNORECASE)
    named = re.fullmatch(
        r"\(?([A-Za-z])\)?[.:]?|\(?([A-Z])(?:\)[.:]?|[.:]| -)\s+(\S.*)|([A-Z]) \((.+)\)",
        answer,
    )
    index = _index(named[1] or named[2] or named[4]) if named else None
    if named is None or index is None or (options and index >= len(options)):
        stated = _options_stated(answer, options)
        if not stated and gold < len(options) and _is_math(options[gold]):
            return _same_value(options[gold], answer)[0]
        return stated == [gold]
    rest = named[3] or named[5] or ""
    stated = _options_stated(rest, options) if rest else []
    if stated:
        return index == gold and gold in stated
    others = set(re.findall(r"(?<![A-Za-z])\(?([A-Z])[).:]", rest)) - {string.ascii_uppercase[index]}
    return index == gold and not others


def _index(letter: str) -> int:
    return string.ascii_uppercase.index(letter.upper())


def _options_stated(text: str, options: list[str]) -> list[int]:
    """The options that say the same as `text`, by the strictest comparison that finds any."""
    quantity = read_quantity(text)
    for matches in (
        [option.casefold() == text.casefold() for option in options],
        [quantity is not None and _states(quantity, option) for option in options],
        [quantity is None and normalise_text(option) == normalise_text(text) for option in options],
    ):
        if any(matches):
            return [index for index, match in enumerate(matches) if match]
    return []


# Numbers and expressions ----------------------------------------------------------------------------------------------


_SIMPLE = re.compile(
    r"""-?(?: \d* \s* \\sqrt (?:\[\d+\])? \s* (?:\d | \{\d+\})
          | [\d.]+ \s* \^ \s* (?:\d | \{-?\d+\})
          | [\d.]* \s* \\pi
          | [\d.]+ \s* : \s* [\d.]+ )""",
    re.VERBOSE,
)


def _states(gold: Quantity, text: str) -> bool:
    quantity = read_quantity(text, any_unit=not gold.unit)
    return quantity is not None and same_quantity(gold, quantity)


def _same_number(quantity: Quantity, gold: str, answer: str) -> tuple[bool, str]:
    if read_quantity(answer, any_unit=not quantity.unit) is not None:
        return _states(quantity, answer), "number"
    # "17*23" equals 391 and answers nothing: of the expressions, only one root, power, ratio or multiple of pi may
    # stand for a number.
    if not _SIMPLE.fullmatch(answer):
        return False, "number"
    return equal_expressions(gold, answer), "math"


def _is_math(text: str) -> bool:
    """Whether a text is an expression: no words, and an operator, a command, or nothing but digits and punctuation.

    Dates and ranges such as 2023-05-01 are text: as a difference they would equal some number.
    """
    if re.fullmatch(r"\d+(?:[-/.]\d+){2,}|\d+-\d+|\d+:\d\d:\d\d", text):
        return False
    bare = re.sub(r"\\(?:begin|end)\{[a-z]+\}|\\[A-Za-z]+", "", text)
    words = set(re.findall(r"[^\W\d_]{2,}", bare)) - {"sin", "cos", "tan", "log", "ln", "exp", "pi"}
    if words:
        return False
    if re.search(r"\\[A-Za-z]+|[-+*/^=<>]", text):
        return True
    return re.search(r"[^\W\d_]", text) is None and re.search(r"\d", text) is not None


def _same_expression(gold: str, answer: str) -> bool:
    left, right = (re.sub(r"\s+", "", text) for text in (gold, answer))
    if left == right:
        return True
    # math-verify reads (1, 2) as an interval and 2, 1 as a set, so a point made of numbers is compared here.
    point = re.fullmatch(r"\((.+,.+)\)", left)
    if point:
        golds = [read_quantity(part) for part in point[1].split(",")]
        if None not in golds:
            parts = re.sub(r"^\((.*)\)$", r"\1", right).split(",")
            return len(parts) == len(golds) and all(g and _states(g, p) for g, p in zip(golds, parts, strict=True))
    return _is_math(answer) and equal_expressions(gold, answer)


# Text -----------------------------------------------------------------------------------------------------------------


def normalise_text(text: str) -> str:
    """SQuAD's normalisation (case, punctuation, articles, spaces; Rajpurkar et al. 2016), which keeps one thing more.

    A sign or separator inside a number stays, for "version 1.5" is not "version 15". A text that consists of
    articles alone is left as it is.
    """
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text.casefold())
    plain = _PUNCTUATION.sub(lambda match: match[1] or "", text)
    words = [word for word in plain.split() if word not in ("a", "an", "the")]
    return " ".join(words or plain.split())


_PUNCTUATION = re.compile(rf"((?<=\d)[.:/-](?=\d)|(?<!\w)-(?=\d))|[{re.escape(string.punctuation)}“”‘’«»…¿¡]")
