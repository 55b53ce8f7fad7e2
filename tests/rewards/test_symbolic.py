"""Expressions compared in a child process: right, safe from threads, and never stuck."""

import threading
import time

import pytest

from axpo.rewards import symbolic
from axpo.rewards.symbolic import equal_expressions


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        (r"\frac{\sqrt{3}}{2}", r"\frac{1}{2}\sqrt{3}", True),
        ("x^2+1", "1+x^2", True),
        ("x^2+1", "x^2-1", False),
        (r"\{1,2\}", r"\{2,1\}", True),
        ("[0,1)", "(0,1)", False),
        (r"\frac{", "5", False),
    ],
)
def test_expressions_are_compared(gold: str, answer: str, equal: bool) -> None:
    assert equal_expressions(gold, answer) == equal


def test_an_expression_that_never_ends_is_not_equal_and_the_next_one_is_compared() -> None:
    start = time.perf_counter()
    assert not equal_expressions("x^2", "9^{9^{9^{9}}}")
    assert time.perf_counter() - start < 60
    assert equal_expressions("x^2", "x*x")


def test_it_works_from_several_threads_at_once() -> None:
    pairs = [(f"x+{n}", f"{n % 5}+x") for n in range(10)]
    found: dict[int, bool] = {}

    def compare(index: int) -> None:
        found[index] = equal_expressions(*pairs[index])

    threads = [threading.Thread(target=compare, args=(index,)) for index in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: n < 5 for n in range(10)}


def test_a_line_break_in_an_answer_does_not_shift_the_protocol() -> None:
    assert equal_expressions("x+1", "1\n+x")
    assert not equal_expressions("x+1", "x\n+2\n")


def test_text_that_is_no_unicode_is_not_equal() -> None:
    assert not equal_expressions("x+1", "\ud800+1")
    assert equal_expressions("x+1", "1+x")


def test_an_interrupt_leaves_no_reply_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    assert equal_expressions("x+1", "1+x")
    worker = symbolic._worker
    assert worker is not None
    assert worker.stdin is not None
    assert worker.stdout is not None
    pipes = (worker.stdin, worker.stdout)

    def interrupt() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "stdout", type("Interrupted", (), {"readline": staticmethod(interrupt)})())
    monkeypatch.setattr(worker, "communicate", worker.wait)
    with pytest.raises(KeyboardInterrupt):
        equal_expressions("x+1", "1+x")
    for pipe in pipes:
        pipe.close()
    assert not equal_expressions("x+1", "x+2")


def test_a_child_that_does_not_start_is_a_fault_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    symbolic._stop()
    monkeypatch.setattr(symbolic.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"):
        equal_expressions("x+1", "1+x")
