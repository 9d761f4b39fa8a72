"""Lineage: whatever becomes of a run, each stage has one true row in the analytics database."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from personalization.errors import InputError, StoreError
from personalization.pipeline.lineage import (
    ENDED_UNSEEN,
    STAGES,
    StageReport,
    code_version,
    forget_reports,
    record_lineage,
    reported,
    run_summary,
    summarised,
)
from personalization.quality.reports import StageRun, stages_of_run
from personalization.settings import Settings
from personalization.staging import Staging
from personalization.stores.analytics import AnalyticsStore
from personalization.stores.tables import PipelineRun, StageAttempt
from sqlalchemy import event, select

RUN = "manual__2026-10-01T09:00:00+00:00"


@pytest.fixture
def staging(tmp_path: Path) -> Staging:
    return Staging(str(tmp_path / "staging"), RUN)


@pytest.fixture
def analytics(tmp_path: Path) -> Iterator[AnalyticsStore]:
    settings = Settings(_env_file=None, sqlite_path=tmp_path / "analytics.db", analytics_url=None)
    store = AnalyticsStore.from_settings(settings)
    yield store
    store.engine.dispose()


def recorded(staging: Staging, analytics: AnalyticsStore) -> dict[str, StageRun]:
    """What the database says of the run after its lineage was recorded."""
    record_lineage(RUN, staging, analytics)
    return {row.stage: row for row in stages_of_run(analytics.engine, RUN)}


def work(staging: Staging, stage: str, *, shard: int = 0, attempt: int = 1, **counts: Any) -> None:
    """A task that succeeds."""
    with reported(staging, RUN, stage, shard=shard, attempt=attempt) as report:
        for name, value in counts.items():
            setattr(report, name, value)


def fail(staging: Staging, stage: str, error: BaseException, **where: int) -> None:
    """A task that fails."""

    def task() -> None:
        with reported(staging, RUN, stage, **where) as report:
            report.rows_in = 7
            raise error

    with pytest.raises(type(error)):
        task()


def attempts(analytics: AnalyticsStore, stage: str) -> list[Any]:
    """What the database says of the stage's attempts, in order."""
    query = select(StageAttempt.__table__).where(StageAttempt.stage == stage)
    with analytics.engine.connect() as connection:
        return list(connection.execute(query.order_by(StageAttempt.shard, StageAttempt.attempt)))


def report_of(staging: Staging, stage: str, shard: int = 0) -> StageReport:
    path = staging.root / "reports" / f"{stage}-{shard:06d}.json"
    return StageReport.model_validate_json(path.read_bytes())


# --- the task's own account


def test_a_report_is_running_until_the_block_ends(staging: Staging):
    with reported(staging, RUN, "ingest", attempt=2) as report:
        report.rows_in = 3
        meanwhile = report_of(staging, "ingest")
    after = report_of(staging, "ingest")

    assert (meanwhile.status, meanwhile.rows_in, meanwhile.finished_at) == ("running", 0, None)
    assert (after.status, after.rows_in, after.attempt) == ("success", 3, 2)
    assert after.finished_at is not None
    assert after.started_at <= after.finished_at <= datetime.now(UTC)
    assert after.seconds > 0


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (InputError("in.json: row 3: the array is cut off"), "in.json: row 3: the array is cut off"),
        (StoreError("milvus", "does not answer"), "milvus: does not answer"),
        (KeyError("x"), "KeyError: 'x'"),
        (MemoryError(), "MemoryError: "),
        (KeyboardInterrupt(), "KeyboardInterrupt: "),
        (SystemExit(1), "SystemExit: 1"),
    ],
)
def test_a_failure_is_reported_with_its_words_and_goes_on(staging: Staging, error: BaseException, text: str):
    fail(staging, "ingest", error)

    report = report_of(staging, "ingest")
    assert (report.status, report.error_type, report.error) == ("failed", type(error).__name__, text)
    assert report.rows_in == 7
    assert report.finished_at is not None


def test_a_very_long_error_is_cut(staging: Staging):
    fail(staging, "ingest", InputError("x" * 1_000_000))

    assert report_of(staging, "ingest").error == "x" * 2000


def test_an_error_that_speaks_of_an_undecodable_name_is_reported(staging: Staging):
    fail(staging, "ingest", InputError("/inbox/caf\udce9.json: no such file"))

    assert "no such file" in (report_of(staging, "ingest").error or "")


# --- a row by stage


def test_a_run_that_did_everything_has_every_stage_successful_in_order(staging: Staging, analytics: AnalyticsStore):
    for stage in STAGES:
        work(staging, stage, rows_in=10, rows_out=8, rejected=1, skipped=1, details={"of": stage})

    rows = recorded(staging, analytics)

    assert list(rows) == list(STAGES)
    assert [row.position for row in rows.values()] == list(range(len(STAGES)))
    for stage, row in rows.items():
        assert (row.status, row.shards, row.attempt) == ("success", 1, 1)
        assert (row.rows_in, row.rows_out, row.rejected, row.skipped) == (10, 8, 1, 1)
        assert (row.error_type, row.error, row.details) == (None, None, {"of": stage})
        assert row.started_at is not None
        assert row.finished_at is not None
        assert row.started_at.utcoffset() is not None
        assert row.started_at <= row.finished_at


def test_what_is_returned_is_what_was_written(staging: Staging, analytics: AnalyticsStore):
    work(staging, "prepare", rows_in=5, rows_out=5, details={"intents": 3})
    fail(staging, "ingest", InputError("broken"))

    returned = record_lineage(RUN, staging, analytics)

    with analytics.engine.connect() as connection:
        query = select(PipelineRun.__table__).order_by(PipelineRun.position)
        assert [dict(row) for row in connection.execute(query).mappings()] == returned


def test_a_failed_stage_keeps_its_error_and_later_ones_were_not_run(staging: Staging, analytics: AnalyticsStore):
    work(staging, "prepare")
    fail(staging, "ingest", InputError("in.json: is empty"))

    rows = recorded(staging, analytics)

    assert (rows["prepare"].status, rows["ingest"].status) == ("success", "failed")
    assert (rows["ingest"].error_type, rows["ingest"].error) == ("InputError", "in.json: is empty")
    assert rows["ingest"].rows_in == 7
    assert {rows[stage].status for stage in STAGES[2:]} == {"not_run"}
    assert {rows[stage].shards for stage in STAGES[2:]} == {0}
    assert {rows[stage].started_at for stage in STAGES[2:]} == {None}


def test_a_stage_that_was_mapped_over_nothing_was_skipped(staging: Staging, analytics: AnalyticsStore):
    mapped = {"embed", "upsert_vectors", "build_graph"}
    for stage in STAGES:
        if stage not in mapped:
            work(staging, stage)

    rows = recorded(staging, analytics)

    assert {stage for stage, row in rows.items() if row.status == "skipped"} == mapped
    assert {row.status for stage, row in rows.items() if stage not in mapped} == {"success"}


def test_a_killed_task_is_a_failure(staging: Staging, analytics: AnalyticsStore):
    work(staging, "prepare")
    script = (
        "import os, signal, sys\n"
        "from personalization.pipeline.lineage import reported\n"
        "from personalization.staging import Staging\n"
        "with reported(Staging(sys.argv[1], sys.argv[2]), sys.argv[2], 'ingest'):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(staging.base), RUN], check=False)

    rows = recorded(staging, analytics)

    assert done.returncode == -signal.SIGKILL
    assert report_of(staging, "ingest").status == "running"
    assert (rows["ingest"].status, rows["ingest"].error_type) == ("failed", "Killed")
    assert rows["ingest"].error == "the task was killed before it could finish"
    assert rows["ingest"].finished_at is None
    assert rows["embed_catalog"].status == "not_run"


def test_shards_are_summed(staging: Staging, analytics: AnalyticsStore):
    for shard in range(12):
        work(staging, "embed", shard=shard, rows_in=100, rows_out=90, rejected=shard, skipped=1)
    reports = [report_of(staging, "embed", shard) for shard in range(12)]

    row = recorded(staging, analytics)["embed"]

    assert (row.status, row.shards) == ("success", 12)
    assert (row.rows_in, row.rows_out, row.rejected, row.skipped) == (1200, 1080, 66, 12)
    assert row.seconds == pytest.approx(sum(report.seconds for report in reports))
    assert row.started_at == min(report.started_at for report in reports)
    assert row.finished_at == max(report.finished_at for report in reports if report.finished_at)


def test_one_broken_shard_breaks_the_stage_and_speaks_for_it(staging: Staging, analytics: AnalyticsStore):
    work(staging, "embed", shard=0, rows_in=100, rows_out=100)
    fail(staging, "embed", StoreError("milvus", "does not answer"), shard=1, attempt=3)
    work(staging, "embed", shard=2, rows_in=100, rows_out=100)

    row = recorded(staging, analytics)["embed"]

    assert (row.status, row.error_type, row.error) == ("failed", "StoreError", "milvus: does not answer")
    assert (row.shards, row.rows_in, row.rows_out, row.attempt) == (3, 207, 200, 3)


def test_a_retry_that_succeeds_replaces_the_failure(staging: Staging, analytics: AnalyticsStore):
    fail(staging, "ingest", StoreError("mongodb", "does not answer"))
    work(staging, "ingest", attempt=2, rows_in=4)

    row = recorded(staging, analytics)["ingest"]

    assert (row.status, row.attempt, row.rows_in, row.shards) == ("success", 2, 4, 1)
    assert row.error is None


def test_a_second_record_replaces_the_first(staging: Staging, analytics: AnalyticsStore):
    fail(staging, "prepare", StoreError("neo4j", "does not answer"))
    first = recorded(staging, analytics)
    for stage in STAGES:
        work(staging, stage, attempt=2)

    second = recorded(staging, analytics)

    assert (first["prepare"].status, first["ingest"].status) == ("failed", "not_run")
    assert len(second) == len(STAGES)
    assert {(row.status, row.attempt) for row in second.values()} == {("success", 2)}


def test_other_runs_are_left_alone(staging: Staging, analytics: AnalyticsStore):
    work(staging, "prepare")
    recorded(staging, analytics)
    other = Staging(str(staging.base), "other")
    with reported(other, "other", "prepare"):
        pass

    record_lineage("other", other, analytics)

    assert len(stages_of_run(analytics.engine, RUN)) == len(STAGES)
    assert len(stages_of_run(analytics.engine, "other")) == len(STAGES)


def test_a_run_without_any_report_is_recorded_too(staging: Staging, analytics: AnalyticsStore):
    rows = recorded(staging, analytics)

    assert len(rows) == len(STAGES)
    assert {row.shards for row in rows.values()} == {0}


def test_a_report_that_is_just_being_written_is_not_read(staging: Staging, analytics: AnalyticsStore):
    work(staging, "ingest", rows_in=5)
    aside = staging.root / "reports" / ".ingest-000000.json.1790000000000000000"
    aside.write_text(json.dumps({"half": "a rep"})[:10])

    assert recorded(staging, analytics)["ingest"].rows_in == 5


# --- a row by attempt


def test_every_attempt_of_every_task_has_a_row_the_failed_ones_too(staging: Staging, analytics: AnalyticsStore):
    work(staging, "embed", shard=0, rows_in=100, rows_out=100)
    fail(staging, "embed", StoreError("milvus", "does not answer"), shard=1)
    work(staging, "embed", shard=1, attempt=2, rows_in=50, rows_out=49, rejected=1)

    row = recorded(staging, analytics)["embed"]
    found = attempts(analytics, "embed")

    assert (row.status, row.shards, row.retries, row.rows_in) == ("success", 2, 1, 150)
    assert [(one.shard, one.attempt, one.status, one.rows_in) for one in found] == [
        (0, 1, "success", 100),
        (1, 1, "failed", 7),
        (1, 2, "success", 50),
    ]
    assert (found[1].error_type, found[1].error) == ("StoreError", "milvus: does not answer")
    assert (found[2].error_type, found[2].error, found[2].rejected) == (None, None, 1)


def test_an_attempt_that_was_killed_before_the_one_that_succeeded_is_told_of(
    staging: Staging, analytics: AnalyticsStore
):
    killed = StageReport(run_id=RUN, stage="ingest", shard=0, attempt=1, started_at=datetime.now(UTC))
    path = staging.root / "reports" / "ingest-000000.json"
    path.parent.mkdir(parents=True)
    path.write_text(killed.model_dump_json())
    work(staging, "ingest", attempt=2)

    row = recorded(staging, analytics)["ingest"]

    assert (row.status, row.retries) == ("success", 1)
    assert [(one.status, one.error_type) for one in attempts(analytics, "ingest")] == [
        ("failed", "Killed"),
        ("success", None),
    ]


@pytest.mark.parametrize(
    ("error", "brief"),
    [
        (ConnectionError("no route to http://10.0.0.7:19530/v2/x"), "ConnectionError: no route to http://…/v2/x"),
        (OSError("host='db.intern', port=27017"), "OSError: host='…', port=27017"),
        (TimeoutError("neo4j-0.neo4j.svc:7687 and\n10.1.2.3 are silent"), "TimeoutError: … and … are silent"),
        (InputError("row 3: 'a'\n\n  is cut"), "row 3: 'a' is cut"),
    ],
)
def test_the_error_of_an_attempt_is_one_line_without_hosts(
    staging: Staging, analytics: AnalyticsStore, error: Exception, brief: str
):
    fail(staging, "ingest", error)
    recorded(staging, analytics)

    [row] = attempts(analytics, "ingest")
    assert row.error == brief


def test_the_error_of_an_attempt_is_short(staging: Staging, analytics: AnalyticsStore):
    fail(staging, "ingest", InputError("x" * 1_000_000))
    recorded(staging, analytics)

    assert len(attempts(analytics, "ingest")[0].error) == 300


def test_attempts_of_a_run_that_is_cleared_are_kept_beside_the_new_ones(staging: Staging, analytics: AnalyticsStore):
    work(staging, "ingest")
    fail(staging, "embed", StoreError("milvus", "does not answer"), shard=3)
    recorded(staging, analytics)
    work(staging, "ingest", attempt=2)
    forget_reports(staging, RUN, first_stage="embed")
    work(staging, "embed", attempt=2)

    row = recorded(staging, analytics)["embed"]

    assert (row.status, row.shards) == ("success", 1)
    found = [(one.shard, one.attempt, one.status) for one in attempts(analytics, "embed")]
    assert found == [(0, 2, "success"), (3, 1, "failed")]
    assert [one.attempt for one in attempts(analytics, "ingest")] == [1, 2]


def test_a_run_whose_staged_reports_are_gone_keeps_its_attempts(staging: Staging, analytics: AnalyticsStore):
    work(staging, "ingest")
    recorded(staging, analytics)

    recorded(Staging(str(staging.base / "elsewhere"), RUN), analytics)

    assert len(attempts(analytics, "ingest")) == 1


def test_the_number_of_statements_does_not_grow_with_shards(staging: Staging, analytics: AnalyticsStore):
    analytics.ensure_schema()
    counts = []
    for shards in (1, 40):
        for shard in range(shards):
            work(staging, "embed", shard=shard)
        statements: list[str] = []

        def count(connection: Any, cursor: Any, statement: str, *rest: Any, seen: list[str] = statements) -> None:
            if re.match("INSERT|DELETE|SELECT", statement):
                seen.append(statement)

        event.listen(analytics.engine, "before_cursor_execute", count)
        record_lineage(RUN, staging, analytics)
        event.remove(analytics.engine, "before_cursor_execute", count)
        counts.append(len(statements))

    assert counts[0] == counts[1]


def test_a_task_that_failed_before_or_behind_its_report_is_no_success(staging: Staging, analytics: AnalyticsStore):
    """Only Airflow knows of it."""
    work(staging, "prepare")
    work(staging, "ingest", attempt=2)
    fail(staging, "embed_catalog", StoreError("staging", "is full"))

    failed = [("ingest", 0), ("embed_catalog", 0), ("ingest_events", 0)]
    record_lineage(RUN, staging, analytics, failed_tasks=failed)

    rows = {row.stage: row for row in stages_of_run(analytics.engine, RUN)}
    assert (rows["ingest"].status, rows["ingest"].error_type, rows["ingest"].attempt) == ("failed", ENDED_UNSEEN, 2)
    assert (rows["ingest_events"].status, rows["ingest_events"].error_type) == ("failed", ENDED_UNSEEN)
    assert (rows["embed_catalog"].status, rows["embed_catalog"].error_type) == ("failed", "StoreError")
    assert (rows["prepare"].status, rows["publish"].status) == ("success", "not_run")


# --- what else a row says


def test_a_row_says_which_model_and_code_it_is_of_and_what_was_written(staging: Staging, analytics: AnalyticsStore):
    settings = Settings(_env_file=None, embedding_model="hub/small", code_commit="0123456789abcdef0123")
    with reported(staging, RUN, "ingest", settings=settings) as report:
        staging.write("messages/000000.parquet", pa.table({"id": ["m1"]}))
        report.bytes_written += 1000
    work(staging, "embed")

    rows = recorded(staging, analytics)

    size = (staging.root / "messages" / "000000.parquet").stat().st_size
    assert rows["ingest"].bytes_written == size + 1000
    assert rows["ingest"].model == "hub/small"
    assert rows["ingest"].code_version == code_version(settings)
    assert re.fullmatch(r"\d+\.\d+\.\d+\+0123456789ab", code_version(settings))
    assert rows["embed"].bytes_written == 0
    [attempt] = attempts(analytics, "ingest")
    assert (attempt.model, attempt.bytes_written) == ("hub/small", size + 1000)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((9_900, 9_800, 100, 0), "9,900 in, 100 rejected"),
        ((440, 0, 0, 440), "440 in, 440 skipped"),
        ((48, 213, 0, 0), "48 in, 213 out"),
        ((0, 0, 0, 0), "0 in"),
    ],
)
def test_rows_are_summed_up_in_a_few_words(counts: tuple[int, int, int, int], words: str):
    assert summarised(*counts) == words


def test_a_run_is_summed_up_in_a_line(staging: Staging, analytics: AnalyticsStore):
    assert run_summary(record_lineage(RUN, staging, analytics)) == "nothing new"
    work(staging, "ingest", attempt=2, rows_in=9_900, rows_out=9_800, rejected=100)
    fail(staging, "ingest_events", InputError("events.csv: is empty"))

    line = run_summary(record_lineage(RUN, staging, analytics))

    assert line == (
        "ingest_events failed: InputError; messages: 9,900 in, 100 rejected; events: 7 in, 0 out; 1 retried"
    )
