import pytest

from axpo.engines.base import RolloutKey
from axpo.engines.clock import Clock

A, B = RolloutKey("q", 0), RolloutKey("q", 1)


def test_an_open_rollout_is_expected_at_once() -> None:
    clock: Clock[str] = Clock(overlap=3)
    clock.open(A)
    assert clock.late()
    clock.ask(A, "first")
    assert not clock.late()
    assert clock.take_due() == ["first"]
    assert clock.take_due() == []


def test_one_that_comes_back_early_is_held_until_its_deadline() -> None:
    clock: Clock[str] = Clock(overlap=3)
    clock.open(A)
    clock.ask(A, "first")
    clock.take_due()
    clock.step = 10
    clock.answered(A, "first")
    assert not clock.late()
    clock.ask(A, "second")
    for step, due in ((10, []), (12, []), (13, ["second"])):
        clock.step = step
        assert clock.take_due() == due


def test_one_that_is_late_is_waited_for() -> None:
    clock: Clock[str] = Clock(overlap=3)
    clock.open(A)
    clock.ask(A, "first")
    clock.take_due()
    clock.step = 10
    clock.answered(A, "first")
    clock.step = 12
    assert not clock.late()
    clock.step = 13
    assert clock.late()
    clock.close(A)
    assert not clock.late()


def test_same_step_in_order_of_rollouts_then_of_asking() -> None:
    clock: Clock[str] = Clock(overlap=0)
    for key, job in ((B, "b"), (A, "a1"), (A, "a2")):
        clock.ask(key, job)
    assert clock.take_due() == ["a1", "a2", "b"]


def test_jump_to_the_next_deadline() -> None:
    clock: Clock[str] = Clock(overlap=5)
    assert not clock.jump()
    for key in (A, B):
        clock.open(key)
        clock.ask(key, str(key))
    clock.take_due()
    clock.answered(A, str(A))
    clock.step = 2
    clock.answered(B, str(B))
    clock.ask(B, "held")
    assert clock.jump()
    assert clock.step == 5  # A is away
    clock.close(A)
    assert clock.jump()
    assert clock.step == 7
    assert clock.take_due() == ["held"]
    assert not clock.jump()  # B's request is being computed: nothing else is expected
    assert clock.step == 7


def test_a_rollout_opens_once() -> None:
    clock: Clock[str] = Clock(overlap=0)
    clock.open(A)
    with pytest.raises(ValueError, match="is open already"):
        clock.open(A)


def test_a_request_given_up_is_not_due() -> None:
    clock: Clock[str] = Clock(overlap=2)
    clock.open(A)
    clock.ask(A, "first")
    clock.answered(A, "first")
    assert clock.take_due() == []
    assert clock.asking() == []
    clock.step = 2
    assert clock.late()
