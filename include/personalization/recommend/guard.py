"""Calls to the stores while an answer is waited for: a deadline and a circuit breaker each."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Protocol, TypeVar

import structlog
from purgatory import AsyncCircuitBreakerFactory
from purgatory.domain.model import OpenedState

from personalization.errors import StoreError

_FAILURES = 5
"""In a row, after which a store is left alone."""
_LEFT_ALONE_S = 2.0

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
            async with await self._breakers.get_breaker(store):
                try:
                    async with asyncio.timeout(deadline):
                        found = await ask()
                except TimeoutError:
                    raise StoreError(store, f"does not answer within {deadline:g} s") from None
            failed = False
        except OpenedState as opened:
            opened.__traceback__ = None  # the breaker raises the same one each time, which would grow by each
            raise StoreError(store, "is left alone for a moment: it has failed too often") from None
        else:
            return found
        finally:
            if self._observer is not None:
                self._observer.store_call(store, time.perf_counter() - started, failed)


def _tell(store: str, kind: str, event: object) -> None:
    if kind == "state_changed":
        log.warning("circuit changed", store=store, state=getattr(event, "state", None))
