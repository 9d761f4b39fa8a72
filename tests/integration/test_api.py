"""The API over the real stores, fed by a real run."""

import asyncio
import io
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import SAMPLE, EmbeddingService, api_of, free_ports
from personalization.pipeline.run import run_pipeline
from personalization.recommend.service import Recommender
from personalization.recommend.sources import SOURCES
from personalization.settings import Settings
from personalization.stores.analytics import AnalyticsStore, AsyncAnalyticsReader
from pydantic import SecretStr
from pymilvus import MilvusClient
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from sqlalchemy import text
from sqlalchemy.exc import OperationalError


@pytest.fixture
def own_stores(settings: Settings, tmp_path: Path) -> Settings:
    """The sample in stores that a test may change."""
    assert run_pipeline(SAMPLE, settings)["status"] == "success"
    return settings


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.02)


@pytest.fixture
async def api(published: Settings) -> AsyncIterator[httpx.AsyncClient]:
    forget_answers(published)
    async with api_of(published) as client:
        yield client


def forget_answers(settings: Settings) -> None:
    """Empty the cache but for the generation."""
    with Redis.from_url(settings.redis_url.get_secret_value()) as redis:
        for key in [*redis.keys("answer:*"), *redis.keys("touched:*")]:
            redis.delete(key)


def recommender_of(api: httpx.AsyncClient) -> Recommender:
    """What the app behind this client answers with."""
    transport = api._transport
    assert isinstance(transport, httpx.ASGITransport)
    recommender: Recommender = transport.app.state.recommender  # type: ignore[attr-defined]
    return recommender


async def ask(api: httpx.AsyncClient, user_id: str, top: int = 5, **params: Any) -> dict[str, Any]:
    response = await api.get(f"/recommendations/{user_id}", params={"top": top, **params})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def test_health_is_exactly_ok(api: httpx.AsyncClient) -> None:
    assert (await api.get("/health")).json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("user_id", "first", "hidden"),
    [
        ("maria", "weekend_city_breaks", "winter_ski_weeks"),
        ("u-1098", "car_service_check", None),
        ("filmfan82", "streaming_free_month", None),
    ],
)
async def test_a_sample_user_gets_what_their_messages_call_for(
    api: httpx.AsyncClient, user_id: str, first: str, hidden: str | None
) -> None:
    answer = await ask(api, user_id)

    campaigns = [one["campaign_id"] for one in answer["recommendations"]]
    assert answer["strategy"] == "personalized"
    assert campaigns[0] == first
    assert hidden not in campaigns
    assert len(campaigns) == 5
    assert answer["policy"].startswith(("fusion", "learned-"))
    assert "excluded" not in answer
    scores = [one["score"] for one in answer["recommendations"][:-1]]  # the last may be explored
    assert scores == sorted(scores, reverse=True)
    for place, one in enumerate(answer["recommendations"], 1):
        assert one["position"] == place
        assert 0 < one["propensity"] <= 1
        assert 0 < one["score"] <= 1
        assert sum(reason["share"] for reason in one["reasons"]) == pytest.approx(one["score"], abs=1e-9)
        assert {reason["source"] for reason in one["reasons"]} <= set(SOURCES)
        assert all(set(reason) == {"source", "text", "share"} for reason in one["reasons"])
    assert len({reason["source"] for one in answer["recommendations"] for reason in one["reasons"]}) >= 6


async def test_an_explained_answer_carries_the_data_and_what_rules_hold_back(api: httpx.AsyncClient) -> None:
    plain = await ask(api, "maria", 50)
    explained = await ask(api, "maria", 50, explain=True)

    listed = {one["campaign_id"] for one in explained["recommendations"]}
    for one, other in zip(plain["recommendations"], explained["recommendations"], strict=True):
        for reason, with_data in zip(one["reasons"], other["reasons"], strict=True):
            assert with_data.pop("data")
            assert reason == with_data
    assert plain == {name: value for name, value in explained.items() if name != "excluded"}
    for one in explained["excluded"]:
        assert set(one) == {"campaign_id", "rule", "text"}
        assert one["campaign_id"] not in listed
    assert "data" not in (await ask(api, "maria", 50))["recommendations"][0]["reasons"][0]  # cached beside it


async def test_a_user_who_only_clicked_is_known_by_that(api: httpx.AsyncClient) -> None:
    answer = await ask(api, "quiet", 50, explain=True)

    assert answer["strategy"] == "personalized"
    clicked = next(one for one in answer["recommendations"] if one["campaign_id"] == "cinema_two_for_one")
    texts = {reason["source"]: reason["text"] for reason in clicked["reasons"]}
    assert texts["own_engagement"] == "engaged with it 1×, last on 1 Nov 2026"
    excluded = {one["campaign_id"]: one for one in answer["excluded"]}
    assert excluded["streaming_free_month"]["rule"] == "not_again_after_dismiss"
    assert "the user dismissed it" in excluded["streaming_free_month"]["text"]
    said = {reason["source"] for one in answer["recommendations"] for reason in one["reasons"]}
    assert not said & {"own_intents", "message_similarity", "audience_similarity", "similar_users"}


async def test_an_unknown_user_gets_popular_campaigns_marked_as_such(api: httpx.AsyncClient) -> None:
    answer = await ask(api, "nobody-we-know", top=3)

    assert answer["strategy"] == "popular"
    assert len(answer["recommendations"]) == 3
    said = {reason["source"] for one in answer["recommendations"] for reason in one["reasons"]}
    assert said <= {"popularity", "recency"}
    assert all(one["reasons"] for one in answer["recommendations"])


async def test_top_is_part_of_what_is_cached(api: httpx.AsyncClient) -> None:
    for top in (1, 4, 2, 4):
        assert len((await ask(api, "nobody-we-know", top))["recommendations"]) == top


def stored_answers(settings: Settings, user_id: str) -> dict[str, bytes]:
    with Redis.from_url(settings.redis_url.get_secret_value()) as redis:
        return {key.decode(): redis.get(key) for key in redis.keys(f"answer:{{{user_id}}}:*")}


def alter(settings: Settings, user_id: str, *, fresh_until: float | None = None) -> None:
    """Make the one stored answer tell itself from a new one, and old at a moment."""
    [(key, value)] = stored_answers(settings, user_id).items()
    generation, touched, until, _ = value.split(b"|", 3)
    if fresh_until is not None:
        until = b"%.3f" % fresh_until
    body = b'{"user_id":"%s","strategy":"popular","policy":"stored","recommendations":[]}' % user_id.encode()
    with Redis.from_url(settings.redis_url.get_secret_value()) as redis:
        redis.set(key, b"|".join((generation, touched, until, body)), keepttl=True)


async def test_a_fresh_answer_is_given_as_it_was_stored_and_ends_with_its_generation(
    api: httpx.AsyncClient, published: Settings
) -> None:
    fresh = await ask(api, "maria")
    [(key, value)] = stored_answers(published, "maria").items()
    until = float(value.split(b"|", 3)[2]) - time.time()
    assert 0.75 * published.cache_ttl_s < until <= published.cache_ttl_s  # spread
    with Redis.from_url(published.redis_url.get_secret_value()) as redis:
        assert published.cache_ttl_s < redis.ttl(key)
    alter(published, "maria")
    for _ in range(2):  # the query is known by its bytes from the second time on
        response = await api.get("/recommendations/maria?top=5")
        assert response.json()["policy"] == "stored"
        assert response.headers["cache-status"] == "personalization; hit"

    with Redis.from_url(published.redis_url.get_secret_value()) as redis:
        redis.incr("personalization:generation")

    assert await ask(api, "maria") == fresh


async def test_an_old_answer_is_given_while_a_new_one_is_made(api: httpx.AsyncClient, published: Settings) -> None:
    fresh = await ask(api, "maria")
    alter(published, "maria", fresh_until=time.time() - 1)

    response = await api.get("/recommendations/maria?top=5")

    assert response.json()["policy"] == "stored"
    assert response.headers["cache-status"] == "personalization; hit; detail=stale"
    await until(lambda: b'"stored"' not in next(iter(stored_answers(published, "maria").values())))
    assert await ask(api, "maria") == fresh


async def test_equal_questions_at_once_share_an_answer(api: httpx.AsyncClient) -> None:
    recommender = recommender_of(api)
    asked = []
    plain, look_up, all_have_looked = recommender.analytics.user_facts, recommender.look_up, asyncio.Barrier(30)

    async def counted(user_ids: Any) -> Any:
        asked.append(sorted(user_ids))
        return await plain(user_ids)

    async def looked_up(asks: Any) -> Any:
        found = await look_up(asks)
        await all_have_looked.wait()
        return found

    recommender.analytics.user_facts = counted  # type: ignore[method-assign]
    recommender.look_up = looked_up  # type: ignore[method-assign]
    answers = await asyncio.gather(*(ask(api, user) for user in ["maria", "filmfan82", "u-1098"] * 10))

    assert [one["user_id"] for one in answers] == ["maria", "filmfan82", "u-1098"] * 10
    assert all(one == answers[at % 3] for at, one in enumerate(answers))
    made = [user for batch in asked for user in batch if user != "-"]  # who warms up
    assert sorted(made) == ["filmfan82", "maria", "u-1098"]


async def test_answers_made_together_are_those_made_alone(api: httpx.AsyncClient, published: Settings) -> None:
    users = ["maria", "nobody-we-know", "filmfan82", "quiet", "maria"]
    alone = []
    for user in users:
        forget_answers(published)
        alone.append(await ask(api, user, 7, explain=True))
    forget_answers(published)

    response = await api.post("/v1/recommendations:batch", json={"user_ids": users, "top": 7, "explain": True})

    assert response.status_code == 200, response.text
    answers = response.json()["answers"]
    assert [one["user_id"] for one in answers] == users
    for one, other in zip(answers, alone, strict=True):
        assert without_shares(one) == without_shares(other)
    again = await api.post("/v1/recommendations:batch", json={"user_ids": users, "top": 7, "explain": True})
    assert again.content == response.content
    assert len(stored_answers(published, "maria")) == 1


def without_shares(answer: Any) -> Any:
    """Scores to three digits: sums in another order differ in the last."""
    if isinstance(answer, dict):
        return {name: without_shares(value) for name, value in answer.items() if name != "share"}
    if isinstance(answer, list):
        return [without_shares(one) for one in answer]
    return round(answer, 3) if isinstance(answer, float) else answer


async def test_only_a_category_and_not_what_is_unwanted(api: httpx.AsyncClient, published: Settings) -> None:
    everything = (await ask(api, "maria", 50))["recommendations"]
    category, first = everything[0]["category"], everything[0]["campaign_id"]

    of_category = await ask(api, "maria", 50, category=category)
    without = await ask(api, "maria", 50, exclude=[first, "no_such_campaign"], explain=True)

    assert [one["campaign_id"] for one in of_category["recommendations"]] == [
        one["campaign_id"] for one in everything if one["category"] == category
    ]
    assert {one["campaign_id"] for one in without["recommendations"]} == {one["campaign_id"] for one in everything[1:]}
    assert {"campaign_id": first, "rule": "exclude", "text": "was not wanted by who asked"} in without["excluded"]
    assert len(stored_answers(published, "maria")) == 3
    assert (await ask(api, "maria", 50))["recommendations"] == everything


async def test_a_dismissal_counts_on_the_very_next_answer(own_stores: Settings) -> None:
    async with api_of(own_stores) as api:
        before = await ask(api, "maria")
        first = before["recommendations"][0]["campaign_id"]
        assert (await api.get("/recommendations/maria?top=5")).headers["cache-status"] == "personalization; hit"
        event = {
            "user_id": "maria",
            "campaign_id": first,
            "event": "dismiss",
            "timestamp": datetime.now(UTC).isoformat(),
        }

        posted = await api.post("/v1/events", json=event)

        assert posted.status_code == 202, posted.text
        after = await ask(api, "maria", 5, explain=True)
        assert first not in {one["campaign_id"] for one in after["recommendations"]}
        held_back = {one["campaign_id"]: one["rule"] for one in after["excluded"]}
        assert held_back[first] == "not_again_after_dismiss"
        assert first not in {one["campaign_id"] for one in (await ask(api, "maria"))["recommendations"]}


async def test_what_is_done_while_an_answer_is_made_makes_that_answer_old(
    api: httpx.AsyncClient, published: Settings
) -> None:
    recommender = recommender_of(api)
    plain = recommender.analytics.user_facts

    async def meanwhile(user_ids: Any) -> Any:
        await recommender.forget(["maria"])
        return await plain(user_ids)

    recommender.analytics.user_facts = meanwhile  # type: ignore[method-assign]
    await ask(api, "maria")
    recommender.analytics.user_facts = plain  # type: ignore[method-assign]

    response = await api.get("/recommendations/maria?top=5")

    assert response.headers["cache-status"].startswith("personalization; fwd=miss")


async def test_an_answer_does_not_outlive_the_token_it_was_stored_under(
    api: httpx.AsyncClient, published: Settings
) -> None:
    await ask(api, "maria")
    with Redis.from_url(published.redis_url.get_secret_value()) as redis:  # as Redis may, where it runs out of room
        assert redis.delete("touched:{maria}") == 1

    response = await api.get("/recommendations/maria?top=5")

    assert response.headers["cache-status"] == "personalization; fwd=miss"


async def test_knowledge_of_another_version_does_not_end_what_is_known(
    api: httpx.AsyncClient, published: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await ask(api, "maria")
    recommender = recommender_of(api)
    reads = []

    async def of_another_version() -> bytes:
        reads.append(1)
        buffer = io.BytesIO()
        np.savez(buffer, format=np.int64(99))
        return buffer.getvalue()

    monkeypatch.setattr(recommender.analytics, "served", of_another_version)
    with Redis.from_url(published.redis_url.get_secret_value()) as redis:
        redis.incr("personalization:generation")

    for user in ("maria", "filmfan82", "u-1098"):
        answer = await ask(api, user)
        assert answer.pop("degraded") == ["analytics"]
        assert user != "maria" or answer == before
    assert len(reads) == 1  # and again some seconds later


async def test_cached_answers_are_made_old_as_soon_as_redis_is_back(
    api: httpx.AsyncClient, published: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ask(api, "maria")
    recommender = recommender_of(api)
    [port] = free_ports(1)
    nobody = AsyncRedis.from_url(f"redis://127.0.0.1:{port}/0")
    there = recommender.cache.client
    recommender.cache.client = nobody
    await recommender.forget(["maria"])
    recommender.cache.client = there

    response = await api.get("/recommendations/maria?top=5")

    assert response.headers["cache-status"].startswith("personalization; fwd=miss")
    assert not recommender.cache.untouched


async def test_a_preview_is_what_a_new_user_who_says_this_would_see(
    published: Settings, embedding_service: EmbeddingService
) -> None:
    forget_answers(published)
    async with api_of(published.model_copy(update={"embedding_url": embedding_service.url})) as api:
        asked = {"message": "Looking for a cheap weekend flight to Lisbon", "top": 3}
        response = await api.post("/v1/recommendations:preview", json=asked)

        assert response.status_code == 200, response.text
        answer = response.json()
        assert answer["intents"]
        assert {"intent_id", "name", "confidence"} == set(answer["intents"][0])
        assert len(answer["recommendations"]) == 3
        assert answer["recommendations"][0]["category"] == "travel"
        assert "degraded" not in answer
        blank = await api.post("/v1/recommendations:preview", json={"message": " "})
        assert blank.status_code == 422


async def test_without_the_embedding_service_there_is_no_preview_but_all_else(published: Settings) -> None:
    [port] = free_ports(1)
    async with api_of(published.model_copy(update={"embedding_url": f"http://127.0.0.1:{port}"})) as api:
        response = await api.post("/v1/recommendations:preview", json={"message": "hello"})
        assert response.status_code == 503
        assert "embedding" in response.json()["detail"]
        await ask(api, "maria")


async def test_a_user_is_never_their_own_neighbour(api: httpx.AsyncClient) -> None:
    vectors, space = recommender_of(api).vectors, (await recommender_of(api).knowledge()).space
    found = await vectors.user_vectors(space, ["maria", "filmfan82", "nobody-we-know"])

    near = await vectors.neighbours(space, np.stack([found["maria"][0], found["filmfan82"][0]]), 47)

    assert set(found) == {"maria", "filmfan82"}
    assert [len(one) for one in near] == [47, 47]
    assert [one[0]["user_id"] for one in near] == ["maria", "filmfan82"]
    for one in near:
        assert one == sorted(one, key=lambda hit: -hit["similarity"])
    said = (await ask(api, "maria", explain=True))["recommendations"]
    assert not any(
        "maria" in str(reason["data"])
        for one in said
        for reason in one["reasons"]
        if reason["source"] == "similar_users"
    )


async def test_knowledge_is_read_once_a_generation(api: httpx.AsyncClient, published: Settings) -> None:
    recommender = recommender_of(api)
    await ask(api, "maria")
    served = recommender._served
    await ask(api, "filmfan82")
    assert recommender._served is served

    with Redis.from_url(published.redis_url.get_secret_value()) as redis:
        redis.incr("personalization:generation")
    await ask(api, "maria")

    assert recommender._served is not served


async def test_the_ranker_can_be_switched(published: Settings) -> None:
    answers = {}
    for ranker in ("fusion", "similar_users"):
        forget_answers(published)
        async with api_of(published.model_copy(update={"ranker": ranker})) as api:
            answers[ranker] = await ask(api, "maria")
            assert answers[ranker]["policy"] == ranker
    forget_answers(published)
    said = {reason["source"] for one in answers["similar_users"]["recommendations"] for reason in one["reasons"]}
    assert "similar_users" in said <= {"similar_users", "popularity"}
    assert len({reason["source"] for one in answers["fusion"]["recommendations"] for reason in one["reasons"]}) > 2


async def test_an_experiment_splits_the_users(published: Settings) -> None:
    test = {"ranker": "fusion", "experiment_name": "autumn", "experiment_ranker": "similar_users"}
    forget_answers(published)
    async with api_of(published.model_copy(update={**test, "experiment_share": 0.5})) as api:
        policies = [(await ask(api, f"visitor-{at}"))["policy"] for at in range(40)]
    forget_answers(published)
    assert 8 < policies.count("similar_users") < 32
    assert set(policies) == {"fusion", "similar_users"}


@pytest.mark.parametrize("has_tables", [False, True])
async def test_before_the_first_publish_it_is_a_503_that_says_so(
    has_tables: bool, published: Settings, tmp_path: Path
) -> None:
    empty = published.model_copy(update={"sqlite_path": tmp_path / "empty.db"})
    analytics = AnalyticsStore.from_settings(empty)
    if has_tables:
        analytics.ensure_schema()
    else:
        analytics.engine.connect().close()
    analytics.engine.dispose()
    forget_answers(published)

    async with api_of(empty) as api:
        response = await api.get("/recommendations/maria")

        assert response.status_code == 503
        assert "no run has been published yet" in response.json()["detail"]
        assert response.headers["retry-after"]


async def test_vectors_are_loaded_again_after_milvus_has_let_go_of_them(
    api: httpx.AsyncClient, published: Settings
) -> None:
    milvus = MilvusClient(uri=published.milvus_uri)
    milvus.release_collection("users")
    milvus.close()

    assert (await ask(api, "maria"))["strategy"] == "personalized"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/recommendations/a%20b", 422),
        ("/recommendations/x'%20or%20'1", 422),
        (f"/recommendations/{'x' * 129}", 422),
        ("/recommendations/maria?top=0", 422),
        ("/recommendations/maria?top=51", 422),
        ("/recommendations/maria?top=many", 422),
        ("/nothing/here", 404),
    ],
)
async def test_errors_are_problem_documents(api: httpx.AsyncClient, path: str, status: int) -> None:
    response = await api.get(path)

    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["status"] == status
    assert set(response.json()) == {"type", "title", "status", "detail"}


def without(settings: Settings, *stores: str) -> Settings:
    """Settings under which these stores are down."""
    ports = dict(zip(stores, free_ports(len(stores)), strict=True))
    changes: dict[str, dict[str, Any]] = {
        "neo4j": {"neo4j_uri": f"bolt://127.0.0.1:{ports.get('neo4j')}"},
        "milvus": {"milvus_port": ports.get("milvus")},
        "mongodb": {"mongodb_uri": SecretStr(f"mongodb://127.0.0.1:{ports.get('mongodb')}/?directConnection=true")},
        "analytics": {"sqlite_path": "/nowhere/analytics.db"},
        "redis": {"redis_url": SecretStr(f"redis://127.0.0.1:{ports.get('redis')}/0")},
    }
    update = {name: value for store in stores for name, value in changes[store].items()}
    return settings.model_copy(update={**update, "store_timeout_s": 5})


@pytest.mark.parametrize(
    "stores", [("neo4j",), ("milvus",), ("mongodb",), ("neo4j", "milvus", "mongodb"), ("redis", "milvus")]
)
async def test_what_a_store_that_is_down_knows_is_missing_and_named(
    stores: tuple[str, ...], published: Settings
) -> None:
    forget_answers(published)
    async with api_of(without(published, *stores)) as api:
        answer = await ask(api, "maria")

        assert answer["degraded"] == sorted(set(stores) - {"redis"})
        assert len(answer["recommendations"]) == 5
        assert "127.0.0.1" not in str(answer)
        assert (await api.get("/health")).status_code == 200
        assert not stored_answers(published, "maria")  # or it would be given when the store is back


async def test_the_last_generation_s_answer_stands_in_where_none_can_be_made(published: Settings) -> None:
    forget_answers(published)
    async with api_of(published) as api:
        whole = await ask(api, "maria")
    with Redis.from_url(published.redis_url.get_secret_value()) as redis:
        redis.incr("personalization:generation")
    async with api_of(without(published, "analytics")) as api:
        assert await ask(api, "maria") == {"degraded": ["analytics"], **whole}
        refused = await api.get("/recommendations/filmfan82")

        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert refused.headers["content-type"] == "application/problem+json"
        assert "analytics" in refused.json()["detail"]
        assert "nowhere" not in refused.text


async def test_knowledge_outlives_the_store_it_came_from(published: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_answers(published)
    async with api_of(published) as api:
        await ask(api, "maria")
        recommender = recommender_of(api)
        monkeypatch.setattr(
            recommender, "analytics", AsyncAnalyticsReader.from_settings(without(published, "analytics"))
        )
        with Redis.from_url(published.redis_url.get_secret_value()) as redis:
            redis.incr("personalization:generation")

        answer = await ask(api, "filmfan82")

        assert answer["degraded"] == ["analytics"]
        assert answer["strategy"] == "personalized"


async def test_redis_down_is_slower_not_broken(published: Settings) -> None:
    async with api_of(without(published, "redis")) as api:
        first, second = [await ask(api, "maria") for _ in range(2)]
        assert first == second
        assert first["strategy"] == "personalized"
        assert "degraded" not in first
        served = recommender_of(api)._served
        await ask(api, "filmfan82")
        assert recommender_of(api)._served is served  # trusted for a while


async def test_the_api_cannot_write_the_analytics_database(api: httpx.AsyncClient) -> None:
    async with recommender_of(api).analytics.engine.connect() as connection:
        with pytest.raises(OperationalError, match="readonly"):
            await connection.execute(text("DELETE FROM campaigns"))
