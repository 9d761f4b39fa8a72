"""Fill: messages from MongoDB into a vector space beside the live one, while runs go on writing to both."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import structlog

from personalization.errors import MigrationError
from personalization.migration.differences import Differences, differences
from personalization.migration.filling import Filling
from personalization.migration.scene import Scene
from personalization.pipeline.embed import vectors_of
from personalization.pipeline.lineage import StageReport
from personalization.pipeline.vectors import USERS_AT_ONCE, set_profiles, write_vectors
from personalization.schemas import Ref, VectorSpace
from personalization.staging import read
from personalization.stores.cache import VectorCache
from personalization.stores.milvus import MESSAGES

_ORPHANS_AT_ONCE = 1000
_PASSES = 5

log = structlog.get_logger(__name__)


def fill(report: StageReport, shard: Ref, target: VectorSpace, scene: Scene) -> None:
    """Embed one shard's messages as MongoDB has them and write their vectors; a shard that is done costs nothing.

    Memory: the texts and vectors of a shard. A killed one is done again from its beginning.
    """
    report.model = target.model
    filling = Filling.of(scene.settings, target)
    report.rows_in = shard["rows"]
    if filling.is_filled(shard):
        report.skipped = shard["rows"]
        return
    report.rows_out = embed_messages(report, read(shard).column("id").to_pylist(), target, scene)
    report.skipped = report.rows_in - report.rows_out
    report.bytes_written += report.rows_out * target.vector_bytes
    filling.mark_filled(shard)


def catch_up(report: StageReport, target: VectorSpace, scene: Scene) -> None:
    """Embed what MongoDB has and the target has not, and delete what MongoDB has no more; then make all profiles.

    Compares the ids of both, on disk. What a run brings in meanwhile it writes to the target itself.

    Raises:
        MigrationError: messages come in faster than they can be embedded.
    """
    report.model = target.model
    if target == scene.live():
        return
    for _ in range(_PASSES):
        with differences(scene, target) as found:
            report.rows_in = max(report.rows_in, found.messages)
            if not found.missing and not found.orphans:
                break
            _settle(report, found, target, scene)
    else:
        raise MigrationError("messages come in faster than they are embedded; try again when there are fewer")
    for users in scene.stores.analytics.users(None, USERS_AT_ONCE):
        set_profiles(
            report.model_copy(),
            users,
            space=target,
            mongo=scene.stores.mongo,
            analytics=scene.stores.analytics,
            vectors=scene.stores.vectors,
            settings=scene.settings,
        )


def _settle(report: StageReport, found: Differences, target: VectorSpace, scene: Scene) -> None:
    for ids in found.missing_pages(scene.settings.shard_rows):
        report.rows_out += embed_messages(report, ids, target, scene)
    for ids in found.orphan_pages(_ORPHANS_AT_ONCE):
        known = scene.stores.mongo.stored("message", ids)  # again, right before
        scene.stores.vectors.delete(target.collection(MESSAGES), [one for one in ids if one not in known])
        report.skipped += len(ids) - len(known)


def embed_messages(report: StageReport, ids: Sequence[str], target: VectorSpace, scene: Scene) -> int:
    """Embed messages by id as MongoDB has them and write their vectors; return how many.

    A run may edit a message meanwhile, and write its vector before ours, which is of the old text. So MongoDB is asked
    again behind each write, and what differs is embedded again: an edit that comes after that is written after it, as a
    run writes to MongoDB first. The same holds for an erasure.
    """
    mongo, vectors = scene.stores.mongo, scene.stores.vectors
    collection = target.collection(MESSAGES)
    written = 0
    to_do = list(ids)
    while to_do:
        found = mongo.texts(to_do)
        _write(report, found, target, scene)
        written = max(written, len(found))
        after = mongo.texts(to_do)
        vectors.delete(collection, [one for one in to_do if one not in after])
        erased = mongo.erased_among({one["user_id"] for one in after.values()})
        vectors.delete(collection, [one["_id"] for one in after.values() if one["user_id"] in erased])
        to_do = [
            one["_id"]
            for one in after.values()
            if one["user_id"] not in erased and one["content_hash"] != found.get(one["_id"], {}).get("content_hash")
        ]
    return written


def _write(report: StageReport, found: dict[str, dict[str, Any]], target: VectorSpace, scene: Scene) -> None:
    if not found:
        return
    messages = list(found.values())
    cache = VectorCache(scene.stores.cache.client, scene.settings.vector_cache_days)
    matrix = vectors_of([(one["user_id"], one["message"]) for one in messages], target, cache, report)
    table = pa.table(
        {
            "id": [one["_id"] for one in messages],
            "user_id": [one["user_id"] for one in messages],
            "timestamp": [int(one["timestamp"].timestamp() * 1000) for one in messages],
        }
    )
    write_vectors(table, matrix, space=target, mongo=scene.stores.mongo, vectors=scene.stores.vectors)
