"""Events: which rows are taken and how, and what the analytics database makes of them."""

import math
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import PROJECT, SAMPLE_EVENTS
from personalization.catalog.loading import load_catalog
from personalization.pipeline.events import EventTaker
from personalization.pipeline.lineage import StageReport
from personalization.pipeline.taking import select_files
from personalization.reading import Row, read_rows
from personalization.schemas import (
    DAY_MS,
    ENGAGEMENT_STRENGTH,
    OTHER_INTENT,
    Campaign,
    Catalog,
    Engagement,
    Event,
    Intent,
)
from personalization.settings import Settings
from personalization.stores.analytics import AnalyticsStore
from personalization.stores.mongo import MongoStore, RecordKind, event_document
from pydantic import ValidationError
from sqlalchemy import text
from upath import UPath

HALF_LIFE = 30.0
NOON = int(datetime(2026, 10, 1, 12, tzinfo=UTC).timestamp() * 1000)
EVENT = {"user_id": "ann", "campaign_id": "city_breaks", "event": "click", "timestamp": "2026-10-01T12:00:00Z"}

CATALOG = Catalog(
    intents=[Intent(id=one, name=one, examples=["…"]) for one in ("flight", "hotel", "film")],
    campaigns=[
        Campaign(id="city_breaks", name="City breaks", intents=["flight", "hotel"]),
        Campaign(id="cinema", name="Cinema", intents=["film"]),
        Campaign(id="ended", name="Ended", intents=["flight"], active_until="2026-01-01"),
    ],
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AnalyticsStore]:
    store = AnalyticsStore.from_settings(
        Settings(_env_file=None, sqlite_path=tmp_path / "analytics.db", analytics_url=None)
    )
    store.ensure_schema()
    store.sync_catalog(CATALOG)
    yield store
    store.engine.dispose()


def event(number: int, kind: str = "click", **changes: Any) -> dict[str, Any]:
    return {
        "event_id": f"e{number}",
        "user_id": "ann",
        "campaign_id": "city_breaks",
        "event": kind,
        "timestamp": NOON,
        "position": None,
        "propensity": None,
        "policy": None,
        "run_id": "run",
    } | changes


def intent(number: int, intent_id: str = "flight", **changes: Any) -> dict[str, Any]:
    return {
        "message_id": f"m{number}",
        "intent_id": intent_id,
        "user_id": "ann",
        "timestamp": NOON,
        "confidence": 0.8,
        "run_id": "run",
    } | changes


def say(store: AnalyticsStore, *rows: dict[str, Any]) -> None:
    store.replace_message_intents(sorted({row["message_id"] for row in rows}), rows)


def engagement(store: AnalyticsStore, *user_ids: str) -> dict[tuple[str, str], Engagement]:
    found = store.engagement(user_ids or ("ann",), HALF_LIFE)
    return {(one.user_id, one.campaign_id): one for one in found}


# --- rows


@pytest.fixture
def taker() -> EventTaker:
    report = StageReport(run_id="run", stage="ingest_events", shard=0, attempt=1, started_at=datetime.now(UTC))
    return EventTaker(report, cast("MongoStore", None), Settings(_env_file=None))


def parse(taker: EventTaker, value: dict[str, Any], *, of_strings: bool = False) -> Event:
    parsed = taker.parse(Row(1, "", value, of_strings=of_strings))
    assert isinstance(parsed, Event)
    return parsed


def test_a_csv_row_means_what_the_same_json_row_means(taker: EventTaker):
    cells = EVENT | {"event": " click ", "position": "3.0", "propensity": "0.25", "policy": "\tshuffle", "note": "x"}
    typed = EVENT | {"position": 3, "propensity": 0.25, "policy": "shuffle"}

    assert parse(taker, cells, of_strings=True) == parse(taker, typed)


@pytest.mark.parametrize("cell", ["3", "3.0", " 3 ", "3.00"])
def test_a_whole_position_is_whole_however_csv_writes_it(taker: EventTaker, cell: str):
    assert parse(taker, EVENT | {"position": cell}, of_strings=True).position == 3


def test_blank_cells_are_absent(taker: EventTaker):
    parsed = parse(taker, EVENT | {"position": " ", "propensity": "  ", "event_id": " "}, of_strings=True)

    assert (parsed.position, parsed.propensity) == (None, None)
    assert parsed.event_id == parse(taker, EVENT).event_id


def test_json_may_write_a_whole_position_with_a_fraction(taker: EventTaker):
    assert parse(taker, EVENT | {"position": 3.0}).position == 3


@pytest.mark.parametrize(
    ("changes", "of_strings", "field"),
    [
        ({"position": "3.5"}, True, "position"),
        ({"position": "first"}, True, "position"),
        ({"position": "0"}, True, "position"),
        ({"propensity": "1.5"}, True, "propensity"),
        ({"propensity": "nan"}, True, "propensity"),
        ({"event": "Click"}, True, "event"),
        ({"timestamp": "01.10.2026 12:00"}, True, "timestamp"),
        ({"user_id": "a b"}, True, "user_id"),
        ({"position": "3"}, False, "position"),
        ({"position": 3.5}, False, "position"),
        ({"position": math.inf}, False, "position"),
        ({"position": True}, False, "position"),
        ({"propensity": math.nan}, False, "propensity"),
        ({"propensity": 0}, False, "propensity"),
        ({"event": "view"}, False, "event"),
        ({"policy": ""}, False, "policy"),
        ({"policy": "x" * 65}, False, "policy"),
        ({"policy": "a\0b"}, False, "policy"),
        ({"policy": "a\ud800b"}, False, "policy"),
        ({"campaign_id": ""}, False, "campaign_id"),
        ({"timestamp": "2999-01-01T00:00:00Z"}, False, "timestamp"),
    ],
)
def test_a_row_that_is_no_event_is_refused_by_its_field(
    taker: EventTaker, changes: dict[str, Any], of_strings: bool, field: str
):
    with pytest.raises(ValidationError) as refused:
        taker.parse(Row(1, "", EVENT | changes, of_strings=of_strings))

    assert {problem["loc"] for problem in refused.value.errors()} == {(field,)}


def test_an_event_without_an_id_gets_the_same_one_each_time():
    first, again = (Event.model_validate(EVENT) for _ in range(2))
    later = Event.model_validate(EVENT | {"timestamp": "2026-10-01T12:00:01Z"})
    with_zone = Event.model_validate(EVENT | {"timestamp": "2026-10-01T14:00:00+02:00"})

    assert first.event_id == again.event_id == with_zone.event_id
    assert first.event_id != later.event_id


@pytest.mark.parametrize(
    "change",
    [
        {"user_id": "bob"},
        {"campaign_id": "cinema"},
        {"event": "dismiss"},
        {"timestamp": "2026-10-01T12:00:01Z"},
        {"position": 1},
        {"propensity": 0.5},
        {"policy": "shuffle"},
    ],
)
def test_whatever_changes_an_event_changes_its_hash(change: dict[str, Any]):
    known = EVENT | {"event_id": "e1"}

    assert Event.model_validate(known | change).content_hash != Event.model_validate(known).content_hash


def test_an_event_of_the_api_waits_for_a_run():
    one = Event.model_validate(EVENT | {"position": 2})

    document = event_document(one, {"run_id": None, "attempt": 0, "source": {"uri": "api"}})

    assert document["_id"] == one.event_id
    assert document["run_id"] is None
    assert (document["user_id"], document["position"], document["policy"]) == ("ann", 2, None)
    assert document["content_hash"] == one.content_hash
    assert document["received_at"].tzinfo is not None


# --- files


class PublishedFiles:
    """What `select_files` asks MongoDB."""

    def __init__(self, *taken: str) -> None:
        self.taken = taken

    def published_files(self, _kind: RecordKind, fingerprints: list[str]) -> set[str]:
        return {one for one in fingerprints if one.split(":")[0] in self.taken}


def selected(kind: RecordKind, inbox: Path, named: str = "", *, by_hand: bool = False, taken: str = "") -> list[str]:
    mongo = cast("MongoStore", PublishedFiles(taken))
    return [path.name for path in select_files(kind, named, by_hand=by_hand, inbox_uri=str(inbox), mongo=mongo)]


def test_the_inbox_tells_files_of_events_from_those_of_messages_by_their_names(tmp_path: Path):
    events = ["events.csv", "events-monday.csv.gz", "events.json", "events_2.jsonl.gz", "events3.ndjson"]
    messages = ["conversations.json", "my-events.json", "monday.jsonl.gz"]
    neither = [".events.csv", "events.txt", "events.csv.zip", "messages.csv", "events", ".monday.json", "a.gz"]
    for name in (*events, *messages, *neither):
        (tmp_path / name).write_text("x")
    (tmp_path / "events.d.json").mkdir()

    assert selected("event", tmp_path) == sorted(events)
    assert selected("message", tmp_path) == sorted(messages)
    assert selected("event", tmp_path, taken="events.csv") == sorted(set(events) - {"events.csv"})


def test_a_run_by_hand_takes_what_it_names_and_leaves_the_inbox(tmp_path: Path):
    (tmp_path / "events.csv").write_text("x")

    assert selected("event", tmp_path, "somewhere/clicks.csv", by_hand=True) == ["clicks.csv"]
    assert selected("event", tmp_path, by_hand=True) == []
    assert selected("event", tmp_path / "missing") == []


def test_the_sample_s_events_are_of_its_users_and_campaigns():
    rows = [Event.of_row(row.value, of_strings=True) for row in read_rows(UPath(SAMPLE_EVENTS))]
    campaigns = {one.id for one in load_catalog(PROJECT / "include" / "catalog").campaigns}

    assert 200 <= len(rows) <= 300
    assert len({one.event_id for one in rows}) == len(rows)
    assert {one.campaign_id for one in rows} <= campaigns
    assert {one.event for one in rows} == {"impression", "click", "conversion", "dismiss"}
    assert all(one.position for one in rows if one.event == "impression")
    assert not any(one.event == "dismiss" for one in rows if one.user_id == "maria")


# --- engagement


def test_engagement_counts_each_kind_and_dates_the_last(store: AnalyticsStore):
    day = DAY_MS
    say(store, intent(1, timestamp=NOON - 9 * day), intent(2, "hotel", timestamp=NOON - 8 * day))
    store.set_events(
        [
            event(1, "impression", timestamp=NOON - 3 * day),
            event(2, "impression", timestamp=NOON - 2 * day),
            event(3, "click", timestamp=NOON - 2 * day + 60_000),
            event(4, "conversion", timestamp=NOON - day),
            event(5, "dismiss", timestamp=NOON),
        ]
    )

    found = engagement(store)

    assert list(found) == [("ann", "city_breaks")]
    one = found["ann", "city_breaks"]
    assert (one.count, one.last_at) == (2, NOON - 8 * day)
    assert (one.impressions, one.clicks, one.conversions, one.dismisses) == (2, 1, 1, 1)
    assert (one.last_event_at, one.last_dismiss_at) == (NOON, NOON)
    assert (one.last_impression_at, one.last_conversion_at) == (NOON - 2 * day, NOON - day)
    assert one.weight_at == NOON - day
    assert one.signals == 4


def test_weight_is_the_sum_of_strengths_halved_by_age(store: AnalyticsStore):
    ages = {"mention": 45.0, "click": 30.0, "conversion": 12.5, "dismiss": -2.0, "impression": -1.0}
    moments = {kind: NOON - int(days * DAY_MS) for kind, days in ages.items()}
    say(store, intent(1, timestamp=moments.pop("mention")))
    store.set_events([event(number, kind, timestamp=at) for number, (kind, at) in enumerate(moments.items())])

    one = engagement(store)["ann", "city_breaks"]

    newest = NOON - int(12.5 * DAY_MS)
    assert one.weight_at == newest
    expected = sum(
        strength * 2 ** (-(newest - (NOON - int(ages[kind] * DAY_MS))) / (HALF_LIFE * DAY_MS))
        for kind, strength in ENGAGEMENT_STRENGTH.items()
    )
    assert one.weight == pytest.approx(expected, abs=1e-9)


def test_without_a_positive_signal_there_is_no_weight(store: AnalyticsStore):
    store.set_events([event(1, "impression"), event(2, "dismiss")])

    one = engagement(store)["ann", "city_breaks"]

    assert (one.weight, one.weight_at, one.signals, one.count, one.last_at) == (0.0, None, 0, 0, 0)


@pytest.mark.parametrize("half_life", [1e-9, 1e-3, 36_500.0])
def test_signals_decades_apart_neither_overflow_nor_underflow(store: AnalyticsStore, half_life: float):
    store.set_events([event(1, timestamp=0), event(2, timestamp=NOON)])

    [one] = store.engagement(["ann"], half_life)

    assert one.weight == pytest.approx(1 + 0.5 ** (NOON / DAY_MS / half_life))


def test_a_message_with_two_intents_of_a_campaign_mentions_it_once(store: AnalyticsStore):
    say(store, intent(1, "flight"), intent(1, "hotel"))

    one = engagement(store)["ann", "city_breaks"]

    assert (one.count, one.weight) == (1, ENGAGEMENT_STRENGTH["mention"])


def test_events_count_outside_the_active_window_and_for_campaigns_nobody_knows(store: AnalyticsStore):
    say(store, intent(1))
    store.set_events([event(1, campaign_id="ended"), event(2, campaign_id="long gone")])

    assert set(engagement(store)) == {("ann", "city_breaks"), ("ann", "ended"), ("ann", "long gone")}


def test_the_roll_up_is_set_and_never_incremented(store: AnalyticsStore):
    say(store, intent(1))
    store.set_events([event(1), event(2, user_id="bob", kind="impression")])
    for _ in range(2):
        assert store.roll_up_engagement(["ann", "bob"], HALF_LIFE) == 2
    with store.engine.connect() as connection:
        rows = {
            row["user_id"]: dict(row) for row in connection.execute(text("SELECT * FROM user_engagement")).mappings()
        }
    assert rows == {user: one.model_dump() for (user, _), one in engagement(store, "ann", "bob").items()}

    store.set_events([event(1, campaign_id="cinema"), event(2, user_id="bob", kind="dismiss")])
    store.roll_up_engagement(["ann", "bob"], HALF_LIFE)

    with store.engine.connect() as connection:
        query = "SELECT user_id, campaign_id, clicks, impressions, dismisses FROM user_engagement ORDER BY 1, 2"
        assert [tuple(row) for row in connection.execute(text(query))] == [
            ("ann", "cinema", 1, 0, 0),
            ("ann", "city_breaks", 0, 0, 0),
            ("bob", "city_breaks", 0, 0, 1),
        ]


def test_a_campaign_s_totals_are_those_of_its_users(store: AnalyticsStore):
    say(store, intent(1), intent(2, user_id="bob", timestamp=NOON + 5))
    store.set_events(
        [
            event(1, "click", user_id="cleo"),
            event(2, "impression", user_id="dan"),
            event(3, "dismiss", user_id="dan"),
            event(4, "conversion", user_id="ann"),
        ]
    )
    store.roll_up_engagement(["ann", "bob", "cleo", "dan"], HALF_LIFE)
    for _ in range(2):
        store.refresh_campaign_totals()
        store.sync_catalog(CATALOG)  # keeps them

    names = "users, messages, last_at, impressions, clicks, conversions, dismisses"
    with store.engine.connect() as connection:
        rows = {
            row[0]: tuple(row)[1:] for row in connection.execute(text(f"SELECT campaign_id, {names} FROM campaigns"))
        }
    assert rows == {
        "city_breaks": (3, 2, NOON + 5, 1, 1, 1, 1),
        "cinema": (0, 0, None, 0, 0, 0, 0),
        "ended": (0, 0, None, 0, 0, 0, 0),
    }


def test_an_intent_s_weight_is_the_sum_of_its_confidences_halved_by_age(store: AnalyticsStore):
    say(
        store,
        intent(1, confidence=0.9),
        intent(2, confidence=0.6, timestamp=NOON - 30 * DAY_MS),
        intent(3, OTHER_INTENT, timestamp=NOON + DAY_MS),
        intent(4, "film", confidence=0.5, timestamp=0),
    )

    found = {one.intent_id: one for one in store.expressed_intents(["ann"], HALF_LIFE)}

    assert set(found) == {"flight", "film"}
    assert (found["flight"].count, found["flight"].last_seen) == (2, NOON)
    assert found["flight"].confidence == pytest.approx(0.75)
    assert found["flight"].weight == pytest.approx(0.9 + 0.6 / 2)
    assert found["film"].weight == 0.5


# --- the table


def test_events_are_set_by_their_id(store: AnalyticsStore):
    rows = [event(number, user_id=f"u{number}") for number in range(2500)]
    store.set_events(rows)
    store.set_events([event(7, "dismiss", user_id="u7", run_id="later"), *rows[8:20]])

    with store.engine.connect() as connection:
        found = {row["event_id"]: dict(row) for row in connection.execute(text("SELECT * FROM events")).mappings()}
    assert len(found) == 2500
    assert (found["e7"]["event"], found["e7"]["run_id"]) == ("dismiss", "later")
    assert found["e8"] == rows[8]


def test_the_users_of_a_run_are_those_of_its_messages_and_of_its_events(store: AnalyticsStore):
    say(store, intent(1, user_id="ann"), intent(2, user_id="bob", run_id="before"), intent(3, user_id="dan"))
    store.set_events(
        [
            event(1, user_id="ann"),
            event(2, user_id="cleo"),
            event(3, user_id="eve", run_id="before"),
            event(4, user_id="bob"),
        ]
    )

    for per_page in (1, 2, 3, 100):
        assert [*chain(*store.users("run", per_page))] == ["ann", "bob", "cleo", "dan"]
        assert [*chain(*store.users(None, per_page))] == ["ann", "bob", "cleo", "dan", "eve"]
        assert [*chain(*store.users_with_messages("run", per_page))] == ["ann", "dan"]
        assert all(len(page) <= per_page for page in store.users(None, per_page))
    assert list(store.users("nothing", 10)) == []


def test_interactions_stream_in_order_of_time(store: AnalyticsStore):
    rows = [
        event(number, timestamp=NOON + (number * 7919) % 25_000, position=number % 5 or None)
        for number in range(25_000)
    ]
    store.set_events(rows)

    batches = list(store.interactions(NOON + 100, NOON + 24_000))

    assert [len(batch["user_id"]) for batch in batches] == [10_000, 10_000, 3_900]
    times = [at for batch in batches for at in batch["timestamp"]]
    assert times == sorted(times)
    assert (times[0], times[-1]) == (NOON + 100, NOON + 23_999)
    assert list(batches[0]) == ["user_id", "campaign_id", "event", "timestamp", "position", "propensity", "policy"]
    by_time = {row["timestamp"]: row["position"] for row in rows}
    assert [by_time[at] for at in times] == [position for batch in batches for position in batch["position"]]
    assert list(store.interactions(0, NOON)) == []


def test_what_messages_express_streams_in_order_of_time(store: AnalyticsStore):
    say(store, intent(2, timestamp=NOON + 1), intent(1, "hotel"), intent(1, "flight"), intent(3, timestamp=NOON + 2))

    [batch] = store.expressions(NOON, NOON + 2)

    assert batch == {
        "message_id": ["m1", "m1", "m2"],
        "user_id": ["ann"] * 3,
        "timestamp": [NOON, NOON, NOON + 1],
        "intent_id": ["flight", "hotel", "flight"],
        "confidence": [0.8] * 3,
    }


# --- the schema


OLD_TABLES = """
CREATE TABLE user_engagement (user_id VARCHAR(128) NOT NULL, campaign_id VARCHAR(128) NOT NULL,
    count BIGINT NOT NULL, last_at BIGINT NOT NULL, PRIMARY KEY (user_id, campaign_id));
CREATE TABLE campaigns (campaign_id VARCHAR(128) NOT NULL, name VARCHAR NOT NULL, category VARCHAR(64) NOT NULL,
    active_from BIGINT NOT NULL, active_until BIGINT NOT NULL, users BIGINT NOT NULL, messages BIGINT NOT NULL,
    last_at BIGINT, PRIMARY KEY (campaign_id));
CREATE TABLE message_intents (message_id VARCHAR(128) NOT NULL, intent_id VARCHAR(128) NOT NULL,
    user_id VARCHAR(128) NOT NULL, timestamp BIGINT NOT NULL, confidence FLOAT NOT NULL, run_id VARCHAR(250) NOT NULL,
    PRIMARY KEY (message_id, intent_id));
CREATE TABLE serving_state (id INTEGER NOT NULL, catalog_version VARCHAR(64) NOT NULL,
    intents_version VARCHAR(64) NOT NULL, run_id VARCHAR(250) NOT NULL, PRIMARY KEY (id));
INSERT INTO user_engagement VALUES ('ann', 'cinema', 3, 5);
INSERT INTO campaigns VALUES ('cinema', 'Cinema', 'films', 0, 9, 1, 3, 5);
INSERT INTO serving_state VALUES (1, 'catalog', 'intents', 'run');
"""


def test_a_database_of_an_earlier_version_gets_what_it_lacks_and_is_derived_anew(tmp_path: Path):
    path = tmp_path / "old.db"
    old = sqlite3.connect(path)
    old.executescript(OLD_TABLES)
    old.close()
    store = AnalyticsStore.from_settings(Settings(_env_file=None, sqlite_path=path, analytics_url=None))

    for _ in range(2):
        store.ensure_schema()

    state = store.serving_state()
    assert state is not None
    assert (state.catalog_version, state.intents_version, state.run_id) == ("", "intents", "run")
    with store.engine.connect() as connection:
        row = connection.execute(text("SELECT * FROM user_engagement")).mappings().one()
        assert (row["count"], row["last_at"], row["clicks"], row["weight"], row["weight_at"]) == (3, 5, 0, 0, None)
        assert connection.execute(text("SELECT messages, dismisses FROM campaigns")).one() == (3, 0)
        indexes = set(connection.execute(text("SELECT name FROM sqlite_master WHERE type = 'index'")).scalars())
    assert {"ix_message_intents_time", "ix_message_intents_run_user", "ix_events_run_user"} <= indexes
    store.sync_catalog(CATALOG)
    store.set_events([event(1, "dismiss")])
    assert store.roll_up_engagement(["ann"], HALF_LIFE) == 1
    store.engine.dispose()


def test_a_complete_database_is_left_as_it_is(store: AnalyticsStore):
    store.set_serving_state("catalog", "intents", "run")

    store.ensure_schema()

    state = store.serving_state()
    assert state is not None
    assert state.catalog_version == "catalog"


def test_powers_do_not_depend_on_how_sqlite_was_built(store: AnalyticsStore):
    with store.engine.connect() as connection:
        assert connection.execute(text("SELECT power(0.5, 3)")).scalar_one() == 0.125
