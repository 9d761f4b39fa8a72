"""`DELETE /users/{user_id}` over the real stores."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import SAMPLE, Stores, api_of, empty_settings, free_ports, with_quiet_user
from personalization.local.stack import Stack
from personalization.pipeline.run import run_pipeline
from personalization.settings import Settings
from pydantic import SecretStr

EVENT = {
    "user_id": "maria",
    "campaign_id": "cinema_two_for_one",
    "event": "click",
    "timestamp": "2026-10-01T09:00:00Z",
}


@pytest.fixture(scope="module")
def published(store_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of stores that hold the sample. Each test erases a user of its own."""
    folder = tmp_path_factory.mktemp("published")
    settings = empty_settings(store_stack, folder).model_copy(update={"api_auth": "off"})
    assert run_pipeline(SAMPLE, settings, with_quiet_user(folder))["status"] == "success"
    return settings


@pytest.fixture
def stores(published: Settings) -> Any:
    stores = Stores(published)
    yield stores
    stores.close()


async def test_an_erased_person_is_a_stranger_from_the_next_answer_on(published: Settings, stores: Stores) -> None:
    async with api_of(published) as api:
        for top in (3, 5):
            answer = await api.get("/v1/recommendations/maria", params={"top": top})
            assert answer.json()["strategy"] == "personalized"
        assert len(stores.redis.keys("answer:{maria}:*")) == 2

        erased = await api.delete("/v1/users/maria")

        assert erased.status_code == 200
        receipt = erased.json()
        assert receipt["status"] == "erased"
        assert {one["store"]: one["remaining"] for one in receipt["stores"]} == dict.fromkeys(
            ("mongodb", "milvus", "neo4j", "analytics", "redis", "staging"), 0
        )
        assert receipt["stores"][4]["removed"] == {"answers": 2, "vectors": 12}
        assert (await api.get("/v1/recommendations/maria", params={"top": 3})).json()["strategy"] == "popular"
        assert (await api.get("/v1/recommendations/u-1098")).json()["strategy"] == "personalized"
        again = (await api.delete("/v1/users/maria")).json()
        assert {**again, "stores": []} == {**receipt, "stores": []}


async def test_no_event_of_an_erased_person_is_taken(published: Settings, stores: Stores) -> None:
    event = EVENT | {"user_id": "filmfan82"}
    async with api_of(published) as api:
        await api.delete("/v1/users/filmfan82")

        refused = await api.post("/v1/events", json=event)

        assert refused.status_code == 410
        assert refused.headers["content-type"] == "application/problem+json"
    assert stores.mongo.events.count_documents({"user_id": "filmfan82"}) == 0


async def test_with_a_store_down_it_is_a_202_that_tells_which_and_nothing_internal(published: Settings) -> None:
    [port] = free_ports(1)
    async with api_of(
        published.model_copy(update={"neo4j_uri": f"bolt://127.0.0.1:{port}", "store_timeout_s": 3})
    ) as api:
        queued = await api.delete("/v1/users/u-1098")

    assert queued.status_code == 202
    assert queued.json()["status"] == "queued"
    assert [one["store"] for one in queued.json()["stores"] if one["status"] == "pending"] == ["neo4j"]
    assert str(port) not in queued.text


async def test_with_redis_down_its_cached_answers_count_no_more_once_it_is_back(
    published: Settings, stores: Stores
) -> None:
    [port] = free_ports(1)
    down = SecretStr(f"redis://127.0.0.1:{port}/0")
    async with api_of(published.model_copy(update={"redis_url": down, "store_timeout_s": 3})) as api:
        queued = await api.delete("/v1/users/quiet")
        transport = api._transport
        assert isinstance(transport, httpx.ASGITransport)

        assert queued.status_code == 202
        assert transport.app.state.recommender.cache.untouched == {"quiet"}  # type: ignore[attr-defined]


async def test_with_mongodb_down_it_is_a_503_and_nothing_was_done(published: Settings, stores: Stores) -> None:
    [port] = free_ports(1)
    before = stores.sql("SELECT count(*) FROM message_intents WHERE user_id = 'fatima.z'")
    down = SecretStr(f"mongodb://127.0.0.1:{port}/?directConnection=true")
    async with api_of(published.model_copy(update={"mongodb_uri": down, "store_timeout_s": 3})) as api:
        refused = await api.delete("/v1/users/fatima.z")

    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert stores.sql("SELECT count(*) FROM message_intents WHERE user_id = 'fatima.z'") == before != [(0,)]


async def test_it_needs_a_valid_id_and_the_scope(published: Settings, tmp_path: Path) -> None:
    async with api_of(published) as api:
        assert (await api.delete("/v1/users/a%20b")).status_code == 422
        document = (await api.get("/openapi.json")).json()
        operation = document["paths"]["/v1/users/{user_id}"]["delete"]
        assert {"200", "202", "401", "403", "422", "429", "503"} <= set(operation["responses"])
    keys = SecretStr(f"shop:read+write:{'0' * 64}")
    async with api_of(published.model_copy(update={"api_auth": "keys", "api_keys": keys})) as api:
        assert (await api.delete("/v1/users/maria")).status_code == 401
