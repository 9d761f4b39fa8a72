"""Ids over HTTP and through every store: odd ones work, what is none changes nothing, no two asks are mixed up."""

import json
from collections.abc import AsyncIterator, Iterator
from itertools import permutations, product
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from conftest import SAMPLE, Stores, api_of, empty_settings
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from personalization.local.stack import Stack
from personalization.pipeline.run import run_pipeline
from personalization.schemas import is_identifier
from personalization.settings import Settings

from services.api.main import create_app

ODD = ["a", "a:b", "x@y.z", "名前", "~|=+", "...a", "null", "x" * 128]
NO_IDS = {
    "10 kB": "x" * 10_240,
    "10 kB of three bytes each": "名" * 3_413,
    "Cypher": "maria'}) DETACH DELETE u //",
    "MongoDB": '{"$gt": ""}',
    "MongoDB's path": "$where",
    "SQL": "maria'; DELETE FROM events; --",
    "Milvus": 'maria"] or user_id != "',
    "Redis": "maria\r\nFLUSHALL\r\n",
    "Redis' pattern": "*",
    "Redis' slot": "maria}:{",
    "a path": "../../users/maria",
    "a path of backslashes": "..\\..\\users\\maria",
    "dots": "..",
    "an encoded path": "%2e%2e%2fusers%2fmaria",
    "NUL": "maria\0",
    "a line's end": "maria\n",
    "white space": " maria",
    "a byte order mark": "\ufeffmaria",
    "right to left": "\u202eairam",
    "a combining accent": "marie\u0301",
    "full-width quotes": "＂maria＂",
    "half an emoji": "\ud83d",
    "a template": "{{7*7}}",
    "a format": "%s%n{0}",
    "a log's line": "${jndi:ldap://127.0.0.1/a}",
    "markup": "<script>alert(1)</script>",
}


@pytest.fixture(scope="module")
def settings(store_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The sample, and two messages of each odd user, in the stores."""
    folder = tmp_path_factory.mktemp("ids")
    settings = empty_settings(store_stack, folder).model_copy(update={"answer_store_timeout_s": 10})
    said = ("Any cheap flights to Porto in May?", "And a hotel near the beach, please")
    rows = json.loads(SAMPLE.read_text())
    rows += [
        {"user_id": user_id, "message": text, "timestamp": f"2026-10-0{at}T09:00:00Z"}
        for user_id in ODD
        for at, text in enumerate(said, 1)
    ]
    path = folder / "conversations.json"
    path.write_text(json.dumps(rows))
    assert run_pipeline(path, settings)["status"] == "success"
    return settings


@pytest.fixture
async def api(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    async with api_of(settings) as client:
        yield client


@pytest.fixture
def plain(settings: Settings) -> Iterator[TestClient]:
    """A client that needs no event loop of the test's."""
    with TestClient(create_app(settings), "http://api", client=("127.0.0.1", 1)) as client:
        yield client


def encoded(text: str) -> str:
    """Every byte, so that no client takes a part of it for more."""
    return "".join(f"%{byte:02X}" for byte in text.encode("utf-8", "surrogatepass"))


def campaigns_of(answer: httpx.Response) -> list[str]:
    return [one["campaign_id"] for one in answer.json()["recommendations"]]


def everything(stores: Stores) -> dict[str, Any]:
    return {
        **stores.snapshot(),
        "keys": set(stores.redis.keys()),
        "erasures": stores.mongo.erasures.count_documents({}),
    }


# --- what is an id


@pytest.mark.parametrize("user_id", ODD)
async def test_an_odd_user_is_served_heard_and_forgotten(user_id: str, api: httpx.AsyncClient, stores: Stores) -> None:
    user = f"/v1/users/{quote(user_id, safe='')}"
    recommended = f"/recommendations/{quote(user_id, safe=':@+=|~')}"
    others = stores.mongo.conversations.count_documents({"user_id": {"$ne": user_id}})

    answer = (await api.get(recommended)).json()
    assert (answer["user_id"], answer["strategy"]) == (user_id, "personalized")
    assert (await api.get(recommended)).headers["cache-status"] == "personalization; hit"
    together = await api.post("/v1/recommendations:batch", json={"user_ids": ["maria", user_id]})
    assert together.json()["answers"][1] == answer
    profile = (await api.get(f"{user}/profile")).json()
    assert (profile["user_id"], profile["messages"]) == (user_id, 2)
    similar = (await api.get(f"{user}/similar")).json()
    assert similar["user_id"] == user_id
    assert user_id not in {one["user_id"] for one in similar["similar"]}

    first = answer["recommendations"][0]["campaign_id"]
    event = {"user_id": user_id, "campaign_id": first, "event": "dismiss", "timestamp": "2026-11-01T09:00:00Z"}
    assert (await api.post("/v1/events", json=event)).status_code == 202
    dismissed = (await api.get(f"/v1{recommended}?explain=true")).json()
    assert first not in {one["campaign_id"] for one in dismissed["recommendations"]}

    receipt = (await api.delete(user)).json()
    assert (receipt["user_id"], receipt["status"]) == (user_id, "erased")
    assert all(one["remaining"] == 0 for one in receipt["stores"])
    assert all(sum(one["removed"].values()) for one in receipt["stores"] if one["store"] != "staging")
    assert (await api.get(f"{user}/profile")).status_code == 404
    assert (await api.get(f"{user}/similar")).status_code == 404
    assert (await api.get(recommended)).json()["strategy"] == "popular"
    assert (await api.post("/v1/events", json=event)).status_code == 410
    assert stores.mongo.conversations.count_documents({}) == others


# --- what is none


@pytest.mark.parametrize("no_id", NO_IDS.values(), ids=NO_IDS)
async def test_what_is_no_id_is_refused_and_changes_nothing(no_id: str, api: httpx.AsyncClient, stores: Stores) -> None:
    before = everything(stores)
    in_path = encoded(no_id)
    event = {"user_id": "maria", "campaign_id": "c", "event": "click", "timestamp": "2026-11-01T09:00:00Z"}
    refused = [
        await api.get(f"/recommendations/{in_path}"),
        await api.get(f"/v1/recommendations/{in_path}?top=5&explain=true"),
        await api.get(f"/v1/users/{in_path}/profile"),
        await api.get(f"/v1/users/{in_path}/similar"),
        await api.delete(f"/v1/users/{in_path}"),
        *[
            await api.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
            for path, body in [
                ("/v1/recommendations:batch", {"user_ids": ["maria", no_id]}),
                ("/v1/events", {**event, "user_id": no_id}),
                ("/v1/events", {**event, "event_id": no_id}),
            ]
        ],
    ]
    judged = await api.post(
        "/v1/events:batch",
        content=json.dumps({"events": [{**event, "user_id": no_id}, {**event, "event_id": no_id}]}),
        headers={"Content-Type": "application/json"},
    )

    assert {one.status_code for one in refused} <= {404, 422}
    assert {one.headers["content-type"] for one in refused} == {"application/problem+json"}
    assert (judged.status_code, judged.json()["rejected"]) == (207, 2)
    assert not any(no_id in one.text for one in [*refused, judged] if len(no_id) > 2)
    assert everything(stores) == before


@pytest.mark.parametrize("text", NO_IDS.values(), ids=NO_IDS)
async def test_what_else_is_asked_is_data_and_no_more(text: str, api: httpx.AsyncClient, stores: Stores) -> None:
    whole = await api.get("/v1/recommendations/maria")
    before = everything(stores)

    without = await api.get(f"/v1/recommendations/maria?exclude={encoded(text)}")
    category = await api.get(f"/v1/recommendations/maria?category={encoded(text)}")
    campaigns = await api.get(f"/v1/campaigns?category={encoded(text)}")
    behind = await api.get(f"/v1/campaigns?after={encoded(text)}")

    assert without.status_code in (200, 422)
    assert without.status_code == 422 or campaigns_of(without) == campaigns_of(whole)
    assert category.status_code in (200, 422)
    assert category.status_code == 422 or campaigns_of(category) == []
    assert campaigns.status_code in (200, 422)
    assert campaigns.status_code == 422 or campaigns.json()["campaigns"] == []
    assert behind.status_code in (200, 422)
    after = everything(stores)
    assert {one for one in after.pop("keys") - before.pop("keys") if not one.startswith(b"answer:{maria}:")} == set()
    assert after == before


@examples(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(min_size=1, max_size=140) | st.from_regex(r"\A[\w.:@+=|~-]{1,128}\Z"))
@example(text="%00")
@example(text="/")
@example(text="maria/profile")
def test_any_text_is_an_id_or_refused(plain: TestClient, text: str) -> None:
    answer = plain.get(f"/v1/recommendations/{encoded(text)}")
    profile = plain.get(f"/v1/users/{encoded(text)}/profile")

    if is_identifier(text):
        assert (answer.status_code, answer.json()["user_id"]) == (200, text)
        assert profile.status_code in (200, 404)
    else:
        assert answer.status_code in (404, 422)
        assert profile.status_code in (404, 422)


# --- what is asked


async def test_equal_asks_are_answered_once_and_others_not_alike(api: httpx.AsyncClient, stores: Stores) -> None:
    asks = [
        [f"top={top}", *([f"category={category}"] if category else []), *(f"exclude={one}" for one in exclude), *why]
        for top, category, exclude, why in product(
            (5, 6), (None, "travel"), ((), ("a",), ("a", "b"), ("a, b",), ("a', 'b",)), ((), ("explain=true",))
        )
    ]
    for key in stores.redis.keys("answer:*"):
        stores.redis.delete(key)
    for ask in asks:
        answers = [
            await api.get(f"/v1/recommendations/maria?{'&'.join(order)}") for order in [ask, *permutations(ask)][:8]
        ]
        backwards = await api.get(f"/recommendations/maria?{'&'.join([*ask[::-1], 'other=1', *ask])}")

        outcomes = [one.headers["cache-status"] for one in [*answers, backwards]]
        assert outcomes[0].startswith("personalization; fwd=miss"), ask
        assert set(outcomes[1:]) == {"personalization; hit"}, ask
        assert {one.content for one in [*answers, backwards]} == {answers[0].content}
    assert len(stores.redis.keys("answer:*")) == len(asks)
