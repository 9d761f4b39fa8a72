"""What happened in a run: a report by every task while it works, rows by stage and by attempt at the end."""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from typing import Any, Literal

import structlog
from pydantic import BaseModel, Field
from upath import UPath

from personalization.errors import PersonalizationError
from personalization.settings import Settings
from personalization.staging import Staging, staging_errors, write_atomically
from personalization.stores.analytics import AnalyticsStore

STAGES = (
    "prepare",
    "ingest",
    "ingest_events",
    "embed_catalog",
    "embed",
    "upsert_vectors",
    "mirror_vectors",
    "detect_intents",
    "build_graph",
    "roll_up_engagement",
    "refresh_profiles",
    "learn",
    "publish",
)

MIGRATION_STAGES = (
    "check",
    "fill",
    "catch_up",
    "verify",
    "swap",
    "embed_catalog",
    "detect_intents",
    "build_graph",
    "roll_up_engagement",
    "learn",
    "publish",
)
"""Of the DAG `reembed`, whose last stages are the pipeline's own."""

LONGEST_TASK = timedelta(hours=24)
"""No task works longer: what still says so was killed."""

_FOLDER = "reports"
_EARLIER = "earlier"
_MAX_ERROR_CHARS = 2000
_MAX_BRIEF_CHARS = 300
# The authority of a URL, an address, a name with a port, and `host='…'` as HTTP clients write it.
_HOST = re.compile(r"(?<=://)[^/\s'\"]+|\b\d+(\.\d+){3}(:\d+)?\b|\b[\w-]+(\.[\w-]+)+:\d+\b|(?<=host=')[^']+")
_COUNTS = ("rows_in", "rows_out", "rejected", "skipped", "bytes_written")

ENDED_UNSEEN = "Ended unseen"
"""The class of error of a task that failed and reported no failure; its log in Airflow says why."""

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
    bytes_written: int = 0
    """Staged files, vectors, and what is served."""
    error_type: str | None = None
    error: str | None = None
    error_brief: str | None = None
    """One line without hosts."""
    model: str | None = None
    code_version: str | None = None
    details: dict[str, Any] = Field(default_factory=dict)
    """Facts of the task; a stage of several shards shows its first's."""
    totals: dict[str, int] = Field(default_factory=dict)
    """Counts beyond the common ones, which add up over shards."""

    @property
    def summary(self) -> str:
        """Its rows in a few words, such as `9,900 in, 100 rejected`."""
        return summarised(self.rows_in, self.rows_out, self.rejected, self.skipped)


def summarised(rows_in: int, rows_out: int, rejected: int, skipped: int) -> str:
    """Rows in a few words; what is zero or goes without saying is left out."""
    parts = [f"{rows_in:,} in"]
    if rows_out != rows_in - rejected - skipped:
        parts.append(f"{rows_out:,} out")
    parts += [f"{count:,} {word}" for count, word in ((rejected, "rejected"), (skipped, "skipped")) if count]
    return ", ".join(parts)


def run_summary(rows: Sequence[dict[str, Any]]) -> str:
    """What became of a run, of the rows that `record_lineage` returns, in a line."""
    by_stage = {row["stage"]: row for row in rows}
    parts = [f"{row['stage']} failed: {row['error_type']}" for row in rows if row["status"] == "failed"]
    for stage, what in (("ingest", "messages"), ("ingest_events", "events"), ("fill", "embedded anew")):
        if (row := by_stage.get(stage)) and row["rows_in"]:
            parts.append(f"{what}: {summarised(*(row[name] for name in _COUNTS[:4]))}")
    retries = sum(row["retries"] for row in rows)
    return "; ".join([*(parts or ["nothing new"]), *([f"{retries:,} retried"] if retries else [])])


def code_version(settings: Settings) -> str:
    """The package's version, and the commit it was built from where that is known."""
    return "+".join(filter(None, (version("personalization-platform"), settings.code_commit[:12])))


@contextmanager
def reported(
    staging: Staging,
    run_id: str,
    stage: str,
    *,
    shard: int = 0,
    attempt: int = 1,
    settings: Settings | None = None,
    model: str | None = None,
) -> Iterator[StageReport]:
    """Keep a report of the block in staging, whatever comes of the block; the settings name the code, and the model
    where none is named.

    A task that is killed leaves `running` behind, which `record_lineage` takes for a failure.
    """
    report = StageReport(run_id=run_id, stage=stage, shard=shard, attempt=attempt, started_at=datetime.now(UTC))
    if settings is not None:
        report.model, report.code_version = model or settings.embedding_model, code_version(settings)
    started, staged_before = time.perf_counter(), staging.bytes_written
    _set_aside_earlier(staging, report)
    _save(staging, report)
    try:
        yield report
    except BaseException as error:
        report.status = "failed"
        report.error_type = type(error).__name__
        known = isinstance(error, PersonalizationError)
        message = str(error) if known else f"{type(error).__name__}: {error}"
        report.error = message.encode(errors="backslashreplace").decode()[:_MAX_ERROR_CHARS]
        report.error_brief = _brief(report.error if known else _HOST.sub("…", report.error))
        raise
    else:
        report.status = "success"
    finally:
        report.finished_at = datetime.now(UTC)
        report.seconds = time.perf_counter() - started
        report.bytes_written += staging.bytes_written - staged_before
        _save(staging, report)
        log.info(
            f"{stage} {report.status}: {report.rows_in:,} in, {report.rows_out:,} out, "
            f"{report.rejected:,} rejected, {report.skipped:,} skipped, {report.seconds:.1f} s"
        )


def forget_reports(staging: Staging, run_id: str, *, first_stage: str) -> None:
    """Set aside what the run reported of `first_stage` and those behind it, which start anew."""
    folder = staging.root / _FOLDER
    for stage in STAGES[STAGES.index(first_stage) :]:
        for path in folder.glob(f"{stage}-*.json"):
            log.info(f"{run_id}: {path.name} is of an earlier attempt")
            _set_aside(path)


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


def record_lineage(
    run_id: str,
    staging: Staging,
    analytics: AnalyticsStore,
    *,
    stages: Sequence[str] = STAGES,
    failed_tasks: Collection[tuple[str, int]] = (),
) -> list[dict[str, Any]]:
    """Set the run's rows in `pipeline_runs` and `stage_attempts` from its reports; return the former, in order.

    `failed_tasks` are those, by stage and shard, of which somebody else knows that they failed: one that was ended
    before or behind its report is no success. Reads each report once; a few statements, whatever their number.
    """
    folder = staging.root / _FOLDER
    newest = {(one.stage, one.shard): one for one in _read(folder)}
    for stage, shard in set(failed_tasks):
        report = newest.get((stage, shard))
        if stage in stages and (report is None or report.status == "success"):
            newest[stage, shard] = _ended_unseen(run_id, stage, shard, report)
    by_stage: dict[str, list[StageReport]] = defaultdict(list)
    for key in sorted(newest):
        by_stage[key[0]].append(newest[key])
    failed = any(report.status != "success" for report in newest.values())
    rows = [
        _stage_row(run_id, position, stage, by_stage[stage], run_failed=failed) for position, stage in enumerate(stages)
    ]
    attempts = [_attempt_row(one) for one in (*_read(folder / _EARLIER), *newest.values()) if one.stage in stages]
    analytics.ensure_schema()
    analytics.record_runs(rows, attempts)
    return rows


def _read(folder: UPath) -> Iterator[StageReport]:
    for path in sorted(folder.glob("*.json"), key=str) if folder.exists() else []:
        yield StageReport.model_validate_json(path.read_bytes())


def _ended_unseen(run_id: str, stage: str, shard: int, report: StageReport | None) -> StageReport:
    report = report or StageReport(run_id=run_id, stage=stage, shard=shard, attempt=1, started_at=datetime.now(UTC))
    words = "the task failed outside its work; its log in Airflow says why"
    return report.model_copy(
        update={"status": "failed", "error_type": ENDED_UNSEEN, "error": words, "error_brief": words}
    )


def _brief(words: str) -> str:
    line = " ".join(words.split())
    return line if len(line) <= _MAX_BRIEF_CHARS else f"{line[: _MAX_BRIEF_CHARS - 1]}…"


def _failure(report: StageReport) -> tuple[str | None, str | None]:
    """The class of the error and its words; None of a success."""
    if report.status == "running":
        return "Killed", "the task was killed before it could finish"
    return report.error_type, report.error


def _stage_row(
    run_id: str, position: int, stage: str, reports: list[StageReport], *, run_failed: bool
) -> dict[str, Any]:
    broken = next((report for report in reports if report.status != "success"), None)
    status = "failed" if broken else "success"
    if not reports:
        # Without a failure, a stage has no task only where it is mapped over nothing.
        status = "not_run" if run_failed else "skipped"
    error_type, error = _failure(broken) if broken else (None, None)
    shown = broken or next(iter(reports), None)
    return {
        "run_id": run_id,
        "stage": stage,
        "position": position,
        "status": status,
        "shards": len(reports),
        **{name: sum(getattr(report, name) for report in reports) for name in _COUNTS},
        "attempt": max((report.attempt for report in reports), default=0),
        "retries": sum(report.attempt - 1 for report in reports),
        "started_at": min((report.started_at for report in reports), default=None),
        "finished_at": max((report.finished_at for report in reports if report.finished_at), default=None),
        "seconds": sum(report.seconds for report in reports),
        "error_type": error_type,
        "error": error,
        "model": shown.model if shown else None,
        "code_version": shown.code_version if shown else None,
        "details": _details(shown, reports) if shown else {},
    }


def _attempt_row(report: StageReport) -> dict[str, Any]:
    copied = ("run_id", "stage", "shard", "attempt", *_COUNTS, "seconds", "model", "code_version")
    error_type, error = _failure(report)
    return {
        **{name: getattr(report, name) for name in copied},
        "status": "success" if report.status == "success" else "failed",
        "started_at": report.started_at,
        "finished_at": report.finished_at,
        "error_type": error_type,
        "error": report.error_brief or error,
    }


def _details(shown: StageReport, reports: list[StageReport]) -> dict[str, Any]:
    totals: Counter[str] = Counter()
    for report in reports:
        totals.update(report.totals)
    return {**shown.details, **totals}


def _save(staging: Staging, report: StageReport) -> None:
    write_atomically(_path(staging, report), report.model_dump_json().encode())


def _path(staging: Staging, report: StageReport) -> UPath:
    return staging.root / _FOLDER / f"{report.stage}-{report.shard:06d}.json"


def _set_aside_earlier(staging: Staging, report: StageReport) -> None:
    """Keep what an attempt before this one reported under a name of its own."""
    path = _path(staging, report)
    if path.exists():
        _set_aside(path)


def _set_aside(path: UPath) -> None:
    report = StageReport.model_validate_json(path.read_bytes())
    folder = path.parent / _EARLIER
    folder.mkdir(parents=True, exist_ok=True)
    path.rename(folder / f"{path.stem}-{report.attempt:03d}.json")
