"""What is wrong with the latest runs, with the evidence and what to do about it.

Two kinds: rules, which are right whatever happened before, and figures that are unusual beside the runs before
(`unusual.py`, `traffic.py`). The rules are cheap and are asked when a page is read; all is recorded after each run.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from textwrap import shorten
from typing import Any

from sqlalchemy import ColumnElement, Engine, Select, and_, case, func, inspect, select
from sqlalchemy.orm import aliased

from personalization.errors import (
    CatalogError,
    EmbeddingError,
    InputError,
    RejectRatioExceededError,
    StagingError,
    StoreError,
)
from personalization.quality.anomaly import Anomaly as Anomaly  # for those who show them
from personalization.quality.reports import latest_totals, newest_runs
from personalization.quality.unusual import BUSY, HISTORY, MORE_REJECTED, RunFigures, StageFigures, unusual
from personalization.schemas import DAY_MS
from personalization.sketches import Sketch
from personalization.stores.analytics import AnalyticsStore, analytics_errors
from personalization.stores.tables import AnomalyRecord, EventRecord, MessageIntent, PipelineRun, RunFigure

HIGH_REJECT_RATIO = 0.1
HIGH_SILENT_SHARE = 0.1
MANY_REJECTED = "Many rejected rows"
JUDGED = 50
"""Latest runs whose anomalies are recorded, where a run is named that is not the last."""

_EVIDENCE_CHARS = 300
_USERS_NAMED = 3
_PAGE = 500
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


def record_anomalies(analytics: AnalyticsStore, run_ids: Sequence[str] | None = None) -> list[Anomaly]:
    """Set the anomalies of the runs, of the latest if none is named; return them. Safe to repeat.

    Runs beyond the `JUDGED` latest are left as they are. Counts what users left in a run once for each run; else some
    queries by index and 10 ms a run.
    """
    engine = analytics.engine
    analytics.ensure_schema()
    known = latest_run_ids(engine, JUDGED + HISTORY)
    judged = known[:1] if run_ids is None else [one for one in known[:JUDGED] if one in set(run_ids)]
    _count_busiest(analytics, known, judged)
    history = load_runs(engine, JUDGED + HISTORY)
    found = [one for one in rule_breaches(engine, JUDGED) if one.run_id in judged]
    for at, run in enumerate(history):
        if run.run_id in judged:
            told = {one.stage for one in found if (one.run_id, one.title) == (run.run_id, MANY_REJECTED)}
            odd = [one for one in unusual(run, history[:at]) if one.title != MORE_REJECTED or one.stage not in told]
            found += [named for one in odd for named in _with_users(engine, one)]
    found = newest_first(found)
    analytics.set_anomalies([to_row(one) for one in found], judged)
    return found


def find_anomalies(engine: Engine, runs: int) -> list[Anomaly]:
    """Every anomaly of the latest runs: newest run first, its errors before its warnings."""
    newest = newest_runs(runs)
    recorded = read_anomalies(engine, AnomalyRecord.run_id.in_(select(newest.c.run_id)))
    return newest_first([*rule_breaches(engine, runs), *recorded])


def anomalies_since(engine: Engine, since: datetime, limit: int) -> list[Anomaly]:
    """What was recorded since, and what the rules find in the latest runs; the newest first."""
    recorded = read_anomalies(engine, AnomalyRecord.run_started_at >= since, limit)
    fresh = [one for one in rule_breaches(engine, JUDGED) if one.run_started_at and one.run_started_at >= since]
    return newest_first([*fresh, *recorded])[:limit]


def read_anomalies(engine: Engine, which: ColumnElement[bool], limit: int = _PAGE) -> list[Anomaly]:
    """Recorded anomalies, the newest of them; none of a database of before there were any."""
    names = [field.name for field in fields(Anomaly)]
    query = (
        select(*(getattr(AnomalyRecord, name) for name in names))
        .where(which)
        .order_by(AnomalyRecord.run_started_at.desc(), AnomalyRecord.anomaly_id)
        .limit(limit)
    )
    with analytics_errors(), engine.connect() as connection:
        if not inspect(connection).has_table(AnomalyRecord.__tablename__):
            return []
        return [Anomaly(**row) for row in connection.execute(query).mappings()]


def rule_breaches(engine: Engine, runs: int) -> list[Anomaly]:
    """What is wrong with the latest runs whatever was before."""
    return [
        *failed_stages(engine, runs),
        *lost_vectors(engine, runs),
        *missing_vectors(engine),
        *empty_stages(engine, runs),
        *high_reject_ratios(engine, runs),
        *users_without_relationships(engine),
    ]


def newest_first(found: Iterable[Anomaly]) -> list[Anomaly]:
    """Each once: the newest run first, its errors before its warnings."""
    once = {one.anomaly_id: one for one in found}
    long_ago = datetime.min.replace(tzinfo=UTC)
    by_severity = sorted(once.values(), key=lambda one: one.severity)
    return sorted(by_severity, key=lambda one: (one.run_started_at or long_ago, one.run_id or ""), reverse=True)


def to_row(one: Anomaly) -> dict[str, Any]:
    """As the table `anomalies` has it."""
    return {"anomaly_id": one.anomaly_id, **asdict(one)}


def latest_run_ids(engine: Engine, runs: int) -> list[str]:
    """The newest first."""
    newest = newest_runs(runs)
    with analytics_errors(), engine.connect() as connection:
        query = select(newest.c.run_id).order_by(newest.c.run_started_at.desc(), newest.c.run_id.desc())
        return list(connection.scalars(query))


def load_runs(engine: Engine, runs: int) -> list[RunFigures]:
    """The figures of the latest runs, oldest first. Two queries."""
    newest = newest_runs(runs)
    of_embed = PipelineRun.stage == "embed"
    stages = (
        select(
            newest,
            PipelineRun.stage,
            PipelineRun.status,
            PipelineRun.seconds,
            PipelineRun.rows_in,
            PipelineRun.rows_out,
            PipelineRun.rejected,
            PipelineRun.skipped,
            case((of_embed, PipelineRun.details["sketch"].as_json())).label("sketch"),
            case((of_embed, PipelineRun.details["model"].as_string())).label("model"),
        )
        .join(PipelineRun, PipelineRun.run_id == newest.c.run_id)
        .where(newest.c.run_started_at.is_not(None))
        .order_by(newest.c.run_started_at, newest.c.run_id, PipelineRun.position)
    )
    figures = select(RunFigure).where(RunFigure.run_id.in_(select(newest.c.run_id)))
    found: dict[str, RunFigures] = {}
    with analytics_errors(), engine.connect() as connection:
        for row in connection.execute(stages):
            run = found.setdefault(row.run_id, RunFigures(row.run_id, row.run_started_at, {}, True))
            if row.status == "success":
                counts = (row.seconds, row.rows_in, row.rows_out, row.rejected, row.skipped)
                run.stages[row.stage] = StageFigures(*counts)
            if row.status == "failed":
                run = replace(run, succeeded=False)
            if row.sketch is not None:
                run = replace(run, sketch=Sketch.from_details(row.sketch), model=row.model)
            found[row.run_id] = run
        for one in connection.execute(figures.with_only_columns(RunFigure.run_id, RunFigure.name, RunFigure.value)):
            if one.run_id in found:
                found[one.run_id].busiest[one.name] = one.value
    return list(found.values())


def _count_busiest(analytics: AnalyticsStore, known: Sequence[str], judged: Sequence[str]) -> None:
    """Keep, of the runs without it and of those judged, the most that one user left on one day."""
    with analytics_errors(), analytics.engine.connect() as connection:
        counted = set(connection.scalars(select(RunFigure.run_id).where(RunFigure.run_id.in_(known))))
        wanted = [one for one in known if one not in counted or one in judged]
        rows = []
        for name in ("messages", "events"):
            by_user = _by_user_and_day(name, wanted).subquery()
            busiest = select(by_user.c.run_id, func.max(by_user.c.count)).group_by(by_user.c.run_id)
            rows += [{"run_id": run_id, "name": name, "value": most} for run_id, most in connection.execute(busiest)]
    left_none = set(wanted) - {row["run_id"] for row in rows}
    rows += [{"run_id": one, "name": "messages", "value": 0} for one in left_none]
    analytics.set_run_figures(wanted, rows)


def _by_user_and_day(name: str, run_ids: Sequence[str]) -> Select[Any]:
    """`run_id, user_id, count` of what users left on each day: messages, or events that are no impressions."""
    table: Any
    which: list[ColumnElement[bool]]
    if name == "messages":
        table = MessageIntent
        count, which = func.count(MessageIntent.message_id.distinct()), [MessageIntent.run_id.in_(run_ids)]
    else:
        table = EventRecord
        count, which = func.count(), [EventRecord.run_id.in_(run_ids), EventRecord.event != "impression"]
    day = table.timestamp - table.timestamp % DAY_MS
    return (
        select(table.run_id, table.user_id, count.label("count"))
        .where(*which)
        .group_by(table.run_id, table.user_id, day)
    )


def _with_users(engine: Engine, one: Anomaly) -> list[Anomaly]:
    """One for each of the busiest users, where it is about users: it goes with their erasure."""
    if one.title != BUSY or one.observed is None or one.expected is None or one.run_id is None:
        return [one]
    by_user = _by_user_and_day("messages" if one.stage == "ingest" else "events", [one.run_id]).subquery()
    most = func.max(by_user.c.count)
    line = (one.observed * one.expected) ** 0.5  # half-way, by their logarithms
    query = (
        select(by_user.c.user_id, most)
        .group_by(by_user.c.user_id)
        .having(most >= line)
        .order_by(most.desc(), by_user.c.user_id)
        .limit(_USERS_NAMED)
    )
    with analytics_errors(), engine.connect() as connection:
        users = connection.execute(query).all()
    return [
        replace(
            one,
            user_id=user_id,
            observed=float(count),
            evidence=f"{user_id} left {count:,} on one day. {one.evidence}",
        )
        for user_id, count in users
    ]


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
            title=MANY_REJECTED,
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
    """Whether a tenth of the users stood alone in the graph when a run was last published."""
    totals = latest_totals(engine)
    if totals is None or not totals.users or not totals.users_without_intent:
        return []
    alone = totals.users_without_intent
    if alone < HIGH_SILENT_SHARE * totals.users:
        return []
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
