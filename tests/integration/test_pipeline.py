"""The pipeline against the real stores: what ends up where, and what a rerun changes."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SAMPLE, Stores, empty_stores, free_ports, kill_after, stage, write_rows
from personalization.pipeline.ingest import ingest
from personalization.pipeline.lineage import STAGES, reported
from personalization.pipeline.run import run_pipeline
from personalization.schemas import INTERESTS_PER_USER
from personalization.settings import Settings
from personalization.staging import Staging
from personalization.stores.mongo import MongoStore
from pydantic import SecretStr
from upath import UPath


def row(message: str = "I want to book a flight to Lisbon", **changes: Any) -> dict[str, Any]:
    return {"user_id": "ann", "message": message, "timestamp": "2026-10-01T09:00:00Z"} | changes


def test_the_sample_reaches_every_store(settings: Settings, stores: Stores) -> None:
    summary = run_pipeline(SAMPLE, settings)

    rows = json.loads(SAMPLE.read_text())
    users = {one["user_id"] for one in rows}
    classified = stores.sql("SELECT count(*) FROM message_intents WHERE intent_id <> 'other'")[0][0]
    assert summary["status"] == "success", summary
    assert stores.mongo.conversations.count_documents({}) == len(rows) == stores.vectors("messages")
    assert stores.vectors("users") == len(users)
    assert stores.cypher("MATCH (u:User) RETURN count(u)") == len(users)
    assert stores.cypher("MATCH ()-[e:EXPRESSED]->() RETURN sum(e.count)") == classified > len(rows) / 2
    lineage = dict(stores.sql("SELECT stage, status FROM pipeline_runs"))
    assert set(lineage.values()) == {"success"}
    assert set(lineage) == set(STAGES)
    assert stage(summary, "learn")["details"]["messages"] == len(rows)
    assert stores.sql("SELECT count(*) FROM served") == [(1,)]
    assert len(users) <= stores.vectors("interests") <= len(users) * INTERESTS_PER_USER


def test_the_same_file_again_changes_nothing_and_says_so(settings: Settings, stores: Stores) -> None:
    run_pipeline(SAMPLE, settings)
    before = stores.snapshot()

    again = run_pipeline(SAMPLE, settings)

    assert stores.snapshot() == before
    assert stage(again, "ingest")["skipped"] == before["messages"]
    assert stage(again, "embed")["status"] == "skipped"
    assert stage(again, "learn")["details"] == {"nothing_new": True}
    assert stage(again, "publish")["details"]["nothing_new"] is True


def test_a_file_taken_before_is_known_by_its_digest_as_long_as_nothing_became_of_it(
    settings: Settings, stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(f"Which film should I watch, number {number}?", message_id=f"m{number}") for number in range(20)]
    old = write_rows(tmp_path / "old.ndjson", [*rows, row(message=" "), "{"])
    new = write_rows(tmp_path / "new.ndjson", [row("I want to book a hotel in Rome", message_id="m7")])
    looked_up: list[int] = []
    stored = MongoStore.stored
    monkeypatch.setattr(MongoStore, "stored", lambda s, kind, ids: looked_up.append(len(ids)) or stored(s, kind, ids))

    def taken(path: Path) -> dict[str, Any]:
        looked_up.clear()
        summary = run_pipeline(path, settings)
        assert summary["status"] == "success", summary
        assert stores.mongo.quarantine.count_documents({"run_id": summary["run_id"]}) == (2 if path == old else 0)
        found = stage(summary, "ingest")
        assert found["rows_in"] == (22 if path == old else 1)
        return {name: found["details"][name] for name in ("new", "changed", "unchanged")}

    def text() -> str:
        return str(stores.mongo.conversations.find_one({"_id": "m7"})["message"])  # type: ignore[index]

    assert taken(old) == {"new": 20, "changed": 0, "unchanged": 0}
    assert taken(old) == {"new": 0, "changed": 0, "unchanged": 20}
    assert sum(looked_up) == 0  # the two that were refused have no id
    # An edit since: the old file is the newest word again.
    taken(new)
    assert taken(old) == {"new": 0, "changed": 1, "unchanged": 19}
    assert text() == rows[7]["message"]
    assert sum(looked_up) == 20
    assert taken(old)["unchanged"] == 20
    assert sum(looked_up) == 0
    # Lost since: it comes back.
    stores.mongo.conversations.delete_one({"_id": "m7"})
    assert taken(old) == {"new": 1, "changed": 0, "unchanged": 19}
    assert text() == rows[7]["message"]


def test_broken_rows_are_quarantined_with_reason_and_place_and_the_rest_goes_on(
    settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    broken = {
        "user_id": row(user_id=""),
        "message: is blank": row(message="   "),
        "NUL": row(message="a\0b"),
        "lone surrogate": '{"user_id": "ann", "message": "a\\ud800b", "timestamp": "2026-10-01T09:00:00Z"}',
        "timestamp: is not": row(timestamp="yesterday"),
        "timestamp: Field required": {"user_id": "ann", "message": "hello"},
        "ISO 8601 string": row(timestamp=1790000000),
        "is not an object": [1, 2],
        "not valid JSON": '{"user_id": ',
        "characters long": row(message="x" * (settings.max_message_chars + 1)),
    }
    good = [row(f"Which film should I watch, number {number}?", message_id=f"m{number}") for number in range(30)]
    path = write_rows(tmp_path / "mixed.ndjson", [*good[:7], *broken.values(), *good[7:]])

    summary = run_pipeline(path, settings)

    assert summary["status"] == "success", summary
    assert stage(summary, "ingest")["rejected"] == len(broken)
    assert stores.mongo.conversations.count_documents({}) == len(good)
    quarantined = list(stores.mongo.quarantine.find().sort("row", 1))
    assert [one["row"] for one in quarantined] == list(range(8, 8 + len(broken)))
    for reason, document in zip(broken, quarantined, strict=True):
        assert reason in document["reason"]
        assert document["file"] == str(path)
        assert document["raw"]
    run_pipeline(path, settings)
    assert stores.mongo.quarantine.count_documents({}) == len(broken)


def test_a_ten_megabyte_message_is_quarantined_whole(settings: Settings, stores: Stores, tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    path.write_text(json.dumps([row(), row("x" * 10_000_000), row("Where is my new card?")]))

    summary = run_pipeline(path, settings)

    assert summary["status"] == "success", summary
    refused = stores.mongo.quarantine.find_one()
    assert refused is not None
    assert refused["row"] == 2
    assert len(refused["raw"]) > 10_000_000
    assert stores.mongo.conversations.count_documents({}) == 2


def test_an_id_used_twice_with_other_text_keeps_the_first(settings: Settings, stores: Stores, tmp_path: Path) -> None:
    rows = [
        row("first", message_id="m1"),
        row("second", message_id="m1"),
        row("third"),
        row("first", message_id="m1"),
    ]
    path = write_rows(tmp_path / "twice.ndjson", rows)

    for _ in range(2):
        summary = run_pipeline(path, settings)

        assert stage(summary, "ingest")["rejected"] == 1
        assert "stands in row 1" in stores.mongo.quarantine.find_one({"row": 2})["reason"]
        assert stores.mongo.conversations.find_one({"_id": "m1"})["message"] == "first"
        assert stores.mongo.conversations.count_documents({}) == 2


def test_an_edited_message_moves_its_counts(settings: Settings, stores: Stores, tmp_path: Path) -> None:
    flight = row("I want to book a flight to Lisbon", message_id="m1")
    run_pipeline(write_rows(tmp_path / "monday.ndjson", [flight]), settings)
    film = row("Can you recommend a good horror film?", message_id="m1")

    run_pipeline(write_rows(tmp_path / "tuesday.ndjson", [film]), settings)

    intents = stores.cypher("MATCH (:User)-[:EXPRESSED]->(i:Intent) RETURN collect(i.intent_id)")
    assert intents == ["film_suggestion"]
    assert stores.vectors("messages") == 1
    assert stores.sql("SELECT count(*) FROM user_engagement WHERE campaign_id = 'weekend_city_breaks'") == [(0,)]


def test_a_message_cannot_change_hands(settings: Settings, stores: Stores, tmp_path: Path) -> None:
    run_pipeline(write_rows(tmp_path / "a.ndjson", [row(message_id="m1")]), settings)

    stolen = [row(message_id="m1", user_id="eve"), row("Thanks", user_id="eve")]
    run_pipeline(write_rows(tmp_path / "b.ndjson", stolen), settings)

    assert stores.mongo.conversations.find_one({"_id": "m1"})["user_id"] == "ann"
    assert "another user" in stores.mongo.quarantine.find_one()["reason"]


def test_too_many_broken_rows_fail_the_run_after_quarantining(
    settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "bad.ndjson", [row(), *[row(message="")] * 3])

    summary = run_pipeline(path, settings)

    assert summary["status"] == "failed"
    assert "3 of 4 rows were refused" in summary["error"]
    assert stores.mongo.quarantine.count_documents({}) == 3
    lineage = dict(stores.sql("SELECT stage, status FROM pipeline_runs"))
    assert lineage["ingest"] == "failed"
    assert lineage["embed"] == "not_run"


def test_a_run_that_broke_off_is_healed_by_the_next(settings: Settings, stores: Stores, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "some.ndjson", [row(f"Is flight {number} on time?") for number in range(20)])
    unusable = settings.model_copy(update={"embedding_model": "package:no_such_package"})
    broken = run_pipeline(path, unusable)
    assert broken["status"] == "failed"
    assert "no_such_package" in broken["error"]
    assert stores.mongo.conversations.count_documents({}) == 20

    healed = run_pipeline(path, settings)

    assert healed["status"] == "success", healed
    assert stage(healed, "ingest")["details"]["resumed"] == 20
    assert stores.vectors("messages") == 20


def test_a_run_goes_on_with_the_model_that_is_served_whatever_the_settings_say(
    settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "some.ndjson", [row()])
    run_pipeline(path, settings)
    more = write_rows(tmp_path / "more.ndjson", [row("Where is my parcel?")])

    summary = run_pipeline(more, settings.model_copy(update={"embedding_model": "other/model"}))

    assert summary["status"] == "success", summary
    assert stage(summary, "embed")["details"]["model"] == settings.embedding_model
    assert stores.vectors("messages") == 2
    assert len(stores.milvus.list_collections()) == 3


def test_an_edited_catalog_is_applied_to_stored_messages(settings: Settings, stores: Stores, tmp_path: Path) -> None:
    run_pipeline(SAMPLE, settings)
    generation = stores.redis.get("personalization:generation")
    catalog = tmp_path / "catalog"
    catalog.mkdir()
    (catalog / "all.yaml").write_text(
        "intents: [{id: cinema, name: Cinema, examples: ['What is on at the cinema?', 'I love horror films']}]\n"
        "campaigns: [{id: big_screen, name: Big screen, intents: [cinema]}]\n"
    )

    summary = run_pipeline(SAMPLE, settings.model_copy(update={"catalog_path": catalog}))

    assert summary["status"] == "success", summary
    assert stage(summary, "embed")["status"] == "skipped"
    assert stores.cypher("MATCH (i:Intent) RETURN collect(i.intent_id)") == ["cinema"]
    expressed = stores.cypher("MATCH ()-[e:EXPRESSED]->() RETURN sum(e.count)")
    assert expressed == stores.sql("SELECT count(*) FROM message_intents WHERE intent_id = 'cinema'")[0][0] > 0
    assert stores.sql("SELECT DISTINCT campaign_id FROM user_engagement") == [("big_screen",)]
    assert stores.redis.get("personalization:generation") != generation


def test_gzipped_arrays_and_offsets_become_utc(settings: Settings, stores: Stores, tmp_path: Path) -> None:
    path = tmp_path / "rows.json.gz"
    with gzip.open(path, "wt") as stream:
        json.dump([row(timestamp="2026-10-01T09:00:00+02:00", message_id="m1")], stream)

    run_pipeline(path, settings)

    stored = stores.mongo.conversations.find_one({"_id": "m1"})
    assert stored is not None
    assert stored["timestamp"].isoformat() == "2026-10-01T07:00:00"


def test_real_messages_with_broken_rows_among_them(
    settings: Settings, stores: Stores, tmp_path: Path, shared_data: Path
) -> None:
    with gzip.open(shared_data / "redial" / "messages.jsonl.gz", "rt") as stream:
        lines = [line for line in stream if json.loads(line)["message"].strip()][:1980]
    broken = [json.dumps(row(timestamp=f"no date {number}")) + "\n" for number in range(20)]
    for number, line in enumerate(broken):
        lines.insert(number * 97, line)
    path = tmp_path / "real.ndjson"
    path.write_text("".join(lines))

    summary = run_pipeline(path, settings.model_copy(update={"shard_rows": 700}))

    assert summary["status"] == "success", summary
    assert stores.mongo.quarantine.count_documents({}) == 20
    assert stores.mongo.conversations.count_documents({}) == 1980 == stores.vectors("messages")
    detected = stage(summary, "detect_intents")
    expressed = stores.sql(
        "SELECT count(*), count(DISTINCT message_id) FROM message_intents WHERE intent_id <> 'other'"
    )
    assert expressed == [(stores.cypher("MATCH ()-[e:EXPRESSED]->() RETURN sum(e.count)"), detected["rows_out"])]
    assert detected["rows_out"] + detected["skipped"] == 1980
    assert stores.sql("SELECT shards FROM pipeline_runs WHERE stage = 'embed'") == [(3,)]


def ingest_as(settings: Settings, run_id: str, attempt: int, paths: list[Path]) -> Any:
    """The task `ingest` alone, as attempt `attempt` of the run, over an inbox of `paths`."""
    mongo = MongoStore.from_settings(settings)
    with reported(Staging(settings.staging_uri, run_id), run_id, "ingest", attempt=attempt) as report:
        ingest(
            report,
            files=[UPath(path) for path in paths],
            skip_bad_files=True,
            mongo=mongo,
            staging=Staging(settings.staging_uri, run_id),
            settings=settings,
        )
    mongo.client.close()
    return report


def test_files_of_one_run_that_overlap_stage_each_message_once(
    settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    first = write_rows(tmp_path / "a.ndjson", [row("one", message_id="m1"), row("two", message_id="m2")])
    second = write_rows(tmp_path / "b.ndjson", [row("two", message_id="m2"), row("other", message_id="m1"), row("3")])

    for attempt in (1, 2):
        report = ingest_as(settings, "run", attempt, [first, second])

        assert report.rows_out == 3
        assert report.details["duplicates"] == 1
        assert report.rejected == 1
        assert stores.mongo.conversations.find_one({"_id": "m1"})["message"] == "one"


def test_a_bad_file_of_the_inbox_does_not_keep_the_others_waiting(
    settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    cut_off = tmp_path / "a.json"
    cut_off.write_text(json.dumps([row("kept", message_id="m1"), row("lost")])[:-20])
    empty = tmp_path / "b.json"
    empty.touch()
    good = write_rows(tmp_path / "c.ndjson", [row(f"message {number}") for number in range(5)])

    report = ingest_as(settings, "run", 1, [cut_off, empty, good])

    assert report.rows_out == 6
    assert {file["uri"] for file in report.details["files"]} == {str(cut_off), str(empty), str(good)}
    refused = {one["file"]: one["reason"] for one in stores.mongo.quarantine.find({"row": 0})}
    assert "row 2" in refused[str(cut_off)]
    assert "is empty" in refused[str(empty)]


def test_a_published_run_that_is_cleared_and_fails_halfway_loses_nothing(
    settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "a.ndjson", [row("first", message_id="m1")])
    ingest_as(settings, "run", 1, [path])
    stores.mongo.runs.update_one({"_id": "run"}, {"$set": {"model": settings.embedding_model, "published_at": 1}})
    write_rows(path, [row("first", message_id="m1"), row("second", message_id="m2")])

    ingest_as(settings, "run", 2, [path])  # cleared, taken up again, and then killed before it is published
    report = ingest_as(settings, "run", 3, [path])

    assert report.rows_out == 2
    assert report.details["resumed"] == 2


def test_a_run_that_is_not_published_moves_neither_generation_nor_bookkeeping(
    settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "a.ndjson", [row()])
    [port] = free_ports(1)
    down = settings.model_copy(update={"redis_url": SecretStr(f"redis://127.0.0.1:{port}/0")})
    assert run_pipeline(path, down)["status"] == "failed"
    assert stores.sql("SELECT * FROM serving_state") == []

    healed = run_pipeline(path, settings)

    assert stage(healed, "ingest")["details"]["resumed"] == 1
    assert stores.redis.get("personalization:generation") == b"1"


def test_a_catalog_that_failed_halfway_leaves_no_trace_after_the_next_run(
    settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    run_pipeline(SAMPLE, settings)
    before = stores.snapshot()
    catalog = tmp_path / "catalog"
    catalog.mkdir()
    (catalog / "all.yaml").write_text(
        "intents: [{id: cinema, name: Cinema, examples: ['What is on at the cinema?']}]\n"
        "campaigns: [{id: big_screen, name: Big screen, intents: [cinema]}]\n"
    )
    broken = run_pipeline(tmp_path / "missing.json", settings.model_copy(update={"catalog_path": catalog}))
    assert broken["status"] == "failed"

    run_pipeline(SAMPLE, settings)

    after = stores.snapshot()
    assert after.pop("generation") != before.pop("generation")
    assert after == before


@pytest.mark.parametrize(
    "last_words", ["ingest success", "upsert_vectors success", "detect_intents success", "learn success"]
)
def test_a_run_that_is_killed_is_healed_by_the_next(
    last_words: str, settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    run_pipeline(SAMPLE, settings)
    expected = stores.snapshot()
    empty_stores(settings)
    Path(settings.sqlite_path).unlink()
    kill_after(last_words, settings, str(SAMPLE))

    summary = run_pipeline(SAMPLE, settings)

    assert summary["status"] == "success", summary
    healed = stores.snapshot()
    assert healed.pop("generation") == expected.pop("generation")
    assert healed == expected
