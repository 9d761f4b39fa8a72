"""Campaigns, users' profiles and similar users over the real stores, fed by a real run."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from conftest import Stores, api_of, free_ports
from personalization.catalog.loading import load_catalog
from personalization.settings import Settings


@pytest.fixture
def settings(published: Settings) -> Settings:
    """Those of the sample's stores."""
    return published


@pytest.fixture
async def api(published: Settings) -> AsyncIterator[httpx.AsyncClient]:
    async with api_of(published) as client:
        yield client


async def get(api: httpx.AsyncClient, path: str, **params: Any) -> Any:
    response = await api.get(f"/v1{path}", params=params)
    assert response.status_code == 200, response.text
    return response.json()


def at(moment: str) -> int:
    return int(datetime.fromisoformat(moment).timestamp() * 1000)


# --- profile


async def test_a_profile_is_what_the_stores_hold(api: httpx.AsyncClient, stores: Stores) -> None:
    profile = await get(api, "/users/maria/profile")

    [(messages, last)] = stores.sql(
        "SELECT count(DISTINCT message_id), max(timestamp) FROM message_intents WHERE user_id = 'maria'"
    )
    assert (profile["user_id"], profile["messages"], at(profile["last_message_at"])) == ("maria", messages, last)
    said = stores.sql(
        "SELECT intent_id, count(*), max(timestamp) FROM message_intents "
        "WHERE user_id = 'maria' AND intent_id != 'other' GROUP BY 1"
    )
    assert {(one["intent_id"], one["count"], at(one["last_seen"])) for one in profile["intents"]} == set(said)
    assert said
    did = stores.sql(
        "SELECT campaign_id, count, impressions, clicks, conversions, dismisses FROM user_engagement "
        "WHERE user_id = 'maria'"
    )
    names = ("campaign_id", "mentions", "impressions", "clicks", "conversions", "dismisses")
    assert {tuple(one[name] for name in names) for one in profile["engagement"]} == set(did)
    assert did
    catalog = load_catalog(stores.settings.catalog_path)
    campaigns = {one.id: one for one in catalog.campaigns}
    for one in profile["engagement"]:
        assert (one["name"], one["category"]) == (
            campaigns[one["campaign_id"]].name,
            campaigns[one["campaign_id"]].category,
        )
    [run] = profile["runs"]
    assert stores.sql(f"SELECT count(*) FROM pipeline_runs WHERE run_id = '{run['run_id']}'") != [(0,)]
    assert run["started_at"] is not None
    assert run["messages"] == messages
    assert run["events"] == stores.sql("SELECT count(*) FROM events WHERE user_id = 'maria'")[0][0]


async def test_weights_of_a_profile_are_as_of_now_and_sorted(api: httpx.AsyncClient, stores: Stores) -> None:
    profile = await get(api, "/users/maria/profile")

    for part in ("intents", "engagement", "categories"):
        weights = [one["weight"] for one in profile[part]]
        assert weights == sorted(weights, reverse=True)
    now = datetime.now(UTC).timestamp() * 1000
    half_life = stores.settings.profile_half_life_days * 86_400_000
    weight_of = {one["campaign_id"]: one["weight"] for one in profile["engagement"]}
    for campaign_id, weight, as_of in stores.sql(
        "SELECT campaign_id, weight, weight_at FROM user_engagement WHERE user_id = 'maria' AND weight > 0"
    ):
        assert weight_of[campaign_id] == pytest.approx(weight * 2 ** (-max(now - as_of, 0) / half_life), abs=1e-4)
    for one in profile["intents"]:
        assert 0 < one["weight"] <= one["count"]
        assert 0 < one["confidence"] <= 1
    assert sum(one["share"] for one in profile["categories"]) == pytest.approx(1, abs=1e-3)


async def test_a_user_who_only_clicked_has_a_profile(api: httpx.AsyncClient) -> None:
    profile = await get(api, "/users/quiet/profile")

    assert (profile["messages"], profile["last_message_at"], profile["intents"]) == (0, None, [])
    counts = {one["campaign_id"]: (one["clicks"], one["dismisses"]) for one in profile["engagement"]}
    assert counts == {"cinema_two_for_one": (1, 0), "streaming_free_month": (0, 1)}
    [run] = profile["runs"]
    assert (run["messages"], run["events"]) == (0, 2)


# --- similar users


async def test_similar_users_are_the_nearest_and_never_the_user(api: httpx.AsyncClient) -> None:
    answer = await get(api, "/users/maria/similar", top=7)

    assert answer["user_id"] == "maria"
    assert len(answer["similar"]) == 7
    assert "maria" not in {one["user_id"] for one in answer["similar"]}
    similarities = [one["similarity"] for one in answer["similar"]]
    assert similarities == sorted(similarities, reverse=True)
    assert all(-1 <= one <= 1 for one in similarities)
    assert (await get(api, "/users/maria/similar", top=3))["similar"] == answer["similar"][:3]
    assert len((await get(api, "/users/maria/similar"))["similar"]) == 10
    nearest = answer["similar"][0]
    back = await get(api, f"/users/{nearest['user_id']}/similar", top=100)
    assert nearest["similarity"] == pytest.approx(
        {one["user_id"]: one["similarity"] for one in back["similar"]}["maria"], abs=1e-3
    )


# --- campaigns


async def test_campaigns_are_those_of_the_served_catalog(api: httpx.AsyncClient, published: Settings) -> None:
    answer = await get(api, "/campaigns")

    catalog = load_catalog(published.catalog_path)
    assert answer["next"] is None
    assert [one["campaign_id"] for one in answer["campaigns"]] == sorted(one.id for one in catalog.campaigns)
    now = datetime.now(UTC)
    of_catalog = {one.id: one for one in catalog.campaigns}
    for one in answer["campaigns"]:
        known = of_catalog[one["campaign_id"]]
        assert (one["name"], one["description"], one["category"], one["intents"]) == (
            known.name,
            known.description,
            known.category,
            known.intents,
        )
        since, until = known.active_from, known.active_until
        assert one["active"] == ((since is None or since <= now) and (until is None or now < until))


async def test_campaigns_are_filtered_and_paged(api: httpx.AsyncClient) -> None:
    everything = (await get(api, "/campaigns"))["campaigns"]
    category = everything[0]["category"]

    of_category = (await get(api, "/campaigns", category=category))["campaigns"]
    running, over = [(await get(api, "/campaigns", active=one))["campaigns"] for one in (True, False)]
    pages = []
    answer = await get(api, "/campaigns", limit=3)
    while answer["next"] is not None:
        assert len(answer["campaigns"]) == 3
        pages += answer["campaigns"]
        answer = await get(api, "/campaigns", limit=3, after=answer["next"])
    pages += answer["campaigns"]

    assert of_category == [one for one in everything if one["category"] == category]
    assert running == [one for one in everything if one["active"]]
    assert over == [one for one in everything if not one["active"]]
    assert pages == everything
    assert (await get(api, "/campaigns", limit=len(everything)))["next"] is None
    assert (await get(api, "/campaigns", category="no such category"))["campaigns"] == []
    assert (await get(api, "/campaigns", after="~"))["campaigns"] == []


# --- errors


@pytest.mark.parametrize("what", ["profile", "similar"])
@pytest.mark.parametrize(
    ("user_id", "status"),
    [
        ("nobody-we-know", 404),
        ("用户", 404),
        ("maria|x", 404),
        ("MARIA", 404),
        ("a%20b", 422),
        ("x'%20or%20'1'='1", 422),
        ("maria'--", 422),
        ('maria"', 422),
        ("maria%5C", 422),
        ("%7Bmaria%7D", 422),
        ("maria%00", 422),
        ("maria%0A", 422),
        ("*", 422),
        ("x" * 129, 422),
        ("x" * 10_000, 422),
    ],
)
async def test_ids_that_are_unknown_or_none_at_all_are_told_so(
    user_id: str, status: int, what: str, api: httpx.AsyncClient
) -> None:
    response = await api.get(f"/v1/users/{user_id}/{what}")

    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert set(response.json()) == {"type", "title", "status", "detail"}


async def test_who_only_clicked_is_like_nobody(api: httpx.AsyncClient) -> None:
    assert (await api.get("/v1/users/quiet/similar")).status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/users/maria/similar?top=0",
        "/users/maria/similar?top=101",
        "/campaigns?limit=0",
        "/campaigns?limit=501",
        "/campaigns?active=perhaps",
        "/campaigns?category=",
        "/campaigns?after=%22",
    ],
)
async def test_parameters_are_checked(path: str, api: httpx.AsyncClient) -> None:
    response = await api.get(f"/v1{path}")

    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("path", "store"),
    [("/users/maria/similar", "milvus"), ("/users/maria/profile", "analytics"), ("/campaigns", "analytics")],
)
async def test_a_store_that_is_down_is_a_503(path: str, store: str, published: Settings) -> None:
    change: dict[str, Any] = {
        "milvus": {"milvus_port": free_ports(1)[0]},
        "analytics": {"sqlite_path": "/nowhere/analytics.db"},
    }[store]
    async with api_of(published.model_copy(update={**change, "store_timeout_s": 3})) as api:
        response = await api.get(f"/v1{path}")

    assert response.status_code == 503
    assert response.headers["retry-after"]
    assert store in response.json()["detail"]
    assert "nowhere" not in response.text
