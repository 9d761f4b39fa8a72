"""The embedding service as a process with its model, and the API's client of it."""

import asyncio
import base64
import json
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import structlog
from conftest import SAMPLE, EmbeddingService, free_ports
from personalization.encoder import Encoder
from personalization.errors import StoreError
from personalization.local.config import PACKAGED_MODEL
from personalization.schemas import VectorSpace
from personalization.settings import Settings
from personalization.stores.embedding import AsyncEmbedder

SECRET = "my account is 4711-0815"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """The pipeline's."""
    settings = Settings(_env_file=None)
    return Encoder(PACKAGED_MODEL, settings.embedding_dim)


@pytest.fixture(scope="module")
def said() -> list[str]:
    """Messages of the sample, and some that it has none of."""
    messages = [one["message"] for one in json.loads(SAMPLE.read_text(encoding="utf-8"))][:300]
    return [*messages, "?", "日本へ行きたい 🎿", "naïve café, élan", "tabs\tand\nlines", "word " * 1600]


def settings_for(url: str, **changes: Any) -> Settings:
    return Settings(_env_file=None, embedding_url=url, **changes)


@pytest.fixture
async def embedder(embedding_service: EmbeddingService) -> AsyncIterator[AsyncEmbedder]:
    embedder = AsyncEmbedder.from_settings(settings_for(embedding_service.url, store_timeout_s=60))
    yield embedder
    await embedder.aclose()


async def test_its_vectors_are_those_of_the_pipeline(
    embedding_service: EmbeddingService, embedder: AsyncEmbedder, encoder: Encoder, said: list[str]
) -> None:
    pipeline = encoder.encode(said)

    served = np.concatenate([await embedder.embed(said[at : at + 64]) for at in range(0, len(said), 64)])

    assert served.shape == pipeline.shape == (len(said), Settings(_env_file=None).embedding_dim)
    assert served.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(served, axis=1), 1, atol=1e-6)
    # Alike to rounding, which hangs on what else is in the batch, coarsest where the device works in bfloat16.
    assert (served * pipeline).sum(axis=1).min() >= 0.999
    one = await embedder.embed([said[0]], space=VectorSpace(PACKAGED_MODEL, 1024))
    assert (one[0] @ pipeline[0]) >= 0.999


async def test_many_at_once_each_get_the_vectors_of_their_own_texts(
    embedder: AsyncEmbedder, encoder: Encoder, said: list[str]
) -> None:
    asked = [said[at : at + 1 + at % 3] for at in range(60)]

    answers = await asyncio.gather(*(embedder.embed(texts) for texts in asked))

    for texts, vectors in zip(asked, answers, strict=True):
        assert (vectors * encoder.encode(texts)).sum(axis=1).min() >= 0.999


def test_the_answer_is_json_that_anybody_can_read(embedding_service: EmbeddingService) -> None:
    answer = httpx.post(f"{embedding_service.url}/embed", json={"texts": ["hello", "hello"]}).raise_for_status().json()

    assert (answer["model"], answer["dim"]) == (PACKAGED_MODEL, 1024)
    first, second = (np.frombuffer(base64.b64decode(one), dtype="<f4") for one in answer["vectors"])
    assert len(first) == 1024
    assert np.array_equal(first, second)
    ready = httpx.get(f"{embedding_service.url}/ready").raise_for_status().json()
    assert ready == {"status": "ready", "model": PACKAGED_MODEL, "dim": 1024}
    assert "http_request_duration_seconds" in httpx.get(f"{embedding_service.url}/metrics").text


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({"texts": []}, "texts: List should have at least 1 item"),
        ({"texts": [SECRET] * 65}, "texts: List should have at most 64 items"),
        ({"texts": [SECRET * 400]}, "texts.0: is longer than 8,192 characters (MAX_MESSAGE_CHARS)"),
        ({"texts": ["fine", ""]}, "texts.1: String should have at least 1 character"),
        ({"texts": [4711]}, "texts.0: Input should be a valid string"),
        ({"texts": SECRET}, "texts: Input should be a valid list"),
        ({"texts": ["fine"], SECRET: 1}, "another field: Extra inputs are not permitted"),
        ({}, "texts: Field required"),
    ],
)
def test_what_is_no_list_of_texts_is_a_problem_that_repeats_none(
    embedding_service: EmbeddingService, body: dict[str, Any], detail: str
) -> None:
    answer = httpx.post(f"{embedding_service.url}/embed", json=body)

    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert detail in answer.json()["detail"]
    assert SECRET not in answer.text


def test_a_body_that_no_64_messages_make_is_refused_before_it_is_read(embedding_service: EmbeddingService) -> None:
    answer = httpx.post(f"{embedding_service.url}/embed", content=b" " * 8_000_000)

    assert answer.status_code == 413


async def test_no_text_gets_into_a_log_or_an_error_and_the_request_s_id_does(
    embedding_service: EmbeddingService, embedder: AsyncEmbedder
) -> None:
    with structlog.contextvars.bound_contextvars(request_id="0123456789abcdef"):
        await embedder.embed([SECRET])
        with pytest.raises(StoreError, match=r"^embedding: refused the texts with 422$") as refused:
            await embedder.embed([SECRET * 400])

    assert SECRET not in repr(refused.value)
    async with asyncio.timeout(10):  # the line is written after the answer
        while "0123456789abcdef" not in (log := embedding_service.log.read_text()):
            await asyncio.sleep(0.05)
    assert SECRET not in log


# --- what the client makes of its absence


async def test_a_service_that_is_down_is_a_store_error(embedder: AsyncEmbedder) -> None:
    [port] = free_ports(1)
    down = AsyncEmbedder.from_settings(settings_for(f"http://127.0.0.1:{port}"))

    with pytest.raises(StoreError, match=r"^embedding: does not answer \(ConnectError\); is it running") as refused:
        await down.embed([SECRET])

    assert refused.value.store == "embedding"
    assert SECRET not in repr(refused.value)
    await down.aclose()


@pytest.fixture
def paused(embedding_service: EmbeddingService) -> Iterator[EmbeddingService]:
    embedding_service.process.send_signal(signal.SIGSTOP)
    yield embedding_service
    embedding_service.process.send_signal(signal.SIGCONT)


async def test_a_service_that_hangs_is_given_up_in_time_and_heals_without_a_new_client(
    paused: EmbeddingService,
) -> None:
    embedder = AsyncEmbedder.from_settings(settings_for(paused.url, store_timeout_s=0.5))
    async with asyncio.timeout(5):
        with pytest.raises(StoreError, match="does not answer \\(ReadTimeout\\)"):
            await embedder.embed(["hello"])
    await embedder.aclose()

    embedder = AsyncEmbedder.from_settings(settings_for(paused.url, store_timeout_s=30))
    late = asyncio.create_task(embedder.embed(["hello"]))
    await asyncio.sleep(0.1)
    paused.process.send_signal(signal.SIGCONT)

    assert (await late).shape == (1, 1024)
    await embedder.aclose()


async def test_a_model_that_is_not_on_its_disk_is_not_fetched_for_whoever_asks(embedder: AsyncEmbedder) -> None:
    for _ in range(2):
        with pytest.raises(StoreError, match="its model is not loaded yet"):
            await embedder.embed(["hello"], space=VectorSpace("some/other", 1024))
    assert (await embedder.embed(["hello"])).shape == (1, 1024)


@pytest.mark.parametrize(
    "answer",
    [
        "<html>welcome</html>",
        "[]",
        "{}",
        '{"model": "m", "dim": 2, "vectors": []}',
        '{"model": "m", "dim": 2, "vectors": ["AAAA"]}',
        '{"model": "m", "dim": 2, "vectors": ["AACAPwAAgD8AAIA/"]}',
        '{"model": "m", "dim": 2, "vectors": [1]}',
        '{"model": "m", "dim": null, "vectors": ["AACAPwAAgD8="]}',
    ],
)
async def test_what_answers_but_is_not_the_service_is_a_store_error(answer: str) -> None:
    async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(answer)}\r\n\r\n{answer}".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answering, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    embedder = AsyncEmbedder.from_settings(settings_for(f"http://127.0.0.1:{port}"))
    async with server:
        with pytest.raises(StoreError, match="does not answer with vectors; does EMBEDDING_URL name"):
            await embedder.embed(["hello"])
    await embedder.aclose()
