"""One inference at a time; the requests that come while one runs are encoded together in the next."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from personalization.encoder import Vectors


class BusyError(Exception):
    """More waits already than may, or the request has waited for too long."""


@dataclass(frozen=True)
class _Request:
    texts: list[str]
    vectors: asyncio.Future[Vectors]


class Batcher:
    """Puts requests together for an encoder, which works in another thread.

    A batch holds up to `batch_texts` texts, and at most `waiting_texts` wait for theirs: what a request waits for is
    bounded, and so is the memory.
    """

    def __init__(
        self,
        encode: Callable[[list[str]], Vectors],
        *,
        batch_texts: int,
        waiting_texts: int,
        patience_s: float,
    ) -> None:
        self._encode = encode
        self._batch_texts = batch_texts
        self._waiting_texts = waiting_texts
        self._patience_s = patience_s
        self._waiting: deque[_Request] = deque()
        self._arrived = asyncio.Event()

    async def embed(self, texts: list[str]) -> Vectors:
        """Vectors of the texts, shape (len(texts), dim).

        Raises:
            BusyError: the queue is full, or the vectors are not there within `patience_s`.
            Exception: what the encoder raised for these texts.
        """
        if sum(len(one.texts) for one in self._waiting) + len(texts) > self._waiting_texts:
            raise BusyError
        request = _Request(texts, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        self._arrived.set()
        try:
            async with asyncio.timeout(self._patience_s):
                return await request.vectors
        except TimeoutError as error:
            raise BusyError from error

    async def run(self) -> None:
        """Encode what waits, until cancelled."""
        while True:
            await self._arrived.wait()
            await self._answer(self._take())

    def _take(self) -> list[_Request]:
        """The next batch: whole requests, without those that nobody waits for any more."""
        batch: list[_Request] = []
        free = self._batch_texts
        while self._waiting and (not batch or len(self._waiting[0].texts) <= free):
            request = self._waiting.popleft()
            if not request.vectors.done():
                batch.append(request)
                free -= len(request.texts)
        if not self._waiting:
            self._arrived.clear()
        return batch

    async def _answer(self, batch: list[_Request]) -> None:
        if not batch:
            return
        encoding = asyncio.ensure_future(asyncio.to_thread(self._encode, [text for one in batch for text in one.texts]))
        await asyncio.wait([encoding])
        error = encoding.exception()
        if error is not None and len(batch) > 1:  # it may be one request's alone
            for request in batch:
                await self._answer([request])
            return
        start = 0
        for request in batch:
            stop = start + len(request.texts)
            if request.vectors.done():  # given up meanwhile
                pass
            elif error is not None:
                request.vectors.set_exception(error)
            else:
                request.vectors.set_result(encoding.result()[start:stop])
            start = stop
