"""The API over the real stores, fed by a real run."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import SAMPLE, empty_settings, free_ports, with_quiet_user
from personalization.local.stack import Stack
from personalization.pipeline.run import run_pipeline
from personalization.recommend.service import Recommender
from personalization.recommend.sources import SOURCES
from personalization.settings import Settings
from personalization.stores.analytics import AnalyticsStore
from pydantic import SecretStr
from pymilvus import MilvusClient
from redis import Redis
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from services.api.main import create_app


@pytest.fixture(scope="module")
def published(store_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of stores that hold the sample. No test here changes what they hold."""
    folder = tmp_path_factory.mktemp("published")
    settings = empty_settings(store_stack, folder)
    assert run_pipeline(SAMPLE, settings, with_quiet_user(folder))["status"] == "success"
    return settings


@pytest.fixture
async def api(published: Settings) -> AsyncIterator[httpx.AsyncClient]:
    forget_answers(published)
    async for client in serve(published):
        yield client


def forget_answers(settings: Settings) -> None:
    """Empty the cache but for the generation."""
    with Redis.from_url(settings.redis_url.get_secret_value()) as redis:
        for key in [*redis.keys("recommendations:*"), *redis.keys("explained:*")]:
            redis.delete(key)


async def serve(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """The app as the server runs it, with these settings."""
    app = create_app(settings)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://api") as client,
    ):
        yield client


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


async def test_a_cached_answer_has_a_time_to_live_and_ends_with_its_generation(
    api: httpx.AsyncClient, published: Settings
) -> None:
    fresh = await ask(api, "maria")
    redis = Redis.from_url(published.redis_url.get_secret_value(), decode_responses=True)
    [key] = redis.keys("recommendations:*maria")
    assert 0 < redis.ttl(key) <= published.cache_ttl_s
    redis.set(key, '{"user_id": "maria", "strategy": "popular", "policy": "x", "recommendations": []}', keepttl=True)
    assert (await ask(api, "maria"))["recommendations"] == []

    redis.incr("personalization:generation")

    assert await ask(api, "maria") == fresh
    redis.close()


async def test_a_user_is_never_their_own_neighbour(api: httpx.AsyncClient) -> None:
    vectors = recommender_of(api).vectors
    own, *interests = await vectors.user_vectors("maria")

    neighbours = await vectors.neighbours("maria", own, 47)

    assert 1 <= len(interests) <= 4
    assert len(neighbours) == 47
    assert "maria" not in {one["user_id"] for one in neighbours}
    assert neighbours == sorted(neighbours, key=lambda one: -one["similarity"])


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
        async for api in serve(published.model_copy(update={"ranker": ranker})):
            answers[ranker] = await ask(api, "maria")
            assert answers[ranker]["policy"] == ranker
    forget_answers(published)
    said = {reason["source"] for one in answers["similar_users"]["recommendations"] for reason in one["reasons"]}
    assert "similar_users" in said <= {"similar_users", "popularity"}
    assert len({reason["source"] for one in answers["fusion"]["recommendations"] for reason in one["reasons"]}) > 2


async def test_an_experiment_splits_the_users(published: Settings) -> None:
    test = {"ranker": "fusion", "experiment_name": "autumn", "experiment_ranker": "similar_users"}
    forget_answers(published)
    async for api in serve(published.model_copy(update={**test, "experiment_share": 0.5})):
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

    async for api in serve(empty):
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


@pytest.mark.parametrize("store", ["neo4j", "milvus", "analytics"])
async def test_a_store_that_is_down_is_a_503_that_tells_nothing_internal(store: str, published: Settings) -> None:
    [port] = free_ports(1)
    change: dict[str, Any] = {
        "neo4j": {"neo4j_uri": f"bolt://127.0.0.1:{port}"},
        "milvus": {"milvus_port": port},
        "analytics": {"sqlite_path": "/nowhere/analytics.db"},
    }[store]

    async for api in serve(published.model_copy(update={**change, "store_timeout_s": 1})):
        response = await api.get("/recommendations/maria")

        assert response.status_code == 503
        assert response.headers["retry-after"]
        assert response.headers["content-type"] == "application/problem+json"
        assert store in response.json()["detail"]
        assert str(port) not in response.text
        assert (await api.get("/health")).status_code == 200


async def test_redis_down_is_slower_not_broken(published: Settings) -> None:
    [port] = free_ports(1)
    down = published.model_copy(update={"redis_url": SecretStr(f"redis://127.0.0.1:{port}/0")})
    async for api in serve(down):
        first, second = [await ask(api, "maria") for _ in range(2)]
        assert first == second
        assert first["strategy"] == "personalized"
        served = recommender_of(api)._served
        await ask(api, "filmfan82")
        assert recommender_of(api)._served is served  # trusted for a while


async def test_the_api_cannot_write_the_analytics_database(api: httpx.AsyncClient) -> None:
    async with recommender_of(api).analytics.engine.connect() as connection:
        with pytest.raises(OperationalError, match="readonly"):
            await connection.execute(text("DELETE FROM campaigns"))
