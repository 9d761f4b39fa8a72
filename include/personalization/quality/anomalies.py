"""What is wrong with the latest runs, with the evidence and what to do about it."""

from dataclasses import dataclass
from datetime import UTC, datetime
from textwrap import shorten
from typing import Any, Literal

from sqlalchemy import ColumnElement, Engine, and_, select
from sqlalchemy.orm import aliased

from personalization.errors import (
    CatalogError,
    EmbeddingError,
    InputError,
    RejectRatioExceededError,
    StagingError,
    StoreError,
)
from personalization.quality.reports import latest_totals, newest_runs
from personalization.stores.analytics import PipelineRun, analytics_errors

HIGH_REJECT_RATIO = 0.1

_EVIDENCE_CHARS = 300
_RUN_AGAIN = "run the pipeline again: it is safe to repeat and takes up what is unfinished."
_CAUSES = {
    InputError.__name__: "Correct the input file",
    RejectRatioExceededError.__name__: "Look at the quarantined rows and correct the input file",
    CatalogError.__name__: "Correct the campaign catalog",
    EmbeddingError.__name__: "Check EMBEDDING_MODEL and EMBEDDING_DIM",
    StagingError.__name__: "Check STAGING_URI and the space that is left there",
    StoreError.__name__: "Check that the store is up and its settings are right",
    "Killed": "Check that the worker has memory enough",
}


@dataclass(frozen=True)
class Anomaly:
    """Something a person should look at."""

    severity: Literal["error", "warning"]
    run_id: str
    run_started_at: datetime | None
    stage: str
    title: str
    evidence: str
    advice: str


def find_anomalies(engine: Engine, runs: int) -> list[Anomaly]:
    """Every anomaly of the latest runs: newest run first, its errors before its warnings."""
    found = [
        *failed_stages(engine, runs),
        *lost_vectors(engine, runs),
        *missing_vectors(engine),
        *empty_stages(engine, runs),
        *high_reject_ratios(engine, runs),
        *users_without_relationships(engine),
    ]
    long_ago = datetime.min.replace(tzinfo=UTC)
    found.sort(key=lambda one: one.severity)
    return sorted(found, key=lambda one: (one.run_started_at or long_ago, one.run_id), reverse=True)


def failed_stages(engine: Engine, runs: int) -> list[Anomaly]:
    """Stages that failed."""
    return [
        Anomaly(
            severity="error",
            run_id=row.run_id,
            run_started_at=row.run_started_at,
            stage=row.stage,
            title=f"Failed with {row.error_type or 'an unknown error'}",
            evidence=shorten(row.error or "No message was recorded.", _EVIDENCE_CHARS, placeholder=" …"),
            advice=f"{_CAUSES.get(row.error_type, 'Read the log of the task')}, then {_RUN_AGAIN}",
        )
        for row in _suspect_stages(engine, runs, PipelineRun.status == "failed")
    ]


def empty_stages(engine: Engine, runs: int) -> list[Anomaly]:
    """Stages that succeeded and wrote nothing, though there was something to do."""
    rows_to_do = PipelineRun.rows_in - PipelineRun.skipped - PipelineRun.rejected
    suspect = and_(PipelineRun.status == "success", PipelineRun.rows_out == 0, rows_to_do > 0)
    return [
        Anomaly(
            severity="warning",
            run_id=row.run_id,
            run_started_at=row.run_started_at,
            stage=row.stage,
            title="Wrote nothing",
            evidence=f"{row.rows_in:,} rows in, {row.skipped:,} skipped, {row.rejected:,} rejected, 0 out.",
            advice=f"Read the log of the task, then {_RUN_AGAIN}",
        )
        for row in _suspect_stages(engine, runs, suspect)
    ]


def high_reject_ratios(engine: Engine, runs: int) -> list[Anomaly]:
    """Stages that quarantined more than a tenth of their rows."""
    suspect = and_(PipelineRun.rows_in > 0, PipelineRun.rejected > HIGH_REJECT_RATIO * PipelineRun.rows_in)
    return [
        Anomaly(
            severity="warning",
            run_id=row.run_id,
            run_started_at=row.run_started_at,
            stage=row.stage,
            title="Many rejected rows",
            evidence=f"{row.rejected:,} of {row.rows_in:,} rows ({row.rejected / row.rows_in:.0%}).",
            advice="Look at the reasons in the quarantine, correct the source and send the rows again.",
        )
        for row in _suspect_stages(engine, runs, suspect)
    ]


def lost_vectors(engine: Engine, runs: int) -> list[Anomaly]:
    """Runs whose stages disagree on how many vectors there are."""
    newest = newest_runs(runs)
    embed, upsert = aliased(PipelineRun), aliased(PipelineRun)
    query = (
        select(newest, embed.rows_out.label("embedded"), upsert.rows_out.label("written"))
        .join(embed, and_(embed.run_id == newest.c.run_id, embed.stage == "embed"))
        .join(upsert, and_(upsert.run_id == newest.c.run_id, upsert.stage == "upsert_vectors"))
        .where(embed.status == "success", upsert.status == "success", embed.rows_out != upsert.rows_out)
    )
    with analytics_errors(), engine.connect() as connection:
        return [
            Anomaly(
                severity="error",
                run_id=row.run_id,
                run_started_at=row.run_started_at,
                stage="upsert_vectors",
                title="Embedded and written vectors differ",
                evidence=f"{row.embedded:,} messages embedded, {row.written:,} vectors written.",
                advice=f"Check that Milvus is healthy, then {_RUN_AGAIN}",
            )
            for row in connection.execute(query)
        ]


def missing_vectors(engine: Engine) -> list[Anomaly]:
    """Whether messages were without a vector when a run was last published."""
    totals = latest_totals(engine)
    if totals is None or totals.messages is None or totals.vectors is None:
        return []
    if (missing := totals.messages - totals.vectors) <= 0:
        return []
    return [
        Anomaly(
            severity="error",
            run_id=totals.run_id,
            run_started_at=totals.run_started_at,
            stage="publish",
            title="Messages without a vector",
            evidence=f"{missing:,} of {totals.messages:,} messages in MongoDB have no vector in Milvus.",
            advice=f"Check that Milvus is healthy, then {_RUN_AGAIN}",
        )
    ]


def users_without_relationships(engine: Engine) -> list[Anomaly]:
    """Whether users stood alone in the graph when a run was last published."""
    totals = latest_totals(engine)
    if totals is None or not totals.users or not totals.users_without_intent:
        return []
    alone = totals.users_without_intent
    return [
        Anomaly(
            severity="warning",
            run_id=totals.run_id,
            run_started_at=totals.run_started_at,
            stage="build_graph",
            title="Users without relationships",
            evidence=f"{alone:,} of {totals.users:,} users ({alone / totals.users:.1%}) expressed no intent.",
            advice="They get popular campaigns. Where they are many, add example utterances to the catalog "
            "or raise INTENT_KEEP.",
        )
    ]


def _suspect_stages(engine: Engine, runs: int, suspect: ColumnElement[bool]) -> list[Any]:
    newest = newest_runs(runs)
    query = select(
        newest,
        PipelineRun.stage,
        PipelineRun.rows_in,
        PipelineRun.skipped,
        PipelineRun.rejected,
        PipelineRun.error_type,
        PipelineRun.error,
    ).join(PipelineRun, PipelineRun.run_id == newest.c.run_id)
    with analytics_errors(), engine.connect() as connection:
        return list(connection.execute(query.where(suspect).order_by(PipelineRun.position)))
