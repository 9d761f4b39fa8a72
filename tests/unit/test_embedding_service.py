"""The embedding service without a model: what waits is bounded, put together, and given back to whom it belongs."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import suppress

import httpx
import numpy as np
import pytest
from personalization.encoder import Vectors
from personalization.errors import EmbeddingError, StoreError
from personalization.settings import Settings
from personalization.stores.embedding import AsyncEmbedder

from services.embedding import main
from services.embedding.batching import Batcher, BusyError
from services.embedding.main import MAX_TEXTS, create_app


class Slow:
    """An encoder that goes on when it is let; a text's vector is its number."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.begun = threading.Semaphore(0)
        self.let = threading.Semaphore(0)

    def encode(self, texts: list[str]) -> Vectors:
        self.batches.append(texts)
        self.begun.release()
        self.let.acquire(timeout=10)
        if "bad" in texts:
            raise EmbeddingError("no direction")
        return np.asarray([[float(text)] for text in texts], dtype=np.float32)

    async def has_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.acquire, timeout=10)


@pytest.fixture
def slow() -> Slow:
    return Slow()


@pytest.fixture
async def batcher(slow: Slow) -> AsyncIterator[Batcher]:
    batcher = Batcher(slow.encode, batch_texts=4, waiting_texts=6, patience_s=5)
    running = asyncio.create_task(batcher.run())
    yield batcher
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


async def asked(batcher: Batcher, *texts: str) -> asyncio.Task[Vectors]:
    """A request that waits by now."""
    task = asyncio.create_task(batcher.embed(list(texts)))
    await asyncio.sleep(0)
    return task


async def test_what_waits_while_a_batch_runs_is_the_next_batch_and_everyone_gets_their_own(
    slow: Slow, batcher: Batcher
):
    first = await asked(batcher, "1")
    await slow.has_begun()
    others = [await asked(batcher, *texts) for texts in (("2",), ("3", "4"), ("5", "6"), ("7",))]
    slow.let.release(9)

    assert (await first).tolist() == [[1]]
    assert [(await one).tolist() for one in others] == [[[2]], [[3], [4]], [[5], [6]], [[7]]]
    assert slow.batches == [["1"], ["2", "3", "4"], ["5", "6", "7"]]  # whole requests, four texts at most


async def test_a_request_beyond_what_may_wait_is_refused_at_once_and_the_others_are_answered(
    slow: Slow, batcher: Batcher
):
    first = await asked(batcher, "0")
    await slow.has_begun()
    waiting = [await asked(batcher, str(one)) for one in range(1, 6)]

    with pytest.raises(BusyError):
        await batcher.embed(["6", "7"])
    last = await asked(batcher, "6")
    with pytest.raises(BusyError):
        await batcher.embed(["7"])

    slow.let.release(9)
    assert [(await one).tolist() for one in (first, *waiting, last)] == [[[one]] for one in range(7)]
    assert (await batcher.embed(["8"])).tolist() == [[8]]


async def test_who_waits_for_too_long_is_told_and_nothing_is_encoded_for_them(slow: Slow):
    batcher = Batcher(slow.encode, batch_texts=4, waiting_texts=6, patience_s=0.1)
    running = asyncio.create_task(batcher.run())
    first = await asked(batcher, "1")
    await slow.has_begun()
    second = await asked(batcher, "2")

    for one in (first, second):
        with pytest.raises(BusyError):
            await one

    slow.let.release(9)
    assert (await batcher.embed(["3"])).tolist() == [[3]]
    assert slow.batches == [["1"], ["3"]]
    running.cancel()


async def test_a_text_that_cannot_be_encoded_fails_its_own_request_alone(slow: Slow, batcher: Batcher):
    slow.let.release(99)
    first = await asked(batcher, "1")
    good, bad, other = [await asked(batcher, text) for text in ("2", "bad", "3")]

    assert [(await one).tolist() for one in (first, good, other)] == [[[1]], [[2]], [[3]]]
    with pytest.raises(EmbeddingError, match="no direction"):
        await bad
    assert (await batcher.embed(["4"])).tolist() == [[4]]


# --- before the model is there


async def test_until_the_model_is_loaded_it_is_up_but_not_ready_and_the_client_says_so():
    transport = httpx.ASGITransport(create_app(Settings(_env_file=None)))
    async with httpx.AsyncClient(transport=transport, base_url="http://embedding") as client:
        assert (await client.get("/health")).json() == {"status": "ok"}
        for answer in (await client.get("/ready"), await client.post("/embed", json={"texts": ["hello"]})):
            assert answer.status_code == 503
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["detail"] == "The model is not loaded yet."
        with pytest.raises(StoreError, match=r"^embedding: is busy, or its model is not loaded yet$"):
            await AsyncEmbedder(client).embed(["hello"])


async def test_a_full_queue_is_a_503_that_says_when_to_try_again(slow: Slow):
    app = create_app(Settings(_env_file=None))
    app.state.batcher = Batcher(slow.encode, batch_texts=1, waiting_texts=0, patience_s=1)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://embedding") as client:
        answer = await client.post("/embed", json={"texts": ["1"]})

    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["detail"] == "Too many texts wait to be embedded."


async def test_a_model_that_cannot_be_loaded_is_tried_for_again(monkeypatch: pytest.MonkeyPatch):
    tries: list[Settings] = []

    def load(settings: Settings) -> str:
        tries.append(settings)
        if len(tries) < 3:
            raise EmbeddingError("the hub is out of reach")
        return "loaded"

    monkeypatch.setattr(main, "_warm_encoder", load)
    monkeypatch.setattr(main, "_TRY_AGAIN_S", 0.01)

    assert await main._load(Settings(_env_file=None)) == "loaded"
    assert len(tries) == 3


# --- what it says of itself


def test_its_document_says_how_much_it_takes():
    document = create_app(Settings(_env_file=None)).openapi()

    texts = document["components"]["schemas"]["Texts"]["properties"]["texts"]
    assert (texts["minItems"], texts["maxItems"], texts["items"]["minLength"]) == (1, MAX_TEXTS, 1)
    assert set(document["paths"]) == {"/embed", "/health", "/ready", "/metrics"}


@pytest.mark.parametrize("url", ["http://127.0.0.1:notaport", "nothing", ""])
async def test_an_address_that_is_none_is_an_error_of_the_embedding_service(url: str):
    with pytest.raises(StoreError, match="embedding: "):
        await AsyncEmbedder.from_settings(Settings(_env_file=None, embedding_url=url)).embed(["hello"])
