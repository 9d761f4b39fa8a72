"""Where a recommendation comes from: the user's own messages and events, their source rows, and the runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Engine, Select, and_, case, func, or_, select

from personalization.quality.reports import StageRun
from personalization.schemas import EventKind
from personalization.stores.analytics import analytics_errors
from personalization.stores.mongo import Document, MongoReader, MongoStore
from personalization.stores.tables import CampaignTarget, EventRecord, MessageIntent, PipelineRun, Served

MESSAGES_KEPT = 50
"""Newest messages and newest events that are traced, unless more are asked for."""


@dataclass(frozen=True)
class Source:
    """Where a message or event came from."""

    uri: str
    row: int | None
    """From 1; None for an event of the API."""
    sha256: str | None
    taken_by: str | None
    """The run that last took it; None for an event that waits for its first."""


@dataclass(frozen=True)
class TracedIntent:
    """An intent that a message expresses."""

    intent_id: str
    confidence: float
    is_targeted: bool
    """Whether the campaign targets it."""


@dataclass(frozen=True)
class TracedMessage:
    """A message of the user that speaks for the campaign."""

    message_id: str
    said_at: datetime
    text: str | None
    """None, as `source`, where MongoDB holds the message no more."""
    intents: list[TracedIntent]
    """The targeted ones first."""
    source: Source | None
    run_id: str
    """The run that embedded it."""


@dataclass(frozen=True)
class TracedEvent:
    """What the user did with the campaign."""

    event_id: str
    event: EventKind
    at: datetime
    source: Source | None
    run_id: str
    """The run that rolled it up."""


@dataclass(frozen=True)
class TracedRun:
    """A run that messages or events went through, or that made what is served."""

    run_id: str
    is_served: bool
    """Whether the API answers from what it published."""
    stages: list[StageRun]
    """In order; none where its lineage was not recorded."""

    @property
    def started_at(self) -> datetime | None:
        """When its first stage began."""
        return min((one.started_at for one in self.stages if one.started_at), default=None)

    @property
    def status(self) -> str:
        """`success` or `failed`; `unknown` without lineage."""
        if not self.stages:
            return "unknown"
        return "failed" if any(one.status == "failed" for one in self.stages) else "success"


@dataclass(frozen=True)
class Trace:
    """What stands behind recommending a campaign to a user.

    Without messages and events of the user, the recommendation rests on others: similar users, popularity.
    """

    user_id: str
    campaign_id: str
    messages: list[TracedMessage]
    """The newest first."""
    messages_in_all: int
    events: list[TracedEvent]
    """The newest first."""
    events_in_all: int
    runs: list[TracedRun]
    """The newest first."""


def trace(
    user_id: str,
    campaign_id: str,
    *,
    engine: Engine,
    mongo: MongoStore | MongoReader,
    message_ids: Sequence[str] = (),
    limit: int = MESSAGES_KEPT,
) -> Trace:
    """Walk from a recommendation back to the messages, source rows and runs that led to it.

    The messages are the user's that express an intent the campaign targets, and those of `message_ids` that are the
    user's, such as the evidence of an explained answer. Three statements over indexes and two look-ups by id.

    Raises:
        StoreError: the analytics database or MongoDB.
    """
    with analytics_errors(), engine.connect() as connection:
        said = connection.execute(_messages(user_id, campaign_id, message_ids, limit)).mappings().all()
        done = connection.execute(_events(user_id, campaign_id, limit)).mappings().all()
        run_ids = {row["run_id"] for row in (*said, *done)}
        stages = connection.execute(_stages(run_ids)).mappings().all()
    documents = mongo.read("message", sorted({row["message_id"] for row in said}))
    event_documents = mongo.read("event", [row["event_id"] for row in done])
    return Trace(
        user_id=user_id,
        campaign_id=campaign_id,
        messages=_traced_messages(said, documents),
        messages_in_all=said[0]["in_all"] if said else 0,
        events=[
            TracedEvent(
                event_id=row["event_id"],
                event=row["event"],
                at=_moment(row["timestamp"]),
                source=_source(event_documents.get(row["event_id"])),
                run_id=row["run_id"],
            )
            for row in done
        ],
        events_in_all=done[0]["in_all"] if done else 0,
        runs=_traced_runs(run_ids, stages),
    )


def _messages(user_id: str, campaign_id: str, message_ids: Sequence[str], limit: int) -> Select[*tuple[Any, ...]]:
    """The newest messages, a row by intent, with how many messages there are in all."""
    target = and_(CampaignTarget.intent_id == MessageIntent.intent_id, CampaignTarget.campaign_id == campaign_id)
    is_targeted = CampaignTarget.intent_id.is_not(None)
    chosen = (
        select(MessageIntent.message_id, func.count().over().label("in_all"))
        .outerjoin(CampaignTarget, target)
        .where(MessageIntent.user_id == user_id, or_(is_targeted, MessageIntent.message_id.in_(message_ids)))
        .group_by(MessageIntent.message_id)
        .order_by(func.max(MessageIntent.timestamp).desc(), MessageIntent.message_id)
        .limit(limit)
        .subquery()
    )
    targeted = case((is_targeted, 1), else_=0)
    return (
        select(
            MessageIntent.message_id,
            MessageIntent.timestamp,
            MessageIntent.run_id,
            MessageIntent.intent_id,
            MessageIntent.confidence,
            targeted.label("is_targeted"),
            chosen.c.in_all,
        )
        .join(chosen, chosen.c.message_id == MessageIntent.message_id)
        .outerjoin(CampaignTarget, target)
        .order_by(
            MessageIntent.timestamp.desc(),
            MessageIntent.message_id,
            targeted.desc(),
            MessageIntent.confidence.desc(),
        )
    )


def _events(user_id: str, campaign_id: str, limit: int) -> Select[*tuple[Any, ...]]:
    return (
        select(
            EventRecord.event_id,
            EventRecord.event,
            EventRecord.timestamp,
            EventRecord.run_id,
            func.count().over().label("in_all"),
        )
        .where(EventRecord.user_id == user_id, EventRecord.campaign_id == campaign_id)
        .order_by(EventRecord.timestamp.desc(), EventRecord.event_id)
        .limit(limit)
    )


def _stages(run_ids: set[str]) -> Select[*tuple[Any, ...]]:
    """The stages of the runs, and of the one that made what is served."""
    is_served = PipelineRun.run_id.in_(select(Served.run_id))
    return (
        select(PipelineRun.__table__, case((is_served, 1), else_=0).label("is_served"))
        .where(or_(PipelineRun.run_id.in_(run_ids), is_served))
        .order_by(PipelineRun.position)
    )


def _traced_messages(rows: Sequence[Any], documents: dict[str, Document]) -> list[TracedMessage]:
    found: dict[str, TracedMessage] = {}
    for row in rows:
        message_id = row["message_id"]
        if message_id not in found:
            document = documents.get(message_id)
            found[message_id] = TracedMessage(
                message_id=message_id,
                said_at=_moment(row["timestamp"]),
                text=document["message"] if document else None,
                intents=[],
                source=_source(document),
                run_id=row["run_id"],
            )
        intent = TracedIntent(row["intent_id"], row["confidence"], bool(row["is_targeted"]))
        found[message_id].intents.append(intent)
    return list(found.values())


def _traced_runs(run_ids: set[str], rows: Sequence[Any]) -> list[TracedRun]:
    stages: dict[str, list[StageRun]] = {run_id: [] for run_id in run_ids}
    served: set[str] = set()
    for row in rows:
        columns = dict(row)
        if columns.pop("is_served"):
            served.add(row["run_id"])
        stages.setdefault(row["run_id"], []).append(StageRun(**columns))
    runs = [TracedRun(run_id, run_id in served, of_run) for run_id, of_run in stages.items()]
    long_ago = datetime.min.replace(tzinfo=UTC)
    return sorted(runs, key=lambda one: (one.started_at or long_ago, one.run_id), reverse=True)


def _source(document: Document | None) -> Source | None:
    if document is None:
        return None
    place = document["source"]
    return Source(place["uri"], place.get("row"), place.get("sha256"), document["run_id"])


def _moment(timestamp: int) -> datetime:
    return datetime.fromtimestamp(timestamp / 1000, UTC)
