"""Joining: what is asked for while a batch is under way makes up the next one, and nothing is made twice at once."""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Hashable, Sequence
from itertools import islice
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Batcher(Generic[K, V]):
    """Asks `work` for up to `most` different keys at once, in up to `at_once` batches side by side.

    A lone key never waits; under load a batch costs little more than one key, so the queue stays short. An exception
    that is not `alike` for all of a batch has its keys worked on one by one. Of one event loop.
    """

    def __init__(
        self,
        work: Callable[[Sequence[K]], Awaitable[Sequence[V]]],
        most: int,
        at_once: int,
        alike: type[Exception] = Exception,
    ) -> None:
        self._work = work
        self._alike = alike
        self._most = most
        self._at_once = at_once
        self._waiting: dict[K, asyncio.Future[V]] = {}
        self._under_way: dict[K, asyncio.Future[V]] = {}
        self._workers: set[asyncio.Task[None]] = set()

    async def ask(self, key: K) -> V:
        """The key's value: made now, or the one that is being made already.

        Raises:
            Exception: whatever `work` raised for the batch.
        """
        future = self._under_way.get(key) or self._waiting.get(key)
        if future is None:
            future = self._waiting[key] = asyncio.get_running_loop().create_future()
            if len(self._workers) < self._at_once:
                # Not in the context of the one who asks: a batch is of many requests.
                worker = asyncio.create_task(self._run(), context=contextvars.Context())
                self._workers.add(worker)
                worker.add_done_callback(self._workers.discard)
        # One who stops waiting must not stop it for the others.
        return await asyncio.shield(future)

    async def _run(self) -> None:
        while self._waiting:
            batch = dict(islice(self._waiting.items(), self._most))
            for key in batch:
                del self._waiting[key]
            self._under_way.update(batch)
            try:
                await self._make(batch)
            except asyncio.CancelledError:
                for future in [*batch.values(), *self._waiting.values()]:
                    future.cancel()
                self._waiting.clear()
                raise
            finally:
                for key in batch:
                    del self._under_way[key]

    async def _make(self, batch: dict[K, "asyncio.Future[V]"]) -> None:
        try:
            values = await self._work(list(batch))
        except Exception as error:  # noqa: BLE001 - handed on to all who asked
            if len(batch) > 1 and not isinstance(error, self._alike):
                for key, future in batch.items():  # one of them may have spoilt it for the others
                    await self._make({key: future})
                return
            for future in batch.values():
                future.set_exception(error)
                future.exception()  # seen, even where nobody waits any more
        else:
            for future, value in zip(batch.values(), values, strict=True):
                future.set_result(value)
