"""`/ready` and `/metrics` over the real stores."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import pytest
from conftest import EmbeddingService, api_of, empty_settings, free_ports
from personalization.keys import new_key
from personalization.local.stack import Stack
from personalization.settings import Settings
from pydantic import SecretStr

from services.api.routes import operations


@pytest.fixture
def up(published: Settings, embedding_service: EmbeddingService) -> Settings:
    """Everything is there."""
    return published.model_copy(update={"embedding_url": embedding_service.url})


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is not what is tried here."""
    monkeypatch.setattr(operations, "_DEADLINE_S", 15)


async def ready(settings: Settings, status: int) -> dict[str, Any]:
    async with api_of(settings) as api:
        response = await api.get("/v1/ready")
        assert response.status_code == status, response.text
        for secret in (settings.neo4j_password, settings.redis_url, settings.mongodb_uri):
            assert secret.get_secret_value() not in response.text
        assert "127.0.0.1" not in response.text
        answer: dict[str, Any] = response.json()
        return answer
    raise AssertionError


def down(answer: dict[str, Any]) -> list[str]:
    return [name for name, one in answer["stores"].items() if not one["ok"]]


async def test_it_names_every_store_its_latency_and_what_is_served(up: Settings) -> None:
    answer = await ready(up, 200)

    assert answer["status"] == "ready", answer
    assert answer["generation"] >= 1
    assert datetime.fromisoformat(answer["learned_at"]).year >= 2026
    assert list(answer["stores"]) == ["redis", "milvus", "neo4j", "analytics", "mongodb", "embedding"]
    for one in answer["stores"].values():
        assert one["ok"]
        assert 0 < one["latency_ms"] < 15_000


@pytest.mark.parametrize("store", ["redis", "milvus", "neo4j", "mongodb"])
async def test_without_a_store_it_is_ready_but_degraded(store: str, up: Settings) -> None:
    [port] = free_ports(1)
    change: dict[str, Any] = {
        "redis": {"redis_url": SecretStr(f"redis://127.0.0.1:{port}/0")},
        "milvus": {"milvus_port": port},
        "neo4j": {"neo4j_uri": f"bolt://127.0.0.1:{port}"},
        "mongodb": {"mongodb_uri": SecretStr(f"mongodb://127.0.0.1:{port}/")},
    }[store]
    # Milvus' client waits so long for one that is not there.
    answer = await ready(up.model_copy(update={**change, "store_timeout_s": 4}), 200)

    assert answer["status"] == "degraded"
    assert down(answer) == [store]
    assert (answer["generation"] is None) == (store == "redis")


async def test_the_embedding_service_is_told_of_and_not_needed(up: Settings) -> None:
    [port] = free_ports(1)
    answer = await ready(up.model_copy(update={"embedding_url": f"http://127.0.0.1:{port}"}), 200)

    assert answer["status"] == "ready"
    assert down(answer) == ["embedding"]


async def test_it_is_not_ready_while_there_is_nothing_to_answer_from(up: Settings, tmp_path: Any) -> None:
    answer = await ready(up.model_copy(update={"sqlite_path": tmp_path / "none.db"}), 503)

    assert (answer["status"], answer["learned_at"]) == ("unready", None)
    assert down(answer) == ["analytics"]


async def test_it_stays_ready_by_what_it_has_read_when_the_database_is_gone(up: Settings, tmp_path: Any) -> None:
    moved = tmp_path / "analytics.db"
    moved.write_bytes(up.sqlite_path.read_bytes())
    async with api_of(up.model_copy(update={"sqlite_path": moved})) as api:
        assert (await api.get("/recommendations/maria")).is_success
        before = (await api.get("/v1/ready")).json()
        moved.write_bytes(b"broken" * 1000)
        await asyncio.sleep(operations._BELIEVED_S)
        after = (await api.get("/v1/ready")).json()

        assert after["status"] == "degraded"
        assert down(after) == ["analytics"]
        assert after["learned_at"] == before["learned_at"]


@asynccontextmanager
async def hanging_server() -> AsyncIterator[tuple[int, list[str]]]:
    """Takes connections and never answers; its port, and a line for each connection."""
    taken: list[str] = []
    ended = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.append("connection")
        await ended.wait()
        writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], taken
    finally:
        ended.set()
        server.close()


async def test_a_store_that_hangs_delays_nobody_beyond_the_deadline_and_is_asked_once(
    up: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "_BELIEVED_S", 60)
    monkeypatch.setattr(operations, "_DEADLINE_S", 2)
    async with hanging_server() as (port, taken):
        hanging = up.model_copy(update={"embedding_url": f"http://127.0.0.1:{port}", "store_timeout_s": 300})
        async with api_of(hanging) as api:
            async with asyncio.timeout(60):
                answers = await asyncio.gather(*(api.get("/v1/ready") for _ in range(50)))

    assert all("embedding" in down(one.json()) for one in answers)
    assert len(taken) == 1


async def test_metrics_tell_of_stores_answers_pools_and_the_generation(up: Settings) -> None:
    secret, key = new_key("prometheus", ["read"])
    bearer = {"Authorization": f"Bearer {secret}"}
    async with api_of(up.model_copy(update={"api_auth": "keys", "api_keys": SecretStr(str(key))})) as api:
        for user_id in ("maria", "maria", "filmfan82"):
            assert (await api.get(f"/recommendations/{user_id}", headers=bearer)).is_success
        assert (await api.get("/recommendations/maria")).status_code == 401
        page = (await api.get("/v1/metrics", headers=bearer)).text

    assert 'answers_total{outcome="miss"} ' in page
    assert 'answers_total{outcome="hit"} ' in page
    for store in ("redis", "milvus", "neo4j", "analytics", "mongodb"):
        assert f'store_request_duration_seconds_count{{store="{store}"}}' in page
    assert (
        'store_connections{state="idle",store="redis"}' in page
        or 'store_connections{store="redis",state="idle"}' in page
    )
    assert (
        'http_request_duration_seconds_count{method="GET",route="/recommendations/{user_id}",status="200"} 3.0' in page
    )
    assert "serving_generation 0.0" not in page
    assert "maria" not in page


async def test_before_the_first_run_it_is_not_ready(store_stack: Stack, tmp_path: Any) -> None:
    answer = await ready(empty_settings(store_stack, tmp_path), 503)

    assert answer["status"] == "unready"
