"""Where the final answer is taken from (the order of preference), and that hostile text cannot stall the search."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axpo.rewards.extract import extract_answer, last_boxed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("hm <answer>7</answer>\n</think>\n\nThe answer is 8", "8"),
        ("a</think>b</think>\n\n<answer>9</answer>", "9"),
        ("<answer>1</answer> no, <answer> 2 </answer> done", "2"),
        (r"<answer>so \boxed{1}, or \boxed{\frac{1}{2}} m</answer>", r"\frac{1}{2}"),
        (r"\boxed{5} <answer>6</answer>", "6"),
        (r"\boxed{5} The answer is 6", "5"),
        (r"\boxed{3} then \boxed{4", "3"),
        (r"\boxed {\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{5}}", "5"),
        ("The answer is 4.\nNo: the final Answer is: (B) cat\nThank you", "(B) cat"),
        ("The answer is:\n\n  12 cm \n\n", "12 cm"),
        ("I see.\n\nFinal answer: B\n", "B"),
        ("**Answer:** 7\nThank you", "7"),
        ("**Final Answer:**\n\n7", "7"),
        ("I check whether the answer is right.\n\n**Final Answer:**\n\n7", "7"),
        ("**The answer is**: B", "B"),
        ("The answer is :\n\n7", "7"),
        ("***Answer***: 7", "7"),
        ("To answer: we add them.\n\n7", "7"),
        ("Answer:\n\n7", "7"),
        ("The answer to all of it: none", "The answer to all of it: none"),
        ("I added them.\n\n42", "42"),
        ("42", "42"),
        ("<answer></answer>", ""),
        ("<answer>5", "<answer>5"),
        ("thinking only</think>\n\n", ""),
        ("", ""),
        ("<answer><answer>A</answer></answer>", "A</answer>"),
    ],
)
def test_the_answer_is_found(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


@given(st.text(alphabet="abc{}\\ ").filter(lambda t: _balanced(t)))
def test_a_balanced_box_is_returned_whole(content: str) -> None:
    assert last_boxed(r"x \boxed{" + content + "} y") == content


def _balanced(text: str) -> bool:
    """The definition, character by character: never closed before opened, escaped characters skipped."""
    depth, index = 0, 0
    while index < len(text):
        if text[index] == "\\":
            index += 2
            if index > len(text):
                return False
            continue
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth < 0:
            return False
        index += 1
    return depth == 0


@pytest.mark.parametrize("piece", [r"\boxed{", "<answer>", "answer is ", "answer:", "answer", " \t", "{", "</think>"])
def test_repetition_takes_no_more_than_linear_time(piece: str) -> None:
    start = time.perf_counter()
    extract_answer(piece * 50_000)
    extract_answer("answer is" + piece * 50_000 + "\n")
    assert time.perf_counter() - start < 2
