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
from personalization.schemas import VectorSpace
from personalization.settings import Settings
from personalization.stores.embedding import AsyncEmbedder

from services.embedding import encoders
from services.embedding.batching import Batcher, BusyError
from services.embedding.encoders import MAX_TEXTS, Encoders, NotLoadedError
from services.embedding.main import create_app


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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> set[VectorSpace]:
    """Spaces whose model can be loaded; all others are out of reach. A vector says by which it was made."""
    there: set[VectorSpace] = set()

    class Loaded:
        def __init__(self, space: VectorSpace) -> None:
            self.space = space

        def encode(self, texts: list[str]) -> Vectors:
            return np.full((len(texts), self.space.dim), len(self.space.model), dtype=np.float32)

    def load(self: Encoders, space: VectorSpace) -> Loaded:
        if space not in there:
            raise EmbeddingError("the hub is out of reach")
        return Loaded(space)

    monkeypatch.setattr(Encoders, "_warm_encoder", load)
    monkeypatch.setattr(encoders, "_TRY_AGAIN_S", 0.01)
    return there


async def test_until_the_model_is_loaded_it_is_up_but_not_ready_and_the_client_says_so(hub: set[VectorSpace]):
    transport = httpx.ASGITransport(create_app(Settings(_env_file=None)))
    async with httpx.AsyncClient(transport=transport, base_url="http://embedding") as client:
        assert (await client.get("/health")).json() == {"status": "ok"}
        for answer in (await client.get("/ready"), await client.post("/embed", json={"texts": ["hello"]})):
            assert answer.status_code == 503
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.headers["retry-after"] == "5"
            assert answer.json()["detail"] == "The model is not loaded yet."
        with pytest.raises(StoreError, match=r"^embedding: is busy, or its model is not loaded yet$"):
            await AsyncEmbedder(client).embed(["hello"])


async def test_a_full_queue_is_a_503_that_says_when_to_try_again(slow: Slow, hub: set[VectorSpace]):
    app = create_app(Settings(_env_file=None))
    app.state.encoders.start(app.state.encoders.own)
    serving = app.state.encoders._serving[app.state.encoders.own]
    serving.batcher = Batcher(slow.encode, batch_texts=1, waiting_texts=0, patience_s=1)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://embedding") as client:
        answer = await client.post("/embed", json={"texts": ["1"]})
    app.state.encoders.stop()

    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["detail"] == "Too many texts wait to be embedded."


async def test_a_model_that_cannot_be_loaded_is_tried_for_again(hub: set[VectorSpace]):
    found = Encoders(Settings(_env_file=None))
    found.start(found.own)
    await asyncio.sleep(0.05)
    assert found.latest is None
    hub.add(found.own)

    async with asyncio.timeout(60):
        while found.latest is None:
            await asyncio.sleep(0.01)

    assert found.latest == found.own
    found.stop()


async def test_the_space_that_is_asked_for_is_loaded_and_at_most_two_are(hub: set[VectorSpace]):
    """What is served may have moved to another model; the service follows without a restart."""
    found = Encoders(Settings(_env_file=None, embedding_model="own", embedding_dim=8))
    later, last = VectorSpace("later", 8), VectorSpace("the last", 8)
    hub |= {found.own, later, last}

    async def vector(space: VectorSpace) -> float:
        async with asyncio.timeout(60):
            while True:
                try:
                    return float((await found.embed(space, ["hello"]))[0, 0])
                except NotLoadedError:
                    await asyncio.sleep(0.01)

    assert [await vector(one) for one in (found.own, later, found.own, last)] == [3, 5, 3, 8]
    assert set(found._serving) == {found.own, last}  # the one that was not asked for the longest made room
    assert found.latest == last
    found.stop()


async def test_a_model_without_its_dimension_is_no_space(hub: set[VectorSpace]):
    transport = httpx.ASGITransport(create_app(Settings(_env_file=None)))
    async with httpx.AsyncClient(transport=transport, base_url="http://embedding") as client:
        answer = await client.post("/embed", json={"texts": ["hello"], "model": "some/model"})

    assert answer.status_code == 422
    assert "go together" in answer.json()["detail"]


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
