"""Verdicts, with the traps that benchmarks and policies set."""

import string
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axpo.rewards.verify import Verdict, clean, normalise_text, verify

PETS = ("cat", "dog", "red car", "a dog house")


def score(answer: str, gold: str | tuple[str, ...], options: tuple[str, ...] = ()) -> float:
    verdict = verify(f"<answer>{answer}</answer>", gold, options)
    assert verdict.decided
    return verdict.score


LETTER_FORMS = ["A", "(A)", "A.", "A)", "(A).", "a", "**A**", r"\text{A}", "$A$", "Option A", r"\boxed{A}"]
TEXT_FORMS = ["A: cat", "A. cat", "A) cat", "(A) cat", "A (cat)", "A - cat", "cat", "Cat", "the cat."]


@pytest.mark.parametrize("answer", LETTER_FORMS + TEXT_FORMS)
def test_accepted_forms_of_the_letter(answer: str) -> None:
    assert score(answer, "A", PETS) == 1
    assert score(answer, "(A)", PETS) == 1
    assert score(answer, "cat", PETS) == 1
    assert score(answer, "B", PETS) == 0


@pytest.mark.parametrize(
    "answer", ["A or B", "A, B", "A and B", "A) cat B) dog", "(A) (B)", "AB", "A: dog", "B (cat)", "E"]
)
def test_two_letters_or_a_contradiction_fail(answer: str) -> None:
    assert score(answer, "A", PETS) == 0
    assert score(answer, "B", PETS) == 0


def test_a_letter_needs_no_options() -> None:
    assert score("(C) because it is near", "C") == 1
    assert score("C", "D") == 0
    assert score("A) x or B) y", "A") == 0


def test_bare_letter_options_are_letters() -> None:
    assert score("C", "C", tuple("ABCDE")) == 1
    assert score("D", "C", tuple("ABCDE")) == 0


def test_shuffled_options_keep_the_text_and_move_the_letter() -> None:
    for options in (("red", "blue"), ("blue", "red")):
        letter = string.ascii_uppercase[options.index("red")]
        assert score(letter, "red", options) == 1
        assert score("red", letter, options) == 1
        assert score("blue", letter, options) == 0


def test_options_may_carry_their_labels_and_numbers() -> None:
    assert score("1/2", "B", ("(A) 1", "(B) 0.5", "(C) 2")) == 1
    assert score(r"\sqrt{8}", "A", (r"$2\sqrt{2}$", "$4$")) == 1
    assert score("0.5", "B", ("0.5", "1/2", "2")) == 0, "0.5 is literally option A"
    assert score("I. M. Pei", "B", ("A. Loos", "I. M. Pei")) == 1


def test_two_equal_options_are_not_a_choice() -> None:
    assert score("2", "A", ("1", "1")) == 0
    assert score("1", "A", ("1", "1")) == 0


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("391", "391", 1),
        ("391", "17*23", 0),
        ("391", r"17 \times 23", 0),
        ("391", "(17)(23)", 0),
        ("40", "17+23", 0),
        ("40", "17 23/1", 0),
        ("391", "17/(1/23)", 0),
        ("391", "17*23 = 391", 1),
        ("391", "17*23 = 390", 0),
        (r"\boxed{1{,}234}", "$1,234$", 1),
        ("1234 ", "1234.0", 1),
        (r"$\frac{1}{2}$", "0.5", 1),
        ("0.5", r"\dfrac12", 1),
        ("1024", "2^{10}", 1),
        ("5", "five", 0),
        ("5", "5 or 7", 0),
        ("5", "5 apples", 1),
        ("-5", "5", 0),
        ("−5", "-5", 1),
        ("1.5", "15", 0),
        ("x=5", "5", 1),
        ("5", "x = 5", 1),
        ("x=5", "y=5", 0),
        ("1:2", "1:2", 1),
        ("1:2", "2:1", 0),
        ("(1,2)", "(1, 2)", 1),
        ("(1,2)", "(2,1)", 0),
        ("(1,2)", r"\left(1.0,\,2\right)", 1),
        ("(1,2)", "(1,2,3)", 0),
        (r"2\sqrt{2}", r"\sqrt{8}", 1),
        (r"\frac{\pi}{2}", r"\pi/2", 1),
        (r"30^\circ", "30", 1),
        (r"5\text{ cm}", "5 cm", 1),
        (r"\begin{pmatrix}1\\ 2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", 1),
        (r"\begin{pmatrix}1\\ 2\end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", 0),
    ],
)
def test_numbers_and_expressions(gold: str, answer: str, right: int) -> None:
    assert score(answer, gold) == right


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("Eiffel Tower", "the eiffel tower.", 1),
        ("Eiffel Tower", "Eiffel", 0),
        ("abc", "cba", 0),
        ("2023-05-01", "2023-05-01", 1),
        ("2023-05-01", "2017", 0),
        ("1990-1995", "-5", 0),
        ("Version 1.5", "version 15", 0),
        ("1,000 people", "1000 people", 1),
        ("Apollo 11", "11", 0),
        ("7 Eleven", "7", 0),
        ("H2O", "h2o", 1),
        ("The The", "the the", 1),
        ("The The", "a", 0),
        ("x", "x", 1),
    ],
)
def test_text(gold: str, answer: str, right: int) -> None:
    assert score(answer, gold) == right


def test_any_of_several_golds_is_enough() -> None:
    assert score("NYC", ("New York City", "NYC")) == 1
    assert score("42", ("forty-two", "42")) == 1
    assert score("Boston", ("New York City", "NYC")) == 0


def test_a_long_answer_scores_0() -> None:
    assert verify("x" * 999, "x" * 999).score == 1
    assert verify("x" * 1000, "x" * 1000) == Verdict(0.0, True, "too long", "x" * 1000)


def test_nested_tags_score_0() -> None:
    verdict = verify("<answer><answer>A</answer></answer>", "A")
    assert (verdict.score, verdict.decided, verdict.by) == (0, True, "nested tags")


def test_no_answer_is_wrong_and_no_gold_is_undecided() -> None:
    assert verify("still thinking</think>\n", "A") == Verdict(0.0, True, "no answer", "")
    assert verify("A", " ") == Verdict(0.0, False, "no gold", "A")
    assert verify("A", ("", " ")) == Verdict(0.0, False, "no gold", "A")


@pytest.mark.parametrize(
    ("gold", "answer", "by"),
    [("B", "B", "choice"), ("12", "13", "number"), ("red", "red", "text"), ("x+1", "1+x", "math")],
)
def test_the_rule_that_decided_is_named(gold: str, answer: str, by: str) -> None:
    assert verify(answer, gold).by == by


def test_numbers_words_and_letters_need_no_symbolic_mathematics() -> None:
    code = (
        "import sys; from axpo.rewards import symbolic; from axpo.rewards.verify import verify\n"
        "for gold in ('391', '1/2', 'red', 'A', '(1,2)'): assert verify(gold, gold).score == 1\n"
        "assert symbolic._worker is None and not {'sympy', 'math_verify'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@given(
    st.integers(-(10**9), 10**9), st.sampled_from(["{}", "${}$", r"\boxed{{{}}}", "{} cm", "**{}**", "{}.0", "x = {}"])
)
def test_an_integer_is_right_in_every_form(value: int, form: str) -> None:
    assert score(form.format(value), str(value)) == 1
    assert score(form.format(value), str(value + 1)) == 0


@given(st.text(max_size=80))
def test_any_text_gets_a_verdict_and_equals_itself(text: str) -> None:
    assert verify(text, "gold").score in (0, 1)
    assert normalise_text(normalise_text(text)) == normalise_text(text)
    assert clean(clean(text)) == clean(clean(clean(text)))
