"""Intents: a message expresses the intent of its nearest example utterance, if near enough, else `other`."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import structlog

from personalization.catalog.loading import catalog_version, intents_version
from personalization.encoder import Vectors
from personalization.pipeline.embed import embeddings_of
from personalization.pipeline.lineage import StageReport
from personalization.schemas import OTHER_INTENT, Catalog, Ref
from personalization.settings import Settings
from personalization.staging import Staging, read
from personalization.stores.analytics import AnalyticsStore
from personalization.stores.milvus import MESSAGES, VectorSpace, VectorStore

log = structlog.get_logger(__name__)


class NearestUtterance:
    """Classifier: one nearest neighbour by cosine over the example utterances, with a threshold."""

    def __init__(self, intent_ids: list[str], utterances: Vectors, threshold: float) -> None:
        self._intent_ids = np.asarray(intent_ids, dtype=object)
        self._utterances = utterances
        self._threshold = threshold

    def classify(self, vectors: Vectors) -> list[tuple[str, float]]:
        """`(intent_id, cosine)` for each row of unit vectors, shape (n, dim). O(n · utterances · dim)."""
        cosines = vectors @ self._utterances.T
        nearest = cosines.argmax(axis=1)
        best = cosines[np.arange(len(vectors)), nearest]
        intents = np.where(best >= self._threshold, self._intent_ids[nearest], OTHER_INTENT)
        return [(str(intent), float(cosine)) for intent, cosine in zip(intents, best, strict=True)]


def detect_intents(
    report: StageReport,
    shards: list[Ref],
    utterances: Ref,
    *,
    catalog: Catalog,
    space: VectorSpace,
    analytics: AnalyticsStore,
    vectors: VectorStore,
    staging: Staging,
    settings: Settings,
) -> list[Ref]:
    """Set the intents of the run's messages; return the users to refresh, as pages of `user_id`.

    After an edit of the catalog all users are refreshed, and if its intents changed, all messages are
    classified again from their stored vectors, without embedding them again.
    """
    examples = read(utterances)
    classifier = NearestUtterance(
        examples.column("intent_id").to_pylist(), embeddings_of(examples), settings.intent_threshold
    )
    run_id = report.run_id
    built = analytics.serving_state()
    if built is None or built.intents_version != intents_version(catalog, settings):
        for known in analytics.all_messages(settings.shard_rows):
            log.info(f"the catalog's intents changed: classifying {len(known):,} stored messages again")
            _keep(report, analytics, _with_vectors(known, space, vectors), classifier)
    for shard in shards:
        table = read(shard)
        messages = table.select(["id", "user_id", "timestamp"]).to_pylist()
        of_run = [{**message, "run_id": run_id} for message in messages]
        _keep(report, analytics, (of_run, embeddings_of(table)), classifier)

    catalog_changed = built is None or built.catalog_version != catalog_version(catalog)
    pages = analytics.users(None if catalog_changed else run_id, settings.shard_rows)
    refs = _stage_pages(pages, staging)
    report.details = {"users": sum(ref["rows"] for ref in refs), "catalog_changed": catalog_changed}
    return refs


def _keep(
    report: StageReport,
    analytics: AnalyticsStore,
    batch: tuple[list[dict[str, Any]], Vectors],
    classifier: NearestUtterance,
) -> None:
    messages, matrix = batch
    if not messages:
        return
    rows = [
        {
            "message_id": message["id"],
            "intent_id": intent_id,
            "user_id": message["user_id"],
            "timestamp": message["timestamp"],
            "confidence": cosine,
            "run_id": message["run_id"],
        }
        for message, (intent_id, cosine) in zip(messages, classifier.classify(matrix), strict=True)
    ]
    analytics.replace_message_intents([row["message_id"] for row in rows], rows)
    others = sum(row["intent_id"] == OTHER_INTENT for row in rows)
    report.rows_in += len(rows)
    report.rows_out += len(rows) - others
    report.skipped += others


def _with_vectors(
    messages: list[dict[str, Any]], space: VectorSpace, vectors: VectorStore
) -> tuple[list[dict[str, Any]], Vectors]:
    by_id = {message["id"]: message for message in messages}
    found = [row for rows in vectors.vectors(space.collection(MESSAGES), list(by_id)) for row in rows]
    matrix = np.asarray([row["embedding"] for row in found], dtype=np.float32).reshape(len(found), space.dim)
    return [by_id[row["id"]] for row in found], matrix


def _stage_pages(pages: Iterator[list[str]], staging: Staging) -> list[Ref]:
    return [
        staging.write(f"users/{number:06d}.parquet", pa.table({"user_id": page})) for number, page in enumerate(pages)
    ]
