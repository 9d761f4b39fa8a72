"""The analytics database: SQLite in WAL mode, or any database SQLAlchemy speaks to.

Only the pipeline writes, and whoever erases a user. Everything derived is set from `message_intents` and `events`,
never incremented.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, TypeVar, cast
from urllib.parse import quote

from sqlalchemy import (
    JSON,
    URL,
    BigInteger,
    Column,
    ColumnElement,
    CompoundSelect,
    Connection,
    DateTime,
    Dialect,
    Double,
    Engine,
    Index,
    LargeBinary,
    Numeric,
    RowMapping,
    Select,
    SQLColumnExpression,
    String,
    Subquery,
    Table,
    and_,
    bindparam,
    case,
    create_engine,
    delete,
    event,
    func,
    insert,
    inspect,
    literal,
    select,
    text,
    union,
    union_all,
    update,
)
from sqlalchemy.exc import DatabaseError, DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.schema import CreateColumn
from sqlalchemy.types import TypeDecorator

from personalization.errors import StoreError
from personalization.schemas import (
    DAY_MS,
    ENGAGEMENT_STRENGTH,
    LATENCY_BOUNDS_S,
    OTHER_INTENT,
    Catalog,
    Engagement,
    EventKind,
    ExpressedIntent,
)
from personalization.settings import Settings

_BUSY_TIMEOUT_MS = 30_000
_ID_CHUNK = 1000
_STREAM_ROWS = 10_000
_FORGOTTEN = 1000.0  # half-lives after which a signal weighs nothing; databases refuse to underflow
_WEIGHT_DIGITS = 9
_SERVING = 1
_IMPRESSIONS_KEPT_S = 365 * 86_400  # as far back as a frequency cap may look
_IMPRESSIONS_KEPT = 5000
_EXPRESSED_KEPT = 50
_CLEANED_UP_S = 5.0
_ANOMALIES_KEPT = 5000
_MESSAGES, _EVENT, _EXPRESSED = "messages", "event", "expressed"

T = TypeVar("T")


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


_FUNNEL = ("shown_to", "clicked_by", "converted_by")
_LINEAGE = (PipelineRun.__table__, StageAttempt.__table__)
_CAMPAIGN_TOTALS = ("users", "messages", "last_at", "impressions", "clicks", "conversions", "dismisses", *_FUNNEL)


class InteractionColumns(TypedDict):
    """Some events, by column."""

    user_id: list[str]
    campaign_id: list[str]
    event: list[str]
    timestamp: list[int]
    position: list[int | None]
    propensity: list[float | None]
    policy: list[str | None]


class ExpressionColumns(TypedDict):
    """Some intents of messages, by column."""

    message_id: list[str]
    user_id: list[str]
    timestamp: list[int]
    intent_id: list[str]
    confidence: list[float]


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


class UserEvent(NamedTuple):
    """An event of a user."""

    campaign_id: str
    event: EventKind
    timestamp: int
    """Epoch milliseconds."""


class ExpressedMessage(NamedTuple):
    """A message of a user, and an intent it expresses."""

    message_id: str
    intent_id: str
    timestamp: int


class UserFacts(NamedTuple):
    """What SQL knows of a user."""

    messages: int
    events: list[UserEvent]
    expressed: list[ExpressedMessage]
    """The newest first."""


class TakingRun(NamedTuple):
    """A run that took messages or events of a user."""

    run_id: str
    started_at: datetime | None
    """None until its lineage is recorded."""
    messages: int
    events: int


class UserRecord(NamedTuple):
    """All that SQL holds of a user, summed up."""

    messages: int
    last_message_at: int | None
    """Epoch milliseconds."""
    expressed: list[ExpressedIntent]
    engagement: list[Engagement]
    runs: list[TakingRun]
    """The newest first."""


@contextmanager
def analytics_errors() -> Iterator[None]:
    """Turn driver errors into a `StoreError` that names the store and no credential."""
    try:
        yield
    except DBAPIError as error:
        raise StoreError("analytics", f"{type(error).__name__}: {error.orig}; check SQLITE_PATH") from error


class AnalyticsStore:
    """Writes of the pipeline and their source-of-truth reads."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @classmethod
    def from_settings(cls, settings: Settings) -> "AnalyticsStore":
        """Open the database, making SQLite's folder if need be."""
        url = settings.analytics_database
        _make_sqlite_folder(url)
        engine = create_engine(url)
        if url.get_backend_name() == "sqlite":
            event.listen(engine, "connect", _configure_sqlite)
        return cls(engine)

    def ensure_schema(self) -> None:
        """Create the tables, columns and indexes that are missing. Safe to repeat and to race.

        After a column was added to what is derived, the next run derives everything anew.
        """
        with analytics_errors():
            try:
                _complete_schema(self.engine)
            except DatabaseError:  # another process was faster: now it is all there
                _complete_schema(self.engine)

    def sync_catalog(self, catalog: Catalog) -> None:
        """Make campaigns and their targets equal to the catalog; engagement totals stay."""
        with analytics_errors(), self.engine.begin() as connection:
            totals = {
                row["campaign_id"]: {name: row[name] for name in _CAMPAIGN_TOTALS}
                for row in connection.execute(select(CampaignRecord.__table__)).mappings()
            }
            nothing = dict.fromkeys(_CAMPAIGN_TOTALS, 0) | {"last_at": None}
            connection.execute(delete(CampaignTarget))
            connection.execute(delete(CampaignRecord))
            records = [
                {
                    "campaign_id": one.id,
                    "name": one.name,
                    "category": one.category,
                    "active_from": one.active_from_ms,
                    "active_until": one.active_until_ms,
                    **totals.get(one.id, nothing),
                }
                for one in catalog.campaigns
            ]
            targets = [
                {"campaign_id": one.id, "intent_id": intent} for one in catalog.campaigns for intent in one.intents
            ]
            # SQLAlchemy takes an empty list for a row of defaults.
            for table, rows in ((CampaignRecord, records), (CampaignTarget, targets)):
                if rows:
                    connection.execute(insert(table), rows)

    def replace_message_intents(self, message_ids: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
        """Set the intents of the messages, in one transaction."""
        with analytics_errors(), self.engine.begin() as connection:
            for chunk in _chunks(message_ids):
                connection.execute(delete(MessageIntent).where(MessageIntent.message_id.in_(chunk)))
            if rows:
                connection.execute(insert(MessageIntent), list(rows))

    def set_events(self, rows: Sequence[dict[str, Any]]) -> None:
        """Insert or replace events by `event_id`, in one transaction."""
        with analytics_errors(), self.engine.begin() as connection:
            for chunk in _chunks([row["event_id"] for row in rows]):
                connection.execute(delete(EventRecord).where(EventRecord.event_id.in_(chunk)))
            connection.execute(insert(EventRecord), list(rows))

    def users(self, run_id: str | None, per_page: int) -> Iterator[list[str]]:
        """Yield the users whose messages or events the run took (None: all users), in order, a page at a time."""
        return self._users((MessageIntent, EventRecord), run_id, per_page)

    def users_with_messages(self, run_id: str, per_page: int) -> Iterator[list[str]]:
        """Yield the users whose messages the run embedded, in order, a page at a time."""
        return self._users((MessageIntent,), run_id, per_page)

    def _users(
        self, tables: Sequence[type[MessageIntent | EventRecord]], run_id: str | None, per_page: int
    ) -> Iterator[list[str]]:
        last = ""
        while True:
            pages = [
                select(table.user_id)
                .distinct()
                .where(table.user_id > last, *([table.run_id == run_id] if run_id is not None else []))
                .order_by(table.user_id)
                .limit(per_page)
                .subquery()
                for table in tables
            ]
            found = union(*(select(page.c.user_id) for page in pages)).subquery()
            page = self._fetch(select(found.c.user_id).order_by(found.c.user_id).limit(per_page))
            if not page:
                return
            yield [row["user_id"] for row in page]
            last = page[-1]["user_id"]

    def all_messages(self, per_page: int) -> Iterator[list[dict[str, Any]]]:
        """Yield `{id, user_id, timestamp, run_id}` of every message, by id, a page at a time."""
        columns = (
            MessageIntent.message_id.label("id"),
            MessageIntent.user_id,
            MessageIntent.timestamp,
            MessageIntent.run_id,
        )
        query = select(*columns).distinct().order_by(MessageIntent.message_id).limit(per_page)
        last = ""
        while page := self._fetch(query.where(MessageIntent.message_id > last)):
            yield page
            last = page[-1]["id"]

    def interactions(self, since_ms: int, until_ms: int) -> Iterator[InteractionColumns]:
        """Yield the events of [since, until) by time, up to 10,000 at a time: one streamed query."""
        names = ("user_id", "campaign_id", "event", "timestamp", "position", "propensity", "policy")
        query = (
            select(*(getattr(EventRecord, name) for name in names))
            .where(EventRecord.timestamp >= since_ms, EventRecord.timestamp < until_ms)
            .order_by(EventRecord.timestamp, EventRecord.event_id)
        )
        for columns in self._stream(query):
            yield InteractionColumns(**dict(zip(names, columns, strict=True)))  # type: ignore[typeddict-item]

    def expressions(self, since_ms: int, until_ms: int) -> Iterator[ExpressionColumns]:
        """Yield the intents of messages of [since, until) by time, `other` too, up to 10,000 at a time: one
        streamed query.
        """
        names = ("message_id", "user_id", "timestamp", "intent_id", "confidence")
        query = (
            select(*(getattr(MessageIntent, name) for name in names))
            .where(MessageIntent.timestamp >= since_ms, MessageIntent.timestamp < until_ms)
            .order_by(MessageIntent.timestamp, MessageIntent.message_id, MessageIntent.intent_id)
        )
        for columns in self._stream(query):
            yield ExpressionColumns(**dict(zip(names, columns, strict=True)))  # type: ignore[typeddict-item]

    def expressed_intents(self, user_ids: Sequence[str], half_life_days: float) -> list[ExpressedIntent]:
        """What the users expressed, over all their messages; `other` left out."""
        return [
            ExpressedIntent(**row)
            for chunk in _chunks(user_ids)
            for row in self._fetch(_expressed_query(chunk, half_life_days))
        ]

    def engagement(self, user_ids: Sequence[str], half_life_days: float) -> list[Engagement]:
        """The users' engagement as their messages and events have it now, whether rolled up yet or not."""
        return [
            Engagement(**row)
            for chunk in _chunks(user_ids)
            for row in self._fetch(_engagement_query(chunk, half_life_days))
        ]

    def roll_up_engagement(self, user_ids: Sequence[str], half_life_days: float) -> int:
        """Set `user_engagement` and `user_weeks` of the users, in one transaction; return the rows of the first.

        Reads each of their messages' intents and events twice, by user.
        """
        rows = 0
        with analytics_errors(), self.engine.begin() as connection:
            for chunk in _chunks(user_ids):
                connection.execute(delete(UserEngagement).where(UserEngagement.user_id.in_(chunk)))
                fresh = _engagement_query(chunk, half_life_days)
                names = [column.name for column in fresh.selected_columns]
                insertion = insert(UserEngagement).from_select(names, fresh)
                # PostgreSQL's count of an insertion is forgotten otherwise.
                rows += connection.execute(insertion, execution_options={"preserve_rowcount": True}).rowcount
                connection.execute(delete(UserWeek).where(UserWeek.user_id.in_(chunk)))
                weeks = ("user_id", "week", "first_week")
                connection.execute(insert(UserWeek).from_select(weeks, _weeks_query(chunk)))
        return rows

    def refresh_campaign_totals(self) -> None:
        """Set every campaign's totals from `user_engagement`, which is read once."""
        totals = _totals_query().subquery()
        values = {name: totals.c[name] for name in _CAMPAIGN_TOTALS}
        with analytics_errors(), self.engine.begin() as connection:
            connection.execute(
                update(CampaignRecord).where(CampaignRecord.campaign_id == totals.c.campaign_id).values(values)
            )

    def wrong_totals(self) -> list[tuple[str, str, str]]:
        """(campaign, its totals as they should be, as they are) where they differ. Reads `user_engagement` once."""
        with analytics_errors(), self.engine.connect() as connection:
            stored = {
                one["campaign_id"]: one for one in connection.execute(select(CampaignRecord.__table__)).mappings()
            }
            fresh = connection.execute(_totals_query()).mappings().all()
        pairs = [(one["campaign_id"], _totals_text(one), _totals_text(stored[one["campaign_id"]])) for one in fresh]
        return [pair for pair in pairs if pair[1] != pair[2]]

    def newest_messages(self, user_ids: Sequence[str], per_user: int) -> list[dict[str, Any]]:
        """`{user_id, message_id, timestamp}` of each user's newest messages."""
        rows: list[dict[str, Any]] = []
        with analytics_errors(), self.engine.connect() as connection:
            for chunk in _chunks(user_ids):
                messages = (
                    select(MessageIntent.user_id, MessageIntent.message_id, MessageIntent.timestamp)
                    .distinct()
                    .where(MessageIntent.user_id.in_(chunk))
                    .subquery()
                )
                ranked = select(
                    messages,
                    func.row_number()
                    .over(
                        partition_by=messages.c.user_id,
                        order_by=(messages.c.timestamp.desc(), messages.c.message_id),
                    )
                    .label("rank"),
                ).subquery()
                newest = select(ranked.c.user_id, ranked.c.message_id, ranked.c.timestamp)
                newest = newest.where(ranked.c.rank <= per_user)
                rows += [dict(row) for row in connection.execute(newest).mappings()]
        return rows

    def record_runs(self, rows: Sequence[dict[str, Any]], attempts: Sequence[dict[str, Any]] = ()) -> None:
        """Set the lineage rows of a run, and those of its attempts that are named, in one transaction.

        Attempts that were recorded before are kept: those of a run that was cleared. Five statements.
        """
        run_ids = {row["run_id"] for row in rows}
        table = StageAttempt.__table__
        with analytics_errors(), self.engine.begin() as connection:
            connection.execute(delete(PipelineRun).where(PipelineRun.run_id.in_(run_ids)))
            connection.execute(insert(PipelineRun), list(rows))
            known = connection.execute(select(table).where(StageAttempt.run_id.in_(run_ids))).mappings()
            merged = {_attempt_key(row): dict(row) for row in (*known, *attempts)}
            connection.execute(delete(StageAttempt).where(StageAttempt.run_id.in_(run_ids)))
            if merged:
                connection.execute(insert(StageAttempt), list(merged.values()))

    def set_anomalies(self, rows: Sequence[dict[str, Any]], run_ids: Sequence[str]) -> None:
        """Set the anomalies of the runs, and others by their id; forget the oldest beyond 5,000. One transaction."""
        newest = select(AnomalyRecord.anomaly_id).order_by(AnomalyRecord.run_started_at.desc()).limit(_ANOMALIES_KEPT)
        with analytics_errors(), self.engine.begin() as connection:
            connection.execute(delete(AnomalyRecord).where(AnomalyRecord.run_id.in_(run_ids)))
            ids = [row["anomaly_id"] for row in rows]
            connection.execute(delete(AnomalyRecord).where(AnomalyRecord.anomaly_id.in_(ids)))
            if rows:
                connection.execute(insert(AnomalyRecord), list(rows))
            connection.execute(delete(AnomalyRecord).where(AnomalyRecord.anomaly_id.not_in(newest)))

    def set_run_figures(self, run_ids: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
        """Set the figures of the runs, in one transaction."""
        with analytics_errors(), self.engine.begin() as connection:
            connection.execute(delete(RunFigure).where(RunFigure.run_id.in_(run_ids)))
            if rows:
                connection.execute(insert(RunFigure), list(rows))

    def record_evaluation(self, rows: Sequence[dict[str, Any]]) -> None:
        """Set the rows of an evaluation, in one transaction."""
        evaluation_ids = {row["evaluation_id"] for row in rows}
        with analytics_errors(), self.engine.begin() as connection:
            connection.execute(delete(EvaluationResult).where(EvaluationResult.evaluation_id.in_(evaluation_ids)))
            connection.execute(insert(EvaluationResult), list(rows))

    def record_audit(
        self, audit: dict[str, Any], findings: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]], keep: int
    ) -> None:
        """Set the rows of an audit and drop those of all but the latest `keep`, in one transaction."""
        audit_id = audit["audit_id"]
        with analytics_errors(), self.engine.begin() as connection:
            for table in (AuditRun, AuditFinding, AuditSample):
                connection.execute(delete(table).where(table.audit_id == audit_id))
            connection.execute(insert(AuditRun), [audit])
            if findings:
                connection.execute(insert(AuditFinding), list(findings))
            if samples:
                connection.execute(insert(AuditSample), list(samples))
            kept = select(AuditRun.audit_id).order_by(AuditRun.started_at.desc()).limit(keep)
            ids = list(connection.execute(kept).scalars())
            for table in (AuditRun, AuditFinding, AuditSample):
                connection.execute(delete(table).where(table.audit_id.not_in(ids)))

    def last_feedback_at(self) -> int | None:
        """The newest click or conversion, in epoch milliseconds."""
        with analytics_errors(), self.engine.connect() as connection:
            newest = select(func.max(EventRecord.timestamp)).where(EventRecord.event.in_(ENGAGEMENT_STRENGTH))
            return connection.execute(newest).scalar_one()

    def count_feedback(self, since_ms: int) -> int:
        """Clicks and conversions from `since_ms` on."""
        count = select(func.count()).where(
            EventRecord.timestamp >= since_ms, EventRecord.event.in_(ENGAGEMENT_STRENGTH)
        )
        with analytics_errors(), self.engine.connect() as connection:
            return connection.execute(count).scalar_one()

    def erase_user(self, user_id: str) -> dict[str, int]:
        """Delete the user's rows of every table, in one transaction; return how many by table.

        The campaigns' totals count them until they are refreshed.
        """
        with analytics_errors(), self.engine.begin() as connection:
            return {
                table.name: connection.execute(delete(table).where(table.c.user_id == user_id)).rowcount
                for table in self._tables_of_users(connection)
            }

    def count_user(self, user_id: str) -> int:
        """Rows of the user in all tables."""
        with analytics_errors(), self.engine.connect() as connection:
            return sum(
                connection.execute(
                    select(func.count()).select_from(table).where(table.c.user_id == user_id)
                ).scalar_one()
                for table in self._tables_of_users(connection)
            )

    @staticmethod
    def _tables_of_users(connection: Connection) -> list[Table]:
        there = inspect(connection).get_table_names()  # none before the first run
        return [one for one in Base.metadata.sorted_tables if "user_id" in one.c and one.name in there]

    def count_users_without_intent(self) -> int:
        """Users who have messages but expressed no intent: nothing they said is in the graph."""
        expressed = func.max(case((MessageIntent.intent_id != OTHER_INTENT, 1), else_=0))
        silent = select(MessageIntent.user_id).group_by(MessageIntent.user_id).having(expressed == 0).subquery()
        with analytics_errors(), self.engine.connect() as connection:
            return connection.execute(select(func.count()).select_from(silent)).scalar_one()

    def serving_state(self) -> ServingState | None:
        """What the published data were built from; None before the first publish."""
        with analytics_errors(), Session(self.engine) as session:
            return session.get(ServingState, _SERVING)

    def expect_versions(self, catalog_version: str, intents_version: str) -> None:
        """Forget those versions of what is served that differ from what is about to be built."""
        with analytics_errors(), Session(self.engine) as session, session.begin():
            state = session.get(ServingState, _SERVING)
            if state is not None:
                state.catalog_version = catalog_version if state.catalog_version == catalog_version else ""
                state.intents_version = intents_version if state.intents_version == intents_version else ""

    def set_serving_state(self, catalog_version: str, intents_version: str, run_id: str) -> None:
        """Say what the published data were built from."""
        state = ServingState(
            id=_SERVING, catalog_version=catalog_version, intents_version=intents_version, run_id=run_id
        )
        with analytics_errors(), Session(self.engine) as session, session.begin():
            session.merge(state)

    def publish_served(self, content: bytes, learned_at: int, run_id: str) -> None:
        """Set what the API answers from, in one transaction, unless that is newer: an older run may be repeated."""
        row = Served(id=_SERVING, content=content, run_id=run_id, learned_at=learned_at, announced=False)
        with analytics_errors(), Session(self.engine) as session, session.begin():
            known = session.get(Served, _SERVING)
            if known is None or known.learned_at <= learned_at:
                session.merge(row)

    def announce_served(self) -> None:
        """Say that a serving generation has begun with it."""
        with analytics_errors(), self.engine.begin() as connection:
            connection.execute(update(Served).values(announced=True))

    def served_at(self) -> int | None:
        """The moment of the served knowledge, in epoch milliseconds; None before it is announced."""
        query = select(Served.learned_at).where(Served.announced)
        with analytics_errors(), self.engine.connect() as connection:
            return connection.execute(query).scalar_one_or_none()

    def served_content(self) -> bytes | None:
        """What was published last, announced or not."""
        with analytics_errors(), self.engine.connect() as connection:
            return connection.execute(select(Served.content)).scalar_one_or_none()

    def pages(self, query: Select[*tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
        """Yield the rows of a query, up to 10,000 at a time, as the database finds them."""
        with analytics_errors(), self.engine.connect() as connection:
            rows = connection.execution_options(yield_per=_STREAM_ROWS).execute(query)
            for part in rows.partitions():
                yield [tuple(row) for row in part]

    def intents_of(self, message_ids: Sequence[str]) -> dict[str, dict[str, float]]:
        """The intents of messages and how sure each is; `other` too. Messages without any are left out."""
        found: dict[str, dict[str, float]] = {}
        for chunk in _chunks(message_ids):
            query = select(MessageIntent.message_id, MessageIntent.intent_id, MessageIntent.confidence)
            for row in self._fetch(query.where(MessageIntent.message_id.in_(chunk))):
                found.setdefault(row["message_id"], {})[row["intent_id"]] = row["confidence"]
        return found

    def delete_events(self, event_ids: Sequence[str]) -> None:
        """Delete events, in one transaction."""
        with analytics_errors(), self.engine.begin() as connection:
            for chunk in _chunks(event_ids):
                connection.execute(delete(EventRecord).where(EventRecord.event_id.in_(chunk)))

    def latest_generations(self, runs: int) -> list[int]:
        """The serving generations that the latest publishes began, as lineage has them, the newest run first."""
        query = (
            select(PipelineRun.details)
            .where(PipelineRun.stage == "publish", PipelineRun.status == "success")
            .order_by(PipelineRun.started_at.desc())
            .limit(runs)
        )
        found = [row["details"].get("generation") for row in self._fetch(query)]
        return [one for one in found if one is not None]

    def _stream(self, query: Select[*tuple[Any, ...]]) -> Iterator[list[list[Any]]]:
        with analytics_errors(), self.engine.connect() as connection:
            rows = connection.execution_options(yield_per=_STREAM_ROWS).execute(query)
            for part in rows.partitions():
                yield [list(column) for column in zip(*part, strict=True)]

    def _fetch(self, query: Select[*tuple[Any, ...]]) -> list[dict[str, Any]]:
        with analytics_errors(), self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]


@contextmanager
def analytics_store(settings: Settings) -> Iterator[AnalyticsStore]:
    """The database for a while, closed behind it."""
    store = AnalyticsStore.from_settings(settings)
    try:
        yield store
    finally:
        store.engine.dispose()


class AsyncAnalyticsReader:
    """Look-ups of the API. Never writes."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._given_up: set[asyncio.Task[Any]] = set()

    @classmethod
    def from_settings(cls, settings: Settings) -> "AsyncAnalyticsReader":
        """Open the database for reading."""
        url = _read_only(settings.analytics_database, "sqlite+aiosqlite")
        if url.get_backend_name() != "sqlite":
            return cls(create_async_engine(url))
        # A thread that waits for a lock cannot be stopped.
        engine = create_async_engine(url, connect_args={"timeout": settings.answer_store_timeout_s})
        event.listen(engine.sync_engine, "connect", _add_power)
        return cls(engine)

    async def aclose(self) -> None:
        """Close the connections, behind what is still cleaned up: cancelled once more, as at the end of a loop, a
        closing connection of aiosqlite is waited for without end.
        """
        if self._given_up:
            await asyncio.wait(self._given_up, timeout=_CLEANED_UP_S)
        await self.engine.dispose()

    async def served(self) -> bytes:
        """What was published last.

        Raises:
            StoreError: nothing was published yet.
        """

        async def read(connection: AsyncConnection) -> bytes | None:
            return (await connection.execute(select(Served.content))).scalar_one_or_none()

        content = await self._read(read)
        if content is None:
            raise StoreError("analytics", "nothing has been published yet; run the pipeline")
        return content

    async def learned_at(self) -> int | None:
        """The moment of what was published last, in epoch milliseconds; None where nothing was. Reads no content."""

        async def read(connection: AsyncConnection) -> int | None:
            return (await connection.execute(select(Served.learned_at))).scalar_one_or_none()

        return await self._read(read)

    async def user_facts(self, user_ids: Sequence[str]) -> dict[str, UserFacts]:
        """The number of messages, the events that rules ask for, and the newest messages that express an intent.

        Of the events the last conversion and dismissal of each campaign, and the impressions of the last year. One
        statement over indexes by user, whatever the number of users.
        """
        since = (datetime.now(UTC).timestamp() - _IMPRESSIONS_KEPT_S) * 1000
        facts = {user_id: UserFacts(0, [], []) for user_id in user_ids}

        async def read(connection: AsyncConnection) -> Sequence[Any]:
            return (await connection.execute(_FACTS, {"user_ids": list(user_ids), "since": since})).all()

        rows = await self._read(read)
        for user_id, kind, name, what, moment in rows:
            known = facts[user_id]
            if kind == _MESSAGES:
                facts[user_id] = known._replace(messages=moment)
            elif kind == _EXPRESSED:
                known.expressed.append(ExpressedMessage(name, what, moment))
            else:
                known.events.append(UserEvent(name, cast("EventKind", what), moment))
        for known in facts.values():
            known.expressed.sort(key=lambda one: (-one.timestamp, one.message_id))
        return facts

    async def user_record(self, user_id: str, half_life_days: float) -> UserRecord:
        """What the runs know of a user. Four statements over indexes by user, on one connection."""
        mine = MessageIntent.user_id == user_id
        said = select(func.count(MessageIntent.message_id.distinct()), func.max(MessageIntent.timestamp)).where(mine)
        engaged = select(UserEngagement.__table__).where(UserEngagement.user_id == user_id)

        async def read(connection: AsyncConnection) -> UserRecord:
            messages, last_message_at = (await connection.execute(said)).one()
            expressed = (await connection.execute(_expressed_query([user_id], half_life_days))).mappings().all()
            engagement = (await connection.execute(engaged)).mappings().all()
            runs = (await connection.execute(_taking_runs(user_id))).all()
            return UserRecord(
                messages,
                last_message_at,
                [ExpressedIntent(**row) for row in expressed],
                [Engagement(**row) for row in engagement],
                [TakingRun(*row) for row in runs],
            )

        return await self._read(read)

    async def _read(self, read: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """What `read` finds on a connection. Whoever gives up is free at once, and the connection is cleaned up behind
        them: SQLAlchemy would have them wait for that.
        """

        async def reading() -> T:
            with analytics_errors():
                async with self.engine.connect() as connection:
                    return await read(connection)

        task = asyncio.create_task(reading())
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.cancel()
            self._given_up.add(task)
            task.add_done_callback(self._gave_up)
            raise

    def _gave_up(self, task: "asyncio.Task[Any]") -> None:
        self._given_up.discard(task)
        if not task.cancelled():
            task.exception()  # seen, though nobody waits for it


def open_read_only(settings: Settings) -> Engine:
    """Engine for readers such as the dashboard. SQLite refuses every write, and a missing file stays missing."""
    return create_engine(_read_only(settings.analytics_database, "sqlite"))


def _facts_query() -> CompoundSelect[*tuple[Any, ...]]:
    """What `UserFacts` hold, as rows (user, kind, name, what, number or moment)."""
    of_message = MessageIntent.user_id.in_(bindparam("user_ids", expanding=True))
    of_event = EventRecord.user_id.in_(bindparam("user_ids", expanding=True))
    nothing = literal("")
    messages = (
        select(
            MessageIntent.user_id,
            literal(_MESSAGES),
            nothing,
            nothing,
            func.count(MessageIntent.message_id.distinct()),
        )
        .where(of_message)
        .group_by(MessageIntent.user_id)
    )
    answered = (
        select(
            EventRecord.user_id,
            literal(_EVENT),
            EventRecord.campaign_id,
            EventRecord.event,
            func.max(EventRecord.timestamp),
        )
        .where(of_event, EventRecord.event.in_(("conversion", "dismiss")))
        .group_by(EventRecord.user_id, EventRecord.campaign_id, EventRecord.event)
    )
    shown = select(
        EventRecord.user_id,
        literal(_EVENT).label("kind"),
        EventRecord.campaign_id,
        EventRecord.event,
        EventRecord.timestamp,
        func.row_number().over(partition_by=EventRecord.user_id, order_by=EventRecord.timestamp.desc()).label("rank"),
    ).where(of_event, EventRecord.event == "impression", EventRecord.timestamp > bindparam("since"))
    expressed = select(
        MessageIntent.user_id,
        literal(_EXPRESSED).label("kind"),
        MessageIntent.message_id,
        MessageIntent.intent_id,
        MessageIntent.timestamp,
        func.row_number()
        .over(partition_by=MessageIntent.user_id, order_by=MessageIntent.timestamp.desc())
        .label("rank"),
    ).where(of_message, MessageIntent.intent_id != OTHER_INTENT)
    return union_all(
        messages, answered, _first(shown.subquery(), _IMPRESSIONS_KEPT), _first(expressed.subquery(), _EXPRESSED_KEPT)
    )


def _first(ranked: Subquery, most: int) -> Select[*tuple[Any, ...]]:
    """Its rows up to the rank `most`, without the rank."""
    return select(*list(ranked.c)[:-1]).where(ranked.c.rank <= most)


_FACTS = _facts_query()
"""Built once: making it costs as much as asking it."""


def _taking_runs(user_id: str) -> Select[*tuple[Any, ...]]:
    """`TakingRun` of the user, the newest first."""
    messages = select(MessageIntent.run_id, MessageIntent.message_id.label("message"), literal(None).label("event"))
    events = select(EventRecord.run_id, literal(None), EventRecord.event_id)
    taken = union_all(
        messages.where(MessageIntent.user_id == user_id), events.where(EventRecord.user_id == user_id)
    ).subquery()
    started_at = select(func.min(PipelineRun.started_at)).where(PipelineRun.run_id == taken.c.run_id).scalar_subquery()
    return (
        select(
            taken.c.run_id,
            started_at.label("started_at"),
            func.count(taken.c.message.distinct()),
            func.count(taken.c.event),
        )
        .group_by(taken.c.run_id)
        .order_by(started_at.desc().nulls_first(), taken.c.run_id)
    )


def _mentions(user_ids: Sequence[str]) -> Select[*tuple[Any, ...]]:
    """The users' messages whose intent a campaign targets, sent while it ran; each once a campaign."""
    return (
        select(
            MessageIntent.user_id,
            CampaignTarget.campaign_id,
            MessageIntent.timestamp,
            literal("mention").label("kind"),
            MessageIntent.message_id.label("id"),
        )
        .distinct()
        .join(CampaignTarget, CampaignTarget.intent_id == MessageIntent.intent_id)
        .join(CampaignRecord, CampaignRecord.campaign_id == CampaignTarget.campaign_id)
        .where(
            MessageIntent.user_id.in_(user_ids),
            MessageIntent.timestamp >= CampaignRecord.active_from,
            MessageIntent.timestamp < CampaignRecord.active_until,
        )
    )


def _signals(user_ids: Sequence[str]) -> CompoundSelect[*tuple[Any, ...]]:
    """The users' mentions and events."""
    events = select(
        EventRecord.user_id,
        EventRecord.campaign_id,
        EventRecord.timestamp,
        EventRecord.event.label("kind"),
        EventRecord.event_id.label("id"),
    ).where(EventRecord.user_id.in_(user_ids))
    return union_all(_mentions(user_ids), events)


def _engagement_query(user_ids: Sequence[str], half_life_days: float) -> Select[*tuple[Any, ...]]:
    """`schemas.Engagement` of the users, a row by campaign."""
    signals = _signals(user_ids).subquery()
    pair = (signals.c.user_id, signals.c.campaign_id)
    strength = case(ENGAGEMENT_STRENGTH, value=signals.c.kind, else_=0.0)
    positive_at = case((strength > 0, signals.c.timestamp))
    dated = select(
        signals,
        strength.label("strength"),
        func.max(positive_at).over(partition_by=pair).label("weight_at"),
    ).subquery()
    kind, moment = dated.c.kind, dated.c.timestamp

    def count(one: str) -> ColumnElement[int]:
        return func.count(case((kind == one, 1)))

    def last(one: str) -> ColumnElement[int | None]:
        return func.max(case((kind == one, moment)))

    return select(
        dated.c.user_id,
        dated.c.campaign_id,
        count("mention").label("count"),
        func.coalesce(last("mention"), 0).label("last_at"),
        count("impression").label("impressions"),
        count("click").label("clicks"),
        count("conversion").label("conversions"),
        count("dismiss").label("dismisses"),
        func.max(case((kind != "mention", moment))).label("last_event_at"),
        last("impression").label("last_impression_at"),
        last("conversion").label("last_conversion_at"),
        last("dismiss").label("last_dismiss_at"),
        _decayed_sum(dated.c.strength, dated.c.weight_at - moment, half_life_days).label("weight"),
        func.max(dated.c.weight_at).label("weight_at"),
    ).group_by(dated.c.user_id, dated.c.campaign_id)


def _weeks_query(user_ids: Sequence[str]) -> Select[*tuple[Any, ...]]:
    """`UserWeek` of the users."""
    acts = union(
        select(MessageIntent.user_id, _week(MessageIntent.timestamp).label("week")).where(
            MessageIntent.user_id.in_(user_ids)
        ),
        select(EventRecord.user_id, _week(EventRecord.timestamp)).where(
            EventRecord.user_id.in_(user_ids), EventRecord.event != "impression"
        ),
    ).subquery()
    return select(acts.c.user_id, acts.c.week, func.min(acts.c.week).over(partition_by=acts.c.user_id))


def _week(timestamp: SQLColumnExpression[int]) -> ColumnElement[int]:
    # The epoch was a Thursday.
    return (timestamp + 3 * DAY_MS) // (7 * DAY_MS)


def _totals_query() -> Select[*tuple[Any, ...]]:
    """Every campaign's totals, from `user_engagement`."""
    sums = {"messages": UserEngagement.count} | {
        name: getattr(UserEngagement, name) for name in ("impressions", "clicks", "conversions", "dismisses")
    }
    shown, clicked = UserEngagement.impressions > 0, UserEngagement.clicks > 0
    steps = (shown, and_(shown, clicked), and_(shown, clicked, UserEngagement.conversions > 0))
    return (
        select(
            CampaignRecord.campaign_id,
            func.count(UserEngagement.weight_at).label("users"),
            func.max(func.nullif(UserEngagement.last_at, 0)).label("last_at"),
            *(func.count(case((step, 1))).label(name) for name, step in zip(_FUNNEL, steps, strict=True)),
            *(func.coalesce(func.sum(column), 0).label(name) for name, column in sums.items()),
        )
        .outerjoin(UserEngagement, UserEngagement.campaign_id == CampaignRecord.campaign_id)
        .group_by(CampaignRecord.campaign_id)
    )


def _totals_text(row: RowMapping) -> str:
    return ", ".join(f"{name} {row[name]}" for name in _CAMPAIGN_TOTALS)


def _expressed_query(user_ids: Sequence[str], half_life_days: float) -> Select[*tuple[Any, ...]]:
    """`schemas.ExpressedIntent` of the users, a row by intent."""
    pair = (MessageIntent.user_id, MessageIntent.intent_id)
    dated = (
        select(
            *pair,
            MessageIntent.confidence,
            MessageIntent.timestamp,
            func.max(MessageIntent.timestamp).over(partition_by=pair).label("last_seen"),
        )
        .where(MessageIntent.user_id.in_(user_ids), MessageIntent.intent_id != OTHER_INTENT)
        .subquery()
    )
    age = dated.c.last_seen - dated.c.timestamp
    return select(
        dated.c.user_id,
        dated.c.intent_id,
        func.count().label("count"),
        func.max(dated.c.last_seen).label("last_seen"),
        func.avg(dated.c.confidence).label("confidence"),
        _decayed_sum(dated.c.confidence, age, half_life_days).label("weight"),
    ).group_by(dated.c.user_id, dated.c.intent_id)


def _decayed_sum(
    value: ColumnElement[float], age_ms: ColumnElement[int], half_life_days: float
) -> ColumnElement[float]:
    """Sum of the values, each halved for every half-life of its age. 0 stays 0, whatever its age.

    Rounded to nine digits, so that it does not depend on the order in which the database adds.
    """
    half_lives = age_ms / literal(half_life_days * DAY_MS)
    decayed = case((value == 0, 0.0), (half_lives > _FORGOTTEN, 0.0), else_=value * func.power(0.5, half_lives))
    return func.round(func.sum(decayed).cast(Numeric), _WEIGHT_DIGITS).cast(Double)


def _complete_schema(engine: Engine) -> None:
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        inspector = inspect(connection)
        for table in Base.metadata.sorted_tables:
            known = {column["name"] for column in inspector.get_columns(table.name)}
            for column in table.columns:
                if column.name not in known:
                    if table not in _LINEAGE:
                        _derive_anew(connection)
                    definition = CreateColumn(column).compile(dialect=engine.dialect)
                    connection.execute(text(f"ALTER TABLE {table.name} ADD COLUMN {definition}"))
            for index in table.indexes:
                index.create(connection, checkfirst=True)


def _derive_anew(connection: Connection) -> None:
    """Make the next run take the catalog for a changed one, so that it refreshes all users."""
    connection.execute(update(ServingState).values(catalog_version=""))


def _attempt_key(row: Mapping[str, Any]) -> tuple[str, str, int, int]:
    return row["run_id"], row["stage"], row["shard"], row["attempt"]


def _chunks(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(ids), _ID_CHUNK):
        yield ids[start : start + _ID_CHUNK]


def _read_only(url: URL, sqlite_driver: str) -> URL:
    """SQLite by a read-only URI; other databases as they are: there the account's rights decide."""
    if url.get_backend_name() != "sqlite":
        return url
    path = quote(str(Path(url.database or "").absolute()))
    return URL.create(sqlite_driver, database=f"file:{path}", query={"mode": "ro", "uri": "true"})


def _make_sqlite_folder(url: URL) -> None:
    if url.get_backend_name() == "sqlite" and url.database and url.database != ":memory:":
        try:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError("analytics", f"cannot make the folder of SQLITE_PATH ({error.strerror})") from error


def _configure_sqlite(connection: Any, record: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")  # readers and the one writer do not block each other
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
    cursor.close()
    _add_power(connection, record)


def _add_power(connection: Any, record: ConnectionPoolEntry) -> None:  # noqa: ARG001
    # Not every build of SQLite has it.
    connection.create_function("power", 2, math.pow, deterministic=True)
