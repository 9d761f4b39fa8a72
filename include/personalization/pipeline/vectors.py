"""Vectors: embedded shards to Milvus, and the vectors of the users from those of their messages."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain

import numpy as np
import pyarrow as pa

from personalization.encoder import Vectors
from personalization.learning.history import RECENT_MESSAGES, interests_of
from personalization.learning.loading import VectorSource
from personalization.pipeline.embed import embeddings_of
from personalization.pipeline.lineage import StageReport
from personalization.pipeline.run_vectors import run_vectors
from personalization.pipeline.spaces import spaces_beside
from personalization.recommend.sources import Vector
from personalization.schemas import DAY_MS, INTERESTS_PER_USER, Ref, VectorSpace
from personalization.settings import Settings
from personalization.staging import read, read_column
from personalization.stores.analytics import AnalyticsStore
from personalization.stores.milvus import INTERESTS, MESSAGES, USERS, VectorStore, interest_id
from personalization.stores.mongo import MongoStore

USERS_AT_ONCE = 250
"""Whose profiles are made together: memory holds the newest messages' vectors of so many."""


def upsert_vectors(
    report: StageReport, shard: Ref, *, space: VectorSpace, mongo: MongoStore, vectors: VectorStore
) -> None:
    """Insert or replace the shard's vectors by message id, 1,000 a round trip, but for those of erased users."""
    table = read(shard)
    report.rows_in = table.num_rows
    report.rows_out = write_vectors(table, embeddings_of(table), space=space, mongo=mongo, vectors=vectors)
    report.skipped = report.rows_in - report.rows_out
    report.bytes_written = report.rows_out * space.vector_bytes


def write_vectors(
    messages: pa.Table, matrix: Vectors, *, space: VectorSpace, mongo: MongoStore, vectors: VectorStore
) -> int:
    """Insert or replace the vectors (n, dim) of messages (`id, user_id, timestamp`), but for those of erased users;
    return how many.
    """
    columns = messages.select(["id", "user_id", "timestamp"]).to_pylist()
    erased = mongo.erased_among({row["user_id"] for row in columns})
    rows = [
        {**row, "embedding": vector}
        for row, vector in zip(columns, matrix, strict=True)
        if row["user_id"] not in erased
    ]
    vectors.upsert(space.collection(MESSAGES), rows)
    return len(rows)


def refresh_profiles(
    report: StageReport,
    embedded: Sequence[Ref],
    more_users: Sequence[Ref] = (),
    *,
    space: VectorSpace,
    mongo: MongoStore,
    analytics: AnalyticsStore,
    vectors: VectorStore,
    settings: Settings,
) -> None:
    """Set the vectors and interests of the users whose messages the run embedded, and of `more_users`, which are pages,
    in the run's space and in those that are kept up to date beside it.

    A user's vector is the L2-normalised sum of their newest messages' vectors, each weighted by
    2^(-age / half-life), age counted from the user's newest message: so a repeat changes nothing.
    Reads each of those vectors once, from the run's shards `embedded`, or from Milvus, 1,000 a round trip.
    """
    others = (
        page[at : at + USERS_AT_ONCE]
        for page in read_column(list(more_users), "user_id")
        for at in range(0, len(page), USERS_AT_ONCE)
    )
    with run_vectors(vectors, space, embedded) as at_hand:
        for user_ids in chain(analytics.users_with_messages(report.run_id, USERS_AT_ONCE), others):
            for one in (space, *spaces_beside(analytics, space)):
                set_profiles(
                    report if one == space else report.model_copy(),  # what is counted is what is served
                    user_ids,
                    space=one,
                    mongo=mongo,
                    analytics=analytics,
                    vectors=vectors,
                    settings=settings,
                    said=at_hand,
                )
    if report.rows_out:
        vectors.seal([space.collection(USERS), space.collection(INTERESTS)])


def set_profiles(
    report: StageReport,
    user_ids: list[str],
    *,
    space: VectorSpace,
    mongo: MongoStore,
    analytics: AnalyticsStore,
    vectors: VectorStore,
    settings: Settings,
    said: VectorSource | None = None,
) -> None:
    """Set the vectors and interests of some users in a space from those of their messages there.

    `said` is where the latter are read, if not from `vectors`.
    """
    report.rows_in += len(user_ids)
    rows, interests = _profiles(user_ids, space, analytics, said or vectors, settings)
    erased = mongo.erased_among(user_ids)
    rows = [one for one in rows if one["id"] not in erased]
    interests = [one for one in interests if one["user_id"] not in erased]
    vectors.upsert(space.collection(USERS), rows)
    vectors.upsert(space.collection(INTERESTS), interests)
    kept = {one["id"] for one in interests}
    possible = (interest_id(one, place) for one in user_ids for place in range(INTERESTS_PER_USER))
    vectors.delete(space.collection(INTERESTS), [one for one in possible if one not in kept])
    report.rows_out += len(rows)
    report.bytes_written += (len(rows) + len(interests)) * space.vector_bytes


def _profiles(
    user_ids: list[str],
    space: VectorSpace,
    analytics: AnalyticsStore,
    vectors: VectorSource,
    settings: Settings,
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Rows of the users, and of their interests."""
    newest = sorted(
        analytics.newest_messages(user_ids, settings.profile_max_messages),
        key=lambda message: (message["timestamp"], message["message_id"]),
    )
    found = {
        row["id"]: np.asarray(row["embedding"], dtype=np.float32)
        for rows in vectors.vectors(space.collection(MESSAGES), [message["message_id"] for message in newest])
        for row in rows
    }
    said: dict[str, list[tuple[int, Vector]]] = defaultdict(list)
    for message in newest:
        if message["message_id"] in found:
            said[message["user_id"]].append((message["timestamp"], found[message["message_id"]]))
    profiles: list[dict[str, object]] = []
    interests: list[dict[str, object]] = []
    for user_id, messages in said.items():
        last_seen = messages[-1][0]
        weights = np.asarray([_weight(last_seen - at, settings.profile_half_life_days) for at, _ in messages])
        matrix = np.stack([vector for _, vector in messages])
        total = weights @ matrix
        if (norm := np.linalg.norm(total)) == 0:
            continue
        profiles.append({"id": user_id, "last_seen": last_seen, "embedding": total / norm})
        apart = interests_of(matrix[-RECENT_MESSAGES:], weights[-RECENT_MESSAGES:])
        interests += [
            {"id": interest_id(user_id, place), "user_id": user_id, "last_seen": last_seen, "embedding": vector}
            for place, vector in enumerate(apart)
        ]
    return profiles, interests


def _weight(age_ms: int, half_life_days: float) -> np.float32:
    return np.float32(2.0 ** (-age_ms / (half_life_days * DAY_MS)))
