"""Erasing a person, against the real stores: gone from everywhere, and not brought back by anything."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import structlog
from conftest import SAMPLE, SAMPLE_EVENTS, Stores, empty_settings, free_ports, stage, write_rows
from personalization.__main__ import app
from personalization.erasure.erase import STORES, erase
from personalization.erasure.places import Places
from personalization.erasure.sweep import SETTLES_AFTER, sweep
from personalization.errors import ErasureError, InputError, StoreError
from personalization.local.stack import Stack
from personalization.pipeline import run
from personalization.pipeline.lineage import reported
from personalization.pipeline.run import run_pipeline
from personalization.schemas import ErasureReceipt, Event, VectorSpace, erasure_id
from personalization.settings import Settings
from personalization.staging import Staging
from personalization.stores.cache import CachePublisher
from personalization.stores.milvus import MESSAGES, VectorStore
from personalization.stores.mongo import MongoStore, Origin, event_document
from pydantic import SecretStr
from typer.testing import CliRunner

SECRET = "I want to fly to Lisbon with my daughter Eulalia"
USERS = ("ann", "bob", "anna")
CATALOG = """
intents:
  - {id: travel, name: Travel, examples: [I want to fly to Rome, Book me a flight, I need a hotel in Paris]}
  - {id: films, name: Films, examples: [Which film is good?, What shall I watch tonight?, Is there a new series?]}
campaigns:
  - {id: cinema_two_for_one, name: Two for one, intents: [films]}
  - {id: savings_booster, name: Savings booster, intents: [travel]}
"""


@pytest.fixture
def settings(store_stack: Stack, tmp_path: Path) -> Settings:
    """As everywhere, but for a catalog that is embedded in no time."""
    catalog = tmp_path / "catalog.yaml"
    catalog.write_text(CATALOG)
    return empty_settings(store_stack, tmp_path).model_copy(update={"catalog_path": catalog})


@pytest.fixture
def places(settings: Settings) -> Iterator[Places]:
    with Places.of(settings) as places:
        yield places


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A few messages and events of each of three users."""
    messages = [
        {"user_id": user, "message": text, "timestamp": f"2026-10-0{day}T09:00:00Z", "message_id": f"{user}-{day}"}
        for user in USERS
        for day, text in enumerate((SECRET, "Which film should I watch?", "How do I save for a house?"), start=1)
    ]
    events = [
        {"user_id": user, "campaign_id": campaign, "event": "click", "timestamp": "2026-10-04T09:00:00Z"}
        for user in USERS
        for campaign in ("cinema_two_for_one", "savings_booster")
    ]
    return write_rows(tmp_path / "messages.ndjson", messages), write_rows(tmp_path / "events.ndjson", events)


def take(files: tuple[Path, Path], settings: Settings) -> Any:
    summary = run_pipeline(files[0], settings, files[1])
    assert summary["status"] == "success", summary
    return summary


def left(user_id: str, stores: Stores) -> Counter[str]:
    """What a person with a shell on each store finds of a user."""
    found: Counter[str] = Counter()
    for name in ("conversations", "events"):
        found[name] = stores.mongo[name].count_documents({"user_id": user_id})
    found["quarantine"] = sum(f'"{user_id}"' in one["raw"] for one in stores.mongo.quarantine.find())
    for name in stores.milvus.list_collections():
        field = "id" if name.startswith("users_") else "user_id"
        rows = stores.milvus.query(name, filter=f'{field} == "{user_id}"', output_fields=["id"], limit=1000)
        found[name.partition("_")[0]] += len(rows)
    found["nodes"] = stores.cypher(f"MATCH (u:User {{user_id: '{user_id}'}}) RETURN count(u)")
    found["edges"] = stores.cypher(f"MATCH (u:User {{user_id: '{user_id}'}})-[r]->() RETURN count(r)")
    for table in ("message_intents", "events", "user_engagement"):
        found[f"sql {table}"] = stores.sql(f"SELECT count(*) FROM {table} WHERE user_id = '{user_id}'")[0][0]
    found["answers"] = len(stores.redis.keys(f"answer:{{{user_id}}}:*"))
    found["known vectors"] = len(stores.redis.keys(f"vectors-of:{{{user_id}}}"))
    for path in Path(stores.settings.staging_uri).rglob("*.parquet"):
        columns = pq.read_table(path).to_pydict()
        found["staged"] += columns.get("user_id", []).count(user_id)
    return +found


def removed(receipt: ErasureReceipt) -> dict[str, dict[str, int]]:
    return {one.store: one.removed for one in receipt.stores}


def pending(receipt: ErasureReceipt) -> list[str]:
    return [one.store for one in receipt.stores if one.status == "pending"]


# --- everywhere


def test_a_person_of_the_sample_is_gone_from_everywhere_and_others_are_untouched(
    settings: Settings, stores: Stores, places: Places
) -> None:
    assert run_pipeline(SAMPLE, settings, SAMPLE_EVENTS)["status"] == "success"
    for variant in ("5", "10|explain"):
        stores.redis.set(f"answer:{{maria}}:{variant}", "an answer")
        stores.redis.set(f"answer:{{mariana}}:{variant}", "an answer")
    before, had = stores.snapshot(), left("maria", stores)
    others = {user: left(user, stores) for user in ("filmfan82", "u-1098")}

    receipt = erase("maria", places)

    said = [one for one in json.loads(SAMPLE.read_text()) if one["user_id"] == "maria"]
    did = [one for one in csv.DictReader(SAMPLE_EVENTS.read_text().splitlines()) if one["user_id"] == "maria"]
    assert receipt.status == "erased"
    assert [one.store for one in receipt.stores] == list(STORES)
    assert {one.remaining for one in receipt.stores} == {0}
    assert had["conversations"] == len(said) > 0
    assert removed(receipt)["mongodb"] == {"conversations": len(said), "events": len(did), "quarantine": 0}
    assert {name.partition("_")[0]: rows for name, rows in removed(receipt)["milvus"].items()} == {
        name: had[name] for name in ("messages", "users", "interests")
    }
    assert removed(receipt)["neo4j"] == {"nodes": 1, "edges": had["edges"]}
    analytics = removed(receipt)["analytics"]
    assert analytics.pop("user_weeks") > 0
    assert analytics == {name: had[f"sql {name}"] for name in ("message_intents", "events", "user_engagement")} | {
        "audit_samples": 0,
        "anomalies": 0,
    }
    assert removed(receipt)["redis"] == {"answers": 2, "vectors": len({one["message"] for one in said})}
    assert removed(receipt)["staging"] == {"rows": had["staged"]}
    assert left("maria", stores) == {}
    assert {user: left(user, stores) for user in others} == others
    assert len(stores.redis.keys("answer:{mariana}:*")) == 2
    after = stores.snapshot()
    for table in ("intents", "all_events"):
        place = {"intents": 2, "all_events": 1}[table]
        assert after[table] == [row for row in before[table] if row[place] != "maria"]
    assert after["engagement"] == [row for row in before["engagement"] if row[0] != "maria"]


def test_repeating_it_is_safe_and_tells_the_same(
    files: tuple[Path, Path], settings: Settings, stores: Stores, places: Places
) -> None:
    take(files, settings)
    first = erase("ann", places)
    before = stores.snapshot()

    assert erase("ann", places) == first
    assert stores.snapshot() == before


def test_somebody_who_was_never_there_and_stores_that_were_never_used_are_erased_at_once(places: Places) -> None:
    receipt = erase("nobody", places)

    assert receipt.status == "erased"
    assert sum(count for one in receipt.stores for count in one.removed.values()) == 0


@pytest.mark.parametrize("user_id", ["", "a b", 'x" or "1', "x" * 129, "*"])
def test_what_can_be_no_user_is_refused(user_id: str, places: Places, stores: Stores) -> None:
    with pytest.raises(InputError, match="no user id"):
        erase(user_id, places)
    assert stores.mongo.erasures.count_documents({}) == 0


def test_vectors_of_another_model_are_erased_too(files: tuple[Path, Path], settings: Settings, places: Places) -> None:
    take(files, settings)
    former = VectorSpace("former model", 8).collection(MESSAGES)
    vectors = VectorStore.from_settings(settings)
    vectors._create_collection(former, VectorSpace("former model", 8), "timestamp", with_user=True)
    vectors._create_index(former)
    vectors.upsert(
        former,
        [{"id": f"{user}-1", "user_id": user, "timestamp": 1, "embedding": [1.0] * 8} for user in ("ann", "bob")],
    )

    assert removed(erase("ann", places))["milvus"][former] == 1
    assert vectors.count(former) == 1
    vectors.client.close()


def test_refused_rows_of_the_person_are_gone_and_those_of_others_stay(
    settings: Settings, stores: Stores, places: Places, tmp_path: Path
) -> None:
    bad: list[Any] = [
        row
        for user in ("zoë", "bob")
        for row in (
            {"user_id": user, "message": SECRET, "timestamp": "yesterday"},
            f'{{"user_id": "{user}", "message": "{SECRET}',
            f'{{"user_id": {json.dumps(user)}, "message": "{SECRET}',
        )
    ]
    good = [{"user_id": "bob", "message": f"{SECRET} {day}", "timestamp": "2026-10-01T09:00:00Z"} for day in range(20)]
    events = tmp_path / "events.csv"
    lines = [f"{user},cinema_two_for_one,click,2026-10-04T09:00:00Z" for user in ("bob", "carl", "dora")]
    events.write_text("\n".join(["user_id,campaign_id,event,timestamp", *lines, "zoë,cinema_two_for_one", ""]))
    messages = write_rows(tmp_path / "messages.ndjson", [*good, *bad])
    take((messages, events), settings)
    assert stores.mongo.quarantine.count_documents({}) == 7
    stores.mongo.quarantine.update_many({}, {"$unset": {"user_id": ""}})  # as former versions kept them

    assert removed(erase("zoë", places))["mongodb"]["quarantine"] == 4
    assert stores.mongo.quarantine.count_documents({}) == 3

    again = take((messages, events), settings)

    assert stage(again, "ingest")["details"]["erased"] == 3
    assert stage(again, "ingest_events")["details"]["erased"] == 1
    assert stores.mongo.quarantine.count_documents({}) == 3


# --- nothing brings them back


def test_no_later_file_brings_them_back(
    files: tuple[Path, Path], settings: Settings, stores: Stores, places: Places, tmp_path: Path
) -> None:
    take(files, settings)
    erase("ann", places)
    bobs = left("bob", stores)

    again = take(files, settings)

    assert stage(again, "ingest")["skipped"] == 9
    assert stage(again, "ingest")["details"]["erased"] == 3
    assert stage(again, "ingest_events")["details"]["erased"] == 2
    assert left("ann", stores) == {}
    more = write_rows(
        tmp_path / "more.ndjson",
        [{"user_id": user, "message": "Something else", "timestamp": "2026-10-05T09:00:00Z"} for user in USERS],
    )
    backfill = write_rows(
        tmp_path / "events2.ndjson",
        [
            {"user_id": user, "campaign_id": "savings_booster", "event": "dismiss", "timestamp": "2026-10-05T09:00:00Z"}
            for user in USERS
        ],
    )
    take((more, backfill), settings)
    assert left("ann", stores) == {}
    assert left("bob", stores)["conversations"] == bobs["conversations"] + 1
    assert left("anna", stores)["events"] == 3


def test_an_event_that_waited_for_a_run_is_not_taken(settings: Settings, stores: Stores, places: Places) -> None:
    event = Event(user_id="ann", campaign_id="savings_booster", event="click", timestamp="2026-10-01T09:00:00Z")
    erase("ann", places)
    # As by a request that had asked before who is erased.
    places.mongo.upsert("event", [event_document(event, Origin(run_id=None, attempt=0, source={"uri": "api"}))])

    assert run_pipeline(None, settings)["status"] == "success"

    assert stores.sql("SELECT count(*) FROM events") == [(0,)]
    assert removed(erase("ann", places))["mongodb"]["events"] == 1
    assert left("ann", stores) == {}


STAGES = ("ingest_events", "embed", "upsert_vectors", "detect_intents", "build_graph", "refresh_profiles", "publish")


@pytest.mark.parametrize("name", STAGES)
def test_a_run_in_flight_goes_on_without_them(
    name: str,
    files: tuple[Path, Path],
    settings: Settings,
    stores: Stores,
    places: Places,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before(name, lambda: erase("ann", places), monkeypatch)

    take(files, settings)

    assert left("ann", stores) == {}
    others = [left(user, stores) for user in ("bob", "anna")]
    assert others[0] == others[1]
    assert others[0]["messages"] == others[0]["conversations"] == 3
    assert others[0]["sql events"] == 2


def before(name: str, work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do some work once, right before the stage."""
    plain = getattr(run, name)
    done: list[Any] = []

    def stage_after_work(*args: Any, **options: Any) -> Any:
        if not done:
            done.append(work())
        return plain(*args, **options)

    monkeypatch.setattr(run, name, stage_after_work)


def test_what_was_written_by_those_who_had_asked_before_is_swept_away(
    files: tuple[Path, Path],
    settings: Settings,
    stores: Stores,
    places: Places,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    erase("ann", places)
    with monkeypatch.context() as patch:
        patch.setattr(MongoStore, "erased_among", lambda *_: set())  # as it was a moment ago, for a whole run
        take(files, settings)
    assert left("ann", stores) == left("bob", stores) != {}

    [receipt] = sweep(places)

    assert receipt.status == "erased"
    assert removed(receipt)["mongodb"] == {"conversations": 3, "events": 2, "quarantine": 0}
    assert left("ann", stores) == {}


# --- until it is settled


def requested(age: timedelta, stores: Stores) -> datetime:
    """Have all erasures been asked for so long ago."""
    moment = datetime.now(UTC) - age
    stores.mongo.erasures.update_many({}, {"$set": {"requested_at": moment}})
    return moment


def test_a_name_is_kept_for_an_hour_and_then_forgotten_but_for_its_digest(
    files: tuple[Path, Path], settings: Settings, stores: Stores, places: Places
) -> None:
    take(files, settings)
    erase("ann", places)
    assert [one.settled_at for one in sweep(places)] == [None]
    assert "ann" in str(stores.mongo.erasures.find_one())

    requested(SETTLES_AFTER + timedelta(minutes=1), stores)
    [receipt] = sweep(places)

    assert receipt.settled_at is not None
    kept = stores.mongo.erasures.find_one()
    assert kept is not None
    assert kept["_id"] == erasure_id("ann")
    assert kept["status"] == "erased"
    assert "'ann'" not in str(kept)
    assert sweep(places) == []
    take(files, settings)
    assert left("ann", stores) == {}
    assert erase("ann", places).status == "erased"


def test_a_name_is_kept_while_a_task_is_at_work_that_began_before(
    settings: Settings, stores: Stores, places: Places
) -> None:
    staging = Staging(settings.staging_uri, "a run")
    with reported(staging, "a run", "embed"):
        erase("ann", places)
        asked = requested(SETTLES_AFTER * 2, stores)
        report = staging.root / "reports" / "embed-000000.json"
        began = json.loads(report.read_text()) | {"started_at": (asked - timedelta(minutes=1)).isoformat()}
        report.write_text(json.dumps(began))

        assert [one.settled_at for one in sweep(places)] == [None]

    assert all(one.settled_at for one in sweep(places))


def test_campaigns_count_who_is_gone_no_more_after_the_sweep(
    files: tuple[Path, Path], settings: Settings, stores: Stores, places: Places
) -> None:
    take(files, settings)
    clicks = "SELECT clicks FROM campaigns WHERE campaign_id = 'savings_booster'"
    assert stores.sql(clicks) == [(3,)]
    erase("ann", places)

    sweep(places)

    assert stores.sql(clicks) == [(2,)]


# --- a store that is down


def down(store: str, settings: Settings, tmp_path: Path) -> Settings:
    [port] = free_ports(1)
    change: dict[str, Any] = {
        "mongodb": {"mongodb_uri": SecretStr(f"mongodb://127.0.0.1:{port}/?directConnection=true")},
        "milvus": {"milvus_port": port},
        "neo4j": {"neo4j_uri": f"bolt://127.0.0.1:{port}"},
        "analytics": {"sqlite_path": Path("/proc/nowhere/analytics.db")},
        "redis": {"redis_url": SecretStr(f"redis://127.0.0.1:{port}/0")},
        "staging": {},
    }[store]
    if store == "staging":
        broken = Path(settings.staging_uri) / "broken" / "a.parquet"
        broken.parent.mkdir()
        broken.write_bytes(b"no parquet")
    return settings.model_copy(update={**change, "store_timeout_s": 1})


@pytest.mark.parametrize("store", [one for one in STORES if one != "mongodb"])
def test_with_a_store_down_the_others_are_done_and_the_sweep_does_the_rest(
    store: str, files: tuple[Path, Path], settings: Settings, stores: Stores, places: Places, tmp_path: Path
) -> None:
    take(files, settings)
    stores.redis.set("answer:{ann}:5", "an answer")

    with structlog.testing.capture_logs() as logs, Places.of(down(store, settings, tmp_path)) as without:
        receipt = erase("ann", without)
        with pytest.raises(ErasureError, match=f"erased from {store};"):
            sweep(without)

    assert receipt.status == "queued"
    assert pending(receipt) == [store]
    [unknown] = [one for one in receipt.stores if one.store == store]
    assert unknown.remaining is None
    assert unknown.problem == "It could not be asked. It is queued."
    told = receipt.model_dump_json(exclude={"user_id"}) + json.dumps(logs, default=str)
    assert "Eulalia" not in told
    assert "'ann'" not in told
    assert '"ann"' not in told

    (Path(settings.staging_uri) / "broken" / "a.parquet").unlink(missing_ok=True)
    [done] = sweep(places)

    assert done.status == "erased"
    assert left("ann", stores) == {}


def test_without_mongodb_nothing_is_done_or_promised(
    files: tuple[Path, Path], settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    take(files, settings)
    before = left("ann", stores)

    with Places.of(down("mongodb", settings, tmp_path)) as places, pytest.raises(StoreError, match="mongodb"):
        erase("ann", places)

    assert left("ann", stores) == before


def test_answers_that_are_being_computed_of_what_is_gone_count_as_old(
    settings: Settings, stores: Stores, places: Places
) -> None:
    tokens = []
    for _ in range(2):
        erase("ann", places)
        tokens.append(stores.redis.get("touched:{ann}"))

    assert None not in tokens
    assert tokens[0] != tokens[1]
    assert settings.cache_ttl_s < stores.redis.ttl("touched:{ann}")


# --- the command


def test_the_command_prints_the_receipt_and_its_exit_status_says_whether_it_is_done(
    files: tuple[Path, Path], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(files, settings)
    for place, status in ((down("neo4j", settings, tmp_path), 1), (settings, 0)):
        monkeypatch.setattr("personalization.settings.get_settings", lambda place=place: place)

        done = CliRunner().invoke(app, ["erase", "ann"])

        assert done.exit_code == status
        receipt = ErasureReceipt.model_validate_json(done.stdout)
        assert pending(receipt) == (["neo4j"] if status else [])
        assert removed(receipt)["mongodb"]["conversations"] == 3


def test_a_cached_answer_is_found_whatever_the_variant(settings: Settings, stores: Stores) -> None:
    variants = [f"answer:{{ann}}:{number}" for number in range(1500)]
    stores.redis.mset(dict.fromkeys(variants, b"1") | {"answer:{anna}:1": b"1"})
    cache = CachePublisher.from_settings(settings)

    assert cache.erase_user("ann") == {"answers": 1500, "vectors": 0}
    assert cache.count_user("ann") == 0
    assert cache.count_user("anna") == 1
    cache.client.close()
