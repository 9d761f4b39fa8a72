"""What happened in a run: a report by every task while it works, a row by stage at the end."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import structlog
from pydantic import BaseModel, Field
from upath import UPath

from personalization.errors import PersonalizationError
from personalization.staging import Staging, staging_errors, write_atomically
from personalization.stores.analytics import AnalyticsStore

STAGES = (
    "prepare",
    "ingest",
    "ingest_events",
    "embed_catalog",
    "embed",
    "upsert_vectors",
    "detect_intents",
    "build_graph",
    "roll_up_engagement",
    "refresh_profiles",
    "learn",
    "publish",
)

LONGEST_TASK = timedelta(hours=24)
"""No task works longer: what still says so was killed."""

_FOLDER = "reports"
_MAX_ERROR_CHARS = 2000

log = structlog.get_logger(__name__)


class StageReport(BaseModel):
    """One task's own account. The task fills in the counts while it works."""

    run_id: str
    stage: str
    shard: int
    attempt: int
    status: Literal["running", "success", "failed"] = "running"
    started_at: datetime
    finished_at: datetime | None = None
    seconds: float = 0.0
    rows_in: int = 0
    rows_out: int = 0
    rejected: int = 0
    skipped: int = 0
    error_type: str | None = None
    error: str | None = None
    details: dict[str, Any] = Field(default_factory=dict)
    """Facts of the task; a stage of several shards shows its first's."""
    totals: dict[str, int] = Field(default_factory=dict)
    """Counts beyond the common ones, which add up over shards."""


@contextmanager
def reported(staging: Staging, run_id: str, stage: str, *, shard: int = 0, attempt: int = 1) -> Iterator[StageReport]:
    """Keep a report of the block in staging, whatever comes of the block.

    A task that is killed leaves `running` behind, which `record_lineage` takes for a failure.
    """
    report = StageReport(run_id=run_id, stage=stage, shard=shard, attempt=attempt, started_at=datetime.now(UTC))
    started = time.perf_counter()
    _save(staging, report)
    try:
        yield report
    except BaseException as error:
        report.status = "failed"
        report.error_type = type(error).__name__
        known = isinstance(error, PersonalizationError)
        message = str(error) if known else f"{type(error).__name__}: {error}"
        report.error = message.encode(errors="backslashreplace").decode()[:_MAX_ERROR_CHARS]
        raise
    else:
        report.status = "success"
    finally:
        report.finished_at = datetime.now(UTC)
        report.seconds = time.perf_counter() - started
        _save(staging, report)
        log.info(
            f"{stage} {report.status}: {report.rows_in:,} in, {report.rows_out:,} out, "
            f"{report.rejected:,} rejected, {report.skipped:,} skipped, {report.seconds:.1f} s"
        )


def forget_reports(staging: Staging, run_id: str, *, first_stage: str) -> None:
    """Drop what an earlier attempt of the run reported of `first_stage` and those behind it, which start anew."""
    folder = staging.root / _FOLDER
    for stage in STAGES[STAGES.index(first_stage) :]:
        for path in folder.glob(f"{stage}-*.json"):
            log.info(f"{run_id}: {path.name} is of an earlier attempt")
            path.unlink(missing_ok=True)


def at_work(staging_uri: str) -> list[datetime]:
    """When the tasks that are at work began, of all runs. Reads the reports of the last day.

    Raises:
        StoreError: the staging folder cannot be read.
    """
    base = UPath(staging_uri).absolute()
    horizon = (datetime.now(UTC) - LONGEST_TASK).timestamp()
    with staging_errors():
        paths = [path for path in base.glob(f"*/{_FOLDER}/*.json") if path.stat().st_mtime > horizon]
        reports = [StageReport.model_validate_json(path.read_bytes()) for path in paths]
    return [report.started_at for report in reports if report.status == "running"]


def record_lineage(run_id: str, staging: Staging, analytics: AnalyticsStore) -> list[dict[str, Any]]:
    """Set the run's rows in `pipeline_runs` from its reports; return them in order of the stages."""
    reports: dict[str, list[StageReport]] = defaultdict(list)
    folder = staging.root / _FOLDER
    for path in sorted(folder.glob("*.json"), key=str) if folder.exists() else []:
        report = StageReport.model_validate_json(path.read_bytes())
        reports[report.stage].append(report)
    failed = any(report.status != "success" for shards in reports.values() for report in shards)
    rows = [
        _stage_row(run_id, position, stage, reports[stage], run_failed=failed) for position, stage in enumerate(STAGES)
    ]
    analytics.ensure_schema()
    analytics.record_runs(rows)
    return rows


def _stage_row(
    run_id: str, position: int, stage: str, reports: list[StageReport], *, run_failed: bool
) -> dict[str, Any]:
    broken = next((report for report in reports if report.status != "success"), None)
    if not reports:
        # Without a failure, a stage has no task only where it is mapped over nothing.
        status, error_type, error = "not_run" if run_failed else "skipped", None, None
    elif broken is None:
        status, error_type, error = "success", None, None
    elif broken.status == "running":
        status, error_type, error = "failed", "Killed", "the task was killed before it could finish"
    else:
        status, error_type, error = "failed", broken.error_type, broken.error
    return {
        "run_id": run_id,
        "stage": stage,
        "position": position,
        "status": status,
        "shards": len(reports),
        "rows_in": sum(report.rows_in for report in reports),
        "rows_out": sum(report.rows_out for report in reports),
        "rejected": sum(report.rejected for report in reports),
        "skipped": sum(report.skipped for report in reports),
        "attempt": max((report.attempt for report in reports), default=0),
        "started_at": min((report.started_at for report in reports), default=None),
        "finished_at": max((report.finished_at for report in reports if report.finished_at), default=None),
        "seconds": sum(report.seconds for report in reports),
        "error_type": error_type,
        "error": error,
        "details": _details(broken or reports[0], reports) if reports else {},
    }


def _details(shown: StageReport, reports: list[StageReport]) -> dict[str, Any]:
    totals: Counter[str] = Counter()
    for report in reports:
        totals.update(report.totals)
    return {**shown.details, **totals}


def _save(staging: Staging, report: StageReport) -> None:
    path = staging.root / _FOLDER / f"{report.stage}-{report.shard:06d}.json"
    write_atomically(path, report.model_dump_json().encode())
