"""Threads that go on beside each other."""

import threading
from collections.abc import Iterator

import pytest
from personalization.pipeline.overlap import at_once, one_ahead


def test_the_next_item_is_made_while_one_is_used():
    made = [threading.Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    for number in one_ahead(items()):
        # Would wait in vain, if the next one were made only when it is asked for.
        assert all(event.wait(60) for event in made[: number + 2])


def test_no_more_than_the_next_item_is_made_ahead():
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            yield number

    for number in one_ahead(items()):
        assert len(made) <= number + 2
    assert made == [0, 1, 2, 3, 4]


def test_an_error_comes_behind_what_came_before_it():
    def items() -> Iterator[str]:
        yield "good"
        raise ValueError("broken")

    ahead = one_ahead(items())
    assert next(ahead) == "good"
    with pytest.raises(ValueError, match="broken"):
        next(ahead)


def test_all_work_ends_before_the_first_error_is_raised():
    may_end, ended = threading.Event(), threading.Event()

    def fail() -> None:
        may_end.set()
        raise ValueError("broken")

    def go_on() -> None:
        may_end.wait(60)
        ended.set()

    with pytest.raises(ValueError, match="broken"):
        at_once(fail, go_on)
    assert ended.is_set()
    assert at_once(lambda: 1, lambda: "two") == [1, "two"]
