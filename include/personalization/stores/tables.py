"""Tables of the analytics database."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    DateTime,
    Dialect,
    Double,
    Index,
    LargeBinary,
    String,
    Table,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from personalization.schemas import LATENCY_BOUNDS_S


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC datetime; SQLite itself keeps no zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Store as UTC."""
        return value.astimezone(UTC) if value else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Read back as aware UTC."""
        return value.replace(tzinfo=UTC) if value and value.tzinfo is None else value


class Base(DeclarativeBase):
    """Tables of the analytics database."""


class PipelineRun(Base):
    """Lineage: one row per (run, stage), over all shards of the stage."""

    __tablename__ = "pipeline_runs"
    __table_args__ = (
        Index("ix_pipeline_runs_newest", "position", "started_at", "run_id"),
        Index("ix_pipeline_runs_status", "status", "run_id"),
    )

    run_id: Mapped[str] = mapped_column(String(250), primary_key=True)
    stage: Mapped[str] = mapped_column(String(64), primary_key=True)
    position: Mapped[int]
    """Place of the stage in the run, from 0."""
    status: Mapped[str] = mapped_column(String(16))
    """`success`, `failed`, `not_run` after an earlier failure, `skipped` where there was nothing to map over."""
    rows_in: Mapped[int] = mapped_column(BigInteger, default=0)
    rows_out: Mapped[int] = mapped_column(BigInteger, default=0)
    rejected: Mapped[int] = mapped_column(BigInteger, default=0)
    skipped: Mapped[int] = mapped_column(BigInteger, default=0)
    """Rows there was nothing to do for: unchanged, or of no intent."""
    shards: Mapped[int] = mapped_column(default=0)
    attempt: Mapped[int] = mapped_column(default=0)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime, index=True)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    seconds: Mapped[float] = mapped_column(default=0.0)
    """Work time, summed over shards."""
    error_type: Mapped[str | None] = mapped_column(String(128))
    error: Mapped[str | None]
    details: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    bytes_written: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    """Staged files and stored vectors, summed over shards."""
    retries: Mapped[int] = mapped_column(default=0, server_default="0")
    """Attempts beyond the first, summed over shards."""
    model: Mapped[str | None] = mapped_column(String(250))
    """The embedding model of the run; none where the stage was not run."""
    code_version: Mapped[str | None] = mapped_column(String(64))


class StageAttempt(Base):
    """Lineage: one row per attempt of each task of a run, those that failed and were retried too."""

    __tablename__ = "stage_attempts"

    run_id: Mapped[str] = mapped_column(String(250), primary_key=True)
    stage: Mapped[str] = mapped_column(String(64), primary_key=True)
    shard: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """Map index; 0 for a task that is not mapped."""
    attempt: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    status: Mapped[str] = mapped_column(String(16))
    """`success` or `failed`."""
    rows_in: Mapped[int] = mapped_column(BigInteger)
    rows_out: Mapped[int] = mapped_column(BigInteger)
    rejected: Mapped[int] = mapped_column(BigInteger)
    skipped: Mapped[int] = mapped_column(BigInteger)
    bytes_written: Mapped[int] = mapped_column(BigInteger)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    seconds: Mapped[float]
    error_type: Mapped[str | None] = mapped_column(String(128))
    error: Mapped[str | None]
    """One line, cut short; the whole one is the task's log."""
    model: Mapped[str | None] = mapped_column(String(250))
    code_version: Mapped[str | None] = mapped_column(String(64))


class MessageIntent(Base):
    """One row per (message, intent it expresses); `other` where it expresses none."""

    __tablename__ = "message_intents"
    __table_args__ = (
        Index("ix_message_intents_run_user", "run_id", "user_id"),
        Index("ix_message_intents_time", "timestamp", "message_id"),
    )

    message_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    intent_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    user_id: Mapped[str] = mapped_column(String(128), index=True)
    timestamp: Mapped[int] = mapped_column(BigInteger)
    """Epoch milliseconds."""
    confidence: Mapped[float]
    """Calibrated probability of the intent; of `other`, how far the message is out of scope."""
    run_id: Mapped[str] = mapped_column(String(250))
    """The run that embedded the message."""


class EventRecord(Base):
    """One row per event: what a user did with a campaign, which may have left the catalog."""

    __tablename__ = "events"
    __table_args__ = (
        Index("ix_events_run_user", "run_id", "user_id"),
        Index("ix_events_user_campaign", "user_id", "campaign_id"),
        Index("ix_events_campaign_time", "campaign_id", "timestamp"),
        Index("ix_events_time", "timestamp", "event_id"),
        Index("ix_events_day", "timestamp", "campaign_id", "event"),
    )

    event_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    user_id: Mapped[str] = mapped_column(String(128))
    campaign_id: Mapped[str] = mapped_column(String(128))
    event: Mapped[str] = mapped_column(String(16))
    """An `EventKind`."""
    timestamp: Mapped[int] = mapped_column(BigInteger)
    """Epoch milliseconds."""
    position: Mapped[int | None]
    propensity: Mapped[float | None]
    policy: Mapped[str | None] = mapped_column(String(64))
    run_id: Mapped[str] = mapped_column(String(250))
    """The run that last took the event."""


class CampaignRecord(Base):
    """One row per campaign of the catalog, with its engagement over all users."""

    __tablename__ = "campaigns"

    campaign_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    name: Mapped[str]
    category: Mapped[str] = mapped_column(String(64))
    active_from: Mapped[int] = mapped_column(BigInteger)
    active_until: Mapped[int] = mapped_column(BigInteger)
    users: Mapped[int] = mapped_column(BigInteger, default=0)
    """Users with a positive signal: a mention, click or conversion."""
    messages: Mapped[int] = mapped_column(BigInteger, default=0)
    last_at: Mapped[int | None] = mapped_column(BigInteger)
    """The last message that speaks to it."""
    impressions: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    clicks: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    conversions: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    dismisses: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    shown_to: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    """Users who saw it."""
    clicked_by: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    """Those of `shown_to` who clicked."""
    converted_by: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    """Those of `clicked_by` who converted."""


class CampaignTarget(Base):
    """One row per (campaign, intent it targets)."""

    __tablename__ = "campaign_targets"

    campaign_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    intent_id: Mapped[str] = mapped_column(String(128), primary_key=True, index=True)


class UserEngagement(Base):
    """One row per (user, campaign): messages that speak to the campaign in its active window, and events.

    The columns are those of `schemas.Engagement`.
    """

    __tablename__ = "user_engagement"

    user_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    campaign_id: Mapped[str] = mapped_column(String(128), primary_key=True, index=True)
    count: Mapped[int] = mapped_column(BigInteger)
    last_at: Mapped[int] = mapped_column(BigInteger)
    impressions: Mapped[int] = mapped_column(BigInteger, server_default="0")
    clicks: Mapped[int] = mapped_column(BigInteger, server_default="0")
    conversions: Mapped[int] = mapped_column(BigInteger, server_default="0")
    dismisses: Mapped[int] = mapped_column(BigInteger, server_default="0")
    last_event_at: Mapped[int | None] = mapped_column(BigInteger)
    last_impression_at: Mapped[int | None] = mapped_column(BigInteger)
    last_conversion_at: Mapped[int | None] = mapped_column(BigInteger)
    last_dismiss_at: Mapped[int | None] = mapped_column(BigInteger)
    weight: Mapped[float] = mapped_column(server_default="0")
    weight_at: Mapped[int | None] = mapped_column(BigInteger)


class UserWeek(Base):
    """One row per (user, week in which they did something): spoke, clicked, converted or dismissed."""

    __tablename__ = "user_weeks"
    __table_args__ = (Index("ix_user_weeks_cohort", "first_week", "week"),)

    user_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    week: Mapped[int] = mapped_column(primary_key=True)
    """Whole weeks since the Monday before the epoch, in UTC."""
    first_week: Mapped[int]
    """The user's first of them."""


class EvaluationResult(Base):
    """One row per figure of an offline evaluation: a metric of a policy over a segment of the users."""

    __tablename__ = "evaluations"

    evaluation_id: Mapped[str] = mapped_column(String(250), primary_key=True)
    policy: Mapped[str] = mapped_column(String(64), primary_key=True)
    metric: Mapped[str] = mapped_column(String(64), primary_key=True)
    segment: Mapped[str] = mapped_column(String(16), primary_key=True)
    """`all`, `cold` or `warm`."""
    mean: Mapped[float]
    low: Mapped[float | None]
    """Of the 95 % interval, as `high`; none for what is no mean over users."""
    high: Mapped[float | None]
    diff_mean: Mapped[float | None]
    """How far `shipped` is ahead of the policy, user by user; none where that was not measured."""
    diff_low: Mapped[float | None]
    diff_high: Mapped[float | None]
    task: Mapped[str] = mapped_column(String(16))
    split_at: Mapped[datetime] = mapped_column(UtcDateTime)
    """The first split."""
    splits: Mapped[int]
    users: Mapped[int] = mapped_column(BigInteger)
    """Of the evaluation."""
    answers: Mapped[int] = mapped_column(BigInteger)
    """Lists that the mean is taken over: one for each user and split of the segment."""
    horizon_days: Mapped[float]
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)


class AuditRun(Base):
    """One row per audit of the stores."""

    __tablename__ = "audits"

    audit_id: Mapped[str] = mapped_column(String(250), primary_key=True)
    started_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    finished_at: Mapped[datetime] = mapped_column(UtcDateTime)
    status: Mapped[str] = mapped_column(String(16))
    """`clean`, `repaired` (there was drift, none is left), or `drift`."""
    repair: Mapped[bool]
    """Whether a repair was asked for."""
    findings: Mapped[int]
    """Kinds of drift that were found."""
    drift: Mapped[int] = mapped_column(BigInteger)
    """Cases found."""
    left: Mapped[int] = mapped_column(BigInteger)
    """Cases at the end."""
    in_flux: Mapped[int] = mapped_column(BigInteger)
    """Messages of a run at work, which were not compared."""
    compared: Mapped[dict[str, Any]] = mapped_column(JSON)
    """Rows read, by store and kind of row."""


class AuditFinding(Base):
    """One row per kind of drift that an audit found."""

    __tablename__ = "audit_findings"

    audit_id: Mapped[str] = mapped_column(String(250), primary_key=True)
    kind: Mapped[str] = mapped_column(String(64), primary_key=True)
    store: Mapped[str] = mapped_column(String(16))
    severity: Mapped[str] = mapped_column(String(16))
    """`error` or `warning`."""
    title: Mapped[str]
    meaning: Mapped[str]
    advice: Mapped[str]
    repairable: Mapped[bool]
    count: Mapped[int] = mapped_column(BigInteger)
    """Cases found."""
    left: Mapped[int | None] = mapped_column(BigInteger)
    """Cases behind the repair; null where none was tried."""


class AuditSample(Base):
    """Some cases of a finding, with the user they are of, so that an erasure takes them along."""

    __tablename__ = "audit_samples"

    audit_id: Mapped[str] = mapped_column(String(250), primary_key=True)
    kind: Mapped[str] = mapped_column(String(64), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[str | None] = mapped_column(String(128), index=True)
    item: Mapped[str]
    expected: Mapped[str | None]
    found: Mapped[str | None]


class AnomalyRecord(Base):
    """One row per anomaly, as `quality.anomaly.Anomaly` has it."""

    __tablename__ = "anomalies"

    anomaly_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    severity: Mapped[str] = mapped_column(String(16))
    run_id: Mapped[str | None] = mapped_column(String(250), index=True)
    run_started_at: Mapped[datetime | None] = mapped_column(UtcDateTime, index=True)
    stage: Mapped[str] = mapped_column(String(128))
    title: Mapped[str] = mapped_column(String(128))
    evidence: Mapped[str]
    advice: Mapped[str]
    observed: Mapped[float | None] = mapped_column(Double)
    expected: Mapped[float | None] = mapped_column(Double)
    score: Mapped[float | None] = mapped_column(Double)
    user_id: Mapped[str | None] = mapped_column(String(128), index=True)


class RunFigure(Base):
    """One row per (run, figure) that would be dear to count anew for each run that is compared with it."""

    __tablename__ = "run_figures"

    run_id: Mapped[str] = mapped_column(String(250), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[int] = mapped_column(BigInteger)


class ApiLatency(Base):
    """One row per (window, route): the API's answers, in buckets of `schemas.LATENCY_BOUNDS_S`."""

    __table__ = Table(
        "api_latency",
        Base.metadata,
        Column("moment", BigInteger, primary_key=True, autoincrement=False),
        Column("route", String(128), primary_key=True),
        Column("window_ms", BigInteger, nullable=False),
        Column("requests", BigInteger, nullable=False),
        Column("errors", BigInteger, nullable=False),
        Column("seconds", Double, nullable=False),
        *(Column(f"bucket_{number:02}", BigInteger, nullable=False) for number in range(len(LATENCY_BOUNDS_S) + 1)),
    )


class ApiCount(Base):
    """One row per (window, what is counted): answers `hit`, `stale` or `miss`, `shed`, and `degraded:` by store."""

    __tablename__ = "api_counts"

    moment: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    """The window's begin, in epoch milliseconds."""
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    window_ms: Mapped[int] = mapped_column(BigInteger)
    count: Mapped[int] = mapped_column(BigInteger)


class ApiScrape(Base):
    """One row per process of the API: its counters as they were read last."""

    __tablename__ = "api_scrapes"

    process: Mapped[str] = mapped_column(String(64), primary_key=True)
    """When it began."""
    moment: Mapped[int] = mapped_column(BigInteger)
    counters: Mapped[dict[str, float]] = mapped_column(JSON)


class ServingState(Base):
    """One row: what the published data were built from."""

    __tablename__ = "serving_state"

    id: Mapped[int] = mapped_column(primary_key=True)
    catalog_version: Mapped[str] = mapped_column(String(64))
    intents_version: Mapped[str] = mapped_column(String(64))
    run_id: Mapped[str] = mapped_column(String(250))


class Served(Base):
    """One row: what the API answers from, as the last publish left it."""

    __tablename__ = "served"

    id: Mapped[int] = mapped_column(primary_key=True)
    content: Mapped[bytes] = mapped_column(LargeBinary)
    run_id: Mapped[str] = mapped_column(String(250))
    learned_at: Mapped[int] = mapped_column(BigInteger)
    """The moment of the knowledge, in epoch milliseconds."""
    announced: Mapped[bool]
    """Whether a serving generation began with it."""


class VectorSpaceRecord(Base):
    """One row per vector space whose collections are kept: the live one, and at most one beside it."""

    __tablename__ = "vector_spaces"

    model: Mapped[str] = mapped_column(String(250), primary_key=True)
    dim: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    state: Mapped[str] = mapped_column(String(16))
    """A `schemas.SpaceState`."""
    since: Mapped[datetime] = mapped_column(UtcDateTime)
    """When it came to this state."""
