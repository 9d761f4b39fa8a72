"""Vectors: embedded shards to Milvus, and the vectors of the users from those of their messages."""

from collections import defaultdict

import numpy as np

from personalization.pipeline.embed import embeddings_of
from personalization.pipeline.lineage import StageReport
from personalization.schemas import DAY_MS, Ref
from personalization.settings import Settings
from personalization.staging import read
from personalization.stores.analytics import AnalyticsStore
from personalization.stores.milvus import MESSAGES, USERS, VectorSpace, VectorStore

_USERS_AT_ONCE = 250


def upsert_vectors(report: StageReport, shard: Ref, *, space: VectorSpace, vectors: VectorStore) -> None:
    """Insert or replace the shard's vectors by message id, 1,000 a round trip."""
    table = read(shard)
    columns = table.select(["id", "user_id", "timestamp"]).to_pylist()
    rows = [{**row, "embedding": vector} for row, vector in zip(columns, embeddings_of(table), strict=True)]
    report.rows_in = len(rows)
    vectors.upsert(space.collection(MESSAGES), rows)
    report.rows_out = len(rows)


def refresh_profiles(
    report: StageReport,
    *,
    space: VectorSpace,
    analytics: AnalyticsStore,
    vectors: VectorStore,
    settings: Settings,
) -> None:
    """Set the vectors of the users whose messages the run embedded; events and an edit of the catalog move none.

    A user's vector is the L2-normalised sum of their newest messages' vectors, each weighted by
    2^(-age / half-life), age counted from the user's newest message: so a repeat changes nothing.
    Reads each of those vectors once, 1,000 a round trip.
    """
    for user_ids in analytics.users_with_messages(report.run_id, _USERS_AT_ONCE):
        report.rows_in += len(user_ids)
        rows = _profiles(user_ids, space, analytics, vectors, settings)
        vectors.upsert(space.collection(USERS), rows)
        report.rows_out += len(rows)


def _profiles(
    user_ids: list[str],
    space: VectorSpace,
    analytics: AnalyticsStore,
    vectors: VectorStore,
    settings: Settings,
) -> list[dict[str, object]]:
    newest = analytics.newest_messages(user_ids, settings.profile_max_messages)
    last_seen: dict[str, int] = defaultdict(int)
    for message in newest:
        last_seen[message["user_id"]] = max(last_seen[message["user_id"]], message["timestamp"])
    users = list(last_seen)
    place = {user_id: at for at, user_id in enumerate(users)}
    weights = {
        message["message_id"]: (
            place[message["user_id"]],
            _weight(last_seen[message["user_id"]] - message["timestamp"], settings.profile_half_life_days),
        )
        for message in newest
    }
    sums = np.zeros((len(users), space.dim), dtype=np.float32)
    for rows in vectors.vectors(space.collection(MESSAGES), list(weights)):
        for row in rows:
            at, weight = weights[row["id"]]
            sums[at] += weight * np.asarray(row["embedding"], dtype=np.float32)
    norms = np.linalg.norm(sums, axis=1)
    return [
        {"id": user_id, "last_seen": last_seen[user_id], "embedding": sums[at] / norms[at]}
        for user_id, at in place.items()
        if norms[at] > 0
    ]


def _weight(age_ms: int, half_life_days: float) -> np.float32:
    return np.float32(2.0 ** (-age_ms / (half_life_days * DAY_MS)))
