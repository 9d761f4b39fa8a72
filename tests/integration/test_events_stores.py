"""Events against the real stores: from files and from the API, taken once, whatever happens on the way."""

import csv
import gzip
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import Stores, free_ports, kill_after, stage, write_rows
from personalization.errors import StoreError
from personalization.pipeline.events import ingest_events
from personalization.pipeline.lineage import StageReport
from personalization.pipeline.run import run_pipeline
from personalization.pipeline.taking import select_files
from personalization.schemas import Event
from personalization.settings import Settings
from personalization.staging import Staging
from personalization.stores.analytics import AnalyticsStore
from personalization.stores.mongo import MongoStore, event_document
from pydantic import SecretStr

CATALOG = """
intents:
  - {id: flight, name: Flights, examples: [I want to book a flight to Lisbon, Find me a plane to Rome]}
  - {id: film, name: Films, examples: [Which film should I watch tonight?, Recommend a horror movie]}
campaigns:
  - {id: city_breaks, name: City breaks, category: travel, intents: [flight]}
  - {id: cinema, name: Two for one at the cinema, category: films, intents: [film]}
"""


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    """With a small catalog, which takes little time to embed."""
    catalog = tmp_path / "catalog"
    catalog.mkdir()
    (catalog / "all.yaml").write_text(CATALOG)
    return settings.model_copy(update={"catalog_path": catalog})


@pytest.fixture
def mongo(settings: Settings) -> Iterator[MongoStore]:
    mongo = MongoStore.from_settings(settings)
    yield mongo
    mongo.client.close()


def event(number: int, kind: str = "click", **changes: Any) -> dict[str, Any]:
    return {
        "event_id": f"e{number}",
        "user_id": "ann",
        "campaign_id": "city_breaks",
        "event": kind,
        "timestamp": "2026-10-01T09:00:00Z",
    } | changes


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    names = ["event_id", "user_id", "campaign_id", "event", "timestamp", "position", "propensity", "policy"]
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        writer.writerows(rows)
    return path


def messages(folder: Path) -> Path:
    said = {"user_id": "ann", "message": "I want to book a flight to Porto", "timestamp": "2026-09-01T09:00:00Z"}
    return write_rows(folder / "messages.ndjson", [said])


def edges(stores: Stores) -> set[tuple[str, str, int]]:
    query = (
        "MATCH (u:User)-[g:ENGAGED_WITH]->(c:Campaign) "
        "RETURN u.user_id AS user_id, c.campaign_id AS campaign_id, g.count AS count"
    )
    records = stores.driver.execute_query(query, database_=stores.settings.neo4j_database).records
    return {(one["user_id"], one["campaign_id"], one["count"]) for one in records}


def receive(stores: Stores, *rows: dict[str, Any]) -> None:
    """Insert events as the API does."""
    origin: Any = {"run_id": None, "attempt": 0, "source": {"uri": "api"}}
    stores.mongo.events.insert_many([event_document(Event.model_validate(row), origin) for row in rows])


def take(settings: Settings, mongo: MongoStore, run_id: str, paths: list[Path], attempt: int = 1) -> StageReport:
    """The task `ingest_events` alone, over an inbox of `paths`."""
    analytics = AnalyticsStore.from_settings(settings)
    analytics.ensure_schema()
    report = StageReport(run_id=run_id, stage="ingest_events", shard=0, attempt=attempt, started_at=datetime.now(UTC))
    try:
        ingest_events(
            report,
            files=[
                found
                for path in paths
                for found in select_files("event", str(path), by_hand=True, inbox_uri="", mongo=mongo)
            ],
            skip_bad_files=True,
            mongo=mongo,
            analytics=analytics,
            staging=Staging(settings.staging_uri, run_id),
            settings=settings,
        )
    finally:
        analytics.engine.dispose()
    return report


def test_events_reach_every_store_and_the_same_file_again_changes_nothing(
    settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    path = write_csv(
        tmp_path / "events.csv",
        [
            event(1, "impression", position="1.0", propensity=0.25, policy="shuffle"),
            event(2, timestamp="2026-10-01T09:00:05Z"),
            event(3, "conversion", timestamp="2026-10-02T09:00:00+02:00"),
            event(4, "impression", user_id="bob", campaign_id="cinema", position=2),
            event(5, "dismiss", user_id="bob", campaign_id="cinema"),
            event(6, user_id="cleo", campaign_id="left the catalog"),
            {**event(7), "event_id": ""},
        ],
    )

    summary = run_pipeline(messages(tmp_path), settings, path)

    assert summary["status"] == "success", summary
    taken = stage(summary, "ingest_events")
    assert (taken["rows_in"], taken["rows_out"], taken["details"]["new"]) == (7, 7, 7)
    stored = stores.mongo.events.find_one({"_id": "e1"})
    assert stored is not None
    assert (stored["position"], stored["propensity"], stored["policy"]) == (1, 0.25, "shuffle")
    assert stored["source"] == {"uri": str(path), "sha256": stored["source"]["sha256"], "row": 2}
    assert stored["run_id"] == summary["run_id"]
    assert stores.sql("SELECT count(*), count(DISTINCT run_id) FROM events") == [(7, 1)]
    assert edges(stores) == {("ann", "city_breaks", 4)}  # a mention, two clicks and a conversion
    assert stores.cypher("MATCH (u:User) RETURN count(u)") == 3
    [weight] = stores.sql("SELECT weight FROM user_engagement WHERE user_id = 'ann'")[0]
    assert weight == stores.cypher("MATCH ()-[g:ENGAGED_WITH]->() RETURN g.weight") > 3
    assert stores.cypher("MATCH ()-[e:EXPRESSED]->() RETURN e.weight") > 0.5
    totals = "SELECT users, messages, impressions, clicks, conversions, dismisses FROM campaigns ORDER BY campaign_id"
    assert stores.sql(totals) == [(0, 0, 1, 0, 0, 1), (1, 1, 1, 2, 1, 0)]

    before = stores.snapshot()
    again = run_pipeline(messages(tmp_path), settings, path)

    assert stores.snapshot() == before
    taken = stage(again, "ingest_events")
    assert (taken["rows_in"], taken["skipped"]) == (7, 7)
    assert stage(again, "publish")["details"]["nothing_new"] is True


def test_a_run_of_events_alone_goes_through_to_its_end(settings: Settings, stores: Stores, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "events.json", [json.dumps([event(1), event(2, "impression", user_id="bob")])])

    summary = run_pipeline(None, settings, path)

    assert summary["status"] == "success", summary
    assert stage(summary, "embed")["status"] == "skipped"
    assert edges(stores) == {("ann", "city_breaks", 1)}
    assert stores.cypher("MATCH (u:User) RETURN count(u)") == 2
    assert stores.redis.get("personalization:generation") == b"1"
    assert stage(summary, "publish")["details"]["events"] == 2

    more = run_pipeline(None, settings, write_rows(tmp_path / "more.ndjson", [event(3, user_id="bob")]))

    assert stage(more, "detect_intents")["details"]["users"] == 1
    assert edges(stores) == {("ann", "city_breaks", 1), ("bob", "city_breaks", 1)}
    assert stores.redis.get("personalization:generation") == b"2"


def test_broken_rows_are_quarantined_as_events_with_reason_and_place(
    settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    broken = {
        "user_id: Field required": {"campaign_id": "cinema", "event": "click", "timestamp": "2026-10-01T09:00:00Z"},
        "event: Input should be": event(101, "view"),
        "timestamp: is not": event(102, timestamp="yesterday"),
        "timestamp: is in the future": event(103, timestamp="2999-01-01T00:00:00Z"),
        "position: Input should be": event(104, position="third"),
        "propensity: Input should be": event(105, propensity=2),
        "policy: holds a NUL": event(106, policy="a\0b"),
        "is not an object": [1],
        "not valid JSON": '{"user_id": ',
    }
    rows = [event(number, user_id=f"u{number}") for number in range(20)]
    path = write_rows(tmp_path / "events.ndjson", [*rows[:4], *broken.values(), *rows[4:]])
    sheet = tmp_path / "events.csv.gz"
    lines = [",".join(event(0)), *(",".join(event(number, user_id="bob").values()) for number in range(200, 210))]
    lines[3] = "e1,bob"
    lines[5] = lines[5].replace("click", "clack")
    sheet.write_bytes(gzip.compress("\n".join(lines).encode()))

    for _ in range(2):
        assert stage(run_pipeline(None, settings, path), "ingest_events")["rejected"] == len(broken)
        assert stage(run_pipeline(None, settings, sheet), "ingest_events")["rejected"] == 2

    quarantined = list(stores.mongo.quarantine.find({"file": str(path)}).sort("row", 1))
    assert [one["row"] for one in quarantined] == list(range(5, 5 + len(broken)))
    for reason, document in zip(broken, quarantined, strict=True):
        assert reason in document["reason"]
        assert (document["kind"], bool(document["raw"])) == ("event", True)
    of_sheet = list(stores.mongo.quarantine.find({"file": str(sheet)}).sort("row", 1))
    assert [one["row"] for one in of_sheet] == [4, 6]
    assert "has 2 cells where the header has 5" in of_sheet[0]["reason"]
    assert stores.mongo.events.count_documents({}) == stores.sql("SELECT count(*) FROM events")[0][0] == 28


def test_too_many_broken_events_fail_the_run(settings: Settings, stores: Stores, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "events.ndjson", [event(1), *[event(2, "view")] * 3])

    summary = run_pipeline(None, settings, path)

    assert summary["status"] == "failed"
    assert "3 of 4 rows were refused" in summary["error"]
    assert str(path) in summary["error"]
    lineage = dict(stores.sql("SELECT stage, status FROM pipeline_runs"))
    assert (lineage["ingest"], lineage["ingest_events"], lineage["embed"]) == ("success", "failed", "not_run")


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "no such file"), (b"", "is empty"), (b"user_id,user_id\na,b\n", "every column once"), (b"[{", "cut off")],
)
def test_a_file_that_cannot_be_taken_is_named(
    settings: Settings, stores: Stores, tmp_path: Path, content: bytes | None, problem: str
) -> None:
    path = tmp_path / ("events.json" if content == b"[{" else "events.csv")
    if content is not None:
        path.write_bytes(content)

    summary = run_pipeline(messages(tmp_path), settings, path)

    assert summary["status"] == "failed"
    assert str(path) in summary["error"]
    assert problem in summary["error"]


def test_an_event_may_be_corrected_but_does_not_change_hands(
    settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    run_pipeline(None, settings, write_rows(tmp_path / "a.ndjson", [event(1)]))

    summary = run_pipeline(
        None,
        settings,
        write_rows(
            tmp_path / "b.ndjson",
            [event(1, campaign_id="cinema"), event(2), event(2, "dismiss"), event(3, user_id="bob"), event(4)],
        ),
    )
    stolen = run_pipeline(
        None, settings, write_rows(tmp_path / "c.ndjson", [event(1, user_id="eve"), event(5), event(6)])
    )

    details = stage(summary, "ingest_events")["details"]
    assert (details["changed"], details["new"]) == (1, 3)
    assert stage(stolen, "ingest_events")["rejected"] == 1
    reasons = [one["reason"] for one in stores.mongo.quarantine.find().sort("row", -1)]
    assert reasons == [
        "event_id: e2 stands in row 2 with other content",
        "event_id: e1 already belongs to another user",
    ]
    assert stores.sql("SELECT user_id, campaign_id FROM events WHERE event_id = 'e1'") == [("ann", "cinema")]
    assert edges(stores) == {("ann", "cinema", 1), ("ann", "city_breaks", 4), ("bob", "city_breaks", 1)}


def test_events_of_the_api_are_picked_up_once(settings: Settings, stores: Stores) -> None:
    run_pipeline(None, settings)
    receive(stores, event(1), event(2, "dismiss", user_id="bob"))

    summary = run_pipeline(None, settings)
    before = stores.snapshot()
    again = run_pipeline(None, settings)

    taken = stage(summary, "ingest_events")
    assert (taken["rows_in"], taken["rows_out"], taken["details"]["waiting"]) == (2, 2, 2)
    assert stage(summary, "detect_intents")["details"]["users"] == 2
    assert edges(stores) == {("ann", "city_breaks", 1)}
    assert stores.mongo.events.distinct("run_id") == [summary["run_id"]]
    assert stage(again, "ingest_events").get("rows_in") is None
    assert stores.snapshot() == before


def test_a_file_and_the_api_may_bring_the_same_event(settings: Settings, stores: Stores, tmp_path: Path) -> None:
    receive(stores, event(1), event(2))

    summary = run_pipeline(None, settings, write_rows(tmp_path / "a.ndjson", [event(2), event(3)]))

    taken = stage(summary, "ingest_events")
    assert (taken["rows_in"], taken["rows_out"]) == (3, 3)
    assert (taken["details"]["resumed"], taken["details"]["waiting"]) == (1, 1)
    assert edges(stores) == {("ann", "city_breaks", 3)}


def test_events_of_a_run_that_was_never_published_are_taken_by_the_next(
    settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    receive(stores, event(1))
    [port] = free_ports(1)
    down = settings.model_copy(update={"redis_url": SecretStr(f"redis://127.0.0.1:{port}/0")})
    broken = run_pipeline(None, down, write_rows(tmp_path / "a.ndjson", [event(2)]))
    assert broken["status"] == "failed"

    healed = run_pipeline(None, settings)

    assert healed["status"] == "success", healed
    assert stage(healed, "ingest_events")["details"]["waiting"] == 2
    assert stage(healed, "detect_intents")["details"]["users"] == 1
    assert stores.mongo.events.distinct("run_id") == [healed["run_id"]]
    assert stage(run_pipeline(None, settings), "publish")["details"]["nothing_new"] is True


def test_a_task_that_breaks_off_between_two_batches_is_healed(
    settings: Settings, stores: Stores, mongo: MongoStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive(stores, *(event(number, user_id=f"u{number}") for number in range(1100)))
    path = write_csv(tmp_path / "events.csv", [event(number, user_id="bob") for number in range(5000, 5100)])
    set_events = AnalyticsStore.set_events
    batches: list[int] = []

    def only_one(self: AnalyticsStore, rows: Any) -> None:
        if batches:
            raise StoreError("analytics", "the disk is full")
        batches.append(len(rows))
        set_events(self, rows)

    monkeypatch.setattr(AnalyticsStore, "set_events", only_one)
    with pytest.raises(StoreError):
        take(settings, mongo, "run", [path])
    monkeypatch.undo()
    assert stores.sql("SELECT count(*) FROM events") == [(1000,)]

    retried = take(settings, mongo, "run", [path], attempt=2)
    twice = take(settings, mongo, "run", [path], attempt=3)
    later = take(settings, mongo, "later", [])

    for report, waiting in ((retried, 1100), (twice, 1100), (later, 1200)):
        assert (report.rows_in, report.rows_out, report.details["waiting"]) == (1200, 1200, waiting)
    assert stores.sql("SELECT count(*), count(DISTINCT user_id), min(run_id) FROM events") == [(1200, 1101, "later")]
    assert stores.mongo.events.distinct("run_id") == ["later"]
    mongo.publish_run("later", settings.embedding_model, 0)
    assert take(settings, mongo, "after", [path]).rows_out == 0


def test_a_run_that_is_killed_leaves_nothing_that_the_next_does_not_mend(
    settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    path = write_csv(tmp_path / "events.csv", [event(number, user_id=f"u{number % 40}") for number in range(320)])
    kill_after("ingest_events success", settings, "--events", str(path))
    assert stores.redis.get("personalization:generation") is None

    summary = run_pipeline(None, settings, path)

    assert summary["status"] == "success", summary
    assert stage(summary, "ingest_events")["details"]["resumed"] == 320
    assert edges(stores) == {(f"u{number}", "city_breaks", 8) for number in range(40)}
    assert stores.sql("SELECT sum(clicks), count(*) FROM user_engagement") == [(320, 40)]


def test_files_of_the_inbox_are_taken_once_and_a_bad_one_does_not_hold_up_the_others(
    settings: Settings, stores: Stores, mongo: MongoStore, tmp_path: Path
) -> None:
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    write_csv(inbox / "events-monday.csv", [event(1), event(2)])
    (inbox / "events-tuesday.json").write_text(json.dumps([event(3), event(4)])[:-20])
    messages(inbox)

    def waiting() -> list[Path]:
        found = select_files("event", "", by_hand=False, inbox_uri=str(inbox), mongo=mongo)
        return [Path(str(path)) for path in found]

    assert [path.name for path in waiting()] == ["events-monday.csv", "events-tuesday.json"]
    report = take(settings, mongo, "run", waiting())
    assert (report.rows_out, report.rejected) == (3, 1)
    assert stores.mongo.quarantine.find_one({"row": 0, "kind": "event"}) is not None
    assert len(waiting()) == 2  # until the run is published
    mongo.publish_run("run", settings.embedding_model, 0)
    assert waiting() == []
    of_messages = select_files("message", "", by_hand=False, inbox_uri=str(inbox), mongo=mongo)
    assert [path.name for path in of_messages] == ["messages.ndjson"]


def test_a_campaign_that_comes_back_finds_what_users_did_with_it(
    settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    run_pipeline(None, settings, write_rows(tmp_path / "a.ndjson", [event(1), event(2, campaign_id="cinema")]))
    (Path(settings.catalog_path) / "all.yaml").write_text(CATALOG.rsplit("\n", 2)[0])
    run_pipeline(None, settings)
    assert edges(stores) == {("ann", "city_breaks", 1)}

    (Path(settings.catalog_path) / "all.yaml").write_text(CATALOG)
    run_pipeline(None, settings)

    assert edges(stores) == {("ann", "city_breaks", 1), ("ann", "cinema", 1)}
