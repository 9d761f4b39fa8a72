"""From a recommendation back to the messages, source rows and runs, on the real stores."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SAMPLE, Stores, api_of, environment, write_rows
from personalization.__main__ import app
from personalization.pipeline.lineage import STAGES
from personalization.pipeline.run import run_pipeline
from personalization.quality.provenance import Trace, trace
from personalization.settings import Settings, get_settings
from personalization.stores.analytics import open_read_only
from personalization.stores.mongo import MongoStore
from pymongo.monitoring import CommandListener
from sqlalchemy import Engine, event
from typer.testing import CliRunner

SHOWN = "weekend_city_breaks"


@pytest.fixture(scope="module")
def engine(published: Settings) -> Iterator[Engine]:
    engine = open_read_only(published)
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def mongo(published: Settings) -> Iterator[MongoStore]:
    store = MongoStore.from_settings(published)
    yield store
    store.client.close()


@pytest.fixture(scope="module")
def maria(engine: Engine, mongo: MongoStore) -> Trace:
    return trace("maria", SHOWN, engine=engine, mongo=mongo)


def test_what_the_user_said_for_it_is_found_with_its_words_intents_and_source_row(maria: Trace) -> None:
    rows = json.loads(SAMPLE.read_text())

    assert maria.messages
    assert maria.messages_in_all == len(maria.messages)
    for message in maria.messages:
        assert message.source is not None
        assert message.source.uri == str(SAMPLE)
        assert message.source.row is not None
        stands = rows[message.source.row - 1]
        assert (stands["user_id"], stands["message"]) == ("maria", message.text)
        assert message.intents[0].is_targeted
        assert message.source.taken_by == message.run_id
    moments = [message.said_at for message in maria.messages]
    assert moments == sorted(moments, reverse=True)


def test_what_the_user_did_with_it_is_found_with_its_source_row(maria: Trace) -> None:
    assert {"impression", "click"} <= {one.event for one in maria.events}
    assert maria.events_in_all == len(maria.events)
    for one in maria.events:
        assert one.source is not None
        assert one.source.uri.endswith("events.csv")
        assert one.source.row is not None
        line = Path(one.source.uri).read_text().splitlines()[one.source.row - 1]  # the header's is 1
        assert f"maria,{SHOWN},{one.event}" in line


def test_the_runs_it_went_through_are_shown_stage_by_stage(maria: Trace, published: Settings) -> None:
    [run] = maria.runs

    assert {run.run_id} == {one.run_id for one in (*maria.messages, *maria.events)}
    assert (run.status, run.is_served) == ("success", True)
    assert run.started_at is not None
    assert [stage.stage for stage in run.stages] == list(STAGES)
    by_stage = {stage.stage: stage for stage in run.stages}
    assert by_stage["ingest"].rows_in == len(json.loads(SAMPLE.read_text()))
    assert by_stage["embed"].bytes_written > by_stage["embed"].rows_out * published.embedding_dim
    assert {stage.model for stage in run.stages} == {published.embedding_model}
    assert len({stage.code_version for stage in run.stages}) == 1


async def test_the_evidence_of_an_explained_answer_is_traced(
    published: Settings, engine: Engine, mongo: MongoStore
) -> None:
    async with api_of(published) as client:
        answer = (await client.get("/v1/recommendations/maria?explain=true")).json()
    first = answer["recommendations"][0]
    named = {one for reason in first["reasons"] for one in reason["data"].get("message_ids", [])}

    found = trace("maria", first["campaign_id"], engine=engine, mongo=mongo, message_ids=sorted(named))

    assert named
    assert named <= {message.message_id for message in found.messages}


def test_only_the_user_s_own_messages_are_shown(engine: Engine, mongo: MongoStore, maria: Trace) -> None:
    theirs = [message.message_id for message in maria.messages]

    found = trace("filmfan82", SHOWN, engine=engine, mongo=mongo, message_ids=theirs)

    assert not {message.message_id for message in found.messages} & set(theirs)


def test_a_stranger_s_recommendation_rests_on_others_and_names_the_run_that_is_served(
    engine: Engine, mongo: MongoStore, maria: Trace
) -> None:
    found = trace("stranger", SHOWN, engine=engine, mongo=mongo)

    assert (found.messages, found.messages_in_all, found.events, found.events_in_all) == ([], 0, [], 0)
    assert [run.run_id for run in found.runs] == [run.run_id for run in maria.runs]


def test_of_many_messages_the_newest_are_shown_and_all_are_counted(
    engine: Engine, mongo: MongoStore, maria: Trace
) -> None:
    found = trace("maria", SHOWN, engine=engine, mongo=mongo, limit=2)

    assert found.messages == maria.messages[:2]
    assert found.messages_in_all == maria.messages_in_all
    assert found.events == maria.events[:2]
    assert found.events_in_all == maria.events_in_all


class Commands(CommandListener):
    """Counts what MongoDB is asked."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def started(self, event: Any) -> None:
        self.names.append(event.command_name)

    def succeeded(self, event: Any) -> None: ...

    def failed(self, event: Any) -> None: ...


def test_the_round_trips_do_not_grow_with_the_messages(published: Settings, engine: Engine) -> None:
    from pymongo import MongoClient

    commands = Commands()
    client = MongoClient(published.mongodb_uri.get_secret_value(), event_listeners=[commands])
    store = MongoStore(client, published.mongodb_database)
    statements: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *given: statements.append(given[2]))

    asked = []
    for limit in (1, 50):
        trace("maria", SHOWN, engine=engine, mongo=store, limit=limit)
        asked.append((len(statements), commands.names.count("find")))
        statements.clear()
        commands.names.clear()
    client.close()

    assert asked == [(3, 2), (3, 2)]


@pytest.fixture
def command(published: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The command line with the settings of the published stores."""
    for name, value in environment(published).items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    yield lambda *arguments: CliRunner().invoke(app, ["trace", *arguments])
    get_settings.cache_clear()


def test_the_command_prints_messages_rows_and_runs(command: Any, maria: Trace) -> None:
    done = command("maria", SHOWN)

    assert done.exit_code == 0, done.output
    message = maria.messages[0]
    assert message.source is not None
    assert f"“{message.text}”" in done.output
    assert f"row {message.source.row} of {SAMPLE}, run {message.run_id}" in done.output
    assert f"Run {message.run_id}: success" in done.output
    assert "publish " in done.output


def test_the_command_prints_all_of_it_as_json(command: Any, maria: Trace) -> None:
    done = command("maria", SHOWN, "--json")

    found = json.loads(done.stdout)
    assert [one["message_id"] for one in found["messages"]] == [one.message_id for one in maria.messages]
    assert found["messages"][0]["said_at"] == maria.messages[0].said_at.isoformat()
    assert found["runs"][0]["stages"][0]["stage"] == "prepare"


# --- rows that come again; these empty the stores, so they come last


def test_a_message_keeps_its_source_when_it_comes_again_in_another_file(
    settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    said = {"user_id": "ann", "message": "I want to book a flight to Lisbon", "timestamp": "2026-10-01T09:00:00Z"}
    first = run_pipeline(write_rows(tmp_path / "first.ndjson", ["{", said]), settings)
    again = run_pipeline(write_rows(tmp_path / "again.ndjson", [said]), settings)
    assert (first["status"], again["status"]) == ("success", "success")

    engine = open_read_only(settings)
    store = MongoStore.from_settings(settings)
    [message] = trace("ann", SHOWN, engine=engine, mongo=store).messages
    engine.dispose()
    store.client.close()

    assert message.source is not None
    assert (message.source.uri, message.source.row) == (str(tmp_path / "first.ndjson"), 2)
    assert message.run_id == message.source.taken_by == first["run_id"]


def test_a_stage_that_fails_leaves_its_attempt_with_the_reason(
    settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    refused = run_pipeline(write_rows(tmp_path / "bad.ndjson", [{"who": "ann"}] * 2), settings)

    found = stores.sql("SELECT stage, shard, attempt, status, rows_in, rejected, error_type FROM stage_attempts")
    assert refused["status"] == "failed"
    assert {row[0] for row in found} == {"prepare", "embed_catalog", "ingest"}  # the model is loaded meanwhile
    assert ("ingest", 0, 1, "failed", 2, 2, "RejectRatioExceededError") in found
    assert stores.sql("SELECT retries, code_version IS NOT NULL FROM pipeline_runs WHERE stage = 'ingest'") == [(0, 1)]
