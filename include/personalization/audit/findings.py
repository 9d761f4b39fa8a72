"""What an audit finds: the kinds of drift, what each means, and what to do."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

Remedy = Literal["messages", "events", "users", "delete", "catalog", "publish", "generation", "erase"]
"""What mends it: messages or events taken again, users refreshed, orphans deleted, the catalog applied again, a new
publish, a new serving generation, or the erasure of whom is named.
"""
Scope = Literal["message", "event", "user", "other"]
"""Whose work in progress excuses it."""


@dataclass(frozen=True)
class Kind:
    """A way in which stores may disagree."""

    name: str
    store: str
    """Where it is wrong: mongodb, milvus, neo4j, analytics or redis."""
    severity: Literal["error", "warning"]
    title: str
    meaning: str
    advice: str
    remedy: Remedy | None
    scope: Scope


_REPAIR = "Run the DAG `store_audit` with `repair`, or `personalization audit --repair`"

KINDS: dict[str, Kind] = {
    one.name: one
    for one in (
        Kind(
            "message_left_behind",
            "mongodb",
            "warning",
            "Messages that no run finished",
            "The run that took them broke off, and none has taken them again: they count for nobody.",
            f"Run the pipeline on their file again. {_REPAIR} to take them from MongoDB.",
            "messages",
            "other",
        ),
        Kind(
            "erased_user_left",
            "mongodb",
            "error",
            "Something of erased users is stored",
            "An erasure was settled, and the person is stored again: a restored backup, or a write past the stages.",
            f"{_REPAIR}: the person is erased again. Find out who wrote it.",
            "erase",
            "other",
        ),
        Kind(
            "message_without_vector",
            "milvus",
            "error",
            "Messages without a vector",
            "They are published, but neither similar users nor the user's own profile know of them.",
            f"{_REPAIR}: they are embedded again from MongoDB.",
            "messages",
            "message",
        ),
        Kind(
            "vector_without_message",
            "milvus",
            "error",
            "Vectors without a message",
            "MongoDB knows no such message: it was deleted past the platform, or Milvus was restored alone.",
            f"{_REPAIR}: the vectors are deleted. If the messages are what is missing, restore MongoDB first.",
            "delete",
            "message",
        ),
        Kind(
            "kept_vector_missing",
            "milvus",
            "warning",
            "Messages without a vector of the former model",
            "It is kept for a way back, which would have to embed them first. What is served does not lack them.",
            f"{_REPAIR}: they are embedded again by both. Or drop it, by the DAG `reembed_finish`.",
            "messages",
            "message",
        ),
        Kind(
            "kept_vector_without_message",
            "milvus",
            "warning",
            "Vectors of the former model without a message",
            "It is kept for a way back, and holds what MongoDB does not know.",
            f"{_REPAIR}: the vectors are deleted. Or drop it, by the DAG `reembed_finish`.",
            "delete",
            "message",
        ),
        Kind(
            "vector_invalid",
            "milvus",
            "error",
            "Message vectors that are zero or not of unit length",
            "Every similarity with them is wrong, and so are the profiles made of them.",
            f"{_REPAIR}: the messages are embedded again. If they come back, the model or its device is at fault.",
            "messages",
            "message",
        ),
        Kind(
            "vector_differs",
            "milvus",
            "error",
            "Vectors of another user or time than their message",
            "They count for the wrong user, or at the wrong time.",
            f"{_REPAIR}: the messages are embedded again.",
            "messages",
            "message",
        ),
        Kind(
            "collection_wrong",
            "milvus",
            "error",
            "A collection is not what readers expect",
            "Its alias or dimension is not that of the vector space that is served; readers get nothing, or fail.",
            "Run the pipeline: it makes what is missing and sets the aliases. What then lacks in it, the next audit "
            "finds and `repair` fills.",
            None,
            "other",
        ),
        Kind(
            "user_without_profile",
            "milvus",
            "error",
            "Users without a profile",
            "They have messages, but no vector or no interests: they are answered as somebody new.",
            f"{_REPAIR}: their profiles are made anew.",
            "users",
            "user",
        ),
        Kind(
            "profile_without_user",
            "milvus",
            "warning",
            "Profiles of nobody",
            "No message is of these users; they crowd out the similar users of others.",
            f"{_REPAIR}: the profiles are deleted.",
            "delete",
            "user",
        ),
        Kind(
            "profile_invalid",
            "milvus",
            "error",
            "Profiles or interests that are zero or not of unit length",
            "Similar users found by them are wrong.",
            f"{_REPAIR}: the profiles are made anew.",
            "users",
            "user",
        ),
        Kind(
            "profile_stale",
            "milvus",
            "warning",
            "Profiles that are older than the user's messages",
            "A profile was made before, or of other messages than, the ones that are stored.",
            f"{_REPAIR}: the profiles are made anew.",
            "users",
            "user",
        ),
        Kind(
            "message_without_intents",
            "analytics",
            "error",
            "Messages without intents",
            "`message_intents` has no row of them, not even `other`: graph and engagement leave them out.",
            f"{_REPAIR}: they are classified again.",
            "messages",
            "message",
        ),
        Kind(
            "intents_without_message",
            "analytics",
            "error",
            "Intents of messages that are not there",
            "Counts in the graph and in engagement include what nobody said.",
            f"{_REPAIR}: the rows are deleted and their users refreshed.",
            "delete",
            "message",
        ),
        Kind(
            "intents_differ",
            "analytics",
            "error",
            "Intents other than what the messages say",
            "Rows of `message_intents` name another user, time or run than the message, or another intent than the "
            "served classifier reads from its vector.",
            f"{_REPAIR}: the messages are classified again.",
            "messages",
            "message",
        ),
        Kind(
            "event_missing",
            "analytics",
            "error",
            "Events that SQL does not know",
            "A published run took them; engagement, rules and experiments leave them out.",
            f"{_REPAIR}: they are taken again.",
            "events",
            "event",
        ),
        Kind(
            "event_without_source",
            "analytics",
            "error",
            "Events that MongoDB does not know",
            "Engagement and experiments count what was never received.",
            f"{_REPAIR}: the rows are deleted and their users refreshed.",
            "delete",
            "event",
        ),
        Kind(
            "event_differs",
            "analytics",
            "error",
            "Events that differ from what was received",
            "User, campaign, kind, time or place is another than in MongoDB.",
            f"{_REPAIR}: they are taken again.",
            "events",
            "event",
        ),
        Kind(
            "engagement_differs",
            "analytics",
            "error",
            "Engagement that differs from messages and events",
            "A row of `user_engagement` is missing, too much, or counts something else than what is stored.",
            f"{_REPAIR}: it is rolled up again.",
            "users",
            "user",
        ),
        Kind(
            "campaign_totals_differ",
            "analytics",
            "warning",
            "Campaign totals that are not the sum of engagement",
            "The dashboard shows wrong totals; answers are not affected.",
            f"{_REPAIR}: the totals are summed up again.",
            "users",
            "other",
        ),
        Kind(
            "catalog_differs",
            "analytics",
            "error",
            "Campaigns in SQL that are not those of the served catalog",
            "Engagement is rolled up for other campaigns, intents or windows than are served.",
            f"{_REPAIR}: the catalog is applied again.",
            "catalog",
            "other",
        ),
        Kind(
            "knowledge_not_served",
            "analytics",
            "error",
            "What is served is missing or half published",
            "The last publish did not end, or another version made it; the API answers of before, or says 503.",
            f"Run the pipeline, also on nothing new. {_REPAIR} does the same.",
            "publish",
            "other",
        ),
        Kind(
            "user_without_node",
            "neo4j",
            "error",
            "Users who are not in the graph",
            "Nothing they said or did counts in their recommendations.",
            f"{_REPAIR}: they are written again.",
            "users",
            "user",
        ),
        Kind(
            "node_without_user",
            "neo4j",
            "error",
            "Nodes and edges of users nobody knows",
            "MongoDB has no message and no event of them; their edges count in the recommendations of others.",
            f"{_REPAIR}: the nodes are deleted with their edges.",
            "delete",
            "user",
        ),
        Kind(
            "expressed_differs",
            "neo4j",
            "error",
            "EXPRESSED edges that differ from `message_intents`",
            "An edge is missing, too much, or its count or time is wrong: own intents rank wrongly.",
            f"{_REPAIR}: the users' edges are written again.",
            "users",
            "user",
        ),
        Kind(
            "engaged_differs",
            "neo4j",
            "error",
            "ENGAGED_WITH edges that differ from messages and events",
            "An edge is missing, too much, or its count or time is wrong: engagement ranks wrongly, also for others.",
            f"{_REPAIR}: the users' edges are written again.",
            "users",
            "user",
        ),
        Kind(
            "graph_catalog_differs",
            "neo4j",
            "error",
            "Campaigns in the graph that are not those of the catalog",
            "A campaign, an intent or a TARGETS edge is missing, too much, or other than in SQL.",
            f"{_REPAIR}: the catalog is applied again.",
            "catalog",
            "other",
        ),
        Kind(
            "generation_stale",
            "redis",
            "error",
            "The serving generation went back",
            "Redis is at an older generation than was published, as after a restored backup: answers made of older "
            "data may be given as fresh.",
            f"{_REPAIR}: a generation begins that was never before.",
            "generation",
            "other",
        ),
        Kind(
            "answer_of_no_generation",
            "redis",
            "error",
            "Cached answers of a generation that is yet to come",
            "They would be given as fresh once the generation reaches theirs.",
            f"{_REPAIR}: a generation begins that is beyond them.",
            "generation",
            "other",
        ),
    )
}


@dataclass(frozen=True)
class Sample:
    """One case of a finding."""

    item: str
    """Id of the message, event, user, edge …"""
    user_id: str | None
    expected: str | None
    """What it should be; none where it should not be there."""
    found: str | None
    """What it is; none where it is missing."""


@dataclass(frozen=True)
class Finding:
    """All cases of a kind."""

    kind: Kind
    count: int
    samples: Sequence[Sample]
    left: int | None = None
    """How many a repair left; none where none was tried."""


Status = Literal["clean", "repaired", "drift"]


@dataclass(frozen=True)
class AuditReport:
    """One audit."""

    audit_id: str
    started_at: datetime
    finished_at: datetime
    status: Status
    repair: bool
    compared: dict[str, dict[str, int]]
    """Rows that were read, by store and kind of row."""
    in_flux: int
    """Messages that a run at work has taken, which are not compared."""
    findings: Sequence[Finding] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """As JSON says it."""
        return {
            "audit_id": self.audit_id,
            "status": self.status,
            "repair": self.repair,
            "started_at": self.started_at.isoformat(),
            "finished_at": self.finished_at.isoformat(),
            "compared": self.compared,
            "in_flux": self.in_flux,
            "findings": [
                {
                    "kind": one.kind.name,
                    "store": one.kind.store,
                    "severity": one.kind.severity,
                    "title": one.kind.title,
                    "count": one.count,
                    "left": one.left,
                    "repairable": one.kind.remedy is not None,
                    "meaning": one.kind.meaning,
                    "advice": one.kind.advice,
                    "samples": [vars(sample) for sample in one.samples],
                }
                for one in self.findings
            ],
        }
