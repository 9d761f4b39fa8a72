"""Events sent to the API: taken once, judged one by one, rolled up by the next run, and counted at once."""

import json
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Stores, api_of, free_ports, stage, write_rows
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from personalization.pipeline.run import run_pipeline
from personalization.schemas import Event, is_identifier
from personalization.settings import Settings
from personalization.stores.mongo import AsyncEventStore, MongoStore, PastEventRow
from pydantic import SecretStr
from pymongo import AsyncMongoClient
from pymongo.monitoring import CommandListener
from starlette.testclient import TestClient

from services.api.main import create_app

CATALOG = """
intents:
  - {id: flight, name: Flights, examples: [I want to book a flight to Lisbon, Find me a plane to Rome]}
  - {id: film, name: Films, examples: [Which film should I watch tonight?, Recommend a horror movie]}
campaigns:
  - {id: city_breaks, name: City breaks, category: travel, intents: [flight]}
  - {id: cinema, name: Two for one at the cinema, category: films, intents: [film]}
"""
JUST_NOW = (datetime.now(UTC) - timedelta(minutes=1)).isoformat()


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    """With a small catalog, which takes little time to embed."""
    catalog = tmp_path / "catalog"
    catalog.mkdir()
    (catalog / "all.yaml").write_text(CATALOG)
    return settings.model_copy(update={"catalog_path": catalog})


@pytest.fixture
async def api(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    async with api_of(settings) as client:
        yield client


@pytest.fixture
def mongo(settings: Settings) -> Iterator[MongoStore]:
    mongo = MongoStore.from_settings(settings)
    mongo.ensure_schema()
    yield mongo
    mongo.client.close()


@pytest.fixture
async def events(settings: Settings, mongo: MongoStore) -> AsyncIterator[AsyncEventStore]:
    events = AsyncEventStore.from_settings(settings)
    yield events
    await events.aclose()


def event(number: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "event_id": f"e{number}",
        "user_id": "ann",
        "campaign_id": "city_breaks",
        "event": "click",
        "timestamp": "2026-10-01T09:00:00Z",
    } | changes


async def send(api: httpx.AsyncClient, *values: Any) -> httpx.Response:
    return await api.post("/v1/events:batch", json={"events": values})


def run(settings: Settings, folder: Path) -> Any:
    """A run over one message of ann's, and whatever events wait."""
    said = {"user_id": "ann", "message": "I want to book a flight to Porto", "timestamp": "2026-09-01T09:00:00Z"}
    summary = run_pipeline(write_rows(folder / "messages.ndjson", [said]), settings)
    assert summary["status"] == "success", summary
    return summary


# --- one event


async def test_an_event_waits_in_mongodb_for_the_next_run(api: httpx.AsyncClient, stores: Stores) -> None:
    response = await api.post("/v1/events", json=event(position=2, propensity=0.5, policy="fusion"))

    assert (response.status_code, response.json()) == (202, {"event_id": "e1", "status": "accepted"})
    [stored] = stores.mongo.events.find()
    assert abs(stored.pop("received_at").replace(tzinfo=UTC) - datetime.now(UTC)) < timedelta(minutes=1)
    assert stored == {
        "_id": "e1",
        "user_id": "ann",
        "campaign_id": "city_breaks",
        "event": "click",
        "timestamp": datetime(2026, 10, 1, 9),
        "position": 2,
        "propensity": 0.5,
        "policy": "fusion",
        "content_hash": Event.model_validate(event(position=2, propensity=0.5, policy="fusion")).content_hash,
        "run_id": None,
        "attempt": 0,
        "source": {"uri": "api"},
    }


async def test_an_event_without_an_id_gets_the_same_one_each_time(api: httpx.AsyncClient, stores: Stores) -> None:
    nameless = {name: value for name, value in event().items() if name != "event_id"}

    first, again = [(await api.post("/v1/events", json=nameless)).json() for _ in range(2)]

    assert first == {"event_id": Event.model_validate(nameless).event_id, "status": "accepted"}
    assert again == first | {"status": "duplicate"}
    assert stores.mongo.events.count_documents({}) == 1


async def test_an_event_that_comes_again_stays_with_the_run_that_took_it(
    api: httpx.AsyncClient, stores: Stores
) -> None:
    await api.post("/v1/events", json=event())
    stores.mongo.events.update_one({"_id": "e1"}, {"$set": {"run_id": "r1"}})
    [before] = stores.mongo.events.find()

    response = await api.post("/v1/events", json=event(timestamp="2026-10-01T11:00:00+02:00"))

    assert (response.status_code, response.json()["status"]) == (202, "duplicate")
    assert list(stores.mongo.events.find()) == [before]


@pytest.mark.parametrize(
    "change",
    [
        {"user_id": "bob"},
        {"campaign_id": "cinema"},
        {"event": "dismiss"},
        {"timestamp": "2026-10-01T09:00:01Z"},
        {"position": 1},
    ],
)
async def test_another_event_under_a_known_id_is_a_conflict(
    change: dict[str, Any], api: httpx.AsyncClient, stores: Stores
) -> None:
    await api.post("/v1/events", json=event())
    [before] = stores.mongo.events.find()

    response = await api.post("/v1/events", json=event(**change))

    assert response.status_code == 409
    assert response.headers["content-type"] == "application/problem+json"
    assert list(stores.mongo.events.find()) == [before]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"user_id": ""}, "user_id"),
        ({"user_id": "a b"}, "user_id"),
        ({"user_id": "x' or '1"}, "user_id"),
        ({"user_id": 'a"b'}, "user_id"),
        ({"user_id": {"$ne": None}}, "user_id"),
        ({"user_id": "{ann}"}, "user_id"),
        ({"user_id": "x" * 10_000}, "user_id"),
        ({"user_id": "\ud800"}, "user_id"),
        ({"user_id": 7}, "user_id"),
        ({"user_id": None}, "user_id"),
        ({"event_id": "../e1"}, "event_id"),
        ({"event_id": {"$gt": ""}}, "event_id"),
        ({"campaign_id": ""}, "campaign_id"),
        ({"campaign_id": 'a"b'}, "campaign_id"),
        ({"campaign_id": "a\u0000b"}, "campaign_id"),
        ({"event": "view"}, "event"),
        ({"timestamp": "2999-01-01T00:00:00Z"}, "timestamp"),
        ({"timestamp": "yesterday"}, "timestamp"),
        ({"timestamp": 1_790_000_000}, "timestamp"),
        ({"position": 0}, "position"),
        ({"position": "1"}, "position"),
        ({"position": True}, "position"),
        ({"propensity": 0}, "propensity"),
        ({"propensity": 1.5}, "propensity"),
        ({"policy": " "}, "policy"),
        ({"policy": "x" * 65}, "policy"),
    ],
)
async def test_what_is_no_event_is_refused_with_the_field(
    change: dict[str, Any], field: str, api: httpx.AsyncClient, stores: Stores
) -> None:
    body = json.dumps(event(**change))

    alone = await api.post("/v1/events", content=body, headers={"Content-Type": "application/json"})
    among = await api.post(
        "/v1/events:batch", content=f'{{"events": [{body}]}}', headers={"Content-Type": "application/json"}
    )

    assert alone.status_code == 422
    assert alone.headers["content-type"] == "application/problem+json"
    assert alone.json()["detail"].startswith(f"{field}: ")
    [judged] = among.json()["events"]
    assert (among.status_code, judged["status"], judged["reason"]) == (207, "rejected", "invalid")
    assert judged["detail"] == alone.json()["detail"]
    for value in change.values():
        if isinstance(value, str) and len(value) > 2:
            assert value not in alone.text + among.text
    assert stores.mongo.events.count_documents({}) == 0


@pytest.mark.parametrize(
    ("body", "status"), [("", 422), ("not json", 400), ("[]", 422), ('"e1"', 422), ("null", 422), ("{}", 422)]
)
@pytest.mark.parametrize("path", ["/v1/events", "/v1/events:batch"])
async def test_a_body_of_another_shape_is_refused(path: str, body: str, status: int, api: httpx.AsyncClient) -> None:
    response = await api.post(path, content=body, headers={"Content-Type": "application/json"})

    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"


async def test_a_campaign_that_is_not_served_makes_a_warning(
    settings: Settings, tmp_path: Path, stores: Stores
) -> None:
    run(settings, tmp_path)
    async with api_of(settings) as api:
        known = await api.post("/v1/events", json=event(1))
        unknown = await api.post("/v1/events", json=event(2, campaign_id="left the catalog"))
        together = await send(api, event(3), event(4, campaign_id="left the catalog"))

    assert known.json() == {"event_id": "e1", "status": "accepted"}
    assert unknown.status_code == 202
    assert "no such campaign" in unknown.json()["warning"]
    assert together.status_code == 202
    assert ["warning" in one for one in together.json()["events"]] == [False, True]
    assert stores.mongo.events.count_documents({}) == 4


# --- several


async def test_each_event_of_a_batch_is_judged_by_itself(api: httpx.AsyncClient, stores: Stores) -> None:
    await api.post("/v1/events", json=event(1))

    response = await send(
        api,
        event(1),
        event(2),
        event(1, user_id="bob"),
        event(3, user_id="a b"),
        "no event",
        event(4),
        event(4),
        event(2, event="dismiss"),
        None,
    )

    assert response.status_code == 207
    answer = response.json()
    assert [answer[name] for name in ("accepted", "duplicates", "rejected")] == [2, 2, 5]
    assert [one["index"] for one in answer["events"]] == list(range(9))
    assert [(one.get("event_id"), one["status"], one.get("reason")) for one in answer["events"]] == [
        ("e1", "duplicate", None),
        ("e2", "accepted", None),
        ("e1", "rejected", "conflict"),
        (None, "rejected", "invalid"),
        (None, "rejected", "invalid"),
        ("e4", "accepted", None),
        ("e4", "duplicate", None),
        ("e2", "rejected", "conflict"),
        (None, "rejected", "invalid"),
    ]
    assert all(one.get("detail") for one in answer["events"] if one["status"] == "rejected")
    assert {one["_id"]: one["event"] for one in stores.mongo.events.find()} == dict.fromkeys(
        ("e1", "e2", "e4"), "click"
    )


async def test_a_batch_that_is_sent_again_changes_nothing(api: httpx.AsyncClient, stores: Stores) -> None:
    batch = [event(number, user_id=f"user-{number % 7}") for number in range(500)]

    first, again = [await send(api, *batch) for _ in range(2)]

    assert (first.status_code, first.json()["accepted"]) == (202, 500)
    assert (again.status_code, again.json()["duplicates"]) == (202, 500)
    assert stores.mongo.events.count_documents({}) == 500


@pytest.mark.parametrize("count", [0, 501])
async def test_a_batch_has_1_to_500_events(count: int, api: httpx.AsyncClient, stores: Stores) -> None:
    response = await send(api, *(event(number) for number in range(count)))

    assert response.status_code == 422
    assert response.json()["detail"].startswith("events: ")
    assert stores.mongo.events.count_documents({}) == 0


async def test_a_body_that_is_too_large_is_not_read(api: httpx.AsyncClient, settings: Settings) -> None:
    response = await send(api, *(event(number, note="x" * 3000) for number in range(500)))

    assert response.status_code == 413
    assert response.headers["content-type"] == "application/problem+json"


class Counted(CommandListener):
    """Commands of a client, by name."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def started(self, event: Any) -> None:
        self.names.append(event.command_name)

    def succeeded(self, event: Any) -> None: ...

    def failed(self, event: Any) -> None: ...


@pytest.mark.parametrize("count", [1, 500])
async def test_round_trips_do_not_grow_with_the_events(count: int, settings: Settings, mongo: MongoStore) -> None:
    counted = Counted()
    client: Any = AsyncMongoClient(settings.mongodb_uri.get_secret_value(), tz_aware=True, event_listeners=[counted])
    events = AsyncEventStore(client, settings.mongodb_database)
    batch = [Event.model_validate(event(number, user_id=f"user-{number}", event="dismiss")) for number in range(count)]

    assert await events.insert(batch) == ["accepted"] * count
    assert counted.names == ["find", "insert"]
    counted.names.clear()
    assert await events.insert(batch) == ["duplicate"] * count
    assert counted.names == ["find", "insert", "find"]
    counted.names.clear()
    assert len(await events.pending_of([one.user_id for one in batch], 0)) == count
    assert counted.names == ["find", "find"]
    await events.aclose()


# --- whoever was erased


async def test_nothing_of_an_erased_user_is_taken(api: httpx.AsyncClient, mongo: MongoStore, stores: Stores) -> None:
    mongo.request_erasure("ann")

    alone = await api.post("/v1/events", json=event(1))
    together = await send(api, event(2), event(3, user_id="bob"))

    assert alone.status_code == 410
    assert alone.headers["content-type"] == "application/problem+json"
    assert together.status_code == 207
    assert [(one["status"], one.get("reason")) for one in together.json()["events"]] == [
        ("rejected", "erased"),
        ("accepted", None),
    ]
    assert [one["_id"] for one in stores.mongo.events.find()] == ["e3"]


# --- what comes of them


async def test_a_run_rolls_them_up_once(settings: Settings, stores: Stores, tmp_path: Path) -> None:
    sent = [
        event(1),
        event(2, event="impression", position=1),
        event(3, event="conversion", user_id="bob", campaign_id="cinema"),
    ]
    async with api_of(settings) as api:
        await send(api, *sent)
    first = run(settings, tmp_path)
    engagement = stores.sql("SELECT * FROM user_engagement ORDER BY 1, 2")
    async with api_of(settings) as api:
        assert (await send(api, *sent)).json()["duplicates"] == 3
    again = run(settings, tmp_path)

    assert stage(first, "ingest_events")["rows_out"] == 3
    assert stage(again, "ingest_events").get("rows_out", 0) == 0
    assert stores.sql("SELECT event_id, run_id FROM events ORDER BY 1") == [
        (one["event_id"], first["run_id"]) for one in sent
    ]
    counts = "SELECT user_id, campaign_id, impressions, clicks, conversions FROM user_engagement ORDER BY 1, 2"
    assert stores.sql(counts) == [("ann", "city_breaks", 1, 1, 0), ("bob", "cinema", 0, 0, 1)]
    assert stores.sql("SELECT * FROM user_engagement ORDER BY 1, 2") == engagement


@pytest.mark.parametrize("kind", ["dismiss", "conversion"])
@pytest.mark.parametrize("path", ["/v1/events", "/v1/events:batch"])
async def test_it_counts_in_the_very_next_answer(path: str, kind: str, settings: Settings, tmp_path: Path) -> None:
    run(settings, tmp_path)
    done = event(event=kind, timestamp=JUST_NOW)
    async with api_of(settings) as api:

        async def shown(user_id: str) -> list[str]:
            answer = (await api.get(f"/v1/recommendations/{user_id}")).json()
            return [one["campaign_id"] for one in answer["recommendations"]]

        assert "city_breaks" in await shown("ann")
        assert "city_breaks" in await shown("bob")

        response = await api.post(path, json=done if path == "/v1/events" else {"events": [done]})

        assert response.status_code == 202
        assert "city_breaks" not in await shown("ann")
        assert "city_breaks" in await shown("bob")


async def test_a_profile_names_all_runs_that_took_something_of_the_user(settings: Settings, tmp_path: Path) -> None:
    runs = [run(settings, tmp_path)["run_id"]]
    async with api_of(settings) as api:
        await send(api, event(1), event(2), event(3, user_id="bob"))
        runs.append(run(settings, tmp_path)["run_id"])

        found = {user: (await api.get(f"/v1/users/{user}/profile")).json()["runs"] for user in ("ann", "bob")}

    assert [(one["run_id"], one["messages"], one["events"]) for one in found["ann"]] == [
        (runs[1], 0, 2),
        (runs[0], 1, 0),
    ]
    assert [(one["run_id"], one["messages"], one["events"]) for one in found["bob"]] == [(runs[1], 0, 1)]


# --- stores that are down


async def test_without_mongodb_it_is_a_503_and_nothing_is_promised(settings: Settings) -> None:
    [port] = free_ports(1)
    down = settings.model_copy(update={"mongodb_uri": SecretStr(f"mongodb://127.0.0.1:{port}"), "store_timeout_s": 1})
    async with api_of(down) as api:
        for response in (await api.post("/v1/events", json=event()), await send(api, event())):
            assert response.status_code == 503
            assert response.headers["retry-after"]
            assert response.headers["content-type"] == "application/problem+json"
            assert str(port) not in response.text


async def test_without_redis_events_are_taken(settings: Settings, stores: Stores) -> None:
    [port] = free_ports(1)
    down = settings.model_copy(update={"redis_url": SecretStr(f"redis://127.0.0.1:{port}/0")})
    async with api_of(down) as api:
        response = await api.post("/v1/events", json=event(event="dismiss"))

    assert response.status_code == 202
    assert stores.mongo.events.count_documents({}) == 1


# --- what has not been rolled up


async def test_pending_events_are_those_of_the_users_that_rules_ask_for(events: AsyncEventStore) -> None:
    kinds = ("impression", "conversion", "click", "dismiss")
    for number, kind in enumerate(kinds):
        await events.insert([Event.model_validate(event(number, event=kind))])
    await events.insert([Event.model_validate(event(7, user_id="bob", event="dismiss"))])
    moment = int(datetime(2026, 10, 1, 9, tzinfo=UTC).timestamp() * 1000)
    rows = [PastEventRow("city_breaks", kind, moment) for kind in ("dismiss", "conversion", "impression")]

    assert await events.pending_of(["ann"], 0) == {"ann": rows}
    assert await events.pending_of(["ann", "bob", "nobody"], 0) == {"ann": rows, "bob": [rows[0]]}
    assert await events.pending_of([], 0) == {}


async def test_pending_events_are_those_received_since(events: AsyncEventStore, stores: Stores) -> None:
    await events.insert([Event.model_validate(event(number, event="dismiss")) for number in range(2)])
    since = datetime(2026, 11, 1, tzinfo=UTC)
    stores.mongo.events.update_one({"_id": "e0"}, {"$set": {"received_at": since}})

    found = await events.pending_of(["ann"], int(since.timestamp() * 1000))

    assert len(found["ann"]) == 1


async def test_pending_impressions_are_bounded_and_push_nothing_else_out(events: AsyncEventStore) -> None:
    await events.insert([Event.model_validate(event(9999, event="dismiss"))])
    for start in range(0, 1100, 550):
        shown = [event(number, event="impression") for number in range(start, start + 550)]
        await events.insert([Event.model_validate(one) for one in shown])

    found = (await events.pending_of(["ann"], 0))["ann"]

    assert [one.event for one in found] == ["dismiss", *["impression"] * 1000]


# --- ids, whatever they are


@pytest.fixture
def plain(settings: Settings) -> Iterator[TestClient]:
    """A client that needs no event loop of the test's."""
    with TestClient(create_app(settings), "http://api", client=("127.0.0.1", 1)) as client:
        yield client


@examples(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(
            st.text(max_size=200),
            st.from_regex(r"[\w.:@+=|~-]{1,128}", fullmatch=True),
            st.sampled_from(["'; drop table events; --", '{"$ne": null}', "$where", "a\nb", "..", "é", "用户", "😀"]),
        ),
        min_size=1,
        max_size=20,
        unique=True,
    )
)
def test_any_id_is_kept_to_the_letter_or_refused(plain: TestClient, stores: Stores, ids: list[str]) -> None:
    stores.mongo.events.delete_many({})
    response = plain.post("/v1/events:batch", json={"events": [event(event_id=one, user_id=one) for one in ids]})

    assert response.status_code in (202, 207)
    for one, judged in zip(ids, response.json()["events"], strict=True):
        assert judged["status"] == ("accepted" if is_identifier(one) else "rejected")
    valid = {one for one in ids if is_identifier(one)}
    assert {one["_id"] for one in stores.mongo.events.find()} == valid
    assert {one["user_id"] for one in stores.mongo.events.find()} == valid


@examples(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from([*event(), "position", "propensity", "policy", "$set"]), inner)
        ),
        max_leaves=12,
    )
)
def test_any_json_is_judged(plain: TestClient, body: Any) -> None:
    assert plain.post("/v1/events", json=body).status_code == 422
    assert plain.post("/v1/events:batch", json={"events": [body]}).status_code == 207
