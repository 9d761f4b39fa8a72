"""Lineage: whatever becomes of a run, each stage has one true row in the analytics database."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from personalization.errors import InputError, StoreError
from personalization.pipeline.lineage import STAGES, StageReport, record_lineage, reported
from personalization.quality.reports import StageRun, stages_of_run
from personalization.settings import Settings
from personalization.staging import Staging
from personalization.stores.analytics import AnalyticsStore, PipelineRun
from sqlalchemy import select

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
