"""Calls to the stores while an answer is waited for: a deadline and a circuit breaker each."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Protocol, TypeVar

import structlog
from purgatory import AsyncCircuitBreakerFactory
from purgatory.domain.model import HALF_OPENED, OpenedState

from personalization.errors import StoreError

_FAILURES = 5
"""In a row, after which a store is left alone."""
_LEFT_ALONE_S = 2.0
_LEFT_ALONE = "is left alone for a moment: it has failed too often"

T = TypeVar("T")

log = structlog.get_logger(__name__)


class Observer(Protocol):
    """Who is told of what happens: metrics."""

    def store_call(self, store: str, seconds: float, failed: bool) -> None:
        """A store was asked."""

    def answered(self, outcome: str, degraded: Collection[str]) -> None:
        """An answer was given."""


class Guard:
    """Asks the stores; one a process."""

    def __init__(self, timeout_s: float, observer: Observer | None = None) -> None:
        self.timeout_s = timeout_s
        self._observer = observer
        self._breakers = AsyncCircuitBreakerFactory(_FAILURES, _LEFT_ALONE_S, exclude=[asyncio.CancelledError])
        self._breakers.add_listener(_tell)

    async def call(self, store: str, ask: Callable[[], Awaitable[T]], *, timeout_s: float | None = None) -> T:
        """What the store says, within `timeout_s` where it has a deadline of its own.

        Raises:
            StoreError: it does not answer in time, refuses, or has failed too often just before.
        """
        deadline = timeout_s or self.timeout_s
        started = time.perf_counter()
        failed = True
        try:
            breaker = await self._breakers.get_breaker(store)
            if breaker.context.state == HALF_OPENED:  # one is trying; the others need not wait for it
                raise StoreError(store, _LEFT_ALONE)
            async with breaker:
                found = await _within(deadline, store, ask)
            failed = False
        except OpenedState as opened:
            opened.__traceback__ = None  # the breaker raises the same one each time, which would grow by each
            raise StoreError(store, _LEFT_ALONE) from None
        else:
            return found
        finally:
            if self._observer is not None:
                self._observer.store_call(store, time.perf_counter() - started, failed)


async def _within(deadline: float, store: str, ask: Callable[[], Awaitable[T]]) -> T:
    """The answer. A failure is told here, and not again for each answer that a store left alone is missing from."""
    try:
        async with asyncio.timeout(deadline):
            return await ask()
    except TimeoutError:
        log.warning("store too slow", store=store, deadline_s=deadline)
        raise StoreError(store, f"does not answer within {deadline:g} s") from None
    except StoreError as error:
        log.warning("store failed", store=store, problem=str(error))
        raise


def _tell(store: str, kind: str, event: object) -> None:
    if kind == "state_changed":
        log.warning("circuit changed", store=store, state=getattr(event, "state", None))
