"""What the dashboard shows, as typed rows. Each report is one bounded query; sums are the database's."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import BigInteger, ColumnElement, Engine, Executable, Subquery, and_, case, cast, func, inspect, select
from sqlalchemy.orm import aliased

from personalization.stores.analytics import analytics_errors
from personalization.stores.tables import CampaignRecord, EvaluationResult, PipelineRun, StageAttempt, UserEngagement

SHIPPED = "shipped"
"""The policy that the API answers with."""


@dataclass(frozen=True)
class RunSummary:
    """One run, over its stages. The row counts are those of its ingest stage."""

    run_id: str
    started_at: datetime | None
    status: Literal["success", "failed"]
    failed_stages: str | None
    seconds: float
    """Work time of all stages."""
    rows_read: int
    staged: int
    """New or changed messages, and those an earlier run left unfinished."""
    skipped: int
    """Unchanged or repeated."""
    rejected: int


@dataclass(frozen=True)
class WantedRuns:
    """Which runs are asked for."""

    status: Literal["success", "failed"] | None = None
    """How they ended; None for all."""
    name: str = ""
    """Part of the run's id, in any case."""


@dataclass(frozen=True)
class StageRun:
    """One stage of one run."""

    run_id: str
    stage: str
    position: int
    status: Literal["success", "failed", "skipped", "not_run"]
    rows_in: int
    rows_out: int
    rejected: int
    skipped: int
    shards: int
    attempt: int
    started_at: datetime | None
    finished_at: datetime | None
    seconds: float
    error_type: str | None
    error: str | None
    details: dict[str, Any]
    bytes_written: int
    retries: int
    model: str | None
    code_version: str | None

    @property
    def rows_per_second(self) -> float | None:
        """Rows read per second of work."""
        return self.rows_in / self.seconds if self.seconds else None


@dataclass(frozen=True)
class Attempt:
    """One attempt of one task of a run."""

    stage: str
    shard: int
    attempt: int
    status: Literal["success", "failed"]
    rows_in: int
    rows_out: int
    rejected: int
    skipped: int
    bytes_written: int
    started_at: datetime | None
    seconds: float
    error_type: str | None
    error: str | None


@dataclass(frozen=True)
class StageTiming:
    """How long one stage took in one run, and over how many rows."""

    run_id: str
    run_started_at: datetime | None
    stage: str
    position: int
    seconds: float
    rows_in: int

    @property
    def rows_per_second(self) -> float | None:
        """Rows read per second of work; none where the stage had nothing to do."""
        return self.rows_in / self.seconds if self.seconds and self.rows_in else None


@dataclass(frozen=True)
class Totals:
    """What the stores held when a run was last published."""

    run_id: str
    run_started_at: datetime | None
    published_at: datetime | None
    messages: int | None
    vectors: int | None
    users: int | None
    users_without_intent: int | None


@dataclass(frozen=True)
class CampaignEngagement:
    """A campaign with its engagement over all users."""

    campaign_id: str
    name: str
    category: str
    active_from: int
    active_until: int
    users: int
    messages: int
    last_at: int | None
    """The last message that speaks to it, in epoch milliseconds."""
    impressions: int
    clicks: int
    conversions: int
    dismisses: int
    shown_to: int
    """Users who saw it."""
    clicked_by: int
    """Those of them who clicked."""
    converted_by: int
    """Those of these who converted."""

    def state(self, now: datetime) -> Literal["upcoming", "active", "ended"]:
        """Where `now` lies in relation to the campaign's active window."""
        moment = now.timestamp() * 1000
        if moment < self.active_from:
            return "upcoming"
        return "active" if moment < self.active_until else "ended"


@dataclass(frozen=True)
class CategoryEngagement:
    """The campaigns of a category. A message that speaks to two of them counts twice."""

    category: str
    messages: int
    last_at: int | None


@dataclass(frozen=True)
class EngagedUser:
    """A user's messages that speak to a campaign."""

    user_id: str
    messages: int
    last_at: int


@dataclass(frozen=True)
class PolicyResult:
    """What a policy reached in an offline evaluation, by one metric over one segment of the users."""

    policy: str
    metric: str
    segment: Literal["all", "cold", "warm"]
    answers: int
    mean: float
    low: float | None
    high: float | None
    diff_mean: float | None
    """How far `shipped` is ahead of the policy, with the 95 % interval of that."""
    diff_low: float | None
    diff_high: float | None

    @property
    def kind(self) -> Literal["shipped", "variant", "baseline"]:
        """What the API answers with, a variant of it, or what it must beat."""
        if self.policy == SHIPPED:
            return "shipped"
        return "variant" if self.policy.startswith(("fusion", "learned")) else "baseline"


@dataclass(frozen=True)
class Evaluation:
    """One offline evaluation."""

    evaluation_id: str
    created_at: datetime
    task: Literal["new", "any"]
    split_at: datetime
    splits: int
    users: int
    answers: int
    horizon_days: float
    results: list[PolicyResult]

    def of(self, metric: str, segment: str = "all") -> list[PolicyResult]:
        """The policies' results by the metric, best first."""
        chosen = [one for one in self.results if (one.metric, one.segment) == (metric, segment)]
        return sorted(chosen, key=lambda one: (-one.mean, one.policy))


@dataclass(frozen=True)
class EvaluationPoint:
    """NDCG@10 of one policy in one of several evaluations."""

    created_at: datetime
    policy: str
    mean: float
    low: float
    high: float


def has_runs(engine: Engine) -> bool:
    """Whether any run was recorded. A database without tables has none."""
    with analytics_errors(), engine.connect() as connection:
        if not inspect(connection).has_table(PipelineRun.__tablename__):
            return False
        return connection.execute(select(PipelineRun.run_id).limit(1)).first() is not None


def latest_evaluation(engine: Engine) -> Evaluation | None:
    """The newest offline evaluation, with all its figures; None before the first."""
    with analytics_errors(), engine.connect() as connection:
        if not inspect(connection).has_table(EvaluationResult.__tablename__):
            return None
    newest = (
        select(EvaluationResult.evaluation_id)
        .order_by(EvaluationResult.created_at.desc(), EvaluationResult.evaluation_id)
        .limit(1)
        .scalar_subquery()
    )
    rows = _rows(engine, select(EvaluationResult.__table__).where(EvaluationResult.evaluation_id == newest))
    if not rows:
        return None
    names = [field.name for field in fields(PolicyResult)]
    results = [PolicyResult(**{name: row[name] for name in names}) for row in rows]
    common = [field.name for field in fields(Evaluation) if field.name != "results"]
    whole = next((row for row in rows if row["segment"] == "all"), rows[0])
    return Evaluation(**{name: whole[name] for name in common}, results=results)


def evaluation_history(engine: Engine, task: str, policies: Sequence[str], limit: int) -> list[EvaluationPoint]:
    """NDCG@10 of the policies over all users in the latest evaluations of the task, oldest first."""
    chosen = (
        EvaluationResult.task == task,
        EvaluationResult.metric == "ndcg@10",
        EvaluationResult.segment == "all",
    )
    names = (EvaluationResult.created_at, EvaluationResult.evaluation_id)
    newest = select(*names).distinct().where(*chosen).order_by(names[0].desc(), names[1]).limit(limit).subquery()
    query = (
        select(
            EvaluationResult.created_at,
            EvaluationResult.policy,
            EvaluationResult.mean,
            EvaluationResult.low,
            EvaluationResult.high,
        )
        .join(newest, newest.c.evaluation_id == EvaluationResult.evaluation_id)
        .where(*chosen, EvaluationResult.policy.in_(policies))
        .order_by(EvaluationResult.created_at, EvaluationResult.policy)
    )
    return [EvaluationPoint(**row) for row in _rows(engine, query)]


def newest_runs(limit: int, offset: int = 0, wanted: WantedRuns | None = None) -> Subquery:
    """`run_id` and `run_started_at` of the latest runs, read off an index that is in this order."""
    return (
        select(PipelineRun.run_id, PipelineRun.started_at.label("run_started_at"))
        .where(*_first_stages(wanted))
        .order_by(PipelineRun.started_at.desc(), PipelineRun.run_id.desc())
        .limit(limit)
        .offset(offset)
        .subquery("newest")
    )


def _first_stages(wanted: WantedRuns | None) -> list[ColumnElement[bool]]:
    """What says that a row is the first stage of a run that is wanted."""
    conditions = [PipelineRun.position == 0]
    if wanted and wanted.status:
        failed = PipelineRun.run_id.in_(select(PipelineRun.run_id).where(PipelineRun.status == "failed"))
        conditions.append(failed if wanted.status == "failed" else ~failed)
    if wanted and wanted.name:
        conditions.append(PipelineRun.run_id.icontains(wanted.name, autoescape=True))
    return conditions


def count_runs(engine: Engine, wanted: WantedRuns | None = None) -> int:
    """How many runs there are."""
    with analytics_errors(), engine.connect() as connection:
        return connection.execute(select(func.count()).where(*_first_stages(wanted))).scalar_one()


def latest_runs(engine: Engine, limit: int, offset: int = 0, wanted: WantedRuns | None = None) -> list[RunSummary]:
    """The latest runs, newest first, from the given place on."""
    newest = newest_runs(limit, offset, wanted)
    failed = PipelineRun.status == "failed"
    query = (
        select(
            newest.c.run_id,
            newest.c.run_started_at.label("started_at"),
            func.max(case((failed, "failed"), else_="")).label("status"),
            func.aggregate_strings(case((failed, PipelineRun.stage)), ", ").label("failed_stages"),
            func.sum(PipelineRun.seconds).label("seconds"),
            *(
                func.max(case((PipelineRun.stage == "ingest", column), else_=0)).label(label)
                for column, label in (
                    (PipelineRun.rows_in, "rows_read"),
                    (PipelineRun.rows_out, "staged"),
                    (PipelineRun.skipped, "skipped"),
                    (PipelineRun.rejected, "rejected"),
                )
            ),
        )
        .join(newest, newest.c.run_id == PipelineRun.run_id)
        .group_by(newest.c.run_id, newest.c.run_started_at)
        .order_by(newest.c.run_started_at.desc(), newest.c.run_id.desc())
    )
    return [RunSummary(**{**row, "status": row["status"] or "success"}) for row in _rows(engine, query)]


def stages_of_run(engine: Engine, run_id: str) -> list[StageRun]:
    """The stages of a run, in order."""
    query = select(PipelineRun.__table__).where(PipelineRun.run_id == run_id).order_by(PipelineRun.position)
    return [StageRun(**row) for row in _rows(engine, query)]


def attempts_of_run(engine: Engine, run_id: str, limit: int) -> list[Attempt]:
    """The attempts of the run's tasks: those that failed first, then as they began."""
    columns = [getattr(StageAttempt, field.name) for field in fields(Attempt)]
    query = (
        select(*columns)
        .where(StageAttempt.run_id == run_id)
        .order_by(StageAttempt.status, StageAttempt.started_at, StageAttempt.stage, StageAttempt.shard)
        .limit(limit)
    )
    with analytics_errors(), engine.connect() as connection:
        if not inspect(connection).has_table(StageAttempt.__tablename__):
            return []
    return [Attempt(**row) for row in _rows(engine, query)]


def stage_timings(engine: Engine, limit: int) -> list[StageTiming]:
    """The stages of the latest runs that succeeded, oldest run first."""
    newest = newest_runs(limit)
    query = (
        select(
            newest,
            PipelineRun.stage,
            PipelineRun.position,
            PipelineRun.seconds,
            PipelineRun.rows_in,
        )
        .join(PipelineRun, PipelineRun.run_id == newest.c.run_id)
        .where(PipelineRun.status == "success")
        .order_by(newest.c.run_started_at, newest.c.run_id, PipelineRun.position)
    )
    return [StageTiming(**row) for row in _rows(engine, query)]


def latest_totals(engine: Engine) -> Totals | None:
    """What the stores held after the latest publish, if there was one."""
    first = aliased(PipelineRun)
    query = (
        select(
            PipelineRun.run_id,
            first.started_at.label("run_started_at"),
            PipelineRun.finished_at.label("published_at"),
            *(
                PipelineRun.details[name].as_integer().label(name)
                for name in ("messages", "vectors", "users", "users_without_intent")
            ),
        )
        .join(first, and_(first.run_id == PipelineRun.run_id, first.position == 0))
        .where(PipelineRun.stage == "publish", PipelineRun.status == "success")
        .order_by(first.started_at.desc())
        .limit(1)
    )
    return next((Totals(**row) for row in _rows(engine, query)), None)


def campaign_engagement(engine: Engine, limit: int) -> list[CampaignEngagement]:
    """The campaigns, most engaged first."""
    query = (
        select(CampaignRecord.__table__)
        .order_by(CampaignRecord.users.desc(), CampaignRecord.messages.desc(), CampaignRecord.campaign_id)
        .limit(limit)
    )
    return [CampaignEngagement(**row) for row in _rows(engine, query)]


def category_engagement(engine: Engine, limit: int) -> list[CategoryEngagement]:
    """The categories of the catalog, most engaged first."""
    messages = cast(func.sum(CampaignRecord.messages), BigInteger)
    query = (
        select(
            CampaignRecord.category,
            messages.label("messages"),
            func.max(CampaignRecord.last_at).label("last_at"),
        )
        .group_by(CampaignRecord.category)
        .order_by(messages.desc(), CampaignRecord.category)
        .limit(limit)
    )
    return [CategoryEngagement(**row) for row in _rows(engine, query)]


def top_users(engine: Engine, campaign_id: str, limit: int) -> list[EngagedUser]:
    """The users with most messages that speak to the campaign."""
    query = (
        select(UserEngagement.user_id, UserEngagement.count.label("messages"), UserEngagement.last_at)
        .where(UserEngagement.campaign_id == campaign_id, UserEngagement.count > 0)
        .order_by(UserEngagement.count.desc(), UserEngagement.user_id)
        .limit(limit)
    )
    return [EngagedUser(**row) for row in _rows(engine, query)]


def _rows(engine: Engine, query: Executable) -> list[dict[str, Any]]:
    with analytics_errors(), engine.connect() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]
