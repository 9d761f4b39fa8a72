"""Overlap: threads that go on while another waits for a server, or the model computes."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items in order, each made in a thread while the one before it is used; two are held at most.

    What `items` raises is raised in its place, behind what it yielded before.
    """
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as worker:
        coming = worker.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = worker.submit(next, items, end)
            yield item  # type: ignore[misc]


def at_once(*work: Callable[[], Any]) -> list[Any]:
    """Do all of it, each in a thread; return the results in order.

    All is waited for; then the first error, in the order given, is raised.
    """
    with ThreadPoolExecutor(len(work), thread_name_prefix="at-once") as workers:
        started = [workers.submit(one) for one in work]
    return [one.result() for one in started]
