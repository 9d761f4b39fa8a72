"""The analytics database: SQLite in WAL mode, or any database SQLAlchemy speaks to.

Only the pipeline writes, and whoever erases a user. Everything derived is set from `message_intents` and `events`,
never incremented.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, TypeVar, cast
from urllib.parse import quote

from sqlalchemy import (
    URL,
    ColumnElement,
    CompoundSelect,
    Connection,
    Double,
    Engine,
    Numeric,
    RowMapping,
    Select,
    SQLColumnExpression,
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
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.schema import CreateColumn

from personalization.errors import StoreError
from personalization.schemas import (
    DAY_MS,
    ENGAGEMENT_STRENGTH,
    OTHER_INTENT,
    Catalog,
    Engagement,
    EventKind,
    ExpressedIntent,
    SpaceState,
    VectorSpace,
)
from personalization.settings import Settings
from personalization.stores.tables import (
    AnomalyRecord,
    AuditFinding,
    AuditRun,
    AuditSample,
    Base,
    CampaignRecord,
    CampaignTarget,
    EvaluationResult,
    EventRecord,
    MessageIntent,
    PipelineRun,
    RunFigure,
    Served,
    ServingState,
    StageAttempt,
    UserEngagement,
    UserWeek,
    VectorSpaceRecord,
)

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

_FUNNEL = ("shown_to", "clicked_by", "converted_by")
_LINEAGE = (PipelineRun.__table__, StageAttempt.__table__)
_TOTALS = ("messages", "events", "vectors", "users", "expressed", "users_without_intent")
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

    def publish_served(self, content: bytes, learned_at: int, run_id: str, space: VectorSpace) -> bool:
        """Set what the API answers from, in one transaction, unless that is newer: an older run may be repeated.

        The first one makes its vector space the live one. False, and nothing is set, where another one is live: the
        run was overtaken by a migration.
        """
        row = Served(id=_SERVING, content=content, run_id=run_id, learned_at=learned_at, announced=False)
        with analytics_errors(), Session(self.engine) as session, session.begin():
            live = session.scalar(select(VectorSpaceRecord).where(VectorSpaceRecord.state == "live"))
            if live is None:
                session.merge(_space_row(space, "live"))
            elif VectorSpace(live.model, live.dim) != space:
                return False
            known = session.get(Served, _SERVING)
            if known is None or known.learned_at <= learned_at:
                session.merge(row)
            return True

    def swap_served(self, content: bytes, learned_at: int, run_id: str, space: VectorSpace) -> None:
        """Set what the API answers from and make its vector space the live one, the live one a kept one: in one
        transaction.

        Raises:
            StoreError: the space is not one that runs have kept up to date.
        """
        row = Served(id=_SERVING, content=content, run_id=run_id, learned_at=learned_at, announced=False)
        with analytics_errors(), Session(self.engine) as session, session.begin():
            beside = session.get(VectorSpaceRecord, tuple(space), with_for_update=True)
            if beside is None or beside.state not in ("filling", "kept"):
                state = beside.state if beside else "unknown"
                raise StoreError("analytics", f"{space.name} is {state}, so it cannot be served; migrate to it again")
            former = session.scalars(select(VectorSpaceRecord).where(VectorSpaceRecord.state == "live")).one()
            former.state, beside.state = "kept", "live"
            former.since = beside.since = datetime.now(UTC)
            session.merge(row)

    def spaces(self) -> dict[VectorSpace, SpaceState]:
        """The vector spaces whose collections are kept; none before the first publish."""
        return {space: state for space, (state, _) in self.spaces_since().items()}

    def spaces_since(self) -> dict[VectorSpace, tuple[SpaceState, datetime]]:
        """The same, with the moment since when each is what it is."""
        with analytics_errors(), Session(self.engine) as session:
            rows = session.scalars(select(VectorSpaceRecord)).all()
        return {VectorSpace(one.model, one.dim): (cast("SpaceState", one.state), one.since) for one in rows}

    def set_space(self, space: VectorSpace, state: SpaceState) -> None:
        """Say what a vector space is, unless it is the live one."""
        with analytics_errors(), Session(self.engine) as session, session.begin():
            known = session.get(VectorSpaceRecord, tuple(space))
            if known is None or known.state != "live":
                session.merge(_space_row(space, state))

    def forget_space(self, space: VectorSpace) -> None:
        """From now on no run writes to it. The live one stays."""
        gone = (VectorSpaceRecord.model == space.model, VectorSpaceRecord.dim == space.dim)
        with analytics_errors(), self.engine.begin() as connection:
            connection.execute(delete(VectorSpaceRecord).where(*gone, VectorSpaceRecord.state != "live"))

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

    def latest_totals(self) -> dict[str, int]:
        """What the stores held at the latest publish, as lineage has it; empty before the first."""
        query = (
            select(PipelineRun.details)
            .where(PipelineRun.stage == "publish", PipelineRun.status == "success")
            .order_by(PipelineRun.started_at.desc())
            .limit(1)
        )
        found: dict[str, Any] = next((row["details"] for row in self._fetch(query)), {})
        return {name: count for name, count in found.items() if name in _TOTALS}

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
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLEANED_UP_S):
                while self._given_up:  # one that ends may leave another behind
                    await asyncio.wait(self._given_up)
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
                connection = await self._connection()
                try:
                    return await read(connection)
                finally:
                    await self._to_its_end(connection.aclose())

        task = asyncio.create_task(reading())
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.cancel()
            self._leave(task)
            raise

    async def _connection(self) -> AsyncConnection:
        """One of the pool. What is being opened is opened to the end, though nobody waits for it: the thread of a
        connection that aiosqlite was kept from opening tells its loop so, whether or not that is still there.
        """
        opening = asyncio.ensure_future(self.engine.connect().start())
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            await (await opening).aclose()
            raise

    async def _to_its_end(self, closing: Coroutine[Any, Any, None]) -> None:
        """Closing that is broken off halfway is told as an error."""
        task = asyncio.create_task(closing)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            self._leave(task)
            raise

    def _leave(self, task: "asyncio.Task[Any]") -> None:
        """To itself: nobody waits for it, until all is closed."""
        self._given_up.add(task)
        task.add_done_callback(self._gave_up)

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


def _space_row(space: VectorSpace, state: SpaceState) -> VectorSpaceRecord:
    return VectorSpaceRecord(model=space.model, dim=space.dim, state=state, since=datetime.now(UTC))


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
