"""What counts as an anomaly, over a real SQLite file."""

from datetime import timedelta
from pathlib import Path

import pytest
from dashboard_data import NOW, open_store, run_rows
from personalization.quality.anomalies import (
    empty_stages,
    failed_stages,
    find_anomalies,
    high_reject_ratios,
    lost_vectors,
    missing_vectors,
    users_without_relationships,
)
from personalization.stores.analytics import AnalyticsStore

PUBLISHED = {"messages": 100, "vectors": 100, "users": 50, "users_without_intent": 0}


@pytest.fixture
def store(tmp_path: Path) -> AnalyticsStore:
    return open_store(tmp_path / "analytics.db")


def publish(**details: int) -> dict[str, object]:
    return {"details": PUBLISHED | details}


def test_a_clean_run_has_no_anomaly(store: AnalyticsStore):
    store.record_runs(run_rows("clean", publish=publish()))

    assert find_anomalies(store.engine, runs=10) == []


def test_a_failed_stage_is_an_error_with_its_message_and_advice_for_its_cause(store: AnalyticsStore):
    broken = {"status": "failed", "error_type": "StoreError", "error": "milvus: does not answer"}
    store.record_runs(run_rows("broken", upsert_vectors=broken))

    [found] = failed_stages(store.engine, runs=10)

    assert (found.severity, found.run_id, found.stage) == ("error", "broken", "upsert_vectors")
    assert found.title == "Failed with StoreError"
    assert found.evidence == "milvus: does not answer"
    assert found.advice.startswith("Check that the store is up")


def test_a_failure_nobody_foresaw_points_to_the_log(store: AnalyticsStore):
    store.record_runs(run_rows("broken", embed={"status": "failed", "error_type": "KeyError", "error": "'x'"}))

    [found] = failed_stages(store.engine, runs=10)

    assert found.advice.startswith("Read the log")


def test_a_long_error_is_cut_in_the_evidence(store: AnalyticsStore):
    store.record_runs(run_rows("broken", embed={"status": "failed", "error": "word " * 400}))

    [found] = failed_stages(store.engine, runs=10)

    assert len(found.evidence) <= 300


def test_stages_that_a_failure_kept_from_running_are_no_anomalies(store: AnalyticsStore):
    store.record_runs(run_rows("broken", prepare={"status": "failed", "error_type": "CatalogError"}))

    assert [found.stage for found in find_anomalies(store.engine, runs=10)] == ["prepare"]


def test_a_stage_that_took_rows_and_wrote_none_is_empty(store: AnalyticsStore):
    store.record_runs(run_rows("run", build_graph={"rows_out": 0}, publish=publish()))

    [found] = empty_stages(store.engine, runs=10)

    assert (found.severity, found.stage) == ("warning", "build_graph")
    assert "1,000 rows in" in found.evidence


@pytest.mark.parametrize(
    "ingest",
    [
        {"rows_in": 500, "skipped": 500, "rows_out": 0},
        {"rows_in": 500, "skipped": 480, "rejected": 20, "rows_out": 0},
        {"rows_in": 0, "rows_out": 0},
    ],
    ids=["all unchanged", "the rest rejected", "no rows at all"],
)
def test_a_stage_with_nothing_to_do_is_not_empty(store: AnalyticsStore, ingest: dict[str, int]):
    store.record_runs(run_rows("run", ingest=ingest))

    assert empty_stages(store.engine, runs=10) == []


def test_a_failed_stage_is_not_called_empty_too(store: AnalyticsStore):
    store.record_runs(run_rows("run", embed={"status": "failed", "rows_out": 0}))

    assert empty_stages(store.engine, runs=10) == []


def test_more_than_a_tenth_rejected_is_a_high_ratio(store: AnalyticsStore):
    store.record_runs(run_rows("run", ingest={"rows_in": 100, "rejected": 11}))

    [found] = high_reject_ratios(store.engine, runs=10)

    assert (found.severity, found.stage) == ("warning", "ingest")
    assert found.evidence == "11 of 100 rows (11%)."


@pytest.mark.parametrize(("rows_in", "rejected"), [(100, 10), (100, 0), (0, 0)])
def test_a_tenth_rejected_is_no_high_ratio(store: AnalyticsStore, rows_in: int, rejected: int):
    store.record_runs(run_rows("run", ingest={"rows_in": rows_in, "rejected": rejected}))

    assert high_reject_ratios(store.engine, runs=10) == []


def test_messages_without_a_vector_after_the_latest_publish_are_an_error(store: AnalyticsStore):
    store.record_runs(run_rows("run", publish=publish(messages=100, vectors=97)))

    [found] = missing_vectors(store.engine)

    assert (found.severity, found.run_id, found.stage) == ("error", "run", "publish")
    assert found.evidence.startswith("3 of 100 messages")


def test_vectors_that_a_later_run_made_up_for_are_not_missing(store: AnalyticsStore):
    store.record_runs(run_rows("older", NOW - timedelta(hours=1), publish=publish(vectors=97)))
    store.record_runs(run_rows("newer", NOW, publish=publish()))

    assert missing_vectors(store.engine) == []


def test_a_failed_run_does_not_hide_what_the_last_publish_found(store: AnalyticsStore):
    store.record_runs(run_rows("published", NOW - timedelta(hours=1), publish=publish(vectors=97)))
    store.record_runs(run_rows("broken", NOW, embed={"status": "failed"}))

    [found] = missing_vectors(store.engine)

    assert found.run_id == "published"


def test_a_run_that_writes_fewer_vectors_than_it_embeds_is_an_error(store: AnalyticsStore):
    store.record_runs(run_rows("run", upsert_vectors={"rows_out": 990}))

    [found] = lost_vectors(store.engine, runs=10)

    assert (found.severity, found.stage) == ("error", "upsert_vectors")
    assert found.evidence == "1,000 messages embedded, 990 vectors written."


def test_vectors_are_not_called_lost_where_writing_them_failed(store: AnalyticsStore):
    store.record_runs(run_rows("run", upsert_vectors={"status": "failed", "rows_out": 5}))

    assert lost_vectors(store.engine, runs=10) == []


def test_users_without_relationships_are_a_warning_with_their_share(store: AnalyticsStore):
    store.record_runs(run_rows("run", publish=publish(users=50, users_without_intent=5)))

    [found] = users_without_relationships(store.engine)

    assert (found.severity, found.stage) == ("warning", "build_graph")
    assert "5 of 50 users (10.0%)" in found.evidence


def test_a_few_users_without_relationships_are_none_worth_a_look(store: AnalyticsStore):
    store.record_runs(run_rows("run", publish=publish(users=50, users_without_intent=4)))

    assert users_without_relationships(store.engine) == []


def test_a_publish_that_recorded_no_totals_raises_nothing(store: AnalyticsStore):
    store.record_runs(run_rows("run", publish={"details": {}}))

    assert find_anomalies(store.engine, runs=10) == []


def test_only_the_latest_runs_are_looked_at(store: AnalyticsStore):
    for hours in range(5):
        broken = {"status": "failed", "error": "no"}
        store.record_runs(run_rows(f"{hours} h old", NOW - timedelta(hours=hours), embed=broken))

    assert [found.run_id for found in find_anomalies(store.engine, runs=2)] == ["0 h old", "1 h old"]


def test_the_newest_run_comes_first_and_its_errors_before_its_warnings(store: AnalyticsStore):
    store.record_runs(run_rows("older", NOW - timedelta(hours=1), embed={"status": "failed"}))
    store.record_runs(
        run_rows("newer", NOW, build_graph={"rows_out": 0}, publish=publish(vectors=97, users_without_intent=5))
    )

    found = find_anomalies(store.engine, runs=10)

    assert [(one.run_id, one.severity) for one in found] == [
        ("newer", "error"),
        ("newer", "warning"),
        ("newer", "warning"),
        ("older", "error"),
    ]


def test_an_empty_store_has_no_anomaly(store: AnalyticsStore):
    assert find_anomalies(store.engine, runs=10) == []
