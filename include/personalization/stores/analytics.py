"""The analytics database: SQLite in WAL mode, or any database SQLAlchemy speaks to.

Only the pipeline writes. Everything derived is set from `message_intents`, never incremented.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import (
    JSON,
    URL,
    BigInteger,
    DateTime,
    Dialect,
    Engine,
    Index,
    Select,
    String,
    case,
    create_engine,
    delete,
    event,
    func,
    insert,
    select,
)
from sqlalchemy.exc import DatabaseError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.types import TypeDecorator

from personalization.errors import StoreError
from personalization.schemas import OTHER_INTENT, Catalog, Engagement, ExpressedIntent
from personalization.settings import Settings

_BUSY_TIMEOUT_MS = 30_000
_ID_CHUNK = 1000
_SERVING = 1


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


class MessageIntent(Base):
    """One row per (message, intent it expresses); `other` where it expresses none."""

    __tablename__ = "message_intents"
    __table_args__ = (Index("ix_message_intents_run_user", "run_id", "user_id"),)

    message_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    intent_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    user_id: Mapped[str] = mapped_column(String(128), index=True)
    timestamp: Mapped[int] = mapped_column(BigInteger)
    """Epoch milliseconds."""
    confidence: Mapped[float]
    """Cosine to the nearest example utterance."""
    run_id: Mapped[str] = mapped_column(String(250))
    """The run that embedded the message."""


class CampaignRecord(Base):
    """One row per campaign of the catalog, with its engagement over all users."""

    __tablename__ = "campaigns"

    campaign_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    name: Mapped[str]
    category: Mapped[str] = mapped_column(String(64))
    active_from: Mapped[int] = mapped_column(BigInteger)
    active_until: Mapped[int] = mapped_column(BigInteger)
    users: Mapped[int] = mapped_column(BigInteger, default=0)
    messages: Mapped[int] = mapped_column(BigInteger, default=0)
    last_at: Mapped[int | None] = mapped_column(BigInteger)


class CampaignTarget(Base):
    """One row per (campaign, intent it targets)."""

    __tablename__ = "campaign_targets"

    campaign_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    intent_id: Mapped[str] = mapped_column(String(128), primary_key=True, index=True)


class UserEngagement(Base):
    """One row per (user, campaign): messages that speak to the campaign, in its active window."""

    __tablename__ = "user_engagement"

    user_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    campaign_id: Mapped[str] = mapped_column(String(128), primary_key=True, index=True)
    count: Mapped[int] = mapped_column(BigInteger)
    last_at: Mapped[int] = mapped_column(BigInteger)
    """Epoch milliseconds."""


class ServingState(Base):
    """One row: what the published data were built from."""

    __tablename__ = "serving_state"

    id: Mapped[int] = mapped_column(primary_key=True)
    catalog_version: Mapped[str] = mapped_column(String(64))
    intents_version: Mapped[str] = mapped_column(String(64))
    run_id: Mapped[str] = mapped_column(String(250))


@contextmanager
def analytics_errors() -> Iterator[None]:
    """Turn driver errors into a `StoreError` that names the store and no credential."""
    try:
        yield
    except DatabaseError as error:
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
        """Create the tables and indexes that are missing. Safe to repeat and to race."""
        with analytics_errors():
            Base.metadata.create_all(self.engine)

    def sync_catalog(self, catalog: Catalog) -> None:
        """Make campaigns and their targets equal to the catalog; engagement totals stay."""
        with analytics_errors(), self.engine.begin() as connection:
            totals = {
                row.campaign_id: {"users": row.users, "messages": row.messages, "last_at": row.last_at}
                for row in connection.execute(select(CampaignRecord.__table__))
            }
            nothing = {"users": 0, "messages": 0, "last_at": None}
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

    def users(self, run_id: str | None, per_page: int) -> Iterator[list[str]]:
        """Yield the users whose messages the run classified (None: all users), in order, a page at a time."""
        query = select(MessageIntent.user_id).distinct().order_by(MessageIntent.user_id).limit(per_page)
        if run_id is not None:
            query = query.where(MessageIntent.run_id == run_id)
        last = ""
        while page := self._fetch(query.where(MessageIntent.user_id > last)):
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

    def expressed_intents(self, user_ids: Sequence[str]) -> list[ExpressedIntent]:
        """What the users expressed, counted over all their messages; `other` left out."""
        query = (
            select(
                MessageIntent.user_id,
                MessageIntent.intent_id,
                func.count().label("count"),
                func.max(MessageIntent.timestamp).label("last_seen"),
                func.avg(MessageIntent.confidence).label("confidence"),
            )
            .where(MessageIntent.intent_id != OTHER_INTENT)
            .group_by(MessageIntent.user_id, MessageIntent.intent_id)
        )
        return [ExpressedIntent(**row) for row in self._of_users(query, MessageIntent.user_id, user_ids)]

    def engagement(self, user_ids: Sequence[str]) -> list[Engagement]:
        """The users' engagement as their messages have it now, whether rolled up yet or not."""
        query = _engagement_query()
        return [Engagement(**row) for row in self._of_users(query, MessageIntent.user_id, user_ids)]

    def roll_up_engagement(self, user_ids: Sequence[str]) -> int:
        """Set `user_engagement` of the users, in one transaction; return its rows."""
        columns = ["user_id", "campaign_id", "count", "last_at"]
        rows = 0
        with analytics_errors(), self.engine.begin() as connection:
            for chunk in _chunks(user_ids):
                connection.execute(delete(UserEngagement).where(UserEngagement.user_id.in_(chunk)))
                fresh = _engagement_query().where(MessageIntent.user_id.in_(chunk))
                rows += connection.execute(insert(UserEngagement).from_select(columns, fresh)).rowcount
        return rows

    def refresh_campaign_totals(self) -> None:
        """Set every campaign's totals from `user_engagement`. Cost grows with that table."""
        totals = {
            "users": func.count(UserEngagement.user_id),
            "messages": func.coalesce(func.sum(UserEngagement.count), 0),
            "last_at": func.max(UserEngagement.last_at),
        }
        own = UserEngagement.campaign_id == CampaignRecord.campaign_id
        values = {name: select(total).where(own).scalar_subquery() for name, total in totals.items()}
        with analytics_errors(), self.engine.begin() as connection:
            connection.execute(CampaignRecord.__table__.update().values(values))  # type: ignore[attr-defined]

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

    def record_runs(self, rows: Sequence[dict[str, Any]]) -> None:
        """Set the lineage rows of a run, in one transaction."""
        run_ids = {row["run_id"] for row in rows}
        with analytics_errors(), self.engine.begin() as connection:
            connection.execute(delete(PipelineRun).where(PipelineRun.run_id.in_(run_ids)))
            connection.execute(insert(PipelineRun), list(rows))

    def count_users_without_intent(self) -> int:
        """Users who have messages but expressed no intent: they have no relationship in the graph."""
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

    def _of_users(
        self, query: Select[*tuple[Any, ...]], column: Any, user_ids: Sequence[str]
    ) -> Iterator[dict[str, Any]]:
        for chunk in _chunks(user_ids):
            yield from self._fetch(query.where(column.in_(chunk)))

    def _fetch(self, query: Select[*tuple[Any, ...]]) -> list[dict[str, Any]]:
        with analytics_errors(), self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]


class AsyncAnalyticsReader:
    """Look-ups of the API. Never writes."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine

    @classmethod
    def from_settings(cls, settings: Settings) -> "AsyncAnalyticsReader":
        """Open the database for reading."""
        return cls(create_async_engine(_read_only(settings.analytics_database, "sqlite+aiosqlite")))

    async def campaign_users(self) -> dict[str, int]:
        """Number of engaged users by campaign: one small row each."""
        query = select(CampaignRecord.campaign_id, CampaignRecord.users)
        with analytics_errors():
            async with self.engine.connect() as connection:
                return {row.campaign_id: row.users for row in await connection.execute(query)}


def open_read_only(settings: Settings) -> Engine:
    """Engine for readers such as the dashboard. SQLite refuses every write, and a missing file stays missing."""
    return create_engine(_read_only(settings.analytics_database, "sqlite"))


def _engagement_query() -> Select[*tuple[Any, ...]]:
    """Messages whose intent a campaign targets, sent while it ran, by user and campaign."""
    return (
        select(
            MessageIntent.user_id,
            CampaignTarget.campaign_id,
            func.count(MessageIntent.message_id.distinct()).label("count"),
            func.max(MessageIntent.timestamp).label("last_at"),
        )
        .join(CampaignTarget, CampaignTarget.intent_id == MessageIntent.intent_id)
        .join(CampaignRecord, CampaignRecord.campaign_id == CampaignTarget.campaign_id)
        .where(
            MessageIntent.timestamp >= CampaignRecord.active_from,
            MessageIntent.timestamp < CampaignRecord.active_until,
        )
        .group_by(MessageIntent.user_id, CampaignTarget.campaign_id)
    )


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


def _configure_sqlite(connection: Any, record: ConnectionPoolEntry) -> None:  # noqa: ARG001
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")  # readers and the one writer do not block each other
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
    cursor.close()
