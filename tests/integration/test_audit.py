"""The audit against the real stores: every planted fault is found by its ids, and a repair leaves no trace of it."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SAMPLE, SAMPLE_EVENTS, Stores, empty_settings, environment, kill_after, write_rows
from dashboard_pages import forget, look_at, metrics, open_page, words
from personalization import settings as settings_module
from personalization.__main__ import app
from personalization.audit.command import KEPT, audit, record
from personalization.audit.evidence import REPAIR_RUN
from personalization.audit.findings import KINDS, AuditReport
from personalization.erasure.erase import erase
from personalization.erasure.places import Places
from personalization.local.stack import Stack
from personalization.pipeline.lineage import reported
from personalization.pipeline.run import run_pipeline
from personalization.schemas import Event, VectorSpace
from personalization.settings import Settings
from personalization.staging import Staging
from personalization.stores import together
from personalization.stores.milvus import INTERESTS, MESSAGES, USERS, VectorStore
from personalization.stores.mongo import Origin, event_document
from sqlalchemy import create_engine, text
from typer.testing import CliRunner

CATALOG = """
intents:
  - {id: travel, name: Travel, examples: [I want to fly to Rome, Book me a flight, I need a hotel in Paris]}
  - {id: films, name: Films, examples: [Which film is good?, What shall I watch tonight?, Is there a new series?]}
campaigns:
  - {id: cinema_two_for_one, name: Two for one, intents: [films]}
  - {id: savings_booster, name: Savings booster, intents: [travel]}
"""
MESSAGES_TAKEN = 120
CLICKED_AT: Any = "2026-11-01T09:00:00Z"
MARIA = "s-0002"  # who asks for flights in it


@dataclass
class World:
    """Stores that hold messages and events, with a shell on each."""

    settings: Settings
    stores: Stores
    own: together.Stores
    places: Places
    files: tuple[Path, Path]

    def audit(self, *, repair: bool = False, audit_id: str | None = None) -> AuditReport:
        return audit(
            self.own, self.settings, places=self.places, repair=repair, audit_id=audit_id, progress=lambda _: None
        )

    def sql(self, statement: str, **parameters: Any) -> None:
        engine = create_engine(f"sqlite:///{self.settings.sqlite_path}")
        with engine.begin() as connection:
            connection.execute(text(statement), parameters)
        engine.dispose()

    def cypher(self, statement: str) -> None:
        self.stores.driver.execute_query(statement, database_=self.settings.neo4j_database)

    def collection(self, alias: str) -> str:
        return VectorSpace(self.settings.embedding_model, self.settings.embedding_dim).collection(alias)

    def row(self, alias: str, row_id: str) -> dict[str, Any]:
        return dict(self.stores.milvus.get(self.collection(alias), ids=[row_id], output_fields=["*"])[0])

    def scale(self, alias: str, row_id: str, factor: float) -> None:
        row = self.row(alias, row_id)
        row["embedding"] = (np.asarray(row["embedding"], dtype=np.float32) * factor).tolist()
        self.stores.milvus.upsert(self.collection(alias), [row])

    def put(self, alias: str, row_id: str, **fields: Any) -> None:
        unit = [1.0] + [0.0] * (self.settings.embedding_dim - 1)
        self.stores.milvus.upsert(self.collection(alias), [{"id": row_id, "embedding": unit, **fields}])

    def generation(self) -> int:
        return int(self.stores.redis.get("personalization:generation"))

    def state(self) -> dict[str, Any]:
        """Every count and every derived row; the generation moves on with each repair."""
        weights = "MATCH (u:User)-[e:EXPRESSED]->(i) RETURN u.user_id, i.intent_id, e.count, e.last_seen ORDER BY 1, 2"
        edges = self.stores.driver.execute_query(weights, database_=self.settings.neo4j_database).records
        snapshot = self.stores.snapshot()
        del snapshot["generation"]
        return snapshot | {"edges of users": [tuple(one.values()) for one in edges]}


@pytest.fixture(scope="module")
def world(store_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """What is planted in one test is repaired in it, so all of them share the stores."""
    folder = tmp_path_factory.mktemp("audit")
    catalog = folder / "catalog.yaml"
    catalog.write_text(CATALOG)
    settings = empty_settings(store_stack, folder).model_copy(update={"catalog_path": catalog})
    said = json.loads(SAMPLE.read_text())[:MESSAGES_TAKEN]
    messages = write_rows(folder / "messages.ndjson", [*said, '{"user_id": "maria", "message": ""}'])
    users = {one["user_id"] for one in said}
    did = [one for one in csv.DictReader(SAMPLE_EVENTS.read_text().splitlines()) if one["user_id"] in users]
    events = write_rows(folder / "events.ndjson", [_typed(one) for one in did])
    assert run_pipeline(messages, settings, events)["status"] == "success"
    stores = Stores(settings)
    with together.Stores.of(settings) as own, Places.of(settings) as places:
        yield World(settings, stores, own, places, (messages, events))
    stores.close()


@pytest.fixture
def dashboard(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The pages show these stores."""
    look_at(environment(world.settings), monkeypatch)
    yield
    monkeypatch.undo()
    forget()


def _typed(row: dict[str, str]) -> dict[str, Any]:
    kept: dict[str, Any] = {name: value for name, value in row.items() if value}
    return kept | ({"position": int(kept["position"])} if "position" in kept else {})


def found(report: AuditReport) -> dict[str, list[str]]:
    return {one.kind.name: [sample.item for sample in one.samples] for one in report.findings}


def evidence(report: AuditReport, kind: str) -> tuple[str | None, str | None]:
    """Of the first case: what should be, and what is."""
    [finding] = [one for one in report.findings if one.kind.name == kind]
    return finding.samples[0].expected, finding.samples[0].found


# --- healthy stores


def test_healthy_stores_agree_also_where_rows_were_refused_and_after_a_second_run(world: World) -> None:
    assert world.stores.mongo.quarantine.count_documents({}) == 1
    first = world.audit()
    assert run_pipeline(world.files[0], world.settings, world.files[1])["status"] == "success"
    second = world.audit()

    for report in (first, second):
        assert (report.status, report.findings, report.in_flux) == ("clean", [], 0)
        read = report.compared
        assert read["mongodb"]["messages"] == read["milvus"]["vectors"] == read["analytics"]["messages"]
        assert read["mongodb"]["messages"] == MESSAGES_TAKEN
        assert read["mongodb"]["events"] == read["analytics"]["events"] > 0
        assert read["neo4j"]["expressed"] > 0 < read["neo4j"]["engaged"]


def test_events_that_wait_and_messages_of_a_run_at_work_are_no_drift(world: World) -> None:
    event = Event(user_id="maria", campaign_id="savings_booster", event="click", timestamp=CLICKED_AT)
    origin: Origin = {"run_id": None, "attempt": 0, "source": {"uri": "api"}}
    world.stores.mongo.events.insert_one(event_document(event, origin))
    world.stores.mongo.runs.insert_one({"_id": "at work"})
    world.stores.mongo.conversations.update_one({"_id": MARIA}, {"$set": {"run_id": "at work"}})
    world.stores.milvus.delete(world.collection(MESSAGES), ids=[MARIA])
    before = world.row(USERS, "maria")
    try:
        with reported(Staging(world.settings.staging_uri, "at work"), "at work", "embed"):
            report = world.audit()

        assert (report.status, report.in_flux) == ("clean", 1)
        assert world.row(USERS, "maria") == before
    finally:
        world.stores.mongo.events.delete_one({"_id": event.event_id})
        for path in (Staging(world.settings.staging_uri, "at work").root / "reports").glob("*"):
            path.unlink()
    left = world.audit(repair=True)

    assert (found(left), left.status) == ({"message_left_behind": [MARIA]}, "repaired")
    assert evidence(left, "message_left_behind") == ("published", "taken by at work")


# --- planted faults

Plant = Callable[[World], dict[str, list[str]]]


def no_vector(world: World) -> dict[str, list[str]]:
    world.stores.milvus.delete(world.collection(MESSAGES), ids=[MARIA, "s-0013"])
    return {"message_without_vector": [MARIA, "s-0013"]}


def no_message(world: World) -> dict[str, list[str]]:
    world.put(MESSAGES, "ghost", user_id="maria", timestamp=1)
    return {"vector_without_message": ["ghost"]}


def zero_and_long_vectors(world: World) -> dict[str, list[str]]:
    world.scale(MESSAGES, MARIA, 0)
    world.scale(MESSAGES, "s-0014", 2)
    return {"vector_invalid": [MARIA, "s-0014"]}


def vector_of_another_user(world: World) -> dict[str, list[str]]:
    world.stores.milvus.upsert(world.collection(MESSAGES), [world.row(MESSAGES, MARIA) | {"user_id": "jonas.k"}])
    return {"vector_differs": [MARIA]}


def wrong_intent(world: World) -> dict[str, list[str]]:
    world.sql("UPDATE message_intents SET intent_id = 'films' WHERE message_id = :id", id=MARIA)
    return {"intents_differ": [MARIA]}


def intent_of_another_user(world: World) -> dict[str, list[str]]:
    world.sql("UPDATE message_intents SET user_id = 'jonas.k' WHERE message_id = :id", id=MARIA)
    return {"intents_differ": [MARIA]}


def no_intents(world: World) -> dict[str, list[str]]:
    world.sql("DELETE FROM message_intents WHERE message_id IN ('s-0001', :id)", id=MARIA)
    return {"message_without_intents": ["s-0001", MARIA]}


def intents_of_nothing(world: World) -> dict[str, list[str]]:
    world.sql("INSERT INTO message_intents VALUES ('ghost', 'travel', 'maria', 1, 0.9, 'r')")
    return {"intents_without_message": ["ghost"]}


def edge_with_a_wrong_count(world: World) -> dict[str, list[str]]:
    world.cypher("MATCH (:User {user_id: 'maria'})-[e:EXPRESSED]->(:Intent {intent_id: 'travel'}) SET e.count = 77")
    return {"expressed_differs": ["maria → travel"]}


def edge_twice(world: World) -> dict[str, list[str]]:
    world.cypher(
        "MATCH (u:User {user_id: 'maria'}) MATCH (i:Intent {intent_id: 'travel'}) "
        "CREATE (u)-[:EXPRESSED {count: 1, last_seen: 1, confidence: 0.5, weight: 0.5}]->(i)"
    )
    return {"expressed_differs": ["maria → travel"]}


def no_engaged_edge(world: World) -> dict[str, list[str]]:
    world.cypher(
        "MATCH (:User {user_id: 'maria'})-[g:ENGAGED_WITH]->(:Campaign {campaign_id: 'savings_booster'}) DELETE g"
    )
    return {"engaged_differs": ["maria → savings_booster"]}


def user_nobody_knows(world: World) -> dict[str, list[str]]:
    world.cypher(
        "MATCH (i:Intent {intent_id: 'travel'}) "
        "CREATE (:User {user_id: 'nobody'})-[:EXPRESSED {count: 1, last_seen: 1, confidence: 0.5, weight: 0.5}]->(i)"
    )
    world.put(USERS, "nobody", last_seen=1)
    world.put(INTERESTS, "nobody#0", user_id="nobody", last_seen=1)
    world.sql(
        "INSERT INTO user_engagement (user_id, campaign_id, count, last_at) VALUES ('nobody', 'savings_booster', 1, 1)"
    )
    return {
        "profile_without_user": ["interests/nobody", "users/nobody"],
        "engagement_differs": ["nobody → savings_booster"],
        "node_without_user": ["nobody"],
        "expressed_differs": ["nobody → travel"],
        "campaign_totals_differ": ["savings_booster"],
    }


def no_node(world: World) -> dict[str, list[str]]:
    world.cypher("MATCH (u:User {user_id: 'maria'}) DETACH DELETE u")
    return {
        "user_without_node": ["maria"],
        "expressed_differs": ["maria → travel"],
        "engaged_differs": ["maria → savings_booster"],
    }


def broken_profiles(world: World) -> dict[str, list[str]]:
    world.stores.milvus.delete(world.collection(USERS), ids=["maria"])
    world.scale(INTERESTS, "jonas.k#0", 0)
    world.stores.milvus.upsert(world.collection(USERS), [world.row(USERS, "u-1007") | {"last_seen": 1_000}])
    return {
        "user_without_profile": ["users/maria"],
        "profile_invalid": ["interests/jonas.k#0"],
        "profile_stale": ["users/u-1007"],
    }


def event_missing(world: World) -> dict[str, list[str]]:
    [event_id] = world.stores.sql("SELECT min(event_id) FROM events WHERE user_id = 'maria'")[0]
    world.sql("DELETE FROM events WHERE event_id = :id", id=event_id)
    return {"event_missing": [event_id]}


def event_of_nothing_and_another(world: World) -> dict[str, list[str]]:
    [event_id] = world.stores.sql("SELECT min(event_id) FROM events WHERE user_id = 'maria'")[0]
    world.sql("UPDATE events SET campaign_id = 'gone' WHERE event_id = :id", id=event_id)
    world.sql(
        "INSERT INTO events (event_id, user_id, campaign_id, event, timestamp, run_id) "
        "VALUES ('ghost', 'jonas.k', 'savings_booster', 'click', 1, 'r')"
    )
    return {"event_without_source": ["ghost"], "event_differs": [event_id]}


def wrong_engagement(world: World) -> dict[str, list[str]]:
    world.sql("UPDATE user_engagement SET count = 50 WHERE user_id = 'maria' AND campaign_id = 'savings_booster'")
    return {"engagement_differs": ["maria → savings_booster"], "campaign_totals_differ": ["savings_booster"]}


def wrong_campaigns(world: World) -> dict[str, list[str]]:
    world.cypher("MATCH (c:Campaign {campaign_id: 'savings_booster'})-[t:TARGETS]->() DELETE t")
    world.sql("UPDATE campaigns SET category = 'none' WHERE campaign_id = 'cinema_two_for_one'")
    return {
        "catalog_differs": ["cinema_two_for_one"],
        "graph_catalog_differs": ["cinema_two_for_one", "savings_booster → travel"],
    }


def half_published(world: World) -> dict[str, list[str]]:
    world.sql("UPDATE served SET announced = 0")
    return {"knowledge_not_served": ["served"]}


def stale_generation(world: World) -> dict[str, list[str]]:
    world.stores.redis.set("answer:{maria}:5", b"%d|token|0.000|{}" % world.generation(), ex=600)
    world.stores.redis.set("personalization:generation", 0)
    return {"generation_stale": ["generation"], "answer_of_no_generation": ["answer:{maria}:5"]}


FAULTS: list[Plant] = [
    no_message,
    vector_of_another_user,
    wrong_intent,
    intent_of_another_user,
    no_intents,
    intents_of_nothing,
    edge_twice,
    no_engaged_edge,
    user_nobody_knows,
    no_node,
    broken_profiles,
    event_missing,
    event_of_nothing_and_another,
    wrong_engagement,
    wrong_campaigns,
    half_published,
]


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found_by_its_ids_and_repaired_without_a_trace(world: World, plant: Plant) -> None:
    before, generation = world.state(), world.generation()
    planted = plant(world)

    report = world.audit(repair=True)

    assert found(report) == planted
    assert [one.left for one in report.findings] == [0] * len(planted)
    assert report.status == "repaired"
    assert world.state() == before
    assert world.generation() > generation  # answers of before are not given as fresh


@pytest.mark.parametrize(
    ("plant", "should_be", "is_now"),
    [
        (no_vector, "maria at 2026-", "None"),
        (zero_and_long_vectors, "unit length", "zero"),
        (edge_with_a_wrong_count, "count ", "count 77"),
        (stale_generation, " or later", "0"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_a_planted_fault_is_on_the_dashboard_with_its_evidence_until_a_repair(
    world: World, dashboard: None, plant: Plant, should_be: str, is_now: str
) -> None:
    before, generation = world.state(), world.generation()
    planted = plant(world)
    assert found(world.audit()) == planted

    page, overview = open_page("audit"), open_page("overview")
    left = sum(len(items) for items in planted.values())
    assert page.error[0].value == f"The stores do not agree: {left} {'case is' if left == 1 else 'cases are'} left."
    cases = [one.value for one in page.dataframe if "Should be" in one.value]
    for kind, items in planted.items():
        assert f"**{KINDS[kind].title}**" in words(page)
        assert KINDS[kind].advice in words(page)
        assert KINDS[kind].title in overview.error[0].value
        [table] = [one for one in cases if list(one["Id"]) == items]
        if kind == next(iter(planted)):
            assert should_be in str(table["Should be"][0])
            assert is_now in str(table["Is"][0])

    assert found(world.audit(repair=True)) == planted
    forget()
    mended = open_page("audit")
    assert not mended.error
    assert mended.success[0].value == "Mended: the stores agree."
    assert metrics(mended)["Cases left"] == "0"

    assert world.audit().status == "clean"
    forget()
    assert open_page("audit").success[0].value == "The stores agree."
    overview = open_page("overview")
    assert not overview.error
    assert "check_circle: agree]" in words(overview)
    assert world.state() == before
    assert world.generation() > generation  # answers of before are not given as fresh


def test_a_stage_that_lost_its_rows_in_silence_is_on_the_dashboard_until_a_repair(
    world: World, dashboard: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [{"user_id": "silent", "message": f"Book me flight {at}", "timestamp": CLICKED_AT} for at in range(3)]
    upsert = VectorStore.upsert

    def lose(store: VectorStore, collection: str, rows: Sequence[dict[str, Any]]) -> None:
        if collection != world.collection(MESSAGES):
            upsert(store, collection, rows)

    with monkeypatch.context() as patch:
        patch.setattr(VectorStore, "upsert", lose)
        assert run_pipeline(write_rows(tmp_path / "said.ndjson", said), world.settings)["status"] == "success"
    evidence = f"3 of {MESSAGES_TAKEN + 3} messages in MongoDB have no vector in Milvus."
    for page in ("overview", "anomalies"):
        assert evidence in words(open_page(page))
    assert found(world.audit()).keys() == {"message_without_vector"}

    assert world.audit(repair=True).status == "repaired"

    assert world.audit().status == "clean"
    forget()
    assert evidence not in words(open_page("overview"))
    erase("silent", world.places)


def test_half_of_the_rows_rejected_is_on_the_dashboard_and_no_drift(
    world: World, dashboard: None, tmp_path: Path
) -> None:
    bad = [{"user_id": "maria", "message": "", "timestamp": CLICKED_AT}] * 4
    good = [{"user_id": "half", "message": f"Book me flight {at}", "timestamp": CLICKED_AT} for at in range(4)]
    summary = run_pipeline(write_rows(tmp_path / "half.ndjson", [*bad, *good]), world.settings)

    assert summary["status"] == "success"
    for page in ("overview", "anomalies"):
        assert "4 of 8 rows (50%)." in words(open_page(page))
    refused = open_page("runs", run=summary["run_id"], part="Rejected rows")
    assert "4 rows were refused" in words(refused)
    assert refused.dataframe[1].value["Rows"].tolist() == [4]
    assert "message" in refused.dataframe[1].value["Reason"][0]
    assert world.audit().status == "clean"
    erase("half", world.places)


def test_evidence_says_what_should_be_and_what_is(world: World) -> None:
    edge_with_a_wrong_count(world)
    zero_and_long_vectors(world)
    world.sql("UPDATE message_intents SET intent_id = 'films' WHERE message_id = 's-0026'")

    report = world.audit()

    assert report.status == "drift"
    assert evidence(report, "vector_invalid") == ("unit length", "zero")
    expected, is_now = evidence(report, "intents_differ")
    assert str(is_now).startswith("films ")
    assert not str(expected).startswith("films ")
    # Maria's edge may follow from her vector: one cause is one finding, until it is mended.
    assert "expressed_differs" not in found(report)
    assert found(world.audit(repair=True)).keys() == {"vector_invalid", "intents_differ"}
    edge_with_a_wrong_count(world)
    expected, is_now = evidence(world.audit(repair=True), "expressed_differs")
    assert "count 77" in str(is_now)
    assert "count 77" not in str(expected)


def test_a_repair_that_was_killed_is_taken_up_by_the_next(world: World) -> None:
    before = world.state()
    no_vector(world)
    stale_generation(world)
    user_nobody_knows(world)

    kill_after("detect_intents success", world.settings, "--repair", command_name="audit")
    assert world.stores.mongo.conversations.count_documents({"run_id": {"$regex": f"^{REPAIR_RUN}"}}) > 0
    report = world.audit(repair=True)

    assert report.status == "repaired"
    assert "message_left_behind" in found(report)
    assert world.state() == before
    assert world.audit().status == "clean"


def test_whoever_was_erased_is_no_drift_but_what_is_of_them_again_is_erased_again(world: World) -> None:
    erase("u-1007", world.places)
    assert world.audit().status == "clean"
    world.own.mongo.settle_erasure("u-1007")
    world.own.analytics.refresh_campaign_totals()
    assert world.audit().status == "clean"
    before = world.state()
    world.put(MESSAGES, "s-0024", user_id="u-1007", timestamp=1)
    world.stores.redis.set("answer:{u-1007}:5", b"1|token|0.000|{}", ex=600)

    report = world.audit(repair=True)

    assert found(report) == {"erased_user_left": ["u-1007"]}
    assert report.status == "repaired"
    assert world.state() == before
    assert not world.stores.redis.exists("answer:{u-1007}:5")


# --- what is kept and said


def test_audits_are_kept_once_each_with_their_samples_and_only_the_latest(world: World) -> None:
    edge_with_a_wrong_count(world)
    world.audit(audit_id="mine")
    report = world.audit(repair=True, audit_id="mine")

    assert world.stores.sql("SELECT status, repair, drift, \"left\" FROM audits WHERE audit_id = 'mine'") == [
        ("repaired", 1, 1, 0)
    ]
    kind = KINDS["expressed_differs"]
    assert world.stores.sql(
        "SELECT kind, store, severity, title, count, \"left\" FROM audit_findings WHERE audit_id = 'mine'"
    ) == [(kind.name, "neo4j", "error", kind.title, 1, 0)]
    [(user_id, item)] = world.stores.sql("SELECT user_id, item FROM audit_samples WHERE audit_id = 'mine'")
    assert (user_id, item) == ("maria", "maria → travel")
    assert world.own.analytics.erase_user("nobody")["audit_samples"] > 0  # of an earlier test
    for number in range(KEPT):
        later = datetime(2100, 1, 1, tzinfo=UTC)
        record(AuditReport(f"later {number}", later, later, "clean", False, {}, 0, []), world.own.analytics)
    assert world.stores.sql("SELECT count(*) FROM audits") == [(KEPT,)]
    assert report.audit_id not in {one for (one,) in world.stores.sql("SELECT audit_id FROM audit_findings")}


def test_the_command_ends_with_1_while_drift_is_left(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "get_settings", lambda: world.settings)
    runner = CliRunner()
    edge_with_a_wrong_count(world)

    plain = runner.invoke(app, ["audit"], terminal_width=200)
    mended = runner.invoke(app, ["audit", "--repair", "--json"])
    clean = runner.invoke(app, ["audit"])

    assert (plain.exit_code, mended.exit_code, clean.exit_code) == (1, 0, 0)
    assert "maria → travel" in plain.stdout
    assert "The stores do not agree." in plain.stdout
    report = json.loads(mended.stdout)
    assert report["status"] == "repaired"
    assert [(one["kind"], one["count"], one["left"]) for one in report["findings"]] == [("expressed_differs", 1, 0)]
    assert "The stores agree." in clean.stdout
